//! The states at the boundaries of chunks, forwards, and their gradients, backwards.
//!
//! ```text
//! forwards     h <- exp(s[Q]) h + sum_j exp(s[Q] - s[j]) dt[j] x[j] B[j]^T
//! backwards    g <- exp(s[Q]) g + sum_i exp(s[i]) dy[i] C[i]^T
//! ```
//!
//! A cube owns a tile of channels of one batch entry and walks the chunks of a segment in order, the
//! state in registers; per chunk one product of `[channels, chunk] x [chunk, state]`. With more than one
//! segment a first walk finds what each adds, `pass` carries the states across, and a second walk starts
//! from them. The first begins no earlier in a segment than what is left at its end ([`begin`]). Bytes: `x` and `B`
//! read once per walk, one state per chunk written.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use crate::ops::cube::product::product;
use crate::ops::cube::tile::load;

/// What a walk does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Direction {
    pub(super) backwards: bool,
    /// Whether to start from given states (else from zero).
    pub(super) start: bool,
    /// Whether to write the state before each chunk.
    pub(super) emit: bool,
    /// Whether to write the state after each segment, or only after the last.
    pub(super) ends: bool,
}

/// The largest number of f32 is below e^89, and what is below e^-104 is rounded to zero: of a state that decays by more
/// than this exponent nothing is left, whatever it was.
const NOTHING: f32 = -193.0;

/// Vectors of the tile's state that a unit owns.
fn shares(plan: Plan) -> usize {
    (plan.channels() * plan.state_padded() / plan.vector_n).div_ceil(plan.team.units)
}

/// Where the element `(channel, n)` of a tile lies in `[.., heads, headdim, state]`, past the entry's
/// start; only for elements that exist.
#[cube]
pub(super) fn state_place(
    first_head: usize,
    row: usize,
    n: usize,
    #[comptime] plan: Plan,
) -> usize {
    let head = first_head + row / comptime!(plan.headdim_padded());
    let p = row % comptime!(plan.headdim_padded());
    (head * comptime!(plan.headdim) + p) * comptime!(plan.state) + n
}

/// Whether the element exists or is padding.
#[cube]
pub(super) fn state_exists(row: usize, n: usize, #[comptime] plan: Plan) -> bool {
    row < comptime!(plan.channels())
        && row % comptime!(plan.headdim_padded()) < comptime!(plan.headdim)
        && n < comptime!(plan.state)
}

/// Row and column of the first element of a unit's `r`th vector.
#[cube]
fn own_state(#[comptime] r: usize, #[comptime] plan: Plan) -> (usize, usize) {
    let place = UNIT_POS as usize + comptime!(r * plan.team.units);
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    (place / vectors, place % vectors * comptime!(plan.vector_n))
}

/// The segment that is walked last.
#[cube]
pub(super) fn last_segment(call: &Call, #[comptime] mode: Direction) -> usize {
    if comptime!(mode.backwards) {
        0usize.runtime()
    } else {
        call.segments - 1
    }
}

/// The chunk of a visit.
#[cube]
pub(super) fn chunk_of(visit: usize, from: usize, to: usize, #[comptime] mode: Direction) -> usize {
    let mut chunk = visit;
    if comptime!(mode.backwards) {
        chunk = from + to - 1 - visit;
    }
    chunk
}

/// Where the sums of a token of a chunk and a head lie.
#[cube]
pub(super) fn sum_place(
    batch: usize,
    chunk: usize,
    token: usize,
    head: usize,
    call: &Call,
    #[comptime] plan: Plan,
) -> usize {
    ((batch * call.chunks + chunk) * comptime!(plan.chunk) + token) * call.heads + head
}

/// The first visit of a segment's chunks of which anything is left at the segment's end in one of the cube's heads. Writes
/// the exponent of each head's decay from there on.
///
/// Read from the last chunk on, as many at a time as `some` has room for: one per token of a chunk and head.
#[cube]
pub(super) fn begin(
    sums: &[f32],
    totals: &mut [f32],
    batch: usize,
    segment: usize,
    first_head: usize,
    some: &mut Shared<[f32]>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
    #[comptime] units: usize,
) -> usize {
    let (block, heads) = comptime!((plan.chunk, plan.heads));
    let (from, to) = visits(segment, call);
    let mut exponents = Shared::<[f32]>::new_slice(heads);
    let mut counted = Shared::<[u32]>::new_slice(heads);
    let mut first = to;
    let mut more = true;
    while more {
        let count = min(first - from, block.runtime());
        let mut n = UNIT_POS as usize;
        while n < count * heads {
            let chunk = chunk_of(first - 1 - n / heads, from, to, mode);
            let last = comptime!(plan.chunk - 1).runtime();
            let place = sum_place(batch, chunk, last, first_head + n % heads, call, plan);
            some[n] = sums[place];
            n += units;
        }
        sync_cube();
        let mut head = UNIT_POS as usize;
        while head < heads {
            let mut exponent = 0.0f32;
            if first < to {
                exponent = exponents[head];
            }
            let mut left = 0u32;
            for visit in 0..count {
                // Not so where it is not a number, which is thus passed on.
                let gone = exponent < NOTHING;
                if !gone {
                    left = visit as u32 + 1u32;
                }
                exponent += some[visit * heads + head];
            }
            exponents[head] = exponent;
            counted[head] = left;
            head += units;
        }
        sync_cube();
        let mut most = 0u32;
        #[unroll]
        for head in 0..heads {
            most = max(most, counted[head]);
        }
        first -= most as usize;
        more = most as usize == count && first > from;
    }
    let mut head = UNIT_POS as usize;
    while head < heads {
        totals[(batch * call.segments + segment) * call.heads + first_head + head] =
            exponents[head];
        head += units;
    }
    first
}

