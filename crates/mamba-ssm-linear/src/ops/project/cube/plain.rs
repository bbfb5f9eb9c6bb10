//! Kernels in plain arithmetic, for every device and for f32: f32 products and sums.
//!
//! A unit owns a block of [`ROWS`] x [`COLUMNS`] sums in registers. Tiles lie in shared memory with the
//! inner dimension outermost, so that a unit reads its rows and columns side by side.

use cubecl::prelude::*;

use super::common::{Tile, fetch, put_f32};
use super::matrix::{OuterCall, ProductCall};

/// Rows of a unit.
pub(super) const ROWS: usize = 8;
/// Columns of a unit.
pub(super) const COLUMNS: usize = 4;
/// Steps of the inner dimension in shared memory at once.
pub(super) const DEPTH: usize = 16;

/// Numbers read at once from shared memory, and added to a row of it.
const FOUR: usize = 4;
type Four = Vector<f32, Const<4>>;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PlainPlan {
    /// Units side by side over rows and columns.
    pub(super) units_m: usize,
    pub(super) units_n: usize,
    /// Elements read at once, of the left and right operand, and written at once (at most four).
    pub(super) vectors: [usize; 3],
    /// Whether the right operand is given as its transpose.
    pub(super) transposed: bool,
    /// Whether there is a bias, to add or to differentiate.
    pub(super) bias: bool,
}

impl PlainPlan {
    pub(super) fn units(&self) -> usize {
        self.units_m * self.units_n
    }

    pub(super) fn tile_m(&self) -> usize {
        self.units_m * ROWS
    }

    pub(super) fn tile_n(&self) -> usize {
        self.units_n * COLUMNS
    }

    /// Numbers between two steps of the inner dimension in shared memory.
    fn stride_m(&self) -> usize {
        self.tile_m() + FOUR
    }

    fn stride_n(&self) -> usize {
        self.tile_n() + FOUR
    }

    fn tile(&self, rows: usize, columns: usize, stride: usize, vector: usize) -> Tile {
        Tile {
            rows,
            columns,
            stride,
            vector,
            units: self.units(),
        }
    }

    fn left(&self) -> Tile {
        self.tile(self.tile_m(), DEPTH, self.stride_m(), self.vectors[0])
    }

    fn left_by_rows(&self) -> Tile {
        self.tile(DEPTH, self.tile_m(), self.stride_m(), self.vectors[0])
    }

    fn right(&self) -> Tile {
        if self.transposed {
            self.tile(self.tile_n(), DEPTH, self.stride_n(), self.vectors[1])
        } else {
            self.tile(DEPTH, self.tile_n(), self.stride_n(), self.vectors[1])
        }
    }
}

#[cube]
fn zeros(#[comptime] count: usize) -> Array<f32> {
    let mut sums = Array::<f32>::new(count);
    #[unroll]
    for n in 0..count {
        sums[n] = 0.0f32;
    }
    sums
}

/// `sums += a b` of a unit, and, with a bias to differentiate, `columns += ` the sums of `b`.
#[cube]
fn multiply(
    stage_a: &Shared<[f32]>,
    stage_b: &Shared<[f32]>,
    sums: &mut Array<f32>,
    columns: &mut Array<f32>,
    #[comptime] with_columns: bool,
    #[comptime] plan: PlainPlan,
) {
    let row = UNIT_POS as usize / comptime!(plan.units_n) * comptime!(ROWS / FOUR);
    let column = UNIT_POS as usize % comptime!(plan.units_n) * comptime!(COLUMNS / FOUR);
    let stage_a = stage_a.as_vectorized().with_vector_size::<Const<4>>();
    let stage_b = stage_b.as_vectorized().with_vector_size::<Const<4>>();
    for k in 0..DEPTH {
        let b = stage_b[k * comptime!(plan.stride_n() / FOUR) + column];
        #[unroll]
        for part in 0..comptime!(ROWS / FOUR) {
            let a = stage_a[k * comptime!(plan.stride_m() / FOUR) + row + part];
            #[unroll]
            for r in 0..FOUR {
                #[unroll]
                for c in 0..COLUMNS {
                    let at = comptime!((part * FOUR + r) * COLUMNS + c);
                    sums[at] = fma(a.extract(r), b.extract(c), sums[at]);
                }
            }
        }
        if comptime!(with_columns) {
            #[unroll]
            for c in 0..COLUMNS {
                columns[c] += b.extract(c);
            }
        }
    }
}

/// `c = a b + bias` for `a [rows, k]` and `b [k, columns]` (or its transpose).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn product_plain<E: Float, W: Float, VA: Size, VB: Size, VC: Size>(
    a: &[E],
    b: &[W],
    bias: &[W],
    c: &mut [E],
    call: &ProductCall,
    #[comptime] plan: PlainPlan,
    #[define(E, W)] _types: [ElemType; 2],
    #[define(VA, VB, VC)] _vectors: [usize; 3],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let first_row = CUBE_POS / call.blocks * comptime!(plan.tile_m());
    let first_column = CUBE_POS % call.blocks * comptime!(plan.tile_n());
    let left = comptime!(plan.left());
    let right = comptime!(plan.right());
    let mut stage_a =
        Shared::<[f32]>::new_aligned_slice(comptime!(DEPTH * plan.stride_m()), 16usize);
    let mut stage_b =
        Shared::<[f32]>::new_aligned_slice(comptime!(DEPTH * plan.stride_n()), 16usize);
    let mut next_a = Array::<Vector<E, VA>>::new(comptime!(left.shares()));
    let mut next_b = Array::<Vector<W, VB>>::new(comptime!(right.shares()));
    let mut sums = zeros(comptime!(ROWS * COLUMNS));
    let mut unused = zeros(1usize);

    let mut k = 0usize;
    while k < call.a.columns {
        fetch::<E, VA>(a, &call.a, first_row, k, &mut next_a, left);
        if comptime!(plan.transposed) {
            fetch::<W, VB>(b, &call.b, first_column, k, &mut next_b, right);
        } else {
            fetch::<W, VB>(b, &call.b, k, first_column, &mut next_b, right);
        }
        sync_cube();
        put_f32::<E, VA>(&next_a, &mut stage_a, left, true);
        put_f32::<W, VB>(&next_b, &mut stage_b, right, comptime!(plan.transposed));
        sync_cube();
        multiply(&stage_a, &stage_b, &mut sums, &mut unused, false, plan);
        k += DEPTH;
    }
    write::<E, W, VC>(&sums, bias, c, call, first_row, first_column, plan);
}

