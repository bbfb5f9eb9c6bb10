//! The gradients of every chunk, from the state before it and the gradient of the state behind it.
//!
//! ```text
//! L[i, j] = exp(s[i] - s[j]), j <= i       V[i, j] = (C[i].B[j]) L[i, j] (dy[i].x[j])
//! u[j]    = sum_i (C[i].B[j]) L[i, j] dy[i]  +  exp(s[Q] - s[j]) g B[j]
//! dx[j]   = dt[j] u[j] + D dy[j]
//! dC[i]   = sum_h ( sum_j L[i, j] dt[j] (dy[i].x[j]) B[j]  +  exp(s[i]) h^T dy[i] )
//! dB[j]   = sum_h ( sum_i L[i, j] dt[j] (dy[i].x[j]) C[i]  +  exp(s[Q] - s[j]) dt[j] g^T x[j] )
//! d(dt A)[j] = sum_{i >= j > k} dt[k] V[i, k]  +  sum_{i >= j} exp(s[i]) dy[i].(h C[i])
//!            + sum_{k < j} dt[k] exp(s[Q] - s[k]) x[k].(g B[k])  +  exp(s[Q]) <h, g>
//! d(dt)[j]   = sum_i V[i, j]  +  exp(s[Q] - s[j]) x[j].(g B[j])  +  A d(dt A)[j]
//! ```
//!
//! `h` is the state before the chunk, `g` the gradient of the state behind it. The sum over pairs
//! `i >= j > k` is taken as row sums minus column sums of one f32 tile without its diagonal, so that the
//! terms that must cancel are the same numbers.
//!
//! A cube owns one chunk and a block of heads, as in the forward pass; `C B^T`, its gradient and those of
//! B and C stay with the units over all heads. Bytes: x, dy, B, C and both states read once, dx written.

mod pairs;
mod skip;
mod steps;
mod tiles;

use cubecl::prelude::*;

use self::pairs::{own_to_tile, pair_terms, sum_pairs};
use self::skip::{skip_terms, store_dx};
use self::steps::{gather_steps, inner_of_states, inner_of_tokens, store_steps};
use self::tiles::{decay_to_end, store_rows, weigh};
use super::outputs::{load_states, load_steps, mix, own_pairs, pair_shares};
use super::plan::{Call, Plan};
use crate::ops::cube::product::{add_product, new_sum, product, store_sum};
use crate::ops::cube::tile::load;

/// What a tile's heads found on the way to the gradients of the steps, `[heads, chunk]` each.
#[derive(CubeType)]
struct Terms {
    step: Shared<[f32]>,
    sum: Shared<[f32]>,
    /// `exp(s) dy.(h C)`, in parts.
    carried: Shared<[f32]>,
    /// `exp(s[Q] - s) x.(g B)`, in parts.
    added: Shared<[f32]>,
    /// Sums of the rows and columns of `V` below the diagonal, in parts, and the diagonal.
    rows: Shared<[f32]>,
    columns: Shared<[f32]>,
    diagonal: Shared<[f32]>,
    /// `<h, g>`, in parts, and in few parts.
    kept: Shared<[f32]>,
    few: Shared<[f32]>,
}

/// Parts of `<h, g>` that are added last.
pub(super) const KEPT: usize = 8;

/// Parts in which a sum over a head's channels is taken, so that all units have work.
pub(super) fn parts(plan: Plan) -> usize {
    (plan.team.units / (plan.chunk * plan.heads)).max(1)
}

/// Parts in which a sum over a head's state is taken.
pub(super) fn kept_parts(plan: Plan) -> usize {
    (plan.team.units / plan.heads).max(1)
}

/// Parts in which the rows and columns of a tokens-by-tokens tile are summed.
pub(super) fn pair_parts(plan: Plan) -> usize {
    (plan.team.units / (2 * plan.chunk)).clamp(1, plan.chunk)
}

