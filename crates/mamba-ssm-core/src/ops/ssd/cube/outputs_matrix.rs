//! The outputs of every chunk, as `outputs` has them, on matrix units with fragments.
//!
//! ```text
//! y[i] = sum_{j <= i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j]  +  exp(s[i]) h C[i]  +  D x[i]
//! ```
//!
//! A cube owns one chunk and the tiles of channels of a block of heads; a plane owns 16 tokens. `C B^T`
//! stays in registers over all heads; decayed and masked there, it is the left operand of the product with
//! x, which is summed on top of `C H^T`. The next tile's x and states are on their way from memory while
//! this one's outputs are computed. Bytes: as in `outputs`.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use super::steps::{bounded, last_of_block};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    LANES, NARROW, Pair, left, multiply, own_column, own_pair, own_row, right, right_transposed,
    zero_sums,
};
use crate::ops::cube::tile::{fetch, put};

/// Step sizes that a unit carries per tile.
fn step_shares(plan: Plan) -> usize {
    (plan.chunk * plan.heads).div_ceil(plan.output_units())
}

/// Vectors of a tile's states that each of so many units carries.
pub(super) fn state_shares(plan: Plan, units: usize) -> usize {
    (plan.channels() * plan.state_padded() / plan.vector_n).div_ceil(units)
}

/// What a cube owns.
#[derive(CubeType)]
struct Share {
    batch: usize,
    chunk: usize,
    /// The first of its heads.
    head: usize,
    /// Tokens before its own, and how many it has.
    base: usize,
    rows: usize,
}

#[cube]
fn share(call: &Call, #[comptime] plan: Plan) -> Share {
    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let token = chunk * comptime!(plan.chunk);
    Share {
        batch,
        chunk,
        head: CUBE_POS % blocks * call.tiles * comptime!(plan.heads),
        base: batch * call.length + token,
        rows: min(call.length - token, comptime!(plan.chunk).runtime()),
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn outputs_matrix<E: Float, S: Float, VX: Size, VN: Size>(
    x: &[E],
    b: &[E],
    c: &[E],
    d: &[f32],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    y: &mut [E],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(E, S)] _types: [ElemType; 2],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let own = share(call, plan);
    let units = comptime!(plan.output_units());
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    let mut x_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_x.size()), 128usize);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 128usize);
    let mut c_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 128usize);
    let mut h_tile =
        Shared::<[E]>::new_aligned_slice(comptime!(plan.channels() * plan.stride_n()), 128usize);
    let mut decays = Decays {
        step: Shared::new_aligned_slice(comptime!(plan.chunk * plan.heads), 16usize),
        sum: Shared::new_aligned_slice(comptime!(plan.chunk * plan.heads), 16usize),
        factor: Shared::new_aligned_slice(comptime!(plan.chunk * plan.heads), 16usize),
    };
    let mut next_x = Array::<Vector<E, VX>>::new(comptime!(tile_x.shares(units)));
    let mut next_h = Array::<Vector<S, VN>>::new(comptime!(state_shares(plan, units)));
    let mut next_step = Array::<f32>::new(comptime!(step_shares(plan)));
    let mut next_sum = Array::<f32>::new(comptime!(step_shares(plan)));
    let mut next_end = Array::<f32>::new(comptime!(step_shares(plan)));

    let column = own.head / (call.heads / call.groups) * comptime!(plan.state);
    let mut rows = Array::<Vector<E, VN>>::new(comptime!(tile_n.shares(units)));
    let from_b = call.b.offset + own.base * call.b.row + column;
    fetch::<E, VN>(b, from_b, call.b.row, own.rows, &mut rows, tile_n, units);
    put::<E, VN>(&rows, &mut b_tile, 0usize, tile_n, units);
    let from_c = call.c.offset + own.base * call.c.row + column;
    fetch::<E, VN>(c, from_c, call.c.row, own.rows, &mut rows, tile_n, units);
    put::<E, VN>(&rows, &mut c_tile, 0usize, tile_n, units);
    fetch_x::<E, VX>(x, own.head, &own, &mut next_x, call, plan);
    fetch_states::<S, VN>(
        states,
        own.batch,
        own.chunk,
        own.head,
        &mut next_h,
        call,
        plan,
        units,
    );
    fetch_steps(steps, own.head, &own, &mut next_step, call, plan, false);
    fetch_steps(sums, own.head, &own, &mut next_sum, call, plan, false);
    fetch_steps(sums, own.head, &own, &mut next_end, call, plan, true);
    sync_cube();
    let scores = similarities::<E>(&c_tile, &b_tile, plan);

    // Not known when compiled, or the loop over heads would be unrolled: the code of all heads would not fit
    // the instruction cache.
    let heads = min(call.heads, comptime!(plan.heads).runtime());
    for tile in 0..call.tiles {
        let head = own.head + tile * comptime!(plan.heads);
        sync_cube();
        put::<E, VX>(&next_x, &mut x_tile, 0usize, tile_x, units);
        put_states::<S, E, VN>(&next_h, &mut h_tile, 0usize, plan, units);
        put_decays(&next_step, &next_sum, &next_end, &mut decays, plan);
        sync_cube();
        if tile + 1 < call.tiles {
            let next = head + comptime!(plan.heads);
            fetch_x::<E, VX>(x, next, &own, &mut next_x, call, plan);
            fetch_states::<S, VN>(
                states,
                own.batch,
                own.chunk,
                next,
                &mut next_h,
                call,
                plan,
                units,
            );
            fetch_steps(steps, next, &own, &mut next_step, call, plan, false);
            fetch_steps(sums, next, &own, &mut next_sum, call, plan, false);
            fetch_steps(sums, next, &own, &mut next_end, call, plan, true);
        }
        for inner in 0..heads {
            let mut out = zero_sums(comptime!(plan.headdim_padded() / NARROW));
            carried::<E>(&c_tile, &h_tile, &decays.sum, &mut out, inner, plan);
            mixed::<E>(&scores, &x_tile, &decays, &mut out, inner, plan);
            store::<E>(&out, &x_tile, d, y, &own, head, inner, call, plan);
        }
    }
}

