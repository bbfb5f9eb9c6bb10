//! The outputs of every chunk from the state before it.
//!
//! ```text
//! y[i] = sum_{j <= i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j]  +  exp(s[i]) h C[i]  +  D x[i]
//! ```
//!
//! A cube owns one chunk and the tiles of channels of a block of heads. `C B^T` is computed once per cube
//! and stays in registers; per tile: `C H^T`, scaled; the masked, decayed products `M` of every head;
//! `M X` on top. Bytes: x, B, C and the states read once, y written once.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use crate::ops::cube::product::product;
use crate::ops::cube::tile::load;

/// Elements of a tokens-by-tokens tile that a unit owns.
pub(super) fn pair_shares(plan: Plan) -> usize {
    (plan.chunk * plan.chunk).div_ceil(plan.team.units)
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn outputs<I: Float, E: Float, S: Float, VX: Size, VN: Size>(
    x: &[I],
    b: &[I],
    c: &[I],
    d: &[f32],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    y: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I, E, S)] _types: [ElemType; 3],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let team = comptime!(plan.team);
    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let block = CUBE_POS % blocks;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let block_head = block * call.tiles * comptime!(plan.heads);
    let group = block_head / (call.heads / call.groups);
    let token = chunk * comptime!(plan.chunk);
    let rows = min(call.length - token, comptime!(plan.chunk).runtime());
    let base = batch * call.length + token;

    let mut x_tile = Shared::<[E]>::new_aligned_slice(comptime!(plan.tile_x().size()), 16usize);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(plan.tile_n().size()), 16usize);
    let mut c_tile = Shared::<[E]>::new_aligned_slice(comptime!(plan.tile_n().size()), 16usize);
    let mut h_tile =
        Shared::<[E]>::new_aligned_slice(comptime!(plan.channels() * plan.stride_n()), 16usize);
    let mut mixing = Shared::<[E]>::new_aligned_slice(
        comptime!(plan.heads * plan.chunk * plan.stride_q()),
        16usize,
    );
    let mut stage =
        Shared::<[f32]>::new_aligned_slice(comptime!(plan.chunk * plan.stride_stage()), 16usize);
    let mut step = Shared::<[f32]>::new_slice(comptime!(plan.chunk * plan.heads));
    let mut sum = Shared::<[f32]>::new_slice(comptime!(plan.chunk * plan.heads));

    let state_column = group * comptime!(plan.state);
    let tile_n = comptime!(plan.tile_n());
    load::<I, E, VN>(
        b,
        call.b.offset + base * call.b.row + state_column,
        call.b.row,
        rows,
        &mut b_tile,
        tile_n,
        team,
    );
    load::<I, E, VN>(
        c,
        call.c.offset + base * call.c.row + state_column,
        call.c.row,
        rows,
        &mut c_tile,
        tile_n,
        team,
    );
    sync_cube();
    product::<E>(
        &c_tile,
        &b_tile,
        &mut stage,
        0usize,
        comptime!(plan.scores()),
        team,
    );
    sync_cube();
    let scores = own_pairs(&stage, plan);

    for tile in 0..call.tiles {
        let first_head = block_head + tile * comptime!(plan.heads);
        sync_cube();
        load_steps(
            steps, sums, batch, chunk, first_head, &mut step, &mut sum, call, plan,
        );
        let x_place = call.x.offset + base * call.x.row + first_head * comptime!(plan.headdim);
        load::<I, E, VX>(
            x,
            x_place,
            call.x.row,
            rows,
            &mut x_tile,
            comptime!(plan.tile_x()),
            team,
        );
        load_states::<S, E, VN>(states, batch, chunk, first_head, &mut h_tile, call, plan);
        sync_cube();
        product::<E>(
            &c_tile,
            &h_tile,
            &mut stage,
            0usize,
            comptime!(plan.carried()),
            team,
        );
        mix::<E>(&scores, &step, &sum, &mut mixing, true, plan);
        sync_cube();
        scale_rows::<VX>(&mut stage, &sum, plan);
        sync_cube();
        product::<E>(
            &mixing,
            &x_tile,
            &mut stage,
            0usize,
            comptime!(plan.mixed(false)),
            team,
        );
        sync_cube();
        store::<I, E, VX>(&stage, &x_tile, d, base, first_head, rows, y, call, plan);
    }
}

/// A unit's elements of a tokens-by-tokens stage.
#[cube]
pub(super) fn own_pairs(stage: &Shared<[f32]>, #[comptime] plan: Plan) -> Array<f32> {
    let mut own = Array::<f32>::new(comptime!(pair_shares(plan)));
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        let place = UNIT_POS as usize + r * comptime!(plan.team.units);
        let i = place / comptime!(plan.chunk);
        let j = place % comptime!(plan.chunk);
        own[r] = stage[i * comptime!(plan.stride_stage()) + j];
    }
    own
}

