//! The gradients of every chunk, as `gradients` has them, on matrix units with fragments.
//!
//! The equations of `gradients` come in two halves that mirror each other, and half of a cube's planes
//! compute each, a plane 16 tokens. One half owns the later token of a pair, the other the earlier:
//!
//! ```text
//!              tokens  onto  state    pairs                 through the state   gradient
//!   later  i   dy      C     h        dy[i].x[j], j <= i    z = h C[i]          dC
//!   earlier j  x       B     g        x[j].dy[i], i >= j    z = g B[j]          dB, and dx
//! ```
//!
//! So dy, C and h lie in shared memory above x, B and g. Either half is compiled for itself: which tokens come
//! first, and whose steps count, is decided then. `C B^T`, its gradient and that of C (or B) stay in a plane's
//! registers over all heads, in blocks by their distance from the plane's own tokens, so that the diagonal's code
//! is there once. The next tile of heads comes into the other half of shared memory, where that has room for two.
//! Bytes: as in `gradients`.

mod pairs;
mod skip;
mod state;
mod steps;
mod tiles;

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    NARROW, Pair, left, multiply, own_column, own_row, right, right_transposed, zero_sums,
};
use crate::ops::cube::tile::{fetch, put};
use pairs::through_pairs;
use skip::{store_dx, store_skipped};
use state::{onto_state, through_state};
use steps::{inner_of_states, store_steps};
use tiles::{
    Half, Next, Share, Tiles, fetch_both_states, fetch_tokens, first_slot, has_block, new_tiles,
    put_both_states, put_tokens, share, spot_of, state_shares, token_of_block,
};
pub(super) use tiles::{bytes, half_planes};

#[cube(launch, address_type = "dynamic")]
pub(super) fn gradients_matrix<E: Float, S: Float, O: Float, VX: Size, VN: Size>(
    x: &[E],
    b: &[E],
    c: &[E],
    a: &[f32],
    d: &[f32],
    dy: &[E],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    dstates: &[S],
    dx: &mut [E],
    db: &mut [O],
    dc: &mut [O],
    dsteps: &mut [f32],
    decays: &mut [f32],
    dd: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(E, S, O)] _types: [ElemType; 3],
    #[define(VX, VN)] _sizes: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let own = share(call, plan);
    let units = comptime!(plan.gradient_units());
    let tile_n = comptime!(plan.tile_n());
    let mut tiles = new_tiles::<E>(plan);
    let column = own.head / (call.heads / call.groups) * comptime!(plan.state);
    let mut rows = Array::<Vector<E, VN>>::new(comptime!(tile_n.shares(units)));
    let from_c = call.c.offset + own.base * call.c.row + column;
    fetch::<E, VN>(c, from_c, call.c.row, own.rows, &mut rows, tile_n, units);
    put::<E, VN>(&rows, &mut tiles.onto, 0usize, tile_n, units);
    let from_b = call.b.offset + own.base * call.b.row + column;
    fetch::<E, VN>(b, from_b, call.b.row, own.rows, &mut rows, tile_n, units);
    let behind = comptime!(plan.tile_n().size()).runtime();
    put::<E, VN>(&rows, &mut tiles.onto, behind, tile_n, units);

    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let entries = call.cubes / (blocks * call.chunks);
    let part = CUBE_POS % blocks % (blocks / call.groups);
    let to = (part * entries + own.batch) * call.length + own.chunk * comptime!(plan.chunk);
    // Planes branch as one, and both halves come to the same barriers.
    if own.earlier {
        let first = call.db.offset + to * call.db.row + column;
        run_half::<E, S, O, VX, VN>(
            x,
            dy,
            a,
            d,
            steps,
            sums,
            states,
            dstates,
            dx,
            db,
            first,
            call.db.row,
            dsteps,
            decays,
            dd,
            &mut tiles,
            &own,
            call,
            plan,
            Half::Earlier,
        );
    } else {
        let first = call.dc.offset + to * call.dc.row + column;
        run_half::<E, S, O, VX, VN>(
            x,
            dy,
            a,
            d,
            steps,
            sums,
            states,
            dstates,
            dx,
            dc,
            first,
            call.dc.row,
            dsteps,
            decays,
            dd,
            &mut tiles,
            &own,
            call,
            plan,
            Half::Later,
        );
    }
}

