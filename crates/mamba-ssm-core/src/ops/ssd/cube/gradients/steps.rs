//! What the gradients of the steps are made of: products over channels and over the state, gathered and written.

use cubecl::prelude::*;

use super::{KEPT, Terms, kept_parts, pair_parts, parts};
use crate::ops::ssd::cube::plan::{Call, Plan};

/// `<h, g>` of every head, in parts.
#[cube]
pub(super) fn inner_of_states<E: Float, V: Size>(
    h: &Shared<[E]>,
    g: &Shared<[E]>,
    kept: &mut Shared<[f32]>,
    #[comptime] plan: Plan,
) {
    let count = comptime!(kept_parts(plan));
    let vectors = comptime!(plan.state_padded() / plan.vector_n);
    let h = h.as_vectorized().with_vector_size::<V>();
    let g = g.as_vectorized().with_vector_size::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * kept_parts(plan)) {
        let head = n / count;
        let mut sum = Vector::<f32, V>::new(0.0f32);
        let mut place = n % count;
        while place < comptime!(plan.headdim_padded() * plan.state_padded() / plan.vector_n) {
            let row = head * comptime!(plan.headdim_padded()) + place / vectors;
            let at = row * comptime!(plan.stride_n() / plan.vector_n) + place % vectors;
            let (h, g) = (
                Vector::<f32, V>::cast_from(h[at]),
                Vector::<f32, V>::cast_from(g[at]),
            );
            sum = fma(h, g, sum);
            place += count;
        }
        kept[n] = lanes_sum::<V>(sum, comptime!(plan.vector_n));
        n += comptime!(plan.team.units);
    }
}

/// The sum of a vector's elements.
#[cube]
fn lanes_sum<V: Size>(vector: Vector<f32, V>, #[comptime] size: usize) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for lane in 0..size {
        sum += vector.extract(lane);
    }
    sum
}

/// The product of every token's channels in a tile with those in the stage, by head, in parts, times the
/// decay since the chunk's start or up to its end.
#[cube]
pub(super) fn inner_of_tokens<E: Float, V: Size>(
    tile: &Shared<[E]>,
    stage: &Shared<[f32]>,
    sum: &Shared<[f32]>,
    out: &mut Shared<[f32]>,
    #[comptime] to_end: bool,
    #[comptime] plan: Plan,
) {
    let count = comptime!(parts(plan));
    let tile = tile.as_vectorized().with_vector_size::<V>();
    let stage = stage.as_vectorized().with_vector_size::<V>();
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads * parts(plan)) {
        let row = n / count % comptime!(plan.chunk);
        let head = n / count / comptime!(plan.chunk);
        let first = head * comptime!(plan.headdim_padded() / plan.vector_x);
        let mut inner = Vector::<f32, V>::new(0.0f32);
        let mut p = n % count;
        while p < comptime!(plan.headdim / plan.vector_x) {
            let left = tile[row * comptime!(plan.stride_x() / plan.vector_x) + first + p];
            let right = stage[row * comptime!(plan.stride_stage() / plan.vector_x) + first + p];
            inner = fma(Vector::<f32, V>::cast_from(left), right, inner);
            p += count;
        }
        let mut decay = sum[head * comptime!(plan.chunk) + row];
        if comptime!(to_end) {
            decay = sum[head * comptime!(plan.chunk) + comptime!(plan.chunk - 1)] - decay;
        }
        out[n] = lanes_sum::<V>(inner, comptime!(plan.vector_x)) * decay.exp();
        n += comptime!(plan.team.units);
    }
}

/// Adds up the parts of the terms. Afterwards `rows` holds what a token's decay carries on to the tokens
/// behind it, `columns` what it takes from those before it, `diagonal` the gradient of the step itself and
/// `kept` a few parts for every head.
#[cube]
pub(super) fn gather_steps(terms: &mut Terms, #[comptime] plan: Plan) {
    let size = comptime!(plan.chunk * plan.heads);
    let mut n = UNIT_POS as usize;
    while n < size {
        let mut rows = 0.0f32;
        let mut columns = 0.0f32;
        #[unroll]
        for part in 0..comptime!(pair_parts(plan)) {
            rows += terms.rows[comptime!(part * plan.chunk * plan.heads) + n];
            columns += terms.columns[comptime!(part * plan.chunk * plan.heads) + n];
        }
        let step = terms.step[n];
        let added = total(&terms.added, n, plan);
        terms.rows[n] = rows - step * columns + total(&terms.carried, n, plan);
        terms.columns[n] = step * added;
        terms.diagonal[n] += columns + added;
        n += comptime!(plan.team.units);
    }
    let each = comptime!(kept_parts(plan).div_ceil(KEPT));
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.heads * KEPT) {
        let head = n / KEPT;
        let from = n % KEPT * each;
        let to = min(from + each, comptime!(kept_parts(plan)).runtime());
        let mut sum = 0.0f32;
        for part in from..to {
            sum += terms.kept[head * comptime!(kept_parts(plan)) + part];
        }
        terms.few[n] = sum;
        n += comptime!(plan.team.units);
    }
}

/// Sums the parts of a term.
#[cube]
fn total(term: &Shared<[f32]>, at: usize, #[comptime] plan: Plan) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for part in 0..comptime!(parts(plan)) {
        sum += term[at * comptime!(parts(plan)) + part];
    }
    sum
}

/// The gradients of the steps, and the terms of the gradient of `A`.
#[cube]
pub(super) fn store_steps(
    terms: &Terms,
    a: &[f32],
    batch: usize,
    chunk: usize,
    first_head: usize,
    dsteps: &mut [f32],
    decays: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
) {
    let size = comptime!(plan.chunk);
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.chunk * plan.heads) {
        let head = n / size;
        let j = n % size;
        let first = head * size;
        let end = terms.sum[first + comptime!(plan.chunk - 1)];
        let mut kept = 0.0f32;
        #[unroll]
        for part in 0..KEPT {
            kept += terms.few[head * KEPT + part];
        }
        let mut through = kept * end.exp();
        for i in 0..size {
            if i >= j {
                through += terms.rows[first + i];
            } else {
                through += terms.columns[first + i];
            }
        }
        let own = first + j;
        let direct = terms.diagonal[own];
        let place = ((batch * call.chunks + chunk) * size + j) * call.heads + first_head + head;
        dsteps[place] = direct + a[(first_head + head) / comptime!(plan.parts)] * through;
        decays[place] = through * terms.step[own];
        n += comptime!(plan.team.units);
    }
}