/// Of a tile's tokens, `[heads, chunk]` each.
#[derive(CubeType)]
struct Decays {
    step: Shared<[f32]>,
    sum: Shared<[f32]>,
    /// The decay from a token to the last of its block of 16, times its step.
    factor: Shared<[f32]>,
}

/// The plane's first token in the chunk.
#[cube]
fn first_token() -> usize {
    UNIT_POS as usize / LANES * SIDE
}

/// `C B^T` of a plane's tokens with those up to its last.
#[cube]
fn similarities<E: Float>(
    c_tile: &Shared<[E]>,
    b_tile: &Shared<[E]>,
    #[comptime] plan: Plan,
) -> Array<Pair<f32>> {
    let mut scores = zero_sums(comptime!(plan.chunk / NARROW));
    let token = first_token();
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(c_tile, token, k, stride);
        #[unroll]
        for block in 0..comptime!(plan.chunk / SIDE) {
            if comptime!(block * SIDE) <= token {
                let columns = right_transposed::<E>(b_tile, k, comptime!(block * SIDE), stride);
                multiply::<E>(&rows, &columns, &mut scores, comptime!(2 * block));
            }
        }
    }
    scores
}

/// `out = exp(s[i]) C H^T` of a head.
#[cube]
fn carried<E: Float>(
    c_tile: &Shared<[E]>,
    h_tile: &Shared<[E]>,
    sum: &Shared<[f32]>,
    out: &mut Array<Pair<f32>>,
    head: usize,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(c_tile, first_token(), k, stride);
        #[unroll]
        for block in 0..comptime!(padded / SIDE) {
            let column = head * padded + comptime!(block * SIDE);
            let columns = right_transposed::<E>(h_tile, k, column, stride);
            multiply::<E>(&rows, &columns, out, comptime!(2 * block));
        }
    }
    let token = head * comptime!(plan.chunk) + first_token() + own_row();
    #[unroll]
    for half in 0..2usize {
        let decay = Pair::<f32>::new(sum[token + comptime!(half * 8)].exp());
        #[unroll]
        for n in 0..comptime!(padded / NARROW) {
            out[comptime!(2 * n + half)] *= decay;
        }
    }
}

