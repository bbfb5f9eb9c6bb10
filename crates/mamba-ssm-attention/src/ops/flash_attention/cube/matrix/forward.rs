//! Forward on matrix units: `S = Q K^T`, an online softmax over the keys, `O = P V`.
//!
//! A cube of `planes` planes owns `16 frags planes` queries of a head, a plane `16 frags` of them: their
//! queries and sums stay in its registers. Keys and values pass through shared memory, `tile` tokens at a
//! time, the next tile's reads under way while this one is at work; the scores become the left operand of
//! the second product without leaving the registers. A tile that every query of a plane sees takes a path
//! without masks, and one that none sees is passed over.
//!
//! Bytes moved: queries and output once, keys and values once per cube, i.e. `length_q / (16 frags planes)`
//! times (from the second time on mostly out of the cache).

use cubecl::prelude::*;

use super::tiles::{
    COLUMNS, Eight, MatrixPlan, Operand, PLANE, Pair, SIDE, Sum, accumulate, across, along,
    as_left, clear, exponent, fetch, lifted, load_rows, multiply, powers, put, scores, write_rows,
    zeros,
};
use crate::ops::flash_attention::cube::common::{
    Call, HIDDEN, column_key, end_key, first_key, kept, load_padding, row_key,
};

/// How far scores may lie above what they are measured from: weights stay below `e^8`, which every half
/// precision holds, and the sums of as many as there are keys well inside f32.
const NEAR: f32 = 8.0;

/// State of the online softmax of a plane's queries; of each block a unit has two rows.
#[derive(CubeType)]
struct Rows {
    out: Sequence<Sum>,
    top: Array<f32>,
    /// Of the weights, by block: in every column the same.
    sum: Sequence<Sum>,
}

/// Where a plane stands.
#[derive(CubeType)]
pub(super) struct Place {
    /// Index of the head's plane of queries.
    pub(super) plane: u32,
    /// First token that the plane of units owns.
    pub(super) first: u32,
    /// First token of the tile, and where the tile lies in shared memory.
    pub(super) start: u32,
    pub(super) token: usize,
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(in super::super) fn forward_matrix<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    padding: &[f32],
    out: &mut [E],
    lse: &mut [f32],
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

    let queries = load_rows::<E>(q, q_rows, first, call.lq, plan);
    let mut rows = Rows {
        out: zeros(comptime!(plan.frags * plan.columns())),
        top: Array::new(comptime!(2 * plan.frags)),
        sum: zeros(plan.frags),
    };
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        rows.top[row] = HIDDEN;
    }

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
        for part in 0..comptime!((plan.tile / plan.at_once) as u32) {
            let beyond = part * comptime!(plan.at_once as u32);
            let place = Place {
                plane,
                first,
                start: start + beyond,
                token: token + beyond as usize,
            };
            let end = place.start + comptime!(plan.at_once as u32);
            let plan = comptime!(plan.part());
            if place.start < sees_to && end > sees_from {
                if comptime!(mask.padding) {
                    visit::<E>(
                        &queries, &mut rows, &keys, &values, &hidden, &place, call, plan, true,
                    );
                } else if place.start >= clear_from && end <= clear_to {
                    visit::<E>(
                        &queries, &mut rows, &keys, &values, &hidden, &place, call, plan, false,
                    );
                } else {
                    visit::<E>(
                        &queries, &mut rows, &keys, &values, &hidden, &place, call, plan, true,
                    );
                }
            }
        }
        start += tile;
        token = comptime!(plan.tile) - token;
    }

    let mut shares = Array::<f32>::new(comptime!(2 * plan.frags));
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        let sums = &rows.sum[comptime!(row / 2)];
        let sum = sums[comptime!(row % 2)].extract(0usize);
        let empty = sum == 0.0f32;
        let sum = select(empty, 1.0f32, sum);
        shares[row] = select(empty, 0.0f32, 1.0f32 / sum);
        let i = first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
        if i < call.lq && UNIT_POS_PLANE % 4 == 0 {
            lse[q_rows + i as usize] =
                select(empty, -HIDDEN, rows.top[row] * call.scale + sum.ln());
        }
    }
    write_rows::<E>(&rows.out, &shares, out, q_rows, first, call.lq, plan);
}

