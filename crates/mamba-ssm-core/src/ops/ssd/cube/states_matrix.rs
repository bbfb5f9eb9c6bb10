//! The states at the boundaries of chunks, as `states` has them, on matrix units with fragments.
//!
//! ```text
//! forwards     h <- exp(s[Q]) h + sum_j exp(s[Q] - s[j]) dt[j] x[j] B[j]^T
//! backwards    g <- exp(s[Q]) g + sum_i exp(s[i]) dy[i] C[i]^T
//! ```
//!
//! A cube owns a tile of channels of one batch entry, a plane a block or two of 16 of them and a part of their state,
//! which stays where the products are summed: in registers. The next chunk is on its way from memory while this
//! one is multiplied; x meets its weights on the way into shared memory. Bytes: as in `states`.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use super::states::{
    Direction, begin, chunk_of, last_segment, state_exists, state_place, sum_place, visits,
};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    LANES, NARROW, Pair, four, four_column, left_transposed, multiply, own_column, own_row, right,
    zero_sums,
};
use crate::ops::cube::place::Place;
use crate::ops::cube::tile::{Tile, fetch, put};

/// What a cube owns.
#[derive(CubeType)]
pub(super) struct Share {
    pub(super) first_head: usize,
    pub(super) batch: usize,
    pub(super) segment: usize,
    pub(super) group: usize,
}

#[cube]
pub(super) fn share(call: &Call, #[comptime] plan: Plan) -> Share {
    let tiles = call.heads / comptime!(plan.heads);
    let first_head = CUBE_POS % tiles * comptime!(plan.heads);
    Share {
        first_head,
        batch: CUBE_POS / tiles / call.segments,
        segment: CUBE_POS / tiles % call.segments,
        group: first_head / (call.heads / call.groups),
    }
}

/// A plane's channels and part of the state.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Part {
    /// The first of its rows in the tile, and of its columns.
    pub(super) row: usize,
    pub(super) column: usize,
}