/// `out += M X` of a head, with `M[i, j] = scores[i, j] exp(s[i] - s[j]) dt[j]` for `j <= i`.
#[cube]
fn mixed<E: Float>(
    scores: &Array<Pair<f32>>,
    x_tile: &Shared<[E]>,
    decays: &Decays,
    out: &mut Array<Pair<f32>>,
    head: usize,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    #[unroll]
    for block in 0..comptime!(plan.chunk / SIDE) {
        let token = comptime!(block * SIDE);
        if token <= first_token() {
            let mut rows = Array::<Pair<E>>::new(4usize);
            if token == first_token() {
                own_block::<E>(scores, decays, &mut rows, head, block, plan);
            } else {
                earlier_block::<E>(scores, decays, &mut rows, head, block, plan);
            }
            #[unroll]
            for n in 0..comptime!(padded / SIDE) {
                let column = head * padded + comptime!(n * SIDE);
                let columns = right::<E>(x_tile, token, column, comptime!(plan.stride_x()));
                multiply::<E>(&rows, &columns, out, comptime!(2 * n));
            }
        }
    }
}

/// A block of `M` before the plane's own tokens, as the left operand of a product. The decay from one token
/// to another is that to the end of the earlier one's block times that from there on.
#[cube]
fn earlier_block<E: Float>(
    scores: &Array<Pair<f32>>,
    decays: &Decays,
    rows: &mut Array<Pair<E>>,
    head: usize,
    #[comptime] block: usize,
    #[comptime] plan: Plan,
) {
    let base = head * comptime!(plan.chunk);
    let factors = decays.factor.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let others = head * comptime!(plan.chunk / 2) + own_pair() + comptime!(block * SIDE / 2);
    let edge = decays.sum[base + comptime!(block * SIDE + SIDE - 1)];
    let token = base + first_token() + own_row();
    #[unroll]
    for row in 0..2usize {
        let decay = bounded(decays.sum[token + comptime!(row * 8)] - edge);
        let decay = Pair::<f32>::new(decay);
        #[unroll]
        for side in 0..2usize {
            let score = scores[comptime!(2 * (2 * block + side) + row)];
            let factor = factors[others + comptime!(side * NARROW / 2)];
            rows[comptime!(2 * side + row)] = Pair::<E>::cast_from(score * (factor * decay));
        }
    }
}

/// The block of `M` of the plane's own tokens.
#[cube]
fn own_block<E: Float>(
    scores: &Array<Pair<f32>>,
    decays: &Decays,
    rows: &mut Array<Pair<E>>,
    head: usize,
    #[comptime] block: usize,
    #[comptime] plan: Plan,
) {
    let steps = decays.step.as_vectorized().with_vector_size::<Const<2>>();
    let sums = decays.sum.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let others = head * comptime!(plan.chunk / 2) + own_pair() + comptime!(block * SIDE / 2);
    let token = head * comptime!(plan.chunk) + first_token() + own_row();
    #[unroll]
    for n in 0..4usize {
        // Left, below, right, below right: the one on the right holds no pair, the one below all of its.
        let (row, side) = comptime!((n % 2, n / 2));
        if comptime!(row < side) {
            rows[n] = Pair::<E>::new(E::from_int(0));
        } else {
            let own = decays.sum[token + comptime!(row * 8)];
            let behind = sums[others + comptime!(side * NARROW / 2)];
            let step = steps[others + comptime!(side * NARROW / 2)];
            let score = scores[comptime!(2 * (2 * block + side) + row)];
            let mut values = Pair::<f32>::new(0.0f32);
            #[unroll]
            for lane in 0..2usize {
                let mut weight = (own - behind.extract(lane)).exp() * step.extract(lane);
                if comptime!(row == side) {
                    weight = select(own_column() + lane <= own_row(), weight, 0.0f32);
                }
                values.insert(lane, score.extract(lane) * weight);
            }
            rows[n] = Pair::<E>::cast_from(values);
        }
    }
}

/// Writes the outputs of a head, with the skip connection.
#[cube]
fn store<E: Float>(
    out: &Array<Pair<f32>>,
    x_tile: &Shared<[E]>,
    d: &[f32],
    y: &mut [E],
    own: &Share,
    first_head: usize,
    head: usize,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let x_tile = x_tile.as_vectorized().with_vector_size::<Const<2>>();
    let d = d.as_vectorized().with_vector_size::<Const<2>>();
    let y = y.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    let first = first_token() + own_row();
    #[unroll]
    for n in 0..comptime!(plan.headdim_padded() / NARROW) {
        let inside = comptime!(n * NARROW) + own_column();
        if inside < comptime!(plan.headdim) {
            let channel = (first_head + head) * comptime!(plan.headdim) + inside;
            #[unroll]
            for half in 0..2usize {
                let row = first + comptime!(half * 8);
                if row < own.rows {
                    let mut value = out[comptime!(2 * n + half)];
                    if comptime!(plan.skip) {
                        let place = row * comptime!(plan.stride_x())
                            + head * comptime!(plan.headdim_padded())
                            + inside;
                        value += Pair::<f32>::cast_from(x_tile[place / 2]) * d[channel / 2];
                    }
                    let place = call.out.offset + (own.base + row) * call.out.row + channel;
                    y[place / 2] = Pair::<E>::cast_from(value);
                }
            }
        }
    }
}