/// The chunks of a segment: the first, and the first behind it.
#[cube]
pub(super) fn visits(segment: usize, call: &Call) -> (usize, usize) {
    let from = segment * call.per_segment;
    (from, min(from + call.per_segment, call.chunks))
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn walk<I: Float, E: Float, S: Float, VX: Size, VN: Size>(
    x: &[I],
    b: &[I],
    steps: &[f32],
    sums: &[f32],
    start: &[f32],
    states: &mut [S],
    last: &mut [f32],
    totals: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
    #[define(I, E, S)] _types: [ElemType; 3],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let tiles = call.heads / comptime!(plan.heads);
    let first_head = CUBE_POS % tiles * comptime!(plan.heads);
    let batch = CUBE_POS / tiles / call.segments;
    let segment = CUBE_POS / tiles % call.segments;
    let group = first_head / (call.heads / call.groups);
    let size = call.heads * comptime!(plan.headdim * plan.state);

    let mut x_tile = Shared::<[E]>::new_aligned_slice(comptime!(plan.tile_x().size()), 16usize);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(plan.tile_n().size()), 16usize);
    let mut stage = Shared::<[f32]>::new_aligned_slice(
        comptime!(plan.channels() * plan.stride_stage()),
        16usize,
    );
    let mut weights = Shared::<[f32]>::new_slice(comptime!(plan.chunk * plan.heads));
    let mut decays = Shared::<[f32]>::new_slice(comptime!(plan.heads));
    let mut state = Array::<Vector<f32, VN>>::new(comptime!(shares(plan)));

    let entry = (batch * call.segments + segment) * size;
    #[unroll]
    for r in 0..comptime!(shares(plan)) {
        let (row, n) = own_state(r, plan);
        state[r] = Vector::new(0.0f32);
        if comptime!(mode.start) {
            if state_exists(row, n, plan) {
                let start = start.as_vectorized().with_vector_size::<VN>();
                let place = entry + state_place(first_head, row, n, plan);
                state[r] = start[place / comptime!(plan.vector_n)];
            }
        }
    }

    let (from, to) = visits(segment, call);
    let mut first = from;
    if comptime!(mode.ends) {
        let units = comptime!(plan.team.units);
        first = begin(
            sums,
            totals,
            batch,
            segment,
            first_head,
            &mut weights,
            call,
            plan,
            mode,
            units,
        );
        sync_cube();
    }
    for visit in first..to {
        let chunk = chunk_of(visit, from, to, mode);
        let token = chunk * comptime!(plan.chunk);
        let rows = min(call.length - token, comptime!(plan.chunk).runtime());
        let base = batch * call.length + token;
        chunk_weights(
            steps,
            sums,
            batch,
            chunk,
            first_head,
            &mut weights,
            &mut decays,
            call,
            plan,
            mode,
        );
        load::<I, E, VN>(
            b,
            call.b.offset + base * call.b.row + group * comptime!(plan.state),
            call.b.row,
            rows,
            &mut b_tile,
            comptime!(plan.tile_n()),
            comptime!(plan.team),
        );
        sync_cube();
        load_weighted::<I, E, VX>(
            x,
            call.x.offset + base * call.x.row + first_head * comptime!(plan.headdim),
            rows,
            &weights,
            &mut x_tile,
            call,
            plan,
        );
        sync_cube();
        product::<E>(
            &x_tile,
            &b_tile,
            &mut stage,
            0usize,
            comptime!(plan.outer()),
            comptime!(plan.team),
        );
        sync_cube();
        let entry = (batch * call.chunks + chunk) * size;
        #[unroll]
        for r in 0..comptime!(shares(plan)) {
            let (row, n) = own_state(r, plan);
            if state_exists(row, n, plan) {
                if comptime!(mode.emit) {
                    let states = states.as_vectorized_mut().with_vector_size_mut::<VN>();
                    let place = entry + state_place(first_head, row, n, plan);
                    states[place / comptime!(plan.vector_n)] = Vector::cast_from(state[r]);
                }
                let decay = Vector::<f32, VN>::new(decays[row / comptime!(plan.headdim_padded())]);
                let stage = stage.as_vectorized().with_vector_size::<VN>();
                let place = row * comptime!(plan.stride_stage()) + n;
                state[r] = fma(state[r], decay, stage[place / comptime!(plan.vector_n)]);
            }
        }
        sync_cube();
    }

    let mut ends = comptime!(mode.ends).runtime();
    let mut entry = entry;
    if comptime!(!mode.ends) {
        entry = batch * size;
        ends = segment == last_segment(call, mode);
    }
    if ends {
        #[unroll]
        for r in 0..comptime!(shares(plan)) {
            let (row, n) = own_state(r, plan);
            if state_exists(row, n, plan) {
                let last = last.as_vectorized_mut().with_vector_size_mut::<VN>();
                let place = entry + state_place(first_head, row, n, plan);
                last[place / comptime!(plan.vector_n)] = state[r];
            }
        }
    }
}

