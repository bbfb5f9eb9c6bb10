//! Backward for devices and types without matrix units: `dQ = scale dS K`, `dK = scale dS^T Q`,
//! `dV = P^T dO`, with `dS = P (dO V^T - delta)`, `P = exp(scale Q K^T - lse)`, `delta = dO . O`.
//!
//! Scores are computed again from the log-sum-exp, once by units that own a query and once by units that
//! own a key, so nothing is added up across units and a run repeats to the bit. What a unit owns and sums
//! stays in its registers; the other side passes through shared memory, `tile` tokens at a time. A tile
//! that every unit of the cube sees takes a path without masks.
//!
//! Bytes moved: what a kernel owns once, the other side `length / units` times.

use cubecl::prelude::*;

use super::common::{
    Call, Four, HIDDEN, Plan, add, column_key, dot, end_key, end_query, first_key, first_query,
    kept, load, load_padding, load_token, row_key,
};

/// A unit's query.
#[derive(CubeType)]
struct Query {
    q: Array<f32>,
    dout: Array<f32>,
    dq: Array<f32>,
    lse: f32,
    delta: f32,
    first: u32,
    end: u32,
    key: u32,
}

/// Gradient of the queries, and the deltas for the other kernel (`plan.rows` is one).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn backward_queries<E: Float>(
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
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= call.cubes as usize {
        terminate!();
    }
    let plane = CUBE_POS as u32 / call.blocks;
    // The last block of a causal call has the most work: it starts first.
    let block = call.blocks - 1 - CUBE_POS as u32 % call.blocks;
    let start_row = block * comptime!(plan.units as u32);
    let last_row = min(start_row + comptime!(plan.units as u32), call.lq) - 1;
    let kv_start = (plane / call.group) as usize * call.lk as usize * comptime!(plan.dim);
    let padding_start = (plane / call.heads) as usize * call.lk as usize;
    // A unit past the end repeats the last query and writes nothing.
    let i = min(start_row + UNIT_POS, call.lq - 1);
    let row = plane as usize * call.lq as usize + i as usize;
    let mut query = read_query::<E>(q, out, lse, dout, row, plane, i, call, plan);

    let mut keys = Shared::<[Four]>::new_slice(comptime!(plan.tile * plan.fours()));
    let mut values = Shared::<[Four]>::new_slice(comptime!(plan.tile * plan.fours()));
    let mut hidden = Shared::<[f32]>::new_slice(comptime!(plan.tile));
    let tile = comptime!(plan.tile as u32);
    let mask = comptime!(plan.mask);
    // Seen by every query of the cube.
    let clear_from = first_key(last_row, call, mask);
    let clear_to = end_key(start_row, call, mask);
    let end = end_key(last_row, call, mask);
    let mut start = first_key(start_row, call, mask) / tile * tile;
    while start < end {
        sync_cube();
        load::<E>(k, kv_start, start, call.lk, 1.0f32, &mut keys, plan);
        load::<E>(v, kv_start, start, call.lk, 1.0f32, &mut values, plan);
        if comptime!(mask.padding) {
            let units = comptime!(plan.units);
            load_padding(
                padding,
                padding_start,
                start,
                call,
                &mut hidden,
                0usize,
                comptime!(plan.tile),
                units,
            );
        }
        sync_cube();
        if comptime!(mask.padding) {
            visit_keys(&mut query, &keys, &values, &hidden, start, call, plan, true);
        } else if start >= clear_from && start + tile <= clear_to {
            visit_keys(
                &mut query, &keys, &values, &hidden, start, call, plan, false,
            );
        } else {
            visit_keys(&mut query, &keys, &values, &hidden, start, call, plan, true);
        }
        start += tile;
    }
    if start_row + UNIT_POS < call.lq {
        delta[row] = query.delta;
        #[unroll]
        for c in 0..comptime!(plan.dim) {
            dq[row * comptime!(plan.dim) + c] = E::cast_from(query.dq[c] * call.scale);
        }
    }
}

