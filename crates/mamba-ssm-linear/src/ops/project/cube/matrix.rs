//! Kernels for devices with matrix units: half precision operands, f32 sums.
//!
//! Operands pass through registers into shared memory, the next tile's reads under way while this one is
//! multiplied. A plane owns a block of `16 frags_m x 16 frags_n` of the cube's tile.

use cubecl::cmma::{Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::common::{Place, SIDE, Tile, fetch, put};

/// Elements added to a row of 16-bit numbers in shared memory, so that neighbouring rows start in
/// different banks.
const PAD: usize = 8;

/// Elements between two rows of the f32 block through which a plane writes its results.
const STAGE: usize = SIDE + 8;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct MatrixPlan {
    pub(super) planes_m: usize,
    pub(super) planes_n: usize,
    /// Units of a plane.
    pub(super) plane: usize,
    /// Blocks of a plane.
    pub(super) frags_m: usize,
    pub(super) frags_n: usize,
    /// Steps of the inner dimension in shared memory at once.
    pub(super) depth: usize,
    /// Elements read at once, of the left and right operand, and written at once.
    pub(super) vectors: [usize; 3],
    /// Whether the right operand is given as its transpose.
    pub(super) transposed: bool,
    /// Whether there is a bias, to add or to differentiate.
    pub(super) bias: bool,
    /// Whether a plane can wait for itself alone.
    pub(super) sync_plane: bool,
}

impl MatrixPlan {
    pub(super) fn planes(&self) -> usize {
        self.planes_m * self.planes_n
    }

    pub(super) fn units(&self) -> usize {
        self.planes() * self.plane
    }

    /// Rows of the cube's tile of the result.
    pub(super) fn tile_m(&self) -> usize {
        self.planes_m * self.frags_m * SIDE
    }

    /// Columns of the cube's tile of the result.
    pub(super) fn tile_n(&self) -> usize {
        self.planes_n * self.frags_n * SIDE
    }

    fn tile(&self, rows: usize, columns: usize, vector: usize) -> Tile {
        Tile {
            rows,
            columns,
            stride: columns + PAD,
            vector,
            units: self.units(),
        }
    }

    /// `[tile_m, depth]` of the left operand.
    fn left(&self) -> Tile {
        self.tile(self.tile_m(), self.depth, self.vectors[0])
    }

    /// `[depth, tile_n]` of the right operand, or `[tile_n, depth]` of its transpose.
    fn right(&self) -> Tile {
        if self.transposed {
            self.tile(self.tile_n(), self.depth, self.vectors[1])
        } else {
            self.tile(self.depth, self.tile_n(), self.vectors[1])
        }
    }

    /// `[depth, tile_m]` of the left operand of a product over rows.
    fn left_by_rows(&self) -> Tile {
        self.tile(self.depth, self.tile_m(), self.vectors[0])
    }

    /// Writes of a unit per block.
    fn writes(&self) -> usize {
        SIDE * SIDE / (self.plane * self.vectors[2])
    }
}

/// Numbers of a product.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct ProductCall {
    /// Cubes with work.
    pub(super) cubes: usize,
    /// Cubes per row of tiles.
    pub(super) blocks: usize,
    pub(super) a: Place,
    pub(super) b: Place,
    pub(super) c: Place,
}

