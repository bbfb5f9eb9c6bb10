//! Gradients of the keys and values on matrix units: `dV = P^T dO`, `dK = scale dS^T Q`, with
//! `dS^T = P^T (dP^T - delta)`, `P^T` computed again as `exp(scale K Q^T - lse)`, `dP^T = V dO^T`.
//!
//! A cube of `planes` planes owns `16 frags planes` keys of a key/value head, a plane `16 frags` of them:
//! keys, values and sums stay in its registers. The queries of every head that shares the keys, and the
//! gradients of the output, pass through shared memory, `tile` tokens at a time, the next tile's reads
//! under way while this one is at work, and are met sixteen at a time. Every key has one owner, so nothing
//! is added up across units and a run repeats to the bit; unless `dS^T` is used for the gradient of the queries
//! too (`joint`).
//!
//! Bytes moved: keys, values and their gradients once, queries and gradients of the output
//! `length_k / (16 frags planes)` times.

use cubecl::prelude::*;

use super::forward::Place;
use super::joint::{Joint, add_queries, leave, leave_nothing, new_joint};
use super::tiles::{
    COLUMNS, Eight, MatrixPlan, Operand, PLANE, SIDE, Sum, accumulate, across, add_scores, along,
    as_left, clear, exponent, fetch, lifted, load_rows, powers, put, scores, write_rows, zeros,
};
use crate::ops::flash_attention::cube::common::{
    Call, HIDDEN, column_key, end_key, end_query, first_key, first_query, kept, row_key,
};

/// A plane's keys; of each block a unit has two rows.
#[derive(CubeType)]
struct Rows<E: Float> {
    k: Sequence<Operand<E>>,
    v: Sequence<Operand<E>>,
    /// One at padding.
    hidden: Array<f32>,
    dk: Sequence<Sum>,
    dv: Sequence<Sum>,
}

/// A pair of tiles of queries in shared memory.
#[derive(CubeType)]
struct Tiles<E: Float> {
    queries: Shared<[E]>,
    douts: Shared<[E]>,
    /// Negated, as the sums begin with them.
    lses: Shared<[f32]>,
    deltas: Shared<[f32]>,
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(in super::super) fn backward_keys_matrix<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    padding: &[f32],
    lse: &[f32],
    delta: &[f32],
    dout: &[E],
    dk: &mut [E],
    dv: &mut [E],
    dq: &[Atomic<f32>],
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= call.cubes as usize {
        terminate!();
    }
    let kv_plane = CUBE_POS as u32 / call.blocks;
    let start_key = CUBE_POS as u32 % call.blocks * comptime!(plan.block() as u32);
    let last_key = min(start_key + comptime!(plan.block() as u32), call.lk) - 1;
    let first = start_key + UNIT_POS / comptime!(PLANE as u32) * comptime!(plan.rows() as u32);
    let k_rows = kv_plane as usize * call.lk as usize;

    let mut tiles = Tiles::<E> {
        queries: Shared::new_aligned_slice(comptime!(2 * plan.size()), 128usize),
        douts: Shared::new_aligned_slice(comptime!(2 * plan.size()), 128usize),
        lses: Shared::new_aligned_slice(comptime!(2 * plan.tile), 8usize),
        deltas: Shared::new_aligned_slice(comptime!(2 * plan.tile), 8usize),
    };
    let mut next_queries = Array::<Eight<E>>::new(comptime!(plan.shares()));
    let mut next_douts = Array::<Eight<E>>::new(comptime!(plan.shares()));
    clear(&mut tiles.queries, comptime!(2 * plan.tile), plan);
    clear(&mut tiles.douts, comptime!(2 * plan.tile), plan);
    let mut joint = new_joint::<E>(k, k_rows, start_key, call, plan);
    let mut rows = read_rows::<E>(k, v, padding, kv_plane, first, call, plan);

