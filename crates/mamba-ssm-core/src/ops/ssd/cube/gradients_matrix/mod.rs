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
//! So dy, C and h lie in shared memory above x, B and g, and a plane finds its own and the other half's by an
//! offset. `C B^T`, its gradient and that of C (or B) stay in a plane's registers over all heads. Bytes: as in
//! `gradients`.

mod steps;
mod tiles;

use cubecl::prelude::*;

use super::outputs_matrix::state_shares;
use super::plan::{Call, Plan};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    NARROW, Pair, left, multiply, own_column, own_row, right, right_transposed, zero_sums,
};
use crate::ops::cube::tile::{fetch, put};
use steps::{inner_of_states, store_steps};
pub(super) use tiles::half_planes;
use tiles::{Next, Share, Tiles, fetch_next, new_tiles, put_next, share, step_shares};

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
    let (tile_x, tile_n) = comptime!((plan.tile_x(), plan.tile_n()));
    let mut tiles = new_tiles::<E>(plan);
    let mut next = Next::<E, S, VX, VN> {
        x: Array::new(comptime!(tile_x.shares(units))),
        dy: Array::new(comptime!(tile_x.shares(units))),
        h: Array::new(comptime!(state_shares(plan, units))),
        g: Array::new(comptime!(state_shares(plan, units))),
        step: Array::new(comptime!(step_shares(plan))),
        sum: Array::new(comptime!(step_shares(plan))),
    };
    let column = own.head / (call.heads / call.groups) * comptime!(plan.state);
    let mut rows = Array::<Vector<E, VN>>::new(comptime!(tile_n.shares(units)));
    let from_c = call.c.offset + own.base * call.c.row + column;
    fetch::<E, VN>(c, from_c, call.c.row, own.rows, &mut rows, tile_n, units);
    put::<E, VN>(&rows, &mut tiles.onto, 0usize, tile_n, units);
    let from_b = call.b.offset + own.base * call.b.row + column;
    fetch::<E, VN>(b, from_b, call.b.row, own.rows, &mut rows, tile_n, units);
    let behind = comptime!(plan.tile_n().size()).runtime();
    put::<E, VN>(&rows, &mut tiles.onto, behind, tile_n, units);
    fetch_next::<E, S, VX, VN>(
        x, dy, steps, sums, states, dstates, own.head, &own, &mut next, call, plan,
    );
    sync_cube();
    let scores = similarities::<E>(&tiles, &own, plan);
    let mut dscores = zero_sums(comptime!(plan.chunk / NARROW));
    let mut gradient = zero_sums(comptime!(plan.state_padded() / NARROW));

    for tile in 0..call.tiles {
        let head = own.head + tile * comptime!(plan.heads);
        sync_cube();
        put_next::<E, S, VX, VN>(&next, &mut tiles, plan);
        sync_cube();
        inner_of_states::<E, VN>(&mut tiles, plan);
        // Not unrolled: the code of all heads would not fit the instruction cache.
        for inner in 0..comptime!(plan.heads) {
            let mut out = through_state::<E>(&mut tiles, &own, inner, plan);
            through_pairs::<E>(
                &scores,
                &mut dscores,
                &mut tiles,
                &mut out,
                &own,
                inner,
                plan,
            );
            if own.earlier {
                store_dx::<E>(&out, &tiles, d, dx, dd, &own, head, inner, call, plan);
            }
            onto_state::<E>(&tiles, &mut gradient, &own, inner, plan);
        }
        if tile + 1 < call.tiles {
            let head = head + comptime!(plan.heads);
            fetch_next::<E, S, VX, VN>(
                x, dy, steps, sums, states, dstates, head, &own, &mut next, call, plan,
            );
        }
        sync_cube();
        store_steps::<E>(&tiles, a, head, &own, dsteps, decays, call, plan);
    }
    through_scores::<E>(&dscores, &tiles, &mut gradient, &own, plan);
    let blocks = call.heads / comptime!(plan.heads) / call.tiles;
    let entries = call.cubes / (blocks * call.chunks);
    let part = CUBE_POS % blocks % (blocks / call.groups);
    let to = (part * entries + own.batch) * call.length + own.chunk * comptime!(plan.chunk);
    if own.earlier {
        let first = call.db.offset + to * call.db.row + column;
        store_rows::<O>(&gradient, db, first, call.db.row, &own, plan);
    } else {
        let first = call.dc.offset + to * call.dc.row + column;
        store_rows::<O>(&gradient, dc, first, call.dc.row, &own, plan);
    }
}

