//! What the kernels on matrix units share: blocks in registers, tiles of tokens in shared memory.
//!
//! One instruction adds a `16 x 16` block times a `16 x 8` block to a `16 x 8` block of f32. In each,
//! unit `n` of a plane holds pairs of neighbours in a row, of rows `n / 4` and `n / 4 + 8` and columns
//! `2 (n % 4)` on (in the right operand, rows and columns swapped). Two blocks of a result lie therefore
//! in registers just as the left operand of the next product does.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use crate::ops::flash_attention::cube::common::Mask;

// Units of a plane; columns of a product; a pair of neighbours; rows of a product, and its inner dimension.
pub(super) use mamba_ssm_linear::cube::fragment::{LANES as PLANE, NARROW as COLUMNS, Pair, SIDE};

/// Elements read from memory at once: 16 bytes.
pub(in super::super) const VECTOR: usize = 8;

/// Elements added to a token in shared memory, so that eight neighbours start in different banks.
const PAD: usize = 8;

pub(super) type Eight<E> = Vector<E, Const<8>>;

/// A `16 x 16` left operand (four pairs a unit), or a `16 x 8` right operand (two).
pub(super) type Operand<E> = Array<Pair<E>>;

/// A `16 x 8` sum: the pairs of a unit's two rows.
pub(super) type Sum = Array<Pair<f32>>;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct MatrixPlan {
    /// Features per head, a multiple of [`VECTOR`].
    pub(in super::super) dim: usize,
    /// Planes of a cube.
    pub(in super::super) planes: usize,
    /// Blocks of [`SIDE`] tokens of a plane.
    pub(in super::super) frags: usize,
    /// Tokens in shared memory at once, of each operand; a multiple of [`SIDE`].
    pub(in super::super) tile: usize,
    /// Tokens of a tile that the forward pass meets at once: more take more registers.
    pub(in super::super) at_once: usize,
    /// Whether the pass over keys finds the gradient of the queries as well.
    pub(in super::super) joint: bool,
    /// Whether weights are rounded to more than the eight bits of bf16, and have to be better.
    pub(in super::super) fine: bool,
    pub(in super::super) mask: Mask,
}

impl MatrixPlan {
    pub(in super::super) fn units(&self) -> usize {
        self.planes * PLANE
    }

    /// For a part of a tile alone.
    pub(super) fn part(&self) -> Self {
        Self {
            tile: self.at_once,
            ..*self
        }
    }

    /// For a cube's own tokens as one tile.
    pub(super) fn of_block(&self) -> Self {
        Self {
            tile: self.block(),
            ..*self
        }
    }

    /// Elements between two keys of `dS^T` in shared memory.
    pub(super) fn ds_stride(&self) -> usize {
        self.tile + PAD
    }

    /// Elements of shared memory for the cube's keys and for `dS^T`.
    pub(super) fn joint_sizes(&self) -> (usize, usize) {
        if self.joint {
            (self.of_block().size(), self.block() * self.ds_stride())
        } else {
            (VECTOR, VECTOR)
        }
    }

    /// Tokens of a plane.
    pub(super) fn rows(&self) -> usize {
        self.frags * SIDE
    }

    /// Tokens of a cube.
    pub(in super::super) fn block(&self) -> usize {
        self.planes * self.rows()
    }

    /// Blocks of [`SIDE`] features, the last perhaps half empty.
    pub(in super::super) fn steps(&self) -> usize {
        self.dim.div_ceil(SIDE)
    }

    /// Blocks of [`COLUMNS`] features.
    pub(super) fn columns(&self) -> usize {
        self.dim / COLUMNS
    }

    /// Blocks of [`COLUMNS`] tokens of a tile.
    pub(super) fn tile_columns(&self) -> usize {
        self.tile / COLUMNS
    }

    /// Elements between two tokens in shared memory.
    pub(super) fn stride(&self) -> usize {
        self.steps() * SIDE + PAD
    }

    /// Elements of a tile in shared memory.
    pub(super) fn size(&self) -> usize {
        self.tile * self.stride()
    }

    /// Vectors of a token.
    fn vectors(&self) -> usize {
        self.dim / VECTOR
    }

    /// Vectors of a tile that a unit carries.
    pub(super) fn shares(&self) -> usize {
        (self.tile * self.vectors()).div_ceil(self.units())
    }