/// Brings a plane's queries up to date with the keys of a tile.
#[cube]
fn visit<E: Float>(
    queries: &Sequence<Operand<E>>,
    rows: &mut Rows,
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
    // Of sixteen keys after another: `frags` times two blocks.
    let mut blocks = Sequence::<Sum>::new();
    #[unroll]
    for part in 0..comptime!(plan.tile / SIDE) {
        let at = across + comptime!(part * SIDE * plan.stride());
        let sums = scores::<E>(queries, keys, at, plan);
        #[unroll]
        for n in 0..comptime!(2 * plan.frags) {
            let mut sum = Sum::new(2usize);
            #[unroll]
            for r in 0..2usize {
                sum[r] = sums[n][r];
            }
            blocks.push(sum);
        }
    }
    if comptime!(masked) {
        #[unroll]
        for row in 0..comptime!(2 * plan.frags) {
            hide(&mut blocks, row, hidden, place, call, plan);
        }
    }
    raise(&blocks, rows, call, plan);
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        weigh(&mut blocks, row, rows, call, plan, masked);
    }
    if comptime!(plan.mask.dropout) {
        // What is dropped counts in the sums.
        #[unroll]
        for part in 0..comptime!(plan.tile / SIDE) {
            add_up::<E>(&lefts::<E>(&blocks, part, plan), &mut rows.sum, plan);
        }
        #[unroll]
        for row in 0..comptime!(2 * plan.frags) {
            drop_some(&mut blocks, row, place, call, plan);
        }
    }
    let along = from + along(plan);
    #[unroll]
    for part in 0..comptime!(plan.tile / SIDE) {
        let lefts = lefts::<E>(&blocks, part, plan);
        if comptime!(!plan.mask.dropout) {
            add_up::<E>(&lefts, &mut rows.sum, plan);
        }
        let at = along + comptime!(part * SIDE * plan.stride());
        accumulate::<E>(&lefts, values, at, &mut rows.out, plan);
    }
}

/// The weights of sixteen keys as left operands, by block of queries.
#[cube]
fn lefts<E: Float>(
    blocks: &Sequence<Sum>,
    #[comptime] part: usize,
    #[comptime] plan: MatrixPlan,
) -> Sequence<Operand<E>> {
    let mut lefts = Sequence::<Operand<E>>::new();
    #[unroll]
    for frag in 0..comptime!(plan.frags) {
        let n = comptime!(2 * (part * plan.frags + frag));
        lefts.push(as_left::<E>(&blocks[n], &blocks[comptime!(n + 1)]));
    }
    lefts
}

/// Adds the weights of sixteen keys to the sums: a product with ones, since matrix units have time to spare
/// and the others have not.
#[cube]
fn add_up<E: Float>(
    lefts: &Sequence<Operand<E>>,
    sums: &mut Sequence<Sum>,
    #[comptime] plan: MatrixPlan,
) {
    let mut ones = Operand::<E>::new(2usize);
    ones[0] = Pair::<E>::new(E::from_int(1));
    ones[1] = Pair::<E>::new(E::from_int(1));
    #[unroll]
    for frag in 0..comptime!(plan.frags) {
        multiply::<E>(&lefts[frag], &ones, &mut sums[frag]);
    }
}

/// The block of a tile's scores with row `row` of a unit and block `column` of eight keys.
fn block_at(plan: MatrixPlan, row: usize, column: usize) -> usize {
    2 * (column / 2 * plan.frags + row / 2) + column % 2
}