/// A unit's share of x of the tile that starts at a head.
#[cube]
fn fetch_x<E: Float, V: Size>(
    x: &[E],
    head: usize,
    own: &Share,
    into: &mut Array<Vector<E, V>>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let base = call.x.offset + own.base * call.x.row + head * comptime!(plan.headdim);
    fetch::<E, V>(
        x,
        base,
        call.x.row,
        own.rows,
        into,
        comptime!(plan.tile_x()),
        comptime!(plan.output_units()),
    );
}

/// A unit's share of the states at a chunk of the tile that starts at a head.
#[cube]
pub(super) fn fetch_states<S: Float, V: Size>(
    states: &[S],
    batch: usize,
    chunk: usize,
    head: usize,
    into: &mut Array<Vector<S, V>>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let entry =
        ((batch * call.chunks + chunk) * call.heads + head) * comptime!(plan.headdim * plan.state);
    let from = states.as_vectorized().with_vector_size::<V>();
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    #[unroll]
    for share in 0..comptime!(state_shares(plan, units)) {
        let place = UNIT_POS as usize + comptime!(share * units);
        let (row, n) = (place / vectors, place % vectors * comptime!(plan.vector_n));
        let inner = row / comptime!(plan.headdim_padded());
        let p = row % comptime!(plan.headdim_padded());
        let exists = row < comptime!(plan.channels())
            && p < comptime!(plan.headdim)
            && n < comptime!(plan.state);
        let at = entry + (inner * comptime!(plan.headdim) + p) * comptime!(plan.state) + n;
        let value = from[select(exists, at / comptime!(plan.vector_n), 0usize)];
        into[share] = select(exists, value, Vector::new(S::from_int(0)));
    }
}

/// Writes them into shared memory, `[channels, state]`, from element `start` on.
#[cube]
pub(super) fn put_states<S: Float, E: Float, V: Size>(
    values: &Array<Vector<S, V>>,
    into: &mut Shared<[E]>,
    start: usize,
    #[comptime] plan: Plan,
    #[comptime] units: usize,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    #[unroll]
    for share in 0..comptime!(state_shares(plan, units)) {
        let place = UNIT_POS as usize + comptime!(share * units);
        let (row, column) = (place / vectors, place % vectors);
        if row < comptime!(plan.channels()) {
            let at = start / comptime!(plan.vector_n)
                + row * comptime!(plan.stride_n() / plan.vector_n)
                + column;
            into[at] = Vector::<E, V>::cast_from(values[share]);
        }
    }
}

/// A unit's share of the chunk's steps, or of their sums, of the tile that starts at a head; or of the sums at
/// the ends of the tokens' blocks of 16.
#[cube]
fn fetch_steps(
    from: &[f32],
    first_head: usize,
    own: &Share,
    into: &mut Array<f32>,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] ends: bool,
) {
    let base = (own.batch * call.chunks + own.chunk) * comptime!(plan.chunk);
    #[unroll]
    for share in 0..comptime!(step_shares(plan)) {
        let n = UNIT_POS as usize + comptime!(share * plan.output_units());
        let mut token = min(
            n / comptime!(plan.heads),
            comptime!(plan.chunk - 1).runtime(),
        );
        if comptime!(ends) {
            token = last_of_block(token);
        }
        let head = n % comptime!(plan.heads);
        into[share] = from[(base + token) * call.heads + first_head + head];
    }
}

/// Writes what [`fetch_steps`] read into shared memory.
#[cube]
fn put_decays(
    step: &Array<f32>,
    sum: &Array<f32>,
    end: &Array<f32>,
    into: &mut Decays,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for share in 0..comptime!(step_shares(plan)) {
        let n = UNIT_POS as usize + comptime!(share * plan.output_units());
        let (token, head) = (n / comptime!(plan.heads), n % comptime!(plan.heads));
        if token < comptime!(plan.chunk) {
            let at = head * comptime!(plan.chunk) + token;
            into.step[at] = step[share];
            into.sum[at] = sum[share];
            into.factor[at] = bounded(end[share] - sum[share]) * step[share];
        }
    }
}