/// The weights of the tokens of a chunk, by head, and the decay over the chunk.
#[cube]
fn chunk_weights(
    steps: &[f32],
    sums: &[f32],
    batch: usize,
    chunk: usize,
    first_head: usize,
    weights: &mut Shared<[f32]>,
    decays: &mut Shared<[f32]>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
) {
    let base = (batch * call.chunks + chunk) * comptime!(plan.chunk);
    let last = base + comptime!(plan.chunk - 1);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads) {
        let head = n % comptime!(plan.heads);
        let place = (base + n / comptime!(plan.heads)) * call.heads + first_head + head;
        let total = sums[last * call.heads + first_head + head];
        let mut weight = sums[place].exp();
        if comptime!(!mode.backwards) {
            weight = (total - sums[place]).exp() * steps[place];
        }
        weights[n] = weight;
        if n < comptime!(plan.heads) {
            decays[n] = total.exp();
        }
        n += comptime!(plan.team.units);
    }
}

/// As [`load`], each row of each head times its weight.
#[cube]
fn load_weighted<I: Float, E: Float, V: Size>(
    from: &[I],
    base: usize,
    rows: usize,
    weights: &Shared<[f32]>,
    into: &mut Shared<[E]>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let from = from.as_vectorized().with_vector_size::<V>();
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    let vector = comptime!(plan.vector_x);
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors * vector;
        let head = column / comptime!(plan.headdim_padded());
        let inside = column % comptime!(plan.headdim_padded());
        let mut value = Vector::<E, V>::new(E::from_int(0));
        if row < rows && inside < comptime!(plan.headdim) {
            let place = base + row * call.x.row + head * comptime!(plan.headdim) + inside;
            let weight = weights[row * comptime!(plan.heads) + head];
            let wide = Vector::<f32, V>::cast_from(from[place / vector]) * Vector::new(weight);
            value = Vector::<E, V>::cast_from(wide);
        }
        into[(row * comptime!(plan.stride_x()) + column) / vector] = value;
        n += comptime!(plan.team.units);
    }
}

/// Segments whose ends are read at once.
const AHEAD: usize = 4;

/// Carries the states across segments, with each segment's sum of decays in `totals`: `ends[segment]` becomes the state
/// at which the segment starts (forwards) or ends (backwards).
#[cube(launch, address_type = "dynamic")]
pub(super) fn pass<V: Size>(
    totals: &[f32],
    start: &[f32],
    ends: &mut [f32],
    size: usize,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
    #[define(V)] _vector: usize,
) {
    if ABSOLUTE_POS < call.cubes {
        let vectors = size / comptime!(plan.vector_n);
        let batch = ABSOLUTE_POS / vectors;
        let inside = ABSOLUTE_POS % vectors;
        let head = inside / comptime!(plan.headdim * plan.state / plan.vector_n);
        let ends = ends.as_vectorized_mut().with_vector_size_mut::<V>();
        let mut state = Vector::<f32, V>::new(0.0f32);
        if comptime!(mode.start) {
            let start = start.as_vectorized().with_vector_size::<V>();
            state = start[ABSOLUTE_POS];
        }
        let mut added = Array::<Vector<f32, V>>::new(AHEAD);
        let mut total = Array::<f32>::new(AHEAD);
        let mut first = 0usize.runtime();
        while first < call.segments {
            #[unroll]
            for n in 0..AHEAD {
                let segment = segment_of(min(first + n, call.segments - 1), call, mode);
                let entry = batch * call.segments + segment;
                added[n] = ends[entry * vectors + inside];
                total[n] = totals[entry * call.heads + head];
            }
            #[unroll]
            for n in 0..AHEAD {
                if first + n < call.segments {
                    let segment = segment_of(first + n, call, mode);
                    ends[(batch * call.segments + segment) * vectors + inside] = state;
                    state = fma(state, Vector::new(total[n].exp()), added[n]);
                }
            }
            first += AHEAD;
        }
    }
}

/// The segment that is passed after so many.
#[cube]
fn segment_of(visit: usize, call: &Call, #[comptime] mode: Direction) -> usize {
    let mut segment = visit;
    if comptime!(mode.backwards) {
        segment = call.segments - 1 - visit;
    }
    segment
}