#[cube]
pub(super) fn part(#[comptime] plan: Plan) -> Part {
    let plane = UNIT_POS as usize / LANES;
    let rows = comptime!(plan.row_blocks * SIDE);
    let shares = comptime!(plan.channels() / rows);
    Part {
        row: plane % shares * rows,
        column: plane / shares * comptime!(plan.state_columns()),
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn walk_matrix<E: Float, S: Float, VX: Size, VN: Size>(
    x: &[E],
    b: &[E],
    steps: &[f32],
    sums: &[f32],
    start: &[f32],
    states: &mut [S],
    last: &mut [f32],
    totals: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
    #[define(E, S)] _types: [ElemType; 2],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let own = share(call, plan);
    // Nothing starts where the last segment ends.
    if comptime!(mode.ends) && own.segment == last_segment(call, mode) {
        terminate!();
    }
    let units = comptime!(plan.walk_units());
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    let mut tiles = WalkTiles::<E> {
        x: Shared::new_aligned_slice(comptime!(tile_x.size()), 128usize),
        b: Shared::new_aligned_slice(comptime!(tile_n.size()), 128usize),
        totals: Shared::new_aligned_slice(comptime!(plan.chunk * plan.heads), 16usize),
        decays: Shared::new_slice(comptime!(plan.heads)),
    };
    let mut next = Next::<E, VX, VN> {
        x: Array::new(comptime!(tile_x.shares(units))),
        b: Array::new(comptime!(tile_n.shares(units))),
        step: Array::new(comptime!(tile_x.shares(units))),
        sum: Array::new(comptime!(tile_x.shares(units))),
        end: Array::new(comptime!(tile_x.shares(units))),
    };

    let size = call.heads * comptime!(plan.headdim * plan.state);
    let entry = (own.batch * call.segments + own.segment) * size;
    let mut state = zero_state(plan);
    if comptime!(mode.start) {
        load_state(start, entry, own.first_head, &mut state, plan);
    }
    let (from, to) = visits(own.segment, call);
    let mut first = from;
    if comptime!(mode.ends) {
        first = begin(
            sums,
            totals,
            own.batch,
            own.segment,
            own.first_head,
            &mut tiles.totals,
            call,
            plan,
            mode,
            units,
        );
    }
    let chunk = chunk_of(first, from, to, mode);
    fetch_next::<E, VX, VN>(x, b, steps, sums, chunk, &own, &mut next, call, plan);
    for visit in first..to {
        sync_cube();
        put_next::<E, VX, VN>(&next, &mut tiles, plan, mode);
        sync_cube();
        if visit + 1 < to {
            let chunk = chunk_of(visit + 1, from, to, mode);
            fetch_next::<E, VX, VN>(x, b, steps, sums, chunk, &own, &mut next, call, plan);
        }
        if comptime!(mode.emit) {
            let chunk = chunk_of(visit, from, to, mode);
            let entry = (own.batch * call.chunks + chunk) * size;
            store_state::<S>(&state, states, entry, own.first_head, plan);
        }
        advance::<E>(&tiles, &mut state, plan);
    }
    if comptime!(mode.ends) {
        store_state::<f32>(&state, last, entry, own.first_head, plan);
    } else if own.segment == last_segment(call, mode) {
        store_state::<f32>(&state, last, own.batch * size, own.first_head, plan);
    }
}

/// A unit's share of a chunk of x, or backwards of dy.
#[cube]
pub(super) fn fetch_channels<E: Float, V: Size>(
    x: &[E],
    chunk: usize,
    own: &Share,
    into: &mut Array<Vector<E, V>>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let column = own.first_head * comptime!(plan.headdim);
    let tile = comptime!(plan.tile_x());
    fetch_chunk::<E, V>(
        x, &call.x, column, chunk, own, into, call, plan, tile, units,
    );
}

/// A unit's share of a chunk of B or C, of the cube's group.
#[cube]
pub(super) fn fetch_group<E: Float, V: Size>(
    from: &[E],
    place: &Place,
    chunk: usize,
    own: &Share,
    into: &mut Array<Vector<E, V>>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let column = own.group * comptime!(plan.state);
    let tile = comptime!(plan.tile_n());
    fetch_chunk::<E, V>(
        from, place, column, chunk, own, into, call, plan, tile, units,
    );
}

/// A unit's share of a chunk's rows, from `column` on.
#[cube]
fn fetch_chunk<E: Float, V: Size>(
    from: &[E],
    place: &Place,
    column: usize,
    chunk: usize,
    own: &Share,
    into: &mut Array<Vector<E, V>>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] tile: Tile,
    #[comptime] units: usize,
) {
    let token = chunk * comptime!(plan.chunk);
    let rows = min(call.length - token, comptime!(plan.chunk).runtime());
    let row = own.batch * call.length + token;
    let base = place.offset + row * place.row + column;
    fetch::<E, V>(from, base, place.row, rows, into, tile, units);
}

/// Where the sums of a token of a chunk and the head of a unit's share lie.
#[cube]
pub(super) fn weight_place(
    token: usize,
    head: usize,
    chunk: usize,
    own: &Share,
    call: &Call,
    #[comptime] plan: Plan,
) -> usize {
    sum_place(own.batch, chunk, token, own.first_head + head, call, plan)
}

/// Shared memory of a walk for states.
#[derive(CubeType)]
struct WalkTiles<E: Float> {
    /// `[chunk, channels]`, weighted, and `[chunk, state]`.
    x: Shared<[E]>,
    b: Shared<[E]>,
    /// Sums of decays over chunks, while it is found where to begin.
    totals: Shared<[f32]>,
    /// Over the whole chunk, `[heads]`.
    decays: Shared<[f32]>,
}

/// What of the next chunk is on its way, as it lies in memory: computed with at once, it would have to be waited
/// for.
#[derive(CubeType)]
struct Next<E: Float, VX: Size, VN: Size> {
    x: Array<Vector<E, VX>>,
    b: Array<Vector<E, VN>>,
    /// Of the token and head of each vector of x.
    step: Array<f32>,
    /// Sums of the decays, to the token and over the whole chunk.
    sum: Array<f32>,
    end: Array<f32>,
}

/// Reads a unit's share of a chunk into registers.
#[cube]
fn fetch_next<E: Float, VX: Size, VN: Size>(
    x: &[E],
    b: &[E],
    steps: &[f32],
    sums: &[f32],
    chunk: usize,
    own: &Share,
    next: &mut Next<E, VX, VN>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.walk_units());
    fetch_channels::<E, VX>(x, chunk, own, &mut next.x, call, plan, units);
    fetch_group::<E, VN>(b, &call.b, chunk, own, &mut next.b, call, plan, units);
    let last = comptime!(plan.chunk - 1).runtime();
    #[unroll]
    for share in 0..comptime!(plan.tile_x().shares(units)) {
        let (token, channel) = carried_channel(share, units, plan);
        let head = channel / comptime!(plan.headdim_padded());
        let place = weight_place(min(token, last), head, chunk, own, call, plan);
        next.step[share] = steps[place];
        next.sum[share] = sums[place];
        next.end[share] = sums[weight_place(last, head, chunk, own, call, plan)];
    }
}