#[cube]
fn new_sums(#[comptime] count: usize) -> Sequence<Matrix<f32>> {
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..count {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            SIDE,
            SIDE,
            SIDE,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

#[cube]
fn load_block<E: Float>(
    from: &Shared<[E]>,
    at: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] stride: usize,
) -> Matrix<E> {
    let length = from.len();
    Matrix::<E>::from_slice(
        ident,
        SIDE,
        SIDE,
        SIDE,
        layout,
        &from[at..length],
        comptime!(stride as u32).runtime(),
    )
}

#[cube]
fn sync_stage(#[comptime] plan: MatrixPlan) {
    if comptime!(plan.sync_plane) {
        sync_plane();
    } else {
        sync_cube();
    }
}

/// `c = a b + bias` for `a [rows, k]` and `b [k, columns]` (or its transpose).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn product_matrix<E: Float, W: Float, VA: Size, VB: Size, VC: Size>(
    a: &[E],
    b: &[W],
    bias: &[W],
    c: &mut [E],
    call: &ProductCall,
    #[comptime] plan: MatrixPlan,
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
    let mut stage_a = Shared::<[E]>::new_aligned_slice(comptime!(left.size()), 128usize);
    let mut stage_b = Shared::<[E]>::new_aligned_slice(comptime!(right.size()), 128usize);
    let mut next_a = Array::<Vector<E, VA>>::new(comptime!(left.shares()));
    let mut next_b = Array::<Vector<W, VB>>::new(comptime!(right.shares()));
    let sums = new_sums(comptime!(plan.frags_m * plan.frags_n));

    fetch::<E, VA>(a, &call.a, first_row, 0usize, &mut next_a, left);
    fetch_right::<W, VB>(b, &call.b, 0usize, first_column, &mut next_b, plan);
    let mut k = 0usize;
    while k < call.a.columns {
        sync_cube();
        put::<E, E, VA>(&next_a, &mut stage_a, left);
        put::<W, E, VB>(&next_b, &mut stage_b, right);
        sync_cube();
        k += comptime!(plan.depth);
        if k < call.a.columns {
            fetch::<E, VA>(a, &call.a, first_row, k, &mut next_a, left);
            fetch_right::<W, VB>(b, &call.b, k, first_column, &mut next_b, plan);
        }
        multiply::<E>(&stage_a, &stage_b, &sums, plan);
    }
    write::<E, W, VC>(&sums, bias, c, &call.c, first_row, first_column, plan);
}

#[cube]
fn fetch_right<E: Float, V: Size>(
    from: &[E],
    place: &Place,
    k: usize,
    column: usize,
    into: &mut Array<Vector<E, V>>,
    #[comptime] plan: MatrixPlan,
) {
    let tile = comptime!(plan.right());
    if comptime!(plan.transposed) {
        fetch::<E, V>(from, place, column, k, into, tile);
    } else {
        fetch::<E, V>(from, place, k, column, into, tile);
    }
}

#[cube]
fn multiply<E: Float>(
    stage_a: &Shared<[E]>,
    stage_b: &Shared<[E]>,
    sums: &Sequence<Matrix<f32>>,
    #[comptime] plan: MatrixPlan,
) {
    let plane = UNIT_POS as usize / comptime!(plan.plane);
    let row = plane / comptime!(plan.planes_n) * comptime!(plan.frags_m * SIDE);
    let column = plane % comptime!(plan.planes_n) * comptime!(plan.frags_n * SIDE);
    let stride_a = comptime!(plan.left().stride);
    let stride_b = comptime!(plan.right().stride);
    #[unroll]
    for step in 0..comptime!(plan.depth / SIDE) {
        let mut lefts = Sequence::<Matrix<E>>::new();
        #[unroll]
        for i in 0..comptime!(plan.frags_m) {
            let at = (row + comptime!(i * SIDE)) * stride_a + comptime!(step * SIDE);
            lefts.push(load_block::<E>(
                stage_a,
                at,
                MatrixIdent::A,
                MatrixLayout::RowMajor,
                stride_a,
            ));
        }
        #[unroll]
        for j in 0..comptime!(plan.frags_n) {
            let n = column + comptime!(j * SIDE);
            let right = if comptime!(plan.transposed) {
                let at = n * stride_b + comptime!(step * SIDE);
                load_block::<E>(
                    stage_b,
                    at,
                    MatrixIdent::B,
                    MatrixLayout::ColMajor,
                    stride_b,
                )
            } else {
                let at = comptime!(step * SIDE) * stride_b + n;
                load_block::<E>(
                    stage_b,
                    at,
                    MatrixIdent::B,
                    MatrixLayout::RowMajor,
                    stride_b,
                )
            };
            #[unroll]
            for i in 0..comptime!(plan.frags_m) {
                let sum = &sums[comptime!(i * plan.frags_n + j)];
                cubecl::cmma::execute(&lefts[i], &right, sum, sum);
            }
        }
    }
}

