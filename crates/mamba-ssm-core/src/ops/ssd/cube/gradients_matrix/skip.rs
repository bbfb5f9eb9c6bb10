//! The gradient of x, with the skip connection, and that of D.

use cubecl::prelude::*;

use super::tiles::{Share, Tiles, half_planes};
use crate::ops::cube::fragment::{NARROW, Pair, own_column, own_pair, own_row};
use crate::ops::ssd::cube::plan::{Call, Plan};

/// Rows that share a pair of columns.
const ROWS: usize = 8;

/// `dx = dt u + D dy` of a plane's tokens, and the sum of `dy x` over them.
#[cube]
pub(super) fn store_dx<E: Float>(
    u: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    d: &[f32],
    dx: &mut [E],
    dd: &mut [f32],
    own: &Share,
    first_head: usize,
    head: usize,
    slot: usize,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let padded = comptime!(plan.headdim_padded());
    let count = comptime!(padded / NARROW);
    let dx = dx.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    let channel = (first_head + head) * comptime!(plan.headdim) + own_column();
    let token = own.token + own_row();
    let at = slot * comptime!(plan.chunk) + token;
    let steps = (tiles.step[at], tiles.step[at + ROWS]);
    let mut values = Array::<Pair<f32>>::new(comptime!(2 * count));
    #[unroll]
    for n in 0..count {
        values[comptime!(2 * n)] = u[comptime!(2 * n)] * Pair::new(steps.0);
        values[comptime!(2 * n + 1)] = u[comptime!(2 * n + 1)] * Pair::new(steps.1);
    }
    if comptime!(plan.skip) {
        let mut skipped = Array::<Pair<f32>>::new(count);
        add_skip::<E>(
            &mut values,
            &mut skipped,
            tiles,
            d,
            token,
            channel,
            head,
            plan,
        );
        let part = (own.batch * call.chunks + own.chunk) * comptime!(half_planes(plan));
        let row = (part + own.token / comptime!(2 * ROWS)) * call.heads * comptime!(plan.headdim);
        store_sums(&mut skipped, dd, row + channel, plan);
    }
    let to = call.out.offset + (own.base + token) * call.out.row + channel;
    #[unroll]
    for half in 0..2usize {
        if token + comptime!(half * ROWS) < own.rows {
            let to = (to + comptime!(half * ROWS) * call.out.row) / 2;
            #[unroll]
            for n in 0..count {
                if comptime!(n * NARROW) + own_column() < comptime!(plan.headdim) {
                    dx[to + comptime!(n * NARROW / 2)] =
                        Pair::<E>::cast_from(values[comptime!(2 * n + half)]);
                }
            }
        }
    }
}

/// Adds `D dy`, and finds `dy x` of a unit's two tokens together.
#[cube]
fn add_skip<E: Float>(
    values: &mut Array<Pair<f32>>,
    skipped: &mut Array<Pair<f32>>,
    tiles: &Tiles<E>,
    d: &[f32],
    token: usize,
    channel: usize,
    head: usize,
    #[comptime] plan: Plan,
) {
    let d = d.as_vectorized().with_vector_size::<Const<2>>();
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let row = comptime!(plan.stride_x() / 2);
    let from = token * row + head * comptime!(plan.headdim_padded() / 2) + own_pair();
    #[unroll]
    for n in 0..comptime!(plan.headdim_padded() / NARROW) {
        let exists = comptime!(n * NARROW) + own_column() < comptime!(plan.headdim);
        let place = channel / 2 + comptime!(n * NARROW / 2);
        let weight = d[select(exists, place, 0usize)];
        let mut sum = Pair::<f32>::new(0.0f32);
        #[unroll]
        for half in 0..2usize {
            let at = from + comptime!(half * ROWS * row + n * NARROW / 2);
            let dy = Pair::<f32>::cast_from(tokens[at]);
            let x = Pair::<f32>::cast_from(tokens[at + comptime!(plan.chunk * row)]);
            sum = fma(x, dy, sum);
            values[comptime!(2 * n + half)] = fma(dy, weight, values[comptime!(2 * n + half)]);
        }
        skipped[n] = sum;
    }
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
