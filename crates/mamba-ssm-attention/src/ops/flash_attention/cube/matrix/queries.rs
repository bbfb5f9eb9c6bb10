//! Gradient of the queries on matrix units: `dQ = scale dS K`, `dS = P (dP - delta)`, `P` computed again
//! as `exp(scale Q K^T - lse)`, `dP = dO V^T`, `delta[i] = dO[i] . O[i]` (written for the other kernel).
//!
//! A cube of `planes` planes owns `16 frags planes` queries of a head, a plane `16 frags` of them: queries,
//! gradients of the output and sums stay in its registers. Keys and values pass through shared memory,
//! `tile` tokens at a time, the next tile's reads under way while this one is at work, and are met sixteen
//! at a time: nothing of a row is needed but its log-sum-exp, so no score outlives its sixteen keys.
//!
//! Bytes moved: queries, output, both gradients once, keys and values `length_q / (16 frags planes)` times.

use cubecl::prelude::*;

use super::forward::Place;
use super::tiles::{
    COLUMNS, Eight, MatrixPlan, Operand, PLANE, Pair, SIDE, Sum, accumulate, across, add_scores,
    along, as_left, clear, exponent, fetch, lifted, load_rows, powers, put, scores, write_rows,
    zeros,
};
use crate::ops::flash_attention::cube::common::{
    Call, column_key, end_key, first_key, kept, load_padding, row_key,
};

/// A plane's queries; of each block a unit has two rows.
#[derive(CubeType)]
struct Rows<E: Float> {
    q: Sequence<Operand<E>>,
    dout: Sequence<Operand<E>>,
    lse: Array<f32>,
    delta: Array<f32>,
    dq: Sequence<Sum>,
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(in super::super) fn backward_queries_matrix<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    padding: &[f32],
    out: &[E],
    lse: &[f32],
    dout: &[E],
    dq: &mut [E],
    delta: &mut [f32],
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= call.cubes as usize {
        terminate!();
    }
    let plane = CUBE_POS as u32 / call.blocks;
    // The last block of a causal call has the most work: it starts first.
    let block = call.blocks - 1 - CUBE_POS as u32 % call.blocks;
    let start_row = block * comptime!(plan.block() as u32);
    let last_row = min(start_row + comptime!(plan.block() as u32), call.lq) - 1;
    let first = start_row + UNIT_POS / comptime!(PLANE as u32) * comptime!(plan.rows() as u32);
    let last = max(
        min(first + comptime!(plan.rows() as u32), call.lq),
        first + 1,
    ) - 1;
    let q_rows = plane as usize * call.lq as usize;
    let kv = (plane / call.group) as usize * call.lk as usize * comptime!(plan.dim);
    let padding_rows = (plane / call.heads) as usize * call.lk as usize;

    let mut keys = Shared::<[E]>::new_aligned_slice(comptime!(2 * plan.size()), 128usize);
    let mut values = Shared::<[E]>::new_aligned_slice(comptime!(2 * plan.size()), 128usize);
    let mut hidden = Shared::<[f32]>::new_slice(comptime!(2 * plan.tile));
    let mut next_keys = Array::<Eight<E>>::new(comptime!(plan.shares()));
    let mut next_values = Array::<Eight<E>>::new(comptime!(plan.shares()));
    clear(&mut keys, comptime!(2 * plan.tile), plan);
    clear(&mut values, comptime!(2 * plan.tile), plan);
    let mut rows = read_rows::<E>(q, out, lse, dout, delta, q_rows, first, call, plan);

    let tile = comptime!(plan.tile as u32);
    let mask = comptime!(plan.mask);
    let sees_from = first_key(first, call, mask);
    let sees_to = end_key(last, call, mask);
    // Seen by every query of the plane.
    let clear_from = first_key(last, call, mask);
    let clear_to = end_key(first, call, mask);
    let end = end_key(last_row, call, mask);
    let mut start = first_key(start_row, call, mask) / tile * tile;
    let mut token = 0usize;
    fetch::<E>(k, kv, start, call.lk, &mut next_keys, plan);
    fetch::<E>(v, kv, start, call.lk, &mut next_values, plan);
    while start < end {
        put::<E>(
            &next_keys,
            &mut keys,
            token * comptime!(plan.stride()),
            plan,
        );
        put::<E>(
            &next_values,
            &mut values,
            token * comptime!(plan.stride()),
            plan,
        );
        if comptime!(mask.padding) {
            load_padding(
                padding,
                padding_rows,
                start,
                call,
                &mut hidden,
                token,
                comptime!(plan.tile),
                comptime!(plan.units()),
            );
        }
        // One barrier a tile: who is here has left the tile before the last, which lay where the next
        // will.
        sync_cube();
        fetch::<E>(k, kv, start + tile, call.lk, &mut next_keys, plan);
        fetch::<E>(v, kv, start + tile, call.lk, &mut next_values, plan);
        let place = Place {
            plane,
            first,
            start,
            token,
        };
        if start < sees_to && start + tile > sees_from {
            if comptime!(mask.padding) {
                visit::<E>(&mut rows, &keys, &values, &hidden, &place, call, plan, true);
            } else if start >= clear_from && start + tile <= clear_to {
                visit::<E>(
                    &mut rows, &keys, &values, &hidden, &place, call, plan, false,
                );
            } else {
                visit::<E>(&mut rows, &keys, &values, &hidden, &place, call, plan, true);
            }
        }
        start += tile;
        token = comptime!(plan.tile) - token;
    }
    let mut scales = Array::<f32>::new(comptime!(2 * plan.frags));
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        scales[row] = call.scale;
    }
    write_rows::<E>(&rows.dq, &scales, dq, q_rows, first, call.lq, plan);
}