#[cube]
fn write<E: Float, W: Float, V: Size>(
    sums: &Array<f32>,
    bias: &[W],
    c: &mut [E],
    call: &ProductCall,
    first_row: usize,
    first_column: usize,
    #[comptime] plan: PlainPlan,
) {
    let bias = bias.as_vectorized().with_vector_size::<V>();
    let c = c.as_vectorized_mut().with_vector_size_mut::<V>();
    let vector = comptime!(plan.vectors[2]);
    let row = first_row + UNIT_POS as usize / comptime!(plan.units_n) * ROWS;
    let column = first_column + UNIT_POS as usize % comptime!(plan.units_n) * COLUMNS;
    #[unroll]
    for r in 0..ROWS {
        #[unroll]
        for part in 0..comptime!(COLUMNS / vector) {
            let to_row = row + r;
            let to_column = column + comptime!(part * vector);
            if to_row < call.c.rows && to_column < call.c.columns {
                let mut value = Vector::<f32, V>::new(0.0f32);
                #[unroll]
                for v in 0..vector {
                    value.insert(v, sums[comptime!(r * COLUMNS + part * vector + v)]);
                }
                if comptime!(plan.bias) {
                    value += Vector::<f32, V>::cast_from(bias[to_column / vector]);
                }
                c[(to_row * call.c.pitch + to_column) / vector] = Vector::<E, V>::cast_from(value);
            }
        }
    }
}

/// `sums[slice] = x^T dy` over the rows of each slice, and below it, with a bias, the sums of the columns
/// of `dy`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn outer_plain<E: Float, VX: Size, VY: Size>(
    x: &[E],
    dy: &[E],
    sums: &mut [f32],
    call: &OuterCall,
    #[comptime] plan: PlainPlan,
    #[define(E)] _dtype: ElemType,
    #[define(VX, VY)] _vectors: [usize; 2],
) {
    if CUBE_POS >= call.cubes {
        terminate!();
    }
    let slice = CUBE_POS / call.tiles;
    let tile = CUBE_POS % call.tiles;
    let first_row = tile / call.blocks * comptime!(plan.tile_m());
    let first_column = tile % call.blocks * comptime!(plan.tile_n());
    let left = comptime!(plan.left_by_rows());
    let right = comptime!(plan.right());
    let mut stage_x =
        Shared::<[f32]>::new_aligned_slice(comptime!(DEPTH * plan.stride_m()), 16usize);
    let mut stage_dy =
        Shared::<[f32]>::new_aligned_slice(comptime!(DEPTH * plan.stride_n()), 16usize);
    let mut next_x = Array::<Vector<E, VX>>::new(comptime!(left.shares()));
    let mut next_dy = Array::<Vector<E, VY>>::new(comptime!(right.shares()));
    let mut weights = zeros(comptime!(ROWS * COLUMNS));
    let mut biases = zeros(COLUMNS);

    let mut token = slice * call.slice;
    let end = min(token + call.slice, call.x.rows);
    while token < end {
        fetch::<E, VX>(x, &call.x, token, first_row, &mut next_x, left);
        fetch::<E, VY>(dy, &call.dy, token, first_column, &mut next_dy, right);
        sync_cube();
        put_f32::<E, VX>(&next_x, &mut stage_x, left, false);
        put_f32::<E, VY>(&next_dy, &mut stage_dy, right, false);
        sync_cube();
        multiply(
            &stage_x,
            &stage_dy,
            &mut weights,
            &mut biases,
            comptime!(plan.bias),
            plan,
        );
        token += DEPTH;
    }

    let sums = sums.as_vectorized_mut().with_vector_size_mut::<Const<4>>();
    let base = slice * call.area;
    let row = first_row + UNIT_POS as usize / comptime!(plan.units_n) * ROWS;
    let column = first_column + UNIT_POS as usize % comptime!(plan.units_n) * COLUMNS;
    if column < call.columns {
        #[unroll]
        for r in 0..ROWS {
            if row + r < call.rows {
                let at = base + (row + r) * call.columns + column;
                sums[at / FOUR] = four(&weights, comptime!(r * COLUMNS));
            }
        }
        if comptime!(plan.bias) {
            if row == 0 {
                let at = base + call.rows * call.columns + column;
                sums[at / FOUR] = four(&biases, 0usize);
            }
        }
    }
}

#[cube]
fn four(numbers: &Array<f32>, #[comptime] from: usize) -> Four {
    let mut value = Four::new(0.0f32);
    #[unroll]
    for n in 0..FOUR {
        value.insert(n, numbers[comptime!(from + n)]);
    }
    value
}