    let tile = comptime!(plan.tile as u32);
    let mask = comptime!(plan.mask);
    let from = first_query(start_key, call, mask) / tile * tile;
    let end = end_query(last_key, call, mask);
    let mut token = 0usize;
    for head in 0..call.group {
        let plane = kv_plane * call.group + head;
        let q_rows = plane as usize * call.lq as usize;
        let at = q_rows * comptime!(plan.dim);
        let mut start = from;
        fetch::<E>(q, at, start, call.lq, &mut next_queries, plan);
        fetch::<E>(dout, at, start, call.lq, &mut next_douts, plan);
        while start < end {
            let to = token * comptime!(plan.stride());
            put::<E>(&next_queries, &mut tiles.queries, to, plan);
            put::<E>(&next_douts, &mut tiles.douts, to, plan);
            put_numbers::<E>(lse, delta, q_rows, start, call, &mut tiles, token, plan);
            // One barrier a tile: who is here has left the tile before the last, which lay where the
            // next will.
            sync_cube();
            fetch::<E>(q, at, start + tile, call.lq, &mut next_queries, plan);
            fetch::<E>(dout, at, start + tile, call.lq, &mut next_douts, plan);
            let place = Place {
                plane,
                first,
                start,
                token,
            };
            choose::<E>(&mut rows, &tiles, &mut joint, &place, call, plan);
            if comptime!(plan.joint) {
                sync_cube();
                add_queries::<E>(&joint, dq, plane, start, call, plan);
            }
            start += tile;
            token = comptime!(plan.tile) - token;
        }
    }
    let mut factors = Array::<f32>::new(comptime!(2 * plan.frags));
    let mut ones = Array::<f32>::new(comptime!(2 * plan.frags));
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        factors[row] = call.scale;
        ones[row] = 1.0f32;
    }
    write_rows::<E>(&rows.dk, &factors, dk, k_rows, first, call.lk, plan);
    write_rows::<E>(&rows.dv, &ones, dv, k_rows, first, call.lk, plan);
}

/// A plane's keys and values.
#[cube]
fn read_rows<E: Float>(
    k: &[E],
    v: &[E],
    padding: &[f32],
    kv_plane: u32,
    first: u32,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) -> Rows<E> {
    let k_rows = kv_plane as usize * call.lk as usize;
    let mut rows = Rows::<E> {
        k: load_rows::<E>(k, k_rows, first, call.lk, plan),
        v: load_rows::<E>(v, k_rows, first, call.lk, plan),
        hidden: Array::new(comptime!(2 * plan.frags)),
        dk: zeros(comptime!(plan.frags * plan.columns())),
        dv: zeros(comptime!(plan.frags * plan.columns())),
    };
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        rows.hidden[row] = 0.0f32;
        if comptime!(plan.mask.padding) {
            let j = first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
            let batch = kv_plane * call.group / call.heads;
            let from = batch as usize * call.lk as usize;
            rows.hidden[row] = padding[from + min(j, call.lk - 1) as usize];
        }
    }
    rows
}

/// Brings log-sum-exp and delta of a tile's queries, negated, into shared memory; past the last query what
/// makes every weight zero.
#[cube]
fn put_numbers<E: Float>(
    lse: &[f32],
    delta: &[f32],
    q_rows: usize,
    start: u32,
    call: &Call,
    tiles: &mut Tiles<E>,
    token: usize,
    #[comptime] plan: MatrixPlan,
) {
    let mut n = UNIT_POS;
    while n < comptime!(plan.tile as u32) {
        let i = start + n;
        let at = q_rows + min(i, call.lq - 1) as usize;
        tiles.lses[token + n as usize] = select(i < call.lq, lifted(-lse[at]), HIDDEN);
        tiles.deltas[token + n as usize] = -delta[at];
        n += comptime!(plan.units() as u32);
    }
}

/// Passes over a tile none of whose queries sees a key of the plane, and masks where not every one does.
#[cube]
fn choose<E: Float>(
    rows: &mut Rows<E>,
    tiles: &Tiles<E>,
    joint: &mut Joint<E>,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) {
    let mask = comptime!(plan.mask);
    let last = min(place.first + comptime!(plan.rows() as u32), call.lk) - 1;
    let last_query = min(place.start + comptime!(plan.tile as u32), call.lq) - 1;
    let sees =
        end_key(last_query, call, mask) > place.first && first_key(place.start, call, mask) <= last;
    if sees {
        if comptime!(mask.padding) {
            visit::<E>(rows, tiles, joint, place, call, plan, true);
        } else {
            let mut clear = end_key(place.start, call, mask) > last
                && first_key(last_query, call, mask) <= place.first;
            if comptime!(plan.joint) {
                // What lies past the last key is written nowhere, but must not add to the queries' gradients.
                clear = clear && place.first + comptime!(plan.rows() as u32) <= call.lk;
            }
            if clear {
                visit::<E>(rows, tiles, joint, place, call, plan, false);
            } else {
                visit::<E>(rows, tiles, joint, place, call, plan, true);
            }
        }
    } else if comptime!(plan.joint) {
        leave_nothing::<E>(joint, plan);
    }
}

