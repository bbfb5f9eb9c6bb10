//! The token projection `y = x W + b`.

mod autodiff;
mod backend;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
mod reference;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use backend::{Bias, ProjectBackend};

/// Projects every token: `y = x W + b`.
///
/// # Shapes
///
/// - `x`: `[.., d_input]`; the leading axes are flattened into one axis of tokens.
/// - `weight`: `[d_input, d_output]` (Burn's layout, the transpose of PyTorch's).
/// - `bias`: `[d_output]`.
/// - returns `[.., d_output]`.
///
/// All of one dtype, or, for mixed precision, `x` in half precision and the parameters in f32: they are
/// then rounded to the type of `x` where they are read, and their gradients come in f32. Sums are taken
/// in f32 (f64 for f64). Differentiable in all three: the backward pass keeps `x` and `weight`, splits the sum over tokens of the weight's gradient into slices that
/// are computed side by side, and takes the bias's gradient in the same pass. Results do not vary from
/// run to run on one device.
///
/// # Panics
///
/// When the last axis of `x` is not `d_input`, the bias is not `[d_output]`, or the dtypes differ otherwise
/// than said.
///
/// Source: `torch.nn.functional.linear`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_linear::project;
///
/// let device = Device::default();
/// let x = Tensor::<2>::from_floats([[1.0, 2.0]], &device);
/// let weight = Tensor::<2>::from_floats([[1.0, 0.0, 3.0], [0.0, 1.0, 4.0]], &device);
/// let y = project(x, weight, None);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), vec![1.0, 2.0, 11.0]);
/// ```
pub fn project<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let shape = x.dims();
    let [d_input, d_output] = weight.dims();
    assert_eq!(
        shape[D - 1],
        d_input,
        "project: the last axis of x {shape:?} must be the weight's d_input = {d_input}"
    );
    if let Some(bias) = &bias {
        assert_eq!(
            bias.dims(),
            [d_output],
            "project: the bias must have the weight's d_output = {d_output} elements"
        );
    }
    let dtypes = [
        x.dtype(),
        weight.dtype(),
        bias.as_ref().map_or(weight.dtype(), Tensor::dtype),
    ];
    let half = matches!(dtypes[0], DType::F16 | DType::BF16);
    assert!(
        dtypes[1] == dtypes[2] && (dtypes[0] == dtypes[1] || half && dtypes[1] == DType::F32),
        "project: x, weight and bias must have one dtype, or x half precision and the others f32, \
         not {dtypes:?}"
    );
    let tokens = shape[..D - 1].iter().product::<usize>();
    let x = x.reshape([tokens, d_input]).into_dispatch();
    let bias = match bias {
        None => Bias::Without,
        Some(bias) => Bias::With(bias.into_dispatch()),
    };
    let y = Dispatch::project(x, weight.into_dispatch(), bias);
    let mut out = shape;
    out[D - 1] = d_output;
    Tensor::<2>::from_dispatch(y).reshape(out)
}

/// The gradient of `x` in [`project`]: `dy weight^T`, for operators that hold a projection and have a
/// backward pass of their own.
///
/// `dy`: `[tokens, d_output]`; `weight`: `[d_input, d_output]`; returns `[tokens, d_input]`.
///
/// # Panics
///
/// When the widths do not fit together.
pub fn input_gradient(dy: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([_, width], [_, d_output]) = (dy.dims(), weight.dims());
    assert_eq!(
        width, d_output,
        "input_gradient: dy must be as wide as the weight"
    );
    let (dy, weight) = (dy.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::project_input_gradient(dy, weight))
}

/// The gradients of the weight and the bias in [`project`]: `x^T dy` and the sum of `dy` over tokens, in
/// one pass.
///
/// `x`: `[tokens, d_input]`; `dy`: `[tokens, d_output]`; returns `[d_input, d_output]` and `[d_output]`.
///
/// # Panics
///
/// When the numbers of tokens differ.
pub fn parameter_gradients(x: Tensor<2>, dy: Tensor<2>) -> (Tensor<2>, Tensor<1>) {
    let ([tokens, _], [rows, _]) = (x.dims(), dy.dims());
    assert_eq!(
        tokens, rows,
        "parameter_gradients: x and dy must have as many tokens"
    );
    let dtype = x.dtype().into();
    let (x, dy) = (x.into_dispatch(), dy.into_dispatch());
    let (weight, bias) = Dispatch::project_parameter_gradients(x, dy, dtype);
    (Tensor::from_dispatch(weight), Tensor::from_dispatch(bias))
}

#[cfg(test)]
mod tests;
