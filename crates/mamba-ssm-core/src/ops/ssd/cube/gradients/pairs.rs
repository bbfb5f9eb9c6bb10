//! Pairs of tokens: the gradient of `C B^T`, and `V` with the sums of its rows and columns.

use cubecl::prelude::*;

use super::{Terms, pair_parts};
use crate::ops::ssd::cube::outputs::pair_shares;
use crate::ops::ssd::cube::plan::Plan;

/// From `dy[i].x[j]` in the stage: the gradient of `C B^T`, and `V` in its place, its diagonal apart.
#[cube]
pub(super) fn pair_terms(
    scores: &Array<f32>,
    dscores: &mut Array<f32>,
    stage: &mut Shared<[f32]>,
    terms: &mut Terms,
    head: usize,
    #[comptime] plan: Plan,
) {
    let first = head * comptime!(plan.chunk);
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        let place = UNIT_POS as usize + r * comptime!(plan.team.units);
        let i = place / comptime!(plan.chunk);
        let j = place % comptime!(plan.chunk);
        let at = i * comptime!(plan.stride_stage()) + j;
        let mut value = 0.0f32;
        if j <= i {
            let decayed = (terms.sum[first + i] - terms.sum[first + j]).exp() * stage[at];
            dscores[r] = fma(decayed, terms.step[first + j], dscores[r]);
            value = decayed * scores[r];
        }
        if i == j {
            terms.diagonal[first + i] = value;
            value = 0.0f32;
        }
        stage[at] = value;
    }
}

/// Sums of the rows, weighted by the steps, and of the columns of `V`.
#[cube]
pub(super) fn sum_pairs(
    stage: &Shared<[f32]>,
    terms: &mut Terms,
    head: usize,
    #[comptime] plan: Plan,
) {
    let chunk = comptime!(plan.chunk);
    let each = comptime!(plan.chunk.div_ceil(pair_parts(plan)));
    let first = head * chunk;
    let mut n = UNIT_POS as usize;
    while n < comptime!(2 * plan.chunk * pair_parts(plan)) {
        let own = n % chunk;
        let part = n / chunk % comptime!(pair_parts(plan));
        let from = part * each;
        let to = min(from + each, chunk);
        let mut sum = 0.0f32;
        if n < comptime!(plan.chunk * pair_parts(plan)) {
            for k in from..to {
                // Every row starts at another column, so that units read different banks.
                let j = (k + own) % chunk;
                sum = fma(
                    stage[own * comptime!(plan.stride_stage()) + j],
                    terms.step[first + j],
                    sum,
                );
            }
            terms.rows[part * comptime!(plan.chunk * plan.heads) + first + own] = sum;
        } else {
            for i in from..to {
                sum += stage[i * comptime!(plan.stride_stage()) + own];
            }
            terms.columns[part * comptime!(plan.chunk * plan.heads) + first + own] = sum;
        }
        n += comptime!(plan.team.units);
    }
}

/// A unit's elements into a tokens-by-tokens tile.
#[cube]
pub(super) fn own_to_tile<E: Float>(
    own: &Array<f32>,
    tile: &mut Shared<[E]>,
    #[comptime] plan: Plan,
) {
    #[unroll(pair_shares(plan) <= 64)]
    for r in 0..comptime!(pair_shares(plan)) {
        let place = UNIT_POS as usize + r * comptime!(plan.team.units);
        let i = place / comptime!(plan.chunk);
        let j = place % comptime!(plan.chunk);
        tile[i * comptime!(plan.stride_q()) + j] = E::cast_from(own[r]);
    }
}
