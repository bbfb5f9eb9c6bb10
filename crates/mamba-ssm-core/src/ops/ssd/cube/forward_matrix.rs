//! States and outputs in one walk, on matrix units with fragments.
//!
//! ```text
//! y[i] = sum_{j <= i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j]  +  exp(s[i]) h C[i]  +  D x[i]
//! h <- exp(s[Q]) h + sum_j exp(s[Q] - s[j]) dt[j] x[j] B[j]^T
//! ```
//!
//! A cube owns a tile of channels of one batch entry and walks the chunks of a segment in order. Its planes have
//! two tasks in turn: 16 tokens each, of some heads or channels, of a chunk's outputs (`outputs_matrix`), then 16
//! channels each, of a part of the state, of that (`states_matrix`), which stays in registers; the outputs read it,
//! rounded, from shared memory. Where that has room for two chunks, C of the next one is on its way from memory while
//! outputs are found, and all else while the state is brought up to date: half as much waits in registers, which
//! the products need. With more than one segment the ends
//! of segments have been found by a walk before this one.
//!
//! Bytes: `x`, `B` and `C` read once (`B` and `C` once for each tile of channels, mostly from the cache), `y`
//! written, and one state per chunk where the backward pass will want them.

use cubecl::prelude::*;

use super::outputs_matrix::{Decays, Tiles, outputs};
use super::plan::{Call, Plan};
use super::scores_matrix::scores_size;
use super::states::{Direction, last_segment, state_exists, state_place, visits};
use super::states_matrix::{
    Share, add_products, decay_state, fetch_channels, fetch_group, load_state, part, share,
    store_state, weight_place, zero_state,
};
use super::steps::{bounded, carried_step, last_of_block};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    LANES, NARROW, Pair, left_transposed, own_column, own_pair, own_row,
};
use crate::ops::cube::tile::put;

/// Vectors of a tile's state that a unit writes.
fn state_shares(plan: Plan) -> usize {
    (plan.channels() * plan.state_padded() / plan.vector_n).div_ceil(plan.forward_units())
}

