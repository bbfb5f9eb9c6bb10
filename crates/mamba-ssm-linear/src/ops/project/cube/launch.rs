//! Launches of the kernels: memory and arguments.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::common::{PlaceLaunch, SIDE};
use super::matrix::{OuterCallLaunch, ProductCallLaunch, outer_matrix, product_matrix};
use super::plain::{outer_plain, product_plain};
use super::plan::{Plan, Problem};
use super::reduce::{ReduceCallLaunch, area, reduce};
use super::stream::product_stream;
use crate::cube::{address_type, alone, elem, empty_like, grid};

/// Widest read: 16 bytes.
const WIDEST: usize = 16;

/// Slices of a sum that a unit reads before it adds them.
const AT_ONCE: usize = 8;

/// A matrix whose rows the kernels read: elements of a row side by side, rows evenly spaced.
#[derive(Clone)]
struct Rows {
    tensor: CubeTensor,
    shape: [usize; 2],
    pitch: usize,
}

impl Rows {
    fn new(tensor: CubeTensor) -> Self {
        let shape = [tensor.meta.shape[0], tensor.meta.shape[1]];
        let strides = tensor.meta.strides();
        let rows_apart = strides[1] == 1 && strides[0] >= shape[1];
        if rows_apart && !tensor.meta.is_tiled() {
            let pitch = strides[0];
            return Self {
                tensor,
                shape,
                pitch,
            };
        }
        let tensor = into_contiguous(tensor);
        Self {
            tensor,
            shape,
            pitch: shape[1],
        }
    }

    /// A new matrix on the device of another.
    fn empty(like: &CubeTensor, shape: [usize; 2]) -> Self {
        Self {
            tensor: empty_like(like, shape, like.dtype),
            shape,
            pitch: shape[1],
        }
    }

    /// Most elements that can be moved at once.
    fn vector(&self) -> usize {
        let most = WIDEST / self.tensor.dtype.size();
        (0..)
            .map(|n| most >> n)
            .find(|n| self.shape[1].is_multiple_of(*n) && self.pitch.is_multiple_of(*n))
            .unwrap_or(1)
    }

    fn place(&self) -> PlaceLaunch {
        PlaceLaunch::new(self.shape[0], self.shape[1], self.pitch)
    }

    fn arg(&self) -> BufferArg {
        self.tensor.clone().into_buffer_arg()
    }
}

/// `x weight + bias`, or `x weight^T`.
pub(super) fn product(
    x: CubeTensor,
    weight: CubeTensor,
    bias: Option<CubeTensor>,
    transposed: bool,
) -> CubeTensor {
    let (x, weight) = (Rows::new(x), Rows::new(weight));
    let bias = bias.map(into_contiguous);
    let columns = weight.shape[if transposed { 0 } else { 1 }];
    let out = Rows::empty(&x.tensor, [x.shape[0], columns]);
    let problem = Problem {
        rows: x.shape[0],
        inner: x.shape[1],
        columns,
        transposed,
        bias: bias.is_some(),
    };
    let (client, dtype) = (x.tensor.client.clone(), x.tensor.dtype);
    let vectors = [x.vector(), weight.vector(), out.vector()];
    // Without a bias anything will do in its place.
    let bias = bias.unwrap_or_else(|| weight.tensor.clone());
    let addresses = address_type(&[&x.tensor, &weight.tensor, &out.tensor]);
    let types = [dtype, weight.tensor.dtype].map(elem);
    macro_rules! launch {
        ($kernel:ident, $plan:expr, $cubes:expr, $blocks:expr, $vectors:expr) => {{
            let (plan, cubes) = ($plan, $cubes);
            let call =
                ProductCallLaunch::new(cubes, $blocks, x.place(), weight.place(), out.place());
            // SAFETY: the kernels reach no element outside the matrices whose shapes and pitches they are given.
            unsafe {
                $kernel::launch_unchecked(
                    &client,
                    grid(cubes),
                    CubeDim::new_1d(plan.units() as u32),
                    addresses,
                    x.arg(),
                    weight.arg(),
                    bias.into_buffer_arg(),
                    out.arg(),
                    call,
                    plan,
                    types,
                    $vectors,
                )
            }
        }};
    }
    if let Some(plan) = problem.stream(&client, dtype, vectors) {
        let cubes = problem.stream_cubes(&client, &plan);
        launch!(product_stream, plan, cubes, 1, plan.vector);
    } else {
        let plan = problem.product(&client, dtype, vectors);
        let blocks = columns.div_ceil(plan.tile_n());
        let cubes = x.shape[0].div_ceil(plan.tile_m()) * blocks;
        match plan {
            Plan::Matrix(plan) => launch!(product_matrix, plan, cubes, blocks, plan.vectors),
            Plan::Plain(plan) => launch!(product_plain, plan, cubes, blocks, plan.vectors),
        }
    }
    out.tensor
}

