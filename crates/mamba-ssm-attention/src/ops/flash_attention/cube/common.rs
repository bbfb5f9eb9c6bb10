//! What the kernels share: their arguments, the visible range, dropout.

use cubecl::prelude::*;

use crate::ops::cube::mix;
use crate::ops::flash_attention::dropout::{HALF_BITS, HALF_MASK, KEY_MASK, ROUNDS, SHIFT};

/// Features or keys read from shared memory at once.
pub(super) type Four = Vector<f32, Const<4>>;

/// A score no key can reach; finite, so that differences of two are not NaN.
pub(super) const HIDDEN: f32 = -1e30;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Features per head.
    pub(super) dim: usize,
    /// Units of a cube.
    pub(super) units: usize,
    /// Queries of a unit.
    pub(super) rows: usize,
    /// Keys, or queries in the pass over keys, in shared memory at once; a multiple of [`CHUNK`].
    pub(super) tile: usize,
    pub(super) mask: Mask,
}

/// What stands between a query and a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mask {
    pub(super) causal: bool,
    pub(super) window: bool,
    pub(super) padding: bool,
    pub(super) dropout: bool,
}

/// Keys whose scores a unit holds at once.
pub(super) const CHUNK: usize = 8;

impl Plan {
    /// Features of a head in groups of four.
    pub(super) fn fours(&self) -> usize {
        self.dim.div_ceil(4)
    }

    /// Features of a head, rounded up to groups of four.
    pub(super) fn wide(&self) -> usize {
        4 * self.fours()
    }

    /// Units of a cube.
    pub(super) fn units(&self) -> usize {
        self.units
    }

    /// Queries of a cube.
    pub(super) fn block(&self) -> usize {
        self.units * self.rows
    }
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Call {
    /// Number of cubes with work.
    pub(super) cubes: u32,
    /// Cubes per plane.
    pub(super) blocks: u32,
    pub(super) heads: u32,
    /// Query heads per key/value head.
    pub(super) group: u32,
    pub(super) lq: u32,
    pub(super) lk: u32,
    pub(super) window: u32,
    pub(super) scale: f32,
    pub(super) seed_row: u32,
    pub(super) seed_plane: u32,
    pub(super) seed_column: u32,
    pub(super) seed_columns: u32,
    pub(super) threshold: u32,
    /// What is kept of dropout is multiplied by this.
    pub(super) factor: f32,
}

/// First key that query `i` sees, padding aside.
#[cube]
pub(super) fn first_key(i: u32, call: &Call, #[comptime] mask: Mask) -> u32 {
    let mut first = 0u32;
    if comptime!(mask.window) {
        // One past the query's position, plus lq to stay above zero.
        let after = i + 1 + call.lk;
        let hidden = call.lq + call.window;
        if after > hidden {
            first = min(after - hidden, call.lk);
        }
    }
    first
}

/// One past the last key that query `i` sees, padding aside.
#[cube]
pub(super) fn end_key(i: u32, call: &Call, #[comptime] mask: Mask) -> u32 {
    let mut end = call.lk;
    if comptime!(mask.causal) {
        let after = i + 1 + call.lk;
        if after > call.lq {
            end = min(after - call.lq, call.lk);
        } else {
            end = 0u32;
        }
    } else if comptime!(mask.window) {
        let after = i + call.lk + call.window;
        if after > call.lq {
            end = min(after - call.lq, call.lk);
        } else {
            end = 0u32;
        }
    }
    end
}

/// First query that may see key `j` or a later one.
#[cube]
pub(super) fn first_query(j: u32, call: &Call, #[comptime] mask: Mask) -> u32 {
    let mut first = 0u32;
    if comptime!(mask.causal) {
        if j + call.lq > call.lk {
            first = j + call.lq - call.lk;
        }
    } else if comptime!(mask.window) {
        let position = j + call.lq + 1;
        let reach = call.lk + call.window;
        if position > reach {
            first = position - reach;
        }
    }
    first
}

/// One past the last query that may see key `j` or an earlier one.
#[cube]
pub(super) fn end_query(j: u32, call: &Call, #[comptime] mask: Mask) -> u32 {
    let mut end = call.lq;
    if comptime!(mask.window) {
        let position = j + call.lq + call.window;
        if position > call.lk {
            end = min(position - call.lk, call.lq);
        } else {
            end = 0u32;
        }
    }
    end
}

/// Dropout's key of a query.
#[cube]
pub(super) fn row_key(plane: u32, i: u32, call: &Call) -> u32 {
    mix(mix(i ^ call.seed_row) ^ mix(plane ^ call.seed_plane)) & KEY_MASK
}

/// Dropout's key of a key position.
#[cube]
pub(super) fn column_key(j: u32, call: &Call) -> u32 {
    mix(mix(j ^ call.seed_column) ^ call.seed_columns) & KEY_MASK
}

/// Factor of a probability by dropout.
#[cube]
pub(super) fn kept(row: u32, column: u32, call: &Call) -> f32 {
    let x = row ^ column;
    let mut left = x >> HALF_BITS;
    let mut right = x & HALF_MASK;
    #[unroll]
    for n in 0..4usize {
        let k = comptime!(ROUNDS[n]);
        let next = left ^ (((right * k) >> SHIFT) & HALF_MASK);
        left = right;
        right = next;
    }
    let hash = (left << HALF_BITS) | right;
    select(hash < call.threshold, call.factor, 0.0f32)
}

/// Copies `tile` tokens of a plane, from `start` on, into shared memory as f32 times `factor`; what
/// lies past the plane's end is zero.
#[cube]
pub(super) fn load<E: Float>(
    from: &[E],
    plane_start: usize,
    start: u32,
    length: u32,
    factor: f32,
    into: &mut Shared<[Four]>,
    #[comptime] plan: Plan,
) {
    let fours = comptime!(plan.fours());
    let mut n = UNIT_POS as usize;
    while n < comptime!(plan.tile * plan.fours()) {
        let token = start + (n / fours) as u32;
        let mut four = Four::new(0.0f32);
        if token < length {
            let feature = n % fours * 4;
            let base = plane_start + token as usize * comptime!(plan.dim) + feature;
            #[unroll]
            for lane in 0..4usize {
                if feature + lane < comptime!(plan.dim) {
                    four.insert(lane, f32::cast_from(from[base + lane]) * factor);
                }
            }
        }
        into[n] = four;
        n += comptime!(plan.units);
    }
}

/// Copies one token into registers as f32 times `factor`.
#[cube]
pub(super) fn load_token<E: Float>(
    from: &[E],
    start: usize,
    factor: f32,
    into: &mut Array<f32>,
    #[comptime] offset: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for c in 0..comptime!(plan.wide()) {
        if comptime!(c < plan.dim) {
            into[offset + c] = f32::cast_from(from[start + c]) * factor;
        } else {
            into[offset + c] = 0.0f32;
        }
    }
}

