//! Tiles on their way through a pass: decayed, weighted, and written as rows.

use cubecl::prelude::*;

use crate::ops::cube::place::Place;
use crate::ops::ssd::cube::plan::Plan;

/// `stage[j] *= exp(s[Q] - s[j])`.
#[cube]
pub(super) fn decay_to_end<V: Size>(
    stage: &mut Shared<[f32]>,
    sum: &Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let stage = stage.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors;
        let head = column / comptime!(plan.headdim_padded() / plan.vector_x);
        let first = head * comptime!(plan.chunk);
        let place = row * comptime!(plan.stride_stage() / plan.vector_x) + column;
        let decay = (sum[first + comptime!(plan.chunk - 1)] - sum[first + row]).exp();
        stage[place] = stage[place] * Vector::new(decay);
        n += comptime!(plan.team.units);
    }
}

/// `x[j] *= exp(s[Q] - s[j]) dt[j]` and `dy[i] *= exp(s[i])`.
#[cube]
pub(super) fn weigh<E: Float, V: Size>(
    x_tile: &mut Shared<[E]>,
    dy_tile: &mut Shared<[E]>,
    step: &Shared<[f32]>,
    sum: &Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.channels() / plan.vector_x);
    let x_tile = x_tile.as_vectorized_mut().with_vector_size_mut::<V>();
    let dy_tile = dy_tile.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.channels() / plan.vector_x) {
        let row = n / vectors;
        let column = n % vectors;
        let head = column / comptime!(plan.headdim_padded() / plan.vector_x);
        let first = head * comptime!(plan.chunk);
        let place = row * comptime!(plan.stride_x() / plan.vector_x) + column;
        let own = sum[first + row];
        let weight = (sum[first + comptime!(plan.chunk - 1)] - own).exp() * step[first + row];
        let x = Vector::<f32, V>::cast_from(x_tile[place]) * Vector::new(weight);
        let dy = Vector::<f32, V>::cast_from(dy_tile[place]) * Vector::new(own.exp());
        x_tile[place] = Vector::<E, V>::cast_from(x);
        dy_tile[place] = Vector::<E, V>::cast_from(dy);
        n += comptime!(plan.team.units);
    }
}

/// Writes tokens-by-state rows.
#[cube]
pub(super) fn store_rows<O: Float, V: Size>(
    stage: &Shared<[f32]>,
    rows: usize,
    to: usize,
    state_column: usize,
    out: &mut [O],
    place: &Place,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_n);
    let vectors = comptime!(plan.state / plan.vector_n);
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let out = out.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.state / plan.vector_n) {
        let row = n / vectors;
        let column = n % vectors * vector;
        if row < rows {
            let at = place.offset + (to + row) * place.row + state_column + column;
            let value = stage[(row * comptime!(plan.stride_stage()) + column) / vector];
            out[at / vector] = Vector::<O, V>::cast_from(value);
        }
        n += comptime!(plan.team.units);
    }
}