/// Token and first channel of a vector of x that a unit carries; the last may be past the chunk.
#[cube]
fn carried_channel(
    #[comptime] share: usize,
    #[comptime] units: usize,
    #[comptime] plan: Plan,
) -> (usize, usize) {
    let n = UNIT_POS as usize + comptime!(share * units);
    let vectors = comptime!(plan.tile_x().vectors());
    (n / vectors, n % vectors * comptime!(plan.vector_x))
}

/// Writes what [`fetch_next`] read into shared memory, x times its weights, and the decay over the chunk.
#[cube]
fn put_next<E: Float, VX: Size, VN: Size>(
    next: &Next<E, VX, VN>,
    tiles: &mut WalkTiles<E>,
    #[comptime] plan: Plan,
    #[comptime] mode: Direction,
) {
    let units = comptime!(plan.walk_units());
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    put::<E, VN>(&next.b, &mut tiles.b, 0usize, tile_n, units);
    let mut weighted = Array::<Vector<E, VX>>::new(comptime!(tile_x.shares(units)));
    #[unroll]
    for share in 0..comptime!(tile_x.shares(units)) {
        let (sum, end) = (next.sum[share], next.end[share]);
        let weight = if comptime!(mode.backwards) {
            sum.exp()
        } else {
            (end - sum).exp() * next.step[share]
        };
        let wide = Vector::<f32, VX>::cast_from(next.x[share]) * Vector::new(weight);
        weighted[share] = Vector::<E, VX>::cast_from(wide);
        let (token, channel) = carried_channel(share, units, plan);
        if token == 0 && channel % comptime!(plan.headdim_padded()) == 0 {
            tiles.decays[channel / comptime!(plan.headdim_padded())] = end.exp();
        }
    }
    put::<E, VX>(&weighted, &mut tiles.x, 0usize, tile_x, units);
}

/// `state <- decay state + x^T b`, of a chunk whose x is weighted.
#[cube]
fn advance<E: Float>(tiles: &WalkTiles<E>, state: &mut Array<Pair<f32>>, #[comptime] plan: Plan) {
    decay_state(&tiles.decays, 0usize, state, plan);
    #[unroll]
    for step in 0..comptime!(plan.chunk / SIDE) {
        let token = comptime!(step * SIDE).runtime();
        let mut values = Sequence::<Array<Pair<E>>>::new();
        #[unroll]
        for block in 0..comptime!(plan.row_blocks) {
            let row = part(plan).row + comptime!(block * SIDE);
            let stride = comptime!(plan.stride_x());
            values.push(left_transposed::<E>(&tiles.x, row, token, stride));
        }
        add_products::<E>(&values, &tiles.b, token, state, plan);
    }
}

/// A plane's state of nothing.
#[cube]
pub(super) fn zero_state(#[comptime] plan: Plan) -> Array<Pair<f32>> {
    zero_sums(comptime!(plan.row_blocks * plan.state_columns() / NARROW))
}

/// Where the sums of a block of a plane's rows begin in its state.
fn sums_of_block(plan: Plan, block: usize) -> usize {
    block * 2 * plan.state_columns() / NARROW
}