#[cube]
fn read_query<E: Float>(
    q: &[E],
    out: &[E],
    lse: &[f32],
    dout: &[E],
    row: usize,
    plane: u32,
    i: u32,
    call: &Call,
    #[comptime] plan: Plan,
) -> Query {
    let wide = comptime!(plan.wide());
    let mut query = Query {
        q: Array::new(wide),
        dout: Array::new(wide),
        dq: Array::new(wide),
        lse: lse[row],
        delta: 0.0f32,
        first: first_key(i, call, plan.mask),
        end: end_key(i, call, plan.mask),
        key: row_key(plane, i, call),
    };
    let from = row * comptime!(plan.dim);
    load_token::<E>(q, from, call.scale, &mut query.q, 0usize, plan);
    load_token::<E>(dout, from, 1.0f32, &mut query.dout, 0usize, plan);
    #[unroll]
    for c in 0..wide {
        query.dq[c] = 0.0f32;
        if comptime!(c < plan.dim) {
            let out = f32::cast_from(out[from + c]);
            query.delta = fma(out, query.dout[c], query.delta);
        }
    }
    query
}

/// Adds the share of a tile's keys.
#[cube]
fn visit_keys(
    query: &mut Query,
    keys: &Shared<[Four]>,
    values: &Shared<[Four]>,
    hidden: &Shared<[f32]>,
    start: u32,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] masked: bool,
) {
    for n in 0..comptime!(plan.tile as u32) {
        let j = start + n;
        let token = n as usize;
        let score = dot(&query.q, keys, token, 0usize, plan);
        let mut p = (score - query.lse).exp();
        if comptime!(masked) {
            let mut seen = j >= query.first && j < query.end;
            if comptime!(plan.mask.padding) {
                seen = seen && hidden[token] == 0.0f32;
            }
            p = select(seen, p, 0.0f32);
        }
        let mut dp = dot(&query.dout, values, token, 0usize, plan);
        if comptime!(plan.mask.dropout) {
            dp *= kept(query.key, column_key(j, call), call);
        }
        let ds = p * (dp - query.delta);
        add(&mut query.dq, ds, keys, token, 0usize, plan);
    }
}

/// A unit's key.
#[derive(CubeType)]
struct Key {
    k: Array<f32>,
    v: Array<f32>,
    dk: Array<f32>,
    dv: Array<f32>,
    position: u32,
    key: u32,
    open: bool,
}

/// A tile of queries.
#[derive(CubeType)]
struct Queries {
    q: Shared<[Four]>,
    dout: Shared<[Four]>,
    lse: Shared<[f32]>,
    delta: Shared<[f32]>,
}

/// Gradients of the keys and values. A unit meets the queries of every head that shares its key.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn backward_keys<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    padding: &[f32],
    lse: &[f32],
    delta: &[f32],
    dout: &[E],
    dk: &mut [E],
    dv: &mut [E],
    call: &Call,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= call.cubes as usize {
        terminate!();
    }
    let kv_plane = CUBE_POS as u32 / call.blocks;
    let start_key = CUBE_POS as u32 % call.blocks * comptime!(plan.units as u32);
    let last_key = min(start_key + comptime!(plan.units as u32), call.lk) - 1;
    // A unit past the end repeats the last key and writes nothing.
    let j = min(start_key + UNIT_POS, call.lk - 1);
    let row = kv_plane as usize * call.lk as usize + j as usize;
    let mut key = read_key::<E>(k, v, padding, row, kv_plane, j, call, plan);

    let tokens = comptime!(plan.tile * plan.fours());
    let mut tile = Queries {
        q: Shared::new_slice(tokens),
        dout: Shared::new_slice(tokens),
        lse: Shared::new_slice(comptime!(plan.tile)),
        delta: Shared::new_slice(comptime!(plan.tile)),
    };
    let length = comptime!(plan.tile as u32);
    let mask = comptime!(plan.mask);
    let from = first_query(start_key, call, mask) / length * length;
    let end = end_query(last_key, call, mask);
    for head in 0..call.group {
        let plane = kv_plane * call.group + head;
        let mut start = from;
        while start < end {
            sync_cube();
            load_queries::<E>(q, lse, delta, dout, plane, start, call, &mut tile, plan);
            sync_cube();
            let last_query = min(start + length, call.lq) - 1;
            // Every key of the cube is seen by every query of the tile.
            let clear = end_key(start, call, mask) > last_key
                && first_key(last_query, call, mask) <= start_key;
            if comptime!(mask.padding) {
                visit_queries(&mut key, &tile, plane, start, call, plan, true);
            } else if clear {
                visit_queries(&mut key, &tile, plane, start, call, plan, false);
            } else {
                visit_queries(&mut key, &tile, plane, start, call, plan, true);
            }
            start += length;
        }
    }
    if start_key + UNIT_POS < call.lk {
        #[unroll]
        for c in 0..comptime!(plan.dim) {
            // The queries carried the scale.
            dk[row * comptime!(plan.dim) + c] = E::cast_from(key.dk[c]);
            dv[row * comptime!(plan.dim) + c] = E::cast_from(key.dv[c]);
        }
    }
}

