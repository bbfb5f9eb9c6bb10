//! The convolution, backwards.
//!
//! ```text
//! p[t]     = bias + sum_k weight[k] x[t - W + 1 + k]            g[t] = dy[t] act'(p[t])
//! dx[t]    = sum_k weight[k] g[t + W - 1 - k]
//! dweight[k] = sum_t g[t] x[t - W + 1 + k]                      dbias = sum_t g[t]
//! ```
//!
//! A unit owns channels and a run of tokens as forwards, and walks `W - 1` tokens past its end for the
//! `g` that its last tokens need; `p` is computed again rather than read. The parameters' gradients stay
//! in registers and leave as one row per run, summed afterwards in a fixed order. Bytes: x and dy read, dx
//! written.

use cubecl::prelude::*;

use super::forward::{
    Call, Plan, Share, first_window, load_bias, load_weight, push, share, token, weigh,
};
use crate::ops::cube::math::silu_slope;
use crate::ops::cube::place::Place;

#[cube(launch, address_type = "dynamic")]
pub(super) fn backward<I: Float, V: Size>(
    x: &[I],
    weight: &[f32],
    bias: &[f32],
    initial: &[f32],
    dy: &[I],
    dx: &mut [I],
    dparameters: &mut [f32],
    dinitial: &mut [f32],
    dy_place: &Place,
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    if ABSOLUTE_POS < call.units {
        let share = share(call, plan);
        let before = comptime!(plan.width - 1);
        let weight = load_weight::<V>(weight, &share, plan);
        let bias = load_bias::<V>(bias, &share, plan);
        let mut window = first_window::<I, V>(x, initial, &share, call, plan);
        let mut gradients = zeros::<V>(comptime!(plan.width));
        // One row per place of the window, and the bias.
        let mut sums = zeros::<V>(comptime!(plan.width + 1));
        for t in share.start..share.end + before {
            let mut gradient = Vector::<f32, V>::new(0.0f32);
            if t < call.length {
                let next = token::<I, V>(x, initial, t + before, &share, call, plan);
                push::<V>(&mut window, next, plan);
                let row = share.batch * call.length + t;
                let place = dy_place.offset + row * dy_place.row + share.channel;
                let dy = dy.as_vectorized().with_vector_size::<V>();
                gradient = Vector::<f32, V>::cast_from(dy[place / comptime!(plan.vector)]);
                if comptime!(plan.activation) {
                    gradient *= silu_slope::<V>(weigh::<V>(&window, &weight, bias, plan));
                }
            }
            push::<V>(&mut gradients, gradient, plan);
            if t < share.end {
                #[unroll]
                for k in 0..comptime!(plan.width) {
                    sums[k] = fma(gradient, window[k], sums[k]);
                }
                sums[comptime!(plan.width)] += gradient;
            }
            let value = reversed::<V>(&gradients, &weight, plan);
            if t >= share.start + before {
                let row = share.batch * call.length + t - before;
                let place = call.out.offset + row * call.out.row + share.channel;
                let dx = dx.as_vectorized_mut().with_vector_size_mut::<V>();
                dx[place / comptime!(plan.vector)] = Vector::<I, V>::cast_from(value);
            } else if comptime!(plan.initial) {
                if share.start == 0 {
                    let place = (share.batch * before + t) * call.channels + share.channel;
                    let dinitial = dinitial.as_vectorized_mut().with_vector_size_mut::<V>();
                    dinitial[place / comptime!(plan.vector)] = value;
                }
            }
        }
        store_sums::<V>(&sums, dparameters, &share, call, plan);
    }
}

#[cube]
fn zeros<V: Size>(#[comptime] count: usize) -> Array<Vector<f32, V>> {
    let mut rows = Array::<Vector<f32, V>>::new(count);
    #[unroll]
    for k in 0..count {
        rows[k] = Vector::new(0.0f32);
    }
    rows
}

/// `sum_k weight[k] gradients[W - 1 - k]`.
#[cube]
fn reversed<V: Size>(
    gradients: &Array<Vector<f32, V>>,
    weight: &Array<Vector<f32, V>>,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let mut sum = Vector::<f32, V>::new(0.0f32);
    #[unroll]
    for k in 0..comptime!(plan.width) {
        sum = fma(weight[k], gradients[comptime!(plan.width - 1 - k)], sum);
    }
    sum
}

/// One row of gradients: those of `weight`, `[channels, width]`, and behind them those of `bias`.
#[cube]
fn store_sums<V: Size>(
    sums: &Array<Vector<f32, V>>,
    dparameters: &mut [f32],
    share: &Share,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let row = share.run * comptime!(plan.width + 1) * call.channels;
    #[unroll]
    for k in 0..comptime!(plan.width) {
        let sum = sums[k];
        #[unroll]
        for v in 0..comptime!(plan.vector) {
            dparameters[row + (share.channel + v) * comptime!(plan.width) + k] = sum.extract(v);
        }
    }
    let bias = row + comptime!(plan.width) * call.channels + share.channel;
    let to = dparameters.as_vectorized_mut().with_vector_size_mut::<V>();
    to[bias / comptime!(plan.vector)] = sums[comptime!(plan.width)];
}