/// Writes a plane's sums, block by block through shared memory, with the bias.
#[cube]
fn write<E: Float, W: Float, V: Size>(
    sums: &Sequence<Matrix<f32>>,
    bias: &[W],
    c: &mut [E],
    place: &Place,
    first_row: usize,
    first_column: usize,
    #[comptime] plan: MatrixPlan,
) {
    let bias = bias.as_vectorized().with_vector_size::<V>();
    let c = c.as_vectorized_mut().with_vector_size_mut::<V>();
    let plane = UNIT_POS as usize / comptime!(plan.plane);
    let lane = UNIT_POS as usize % comptime!(plan.plane);
    let block = comptime!(SIDE * STAGE);
    let mut stage = Shared::<[f32]>::new_aligned_slice(comptime!(plan.planes() * block), 128usize);
    let vector = comptime!(plan.vectors[2]);
    let row = first_row + plane / comptime!(plan.planes_n) * comptime!(plan.frags_m * SIDE);
    let column = first_column + plane % comptime!(plan.planes_n) * comptime!(plan.frags_n * SIDE);
    #[unroll]
    for i in 0..comptime!(plan.frags_m) {
        #[unroll]
        for j in 0..comptime!(plan.frags_n) {
            sync_stage(plan);
            let length = stage.len();
            cubecl::cmma::store(
                &mut stage[plane * block..length],
                &sums[comptime!(i * plan.frags_n + j)],
                comptime!(STAGE as u32).runtime(),
                MatrixLayout::RowMajor,
            );
            sync_stage(plan);
            let numbers = stage.as_vectorized().with_vector_size::<V>();
            #[unroll]
            for n in 0..comptime!(plan.writes()) {
                let element = (lane + comptime!(n * plan.plane)) * vector;
                let r = element / SIDE;
                let k = element % SIDE;
                let to_row = row + comptime!(i * SIDE) + r;
                let to_column = column + comptime!(j * SIDE) + k;
                if to_row < place.rows && to_column < place.columns {
                    let mut value = numbers[(plane * block + r * STAGE + k) / vector];
                    if comptime!(plan.bias) {
                        value += Vector::<f32, V>::cast_from(bias[to_column / vector]);
                    }
                    c[(to_row * place.pitch + to_column) / vector] =
                        Vector::<E, V>::cast_from(value);
                }
            }
        }
    }
}

/// Numbers of a product over rows.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct OuterCall {
    /// Cubes with work.
    pub(super) cubes: usize,
    /// Tiles of a slice's result, and of a row of it.
    pub(super) tiles: usize,
    pub(super) blocks: usize,
    /// Rows of a slice, a multiple of the plan's depth.
    pub(super) slice: usize,
    pub(super) x: Place,
    pub(super) dy: Place,
    /// Rows and columns of a slice's sums, in whole blocks; behind the rows one block for the bias.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements between the sums of two slices.
    pub(super) area: usize,
}

/// `sums[slice] = x^T dy` over the rows of each slice, and below it, with a bias, the sums of the columns
/// of `dy`: a product with a block of ones.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn outer_matrix<E: Float, VX: Size, VY: Size>(
    x: &[E],
    dy: &[E],
    sums: &mut [f32],
    call: &OuterCall,
    #[comptime] plan: MatrixPlan,
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
    let mut stage_x = Shared::<[E]>::new_aligned_slice(comptime!(left.size()), 128usize);
    let mut stage_dy = Shared::<[E]>::new_aligned_slice(comptime!(right.size()), 128usize);
    let mut next_x = Array::<Vector<E, VX>>::new(comptime!(left.shares()));
    let mut next_dy = Array::<Vector<E, VY>>::new(comptime!(right.shares()));
    let weights = new_sums(comptime!(plan.frags_m * plan.frags_n));
    let biases = new_sums(comptime!(if plan.bias { plan.frags_n } else { 0 }));
    let plane = UNIT_POS as usize / comptime!(plan.plane);
    let sums_bias = first_row + plane / comptime!(plan.planes_n) == 0;

    let mut token = slice * call.slice;
    let end = min(token + call.slice, call.x.rows);
    fetch::<E, VX>(x, &call.x, token, first_row, &mut next_x, left);
    fetch::<E, VY>(dy, &call.dy, token, first_column, &mut next_dy, right);
    while token < end {
        sync_cube();
        put::<E, E, VX>(&next_x, &mut stage_x, left);
        put::<E, E, VY>(&next_dy, &mut stage_dy, right);
        sync_cube();
        token += comptime!(plan.depth);
        if token < end {
            fetch::<E, VX>(x, &call.x, token, first_row, &mut next_x, left);
            fetch::<E, VY>(dy, &call.dy, token, first_column, &mut next_dy, right);
        }
        multiply_outer::<E>(&stage_x, &stage_dy, &weights, &biases, sums_bias, plan);
    }
    let base = slice * call.area;
    let frags_m = comptime!(plan.frags_m);
    write_sums(
        &weights,
        sums,
        base,
        first_row,
        call.rows,
        first_column,
        call,
        frags_m,
        plan,
    );
    if comptime!(plan.bias) {
        if sums_bias {
            let end = call.rows + SIDE;
            write_sums(
                &biases,
                sums,
                base,
                call.rows,
                end,
                first_column,
                call,
                1usize,
                plan,
            );
        }
    }
}

