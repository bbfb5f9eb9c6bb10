//! What passes through pairs of tokens: the gradient of `C B^T`, the sums for the steps, and what dy sends back to
//! x.

use cubecl::prelude::*;

use super::tiles::{
    Half, Share, Spot, Tiles, has_block, slots, sum_of_quad, term_place, token_of_block,
};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    NARROW, Pair, left, multiply, own_column, own_pair, own_row, right, right_transposed, zero_sums,
};
use crate::ops::ssd::cube::plan::Plan;
use crate::ops::ssd::cube::steps::bounded;

/// What pairs of tokens add up to.
#[derive(CubeType)]
struct Terms<E: Float> {
    /// The decayed scores of a block, as the left operand of a product.
    back: Array<Pair<E>>,
    /// Of a unit's two tokens, over the pairs with others.
    sums: Array<f32>,
    /// Of a unit's two tokens with themselves.
    diagonal: Array<f32>,
}

/// All that passes through pairs of tokens of a head; onto `u`, for earlier tokens, what dy sends back.
#[cube]
pub(super) fn through_pairs<E: Float>(
    scores: &Array<Pair<f32>>,
    dscores: &mut Array<Pair<f32>>,
    tiles: &mut Tiles<E>,
    u: &mut Array<Pair<f32>>,
    own: &Share,
    spot: &Spot,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    let mut terms = Terms::<E> {
        back: Array::new(4usize),
        sums: Array::new(2usize),
        diagonal: Array::new(2usize),
    };
    #[unroll]
    for row in 0..2usize {
        terms.sums[row] = 0.0f32;
        terms.diagonal[row] = 0.0f32;
    }
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_x());
    #[unroll]
    for distance in 0..comptime!(plan.chunk / SIDE) {
        if has_block(own, distance, plan, half) {
            let products = products::<E>(&*tiles, own, spot, distance, plan, half);
            if comptime!(distance == 0) {
                own_block::<E>(
                    scores, dscores, &products, &*tiles, &mut terms, own, spot, plan, half,
                );
            } else {
                other_block::<E>(
                    scores, dscores, &products, &*tiles, &mut terms, own, spot, distance, plan,
                    half,
                );
            }
            if comptime!(half == Half::Earlier) {
                let row = spot.tokens
                    + comptime!(half.other() * plan.chunk)
                    + token_of_block(own, distance, half);
                #[unroll]
                for n in 0..comptime!(padded / SIDE) {
                    let column = spot.head * padded + comptime!(n * SIDE);
                    let columns = right::<E>(&tiles.tokens, row, column, stride);
                    multiply::<E>(&terms.back, &columns, u, comptime!(2 * n));
                }
            }
        }
    }
    #[unroll]
    for n in 0..2usize {
        let total = sum_of_quad(terms.sums[n]);
        let diagonal = sum_of_quad(terms.diagonal[n]);
        if own_column() == 0 {
            tiles.pairs[term_place(own, spot.slot, n, plan, half)] = total;
            if comptime!(half == Half::Earlier) {
                let token = own.token + own_row() + comptime!(n * 8);
                tiles.diagonal[spot.slot * comptime!(plan.chunk) + token] = diagonal;
            }
        }
    }
}

/// `dy[i].x[j]` of a plane's tokens with a block of the other half's.
#[cube]
fn products<E: Float>(
    tiles: &Tiles<E>,
    own: &Share,
    spot: &Spot,
    #[comptime] distance: usize,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> Array<Pair<f32>> {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_x());
    let first = spot.tokens + comptime!(half.own() * plan.chunk) + own.token;
    let row =
        spot.tokens + comptime!(half.other() * plan.chunk) + token_of_block(own, distance, half);
    let mut products = zero_sums(2usize);
    #[unroll]
    for step in 0..comptime!(padded / SIDE) {
        let k = spot.head * padded + comptime!(step * SIDE);
        let rows = left::<E>(&tiles.tokens, first, k, stride);
        let columns = right_transposed::<E>(&tiles.tokens, k, row, stride);
        multiply::<E>(&rows, &columns, &mut products, 0usize);
    }
    products
}

