//! Forward for devices and types without matrix units: `S = scale Q K^T`, an online softmax over the keys,
//! `O = P V`.
//!
//! A unit owns `rows` queries, which stay with their sums in its registers, and meets the keys and values
//! that its cube brings into shared memory, `tile` tokens at a time; a chunk of keys is scored before the
//! sums are rescaled once. A tile that every query of the cube sees takes a path without masks.
//!
//! Bytes moved: queries and output once, keys and values `length_q / (rows units)` times.

use cubecl::prelude::*;

use super::common::{
    CHUNK, Call, Four, HIDDEN, Plan, add, column_key, dot, end_key, first_key, kept, load,
    load_padding, load_token, row_key,
};

/// State of the online softmax of a unit's queries.
#[derive(CubeType)]
struct Rows {
    q: Array<f32>,
    out: Array<f32>,
    top: Array<f32>,
    sum: Array<f32>,
    first: Array<u32>,
    end: Array<u32>,
    key: Array<u32>,
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn forward<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    padding: &[f32],
    out: &mut [E],
    lse: &mut [f32],
    call: &Call,
    #[comptime] plan: Plan,
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
    let kv_start = (plane / call.group) as usize * call.lk as usize * comptime!(plan.dim);
    let padding_start = (plane / call.heads) as usize * call.lk as usize;

    let mut rows = load_rows::<E>(q, plane, start_row, call, plan);
    let mut keys = Shared::<[Four]>::new_slice(comptime!(plan.tile * plan.fours()));
    let mut values = Shared::<[Four]>::new_slice(comptime!(plan.tile * plan.fours()));
    let mut hidden = Shared::<[f32]>::new_slice(comptime!(plan.tile));

    let tile = comptime!(plan.tile as u32);
    // Seen by every query of the cube: no mask needed.
    let clear_from = first_key(last_row, call, plan.mask);
    let clear_to = end_key(start_row, call, plan.mask);
    let end = end_key(last_row, call, plan.mask);
    let mut start = first_key(start_row, call, plan.mask) / tile * tile;
    while start < end {
        sync_cube();
        load::<E>(k, kv_start, start, call.lk, 1.0f32, &mut keys, plan);
        load::<E>(v, kv_start, start, call.lk, 1.0f32, &mut values, plan);
        if comptime!(plan.mask.padding) {
            load_padding(
                padding,
                padding_start,
                start,
                call,
                &mut hidden,
                0usize,
                comptime!(plan.tile),
                comptime!(plan.units),
            );
        }
        sync_cube();
        if comptime!(plan.mask.padding) {
            visit(&mut rows, &keys, &values, &hidden, start, call, plan, true);
        } else if start >= clear_from && start + tile <= clear_to {
            visit(&mut rows, &keys, &values, &hidden, start, call, plan, false);
        } else {
            visit(&mut rows, &keys, &values, &hidden, start, call, plan, true);
        }
        start += tile;
    }
    sync_cube();

    #[unroll]
    for r in 0..comptime!(plan.rows) {
        let i = start_row + UNIT_POS + comptime!((r * plan.units) as u32);
        if i < call.lq {
            let row = plane as usize * call.lq as usize + i as usize;
            let empty = rows.sum[r] == 0.0f32;
            let sum = select(empty, 1.0f32, rows.sum[r]);
            let share = select(empty, 0.0f32, 1.0f32 / sum);
            lse[row] = select(empty, -HIDDEN, rows.top[r] + sum.ln());
            #[unroll]
            for c in 0..comptime!(plan.dim) {
                out[row * comptime!(plan.dim) + c] =
                    E::cast_from(rows.out[comptime!(r * plan.wide() + c)] * share);
            }
        }
    }
}

