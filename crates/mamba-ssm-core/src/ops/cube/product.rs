//! Products of tiles in shared memory.
//!
//! `out = a b` (or `out += a b`), f32 sums, for one or several pairs of tiles. On matrix units a plane
//! owns blocks of 16 x 16; else a unit owns single elements.

use cubecl::cmma::{Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::{SIDE, Team};

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lie {
    /// Between rows; between columns where transposed.
    pub(crate) stride: usize,
    pub(crate) transposed: bool,
    /// Between the matrices of a batch.
    pub(crate) batch: usize,
}

impl Lie {
    pub(crate) fn rows(stride: usize) -> Self {
        Self {
            stride,
            transposed: false,
            batch: 0,
        }
    }

    pub(crate) fn transposed(stride: usize) -> Self {
        Self {
            stride,
            transposed: true,
            batch: 0,
        }
    }

    pub(crate) fn batched(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    fn layout(&self) -> MatrixLayout {
        if self.transposed {
            MatrixLayout::ColMajor
        } else {
            MatrixLayout::RowMajor
        }
    }
}

/// What of the left operand is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    All,
    /// Columns up to the row's.
    Lower,
    /// Columns from the row's on.
    Upper,
}

/// A product; sizes in multiples of [`SIDE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) batch: usize,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Lie,
    pub(crate) b: Lie,
    pub(crate) out: Lie,
    pub(crate) part: Part,
    /// Whether to add to what `out` holds.
    pub(crate) add: bool,
}

impl Product {
    fn columns(&self) -> usize {
        self.n / SIDE
    }

    fn blocks(&self) -> usize {
        self.m / SIDE * self.columns()
    }

    /// Whether the blocks of every plane lie in one column, so that a plane reads the right operand once
    /// for all of them.
    fn in_strips(&self, team: Team) -> bool {
        self.batch == 1
            && team.planes.is_multiple_of(self.columns())
            && self.blocks().is_multiple_of(team.planes)
    }
}

/// Where element `(row, column)` of a matrix lies.
#[cube]
fn at(batch: usize, row: usize, column: usize, #[comptime] lie: Lie) -> usize {
    let start = batch * comptime!(lie.batch);
    if comptime!(lie.transposed) {
        start + column * comptime!(lie.stride) + row
    } else {
        start + row * comptime!(lie.stride) + column
    }
}

/// Computes it, operands from matrix `first` of the batch on, results from the first. The caller
/// synchronises before and after.
#[cube]
pub(crate) fn product<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    out: &mut Shared<[f32]>,
    first: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    if comptime!(team.matrix) {
        product_matrix::<E>(a, b, out, first, p, team);
    } else {
        product_plain::<E>(a, b, out, first, p, team);
    }
}

/// The first and one past the last block of the inner dimension that block row `i` needs.
#[cube]
fn inner_from(i: usize, #[comptime] part: Part) -> usize {
    let mut from = 0usize;
    if comptime!(part == Part::Upper) {
        from = i;
    }
    from
}

#[cube]
fn inner_to(i: usize, #[comptime] k: usize, #[comptime] part: Part) -> usize {
    let mut to = comptime!(k).runtime();
    if comptime!(part == Part::Lower) {
        to = i + 1;
    }
    to
}

#[cube]
fn multiply<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    sum: &Matrix<f32>,
    batch: usize,
    i: usize,
    j: usize,
    #[comptime] p: Product,
) {
    let a_len = a.len();
    let b_len = b.len();
    let from = inner_from(i, p.part);
    let to = inner_to(i, comptime!(p.k / SIDE), p.part);
    for k in from..to {
        let left = at(batch, i * SIDE, k * SIDE, p.a);
        let right = at(batch, k * SIDE, j * SIDE, p.b);
        let left = Matrix::<E>::from_slice(
            MatrixIdent::A,
            SIDE,
            SIDE,
            SIDE,
            comptime!(p.a.layout()),
            &a[left..a_len],
            comptime!(p.a.stride as u32).runtime(),
        );
        let right = Matrix::<E>::from_slice(
            MatrixIdent::B,
            SIDE,
            SIDE,
            SIDE,
            comptime!(p.b.layout()),
            &b[right..b_len],
            comptime!(p.b.stride as u32).runtime(),
        );
        cubecl::cmma::execute(&left, &right, sum, sum);
    }
}