/// The first row of the plane's own tokens in the tiles, and of the other half's.
#[cube]
fn token_rows(own: &Share, #[comptime] plan: Plan) -> (usize, usize) {
    let chunk = comptime!(plan.chunk);
    (own.half * chunk + own.token, (1 - own.half) * chunk)
}

/// Whether a plane's tokens have pairs in a block of the other half's.
#[cube]
fn has_pairs(own: &Share, #[comptime] block: usize) -> bool {
    let first = comptime!(block * SIDE);
    select(own.earlier, first >= own.token, first <= own.token)
}

/// `C[i].B[j]` of a plane's tokens with the other half's.
#[cube]
fn similarities<E: Float>(
    tiles: &Tiles<E>,
    own: &Share,
    #[comptime] plan: Plan,
) -> Array<Pair<f32>> {
    let mut scores = zero_sums(comptime!(plan.chunk / NARROW));
    let (first, others) = token_rows(own, plan);
    let stride = comptime!(plan.stride_n());
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(&tiles.onto, first, k, stride);
        #[unroll]
        for block in 0..comptime!(plan.chunk / SIDE) {
            if has_pairs(own, block) {
                let column = others + comptime!(block * SIDE);
                let columns = right_transposed::<E>(&tiles.onto, k, column, stride);
                multiply::<E>(&rows, &columns, &mut scores, comptime!(2 * block));
            }
        }
    }
    scores
}

/// Decays of a unit's two tokens: since the chunk's start for later ones, to its end for earlier ones.
#[cube]
fn own_decays<E: Float>(
    tiles: &Tiles<E>,
    own: &Share,
    head: usize,
    #[comptime] plan: Plan,
) -> Array<f32> {
    let base = head * comptime!(plan.chunk);
    let end = tiles.sum[head * comptime!(plan.chunk) + comptime!(plan.chunk - 1)];
    let mut decays = Array::<f32>::new(2usize);
    #[unroll]
    for n in 0..2usize {
        let sum = tiles.sum[base + own.token + own_row() + comptime!(n * 8)];
        decays[n] = select(own.earlier, end - sum, sum).exp();
    }
    decays
}

/// `z`, decayed, and its product with the token's own: what passes through the state.
#[cube]
fn through_state<E: Float>(
    tiles: &mut Tiles<E>,
    own: &Share,
    head: usize,
    #[comptime] plan: Plan,
) -> Array<Pair<f32>> {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_n());
    let (first, _) = token_rows(own, plan);
    let mut out = zero_sums(comptime!(padded / NARROW));
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(&tiles.onto, first, k, stride);
        #[unroll]
        for block in 0..comptime!(padded / SIDE) {
            let channel = head * padded + comptime!(block * SIDE);
            let column = own.half * comptime!(plan.channels()) + channel;
            let columns = right_transposed::<E>(&tiles.states, k, column, stride);
            multiply::<E>(&rows, &columns, &mut out, comptime!(2 * block));
        }
    }
    let decays = own_decays::<E>(&*tiles, own, head, plan);
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    #[unroll]
    for n in 0..2usize {
        let row = first + own_row() + comptime!(n * 8);
        let mut inner = Pair::<f32>::new(0.0f32);
        #[unroll]
        for block in 0..comptime!(padded / NARROW) {
            let column = head * padded + comptime!(block * NARROW) + own_column();
            let value = tokens[(row * comptime!(plan.stride_x()) + column) / 2];
            let decayed = out[comptime!(2 * block + n)] * Pair::new(decays[n]);
            out[comptime!(2 * block + n)] = decayed;
            inner = fma(Pair::<f32>::cast_from(value), decayed, inner);
        }
        let total = sum_of_quad(inner.extract(0usize) + inner.extract(1usize));
        if own_column() == 0 {
            let place = term_place(own, head, n, plan);
            tiles.through[place] = total;
        }
    }
    out
}

/// Where the terms of a unit's first or second token lie in `[2, heads, chunk]`.
#[cube]
fn term_place(
    own: &Share,
    head: usize,
    #[comptime] second: usize,
    #[comptime] plan: Plan,
) -> usize {
    let token = own.token + own_row() + comptime!(second * 8);
    own.half * comptime!(plan.chunk * plan.heads) + head * comptime!(plan.chunk) + token
}

/// The sum over the four units that share a row.
#[cube]
fn sum_of_quad(value: f32) -> f32 {
    let pair = value + plane_shuffle_xor(value, 1u32);
    pair + plane_shuffle_xor(pair, 2u32)
}

