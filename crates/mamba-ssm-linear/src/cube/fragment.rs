//! Products in registers: the operands of matrix units as fragments, without a stage in shared memory.
//!
//! A product is `16 x 16` (left) times `16 x 8` (right), sums in f32. With `g = lane / 4` and `q = lane % 4`
//! a unit of a plane of 32 holds, in pairs of neighbouring columns,
//!
//! ```text
//! left    (g, 2q)  (g + 8, 2q)  (g, 2q + 8)  (g + 8, 2q + 8)       right, by columns  (2q, g)  (2q + 8, g)
//! sums    (g, 2q)  (g + 8, 2q)
//! ```
//!
//! so the sums of two neighbouring products are, rounded, the left operand of the next one.

use burn::tensor::DType;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::features::MmaConfig;
use cubecl::prelude::*;

use super::elem;

/// Two neighbouring numbers of a fragment.
pub type Pair<E> = Vector<E, Const<2>>;

/// Rows of a left operand, and the inner dimension.
pub const SIDE: usize = 16;

/// Units of a plane that share a fragment.
pub const LANES: usize = 32;

/// Columns of a right operand.
pub const NARROW: usize = 8;

/// Elements in 16 bytes: what a unit reads of a row of shared memory.
const ROW: usize = 8;

/// Whether the device multiplies fragments of a type.
pub fn has_fragments(client: &Client, dtype: DType) -> bool {
    if !matches!(dtype, DType::BF16 | DType::F16) {
        return false;
    }
    let properties = client.properties();
    let hardware = &properties.hardware;
    let (matmul, own) = (&properties.features.matmul, elem(dtype));
    let sums = elem(DType::F32);
    hardware.plane_size_min as usize == LANES
        && hardware.plane_size_max as usize == LANES
        && matmul.ldmatrix.contains(&own)
        && matmul.mma.contains(&MmaConfig {
            a_type: own,
            b_type: own,
            cd_type: sums,
            m: SIDE as u32,
            n: NARROW as u32,
            k: SIDE as u32,
        })
}

/// Four blocks of 8 x 8, of which the unit's own group of eight units points at one: its row starts at
/// `at`.
#[cube]
fn blocks<E: Float>(from: &Shared<[E]>, at: usize, #[comptime] transposed: bool) -> Array<Pair<E>> {
    let definition = MmaDefinition::<E, E, f32>::new(SIDE, NARROW, SIDE);
    definition.load_matrix::<E, Const<2>>(&from[at..at + ROW], MatrixIdent::A, 4usize, transposed)
}

/// The left operand at `(row, k)` of a tile `[rows, k]`.
#[cube]
pub fn left<E: Float>(
    tile: &Shared<[E]>,
    row: usize,
    k: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    blocks::<E>(tile, (row + lane % 16) * stride + k + lane / 16 * 8, false)
}

/// The left operand at `(row, k)` from a tile that lies as `[k, rows]`.
#[cube]
pub fn left_transposed<E: Float>(
    tile: &Shared<[E]>,
    row: usize,
    k: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (k + lane / 16 * 8 + lane % 8) * stride + row + lane / 8 % 2 * 8;
    blocks::<E>(tile, at, true)
}

/// Two right operands, at `(k, column)` and eight columns on, of a tile `[k, columns]`.
#[cube]
pub fn right<E: Float>(
    tile: &Shared<[E]>,
    k: usize,
    column: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    blocks::<E>(
        tile,
        (k + lane % 16) * stride + column + lane / 16 * 8,
        true,
    )
}

/// Two right operands, at `(k, column)` and eight columns on, from a tile that lies as `[columns, k]`.
#[cube]
pub fn right_transposed<E: Float>(
    tile: &Shared<[E]>,
    k: usize,
    column: usize,
    #[comptime] stride: usize,
) -> Array<Pair<E>> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (column + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8;
    blocks::<E>(tile, at, false)
}

/// `count` products' sums, all zero: two pairs each.
#[cube]
pub fn zero_sums(#[comptime] count: usize) -> Array<Pair<f32>> {
    let mut sums = Array::<Pair<f32>>::new(comptime!(2 * count));
    #[unroll]
    for n in 0..comptime!(2 * count) {
        sums[n] = Pair::<f32>::new(0.0f32);
    }
    sums
}

/// Adds the products of a left operand with two right ones to sums `to` and `to + 1`.
#[cube]
pub fn multiply<E: Float>(
    left: &Array<Pair<E>>,
    right: &Array<Pair<E>>,
    sums: &mut Array<Pair<f32>>,
    #[comptime] to: usize,
) {
    let definition = MmaDefinition::<E, E, f32>::new(SIDE, NARROW, SIDE);
    #[unroll]
    for half in 0..2usize {
        let mut operand = Array::<Pair<E>>::new(2usize);
        operand[0] = right[comptime!(2 * half)];
        operand[1] = right[comptime!(2 * half + 1)];
        let mut sum = Array::<Pair<f32>>::new(2usize);
        sum[0] = sums[comptime!(2 * (to + half))];
        sum[1] = sums[comptime!(2 * (to + half) + 1)];
        let sum = definition.execute(left, &operand, &sum);
        sums[comptime!(2 * (to + half))] = sum[0];
        sums[comptime!(2 * (to + half) + 1)] = sum[1];
    }
}

/// The row of the unit's first pairs in a fragment; the second pairs lie eight rows on.
#[cube]
pub fn own_row() -> usize {
    UNIT_POS_PLANE as usize / 4
}

/// The first column of the unit's pairs.
#[cube]
pub fn own_column() -> usize {
    UNIT_POS_PLANE as usize % 4 * 2
}

/// The unit's pair in a row of eight columns.
#[cube]
pub fn own_pair() -> usize {
    UNIT_POS_PLANE as usize % 4
}

/// Four neighbouring columns of two neighbouring blocks' sums: two neighbours in a row swap pairs, so that an
/// even unit has four of the first block and an odd one of the second, and a row's four units have whole
/// sectors of memory to write. They begin at [`four_column`].
#[cube]
pub fn four(first: Pair<f32>, second: Pair<f32>) -> Vector<f32, Const<4>> {
    let odd = UNIT_POS_PLANE % 2 == 1;
    let mut values = Vector::<f32, Const<4>>::new(0.0f32);
    #[unroll]
    for e in 0..2usize {
        let (one, other) = (first.extract(e), second.extract(e));
        let given = plane_shuffle_xor(select(odd, one, other), 1u32);
        values.insert(e, select(odd, given, one));
        values.insert(comptime!(e + 2), select(odd, other, given));
    }
    values
}

/// [`four`] of numbers of 16 bits: a pair is one word to pass on.
#[cube]
pub fn four_narrow<E: Float>(first: Pair<E>, second: Pair<E>) -> Vector<E, Const<4>> {
    let odd = UNIT_POS_PLANE % 2 == 1;
    let (one, other) = (u32::reinterpret(first), u32::reinterpret(second));
    let given = plane_shuffle_xor(select(odd, one, other), 1u32);
    let mut words = Vector::<u32, Const<2>>::new(0u32);
    words.insert(0usize, select(odd, given, one));
    words.insert(1usize, select(odd, other, given));
    Vector::<E, Const<4>>::reinterpret(words)
}

/// Where in two blocks the unit's [`four`] columns begin.
#[cube]
pub fn four_column() -> usize {
    let odd = UNIT_POS_PLANE % 2 == 1;
    select(odd, own_column() + comptime!(NARROW - 2), own_column())
}
