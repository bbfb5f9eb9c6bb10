//! Step sizes and their sums.
//!
//! ```text
//! dt[t] = clamp(softplus(dt[t] + bias))        s[t] = sum over the chunk up to t of dt A
//! ```
//!
//! A unit owns one head of one chunk and walks its tokens. Both results are f32
//! `[batch, chunks * chunk, heads]`, zero past the end: padding neither decays the state nor adds to it.
//! Bytes: `dt` read, 8 bytes written per token and head.

use cubecl::prelude::*;

use super::plan::{Call, Plan};

/// `log(1 + e^x)`.
#[cube]
fn softplus(x: f32) -> f32 {
    max(x, 0.0f32) + (-x.abs()).exp().log1p()
}

#[cube(launch)]
pub(super) fn steps<T: Float>(
    dt: &[T],
    bias: &[f32],
    a: &[f32],
    steps: &mut [f32],
    sums: &mut [f32],
    low: f32,
    high: f32,
    call: &Call,
    #[comptime] plan: Plan,
    #[define(T)] _dtype: ElemType,
) {
    let chunk = comptime!(plan.chunk);
    if ABSOLUTE_POS < call.cubes {
        let head = ABSOLUTE_POS % call.heads;
        let batch = ABSOLUTE_POS / call.heads / call.chunks;
        let start = ABSOLUTE_POS / call.heads % call.chunks * chunk;
        let mut sum = 0.0f32;
        for row in 0..chunk {
            let token = start + row;
            let mut step = 0.0f32;
            if token < call.length {
                let place = call.dt.offset + (batch * call.length + token) * call.dt.row + head;
                step = f32::cast_from(dt[place]) + bias[head];
                if comptime!(plan.softplus) {
                    step = softplus(step);
                }
                step = clamp(step, low, high);
            }
            sum += step * a[head];
            let place = (batch * call.chunks * chunk + token) * call.heads + head;
            steps[place] = step;
            sums[place] = sum;
        }
    }
}

/// The gradient of what `dt` holds from that of the step: through the clamp and the softplus.
///
/// Returns the gradient in the type of `dt` and in f32, for the bias.
#[cube(launch)]
pub(super) fn steps_backward<T: Float>(
    dt: &[T],
    bias: &[f32],
    dsteps: &[f32],
    ddt: &mut [T],
    dbias: &mut [f32],
    low: f32,
    high: f32,
    call: &Call,
    #[comptime] plan: Plan,
    #[define(T)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < call.cubes {
        let head = ABSOLUTE_POS % call.heads;
        let token = ABSOLUTE_POS / call.heads % call.length;
        let batch = ABSOLUTE_POS / call.heads / call.length;
        let row = batch * call.length + token;
        let from = (batch * call.chunks * comptime!(plan.chunk) + token) * call.heads + head;
        let x = f32::cast_from(dt[call.dt.offset + row * call.dt.row + head]) + bias[head];
        let mut step = x;
        let mut slope = 1.0f32;
        if comptime!(plan.softplus) {
            step = softplus(x);
            slope = 1.0f32 / (1.0f32 + (-x).exp());
        }
        if step < low || step > high {
            slope = 0.0f32;
        }
        let gradient = dsteps[from] * slope;
        ddt[call.ddt.offset + row * call.ddt.row + head] = T::cast_from(gradient);
        dbias[row * call.heads + head] = gradient;
    }
}
