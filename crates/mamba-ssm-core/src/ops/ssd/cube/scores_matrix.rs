//! `C B^T` of every chunk, for the heads of a group together, on matrix units with fragments.
//!
//! ```text
//! scores[i, j] = C[i].B[j]    for blocks of 16 x 16 tokens on and below the diagonal
//! ```
//!
//! A cube owns a chunk of a group, a plane 16 later tokens. The heads of a group share these products, but not the
//! cubes of `forward_matrix`; found there, each would find them again. Blocks lie one behind the other, by rows, in
//! two halves of 32 units times four numbers, as a plane of `outputs_matrix` wants them in its registers.
//!
//! Bytes: `B` and `C` read once, 1 KiB written per block, which later reads find in the cache.

use cubecl::prelude::*;

use super::outputs_matrix::{Task, similarities};
use super::plan::{Call, Plan};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{LANES, Pair};
use crate::ops::cube::tile::{fetch, put};

/// Numbers of a chunk's scores, for a group.
pub(super) fn scores_size(plan: Plan) -> usize {
    let rows = plan.chunk / SIDE;
    rows * (rows + 1) / 2 * SIDE * SIDE
}

/// Where the scores of 16 later tokens begin in a chunk's, in halves of blocks.
#[cube]
fn first_half(token: usize) -> usize {
    let row = token / SIDE;
    row * (row + 1)
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn scores_matrix<E: Float, VN: Size>(
    b: &[E],
    c: &[E],
    scores: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
    #[define(VN)] _vector: usize,
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let group = CUBE_POS % call.groups;
    let chunk = CUBE_POS / call.groups % call.chunks;
    let batch = CUBE_POS / call.groups / call.chunks;
    let units = comptime!(plan.score_units());
    let tile = comptime!(plan.tile_n());
    let start = chunk * comptime!(plan.chunk);
    let rows = min(call.length - start, comptime!(plan.chunk).runtime());
    let row = batch * call.length + start;
    let column = group * comptime!(plan.state);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile.size()), 128usize);
    let mut c_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile.size()), 128usize);
    let mut b_rows = Array::<Vector<E, VN>>::new(comptime!(tile.shares(units)));
    let mut c_rows = Array::<Vector<E, VN>>::new(comptime!(tile.shares(units)));
    let from_b = call.b.offset + row * call.b.row + column;
    fetch::<E, VN>(b, from_b, call.b.row, rows, &mut b_rows, tile, units);
    let from_c = call.c.offset + row * call.c.row + column;
    fetch::<E, VN>(c, from_c, call.c.row, rows, &mut c_rows, tile, units);
    put::<E, VN>(&b_rows, &mut b_tile, 0usize, tile, units);
    put::<E, VN>(&c_rows, &mut c_tile, 0usize, tile, units);
    sync_cube();
    let token = UNIT_POS as usize / LANES * SIDE;
    let found = similarities::<E>(&c_tile, &b_tile, 0usize, token, plan);
    let to = CUBE_POS * comptime!(scores_size(plan) / 4) + first_half(token) * LANES;
    let scores = scores
        .as_vectorized_mut()
        .with_vector_size_mut::<Const<4>>();
    #[unroll]
    for half in 0..comptime!(2 * plan.chunk / SIDE) {
        if comptime!(half / 2 * SIDE) <= token {
            let mut four = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for n in 0..4usize {
                let pair = found[comptime!(2 * half + n / 2)];
                four.insert(n, pair.extract(comptime!(n % 2)));
            }
            scores[to + comptime!(half * LANES) + UNIT_POS_PLANE as usize] = four;
        }
    }
}

/// Reads what a plane with these tokens has found, of the chunk whose scores begin at element `from`.
#[cube]
pub(super) fn read_scores(
    scores: &[f32],
    from: usize,
    own: &Task,
    #[comptime] plan: Plan,
) -> Array<Pair<f32>> {
    let mut found = Array::<Pair<f32>>::new(comptime!(4 * plan.chunk / SIDE));
    let scores = scores.as_vectorized().with_vector_size::<Const<4>>();
    let from = from / 4 + first_half(own.token) * LANES + UNIT_POS_PLANE as usize;
    #[unroll]
    for half in 0..comptime!(2 * plan.chunk / SIDE) {
        if comptime!(half / 2 * SIDE) <= own.token {
            let four = scores[from + comptime!(half * LANES)];
            #[unroll]
            for n in 0..2usize {
                let mut pair = Pair::<f32>::new(four.extract(comptime!(2 * n)));
                pair.insert(1usize, four.extract(comptime!(2 * n + 1)));
                found[comptime!(2 * half + n)] = pair;
            }
        }
    }
    found
}