/// All that passes through pairs of tokens: the gradient of `C B^T`, the sums for the steps and, for earlier
/// tokens, what dy sends back to x.
#[cube]
fn through_pairs<E: Float>(
    scores: &Array<Pair<f32>>,
    dscores: &mut Array<Pair<f32>>,
    tiles: &mut Tiles<E>,
    out: &mut Array<Pair<f32>>,
    own: &Share,
    head: usize,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_x());
    let (first, others) = token_rows(own, plan);
    let mut sums = Array::<f32>::new(2usize);
    sums[0] = 0.0f32;
    sums[1] = 0.0f32;
    #[unroll]
    for block in 0..comptime!(plan.chunk / SIDE) {
        if has_pairs(own, block) {
            let row = others + comptime!(block * SIDE);
            let mut products = zero_sums(2usize);
            #[unroll]
            for step in 0..comptime!(padded / SIDE) {
                let k = head * padded + comptime!(step * SIDE);
                let rows = left::<E>(&tiles.tokens, first, k, stride);
                let columns = right_transposed::<E>(&tiles.tokens, k, row, stride);
                multiply::<E>(&rows, &columns, &mut products, 0usize);
            }
            let back = pair_terms::<E>(
                scores, dscores, &products, tiles, &mut sums, own, head, block, plan,
            );
            if own.earlier {
                #[unroll]
                for n in 0..comptime!(padded / SIDE) {
                    let column = head * padded + comptime!(n * SIDE);
                    let columns = right::<E>(&tiles.tokens, row, column, stride);
                    multiply::<E>(&back, &columns, out, comptime!(2 * n));
                }
            }
        }
    }
    #[unroll]
    for n in 0..2usize {
        let total = sum_of_quad(sums[n]);
        if own_column() == 0 {
            let place = term_place(own, head, n, plan);
            tiles.pairs[place] = total;
        }
    }
}

/// A block of pairs: from the products of their tokens to the gradient of the scores and the sums; returns the
/// decayed scores as the left operand of a product.
#[cube]
fn pair_terms<E: Float>(
    scores: &Array<Pair<f32>>,
    dscores: &mut Array<Pair<f32>>,
    products: &Array<Pair<f32>>,
    tiles: &mut Tiles<E>,
    sums: &mut Array<f32>,
    own: &Share,
    head: usize,
    #[comptime] block: usize,
    #[comptime] plan: Plan,
) -> Array<Pair<E>> {
    let base = head * comptime!(plan.chunk);
    let mut back = Array::<Pair<E>>::new(4usize);
    #[unroll]
    for n in 0..4usize {
        let token = own.token + own_row() + comptime!(n % 2 * 8);
        let other = comptime!(block * SIDE + n / 2 * NARROW) + own_column();
        let at = comptime!(2 * (2 * block + n / 2) + n % 2);
        let (own_sum, own_step) = (tiles.sum[base + token], tiles.step[base + token]);
        let mut decayed_scores = Pair::<f32>::new(0.0f32);
        let mut gradients = Pair::<f32>::new(0.0f32);
        #[unroll]
        for lane in 0..2usize {
            let (sum, step) = (
                tiles.sum[base + other + lane],
                tiles.step[base + other + lane],
            );
            let valid = select(own.earlier, other + lane >= token, other + lane <= token);
            let gap = select(own.earlier, sum - own_sum, own_sum - sum);
            let decay = select(valid, gap.exp(), 0.0f32);
            let score = scores[at].extract(lane) * decay;
            let product = products[comptime!(2 * (n / 2) + n % 2)].extract(lane);
            let term = score * product;
            if other + lane == token {
                if own.earlier {
                    tiles.diagonal[base + token] = term;
                }
            } else {
                sums[comptime!(n % 2)] += select(own.earlier, term, term * step);
            }
            decayed_scores.insert(lane, score);
            gradients.insert(lane, product * decay * select(own.earlier, own_step, step));
        }
        dscores[at] += gradients;
        back[n] = Pair::<E>::cast_from(decayed_scores);
    }
    back
}