    /// Whether the last share is a full one.
    fn is_even(&self) -> bool {
        (self.tile * self.vectors()).is_multiple_of(self.units())
    }

    /// Bytes of shared memory for two operands, each with the tile at work and the next, and two numbers
    /// per token.
    pub(in super::super) fn shared_bytes(&self) -> usize {
        let (keys, ds) = self.joint_sizes();
        4 * self.size() * 2 + 4 * self.tile * 4 + 2 * (keys + ds)
    }
}

/// Reads a unit's share of the `tile` tokens from `start` on; past the last of `length`, that one again
/// (its weight is zero). `plane` is the element at which the tokens begin. All reads are under way before
/// the first is needed.
#[cube]
pub(super) fn fetch<E: Float>(
    from: &[E],
    plane: usize,
    start: u32,
    length: u32,
    into: &mut Array<Eight<E>>,
    #[comptime] plan: MatrixPlan,
) {
    let from = from.as_vectorized().with_vector_size::<Const<8>>();
    let vectors = comptime!(plan.vectors());
    #[unroll]
    for share in 0..comptime!(plan.shares()) {
        let n = UNIT_POS as usize + comptime!(share * plan.units());
        let token = min(start + (n / vectors) as u32, length - 1) as usize;
        into[share] = from[plane / VECTOR + token * vectors + n % vectors];
    }
}

/// Writes what [`fetch`] read to shared memory, from element `at` on.
#[cube]
pub(super) fn put<E: Float>(
    values: &Array<Eight<E>>,
    into: &mut Shared<[E]>,
    at: usize,
    #[comptime] plan: MatrixPlan,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<Const<8>>();
    let vectors = comptime!(plan.vectors());
    #[unroll]
    for share in 0..comptime!(plan.shares()) {
        let n = UNIT_POS as usize + comptime!(share * plan.units());
        if comptime!(plan.is_even()) || n < comptime!(plan.tile * plan.vectors()) {
            let token = n / vectors * comptime!(plan.stride() / VECTOR);
            into[at / VECTOR + token + n % vectors] = values[share];
        }
    }
}

/// Zeroes what [`put`] leaves out of the last block of features of so many tokens.
#[cube]
pub(super) fn clear<E: Float>(
    into: &mut Shared<[E]>,
    #[comptime] tokens: usize,
    #[comptime] plan: MatrixPlan,
) {
    if comptime!(!plan.dim.is_multiple_of(SIDE)) {
        let into = into.as_vectorized_mut().with_vector_size_mut::<Const<8>>();
        let mut token = UNIT_POS as usize;
        while token < tokens {
            into[token * comptime!(plan.stride() / VECTOR) + comptime!(plan.vectors())] =
                Vector::new(E::from_int(0));
            token += comptime!(plan.units());
        }
    }
}

/// The `frags x steps` left operands of a plane's tokens from `first` on; past the last of `length`, that
/// one again (nothing of it is written). `plane` is the index of the first token.
#[cube]
pub(super) fn load_rows<E: Float>(
    from: &[E],
    plane: usize,
    first: u32,
    length: u32,
    #[comptime] plan: MatrixPlan,
) -> Sequence<Operand<E>> {
    let from = from.as_vectorized().with_vector_size::<Const<2>>();
    let mut rows = Sequence::<Operand<E>>::new();
    #[unroll]
    for n in 0..comptime!(plan.frags * plan.steps()) {
        let mut row = Operand::<E>::new(4usize);
        #[unroll]
        for part in 0..4usize {
            let frag = comptime!((n / plan.steps() * SIDE + part % 2 * 8) as u32);
            let feature = comptime!(n % plan.steps() * SIDE + part / 2 * COLUMNS);
            if comptime!(feature < plan.dim) {
                let token = min(first + frag + UNIT_POS_PLANE / 4, length - 1);
                let at = (plane + token as usize) * comptime!(plan.dim / 2)
                    + comptime!(feature / 2)
                    + (UNIT_POS_PLANE % 4) as usize;
                row[part] = from[at];
            } else {
                row[part] = Pair::<E>::new(E::from_int(0));
            }
        }
        rows.push(row);
    }
    rows
}