/// Step sizes and sums of a chunk, by head of the tile.
#[cube]
pub(super) fn load_steps(
    steps: &[f32],
    sums: &[f32],
    batch: usize,
    chunk: usize,
    first_head: usize,
    step: &mut Shared<[f32]>,
    sum: &mut Shared<[f32]>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let base = (batch * call.chunks + chunk) * comptime!(plan.chunk);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads) {
        let head = n / comptime!(plan.chunk);
        let place = (base + n % comptime!(plan.chunk)) * call.heads + first_head + head;
        step[n] = steps[place];
        sum[n] = sums[place];
        n += comptime!(plan.team.units);
    }
}

/// The states of the tile's heads before the chunk.
#[cube]
pub(super) fn load_states<S: Float, E: Float, V: Size>(
    states: &[S],
    batch: usize,
    chunk: usize,
    first_head: usize,
    into: &mut Shared<[E]>,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_n);
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    let entry = ((batch * call.chunks + chunk) * call.heads + first_head)
        * comptime!(plan.headdim * plan.state);
    let from = states.as_vectorized().with_vector_size::<V>();
    let into = into.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut place = UNIT_POS as usize;
    while place < comptime!(plan.channels() * plan.state_padded() / plan.vector_n) {
        let row = place / vectors;
        let n = place % vectors * vector;
        let head = row / comptime!(plan.headdim_padded());
        let p = row % comptime!(plan.headdim_padded());
        let mut value = Vector::<E, V>::new(E::from_int(0));
        if p < comptime!(plan.headdim) && n < comptime!(plan.state) {
            let at = entry + (head * comptime!(plan.headdim) + p) * comptime!(plan.state) + n;
            value = Vector::<E, V>::cast_from(from[at / vector]);
        }
        into[(row * comptime!(plan.stride_n()) + n) / vector] = value;
        place += comptime!(plan.team.units);
    }
}

/// `M[i, j] = scores[i, j] exp(s[i] - s[j])` (times `dt[j]`) for `j <= i`, of every head of the tile.
#[cube]
pub(super) fn mix<E: Float>(
    scores: &Array<f32>,
    step: &Shared<[f32]>,
    sum: &Shared<[f32]>,
    mixing: &mut Shared<[E]>,
    #[comptime] stepped: bool,
    #[comptime] plan: Plan,
) {
    for head in 0..comptime!(plan.heads) {
        let first = head * comptime!(plan.chunk);
        #[unroll(pair_shares(plan) <= 64)]
        for r in 0..comptime!(pair_shares(plan)) {
            let place = UNIT_POS as usize + r * comptime!(plan.team.units);
            let i = place / comptime!(plan.chunk);
            let j = place % comptime!(plan.chunk);
            let mut value = 0.0f32;
            if j <= i {
                value = scores[r] * (sum[first + i] - sum[first + j]).exp();
                if comptime!(stepped) {
                    value *= step[first + j];
                }
            }
            mixing[(first + i) * comptime!(plan.stride_q()) + j] = E::cast_from(value);
        }
    }
}

/// `stage[i] *= exp(s[i])`, each head's columns by its own sums.
#[cube]
fn scale_rows<V: Size>(stage: &mut Shared<[f32]>, sum: &Shared<[f32]>, #[comptime] plan: Plan) {
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let stage = stage.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors;
        let head = column / comptime!(plan.headdim_padded() / plan.vector_x);
        let place = row * comptime!(plan.stride_stage() / plan.vector_x) + column;
        let decay = sum[head * comptime!(plan.chunk) + row].exp();
        stage[place] = stage[place] * Vector::new(decay);
        n += comptime!(plan.team.units);
    }
}

/// Writes the outputs of a tile, with the skip connection.
#[cube]
fn store<I: Float, E: Float, V: Size>(
    stage: &Shared<[f32]>,
    x_tile: &Shared<[E]>,
    d: &[f32],
    base: usize,
    first_head: usize,
    rows: usize,
    y: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_x);
    let vectors = comptime!(plan.headdim / plan.vector_x);
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let x_tile = x_tile.as_vectorized().with_vector_size::<V>();
    let d = d.as_vectorized().with_vector_size::<V>();
    let y = y.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads * plan.headdim / plan.vector_x) {
        let inside = n % vectors * vector;
        let head = n / vectors % comptime!(plan.heads);
        let row = n / vectors / comptime!(plan.heads);
        let column = head * comptime!(plan.headdim_padded()) + inside;
        if row < rows {
            let channel = (first_head + head) * comptime!(plan.headdim) + inside;
            let mut value = stage[(row * comptime!(plan.stride_stage()) + column) / vector];
            if comptime!(plan.skip) {
                let x = Vector::<f32, V>::cast_from(
                    x_tile[(row * comptime!(plan.stride_x()) + column) / vector],
                );
                value += x * d[channel / vector];
            }
            let place = call.out.offset + (base + row) * call.out.row + channel;
            y[place / vector] = Vector::<I, V>::cast_from(value);
        }
        n += comptime!(plan.team.units);
    }
}