/// A plane's queries and what goes with them; writes their deltas.
#[cube]
fn read_rows<E: Float>(
    q: &[E],
    out: &[E],
    lse: &[f32],
    dout: &[E],
    delta: &mut [f32],
    q_rows: usize,
    first: u32,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) -> Rows<E> {
    let mut rows = Rows::<E> {
        q: load_rows::<E>(q, q_rows, first, call.lq, plan),
        dout: load_rows::<E>(dout, q_rows, first, call.lq, plan),
        lse: Array::new(comptime!(2 * plan.frags)),
        delta: Array::new(comptime!(2 * plan.frags)),
        dq: zeros(comptime!(plan.frags * plan.columns())),
    };
    let outs = load_rows::<E>(out, q_rows, first, call.lq, plan);
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        let mut sum = Pair::<f32>::new(0.0f32);
        #[unroll]
        for n in 0..comptime!(2 * plan.steps()) {
            let block = comptime!(row / 2 * plan.steps() + n / 2);
            let pair = comptime!(row % 2 + n % 2 * 2);
            let one = Pair::<f32>::cast_from(rows.dout[block][pair]);
            sum = fma(one, Pair::<f32>::cast_from(outs[block][pair]), sum);
        }
        // A row is shared by four neighbours.
        let mut sum = sum.extract(0usize) + sum.extract(1usize);
        sum += plane_shuffle_xor(sum, 1u32);
        sum += plane_shuffle_xor(sum, 2u32);
        let i = first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
        let at = q_rows + min(i, call.lq - 1) as usize;
        rows.lse[row] = lse[at];
        rows.delta[row] = sum;
        if i < call.lq && UNIT_POS_PLANE % 4 == 0 {
            delta[at] = sum;
        }
    }
    rows
}

/// Adds the share of a tile's keys.
#[cube]
fn visit<E: Float>(
    rows: &mut Rows<E>,
    keys: &Shared<[E]>,
    values: &Shared<[E]>,
    hidden: &Shared<[f32]>,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[comptime] masked: bool,
) {
    let from = place.token * comptime!(plan.stride());
    let across = from + across(plan);
    let along = from + along(plan);
    #[unroll]
    for part in 0..comptime!(plan.tile / SIDE) {
        let offset = comptime!(part * SIDE * plan.stride());
        let mut p = scores::<E>(&rows.q, keys, across + offset, plan);
        let mut dp = less_delta::<E>(&*rows, plan);
        add_scores::<E>(&rows.dout, values, across + offset, &mut dp, plan);
        let mut lefts = Sequence::<Operand<E>>::new();
        #[unroll]
        for frag in 0..comptime!(plan.frags) {
            #[unroll]
            for n in 0..4usize {
                let row = comptime!(2 * frag + n % 2);
                let column = comptime!(2 * part + n / 2);
                let block = comptime!(2 * frag + n / 2);
                let ds = gradient::<E>(
                    &*rows,
                    p[block][comptime!(n % 2)],
                    dp[block][comptime!(n % 2)],
                    row,
                    column,
                    hidden,
                    place,
                    call,
                    plan,
                    masked,
                );
                let block = &mut p[block];
                block[comptime!(n % 2)] = ds;
            }
            lefts.push(as_left::<E>(
                &p[comptime!(2 * frag)],
                &p[comptime!(2 * frag + 1)],
            ));
        }
        accumulate::<E>(&lefts, keys, along + offset, &mut rows.dq, plan);
    }
}

/// `dS` of a unit's pair of keys in block `column` of a tile, from their scores and `dP`.
#[cube]
fn gradient<E: Float>(
    rows: &Rows<E>,
    score: Pair<f32>,
    dp: Pair<f32>,
    #[comptime] row: usize,
    #[comptime] column: usize,
    hidden: &Shared<[f32]>,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[comptime] masked: bool,
) -> Pair<f32> {
    let shift = Pair::<f32>::new(lifted(-rows.lse[row]));
    let mut p = powers(score, exponent(call.scale), shift, plan);
    let mut dp = dp;
    let i = place.first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
    let beyond = comptime!((column * COLUMNS) as u32) + UNIT_POS_PLANE % 4 * 2;
    if comptime!(masked) {
        let from = first_key(i, call, plan.mask);
        let width = max(end_key(i, call, plan.mask), from) - from;
        #[unroll]
        for n in 0..2usize {
            // Below `from` the difference wraps around.
            let j = beyond + comptime!(n as u32);
            let mut seen = select(place.start + j - from < width, p.extract(n), 0.0f32);
            if comptime!(plan.mask.padding) {
                seen = select(hidden[place.token + j as usize] == 0.0f32, seen, 0.0f32);
            }
            p.insert(n, seen);
        }
    }
    if comptime!(plan.mask.dropout) {
        let key = row_key(place.plane, i, call);
        #[unroll]
        for n in 0..2usize {
            let j = place.start + beyond + comptime!(n as u32);
            dp.insert(n, dp.extract(n) * kept(key, column_key(j, call), call));
        }
    }
    if comptime!(plan.mask.dropout) {
        dp -= Pair::<f32>::new(rows.delta[row]);
    }
    p * dp
}

/// What sixteen keys' `dP` start from: `-delta`, unless dropout comes between.
#[cube]
fn less_delta<E: Float>(rows: &Rows<E>, #[comptime] plan: MatrixPlan) -> Sequence<Sum> {
    let mut sums = zeros(comptime!(2 * plan.frags));
    if comptime!(!plan.mask.dropout) {
        #[unroll]
        for block in 0..comptime!(2 * plan.frags) {
            let sum = &mut sums[block];
            #[unroll]
            for r in 0..2usize {
                sum[r] = Pair::<f32>::new(-rows.delta[comptime!(block / 2 * 2 + r)]);
            }
        }
    }
    sums
}