#[cube]
fn product_matrix<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    out: &mut Shared<[f32]>,
    first: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    if comptime!(p.in_strips(team)) {
        let mut sum = new_sum(p, team);
        if comptime!(p.add) {
            load_sum(&mut sum, &*out, p, team);
        }
        add_strips::<E>(a, b, &sum, first, p, team);
        store_sum(&sum, out, p, team);
    } else {
        product_blocks::<E>(a, b, out, first, p, team);
    }
}

#[cube]
fn product_blocks<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    out: &mut Shared<[f32]>,
    first: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let out_len = out.len();
    let mut block = UNIT_POS as usize / PLANE_DIM as usize;
    while block < comptime!(p.batch * p.blocks()) {
        let batch = block / comptime!(p.blocks());
        let rest = block % comptime!(p.blocks());
        let i = rest / comptime!(p.columns());
        let j = rest % comptime!(p.columns());
        let place = at(batch, i * SIDE, j * SIDE, p.out);
        let mut sum = Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            SIDE,
            SIDE,
            SIDE,
            MatrixLayout::Undefined,
            0.0f32,
        );
        if comptime!(p.add) {
            cubecl::cmma::load_with_layout(
                &mut sum,
                &out[place..out_len],
                comptime!(p.out.stride as u32).runtime(),
                MatrixLayout::RowMajor,
            );
        }
        multiply::<E>(a, b, &sum, first + batch, i, j, p);
        cubecl::cmma::store(
            &mut out[place..out_len],
            &sum,
            comptime!(p.out.stride as u32).runtime(),
            MatrixLayout::RowMajor,
        );
        block += comptime!(team.planes);
    }
}

#[cube]
fn product_plain<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    out: &mut Shared<[f32]>,
    first: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let mut n = UNIT_POS as usize;
    while n < comptime!(p.batch * p.m * p.n) {
        let batch = n / comptime!(p.m * p.n);
        let i = n / comptime!(p.n) % comptime!(p.m);
        let j = n % comptime!(p.n);
        let place = at(batch, i, j, p.out);
        let mut sum = 0.0f32;
        if comptime!(p.add) {
            sum = out[place];
        }
        out[place] = sum + plain_dot::<E>(a, b, first + batch, i, j, p);
        n += comptime!(team.units);
    }
}

#[cube]
fn plain_dot<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    batch: usize,
    i: usize,
    j: usize,
    #[comptime] p: Product,
) -> f32 {
    let mut sum = 0.0f32;
    let from = inner_from(i, p.part);
    let to = inner_to(i, comptime!(p.k), p.part);
    for k in from..to {
        let left = f32::cast_from(a[at(batch, i, k, p.a)]);
        let right = f32::cast_from(b[at(batch, k, j, p.b)]);
        sum = fma(left, right, sum);
    }
    sum
}

/// A sum of products that stays with the units: on matrix units in fragments, else in registers.
#[derive(CubeType)]
pub(crate) struct Sum {
    fragments: Sequence<Matrix<f32>>,
    numbers: Array<f32>,
}

/// Blocks, or elements, of a sum that one plane, or unit, owns.
fn shares(p: Product, team: Team) -> usize {
    if team.matrix {
        p.blocks().div_ceil(team.planes)
    } else {
        (p.m * p.n).div_ceil(team.units)
    }
}

/// Zero.
#[cube]
pub(crate) fn new_sum(#[comptime] p: Product, #[comptime] team: Team) -> Sum {
    let fragments = Sequence::<Matrix<f32>>::new();
    let numbers = Array::<f32>::new(comptime!(if team.matrix { 1 } else { shares(p, team) }));
    let mut sum = Sum { fragments, numbers };
    if comptime!(team.matrix) {
        #[unroll]
        for _ in 0..comptime!(shares(p, team)) {
            sum.fragments.push(Matrix::<f32>::from_value(
                MatrixIdent::Accumulator,
                SIDE,
                SIDE,
                SIDE,
                MatrixLayout::Undefined,
                0.0f32,
            ));
        }
    } else {
        for n in 0..comptime!(shares(p, team)) {
            sum.numbers[n] = 0.0f32;
        }
    }
    sum
}

