//! The gradient of the queries in the pass over keys: `dQ = scale dS K`, so that scores are found again once,
//! not twice (`keys` without this, `queries`).
//!
//! A cube's planes leave `dS^T` of a tile of queries in shared memory, where the cube's keys lie too; each then
//! multiplies a block of 16 queries by 16 features over all the cube's keys, and adds the result to the queries'
//! sums in memory, f32, with atomic additions. Those come in no order, so the last bits of `dQ` differ from run
//! to run. `prepare` zeroes the sums, and finds the deltas; `finish` scales and rounds.
//!
//! A block's sums lie as its plane holds them, eight numbers of a unit 32 apart: an addition of a plane is 128
//! bytes without gaps.
//!
//! Bytes moved: the sums zeroed, read, and `length_k / (16 frags planes)` times added to, which the cache takes.

use cubecl::prelude::*;
use mamba_ssm_linear::cube::fragment;

use super::tiles::{
    COLUMNS, Eight, MatrixPlan, Operand, PLANE, Pair, SIDE, VECTOR, clear, fetch, put,
};
use crate::ops::flash_attention::cube::common::Call;

/// Numbers of a unit in a block of 16 queries by 16 features.
const SLOTS: usize = 8;

/// Units that share a row of [`prepare`].
pub(in super::super) const SHARERS: usize = 4;

/// What a cube needs for the gradient of the queries: its keys, and `dS^T` of a tile of queries.
#[derive(CubeType)]
pub(super) struct Joint<E: Float> {
    /// `[keys, features]`.
    keys: Shared<[E]>,
    /// `[keys, queries]`.
    ds: Shared<[E]>,
}

/// Numbers of the sums of a head's `lq` queries.
#[cube]
pub(in super::super) fn sums_of_head(lq: usize, #[comptime] plan: MatrixPlan) -> usize {
    lq.div_ceil(SIDE) * comptime!(plan.steps() * SLOTS * PLANE)
}

/// Brings a cube's keys in (where they are wanted), from `start` on; past the last, that one again (`dS` is zero
/// there).
#[cube]
pub(super) fn new_joint<E: Float>(
    k: &[E],
    k_rows: usize,
    start: u32,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) -> Joint<E> {
    let mut keys = Shared::<[E]>::new_aligned_slice(comptime!(plan.joint_sizes().0), 128usize);
    let ds = Shared::<[E]>::new_aligned_slice(comptime!(plan.joint_sizes().1), 128usize);
    if comptime!(plan.joint) {
        let all = comptime!(plan.of_block());
        let mut rows = Array::<Eight<E>>::new(comptime!(all.shares()));
        let from = k_rows * comptime!(plan.dim);
        fetch::<E>(k, from, start, call.lk, &mut rows, all);
        clear(&mut keys, comptime!(plan.block()), plan);
        put::<E>(&rows, &mut keys, 0usize, all);
    }
    Joint::<E> { keys, ds }
}

/// Where a plane's part of `dS^T` begins, in pairs.
#[cube]
fn own_place(#[comptime] plan: MatrixPlan) -> usize {
    let row = UNIT_POS as usize / PLANE * comptime!(plan.rows()) + fragment::own_row();
    row * comptime!(plan.ds_stride() / 2) + fragment::own_pair()
}

/// Leaves `dS^T` of a plane's keys and the sixteen queries `part` of a tile.
#[cube]
pub(super) fn leave<E: Float>(
    gradients: &Sequence<Operand<E>>,
    joint: &mut Joint<E>,
    #[comptime] part: usize,
    #[comptime] plan: MatrixPlan,
) {
    let to = own_place(plan);
    let ds = joint
        .ds
        .as_vectorized_mut()
        .with_vector_size_mut::<Const<2>>();
    #[unroll]
    for frag in 0..comptime!(plan.frags) {
        #[unroll]
        for n in 0..4usize {
            let row = comptime!((frag * SIDE + n % 2 * 8) * plan.ds_stride() / 2);
            let column = comptime!((part * SIDE + n / 2 * COLUMNS) / 2);
            ds[to + row + column] = gradients[frag][n];
        }
    }
}

/// Leaves zeros: no query of the tile sees the plane's keys.
#[cube]
pub(super) fn leave_nothing<E: Float>(joint: &mut Joint<E>, #[comptime] plan: MatrixPlan) {
    let mut nothing = Sequence::<Operand<E>>::new();
    #[unroll]
    for _ in 0..comptime!(plan.frags) {
        let mut zeros = Operand::<E>::new(4usize);
        #[unroll]
        for n in 0..4usize {
            zeros[n] = Pair::<E>::new(E::from_int(0));
        }
        nothing.push(zeros);
    }
    #[unroll]
    for part in 0..comptime!(plan.tile / SIDE) {
        leave::<E>(&nothing, joint, part, plan);
    }
}

