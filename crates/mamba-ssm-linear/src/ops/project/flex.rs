//! The operator on Burn's Flex backend: products by the `gemm` crate, in parallel over tokens.

use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Element, Flex};
use burn::tensor::{DType, FloatDType, Shape, TensorData};
use rayon::prelude::*;

use super::backend::{Bias, ProjectBackend};
use crate::memory::zeros;

/// Tokens that one task projects.
const BLOCK: usize = 256;

/// Fewest tokens of a slice of the weight gradient.
const SHORTEST_SLICE: usize = 512;

/// Most slices of the weight gradient. Not the number of threads: the order of the sum, and so its
/// last bits, should not depend on the machine.
const SLICES: usize = 16;

/// Tasks that the weight gradient is split into at least, where it is large enough: with fewer slices,
/// each computes its rows in bands.
const TASKS: usize = 8;

/// Fewest rows of a band.
const NARROWEST_BAND: usize = 32;

/// A float with a matrix product.
trait Real: Element + bytemuck::Pod + Default + core::ops::AddAssign {
    const ONE: Self;
}

impl Real for f32 {
    const ONE: Self = 1.0;
}

impl Real for f64 {
    const ONE: Self = 1.0;
}

/// A matrix: element `(i, j)` is `values[i * strides[0] + j * strides[1]]`.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    values: &'a [T],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a, T: Real> Matrix<'a, T> {
    fn new(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        Self {
            values: &tensor.storage::<T>()[layout.start_offset()..],
            shape: [shape[0], shape[1]],
            strides: [strides[0] as usize, strides[1] as usize],
        }
    }

    fn transposed(self) -> Self {
        let ([a, b], [c, d]) = (self.shape, self.strides);
        Self {
            shape: [b, a],
            strides: [d, c],
            ..self
        }
    }

    fn rows(self, start: usize, count: usize) -> Self {
        let [rows, columns] = self.shape;
        assert!(start + count <= rows);
        // An empty matrix may have no values to point at.
        let first = (start * self.strides[0]).min(self.values.len());
        Self {
            values: &self.values[first..],
            shape: [count, columns],
            ..self
        }
    }

    /// Whether the last element lies within the values.
    fn is_inside(&self) -> bool {
        let [rows, columns] = self.shape;
        let last = |n: usize, stride: usize| n.saturating_sub(1) * stride;
        rows * columns == 0
            || last(rows, self.strides[0]) + last(columns, self.strides[1]) < self.values.len()
    }
}

/// `out = a b`, or `out += a b`, on the calling thread; `out` row-major and dense.
fn multiply<T: Real>(out: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, add: bool) {
    let ([m, k], [_, n]) = (a.shape, b.shape);
    assert!(out.len() == m * n && b.shape[0] == k && a.is_inside() && b.is_inside());
    // SAFETY: every element that the shapes and strides reach was just found to lie in its slice.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.values.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.values.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `a b + bias`, blocks of rows in parallel.
fn product<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>, bias: Option<&[T]>) -> Vec<T> {
    let ([rows, _], [_, columns]) = (a.shape, b.shape);
    let mut out = zeros::<T>(rows * columns);
    out.par_chunks_mut((BLOCK * columns).max(1))
        .enumerate()
        .for_each(|(block, out)| {
            if let Some(bias) = bias {
                out.chunks_exact_mut(columns)
                    .for_each(|row| row.copy_from_slice(bias));
            }
            let rows = a.rows(block * BLOCK, out.len() / columns);
            multiply(out, rows, b, bias.is_some());
        });
    out
}

/// `x^T dy`: slices of tokens and bands of rows in parallel, slices summed in order.
fn weight_gradient<T: Real>(x: Matrix<'_, T>, dy: Matrix<'_, T>) -> Vec<T> {
    let ([tokens, d_input], [_, d_output]) = (x.shape, dy.shape);
    let slice = slice_of(tokens);
    let slices = tokens.div_ceil(slice).max(1);
    let bands = TASKS.div_ceil(slices).min(d_input / NARROWEST_BAND).max(1);
    let band = d_input.div_ceil(bands).max(1);
    let weights = d_input * d_output;
    let mut parts = zeros::<T>(slices * weights);
    parts
        .par_chunks_mut(weights.max(1))
        .enumerate()
        .for_each(|(n, part)| {
            let start = n * slice;
            let count = slice.min(tokens - start);
            let (x, dy) = (x.rows(start, count).transposed(), dy.rows(start, count));
            part.par_chunks_mut(band * d_output.max(1))
                .enumerate()
                .for_each(|(n, out)| {
                    let rows = x.rows(n * band, out.len() / d_output);
                    multiply(out, rows, dy, false);
                });
        });
    sum_parts(parts, weights)
}

/// The sum of `dy` over tokens: slices of tokens in parallel, summed in order.
fn bias_gradient<T: Real>(dy: Matrix<'_, T>) -> Vec<T> {
    let [tokens, d_output] = dy.shape;
    let slice = slice_of(tokens);
    let mut parts = zeros::<T>(tokens.div_ceil(slice).max(1) * d_output);
    parts
        .par_chunks_mut(d_output.max(1))
        .enumerate()
        .for_each(|(n, part)| {
            let start = n * slice;
            add_rows(part, dy.rows(start, slice.min(tokens - start)));
        });
    sum_parts(parts, d_output)
}

