//! The scan, backwards.
//!
//! With `g[t]` the gradient of `h[t]`, `a[t] = exp(delta[t] A)`, `w = dy silu(z)` and `x = delta u`:
//!
//! ```text
//! g[t]  = a[t+1] g[t+1] + w[t] C[t]
//! dC[t] = sum_channels w[t] h[t]                 dB[t] = sum_channels g[t] x[t]
//! dx[t] = <g[t], B[t]>                           dA    = sum_t g[t] a[t] h[t-1] delta[t]
//! du[t] = dx[t] delta[t] + D w[t]                dD    = sum_t w[t] u[t]
//! ddelta[t] = dx[t] u[t] + sum_n g[t] a[t] h[t-1] A, through the softplus; its sum is the bias's
//! ```
//!
//! The cubes of the forward pass, over the chunks in reverse: a chunk's states are computed again from the
//! one kept before it and stay in registers for the walk back. The gradients of B and C are added up over
//! the channels of a plane by shuffles that halve what a unit holds with every step, over the planes of a
//! cube in shared memory, and over cubes by `sum_blocks`: always in the same order. Bytes: u, delta, z and
//! dy read, their gradients written, one state per chunk and channel read, B and C read and two of their
//! gradients (f32) written once per block of channels.

use cubecl::prelude::*;

use super::common::*;
use super::tiles::*;
use crate::ops::cube::math::{sigmoid, silu_slope};

/// Where gradients lie.
#[derive(CubeType)]
struct Memory {
    /// Per channel and token: the step, what it adds, and the gradient of the output before the gate.
    steps: Shared<[f32]>,
    added: Shared<[f32]>,
    dy: Shared<[f32]>,
    /// Sums over the chunks, per channel and place in the chunk: the gradients of `D` and the bias.
    skips: Shared<[f32]>,
    biases: Shared<[f32]>,
    b: Shared<[f32]>,
    c: Shared<[f32]>,
    /// What the units of a channel found: the output (forwards) or the gradient of what a step adds, and
    /// the gradient of the step.
    outputs: Shared<[f32]>,
    decays: Shared<[f32]>,
    /// Gradients of B and C, per waiting token and group of lanes.
    waiting: Shared<[f32]>,
}

impl Plan {
    /// Groups of lanes of a cube.
    pub(super) fn teams(&self) -> usize {
        self.units / self.lanes
    }

    /// Elements of the gradients of B and C of a token that wait.
    pub(super) fn row(&self) -> usize {
        self.teams() * 2 * self.padded()
    }

    /// Steps of shuffles.
    fn exchanges(&self) -> usize {
        (self.lanes / self.split).ilog2() as usize
    }

    /// Values that a unit holds after so many steps.
    fn held(&self, exchanges: usize) -> usize {
        ((2 * self.own_states()) >> exchanges).max(1)
    }

    /// Bits of a unit's position in which units differ that hold the same in the end.
    fn doubles(&self) -> usize {
        (0..self.exchanges())
            .filter(|step| self.held(*step) == 1)
            .map(|step| self.split << step)
            .sum()
    }
}