/// What of the next chunk is on its way, as it lies in memory.
#[derive(CubeType)]
struct Next<E: Float, VX: Size, VN: Size> {
    x: Array<Vector<E, VX>>,
    b: Array<Vector<E, VN>>,
    c: Array<Vector<E, VN>>,
    step: Array<f32>,
    /// Sums of the decays, to the token, to the last of its block of 16, and to the last of the chunk.
    sum: Array<f32>,
    end: Array<f32>,
    whole: Array<f32>,
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn forward_matrix<E: Float, S: Float, VX: Size, VN: Size>(
    x: &[E],
    b: &[E],
    c: &[E],
    scores: &[f32],
    d: &[f32],
    steps: &[f32],
    sums: &[f32],
    start: &[f32],
    y: &mut [E],
    states: &mut [S],
    last: &mut [f32],
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
    let units = comptime!(plan.forward_units());
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    let mut tiles = new_tiles::<E>(plan);
    put_skip(d, &own, &mut tiles.d, plan);
    let mut next = Next::<E, VX, VN> {
        x: Array::new(comptime!(tile_x.shares(units))),
        b: Array::new(comptime!(tile_n.shares(units))),
        c: Array::new(comptime!(tile_n.shares(units))),
        step: Array::new(comptime!(plan.step_shares(plan.forward_units()))),
        sum: Array::new(comptime!(plan.step_shares(plan.forward_units()))),
        end: Array::new(comptime!(plan.step_shares(plan.forward_units()))),
        whole: Array::new(comptime!(plan.step_shares(plan.forward_units()))),
    };
    let size = call.heads * comptime!(plan.headdim * plan.state);
    let mut state = zero_state(plan);
    if comptime!(mode.start) {
        let entry = (own.batch * call.segments + own.segment) * size;
        if has_channels(plan) {
            load_state(start, entry, own.first_head, &mut state, plan);
        }
    }
    let (from, to) = visits(own.segment, call);
    fetch_group::<E, VN>(c, &call.c, from, &own, &mut next.c, call, plan, units);
    fetch_rest::<E, VX, VN>(x, b, steps, sums, from, &own, &mut next, call, plan);
    let mut first = 0usize;
    if comptime!(plan.two_chunks) {
        put_c::<E, VX, VN>(&next, &mut tiles, first, plan);
        put_rest::<E, VX, VN>(&next, &mut tiles, first, plan);
    }
    for chunk in from..to {
        // Who is here has left the outputs of the chunk before: they are read from the state, and from all else
        // where the next chunk takes its place.
        sync_cube();
        if comptime!(!plan.two_chunks) {
            put_c::<E, VX, VN>(&next, &mut tiles, first, plan);
            put_rest::<E, VX, VN>(&next, &mut tiles, first, plan);
        }
        if has_channels(plan) {
            put_state::<E>(&state, &mut tiles.h, plan);
        }
        sync_cube();
        if comptime!(mode.emit) {
            let entry = (own.batch * call.chunks + chunk) * size;
            emit::<E, S, VN>(&tiles.h, &state, states, entry, own.first_head, plan);
        }
        let more = chunk + 1 < to;
        let behind = comptime!(plan.chunk) - first;
        if comptime!(plan.two_chunks) && more {
            fetch_group::<E, VN>(c, &call.c, chunk + 1, &own, &mut next.c, call, plan, units);
        }
        if has_tokens(plan) {
            let token = chunk * comptime!(plan.chunk);
            let rows = min(call.length - token, comptime!(plan.chunk).runtime());
            let row = call.out.offset + (own.batch * call.length + token) * call.out.row;
            let to = row + own.first_head * comptime!(plan.headdim);
            let from = (own.batch * call.chunks + chunk) * call.groups + own.group;
            let from = from * comptime!(scores_size(plan));
            outputs::<E>(&tiles, first, scores, from, y, to, rows, call, plan);
        }
        if more {
            if comptime!(plan.two_chunks) {
                put_c::<E, VX, VN>(&next, &mut tiles, behind, plan);
            } else {
                fetch_group::<E, VN>(c, &call.c, chunk + 1, &own, &mut next.c, call, plan, units);
            }
            fetch_rest::<E, VX, VN>(x, b, steps, sums, chunk + 1, &own, &mut next, call, plan);
        }
        if has_channels(plan) {
            advance::<E>(&tiles, first, &mut state, plan);
        }
        if comptime!(plan.two_chunks) {
            if more {
                put_rest::<E, VX, VN>(&next, &mut tiles, behind, plan);
            }
            first = behind;
        }
    }
    if own.segment == last_segment(call, mode) && has_channels(plan) {
        store_state::<f32>(&state, last, own.batch * size, own.first_head, plan);
    }
}

#[cube]
fn new_tiles<E: Float>(#[comptime] plan: Plan) -> Tiles<E> {
    let chunks = comptime!(1 + usize::from(plan.two_chunks));
    let steps = comptime!(chunks * plan.chunk * plan.heads);
    let (size_x, size_n) =
        comptime!((chunks * plan.tile_x().size(), chunks * plan.tile_n().size()));
    let size_h = comptime!(plan.channels() * plan.stride_n());
    Tiles::<E> {
        x: Shared::new_aligned_slice(size_x, 128usize),
        b: Shared::new_aligned_slice(size_n, 128usize),
        c: Shared::new_aligned_slice(size_n, 128usize),
        h: Shared::new_aligned_slice(size_h, 128usize),
        d: Shared::new_aligned_slice(comptime!(plan.channels()), 16usize),
        decays: Decays {
            step: Shared::new_aligned_slice(steps, 16usize),
            sum: Shared::new_aligned_slice(steps, 16usize),
            factor: Shared::new_aligned_slice(steps, 16usize),
            weight: Shared::new_aligned_slice(steps, 16usize),
            whole: Shared::new_aligned_slice(comptime!(chunks * plan.heads), 16usize),
        },
    }
}

/// Whether the plane owns tokens: there may be more planes than those.
#[cube]
fn has_tokens(#[comptime] plan: Plan) -> bool {
    let units = comptime!(plan.output_planes() * LANES);
    units >= comptime!(plan.forward_units()) || (UNIT_POS as usize) < units
}

/// Whether the plane owns channels.
#[cube]
fn has_channels(#[comptime] plan: Plan) -> bool {
    let units = comptime!(plan.walk_units());
    units >= comptime!(plan.forward_units()) || (UNIT_POS as usize) < units
}

/// Brings D into shared memory; zero at padding.
#[cube]
fn put_skip(d: &[f32], own: &Share, into: &mut Shared<[f32]>, #[comptime] plan: Plan) {
    if comptime!(plan.skip) {
        let mut n = UNIT_POS as usize;
        while n < comptime!(plan.channels()) {
            let head = own.first_head + n / comptime!(plan.headdim_padded());
            let inside = n % comptime!(plan.headdim_padded());
            let mut value = 0.0f32;
            if inside < comptime!(plan.headdim) {
                value = d[head * comptime!(plan.headdim) + inside];
            }
            into[n] = value;
            n += comptime!(plan.forward_units());
        }
    }
}

/// Reads a unit's share of a chunk, but for its C, into registers.
#[cube]
fn fetch_rest<E: Float, VX: Size, VN: Size>(
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
    let units = comptime!(plan.forward_units());
    fetch_channels::<E, VX>(x, chunk, own, &mut next.x, call, plan, units);
    fetch_group::<E, VN>(b, &call.b, chunk, own, &mut next.b, call, plan, units);
    #[unroll]
    for share in 0..comptime!(plan.step_shares(plan.forward_units())) {
        let (token, head) = carried_step(share, units, plan);
        let final_token = comptime!(plan.chunk - 1).runtime();
        let token = min(token, final_token);
        let end = last_of_block(token);
        let place = weight_place(token, head, chunk, own, call, plan);
        next.step[share] = steps[place];
        next.sum[share] = sums[place];
        next.end[share] = sums[weight_place(end, head, chunk, own, call, plan)];
        next.whole[share] = sums[weight_place(final_token, head, chunk, own, call, plan)];
    }
}

/// Writes a chunk's C into shared memory, from row `first` on.
#[cube]
fn put_c<E: Float, VX: Size, VN: Size>(
    next: &Next<E, VX, VN>,
    tiles: &mut Tiles<E>,
    first: usize,
    #[comptime] plan: Plan,
) {
    let (tile, units) = comptime!((plan.tile_n(), plan.forward_units()));
    put::<E, VN>(
        &next.c,
        &mut tiles.c,
        first * comptime!(tile.stride),
        tile,
        units,
    );
}

/// Writes what [`fetch_rest`] read.
#[cube]
fn put_rest<E: Float, VX: Size, VN: Size>(
    next: &Next<E, VX, VN>,
    tiles: &mut Tiles<E>,
    first: usize,
    #[comptime] plan: Plan,
) {
    let units = comptime!(plan.forward_units());
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    put::<E, VX>(
        &next.x,
        &mut tiles.x,
        first * comptime!(tile_x.stride),
        tile_x,
        units,
    );
    put::<E, VN>(
        &next.b,
        &mut tiles.b,
        first * comptime!(tile_n.stride),
        tile_n,
        units,
    );
    let decays = &mut tiles.decays;
    #[unroll]
    for share in 0..comptime!(plan.step_shares(plan.forward_units())) {
        let (token, head) = carried_step(share, units, plan);
        let (step, sum) = (next.step[share], next.sum[share]);
        if token < comptime!(plan.chunk) {
            let at = first * comptime!(plan.heads) + head * comptime!(plan.chunk) + token;
            decays.step[at] = step;
            decays.sum[at] = sum;
            decays.factor[at] = bounded(next.end[share] - sum) * step;
            decays.weight[at] = (next.whole[share] - sum).exp() * step;
        }
        if token == 0 {
            let at = first / comptime!(plan.chunk) * comptime!(plan.heads) + head;
            decays.whole[at] = next.whole[share].exp();
        }
    }
}

/// `state <- decay state + (weights x)^T b`, of the chunk at row `first` of the tiles.
#[cube]
fn advance<E: Float>(
    tiles: &Tiles<E>,
    first: usize,
    state: &mut Array<Pair<f32>>,
    #[comptime] plan: Plan,
) {
    decay_state(&tiles.decays.whole, first, state, plan);
    let weights = &tiles.decays.weight;
    let weights = weights.as_vectorized().with_vector_size::<Const<2>>();
    let row = part(plan).row;
    let head = row / comptime!(plan.headdim_padded());
    #[unroll]
    for step in 0..comptime!(plan.chunk / SIDE) {
        let token = comptime!(step * SIDE);
        let k = first + token;
        let mut values = left_transposed::<E>(&tiles.x, row, k, comptime!(plan.stride_x()));
        let at = first * comptime!(plan.heads) + head * comptime!(plan.chunk);
        let at = (at + token + own_column()) / 2;
        #[unroll]
        for n in 0..4usize {
            let weight = weights[at + comptime!(n / 2 * 4)];
            values[n] = Pair::<E>::cast_from(Pair::<f32>::cast_from(values[n]) * weight);
        }
        let mut blocks = Sequence::<Array<Pair<E>>>::new();
        blocks.push(values);
        add_products::<E>(&blocks, &tiles.b, k, state, plan);
    }
}

/// Writes a plane's channels of the state into shared memory, rounded.
#[cube]
fn put_state<E: Float>(state: &Array<Pair<f32>>, into: &mut Shared<[E]>, #[comptime] plan: Plan) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    // In pairs.
    let row = comptime!(plan.stride_n() / 2);
    let part = part(plan);
    let to = (part.row + own_row()) * row + part.column / 2 + own_pair();
    #[unroll]
    for n in 0..comptime!(plan.state_columns() / NARROW) {
        #[unroll]
        for half in 0..2usize {
            into[to + comptime!(half * 8 * row + n * NARROW / 2)] =
                Pair::<E>::cast_from(state[comptime!(2 * n + half)]);
        }
    }
}

/// Writes the state before a chunk to memory: from shared memory, where that has it as it is kept.
#[cube]
fn emit<E: Float, S: Float, VN: Size>(
    tile: &Shared<[E]>,
    state: &Array<Pair<f32>>,
    states: &mut [S],
    entry: usize,
    first_head: usize,
    #[comptime] plan: Plan,
) {
    if comptime!(plan.kept_as_tile) {
        let units = comptime!(plan.forward_units());
        let vectors = comptime!(plan.state_padded() / plan.vector_n);
        let tile = tile.as_vectorized().with_vector_size::<VN>();
        let states = states.as_vectorized_mut().with_vector_size_mut::<VN>();
        #[unroll]
        for share in 0..comptime!(state_shares(plan)) {
            let place = UNIT_POS as usize + comptime!(share * units);
            let (row, column) = (place / vectors, place % vectors);
            let n = column * comptime!(plan.vector_n);
            if state_exists(row, n, plan) {
                let to = entry + state_place(first_head, row, n, plan);
                let value = tile[row * comptime!(plan.stride_n() / plan.vector_n) + column];
                states[to / comptime!(plan.vector_n)] = Vector::<S, VN>::cast_from(value);
            }
        }
    } else if has_channels(plan) {
        store_state::<S>(state, states, entry, first_head, plan);
    }
}
