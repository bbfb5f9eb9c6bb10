//! Step sizes and their sums.
//!
//! ```text
//! dt[t] = clamp(softplus(dt[t] + bias))        s[t] = sum over the chunk up to t of dt A
//! ```
//!
//! A cube owns one chunk and a block of heads; one unit per head adds up. Both results are f32
//! `[batch, chunks * chunk, heads]`, zero past the end: padding neither decays the state nor adds to it.
//! Bytes: `dt` read, 8 bytes written per token and head.

use cubecl::prelude::*;

use super::plan::{Call, Plan};
use crate::ops::cube::SIDE;
use crate::ops::cube::math::{sigmoid, softplus};

/// A number as a vector.
type One = Vector<f32, Const<1>>;

/// The largest exponent of a factor of a decay.
const LARGEST: f32 = 80.0;

/// `e^x`, bounded: a factor of a decay must not be infinite where the other one is zero.
#[cube]
pub(super) fn bounded(x: f32) -> f32 {
    min(x, LARGEST).exp()
}

/// The last token of a token's block of 16.
#[cube]
pub(super) fn last_of_block(token: usize) -> usize {
    token / SIDE * SIDE + comptime!(SIDE - 1)
}

/// Token and head of one of the steps that a unit carries, [`Plan::step_shares`] of them; the last may be of tokens
/// past the chunk.
#[cube]
pub(super) fn carried_step(
    #[comptime] share: usize,
    #[comptime] units: usize,
    #[comptime] plan: Plan,
) -> (usize, usize) {
    let n = UNIT_POS as usize + comptime!(share * units);
    (n / comptime!(plan.heads), n % comptime!(plan.heads))
}

/// Heads that a cube treats.
pub(super) const HEADS: usize = 16;

#[cube(launch, address_type = "dynamic")]
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
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let size = comptime!(plan.chunk * HEADS);
    let blocks = call.heads.div_ceil(HEADS);
    let first_head = CUBE_POS % blocks * HEADS;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let mut step = Shared::<[f32]>::new_slice(size);
    let mut sum = Shared::<[f32]>::new_slice(size);
    let mut n = UNIT_POS as usize;
    while n < size {
        let head = first_head + n % HEADS;
        let token = chunk * comptime!(plan.chunk) + n / HEADS;
        let mut value = 0.0f32;
        if token < call.length && head < call.heads {
            let whole = head / comptime!(plan.parts);
            let place = call.dt.offset + (batch * call.length + token) * call.dt.row + whole;
            value = f32::cast_from(dt[place]) + bias[whole];
            if comptime!(plan.softplus) {
                value = softplus(One::new(value)).extract(0usize);
            }
            value = clamp(value, low, high);
        }
        step[n] = value;
        n += comptime!(plan.team.units);
    }
    sync_cube();
    let mut n = UNIT_POS as usize;
    while n < HEADS {
        let rate = a[min(first_head + n, call.heads - 1) / comptime!(plan.parts)];
        let mut total = 0.0f32;
        for row in 0..comptime!(plan.chunk) {
            total += step[row * HEADS + n] * rate;
            sum[row * HEADS + n] = total;
        }
        n += comptime!(plan.team.units);
    }
    sync_cube();
    let base = (batch * call.chunks + chunk) * comptime!(plan.chunk);
    let mut n = UNIT_POS as usize;
    while n < size {
        let head = first_head + n % HEADS;
        if head < call.heads {
            let place = (base + n / HEADS) * call.heads + head;
            steps[place] = step[n];
            sums[place] = sum[n];
        }
        n += comptime!(plan.team.units);
    }
}

/// The gradient of what `dt` holds from that of the step: through the clamp and the softplus.
///
/// Returns the gradient in the type of `dt` and in f32, for the bias.
#[cube(launch, address_type = "dynamic")]
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
        let parts = comptime!(plan.parts);
        let heads = call.heads / parts;
        let head = ABSOLUTE_POS % heads;
        let token = ABSOLUTE_POS / heads % call.length;
        let batch = ABSOLUTE_POS / heads / call.length;
        let row = batch * call.length + token;
        let from =
            (batch * call.chunks * comptime!(plan.chunk) + token) * call.heads + head * parts;
        let x = f32::cast_from(dt[call.dt.offset + row * call.dt.row + head]) + bias[head];
        let mut step = x;
        let mut slope = 1.0f32;
        if comptime!(plan.softplus) {
            step = softplus(One::new(x)).extract(0usize);
            slope = sigmoid(One::new(x)).extract(0usize);
        }
        if step < low || step > high {
            slope = 0.0f32;
        }
        let mut gradient = dsteps[from];
        #[unroll]
        for part in 1..parts {
            gradient += dsteps[from + part];
        }
        gradient *= slope;
        ddt[call.ddt.offset + row * call.ddt.row + head] = T::cast_from(gradient);
        dbias[row * heads + head] = gradient;
    }
}
