//! The convolution, forwards.
//!
//! ```text
//! y[t, c] = act(bias[c] + sum_k weight[k, c] x[t - W + 1 + k, c])
//! ```
//!
//! A unit owns a few neighbouring channels and walks a run of tokens, the window in registers, so that
//! every token is read once (and `W - 1` more per run). Bytes: x read, y written.

use cubecl::prelude::*;

use crate::ops::cube::math::sigmoid;
use crate::ops::cube::place::Place;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) width: usize,
    /// Channels of a unit.
    pub(super) vector: usize,
    /// Tokens of a run.
    pub(super) run: usize,
    pub(super) activation: bool,
    pub(super) bias: bool,
    /// Whether there are tokens before the first.
    pub(super) initial: bool,
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Call {
    /// Units with work.
    pub(super) units: usize,
    pub(super) length: usize,
    pub(super) channels: usize,
    pub(super) x: Place,
    /// Of the result: y forwards, dx backwards.
    pub(super) out: Place,
}

/// A unit's share: channels from `channel` on, tokens from `start` on.
#[derive(CubeType)]
pub(super) struct Share {
    pub(super) channel: usize,
    pub(super) batch: usize,
    pub(super) run: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

#[cube]
pub(super) fn share(call: &Call, #[comptime] plan: Plan) -> Share {
    let vectors = call.channels / comptime!(plan.vector);
    let run = ABSOLUTE_POS / vectors;
    let runs = call.length.div_ceil(comptime!(plan.run));
    let start = run % runs * comptime!(plan.run);
    Share {
        channel: ABSOLUTE_POS % vectors * comptime!(plan.vector),
        batch: run / runs,
        run,
        start,
        end: min(start + comptime!(plan.run), call.length),
    }
}

/// A unit's columns of `weight`, `[channels, width]`: one vector per place of the window.
#[cube]
pub(super) fn load_weight<V: Size>(
    weight: &[f32],
    share: &Share,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let mut rows = Array::<Vector<f32, V>>::new(comptime!(plan.width));
    #[unroll]
    for k in 0..comptime!(plan.width) {
        let mut row = Vector::<f32, V>::new(0.0f32);
        #[unroll]
        for v in 0..comptime!(plan.vector) {
            row.insert(v, weight[(share.channel + v) * comptime!(plan.width) + k]);
        }
        rows[k] = row;
    }
    rows
}

/// A unit's part of `bias`, `[channels]`; zeros where there is none.
#[cube]
pub(super) fn load_bias<V: Size>(
    bias: &[f32],
    share: &Share,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let mut value = Vector::<f32, V>::new(0.0f32);
    if comptime!(plan.bias) {
        let bias = bias.as_vectorized().with_vector_size::<V>();
        value = bias[share.channel / comptime!(plan.vector)];
    }
    value
}

/// Token `shifted - (W - 1)`, which may stand before the first.
#[cube]
pub(super) fn token<I: Float, V: Size>(
    x: &[I],
    initial: &[f32],
    shifted: usize,
    share: &Share,
    call: &Call,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let before = comptime!(plan.width - 1);
    let mut value = Vector::<f32, V>::new(0.0f32);
    if shifted >= before {
        let x = x.as_vectorized().with_vector_size::<V>();
        let row = share.batch * call.length + shifted - before;
        let place = call.x.offset + row * call.x.row + share.channel;
        value = Vector::<f32, V>::cast_from(x[place / comptime!(plan.vector)]);
    } else if comptime!(plan.initial) {
        let initial = initial.as_vectorized().with_vector_size::<V>();
        let place = (share.batch * before + shifted) * call.channels + share.channel;
        value = initial[place / comptime!(plan.vector)];
    }
    value
}

/// The window before a run's first token: all but its last place.
#[cube]
pub(super) fn first_window<I: Float, V: Size>(
    x: &[I],
    initial: &[f32],
    share: &Share,
    call: &Call,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let mut window = Array::<Vector<f32, V>>::new(comptime!(plan.width));
    window[0] = Vector::new(0.0f32);
    #[unroll]
    for k in 1..comptime!(plan.width) {
        window[k] = token::<I, V>(x, initial, share.start + k - 1, share, call, plan);
    }
    window
}

/// Moves a window on by one token.
#[cube]
pub(super) fn push<V: Size>(
    window: &mut Array<Vector<f32, V>>,
    value: Vector<f32, V>,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for k in 1..comptime!(plan.width) {
        window[k - 1] = window[k];
    }
    window[comptime!(plan.width - 1)] = value;
}

/// `bias + sum_k weight[k] window[k]`.
#[cube]
pub(super) fn weigh<V: Size>(
    window: &Array<Vector<f32, V>>,
    weight: &Array<Vector<f32, V>>,
    bias: Vector<f32, V>,
    #[comptime] plan: Plan,
) -> Vector<f32, V> {
    let mut sum = bias;
    #[unroll]
    for k in 0..comptime!(plan.width) {
        sum = fma(weight[k], window[k], sum);
    }
    sum
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn forward<I: Float, V: Size>(
    x: &[I],
    weight: &[f32],
    bias: &[f32],
    initial: &[f32],
    y: &mut [I],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(V)] _vector: usize,
) {
    if ABSOLUTE_POS < call.units {
        let share = share(call, plan);
        let weight = load_weight::<V>(weight, &share, plan);
        let bias = load_bias::<V>(bias, &share, plan);
        let y = y.as_vectorized_mut().with_vector_size_mut::<V>();
        let mut window = first_window::<I, V>(x, initial, &share, call, plan);
        for t in share.start..share.end {
            let next = token::<I, V>(
                x,
                initial,
                t + comptime!(plan.width - 1),
                &share,
                call,
                plan,
            );
            push::<V>(&mut window, next, plan);
            let mut value = weigh::<V>(&window, &weight, bias, plan);
            if comptime!(plan.activation) {
                value *= sigmoid(value);
            }
            let row = share.batch * call.length + t;
            let place = call.out.offset + row * call.out.row + share.channel;
            y[place / comptime!(plan.vector)] = Vector::<I, V>::cast_from(value);
        }
    }
}
