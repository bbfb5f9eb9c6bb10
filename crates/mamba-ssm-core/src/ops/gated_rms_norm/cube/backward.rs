//! The gated norm, backwards.
//!
//! With `r = 1 / sqrt(mean(v^2) + eps)` and `f` the factor behind the norm (one, or the gate):
//!
//! ```text
//! e  = dy weight f            dv = r e - v r^3 mean(v e)            dweight = sum_t dy v r f
//! ```
//!
//! and through `v` and `f` to x and z. A plane owns a group of channels of a run of tokens as forwards;
//! the weight's gradient stays in registers and leaves as one row per run. Bytes: x, z and dy read, dx
//! and dz written.

use cubecl::prelude::*;

use super::forward::{
    Call, Plan, gate, inner, inside, load, load_weight, reciprocal_rms, share, store,
};
use crate::ops::cube::math::sigmoid;
use crate::ops::cube::place::Place;

#[cube(launch, address_type = "dynamic")]
pub(super) fn backward<I: Float, V: Size>(
    x: &[I],
    z: &[I],
    weight: &[f32],
    dy: &[I],
    dx: &mut [I],
    dz: &mut [I],
    dweight: &mut [f32],
    dy_place: &Place,
    dz_place: &Place,
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    let share = share(call, plan);
    let weight = load_weight::<V>(weight, &share, plan);
    let mut sums = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
    #[unroll]
    for n in 0..comptime!(plan.shares()) {
        sums[n] = Vector::new(0.0f32);
    }
    for token in share.start..share.end {
        let x = load::<I, V>(x, &call.x, token, &share, plan);
        let z = load::<I, V>(z, &call.z, token, &share, plan);
        let mut dy = load::<I, V>(dy, dy_place, token, &share, plan);
        let (normed, factor) = gate::<V>(&x, &z, plan);
        let r = reciprocal_rms::<V>(&normed, call.eps, plan);
        let scale = Vector::<f32, V>::new(r);
        // dy becomes the gradient of the factor (before the norm's weight is in it) ...
        let mut dfactor = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            let unit = normed[n] * scale;
            sums[n] = fma(dy[n] * factor[n], unit, sums[n]);
            dfactor[n] = dy[n] * weight[n] * unit;
            dy[n] = dy[n] * weight[n] * factor[n];
        }
        // ... and then that of what the norm is taken of.
        let mean = inner::<V>(&normed, &dy, plan) / comptime!(plan.group as f32);
        let pull = Vector::<f32, V>::new(mean * r * r * r);
        let mut dz_values = Array::<Vector<f32, V>>::new(comptime!(plan.shares()));
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            let dv = dy[n] * scale - normed[n] * pull;
            dy[n] = dv;
            if comptime!(plan.gated) {
                let one = Vector::<f32, V>::new(1.0f32);
                let s = sigmoid::<V>(z[n]);
                let slope = s * (one + z[n] * (one - s));
                if comptime!(plan.norm_first) {
                    dz_values[n] = dfactor[n] * slope;
                } else {
                    dz_values[n] = dv * x[n] * slope;
                    dy[n] = dv * z[n] * s;
                }
            }
        }
        store::<I, V>(&dy, dx, &call.out, token, &share, plan);
        if comptime!(plan.gated) {
            store::<I, V>(&dz_values, dz, dz_place, token, &share, plan);
        }
    }
    // Runs past the last token have nothing to add and no row to write to.
    if share.run < call.tokens.div_ceil(comptime!(plan.run)) {
        let dweight = dweight.as_vectorized_mut().with_vector_size_mut::<V>();
        #[unroll]
        for n in 0..comptime!(plan.shares()) {
            let inside = inside(&share, n, plan);
            if inside < comptime!(plan.group) {
                let row = share.run * call.groups * comptime!(plan.group);
                dweight[(row + share.channel + inside) / comptime!(plan.vector)] = sums[n];
            }
        }
    }
}
