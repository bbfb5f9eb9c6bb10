//! Step sizes and their sums.
//!
//! ```text
//! dt[t] = clamp(softplus(dt[t] + bias))        s[t] = sum over the chunk up to t of dt A
//! ```
//!
//! A cube owns one chunk and a block of heads, a unit a run of a head's tokens: it adds them up, and then the totals
//! of the runs before. Sums never rise where steps do not: the last of a run is what the next one begins with. Both
//! results are f32 `[batch, chunks * chunk, heads]`; steps past the end are zero: padding neither decays the state nor
//! adds to it. Bytes: `dt` read, 8 bytes written per token and head.

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

/// Tokens of a head that a unit adds up; divides a chunk.
const RUN: usize = 4;

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
    let blocks = call.heads.div_ceil(HEADS);
    let first_head = CUBE_POS % blocks * HEADS;
    let chunk = CUBE_POS / blocks % call.chunks;
    let batch = CUBE_POS / blocks / call.chunks;
    let first = chunk * comptime!(plan.chunk);
    let base = batch * call.chunks * comptime!(plan.chunk) + first;
    let runs = comptime!(plan.chunk / RUN);
    // Within runs, and of runs.
    let mut sum = Shared::<[f32]>::new_slice(comptime!(runs * RUN * HEADS));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(runs * HEADS));
    let mut n = UNIT_POS as usize;
    while n < runs * HEADS {
        let head = first_head + n % HEADS;
        let whole = min(head, call.heads - 1) / comptime!(plan.parts);
        let (shift, rate) = (bias[whole], a[whole]);
        let mut total = 0.0f32;
        #[unroll]
        for r in 0..RUN {
            let token = n / HEADS * RUN + r;
            let mut value = 0.0f32;
            if first + token < call.length {
                let row = batch * call.length + first + token;
                let x = f32::cast_from(dt[call.dt.offset + row * call.dt.row + whole]) + shift;
                value = clamp(positive(x, plan), low, high);
            }
            if head < call.heads {
                steps[(base + token) * call.heads + head] = value;
            }
            total += value * rate;
            sum[n + r * runs * HEADS] = total;
        }
        totals[n] = total;
        n += comptime!(plan.team.units);
    }
    sync_cube();
    let mut n = UNIT_POS as usize;
    while n < runs * HEADS {
        let head = first_head + n % HEADS;
        let run = n / HEADS;
        let mut before = 0.0f32;
        #[unroll]
        for other in 0..runs {
            let total = totals[other * HEADS + n % HEADS];
            before = select(other < run, before + total, before);
        }
        #[unroll]
        for r in 0..RUN {
            if head < call.heads {
                let token = run * RUN + r;
                sums[(base + token) * call.heads + head] = before + sum[n + r * runs * HEADS];
            }
        }
        n += comptime!(plan.team.units);
    }
}

/// A step before it is bounded.
#[cube]
fn positive(x: f32, #[comptime] plan: Plan) -> f32 {
    let mut value = x;
    if comptime!(plan.softplus) {
        value = softplus(One::new(x)).extract(0usize);
    }
    value
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
        let step = positive(x, plan);
        let mut slope = 1.0f32;
        if comptime!(plan.softplus) {
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