/// The work of the planes of one half; `out` takes the gradient of C or B, from element `first` on.
#[cube]
fn run_half<E: Float, S: Float, O: Float, VX: Size, VN: Size>(
    x: &[E],
    dy: &[E],
    a: &[f32],
    d: &[f32],
    steps: &[f32],
    sums: &[f32],
    states: &[S],
    dstates: &[S],
    dx: &mut [E],
    out: &mut [O],
    first: usize,
    row_length: usize,
    dsteps: &mut [f32],
    decays: &mut [f32],
    dd: &mut [f32],
    tiles: &mut Tiles<E>,
    own: &Share,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    let units = comptime!(plan.gradient_units());
    let tile_x = comptime!(plan.tile_x());
    let mut next = Next::<E, S, VX, VN> {
        x: Array::new(comptime!(tile_x.shares(units))),
        dy: Array::new(comptime!(tile_x.shares(units))),
        h: Array::new(comptime!(state_shares(plan, units))),
        g: Array::new(comptime!(state_shares(plan, units))),
        step: Array::new(comptime!(plan.step_shares(units))),
        sum: Array::new(comptime!(plan.step_shares(units))),
        before: Array::new(comptime!(plan.step_shares(units))),
        behind: Array::new(comptime!(plan.step_shares(units))),
    };
    let spot = spot_of(0usize, 0usize, plan);
    fetch_tokens::<E, S, VX, VN>(x, dy, steps, sums, own.head, own, &mut next, call, plan);
    fetch_both_states::<E, S, VX, VN>(states, dstates, own.head, own, &mut next, call, plan);
    if comptime!(plan.two_tiles) {
        put_tokens::<E, S, VX, VN>(&next, tiles, &spot, plan);
        put_both_states::<E, S, VX, VN>(&next, tiles, &spot, plan);
    }
    sync_cube();
    let scores = similarities::<E>(&*tiles, own, plan, half);
    let mut dscores = zero_sums(comptime!(plan.chunk / NARROW));
    let mut gradient = zero_sums(comptime!(plan.state_padded() / NARROW));
    // Not known when compiled, or the loop over heads would be unrolled: the code of all heads would not fit
    // the instruction cache.
    let heads = min(call.heads, comptime!(plan.heads).runtime());

    for tile in 0..call.tiles {
        let head = own.head + tile * comptime!(plan.heads);
        let more = tile + 1 < call.tiles;
        let spot = spot_of(tile, 0usize, plan);
        let behind = spot_of(tile + 1, 0usize, plan);
        if comptime!(!plan.two_tiles) {
            sync_cube();
            put_tokens::<E, S, VX, VN>(&next, tiles, &spot, plan);
            put_both_states::<E, S, VX, VN>(&next, tiles, &spot, plan);
        }
        if comptime!(!plan.two_tiles) || tile > 0 {
            sync_cube();
        }
        inner_of_states::<E, VN>(tiles, &spot, plan);
        for inner in 0..heads {
            // Where registers are free, and there is work left to wait behind.
            let fetches = inner + 1 == heads && more;
            let next_head = head + comptime!(plan.heads);
            if comptime!(plan.two_tiles) && fetches {
                fetch_tokens::<E, S, VX, VN>(
                    x, dy, steps, sums, next_head, own, &mut next, call, plan,
                );
            }
            let spot = spot_of(tile, inner, plan);
            let mut u = through_state::<E>(tiles, own, &spot, plan, half);
            if comptime!(plan.two_tiles) && fetches {
                put_tokens::<E, S, VX, VN>(&next, tiles, &behind, plan);
            }
            through_pairs::<E>(&scores, &mut dscores, tiles, &mut u, own, &spot, plan, half);
            if comptime!(half == Half::Earlier) {
                store_dx::<E>(&u, &*tiles, d, dx, own, head, &spot, call, plan);
            } else if comptime!(plan.skip) {
                store_skipped::<E>(&*tiles, dd, own, head, &spot, call, plan);
            }
            if fetches {
                if comptime!(!plan.two_tiles) {
                    fetch_tokens::<E, S, VX, VN>(
                        x, dy, steps, sums, next_head, own, &mut next, call, plan,
                    );
                }
                fetch_both_states::<E, S, VX, VN>(
                    states, dstates, next_head, own, &mut next, call, plan,
                );
            }
            onto_state::<E>(&*tiles, &mut gradient, own, &spot, plan, half);
        }
        if comptime!(plan.two_tiles) && more {
            put_both_states::<E, S, VX, VN>(&next, tiles, &behind, plan);
        }
        if comptime!(half == Half::Later) {
            // Of the tile before: this one's terms are not all there yet.
            if tile > 0 {
                let (head, slot) = (head - comptime!(plan.heads), first_slot(tile - 1, plan));
                store_steps::<E>(&*tiles, a, head, slot, own, dsteps, decays, call, plan);
            }
        }
    }
    sync_cube();
    if comptime!(half == Half::Later) {
        let tile = call.tiles - 1;
        let head = own.head + tile * comptime!(plan.heads);
        let slot = first_slot(tile, plan);
        store_steps::<E>(&*tiles, a, head, slot, own, dsteps, decays, call, plan);
    }
    through_scores::<E>(&dscores, &*tiles, &mut gradient, own, plan, half);
    store_rows::<O>(&gradient, out, first, row_length, own, plan);
}

