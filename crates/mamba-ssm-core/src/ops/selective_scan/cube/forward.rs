//! The scan, forwards.
//!
//! ```text
//! h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]         y[t] = (<h[t], C[t]> + D u[t]) silu(z[t])
//! ```
//!
//! A cube owns a block of channels of one group and walks the sequence in tiles. It brings a tile's steps
//! (behind bias and softplus, once per token and channel) and its rows of B and C into shared memory; the
//! units then walk the tile's tokens, their states in registers, and leave their shares of `<h, C>`, which
//! whoever brought the token in adds up, skips, gates and writes. Bytes: u, delta and z read and y written
//! once; B and C once per block of channels; one state per chunk and channel where states are kept.

use cubecl::prelude::*;

use super::common::*;
use super::tiles::*;
use crate::ops::cube::math::sigmoid;

#[cube(launch, address_type = "dynamic")]
pub(super) fn forward<I: Float, W: Size, V: Size, X: Size>(
    u: &[I],
    delta: &[I],
    a: &[f32],
    b: &[I],
    c: &[I],
    d: &[f32],
    z: &[I],
    bias: &[f32],
    initial: &[f32],
    y: &mut [I],
    last: &mut [f32],
    states: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(W, V, X)] _sizes: [usize; 3],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let own = own(call, plan);
    let mut steps = Shared::<[f32]>::new_aligned_slice(comptime!(plan.tile()), 16usize);
    let mut added = Shared::<[f32]>::new_aligned_slice(comptime!(plan.tile()), 16usize);
    let mut b_tile = Shared::<[f32]>::new_aligned_slice(comptime!(plan.group_tile()), 16usize);
    let mut c_tile = Shared::<[f32]>::new_aligned_slice(comptime!(plan.group_tile()), 16usize);
    let mut parts = Shared::<[f32]>::new_aligned_slice(comptime!(plan.parts()), 16usize);

    let rates = read_states::<V>(a, 0usize, &own, call, plan);
    let mut h = first_state::<V>(initial, &own, call, plan);
    let mut us = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut zs = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut next = incoming::<I, W>(plan);
    let mut start = 0usize;
    fetch_tile::<I, W>(u, delta, z, b, c, &own, start, call, &mut next, plan);
    while start < call.length {
        #[unroll]
        for i in 0..comptime!(plan.own_spots()) {
            us[i] = next.u[i];
            if comptime!(plan.gate) {
                zs[i] = next.z[i];
            }
            let raw = raw_step::<I, W>(next.delta[i], bias, &own, i, plan);
            let step = step::<W>(raw, &own, start, call, i, plan);
            put::<W>(step, &mut steps, i, plan);
            put::<W>(step * Vector::cast_from(us[i]), &mut added, i, plan);
        }
        put_group::<I>(&next.b, &mut b_tile, plan);
        put_group::<I>(&next.c, &mut c_tile, plan);
        sync_cube();
        let then = start + comptime!(plan.tokens);
        fetch_tile::<I, W>(u, delta, z, b, c, &own, then, call, &mut next, plan);
        for block in 0..comptime!(plan.tokens / STEP) {
            if comptime!(plan.keep) {
                keep::<V>(&h, states, start + block * STEP, &own, call, plan);
            }
            advance::<V>(
                &mut h, &rates, &steps, &added, &b_tile, &c_tile, &mut parts, block, plan,
            );
        }
        sync_cube();
        #[unroll]
        for i in 0..comptime!(plan.own_spots()) {
            let mut value = add_parts::<W, X>(&parts, i, plan);
            if comptime!(plan.skip) {
                value += parameter::<W>(d, &own, i, plan) * Vector::cast_from(us[i]);
            }
            if comptime!(plan.gate) {
                let gate = Vector::<f32, W>::cast_from(zs[i]);
                value *= gate * sigmoid::<W>(gate);
            }
            send::<I, W>(value, y, &own, start, call, i, plan);
        }
        start = then;
    }
    let row = own.batch * call.dim * comptime!(plan.state);
    write_states::<V>(&h, last, row, &own, plan);
}

#[cube]
fn first_state<V: Size>(
    initial: &[f32],
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) -> Array<Vector<f32, V>> {
    let mut h = Array::<Vector<f32, V>>::new(comptime!(plan.shares * plan.vectors));
    if comptime!(plan.initial) {
        h = read_states::<V>(initial, own.batch, own, call, plan);
    } else {
        #[unroll(plan.unroll)]
        for n in 0..comptime!(plan.shares * plan.vectors) {
            h[n] = Vector::new(0.0f32);
        }
    }
    h
}

/// Writes the states before the token, if a chunk starts there.
#[cube]
fn keep<V: Size>(
    h: &Array<Vector<f32, V>>,
    states: &mut [f32],
    token: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) {
    if token % comptime!(plan.chunk) == 0 && token < call.length {
        let states = states.as_vectorized_mut().with_vector_size_mut::<V>();
        #[unroll(plan.unroll)]
        for r in 0..comptime!(plan.shares) {
            if own_channel(r, plan) < own.channels {
                let place = kept_place(token / comptime!(plan.chunk), r, own, call, plan);
                #[unroll(plan.unroll)]
                for q in 0..comptime!(plan.vectors) {
                    states[place + q] = h[r * comptime!(plan.vectors) + q];
                }
            }
        }
    }
}

/// Walks four tokens.
#[cube]
fn advance<V: Size>(
    h: &mut Array<Vector<f32, V>>,
    rates: &Array<Vector<f32, V>>,
    steps: &Shared<[f32]>,
    added: &Shared<[f32]>,
    b: &Shared<[f32]>,
    c: &Shared<[f32]>,
    parts: &mut Shared<[f32]>,
    block: usize,
    #[comptime] plan: Plan,
) {
    #[unroll(plan.unroll)]
    for r in 0..comptime!(plan.shares) {
        let step = four(steps, r, block, plan);
        let add = four(added, r, block, plan);
        #[unroll]
        for j in 0..STEP {
            let token = block * STEP + j;
            let dt = Vector::<f32, V>::new(step.extract(j));
            let du = Vector::<f32, V>::new(add.extract(j));
            let mut sum = Vector::<f32, V>::new(0.0f32);
            #[unroll(plan.unroll)]
            for q in 0..comptime!(plan.vectors) {
                let n = r * comptime!(plan.vectors) + q;
                let more = du * group_vector::<V>(b, token, q, plan);
                h[n] = fma((dt * rates[n]).exp(), h[n], more);
                sum = fma(h[n], group_vector::<V>(c, token, q, plan), sum);
            }
            let place = token * comptime!(plan.part_stride()) + UNIT_POS as usize;
            parts[place + r * comptime!(plan.units)] = total::<V>(sum, comptime!(plan.vector));
        }
    }
}