#[cube]
fn read_key<E: Float>(
    k: &[E],
    v: &[E],
    padding: &[f32],
    row: usize,
    kv_plane: u32,
    j: u32,
    call: &Call,
    #[comptime] plan: Plan,
) -> Key {
    let wide = comptime!(plan.wide());
    let mut key = Key {
        k: Array::new(wide),
        v: Array::new(wide),
        dk: Array::new(wide),
        dv: Array::new(wide),
        position: j,
        key: column_key(j, call),
        open: true,
    };
    load_token::<E>(
        k,
        row * comptime!(plan.dim),
        1.0f32,
        &mut key.k,
        0usize,
        plan,
    );
    load_token::<E>(
        v,
        row * comptime!(plan.dim),
        1.0f32,
        &mut key.v,
        0usize,
        plan,
    );
    #[unroll]
    for c in 0..wide {
        key.dk[c] = 0.0f32;
        key.dv[c] = 0.0f32;
    }
    if comptime!(plan.mask.padding) {
        let batch = kv_plane * call.group / call.heads;
        key.open = padding[batch as usize * call.lk as usize + j as usize] == 0.0f32;
    }
    key
}

/// Brings a tile of queries into shared memory; past the last query what makes every weight zero.
#[cube]
fn load_queries<E: Float>(
    q: &[E],
    lse: &[f32],
    delta: &[f32],
    dout: &[E],
    plane: u32,
    start: u32,
    call: &Call,
    tile: &mut Queries,
    #[comptime] plan: Plan,
) {
    let rows = plane as usize * call.lq as usize;
    let from = rows * comptime!(plan.dim);
    load::<E>(q, from, start, call.lq, call.scale, &mut tile.q, plan);
    load::<E>(dout, from, start, call.lq, 1.0f32, &mut tile.dout, plan);
    let mut n = UNIT_POS;
    while n < comptime!(plan.tile as u32) {
        let at = rows + min(start + n, call.lq - 1) as usize;
        tile.lse[n as usize] = select(start + n < call.lq, lse[at], -HIDDEN);
        tile.delta[n as usize] = delta[at];
        n += comptime!(plan.units as u32);
    }
}

/// Adds the share of a tile's queries.
#[cube]
fn visit_queries(
    key: &mut Key,
    tile: &Queries,
    plane: u32,
    start: u32,
    call: &Call,
    #[comptime] plan: Plan,
    #[comptime] masked: bool,
) {
    for n in 0..comptime!(plan.tile as u32) {
        let i = start + n;
        let token = n as usize;
        let score = dot(&key.k, &tile.q, token, 0usize, plan);
        let mut p = (score - tile.lse[token]).exp();
        if comptime!(masked) {
            let seen = key.open
                && key.position >= first_key(i, call, plan.mask)
                && key.position < end_key(i, call, plan.mask);
            p = select(seen, p, 0.0f32);
        }
        let mut dp = dot(&key.v, &tile.dout, token, 0usize, plan);
        let mut weight = p;
        if comptime!(plan.mask.dropout) {
            let kept = kept(row_key(plane, i, call), key.key, call);
            dp *= kept;
            weight *= kept;
        }
        add(&mut key.dv, weight, &tile.dout, token, 0usize, plan);
        let ds = p * (dp - tile.delta[token]);
        add(&mut key.dk, ds, &tile.q, token, 0usize, plan);
    }
}