/// Adds a tile's `dS K` over the cube's keys to the sums of its queries.
#[cube]
pub(super) fn add_queries<E: Float>(
    joint: &Joint<E>,
    dq: &[Atomic<f32>],
    head: u32,
    start: u32,
    call: &Call,
    #[comptime] plan: MatrixPlan,
) {
    let blocks = comptime!(plan.tile / SIDE);
    let mut task = UNIT_POS as usize / PLANE;
    while task < comptime!(plan.tile / SIDE * plan.steps()) {
        let (query, step) = (task % blocks * SIDE, task / blocks);
        if start + (query as u32) < call.lq {
            let mut sums = fragment::zero_sums(2usize);
            #[unroll]
            for n in 0..comptime!(plan.block() / SIDE) {
                let key = comptime!(n * SIDE);
                let left = fragment::left_transposed::<E>(
                    &joint.ds,
                    query,
                    key,
                    comptime!(plan.ds_stride()),
                );
                let right =
                    fragment::right::<E>(&joint.keys, key, step * SIDE, comptime!(plan.stride()));
                fragment::multiply::<E>(&left, &right, &mut sums, 0usize);
            }
            let block = (start as usize + query) / SIDE * comptime!(plan.steps()) + step;
            let to = head as usize * sums_of_head(call.lq as usize, plan)
                + block * comptime!(SLOTS * PLANE)
                + UNIT_POS_PLANE as usize;
            // The last block of features may be half empty.
            #[unroll]
            for n in 0..comptime!(if plan.columns() == 1 {
                SLOTS / 2
            } else {
                SLOTS
            }) {
                let value = sums[comptime!(n / 2)].extract(comptime!(n % 2));
                dq[to + comptime!(n * PLANE)].fetch_add(value);
            }
        }
        task += comptime!(plan.planes);
    }
}

/// Deltas, `delta[i] = dO[i] . O[i]`, and zeros where the queries' gradients will be summed. Four units to a row,
/// rows padded to whole blocks of a head.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(in super::super) fn prepare<E: Float>(
    out: &[E],
    dout: &[E],
    delta: &mut [f32],
    dq: &mut [f32],
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[define(E)] _dtype: ElemType,
) {
    let padded = (call.lq as usize).div_ceil(SIDE) * SIDE;
    let place = ABSOLUTE_POS / SHARERS;
    let head = place / padded;
    let i = place % padded;
    if head >= call.cubes as usize {
        terminate!();
    }
    let zeros = dq.as_vectorized_mut().with_vector_size_mut::<Const<4>>();
    #[unroll]
    for n in 0..comptime!(plan.steps()) {
        zeros[ABSOLUTE_POS + n * call.cubes as usize * padded * SHARERS] = Vector::new(0.0f32);
    }
    let row = head * call.lq as usize + min(i, call.lq as usize - 1);
    let out = out.as_vectorized().with_vector_size::<Const<8>>();
    let dout = dout.as_vectorized().with_vector_size::<Const<8>>();
    let mut sum = Vector::<f32, Const<8>>::new(0.0f32);
    let mut n = UNIT_POS as usize % SHARERS;
    while n < comptime!(plan.dim / VECTOR) {
        let at = row * comptime!(plan.dim / VECTOR) + n;
        let one = Vector::<f32, Const<8>>::cast_from(out[at]);
        sum = fma(one, Vector::<f32, Const<8>>::cast_from(dout[at]), sum);
        n += SHARERS;
    }
    let mut total = 0.0f32;
    #[unroll]
    for n in 0..VECTOR {
        total += sum.extract(n);
    }
    total += plane_shuffle_xor(total, 1u32);
    total += plane_shuffle_xor(total, 2u32);
    if i < call.lq as usize && UNIT_POS as usize % SHARERS == 0 {
        delta[row] = total;
    }
}

/// The sums, scaled, as rows of the queries' gradients: a plane to a block of 16 queries by 16 features.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(in super::super) fn finish<E: Float>(
    sums: &[f32],
    dq: &mut [E],
    call: &Call,
    #[comptime] plan: MatrixPlan,
    #[define(E)] _dtype: ElemType,
) {
    let blocks = (call.lq as usize).div_ceil(SIDE);
    let place = ABSOLUTE_POS / PLANE;
    let step = place % comptime!(plan.steps());
    let block = place / comptime!(plan.steps()) % blocks;
    let head = place / comptime!(plan.steps()) / blocks;
    if head >= call.cubes as usize {
        terminate!();
    }
    let from = place * comptime!(SLOTS * PLANE) + UNIT_POS_PLANE as usize;
    let dq = dq.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    #[unroll]
    for n in 0..comptime!(SLOTS / 2) {
        let i = block * SIDE + fragment::own_row() + comptime!(n % 2 * 8);
        let feature = step * SIDE + comptime!(n / 2 * COLUMNS) + fragment::own_column();
        if i < call.lq as usize && feature < comptime!(plan.dim) {
            let mut pair = Pair::<f32>::new(sums[from + comptime!(2 * n * PLANE)]);
            pair.insert(1usize, sums[from + comptime!((2 * n + 1) * PLANE)]);
            let at = (head * call.lq as usize + i) * comptime!(plan.dim) + feature;
            dq[at / 2] = Pair::<E>::cast_from(pair * Pair::new(call.scale));
        }
    }
}