/// `x^T dy`, and, if wanted, the sum of `dy` over tokens.
pub(super) fn parameter_gradients(
    x: CubeTensor,
    dy: CubeTensor,
    gradient_dtype: DType,
    bias: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let (x, dy) = (Rows::new(x), Rows::new(dy));
    let ([tokens, d_input], [_, d_output]) = (x.shape, dy.shape);
    let problem = Problem {
        rows: d_input,
        inner: tokens,
        columns: d_output,
        transposed: false,
        bias,
    };
    let (client, dtype) = (x.tensor.client.clone(), x.tensor.dtype);
    let plan = problem.outer(&client, dtype, [x.vector(), dy.vector(), 4]);
    let blocks = d_output.div_ceil(plan.tile_n());
    let tiles = d_input.div_ceil(plan.tile_m()) * blocks;
    let (slice, slices) = problem.slices(&client, &plan, tiles);
    let (rows, columns) = (
        d_input.next_multiple_of(SIDE),
        d_output.next_multiple_of(SIDE),
    );
    let area = area(rows, columns, bias);
    let sums = empty_like(&x.tensor, [slices * area], DType::F32);
    let cubes = slices * tiles;
    let call = OuterCallLaunch::new(
        cubes,
        tiles,
        blocks,
        slice,
        x.place(),
        dy.place(),
        rows,
        columns,
        area,
    );
    let addresses = address_type(&[&x.tensor, &dy.tensor, &sums]);
    let elem = elem(dtype);
    // SAFETY: as above; the sums have a whole number of blocks.
    unsafe {
        match plan {
            Plan::Matrix(plan) => outer_matrix::launch_unchecked(
                &client,
                grid(cubes),
                Plan::Matrix(plan).cube_dim(),
                addresses,
                x.arg(),
                dy.arg(),
                sums.clone().into_buffer_arg(),
                call,
                plan,
                elem,
                [plan.vectors[0], plan.vectors[1]],
            ),
            Plan::Plain(plan) => outer_plain::launch_unchecked(
                &client,
                grid(cubes),
                Plan::Plain(plan).cube_dim(),
                addresses,
                x.arg(),
                dy.arg(),
                sums.clone().into_buffer_arg(),
                call,
                plan,
                elem,
                [plan.vectors[0], plan.vectors[1]],
            ),
        }
    }
    let call = ReduceCallLaunch::new(slices, d_input, d_output, rows, columns, area);
    reduced(sums, call, [d_input, d_output], gradient_dtype, bias)
}

/// Adds up the slices' sums.
fn reduced(
    sums: CubeTensor,
    call: ReduceCallLaunch,
    [d_input, d_output]: [usize; 2],
    dtype: DType,
    with_bias: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let client = sums.client.clone();
    let weight = empty_like(&sums, [d_input, d_output], dtype);
    let bias = empty_like(&sums, [d_output], dtype);
    let elements = d_input * d_output + if with_bias { d_output } else { 0 };
    let units = alone(&sums);
    // SAFETY: units past the last element leave at once.
    unsafe {
        reduce::launch_unchecked(
            &client,
            grid(elements.div_ceil(units)),
            CubeDim::new_1d(units as u32),
            address_type(&[&sums]),
            sums.into_buffer_arg(),
            weight.clone().into_buffer_arg(),
            bias.clone().into_buffer_arg(),
            call,
            AT_ONCE,
            with_bias,
            elem(dtype),
        );
    }
    (weight, with_bias.then_some(bias))
}