/// Product of a token in registers with one in shared memory.
#[cube]
pub(super) fn dot(
    a: &Array<f32>,
    b: &Shared<[Four]>,
    token: usize,
    #[comptime] offset: usize,
    #[comptime] plan: Plan,
) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for n in 0..comptime!(plan.fours()) {
        let four = b[token * comptime!(plan.fours()) + n];
        #[unroll]
        for lane in 0..4usize {
            sum = fma(a[offset + 4 * n + lane], four.extract(lane), sum);
        }
    }
    sum
}

/// Adds `weight` times a token in shared memory to one in registers.
#[cube]
pub(super) fn add(
    sum: &mut Array<f32>,
    weight: f32,
    b: &Shared<[Four]>,
    token: usize,
    #[comptime] offset: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for n in 0..comptime!(plan.fours()) {
        let four = b[token * comptime!(plan.fours()) + n];
        #[unroll]
        for lane in 0..4usize {
            let c = offset + 4 * n + lane;
            sum[c] = fma(weight, four.extract(lane), sum[c]);
        }
    }
}

/// Copies the padding of a tile of keys into shared memory, from `at` on; one past the last key.
#[cube]
pub(super) fn load_padding(
    padding: &[f32],
    padding_start: usize,
    start: u32,
    call: &Call,
    into: &mut Shared<[f32]>,
    at: usize,
    #[comptime] tile: usize,
    #[comptime] units: usize,
) {
    let mut n = UNIT_POS as usize;
    while n < tile {
        let mut hidden = 1.0f32;
        let j = start + n as u32;
        if j < call.lk {
            hidden = padding[padding_start + j as usize];
        }
        into[at + n] = hidden;
        n += units;
    }
}