/// Hides the keys that a query does not see.
#[cube]
fn hide(
    blocks: &mut Sequence<Sum>,
    #[comptime] row: usize,
    hidden: &Shared<[f32]>,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) {
    let i = place.first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
    let from = first_key(i, call, plan.mask);
    let width = max(end_key(i, call, plan.mask), from) - from;
    #[unroll]
    for column in 0..comptime!(plan.tile_columns()) {
        let offset = comptime!((column * COLUMNS) as u32) + UNIT_POS_PLANE % 4 * 2;
        let block = &mut blocks[comptime!(block_at(plan, row, column))];
        let mut pair = block[comptime!(row % 2)];
        #[unroll]
        for n in 0..2usize {
            // Below `from` the difference wraps around.
            let j = offset + comptime!(n as u32);
            let mut score = select(place.start + j - from < width, pair.extract(n), HIDDEN);
            if comptime!(plan.mask.padding) {
                score = select(hidden[place.token + j as usize] == 0.0f32, score, HIDDEN);
            }
            pair.insert(n, score);
        }
        block[comptime!(row % 2)] = pair;
    }
}

/// Keeps what scores are measured from (the highest so far, or what was highest once, while that is near
/// enough) and, where it rises, rescales what was summed before.
#[cube]
fn raise(blocks: &Sequence<Sum>, rows: &mut Rows, call: &Call, #[comptime] plan: MatrixPlan) {
    let mut tops = Array::<f32>::new(comptime!(2 * plan.frags));
    let mut farthest = 0.0f32;
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        let mut top = rows.top[row];
        #[unroll]
        for column in 0..comptime!(plan.tile_columns()) {
            let block = &blocks[comptime!(block_at(plan, row, column))];
            let pair = block[comptime!(row % 2)];
            top = max(top, max(pair.extract(0usize), pair.extract(1usize)));
        }
        // A row is shared by four neighbours.
        top = max(top, plane_shuffle_xor(top, 1u32));
        top = max(top, plane_shuffle_xor(top, 2u32));
        farthest = max(farthest, top - rows.top[row]);
        tops[row] = top;
    }
    // Seldom past the first tile; planes branch as one.
    if plane_any(farthest * call.scale > NEAR) {
        #[unroll]
        for row in 0..comptime!(2 * plan.frags) {
            let rescale = ((rows.top[row] - tops[row]) * call.scale).exp();
            rows.top[row] = tops[row];
            let rescale = Pair::<f32>::new(rescale);
            let sum = &mut rows.sum[comptime!(row / 2)];
            sum[comptime!(row % 2)] = sum[comptime!(row % 2)] * rescale;
            #[unroll]
            for column in 0..comptime!(plan.columns()) {
                let out = &mut rows.out[comptime!(row / 2 * plan.columns() + column)];
                out[comptime!(row % 2)] = out[comptime!(row % 2)] * rescale;
            }
        }
    }
}

/// Turns a query's scores of a tile into weights.
#[cube]
fn weigh(
    blocks: &mut Sequence<Sum>,
    #[comptime] row: usize,
    rows: &mut Rows,
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[comptime] masked: bool,
) {
    let scale = exponent(call.scale);
    let shift = Pair::<f32>::new(lifted(-rows.top[row] * call.scale));
    #[unroll]
    for column in 0..comptime!(plan.tile_columns()) {
        let block = &mut blocks[comptime!(block_at(plan, row, column))];
        let pair = block[comptime!(row % 2)];
        let mut weights = powers(pair, scale, shift, plan);
        if comptime!(masked) {
            // While nothing has been seen, the hidden score is what scores are measured from.
            #[unroll]
            for n in 0..2usize {
                let seen = pair.extract(n) > HIDDEN;
                weights.insert(n, select(seen, weights.extract(n), 0.0f32));
            }
        }
        block[comptime!(row % 2)] = weights;
    }
}

/// Dropout of a query's weights.
#[cube]
fn drop_some(
    blocks: &mut Sequence<Sum>,
    #[comptime] row: usize,
    place: &Place,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) {
    let i = place.first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
    let key = row_key(place.plane, i, call);
    #[unroll]
    for column in 0..comptime!(plan.tile_columns()) {
        let j = place.start + comptime!((column * COLUMNS) as u32) + UNIT_POS_PLANE % 4 * 2;
        let block = &mut blocks[comptime!(block_at(plan, row, column))];
        let mut pair = block[comptime!(row % 2)];
        #[unroll]
        for n in 0..2usize {
            let kept = kept(key, column_key(j + comptime!(n as u32), call), call);
            pair.insert(n, pair.extract(n) * kept);
        }
        block[comptime!(row % 2)] = pair;
    }
}