/// `C[i].B[j]` of a plane's tokens with the other half's, by the distance of their blocks.
#[cube]
fn similarities<E: Float>(
    tiles: &Tiles<E>,
    own: &Share,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> Array<Pair<f32>> {
    let mut scores = zero_sums(comptime!(plan.chunk / NARROW));
    let first = comptime!(half.own() * plan.chunk) + own.token;
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(&tiles.onto, first, k, stride);
        #[unroll]
        for distance in 0..comptime!(plan.chunk / SIDE) {
            if has_block(own, distance, plan, half) {
                let column =
                    comptime!(half.other() * plan.chunk) + token_of_block(own, distance, half);
                let columns = right_transposed::<E>(&tiles.onto, k, column, stride);
                multiply::<E>(&rows, &columns, &mut scores, comptime!(2 * distance));
            }
        }
    }
    scores
}

/// The gradient of C (or B) through the scores: their gradient times the other half's B (or C).
#[cube]
fn through_scores<E: Float>(
    dscores: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    gradient: &mut Array<Pair<f32>>,
    own: &Share,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    #[unroll]
    for distance in 0..comptime!(plan.chunk / SIDE) {
        if has_block(own, distance, plan, half) {
            let mut rows = Array::<Pair<E>>::new(4usize);
            #[unroll]
            for n in 0..4usize {
                let at = comptime!(2 * (2 * distance + n / 2) + n % 2);
                rows[n] = Pair::<E>::cast_from(dscores[at]);
            }
            let row = comptime!(half.other() * plan.chunk) + token_of_block(own, distance, half);
            let stride = comptime!(plan.stride_n());
            #[unroll]
            for n in 0..comptime!(plan.state_padded() / SIDE) {
                let columns = right::<E>(&tiles.onto, row, comptime!(n * SIDE), stride);
                multiply::<E>(&rows, &columns, gradient, comptime!(2 * n));
            }
        }
    }
}

/// Writes a plane's rows of the gradient of C or B.
#[cube]
fn store_rows<O: Float>(
    gradient: &Array<Pair<f32>>,
    out: &mut [O],
    first: usize,
    row_length: usize,
    own: &Share,
    #[comptime] plan: Plan,
) {
    let out = out.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    #[unroll]
    for n in 0..comptime!(plan.state_padded() / NARROW) {
        let column = comptime!(n * NARROW) + own_column();
        #[unroll]
        for half in 0..2usize {
            let row = own.token + own_row() + comptime!(half * 8);
            if row < own.rows && column < comptime!(plan.state) {
                out[(first + row * row_length + column) / 2] =
                    Pair::<O>::cast_from(gradient[comptime!(2 * n + half)]);
            }
        }
    }
}
