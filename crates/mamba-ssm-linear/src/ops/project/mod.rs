//! The token projection `y = x W + b`.

mod reference;

use burn::tensor::Tensor;

/// Projects every token: `y = x W + b`.
///
/// # Shapes
///
/// - `x`: `[.., d_input]`; the leading axes are flattened into one axis of tokens.
/// - `weight`: `[d_input, d_output]` (Burn's layout, the transpose of PyTorch's).
/// - `bias`: `[d_output]`.
/// - returns `[.., d_output]`.
///
/// # Panics
///
/// When the last axis of `x` is not `d_input`, or the bias is not `[d_output]`.
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
    let tokens = shape[..D - 1].iter().product::<usize>();
    let y = reference::project(x.reshape([tokens, d_input]), weight, bias);
    let mut out = shape;
    out[D - 1] = d_output;
    y.reshape(out)
}
