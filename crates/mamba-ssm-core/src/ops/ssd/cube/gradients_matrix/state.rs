//! What passes through the state: `z`, and the gradient of C or B.

use cubecl::prelude::*;

use super::tiles::{Half, Share, Spot, Tiles, sum_of_quad, term_place};
use crate::ops::cube::SIDE;
use crate::ops::cube::fragment::{
    NARROW, Pair, left, multiply, own_column, own_pair, own_row, right, right_transposed, zero_sums,
};
use crate::ops::ssd::cube::plan::Plan;

/// Decays of a unit's two tokens: since the chunk's start for later ones, to its end for earlier ones.
#[cube]
fn own_decays<E: Float>(
    tiles: &Tiles<E>,
    own: &Share,
    spot: &Spot,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> Array<f32> {
    let base = spot.slot * comptime!(plan.chunk);
    let token = base + own.token + own_row();
    let mut decays = Array::<f32>::new(2usize);
    #[unroll]
    for n in 0..2usize {
        let mut sum = tiles.sum[token + comptime!(n * 8)];
        if comptime!(half == Half::Earlier) {
            sum = tiles.sum[base + comptime!(plan.chunk - 1)] - sum;
        }
        decays[n] = sum.exp();
    }
    decays
}

/// `z`, decayed, and its product with the token's own: what passes through the state.
#[cube]
pub(super) fn through_state<E: Float>(
    tiles: &mut Tiles<E>,
    own: &Share,
    spot: &Spot,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) -> Array<Pair<f32>> {
    let padded = comptime!(plan.headdim_padded());
    let stride = comptime!(plan.stride_n());
    let first = comptime!(half.own() * plan.chunk) + own.token;
    let mut out = zero_sums(comptime!(padded / NARROW));
    #[unroll]
    for step in 0..comptime!(plan.state_padded() / SIDE) {
        let k = comptime!(step * SIDE);
        let rows = left::<E>(&tiles.onto, first, k, stride);
        #[unroll]
        for block in 0..comptime!(padded / SIDE) {
            let behind = spot.states + comptime!(half.own() * plan.channels() + block * SIDE);
            let columns =
                right_transposed::<E>(&tiles.states, k, spot.head * padded + behind, stride);
            multiply::<E>(&rows, &columns, &mut out, comptime!(2 * block));
        }
    }
    let decays = own_decays::<E>(&*tiles, own, spot, plan, half);
    let tokens = tiles.tokens.as_vectorized().with_vector_size::<Const<2>>();
    // In pairs.
    let row = comptime!(plan.stride_x() / 2);
    let from =
        (spot.tokens + first + own_row()) * row + spot.head * comptime!(padded / 2) + own_pair();
    #[unroll]
    for n in 0..2usize {
        let mut inner = Pair::<f32>::new(0.0f32);
        #[unroll]
        for block in 0..comptime!(padded / NARROW) {
            let value = tokens[from + comptime!(n * 8 * row + block * NARROW / 2)];
            let decayed = out[comptime!(2 * block + n)] * Pair::new(decays[n]);
            out[comptime!(2 * block + n)] = decayed;
            inner = fma(Pair::<f32>::cast_from(value), decayed, inner);
        }
        let total = sum_of_quad(inner.extract(0usize) + inner.extract(1usize));
        if own_column() == 0 {
            tiles.through[term_place(own, spot.slot, n, plan, half)] = total;
        }
    }
    out
}

/// The gradient of C (or B) through the state: the token's own, decayed, times h (or g).
#[cube]
pub(super) fn onto_state<E: Float>(
    tiles: &Tiles<E>,
    gradient: &mut Array<Pair<f32>>,
    own: &Share,
    spot: &Spot,
    #[comptime] plan: Plan,
    #[comptime] half: Half,
) {
    let padded = comptime!(plan.headdim_padded());
    let first = comptime!(half.own() * plan.chunk) + own.token;
    let mut weights = own_decays::<E>(tiles, own, spot, plan, half);
    if comptime!(half == Half::Earlier) {
        let token = spot.slot * comptime!(plan.chunk) + own.token + own_row();
        #[unroll]
        for n in 0..2usize {
            weights[n] = weights[n] * tiles.step[token + comptime!(n * 8)];
        }
    }
    #[unroll]
    for step in 0..comptime!(padded / SIDE) {
        let k = spot.head * padded + comptime!(step * SIDE);
        let values = left::<E>(
            &tiles.tokens,
            spot.tokens + first,
            k,
            comptime!(plan.stride_x()),
        );
        let mut weighted = Array::<Pair<E>>::new(4usize);
        #[unroll]
        for n in 0..4usize {
            let weight = Pair::<f32>::new(weights[comptime!(n % 2)]);
            weighted[n] = Pair::<E>::cast_from(Pair::<f32>::cast_from(values[n]) * weight);
        }
        let row = spot.states
            + spot.head * padded
            + comptime!(half.own() * plan.channels() + step * SIDE);
        let stride = comptime!(plan.stride_n());
        #[unroll]
        for n in 0..comptime!(plan.state_padded() / SIDE) {
            let columns = right::<E>(&tiles.states, row, comptime!(n * SIDE), stride);
            multiply::<E>(&weighted, &columns, gradient, comptime!(2 * n));
        }
    }
}