/// `dx = dt u + D dy` of a plane's tokens, and the sum of `dy x` over them.
#[cube]
fn store_dx<E: Float>(
    out: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    d: &[f32],
    dx: &mut [E],
    dd: &mut [f32],
    own: &Share,
    first_head: usize,
    head: usize,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    let d = d.as_vectorized().with_vector_size::<Const<2>>();
    let dx = dx.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    let dd = dd.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    let parts = comptime!(half_planes(plan));
    let part = (own.batch * call.chunks + own.chunk) * parts + own.token / SIDE;
    let width = call.heads * comptime!(plan.headdim);
    #[unroll]
    for n in 0..comptime!(plan.headdim_padded() / NARROW) {
        let inside = comptime!(n * NARROW) + own_column();
        let column = head * comptime!(plan.headdim_padded()) + inside;
        let channel = (first_head + head) * comptime!(plan.headdim) + inside;
        let exists = inside < comptime!(plan.headdim);
        let mut skipped = Pair::<f32>::new(0.0f32);
        #[unroll]
        for half in 0..2usize {
            let row = own.token + own_row() + comptime!(half * 8);
            let step = tiles.step[head * comptime!(plan.chunk) + row];
            let mut value = out[comptime!(2 * n + half)] * Pair::new(step);
            if comptime!(plan.skip) {
                let dy = tokens[(row * comptime!(plan.stride_x()) + column) / 2];
                let x_row = comptime!(plan.chunk) + row;
                let x = tokens[(x_row * comptime!(plan.stride_x()) + column) / 2];
                let dy = Pair::<f32>::cast_from(dy);
                skipped = fma(Pair::<f32>::cast_from(x), dy, skipped);
                value += dy * d[select(exists, channel / 2, 0usize)];
            }
            if exists && row < own.rows {
                let place = call.out.offset + (own.base + row) * call.out.row + channel;
                dx[place / 2] = Pair::<E>::cast_from(value);
            }
        }
        if comptime!(plan.skip) {
            let total = sum_of_rows(skipped);
            if exists && own_row() == 0 {
                dd[(part * width + channel) / 2] = total;
            }
        }
    }
}

/// The sum over the eight units that share a pair of columns.
#[cube]
fn sum_of_rows(value: Pair<f32>) -> Pair<f32> {
    let mut sum = Pair::<f32>::new(0.0f32);
    #[unroll]
    for lane in 0..2usize {
        let one = value.extract(lane);
        let two = one + plane_shuffle_xor(one, 4u32);
        let four = two + plane_shuffle_xor(two, 8u32);
        sum.insert(lane, four + plane_shuffle_xor(four, 16u32));
    }
    sum
}

/// The gradient of C (or B) through the state: the token's own, decayed, times h (or g).
#[cube]
fn onto_state<E: Float>(
    tiles: &Tiles<E>,
    gradient: &mut Array<Pair<f32>>,
    own: &Share,
    head: usize,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    let (first, _) = token_rows(own, plan);
    let decays = own_decays::<E>(tiles, own, head, plan);
    let mut weights = Array::<f32>::new(2usize);
    #[unroll]
    for n in 0..2usize {
        let token = own.token + own_row() + comptime!(n * 8);
        let step = tiles.step[head * comptime!(plan.chunk) + token];
        weights[n] = select(own.earlier, decays[n] * step, decays[n]);
    }
    #[unroll]
    for step in 0..comptime!(padded / SIDE) {
        let k = head * padded + comptime!(step * SIDE);
        let values = left::<E>(&tiles.tokens, first, k, comptime!(plan.stride_x()));
        let mut weighted = Array::<Pair<E>>::new(4usize);
        #[unroll]
        for n in 0..4usize {
            let weight = Pair::<f32>::new(weights[comptime!(n % 2)]);
            weighted[n] = Pair::<E>::cast_from(Pair::<f32>::cast_from(values[n]) * weight);
        }
        let row = own.half * comptime!(plan.channels()) + k;
        #[unroll]
        for n in 0..comptime!(plan.state_padded() / SIDE) {
            let columns = right::<E>(
                &tiles.states,
                row,
                comptime!(n * SIDE),
                comptime!(plan.stride_n()),
            );
            multiply::<E>(&weighted, &columns, gradient, comptime!(2 * n));
        }
    }
}

/// The gradient of C (or B) through the scores: their gradient times the other half's B (or C).
#[cube]
fn through_scores<E: Float>(
    dscores: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    gradient: &mut Array<Pair<f32>>,
    own: &Share,
    #[comptime] plan: Plan,
) {
    let (_, others) = token_rows(own, plan);
    #[unroll]
    for block in 0..comptime!(plan.chunk / SIDE) {
        if has_pairs(own, block) {
            let mut rows = Array::<Pair<E>>::new(4usize);
            #[unroll]
            for n in 0..4usize {
                let at = comptime!(2 * (2 * block + n / 2) + n % 2);
                rows[n] = Pair::<E>::cast_from(dscores[at]);
            }
            #[unroll]
            for n in 0..comptime!(plan.state_padded() / SIDE) {
                let columns = right::<E>(
                    &tiles.onto,
                    others + comptime!(block * SIDE),
                    comptime!(n * SIDE),
                    comptime!(plan.stride_n()),
                );
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