fn slice_of(tokens: usize) -> usize {
    tokens.div_ceil(SLICES).max(SHORTEST_SLICE)
}

/// The sum of vectors of a size that lie one behind the other, in order.
fn sum_parts<T: Real>(mut parts: Vec<T>, size: usize) -> Vec<T> {
    let (sum, rest) = parts.split_at_mut(size);
    for part in rest.chunks_exact(size.max(1)) {
        sum.iter_mut()
            .zip(part)
            .for_each(|(sum, part)| *sum += *part);
    }
    parts.truncate(size);
    parts
}

fn add_rows<T: Real>(sum: &mut [T], x: Matrix<'_, T>) {
    let [rows, columns] = x.shape;
    let [row_stride, column_stride] = x.strides;
    for row in 0..rows {
        let values = x.values[row * row_stride..]
            .iter()
            .step_by(column_stride.max(1));
        if column_stride == 0 {
            let value = x.values[row * row_stride];
            sum.iter_mut().for_each(|sum| *sum += value);
        } else {
            sum.iter_mut()
                .zip(values.take(columns))
                .for_each(|(sum, value)| *sum += *value);
        }
    }
}

fn tensor<T: Real, const D: usize>(values: Vec<T>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::new(shape)))
}

/// The tensor itself, or a copy if a stride is negative.
fn forwards(tensor: FlexTensor) -> FlexTensor {
    if tensor.layout().strides().iter().all(|stride| *stride >= 0) {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

fn forward_typed<T: Real>(
    x: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
) -> FlexTensor {
    let [x, weight] = [x, weight].map(forwards);
    let bias = bias.map(|bias| bias.to_contiguous());
    let bias = bias.as_ref().map(|bias| bias.storage::<T>());
    let (x, weight) = (Matrix::<T>::new(&x), Matrix::new(&weight));
    tensor(product(x, weight, bias), [x.shape[0], weight.shape[1]])
}

fn input_gradient_typed<T: Real>(dy: FlexTensor, weight: FlexTensor) -> FlexTensor {
    let [dy, weight] = [dy, weight].map(forwards);
    let (dy, weight) = (Matrix::<T>::new(&dy), Matrix::new(&weight).transposed());
    tensor(product(dy, weight, None), [dy.shape[0], weight.shape[1]])
}

fn parameter_gradients_typed<T: Real>(
    x: FlexTensor,
    dy: FlexTensor,
    with_bias: bool,
) -> (FlexTensor, Option<FlexTensor>) {
    let [x, dy] = [x, dy].map(forwards);
    let (x, dy) = (Matrix::<T>::new(&x), Matrix::<T>::new(&dy));
    let ([_, d_input], [_, d_output]) = (x.shape, dy.shape);
    (
        tensor(weight_gradient(x, dy), [d_input, d_output]),
        with_bias.then(|| tensor(bias_gradient(dy), [d_output])),
    )
}

fn to_f32(tensor: FlexTensor) -> FlexTensor {
    Flex::float_cast(tensor, FloatDType::F32)
}

/// Both gradients in `dtype`; half precision is computed in f32.
fn gradients(
    x: FlexTensor,
    dy: FlexTensor,
    dtype: FloatDType,
    with_bias: bool,
) -> (FlexTensor, Option<FlexTensor>) {
    match dy.dtype() {
        DType::F64 => parameter_gradients_typed::<f64>(x, dy, with_bias),
        DType::F32 => parameter_gradients_typed::<f32>(x, dy, with_bias),
        _ => {
            let (weight, bias) = parameter_gradients_typed::<f32>(to_f32(x), to_f32(dy), with_bias);
            let back = |tensor| Flex::float_cast(tensor, dtype);
            (back(weight), bias.map(back))
        }
    }
}

impl ProjectBackend for Flex {
    fn project_forward(x: FlexTensor, weight: FlexTensor, bias: Bias<Self>) -> FlexTensor {
        let bias = match bias {
            Bias::Without => None,
            Bias::With(bias) => Some(bias),
        };
        let dtype = x.dtype();
        match dtype {
            DType::F64 => forward_typed::<f64>(x, weight, bias),
            DType::F32 => forward_typed::<f32>(x, weight, bias),
            _ => {
                let y = forward_typed::<f32>(to_f32(x), to_f32(weight), bias.map(to_f32));
                Flex::float_cast(y, dtype.into())
            }
        }
    }

    fn project_input_gradient(dy: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let dtype = dy.dtype();
        match dtype {
            DType::F64 => input_gradient_typed::<f64>(dy, weight),
            DType::F32 => input_gradient_typed::<f32>(dy, weight),
            _ => {
                let dx = input_gradient_typed::<f32>(to_f32(dy), to_f32(weight));
                Flex::float_cast(dx, dtype.into())
            }
        }
    }

    fn project_weight_gradient(x: FlexTensor, dy: FlexTensor, dtype: FloatDType) -> FlexTensor {
        gradients(x, dy, dtype, false).0
    }

    fn project_parameter_gradients(
        x: FlexTensor,
        dy: FlexTensor,
        dtype: FloatDType,
    ) -> (FlexTensor, FlexTensor) {
        let (weight, bias) = gradients(x, dy, dtype, true);
        (weight, bias.expect("the bias gradient was asked for"))
    }
}