/// Zero.
#[cube]
pub(super) fn zeros(#[comptime] count: usize) -> Sequence<Sum> {
    let mut sums = Sequence::<Sum>::new();
    #[unroll]
    for _ in 0..count {
        let mut sum = Sum::new(2usize);
        sum[0] = Pair::<f32>::new(0.0f32);
        sum[1] = Pair::<f32>::new(0.0f32);
        sums.push(sum);
    }
    sums
}

/// Where a unit's part of [`load_across`] begins.
#[cube]
pub(super) fn across(#[comptime] plan: MatrixPlan) -> usize {
    let lane = UNIT_POS_PLANE as usize;
    (lane % 8 + lane / 16 * 8) * comptime!(plan.stride()) + lane / 8 % 2 * 8
}

/// Where a unit's part of [`load_along`] begins.
#[cube]
pub(super) fn along(#[comptime] plan: MatrixPlan) -> usize {
    let lane = UNIT_POS_PLANE as usize;
    lane % 16 * comptime!(plan.stride()) + lane / 16 * 8
}

/// Two right operands whose columns are sixteen tokens, and rows sixteen features.
#[cube]
pub(super) fn load_across<E: Float>(from: &Shared<[E]>, at: usize) -> Sequence<Operand<E>> {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let loaded =
        definition.load_matrix::<E, Const<2>>(&from[at..at + 8], MatrixIdent::B, 4usize, false);
    halves::<E>(&loaded)
}

/// Two right operands whose rows are sixteen tokens, and columns sixteen features.
#[cube]
pub(super) fn load_along<E: Float>(from: &Shared<[E]>, at: usize) -> Sequence<Operand<E>> {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let loaded =
        definition.load_matrix::<E, Const<2>>(&from[at..at + 8], MatrixIdent::B, 4usize, true);
    halves::<E>(&loaded)
}

#[cube]
fn halves<E: Float>(loaded: &Operand<E>) -> Sequence<Operand<E>> {
    let mut halves = Sequence::<Operand<E>>::new();
    #[unroll]
    for n in 0..2usize {
        let mut half = Operand::<E>::new(2usize);
        half[0] = loaded[comptime!(2 * n)];
        half[1] = loaded[comptime!(2 * n + 1)];
        halves.push(half);
    }
    halves
}

/// `sum += left right`.
#[cube]
pub(super) fn multiply<E: Float>(left: &Operand<E>, right: &Operand<E>, sum: &mut Sum) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    definition.execute_inplace(left, right, sum);
}

/// Two neighbouring blocks of a result as a left operand.
#[cube]
pub(super) fn as_left<E: Float>(one: &Sum, other: &Sum) -> Operand<E> {
    let mut left = Operand::<E>::new(4usize);
    left[0] = Pair::<E>::cast_from(one[0]);
    left[1] = Pair::<E>::cast_from(one[1]);
    left[2] = Pair::<E>::cast_from(other[0]);
    left[3] = Pair::<E>::cast_from(other[1]);
    left
}

/// Adds the products of a plane's rows (left operands) with sixteen tokens of a tile, from element `at` on:
/// `frags` times two blocks.
#[cube]
pub(super) fn add_scores<E: Float>(
    rows: &Sequence<Operand<E>>,
    tile: &Shared<[E]>,
    at: usize,
    sums: &mut Sequence<Sum>,
    #[comptime] plan: MatrixPlan,
) {
    #[unroll]
    for step in 0..comptime!(plan.steps()) {
        let rights = load_across::<E>(tile, at + comptime!(step * SIDE));
        #[unroll]
        for frag in 0..comptime!(plan.frags) {
            #[unroll]
            for n in 0..2usize {
                multiply::<E>(
                    &rows[comptime!(frag * plan.steps() + step)],
                    &rights[n],
                    &mut sums[comptime!(2 * frag + n)],
                );
            }
        }
    }
}

/// [`add_scores`] to zero.
#[cube]
pub(super) fn scores<E: Float>(
    rows: &Sequence<Operand<E>>,
    tile: &Shared<[E]>,
    at: usize,
    #[comptime] plan: MatrixPlan,
) -> Sequence<Sum> {
    let mut sums = zeros(comptime!(2 * plan.frags));
    add_scores::<E>(rows, tile, at, &mut sums, plan);
    sums
}