/// What a tile holds, as a sum of blocks in strips.
#[cube]
fn load_sum(sum: &mut Sum, out: &Shared<[f32]>, #[comptime] p: Product, #[comptime] team: Team) {
    let out_len = out.len();
    let plane = UNIT_POS as usize / PLANE_DIM as usize;
    #[unroll]
    for n in 0..comptime!(shares(p, team)) {
        let block = plane + comptime!(n * team.planes);
        let i = block / comptime!(p.columns());
        let j = block % comptime!(p.columns());
        let place = at(0usize, i * SIDE, j * SIDE, p.out);
        cubecl::cmma::load_with_layout(
            &mut sum.fragments[n],
            &out[place..out_len],
            comptime!(p.out.stride as u32).runtime(),
            MatrixLayout::RowMajor,
        );
    }
}

/// Adds a product to a sum whose planes own blocks of one column each.
#[cube]
fn add_strips<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    sum: &Sum,
    first: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let a_len = a.len();
    let b_len = b.len();
    let plane = UNIT_POS as usize / PLANE_DIM as usize;
    let j = plane % comptime!(p.columns());
    let top = plane / comptime!(p.columns());
    for k in 0..comptime!(p.k / SIDE) {
        let right = at(first, k * SIDE, j * SIDE, p.b);
        let right = Matrix::<E>::from_slice(
            MatrixIdent::B,
            SIDE,
            SIDE,
            SIDE,
            comptime!(p.b.layout()),
            &b[right..b_len],
            comptime!(p.b.stride as u32).runtime(),
        );
        #[unroll]
        for n in 0..comptime!(shares(p, team)) {
            let i = top + comptime!(n * team.planes / p.columns());
            if k >= inner_from(i, p.part) && k < inner_to(i, comptime!(p.k / SIDE), p.part) {
                let left = at(first, i * SIDE, k * SIDE, p.a);
                let left = Matrix::<E>::from_slice(
                    MatrixIdent::A,
                    SIDE,
                    SIDE,
                    SIDE,
                    comptime!(p.a.layout()),
                    &a[left..a_len],
                    comptime!(p.a.stride as u32).runtime(),
                );
                cubecl::cmma::execute(&left, &right, &sum.fragments[n], &sum.fragments[n]);
            }
        }
    }
}

/// Adds a product to a sum.
#[cube]
pub(crate) fn add_product<E: Float>(
    a: &Shared<[E]>,
    b: &Shared<[E]>,
    sum: &mut Sum,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    if comptime!(team.matrix && p.in_strips(team)) {
        add_strips::<E>(a, b, &*sum, 0usize, p, team);
    } else if comptime!(team.matrix) {
        let plane = UNIT_POS as usize / PLANE_DIM as usize;
        #[unroll]
        for n in 0..comptime!(shares(p, team)) {
            let block = plane + comptime!(n * team.planes);
            if block < comptime!(p.blocks()) {
                let i = block / comptime!(p.columns());
                let j = block % comptime!(p.columns());
                multiply::<E>(a, b, &sum.fragments[n], 0usize, i, j, p);
            }
        }
    } else {
        for n in 0..comptime!(shares(p, team)) {
            let place = UNIT_POS as usize + n * comptime!(team.units);
            if place < comptime!(p.m * p.n) {
                let i = place / comptime!(p.n);
                let j = place % comptime!(p.n);
                sum.numbers[n] += plain_dot::<E>(a, b, 0usize, i, j, p);
            }
        }
    }
}

/// Writes a sum to shared memory.
#[cube]
pub(crate) fn store_sum(
    sum: &Sum,
    out: &mut Shared<[f32]>,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let out_len = out.len();
    if comptime!(team.matrix) {
        let plane = UNIT_POS as usize / PLANE_DIM as usize;
        #[unroll]
        for n in 0..comptime!(shares(p, team)) {
            let block = plane + comptime!(n * team.planes);
            if block < comptime!(p.blocks()) {
                let i = block / comptime!(p.columns());
                let j = block % comptime!(p.columns());
                let place = at(0usize, i * SIDE, j * SIDE, p.out);
                cubecl::cmma::store(
                    &mut out[place..out_len],
                    &sum.fragments[n],
                    comptime!(p.out.stride as u32).runtime(),
                    MatrixLayout::RowMajor,
                );
            }
        }
    } else {
        for n in 0..comptime!(shares(p, team)) {
            let place = UNIT_POS as usize + n * comptime!(team.units);
            if place < comptime!(p.m * p.n) {
                let i = place / comptime!(p.n);
                let j = place % comptime!(p.n);
                out[at(0usize, i, j, p.out)] = sum.numbers[n];
            }
        }
    }
}