/// A block of pairs none of which is a token with itself or the wrong way round: from the products of their
/// tokens to the gradient of the scores and the sums. The decay from one token to another is that to the
/// boundary of a block between them times that from there on; one side is in [`Tiles::factors`].
#[cube]
fn other_block<E: Float>(
    scores: &Array<Pair<f32>>,
    dscores: &mut Array<Pair<f32>>,
    products: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    terms: &mut Terms<E>,
    own: &Share,
    spot: &Spot,
    #[comptime] distance: usize,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    let earlier = comptime!(half == Half::Earlier);
    let base = spot.slot * comptime!(plan.chunk);
    let factors = tiles.factors.as_vectorized().with_vector_size::<Const<2>>();
    let other = base + token_of_block(own, distance, half);
    // In pairs.
    let others = (other + comptime!(half.own() * slots(plan))) / 2 + own_pair();
    // The token before the block's first, where the block lies behind the own, or its last.
    let edge = tiles.sum[other + comptime!(if earlier { 0 } else { SIDE }) - 1];
    let token = base + own.token + own_row();
    #[unroll]
    for row in 0..2usize {
        let sum = tiles.sum[token + comptime!(row * 8)];
        let decay = if comptime!(earlier) {
            bounded(edge - sum)
        } else {
            bounded(sum - edge)
        };
        let mut step = decay;
        if comptime!(earlier) {
            step = decay * tiles.step[token + comptime!(row * 8)];
        }
        let (decay, step) = (Pair::<f32>::new(decay), Pair::<f32>::new(step));
        let mut total = Pair::<f32>::new(0.0f32);
        #[unroll]
        for side in 0..2usize {
            let factor = factors[others + comptime!(side * NARROW / 2)];
            let at = comptime!(2 * (2 * distance + side) + row);
            let product = products[comptime!(2 * side + row)];
            let weighted = scores[at] * (factor * decay);
            total = fma(weighted, product, total);
            dscores[at] = fma(product, factor * step, dscores[at]);
            terms.back[comptime!(2 * side + row)] = Pair::<E>::cast_from(weighted);
        }
        terms.sums[row] += total.extract(0usize) + total.extract(1usize);
    }
}

/// As [`other_block`], of the block of the own tokens with themselves and their neighbours.
#[cube]
fn own_block<E: Float>(
    scores: &Array<Pair<f32>>,
    dscores: &mut Array<Pair<f32>>,
    products: &Array<Pair<f32>>,
    tiles: &Tiles<E>,
    terms: &mut Terms<E>,
    own: &Share,
    spot: &Spot,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    let earlier = comptime!(half == Half::Earlier);
    let sums = tiles.sum.as_vectorized().with_vector_size::<Const<2>>();
    let steps = tiles.step.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let others = (spot.slot * comptime!(plan.chunk) + own.token) / 2 + own_pair();
    let token = spot.slot * comptime!(plan.chunk) + own.token + own_row();
    #[unroll]
    for n in 0..4usize {
        // Left, below, right, below right: two of them hold pairs of both kinds, one of the others none.
        let (row, side) = comptime!((n % 2, n / 2));
        if comptime!(if earlier { row > side } else { row < side }) {
            terms.back[n] = Pair::<E>::new(E::from_int(0));
        } else {
            let own_sum = tiles.sum[token + comptime!(row * 8)];
            let other_sums = sums[others + comptime!(side * NARROW / 2)];
            let other_steps = steps[others + comptime!(side * NARROW / 2)];
            let at = comptime!(2 * side + row);
            let product = products[comptime!(2 * side + row)];
            let mut weights = Pair::<f32>::new(0.0f32);
            #[unroll]
            for lane in 0..2usize {
                let gap = other_sums.extract(lane) - own_sum;
                let mut weight = if comptime!(earlier) {
                    gap.exp()
                } else {
                    (-gap).exp() * other_steps.extract(lane)
                };
                if comptime!(row == side) {
                    let other = own_column() + lane;
                    let valid = if comptime!(earlier) {
                        other >= own_row()
                    } else {
                        other <= own_row()
                    };
                    weight = select(valid, weight, 0.0f32);
                }
                weights.insert(lane, weight);
            }
            let weighted = scores[at] * weights;
            let term = weighted * product;
            #[unroll]
            for lane in 0..2usize {
                if comptime!(row == side) {
                    let same = own_column() + lane == own_row();
                    terms.sums[row] += select(same, 0.0f32, term.extract(lane));
                    terms.diagonal[row] += select(same, term.extract(lane), 0.0f32);
                } else {
                    terms.sums[row] += term.extract(lane);
                }
            }
            if comptime!(earlier) {
                weights *= Pair::<f32>::new(tiles.step[token + comptime!(row * 8)]);
            }
            dscores[at] = fma(product, weights, dscores[at]);
            terms.back[n] = Pair::<E>::cast_from(weighted);
        }
    }
}
