//! Projections on Burn's CubeCL backends.
//!
//! `stream` has the product for a weight that shared memory holds, on matrix units with fragments, `matrix` the
//! kernels for any matrix units, `plain` those for every device and for f32: in each a
//! product whose rows are tokens (the forward pass and, with the weight transposed, the gradient of the
//! input) and a sum over tokens in slices (the gradients of weight and bias), which `reduce` adds up.
//! `plan` chooses sizes, `launch` strings it together.

// Kernels nest the ifs that are decided at run time inside those decided when they are compiled.
#![allow(clippy::collapsible_if)]

mod common;
mod launch;
mod matrix;
mod plain;
mod plan;
mod reduce;
mod stream;

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::backend::{Bias, ProjectBackend};
use super::reference;

/// The largest weight, in elements, that the kernels take. From there on both sides of the weight are
/// hundreds wide, a product is bound by arithmetic, and Burn's general matrix product is the better one.
const LARGEST_WEIGHT: usize = 512 * 512;

/// Whether the kernels take a projection; where not, the definition runs, in Burn's matrix products.
fn has_kernel(tokens: usize, d_input: usize, d_output: usize, tensors: &[&CubeTensor]) -> bool {
    let weight = d_input * d_output;
    let dtype = tensors[0].dtype;
    tokens > 0
        && (1..=LARGEST_WEIGHT).contains(&weight)
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensors
            .iter()
            .all(|tensor| tensor.dtype == dtype || tensor.dtype == DType::F32)
}

fn shape(tensor: &CubeTensor) -> [usize; 2] {
    [tensor.meta.shape[0], tensor.meta.shape[1]]
}

impl ProjectBackend for CubeBackend {
    fn project_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
    ) -> FloatTensor<Self> {
        let ([tokens, d_input], [_, d_output]) = (shape(&x), shape(&weight));
        if !has_kernel(tokens, d_input, d_output, &[&x, &weight]) {
            return reference::forward::<Self>(x, weight, bias);
        }
        let bias = match bias {
            Bias::Without => None,
            Bias::With(bias) => Some(bias),
        };
        launch::product(x, weight, bias, false)
    }

    fn project_input_gradient(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([tokens, d_output], [d_input, _]) = (shape(&dy), shape(&weight));
        if !has_kernel(tokens, d_input, d_output, &[&dy, &weight]) {
            return reference::input_gradient::<Self>(dy, weight);
        }
        launch::product(dy, weight, None, true)
    }

    fn project_weight_gradient(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        let ([tokens, d_input], [_, d_output]) = (shape(&x), shape(&dy));
        if !has_kernel(tokens, d_input, d_output, &[&x, &dy]) {
            return reference::weight_gradient::<Self>(x, dy, dtype);
        }
        launch::parameter_gradients(x, dy, dtype.into(), false).0
    }

    fn project_parameter_gradients(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: FloatDType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let ([tokens, d_input], [_, d_output]) = (shape(&x), shape(&dy));
        if has_kernel(tokens, d_input, d_output, &[&x, &dy]) {
            let (weight, bias) = launch::parameter_gradients(x, dy, dtype.into(), true);
            return (weight, bias.expect("the bias gradient was asked for"));
        }
        let bias = reference::bias_gradient::<Self>(dy.clone(), dtype);
        (reference::weight_gradient::<Self>(x, dy, dtype), bias)
    }
}