/// Adds the share of a tile's queries.
#[cube]
fn visit<E: Float>(
    rows: &mut Rows<E>,
    tiles: &Tiles<E>,
    joint: &mut Joint<E>,
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
        let mut p = scores::<E>(&rows.k, &tiles.queries, across + offset, plan);
        let mut dp = less_delta::<E>(tiles, place, part, plan);
        add_scores::<E>(&rows.v, &tiles.douts, across + offset, &mut dp, plan);
        let mut weights = Sequence::<Operand<E>>::new();
        let mut gradients = Sequence::<Operand<E>>::new();
        #[unroll]
        for frag in 0..comptime!(plan.frags) {
            #[unroll]
            for n in 0..2usize {
                let column = comptime!(2 * part + n);
                let block = comptime!(2 * frag + n);
                weigh::<E>(
                    &*rows,
                    &mut p[block],
                    &mut dp[block],
                    frag,
                    column,
                    tiles,
                    place,
                    call,
                    plan,
                    masked,
                );
            }
            let block = comptime!(2 * frag);
            weights.push(as_left::<E>(&p[block], &p[comptime!(block + 1)]));
            gradients.push(as_left::<E>(&dp[block], &dp[comptime!(block + 1)]));
        }
        if comptime!(plan.joint) {
            leave::<E>(&gradients, joint, part, plan);
        }
        accumulate::<E>(&weights, &tiles.douts, along + offset, &mut rows.dv, plan);
        accumulate::<E>(
            &gradients,
            &tiles.queries,
            along + offset,
            &mut rows.dk,
            plan,
        );
    }
}

/// Turns the scores of block `column` of a tile's queries into weights, and `dP` into `dS`.
#[cube]
fn weigh<E: Float>(
    rows: &Rows<E>,
    score: &mut Sum,
    dp: &mut Sum,
    #[comptime] frag: usize,
    #[comptime] column: usize,
    tiles: &Tiles<E>,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[comptime] masked: bool,
) {
    let beyond = comptime!((column * COLUMNS) as u32) + UNIT_POS_PLANE % 4 * 2;
    let at = (place.token + beyond as usize) / 2;
    let lses = tiles.lses.as_vectorized().with_vector_size::<Const<2>>();
    let deltas = tiles.deltas.as_vectorized().with_vector_size::<Const<2>>();
    #[unroll]
    for r in 0..2usize {
        let row = comptime!(2 * frag + r);
        let j = place.first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
        let mut p = powers(score[r], exponent(call.scale), lses[at], plan);
        let mut weight = p;
        let mut g = dp[r];
        #[unroll]
        for n in 0..2usize {
            let i = place.start + beyond + comptime!(n as u32);
            if comptime!(masked) {
                let from = first_key(i, call, plan.mask);
                let width = max(end_key(i, call, plan.mask), from) - from;
                // Below `from` the difference wraps around.
                let mut seen = select(j - from < width, p.extract(n), 0.0f32);
                if comptime!(plan.mask.padding) {
                    seen = select(rows.hidden[row] == 0.0f32, seen, 0.0f32);
                }
                p.insert(n, seen);
                weight.insert(n, seen);
            }
            if comptime!(plan.mask.dropout) {
                let kept = kept(row_key(place.plane, i, call), column_key(j, call), call);
                weight.insert(n, weight.extract(n) * kept);
                g.insert(n, g.extract(n) * kept);
            }
        }
        score[r] = weight;
        if comptime!(plan.mask.dropout) {
            g += deltas[at];
        }
        dp[r] = p * g;
    }
}

/// What the `dP` of the sixteen queries `part` of a tile start from: `-delta`, unless dropout comes between.
#[cube]
fn less_delta<E: Float>(
    tiles: &Tiles<E>,
    place: &Place,
    #[comptime] part: usize,
    #[comptime] plan: MatrixPlan,
) -> Sequence<Sum> {
    let mut sums = zeros(comptime!(2 * plan.frags));
    if comptime!(!plan.mask.dropout) {
        let deltas = tiles.deltas.as_vectorized().with_vector_size::<Const<2>>();
        #[unroll]
        for block in 0..comptime!(2 * plan.frags) {
            let column = comptime!(2 * part + block % 2);
            let beyond = comptime!((column * COLUMNS) as u32) + UNIT_POS_PLANE % 4 * 2;
            let delta = deltas[(place.token + beyond as usize) / 2];
            let sum = &mut sums[block];
            sum[0] = delta;
            sum[1] = delta;
        }
    }
    sums
}
