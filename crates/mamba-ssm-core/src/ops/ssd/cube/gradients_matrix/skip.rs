//! The gradient of x, with the skip connection, and that of D.

use cubecl::prelude::*;

use super::tiles::{Share, Spot, Tiles, half_planes};
use crate::ops::cube::fragment::{NARROW, Pair, own_column, own_pair, own_row};
use crate::ops::ssd::cube::outputs_matrix::{Placed, store};
use crate::ops::ssd::cube::plan::{Call, Plan};

/// Rows that share a pair of columns.
const ROWS: usize = 8;

/// `dx = dt u + D dy` of a plane's tokens.
#[cube]
pub(super) fn store_dx<E: Float>(
    u: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    d: &[f32],
    dx: &mut [E],
    own: &Share,
    first_head: usize,
    spot: &Spot,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let count = comptime!(plan.headdim_padded() / NARROW);
    let channel = (first_head + spot.head) * comptime!(plan.headdim);
    let token = own.token + own_row();
    let at = spot.slot * comptime!(plan.chunk) + token;
    let steps = (tiles.step[at], tiles.step[at + ROWS]);
    let mut values = Array::<Pair<f32>>::new(comptime!(2 * count));
    #[unroll]
    for n in 0..count {
        values[comptime!(2 * n)] = u[comptime!(2 * n)] * Pair::new(steps.0);
        values[comptime!(2 * n + 1)] = u[comptime!(2 * n + 1)] * Pair::new(steps.1);
    }
    if comptime!(plan.skip) {
        add_skip::<E>(&mut values, tiles, d, token, channel, spot, plan);
    }
    let place = Placed {
        to: call.out.offset + own.base * call.out.row + channel,
        row: call.out.row,
        rows: own.rows,
        token: own.token,
        channel: 0usize.runtime(),
    };
    store::<E>(&values, dx, &place, comptime!(plan.headdim_padded()), plan);
}

/// Where a unit's first pair of a token's channels of a head lies in a tile, in pairs.
#[cube]
fn pair_place(token: usize, spot: &Spot, #[comptime] plan: Plan) -> usize {
    (spot.tokens + token) * comptime!(plan.stride_x() / 2)
        + spot.head * comptime!(plan.headdim_padded() / 2)
        + own_pair()
}

/// Adds `D dy`.
#[cube]
fn add_skip<E: Float>(
    values: &mut Array<Pair<f32>>,
    tiles: &Tiles<E>,
    d: &[f32],
    token: usize,
    channel: usize,
    spot: &Spot,
    #[comptime] plan: Plan,
) {
    let d = d.as_vectorized().with_vector_size::<Const<2>>();
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    let from = pair_place(token, spot, plan);
    #[unroll]
    for n in 0..comptime!(plan.headdim_padded() / NARROW) {
        let exists = comptime!(n * NARROW) + own_column() < comptime!(plan.headdim);
        let place = channel / 2 + own_pair() + comptime!(n * NARROW / 2);
        let weight = d[select(exists, place, 0usize)];
        #[unroll]
        for half in 0..2usize {
            let at = from + comptime!((half * ROWS * plan.stride_x() + n * NARROW) / 2);
            let dy = Pair::<f32>::cast_from(tokens[at]);
            values[comptime!(2 * n + half)] = fma(dy, weight, values[comptime!(2 * n + half)]);
        }
    }
}

/// The gradient of D from a plane's tokens: the sum of `dy x` over them. (Planes of later tokens have the time:
/// those of earlier ones have dx to find.)
#[cube]
pub(super) fn store_skipped<E: Float>(
    tiles: &Tiles<E>,
    dd: &mut [f32],
    own: &Share,
    first_head: usize,
    spot: &Spot,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let count = comptime!(plan.headdim_padded() / NARROW);
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    let from = pair_place(own.token + own_row(), spot, plan);
    let mut skipped = Array::<Pair<f32>>::new(count);
    #[unroll]
    for n in 0..count {
        let mut sum = Pair::<f32>::new(0.0f32);
        #[unroll]
        for half in 0..2usize {
            let at = from + comptime!((half * ROWS * plan.stride_x() + n * NARROW) / 2);
            let dy = Pair::<f32>::cast_from(tokens[at]);
            let x =
                Pair::<f32>::cast_from(tokens[at + comptime!(plan.chunk * plan.stride_x() / 2)]);
            sum = fma(x, dy, sum);
        }
        skipped[n] = sum;
    }
    let part = (own.batch * call.chunks + own.chunk) * comptime!(half_planes(plan));
    let row = (part + own.token / comptime!(2 * ROWS)) * call.heads * comptime!(plan.headdim);
    let channel = (first_head + spot.head) * comptime!(plan.headdim) + own_column();
    store_sums(&mut skipped, dd, row + channel, plan);
}

/// Pairs that are left of `count` after some of the steps of [`store_sums`].
fn left_after(count: usize, steps: usize) -> usize {
    (0..steps).fold(count, |count, _| {
        if count.is_multiple_of(2) {
            count / 2
        } else {
            count
        }
    })
}

/// Writes the sums over the eight rows of the pairs that the units of a column hold. In each of three steps a
/// unit gives half of its pairs to a neighbour and takes over that one's of the other half, so there is less
/// to pass on each time; an odd number is added up in both.
#[cube]
fn store_sums(pairs: &mut Array<Pair<f32>>, dd: &mut [f32], to: usize, #[comptime] plan: Plan) {
    let count = comptime!(plan.headdim_padded() / NARROW);
    let mut first = 0usize;
    let mut writes = true;
    #[unroll]
    for step in 0..3usize {
        let now = comptime!(left_after(count, step));
        let after = comptime!(left_after(count, step + 1));
        let reach = comptime!((ROWS * 2) >> step);
        let upper = UNIT_POS_PLANE as usize / reach % 2 == 1;
        if comptime!(after < now) {
            first += select(upper, comptime!(after).runtime(), 0usize);
        } else {
            writes = writes && !upper;
        }
        #[unroll]
        for n in 0..after {
            let mut sum = Pair::<f32>::new(0.0f32);
            #[unroll]
            for lane in 0..2usize {
                let mut own = pairs[n].extract(lane);
                let mut given = own;
                if comptime!(after < now) {
                    let other = pairs[comptime!(n + after)].extract(lane);
                    given = select(upper, own, other);
                    own = select(upper, other, own);
                }
                sum.insert(
                    lane,
                    own + plane_shuffle_xor(given, comptime!(reach as u32)),
                );
            }
            pairs[n] = sum;
        }
    }
    let dd = dd.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    #[unroll]
    for n in 0..comptime!(left_after(count, 3)) {
        let column = (first + n) * NARROW;
        if writes && column + own_column() < comptime!(plan.headdim) {
            dd[(to + column) / 2] = pairs[n];
        }
    }
}