/// `state <- decay state`, over the chunk at row `first` of the tiles.
#[cube]
pub(super) fn decay_state(
    decays: &Shared<[f32]>,
    first: usize,
    state: &mut Array<Pair<f32>>,
    #[comptime] plan: Plan,
) {
    let chunk = first / comptime!(plan.chunk) * comptime!(plan.heads);
    #[unroll]
    for block in 0..comptime!(plan.row_blocks) {
        let row = part(plan).row + comptime!(block * SIDE);
        let decay = Pair::<f32>::new(decays[chunk + row / comptime!(plan.headdim_padded())]);
        #[unroll]
        for n in 0..comptime!(2 * plan.state_columns() / NARROW) {
            state[comptime!(sums_of_block(plan, block) + n)] *= decay;
        }
    }
}

/// `state += values b`, of the 16 tokens from row `k` of the tile on; `values` are those of the blocks of a plane's rows.
#[cube]
pub(super) fn add_products<E: Float>(
    values: &Sequence<Array<Pair<E>>>,
    b_tile: &Shared<[E]>,
    k: usize,
    state: &mut Array<Pair<f32>>,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for n in 0..comptime!(plan.state_columns() / SIDE) {
        let column = part(plan).column + comptime!(n * SIDE);
        let columns = right::<E>(b_tile, k, column, comptime!(plan.stride_n()));
        #[unroll]
        for block in 0..comptime!(plan.row_blocks) {
            let sums = comptime!(sums_of_block(plan, block) / 2 + 2 * n);
            multiply::<E>(values.index(block), &columns, state, sums);
        }
    }
}

/// Writes a unit's part of the state to `[.., heads, headdim, state]`, four numbers at a time where they lie so.
#[cube]
pub(super) fn store_state<S: Float>(
    state: &Array<Pair<f32>>,
    to: &mut [S],
    entry: usize,
    first_head: usize,
    #[comptime] plan: Plan,
) {
    let part = part(plan);
    let first_row = part.row + own_row();
    #[unroll]
    for half in 0..comptime!(2 * plan.row_blocks) {
        let row = first_row + comptime!(half * 8);
        let sums = comptime!(sums_of_block(plan, half / 2) + half % 2);
        let place = entry + state_place(first_head, row, 0usize, plan);
        #[unroll]
        for t in 0..comptime!(plan.state_columns() / SIDE) {
            let first = state[comptime!(sums + 4 * t)];
            let second = state[comptime!(sums + 4 * t + 2)];
            if comptime!(plan.vector_n >= 4) {
                let values = four(first, second);
                let n = part.column + comptime!(t * SIDE) + four_column();
                if state_exists(row, n, plan) {
                    let to = to.as_vectorized_mut().with_vector_size_mut::<Const<4>>();
                    to[(place + n) / 4] = Vector::<S, Const<4>>::cast_from(values);
                }
            } else {
                let to = to.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
                let n = part.column + comptime!(t * SIDE) + own_column();
                if state_exists(row, n, plan) {
                    to[(place + n) / 2] = Pair::<S>::cast_from(first);
                }
                if state_exists(row, n + NARROW, plan) {
                    to[(place + n + NARROW) / 2] = Pair::<S>::cast_from(second);
                }
            }
        }
    }
}

/// Reads them.
#[cube]
pub(super) fn load_state(
    from: &[f32],
    entry: usize,
    first_head: usize,
    state: &mut Array<Pair<f32>>,
    #[comptime] plan: Plan,
) {
    let from = from.as_vectorized().with_vector_size::<Const<2>>();
    let part = part(plan);
    let first_row = part.row + own_row();
    #[unroll]
    for t in 0..comptime!(plan.state_columns() / NARROW) {
        let n = part.column + comptime!(t * NARROW) + own_column();
        #[unroll]
        for half in 0..comptime!(2 * plan.row_blocks) {
            let row = first_row + comptime!(half * 8);
            if state_exists(row, n, plan) {
                let place = entry + state_place(first_head, row, n, plan);
                let sums = comptime!(sums_of_block(plan, half / 2) + half % 2);
                state[comptime!(sums + 2 * t)] = from[place / 2];
            }
        }
    }
}