#[cube]
fn memory(#[comptime] plan: Plan) -> Memory {
    let tile = comptime!(plan.tile());
    let group = comptime!(plan.group_tile());
    let parts = comptime!(plan.parts());
    let waiting = comptime!(plan.waiting * plan.row());
    Memory {
        steps: Shared::<[f32]>::new_aligned_slice(tile, 16usize),
        added: Shared::<[f32]>::new_aligned_slice(tile, 16usize),
        dy: Shared::<[f32]>::new_aligned_slice(tile, 16usize),
        skips: Shared::<[f32]>::new_aligned_slice(tile, 16usize),
        biases: Shared::<[f32]>::new_aligned_slice(tile, 16usize),
        b: Shared::<[f32]>::new_aligned_slice(group, 16usize),
        c: Shared::<[f32]>::new_aligned_slice(group, 16usize),
        outputs: Shared::<[f32]>::new_aligned_slice(parts, 16usize),
        decays: Shared::<[f32]>::new_aligned_slice(parts, 16usize),
        waiting: Shared::<[f32]>::new_aligned_slice(waiting, 16usize),
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn backward<I: Float, W: Size, V: Size, X: Size>(
    u: &[I],
    delta: &[I],
    a: &[f32],
    b: &[I],
    c: &[I],
    d: &[f32],
    z: &[I],
    bias: &[f32],
    states: &[f32],
    dy: &[I],
    dlast: &[f32],
    du: &mut [I],
    ddelta: &mut [I],
    dz: &mut [I],
    db: &mut [f32],
    dc: &mut [f32],
    dparameters: &mut [f32],
    dinitial: &mut [f32],
    dy_strides: &Strides,
    call: &Call,
    #[comptime] plan: Plan,
    #[define(I)] _dtype: ElemType,
    #[define(W, V, X)] _sizes: [usize; 3],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let own = own(call, plan);
    let mut memory = memory(plan);
    let rates = read_states::<V>(a, 0usize, &own, call, plan);
    let mut g = read_states::<V>(dlast, own.batch, &own, call, plan);
    let mut drates = zeros::<V>(comptime!(plan.shares * plan.vectors), plan);
    let mut h = zeros::<V>(
        comptime!((plan.tokens + 1) * plan.shares * plan.vectors),
        plan,
    );
    let mut us = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut deltas = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut zs = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut dys = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let mut next = incoming::<I, W>(plan);
    let mut next_dys = Array::<Vector<I, W>>::new(comptime!(plan.own_spots()));
    let last = (call.chunks - 1) * comptime!(plan.tokens);
    fetch_tile::<I, W>(u, delta, z, b, c, &own, last, call, &mut next, plan);
    fetch_spots::<I, W>(dy, dy_strides, &own, last, call, &mut next_dys, plan);
    #[unroll]
    for i in 0..comptime!(plan.own_spots()) {
        put::<W>(Vector::new(0.0f32), &mut memory.skips, i, plan);
        put::<W>(Vector::new(0.0f32), &mut memory.biases, i, plan);
    }

    for visit in 0..call.chunks {
        let chunk = call.chunks - 1 - visit;
        let start = chunk * comptime!(plan.tokens);
        #[unroll]
        for i in 0..comptime!(plan.own_spots()) {
            us[i] = next.u[i];
            deltas[i] = next.delta[i];
            dys[i] = next_dys[i];
            let raw = raw_step::<I, W>(deltas[i], bias, &own, i, plan);
            let step = step::<W>(raw, &own, start, call, i, plan);
            let mut gradient = Vector::<f32, W>::cast_from(dys[i]);
            if comptime!(plan.gate) {
                zs[i] = next.z[i];
                let gate = Vector::<f32, W>::cast_from(zs[i]);
                gradient *= gate * sigmoid::<W>(gate);
            }
            put::<W>(step, &mut memory.steps, i, plan);
            put::<W>(step * Vector::cast_from(us[i]), &mut memory.added, i, plan);
            put::<W>(gradient, &mut memory.dy, i, plan);
        }
        put_group::<I>(&next.b, &mut memory.b, plan);
        put_group::<I>(&next.c, &mut memory.c, plan);
        take::<V>(&mut h, states, chunk, &own, call, plan);
        sync_cube();
        // Before the first chunk there is none: it is read again.
        let before = max(start, comptime!(plan.tokens)) - comptime!(plan.tokens);
        fetch_tile::<I, W>(u, delta, z, b, c, &own, before, call, &mut next, plan);
        fetch_spots::<I, W>(dy, dy_strides, &own, before, call, &mut next_dys, plan);
        repeat::<V>(&mut h, &rates, &mut memory, plan);
        if comptime!(plan.gate) {
            sync_cube();
            #[unroll]
            for i in 0..comptime!(plan.own_spots()) {
                let mut value = add_parts::<W, X>(&memory.outputs, i, plan);
                if comptime!(plan.skip) {
                    value += parameter::<W>(d, &own, i, plan) * Vector::cast_from(us[i]);
                }
                let gate = Vector::<f32, W>::cast_from(zs[i]);
                value *= Vector::cast_from(dys[i]) * silu_slope::<W>(gate);
                send::<I, W>(value, dz, &own, start, call, i, plan);
            }
            sync_cube();
        }
        retreat::<V>(
            &mut g,
            &mut drates,
            &h,
            &rates,
            &mut memory,
            db,
            dc,
            start,
            &own,
            call,
            plan,
        );
        sync_cube();
        deliver(&memory.waiting, db, dc, start, &own, call, plan);
        #[unroll]
        for i in 0..comptime!(plan.own_spots()) {
            let wide = Vector::<f32, W>::cast_from(us[i]);
            let added = add_parts::<W, X>(&memory.outputs, i, plan);
            let mut change = add_parts::<W, X>(&memory.decays, i, plan);
            change = fma(added, wide, change);
            if comptime!(plan.softplus) {
                change *= sigmoid::<W>(raw_step::<I, W>(deltas[i], bias, &own, i, plan));
            }
            if !exists(&own, start, call, i, plan) {
                change = Vector::new(0.0f32);
            }
            let gradient = get::<W>(&memory.dy, i, plan);
            let mut value = added * get::<W>(&memory.steps, i, plan);
            if comptime!(plan.skip) {
                value = fma(parameter::<W>(d, &own, i, plan), gradient, value);
            }
            send::<I, W>(value, du, &own, start, call, i, plan);
            send::<I, W>(change, ddelta, &own, start, call, i, plan);
            let skips = fma(gradient, wide, get::<W>(&memory.skips, i, plan));
            put::<W>(skips, &mut memory.skips, i, plan);
            let biases = get::<W>(&memory.biases, i, plan) + change;
            put::<W>(biases, &mut memory.biases, i, plan);
        }
        sync_cube();
    }
    let size = call.dim * comptime!(plan.state);
    let row = own.batch * (size + 2 * call.dim);
    write_states::<V>(&drates, dparameters, row, &own, plan);
    write_states::<V>(&g, dinitial, own.batch * size, &own, plan);
    sum_tokens(
        &memory.skips,
        dparameters,
        row + size + own.first,
        &own,
        plan,
    );
    sum_tokens(
        &memory.biases,
        dparameters,
        row + size + call.dim + own.first,
        &own,
        plan,
    );
}

#[cube]
fn zeros<V: Size>(#[comptime] count: usize, #[comptime] plan: Plan) -> Array<Vector<f32, V>> {
    let mut vectors = Array::<Vector<f32, V>>::new(count);
    #[unroll(plan.unroll)]
    for n in 0..count {
        vectors[n] = Vector::new(0.0f32);
    }
    vectors
}

/// The states before the chunk, to the first place.
#[cube]
fn take<V: Size>(
    h: &mut Array<Vector<f32, V>>,
    states: &[f32],
    chunk: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let states = states.as_vectorized().with_vector_size::<V>();
    #[unroll(plan.unroll)]
    for r in 0..comptime!(plan.shares) {
        if own_channel(r, plan) < own.channels {
            let place = kept_place(chunk, r, own, call, plan);
            #[unroll(plan.unroll)]
            for q in 0..comptime!(plan.vectors) {
                h[r * comptime!(plan.vectors) + q] = states[place + q];
            }
        }
    }
}

/// The chunk's forward pass, its states kept; the outputs are found for the gradient of the gate.
#[cube]
fn repeat<V: Size>(
    h: &mut Array<Vector<f32, V>>,
    rates: &Array<Vector<f32, V>>,
    memory: &mut Memory,
    #[comptime] plan: Plan,
) {
    let all = comptime!(plan.shares * plan.vectors);
    #[unroll(plan.unroll)]
    for block in 0..comptime!(plan.tokens / STEP) {
        #[unroll(plan.unroll)]
        for r in 0..comptime!(plan.shares) {
            let step = four(&memory.steps, r, block, plan);
            let add = four(&memory.added, r, block, plan);
            #[unroll]
            for j in 0..STEP {
                let token = block * STEP + j;
                let dt = Vector::<f32, V>::new(step.extract(j));
                let du = Vector::<f32, V>::new(add.extract(j));
                let mut sum = Vector::<f32, V>::new(0.0f32);
                #[unroll(plan.unroll)]
                for q in 0..comptime!(plan.vectors) {
                    let n = r * comptime!(plan.vectors) + q;
                    let more = du * group_vector::<V>(&memory.b, token, q, plan);
                    let after = fma((dt * rates[n]).exp(), h[token * all + n], more);
                    h[(token + 1) * all + n] = after;
                    if comptime!(plan.gate) {
                        sum = fma(after, group_vector::<V>(&memory.c, token, q, plan), sum);
                    }
                }
                if comptime!(plan.gate) {
                    let place = token * comptime!(plan.part_stride()) + UNIT_POS as usize;
                    memory.outputs[place + r * comptime!(plan.units)] =
                        total::<V>(sum, comptime!(plan.vector));
                }
            }
        }
    }
}

/// The walk back over the chunk. `g` is the gradient of the state behind it, then of the one before. The
/// gradients of B and C of the first tokens still wait at the end.
#[cube]
fn retreat<V: Size>(
    g: &mut Array<Vector<f32, V>>,
    drates: &mut Array<Vector<f32, V>>,
    h: &Array<Vector<f32, V>>,
    rates: &Array<Vector<f32, V>>,
    memory: &mut Memory,
    db: &mut [f32],
    dc: &mut [f32],
    start: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) {
    #[unroll(plan.unroll)]
    for visit in 0..comptime!(plan.tokens / STEP) {
        let block = comptime!(plan.tokens / STEP - 1) - visit;
        #[unroll]
        for visit in 0..comptime!(STEP) {
            let j = comptime!(STEP - 1 - visit);
            let token = block * comptime!(STEP) + j;
            through_token::<V>(g, drates, h, rates, memory, block, j, plan);
            if token % comptime!(plan.waiting) == 0 && token > 0 {
                sync_cube();
                deliver(&memory.waiting, db, dc, start + token, own, call, plan);
                sync_cube();
            }
        }
    }
}

/// Through the states of one token.
#[cube]
fn through_token<V: Size>(
    g: &mut Array<Vector<f32, V>>,
    drates: &mut Array<Vector<f32, V>>,
    h: &Array<Vector<f32, V>>,
    rates: &Array<Vector<f32, V>>,
    memory: &mut Memory,
    block: usize,
    #[comptime] j: usize,
    #[comptime] plan: Plan,
) {
    let all = comptime!(plan.shares * plan.vectors);
    let token = block * comptime!(STEP) + j;
    let mut bs = zeros::<V>(comptime!(plan.vectors), plan);
    let mut cs = zeros::<V>(comptime!(plan.vectors), plan);
    #[unroll(plan.unroll)]
    for r in 0..comptime!(plan.shares) {
        let step = four(&memory.steps, r, block, plan).extract(j);
        let add = four(&memory.added, r, block, plan).extract(j);
        let dy = four(&memory.dy, r, block, plan).extract(j);
        let dt = Vector::<f32, V>::new(step);
        let du = Vector::<f32, V>::new(add);
        let dy = Vector::<f32, V>::new(dy);
        let mut dadded = Vector::<f32, V>::new(0.0f32);
        let mut dstep = Vector::<f32, V>::new(0.0f32);
        #[unroll(plan.unroll)]
        for q in 0..comptime!(plan.vectors) {
            let n = r * comptime!(plan.vectors) + q;
            let now = fma(dy, group_vector::<V>(&memory.c, token, q, plan), g[n]);
            cs[q] = fma(dy, h[(token + 1) * all + n], cs[q]);
            bs[q] = fma(now, du, bs[q]);
            dadded = fma(now, group_vector::<V>(&memory.b, token, q, plan), dadded);
            let before = now * (dt * rates[n]).exp();
            let through = before * h[token * all + n];
            dstep = fma(through, rates[n], dstep);
            drates[n] = fma(through, dt, drates[n]);
            g[n] = before;
        }
        let place = token * comptime!(plan.part_stride()) + UNIT_POS as usize;
        let place = place + r * comptime!(plan.units);
        memory.outputs[place] = total::<V>(dadded, comptime!(plan.vector));
        memory.decays[place] = total::<V>(dstep, comptime!(plan.vector));
    }
    let mut values = Array::<f32>::new(comptime!(2 * plan.own_states()));
    #[unroll(plan.unroll)]
    for q in 0..comptime!(plan.vectors) {
        #[unroll]
        for k in 0..comptime!(plan.vector) {
            let place = q * comptime!(plan.vector) + k;
            values[place] = bs[q].extract(k);
            values[place + comptime!(plan.own_states())] = cs[q].extract(k);
        }
    }
    wait(
        &mut values,
        token % comptime!(plan.waiting),
        &mut memory.waiting,
        plan,
    );
}

/// Adds up the gradients of B and C over the channels of the lanes; every unit leaves its share.
#[cube]
fn wait(values: &mut Array<f32>, row: usize, waiting: &mut Shared<[f32]>, #[comptime] plan: Plan) {
    #[unroll]
    for step in 0..comptime!(plan.exchanges()) {
        exchange(values, step, plan);
    }
    let first = held_first(plan);
    let team = UNIT_POS as usize / comptime!(plan.lanes);
    let base = row * comptime!(plan.row()) + team * comptime!(2 * plan.padded());
    let base = base + own_part(plan) * comptime!(plan.own_states());
    if UNIT_POS as usize & comptime!(plan.doubles()) == 0 {
        #[unroll(plan.unroll)]
        for i in 0..comptime!(plan.held(plan.exchanges())) {
            // First those of B, behind them those of C.
            let kind = (first + i) / comptime!(plan.own_states());
            let inside = (first + i) % comptime!(plan.own_states());
            waiting[base + kind * comptime!(plan.padded()) + inside] = values[i];
        }
    }
}

/// One step: units whose positions differ in one bit each keep one half of the values and add the other
/// unit's to it.
#[cube]
fn exchange(values: &mut Array<f32>, #[comptime] step: usize, #[comptime] plan: Plan) {
    let mask = comptime!((plan.split << step) as u32);
    if comptime!(plan.held(step) > 1) {
        let half = comptime!(plan.held(step) / 2);
        let upper = UNIT_POS & mask != 0;
        #[unroll]
        for i in 0..half {
            let (low, high) = (values[i], values[i + half]);
            let sent = select(upper, low, high);
            values[i] = select(upper, high, low) + plane_shuffle_xor(sent, mask);
        }
    } else {
        values[0] += plane_shuffle_xor(values[0], mask);
    }
}

/// The number of the first value that a unit holds in the end.
#[cube]
fn held_first(#[comptime] plan: Plan) -> usize {
    let mut first = 0usize.runtime();
    #[unroll]
    for step in 0..comptime!(plan.exchanges()) {
        if comptime!(plan.held(step) > 1) {
            let upper = UNIT_POS as usize / comptime!(plan.split << step) % 2;
            first += upper * comptime!(plan.held(step) / 2);
        }
    }
    first
}

/// Writes the waiting gradients of B and C, from token `start` on, added up over the cube:
/// `[blocks, batch, length, groups, state]`.
#[cube]
fn deliver(
    waiting: &Shared<[f32]>,
    db: &mut [f32],
    dc: &mut [f32],
    start: usize,
    own: &Own,
    call: &Call,
    #[comptime] plan: Plan,
) {
    let entries = call.cubes / call.blocks / call.groups;
    let first = (own.block * entries + own.batch) * call.length + start;
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.waiting * 2 * plan.padded()) {
        let token = n / comptime!(2 * plan.padded());
        let column = n % comptime!(2 * plan.padded());
        let state = column % comptime!(plan.padded());
        if start + token < call.length && state < comptime!(plan.state) {
            let mut sum = 0.0f32;
            #[unroll(plan.unroll)]
            for team in 0..comptime!(plan.teams()) {
                let row = token * comptime!(plan.row());
                sum += waiting[row + team * comptime!(2 * plan.padded()) + column];
            }
            let place = (first + token) * call.groups + own.group;
            let place = place * comptime!(plan.state) + state;
            if column < comptime!(plan.padded()) {
                db[place] = sum;
            } else {
                dc[place] = sum;
            }
        }
        n += comptime!(plan.units);
    }
}

/// Sums a tile over its tokens, one unit per channel.
#[cube]
fn sum_tokens(
    tile: &Shared<[f32]>,
    to: &mut [f32],
    base: usize,
    own: &Own,
    #[comptime] plan: Plan,
) {
    let mut n = UNIT_POS as usize;
    while n < own.channels {
        let mut sum = 0.0f32;
        for token in 0..comptime!(plan.tokens) {
            sum += tile[n * comptime!(plan.stride()) + token];
        }
        to[base + n] = sum;
        n += comptime!(plan.units);
    }
}

/// Adds up the gradients of B and C of the blocks of channels.
#[cube(launch, address_type = "dynamic")]
pub(super) fn sum_blocks<O: Float>(
    db_parts: &[f32],
    dc_parts: &[f32],
    db: &mut [O],
    dc: &mut [O],
    blocks: usize,
    size: usize,
    #[define(O)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < size {
        let mut b = 0.0f32;
        let mut c = 0.0f32;
        for block in 0..blocks {
            b += db_parts[block * size + ABSOLUTE_POS];
            c += dc_parts[block * size + ABSOLUTE_POS];
        }
        db[ABSOLUTE_POS] = O::cast_from(b);
        dc[ABSOLUTE_POS] = O::cast_from(c);
    }
}