#[cube]
fn multiply_outer<E: Float>(
    stage_x: &Shared<[E]>,
    stage_dy: &Shared<[E]>,
    weights: &Sequence<Matrix<f32>>,
    biases: &Sequence<Matrix<f32>>,
    sums_bias: bool,
    #[comptime] plan: MatrixPlan,
) {
    let plane = UNIT_POS as usize / comptime!(plan.plane);
    let row = plane / comptime!(plan.planes_n) * comptime!(plan.frags_m * SIDE);
    let column = plane % comptime!(plan.planes_n) * comptime!(plan.frags_n * SIDE);
    let stride_x = comptime!(plan.left_by_rows().stride);
    let stride_dy = comptime!(plan.right().stride);
    let ones = Matrix::<E>::from_value(
        MatrixIdent::A,
        SIDE,
        SIDE,
        SIDE,
        MatrixLayout::RowMajor,
        E::from_int(1),
    );
    #[unroll]
    for step in 0..comptime!(plan.depth / SIDE) {
        let mut lefts = Sequence::<Matrix<E>>::new();
        #[unroll]
        for i in 0..comptime!(plan.frags_m) {
            let at = comptime!(step * SIDE) * stride_x + row + comptime!(i * SIDE);
            lefts.push(load_block::<E>(
                stage_x,
                at,
                MatrixIdent::A,
                MatrixLayout::ColMajor,
                stride_x,
            ));
        }
        #[unroll]
        for j in 0..comptime!(plan.frags_n) {
            let at = comptime!(step * SIDE) * stride_dy + column + comptime!(j * SIDE);
            let right = load_block::<E>(
                stage_dy,
                at,
                MatrixIdent::B,
                MatrixLayout::RowMajor,
                stride_dy,
            );
            #[unroll]
            for i in 0..comptime!(plan.frags_m) {
                let sum = &weights[comptime!(i * plan.frags_n + j)];
                cubecl::cmma::execute(&lefts[i], &right, sum, sum);
            }
            if comptime!(plan.bias) {
                if sums_bias {
                    let sum = &biases[j];
                    cubecl::cmma::execute(&ones, &right, sum, sum);
                }
            }
        }
    }
}

/// Writes a plane's blocks of a slice's sums, those inside.
#[cube]
fn write_sums(
    blocks: &Sequence<Matrix<f32>>,
    sums: &mut [f32],
    base: usize,
    first_row: usize,
    end_row: usize,
    first_column: usize,
    call: &OuterCall,
    #[comptime] frags_m: usize,
    #[comptime] plan: MatrixPlan,
) {
    let plane = UNIT_POS as usize / comptime!(plan.plane);
    let row = first_row + plane / comptime!(plan.planes_n) * (frags_m * SIDE);
    let column = first_column + plane % comptime!(plan.planes_n) * comptime!(plan.frags_n * SIDE);
    let length = sums.len();
    #[unroll]
    for i in 0..frags_m {
        #[unroll]
        for j in 0..comptime!(plan.frags_n) {
            let to_row = row + comptime!(i * SIDE);
            let to_column = column + comptime!(j * SIDE);
            if to_row < end_row && to_column < call.columns {
                let at = base + to_row * call.columns + to_column;
                cubecl::cmma::store(
                    &mut sums[at..length],
                    &blocks[comptime!(i * plan.frags_n + j)],
                    call.columns as u32,
                    MatrixLayout::RowMajor,
                );
            }
        }
    }
}
