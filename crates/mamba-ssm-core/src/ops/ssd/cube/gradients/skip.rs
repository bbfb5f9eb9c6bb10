//! The gradients of x and of D, the weight of what skips the scan.

use cubecl::prelude::*;

use super::skip_parts;
use crate::ops::ssd::cube::plan::{Call, Plan};

/// `dx = dt u + D dy`.
#[cube]
pub(super) fn store_dx<I: Float, E: Float, V: Size>(
    stage: &Shared<[f32]>,
    dy_tile: &Shared<[E]>,
    step: &Shared<[f32]>,
    d: &[f32],
    base: usize,
    first_head: usize,
    rows: usize,
    dx: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let vector = comptime!(plan.vector_x);
    let vectors = comptime!(plan.headdim / plan.vector_x);
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let dy_tile = dy_tile.as_vectorized().with_vector_size::<V>();
    let d = d.as_vectorized().with_vector_size::<V>();
    let dx = dx.as_vectorized_mut().with_vector_size_mut::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads * plan.headdim / plan.vector_x) {
        let inside = n % vectors * vector;
        let head = n / vectors % comptime!(plan.heads);
        let row = n / vectors / comptime!(plan.heads);
        let column = head * comptime!(plan.headdim_padded()) + inside;
        if row < rows {
            let channel = (first_head + head) * comptime!(plan.headdim) + inside;
            let dt = step[head * comptime!(plan.chunk) + row];
            let u = stage[(row * comptime!(plan.stride_stage()) + column) / vector];
            let mut value = u * Vector::new(dt);
            if comptime!(plan.skip) {
                let dy = Vector::<f32, V>::cast_from(
                    dy_tile[(row * comptime!(plan.stride_x()) + column) / vector],
                );
                value += dy * d[channel / vector];
            }
            let place = call.out.offset + (base + row) * call.out.row + channel;
            dx[place / vector] = Vector::<I, V>::cast_from(value);
        }
        n += comptime!(plan.team.units);
    }
}

/// `sum over the chunk of dy x`, per channel.
#[cube]
pub(super) fn skip_terms<E: Float>(
    x_tile: &Shared<[E]>,
    dy_tile: &Shared<[E]>,
    dd: &mut [f32],
    to: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.heads * plan.headdim);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * plan.headdim * skip_parts(plan)) {
        let (part, channel) = (n / channels, n % channels);
        let head = channel / comptime!(plan.headdim);
        let column = head * comptime!(plan.headdim_padded()) + channel % comptime!(plan.headdim);
        let mut sum = 0.0f32;
        let mut row = part;
        while row < comptime!(plan.chunk) {
            let place = row * comptime!(plan.stride_x()) + column;
            sum += f32::cast_from(x_tile[place]) * f32::cast_from(dy_tile[place]);
            row += comptime!(skip_parts(plan));
        }
        dd[to + part * width + channel] = sum;
        n += comptime!(plan.team.units);
    }
}