/// Parts in which a sum over the chunk's tokens is taken for every channel.
pub(super) fn skip_parts(plan: Plan) -> usize {
    (plan.team.units / (plan.heads * plan.headdim)).clamp(1, plan.chunk)
}

#[cube]
fn new_terms(#[comptime] plan: Plan) -> Terms {
    let size = comptime!(plan.chunk * plan.heads);
    Terms {
        step: Shared::new_slice(size),
        sum: Shared::new_slice(size),
        carried: Shared::new_slice(comptime!(plan.chunk * plan.heads * parts(plan))),
        added: Shared::new_slice(comptime!(plan.chunk * plan.heads * parts(plan))),
        rows: Shared::new_slice(comptime!(plan.chunk * plan.heads * pair_parts(plan))),
        columns: Shared::new_slice(comptime!(plan.chunk * plan.heads * pair_parts(plan))),
        diagonal: Shared::new_slice(size),
        kept: Shared::new_slice(comptime!(plan.heads * kept_parts(plan))),
        few: Shared::new_slice(comptime!(plan.heads * KEPT)),
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn gradients<I: Float, E: Float, S: Float, O: Float, VX: Size, VN: Size>(
    x: &[I],
    b: &[I],
    c: &[I],
    a: &[f32],
    d: &[f32],
    dy: &[I],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    dstates: &[S],
    dx: &mut [I],
    db: &mut [O],
    dc: &mut [O],
    dsteps: &mut [f32],
    decays: &mut [f32],
    dd: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I, E, S, O)] _types: [ElemType; 4],
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
    let width = call.heads * comptime!(plan.headdim);

    let tile_x = comptime!(plan.tile_x());
    let tile_n = comptime!(plan.tile_n());
    let h_size = comptime!(plan.channels() * plan.stride_n());
    let mut x_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_x.size()), 16usize);
    let mut dy_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_x.size()), 16usize);
    let mut b_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 16usize);
    let mut c_tile = Shared::<[E]>::new_aligned_slice(comptime!(tile_n.size()), 16usize);
    let mut h_tile = Shared::<[E]>::new_aligned_slice(h_size, 16usize);
    let mut g_tile = Shared::<[E]>::new_aligned_slice(h_size, 16usize);
    let mut mixing = Shared::<[E]>::new_aligned_slice(
        comptime!(plan.heads * plan.chunk * plan.stride_q()),
        16usize,
    );
    let mut stage =
        Shared::<[f32]>::new_aligned_slice(comptime!(plan.chunk * plan.stride_stage()), 16usize);
    let mut terms = new_terms(plan);

    let state_column = group * comptime!(plan.state);
    let b_place = call.b.offset + base * call.b.row + state_column;
    let c_place = call.c.offset + base * call.c.row + state_column;
    load::<I, E, VN>(b, b_place, call.b.row, rows, &mut b_tile, tile_n, team);
    load::<I, E, VN>(c, c_place, call.c.row, rows, &mut c_tile, tile_n, team);
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
    let mut dscores = Array::<f32>::new(comptime!(pair_shares(plan)));
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        dscores[r] = 0.0f32;
    }
    let mut sum_b = new_sum(comptime!(plan.onto_state()), team);
    let mut sum_c = new_sum(comptime!(plan.onto_state()), team);

    for tile in 0..call.tiles {
        let first_head = block_head + tile * comptime!(plan.heads);
        let channel = first_head * comptime!(plan.headdim);
        sync_cube();
        load_steps(
            steps,
            sums,
            batch,
            chunk,
            first_head,
            &mut terms.step,
            &mut terms.sum,
            call,
            plan,
        );
        let x_place = call.x.offset + base * call.x.row + channel;
        load::<I, E, VX>(x, x_place, call.x.row, rows, &mut x_tile, tile_x, team);
        load::<I, E, VX>(
            dy,
            base * width + channel,
            width,
            rows,
            &mut dy_tile,
            tile_x,
            team,
        );
        load_states::<S, E, VN>(states, batch, chunk, first_head, &mut h_tile, call, plan);
        load_states::<S, E, VN>(dstates, batch, chunk, first_head, &mut g_tile, call, plan);
        sync_cube();
        product::<E>(
            &c_tile,
            &h_tile,
            &mut stage,
            0usize,
            comptime!(plan.carried()),
            team,
        );
        mix::<E>(&scores, &terms.step, &terms.sum, &mut mixing, false, plan);
        inner_of_states::<E, VN>(&h_tile, &g_tile, &mut terms.kept, plan);
        sync_cube();
        inner_of_tokens::<E, VX>(
            &dy_tile,
            &stage,
            &terms.sum,
            &mut terms.carried,
            false,
            plan,
        );
        sync_cube();
        product::<E>(
            &b_tile,
            &g_tile,
            &mut stage,
            0usize,
            comptime!(plan.carried()),
            team,
        );
        sync_cube();
        inner_of_tokens::<E, VX>(&x_tile, &stage, &terms.sum, &mut terms.added, true, plan);
        sync_cube();
        decay_to_end::<VX>(&mut stage, &terms.sum, plan);
        sync_cube();
        product::<E>(
            &mixing,
            &dy_tile,
            &mut stage,
            0usize,
            comptime!(plan.mixed(true)),
            team,
        );
        sync_cube();
        store_dx::<I, E, VX>(
            &stage,
            &dy_tile,
            &terms.step,
            d,
            base,
            first_head,
            rows,
            dx,
            call,
            plan,
        );
        if comptime!(plan.skip) {
            let row = (batch * call.chunks + chunk) * comptime!(skip_parts(plan));
            skip_terms::<E>(&x_tile, &dy_tile, dd, row * width + channel, width, plan);
        }
        for head in 0..comptime!(plan.heads) {
            sync_cube();
            product::<E>(
                &dy_tile,
                &x_tile,
                &mut stage,
                head,
                comptime!(plan.pairs()),
                team,
            );
            sync_cube();
            pair_terms(&scores, &mut dscores, &mut stage, &mut terms, head, plan);
            sync_cube();
            sum_pairs(&stage, &mut terms, head, plan);
        }
        sync_cube();
        weigh::<E, VX>(&mut x_tile, &mut dy_tile, &terms.step, &terms.sum, plan);
        sync_cube();
        gather_steps(&mut terms, plan);
        add_product::<E>(
            &dy_tile,
            &h_tile,
            &mut sum_c,
            comptime!(plan.onto_state()),
            team,
        );
        add_product::<E>(
            &x_tile,
            &g_tile,
            &mut sum_b,
            comptime!(plan.onto_state()),
            team,
        );
        sync_cube();
        store_steps(
            &terms, a, batch, chunk, first_head, dsteps, decays, call, plan,
        );
    }

    sync_cube();
    own_to_tile::<E>(&dscores, &mut mixing, plan);
    sync_cube();
    add_product::<E>(
        &mixing,
        &b_tile,
        &mut sum_c,
        comptime!(plan.through_scores(false)),
        team,
    );
    add_product::<E>(
        &mixing,
        &c_tile,
        &mut sum_b,
        comptime!(plan.through_scores(true)),
        team,
    );
    let blocks_per_group = blocks / call.groups;
    let part = block % blocks_per_group;
    let entries = call.cubes / (blocks * call.chunks);
    let to = (part * entries + batch) * call.length + token;
    store_sum(&sum_c, &mut stage, comptime!(plan.onto_state()), team);
    sync_cube();
    store_rows::<O, VN>(&stage, rows, to, state_column, dc, &call.dc, plan);
    sync_cube();
    store_sum(&sum_b, &mut stage, comptime!(plan.onto_state()), team);
    sync_cube();
    store_rows::<O, VN>(&stage, rows, to, state_column, db, &call.db, plan);
}