#[cube]
fn load_rows<E: Float>(
    q: &[E],
    plane: u32,
    start_row: u32,
    call: &Call,
    #[comptime] plan: Plan,
) -> Rows {
    let mut rows = Rows {
        q: Array::new(comptime!(plan.rows * plan.wide())),
        out: Array::new(comptime!(plan.rows * plan.wide())),
        top: Array::new(comptime!(plan.rows)),
        sum: Array::new(comptime!(plan.rows)),
        first: Array::new(comptime!(plan.rows)),
        end: Array::new(comptime!(plan.rows)),
        key: Array::new(comptime!(plan.rows)),
    };
    #[unroll]
    for r in 0..comptime!(plan.rows) {
        // A unit past the end repeats the last query and writes nothing.
        let i = min(
            start_row + UNIT_POS + comptime!((r * plan.units) as u32),
            call.lq - 1,
        );
        let row = plane as usize * call.lq as usize + i as usize;
        let from = row * comptime!(plan.dim);
        let offset = comptime!(r * plan.wide());
        load_token::<E>(q, from, call.scale, &mut rows.q, offset, plan);
        #[unroll]
        for c in 0..comptime!(plan.wide()) {
            rows.out[offset + c] = 0.0f32;
        }
        rows.top[r] = HIDDEN;
        rows.sum[r] = 0.0f32;
        rows.first[r] = first_key(i, call, plan.mask);
        rows.end[r] = end_key(i, call, plan.mask);
        rows.key[r] = row_key(plane, i, call);
    }
    rows
}

/// Brings a unit's queries up to date with the keys of a tile, a chunk at a time.
#[cube]
fn visit(
    rows: &mut Rows,
    keys: &Shared<[Four]>,
    values: &Shared<[Four]>,
    hidden: &Shared<[f32]>,
    start: u32,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] masked: bool,
) {
    let mut scores = Array::<f32>::new(comptime!(plan.rows * CHUNK));
    for chunk in 0..comptime!((plan.tile / CHUNK) as u32) {
        let first = chunk * comptime!(CHUNK as u32);
        #[unroll]
        for n in 0..CHUNK {
            let token = first as usize + n;
            let j = start + first + comptime!(n as u32);
            #[unroll]
            for r in 0..comptime!(plan.rows) {
                let mut score = dot(&rows.q, keys, token, comptime!(r * plan.wide()), plan);
                if comptime!(masked) {
                    let mut seen = j >= rows.first[r] && j < rows.end[r];
                    if comptime!(plan.mask.padding) {
                        seen = seen && hidden[token] == 0.0f32;
                    }
                    score = select(seen, score, HIDDEN);
                }
                scores[comptime!(r * CHUNK + n)] = score;
            }
        }
        #[unroll]
        for r in 0..comptime!(plan.rows) {
            softmax(rows, &mut scores, r, plan, masked);
        }
        #[unroll]
        for n in 0..CHUNK {
            let token = first as usize + n;
            let j = start + first + comptime!(n as u32);
            #[unroll]
            for r in 0..comptime!(plan.rows) {
                let mut weight = scores[comptime!(r * CHUNK + n)];
                if comptime!(plan.mask.dropout) {
                    weight *= kept(rows.key[r], column_key(j, call), call);
                }
                add(
                    &mut rows.out,
                    weight,
                    values,
                    token,
                    comptime!(r * plan.wide()),
                    plan,
                );
            }
        }
    }
}

/// Turns a query's scores of a chunk into weights and rescales what was summed before.
#[cube]
fn softmax(
    rows: &mut Rows,
    scores: &mut Array<f32>,
    #[comptime] r: usize,
    #[comptime] plan: Plan,
    #[comptime] masked: bool,
) {
    let mut top = rows.top[r];
    #[unroll]
    for n in 0..CHUNK {
        top = max(top, scores[comptime!(r * CHUNK + n)]);
    }
    let rescale = (rows.top[r] - top).exp();
    let mut sum = rows.sum[r] * rescale;
    #[unroll]
    for n in 0..CHUNK {
        let at = comptime!(r * CHUNK + n);
        let mut weight = (scores[at] - top).exp();
        if comptime!(masked) {
            // While nothing has been seen the difference is zero and its power one.
            weight = select(scores[at] > HIDDEN, weight, 0.0f32);
        }
        scores[at] = weight;
        sum += weight;
    }
    rows.sum[r] = sum;
    rows.top[r] = top;
    #[unroll]
    for c in 0..comptime!(plan.wide()) {
        let at = comptime!(r * plan.wide() + c);
        rows.out[at] = rows.out[at] * rescale;
    }
}