/// Adds to a plane's sums the products of `lefts`, one per block of its rows, with sixteen tokens of a
/// tile, from element `at` on.
#[cube]
pub(super) fn accumulate<E: Float>(
    lefts: &Sequence<Operand<E>>,
    tile: &Shared<[E]>,
    at: usize,
    sums: &mut Sequence<Sum>,
    #[comptime] plan: MatrixPlan,
) {
    #[unroll]
    for step in 0..comptime!(plan.steps()) {
        let rights = load_along::<E>(tile, at + comptime!(step * SIDE));
        #[unroll]
        for n in 0..2usize {
            let column = comptime!(2 * step + n);
            if comptime!(column < plan.columns()) {
                #[unroll]
                for frag in 0..comptime!(plan.frags) {
                    multiply::<E>(
                        &lefts[frag],
                        &rights[n],
                        &mut sums[comptime!(frag * plan.columns() + column)],
                    );
                }
            }
        }
    }
}

/// Writes a plane's sums times `factor` to its tokens from `first` on, those below `length`. `plane` is
/// the index of the first token.
#[cube]
pub(super) fn write_rows<E: Float>(
    sums: &Sequence<Sum>,
    factors: &Array<f32>,
    into: &mut [E],
    plane: usize,
    first: u32,
    length: u32,
    #[comptime] plan: MatrixPlan,
) {
    let into = into.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
    #[unroll]
    for row in 0..comptime!(2 * plan.frags) {
        let token = first + comptime!((row * 8) as u32) + UNIT_POS_PLANE / 4;
        if token < length {
            let at =
                (plane + token as usize) * comptime!(plan.dim / 2) + (UNIT_POS_PLANE % 4) as usize;
            let factor = Pair::<f32>::new(factors[row]);
            #[unroll]
            for column in 0..comptime!(plan.columns()) {
                let sum = &sums[comptime!(row / 2 * plan.columns() + column)];
                into[at + comptime!(4 * column)] =
                    Pair::<E>::cast_from(sum[comptime!(row % 2)] * factor);
            }
        }
    }
}

/// Octaves below and above one that [`power`] covers; what is less becomes `2^-BELOW`.
const BELOW: f32 = 114.0;
const ABOVE: f32 = 12.0;
const SPAN: f32 = BELOW + ABOVE;

/// `2^n` adds `n` to the exponent; adding this to a number leaves its nearest integer, less [`BELOW`], in
/// the last bits.
const ROUND: f32 = 12_582_912.0 - BELOW;

/// What [`power`] takes for `exp(scale x + shift)`: `x` times the first plus the second.
#[cube]
pub(super) fn exponent(scale: f32) -> f32 {
    scale * comptime!(std::f32::consts::LOG2_E / SPAN)
}

#[cube]
pub(super) fn lifted(shift: f32) -> f32 {
    fma(
        shift,
        comptime!(std::f32::consts::LOG2_E / SPAN),
        comptime!(BELOW / SPAN),
    )
}

#[cube]
fn power(x: f32, scale: f32, shift: f32, #[comptime] plan: MatrixPlan) -> f32 {
    let part = clamp(fma(x, scale, shift), 0.0f32, 1.0f32);
    let rounded = fma(part, SPAN, ROUND);
    let rest = fma(part, SPAN, ROUND - rounded);
    // Best approximations of 2^rest, relative errors at most 2^-13.7 and 2^-9.2.
    let mut p = 0.238_427_3f32.runtime();
    if comptime!(plan.fine) {
        p = fma(rest, 0.055_171_68f32, 0.242_611_16f32);
        p = fma(p, rest, 0.693_260_99f32);
        p = fma(p, rest, 0.999_928_07f32);
    } else {
        p = fma(p, rest, 0.703_445_9f32);
        p = fma(p, rest, 1.000_443_1f32);
    }
    f32::reinterpret((u32::reinterpret(rounded) << 23u32) + u32::reinterpret(p))
}

#[cube]
pub(super) fn powers(
    x: Pair<f32>,
    scale: f32,
    shift: Pair<f32>,
    #[comptime] plan: MatrixPlan,
) -> Pair<f32> {
    let mut y = x;
    #[unroll]
    for n in 0..2usize {
        y.insert(n, power(x.extract(n), scale, shift.extract(n), plan));
    }
    y
}
