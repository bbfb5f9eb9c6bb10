//! Depthwise causal convolution over time, with an optional SiLU.

mod autodiff;
mod backend;
#[cfg(feature = "flex")]
pub(crate) mod cpu;
#[cfg(feature = "cubecl")]
pub(crate) mod cube;
mod reference;

use backend::{ConvBackend, Operands};
use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};
use mamba_ssm_linear::device::has_kernels;

use crate::ops::optional::Optional;
use crate::ops::precision::{narrow_to, widen};

/// The operands of [`causal_conv1d`].
///
/// Channels come last, unlike in the official function (`[batch, dim, length]`): it is the layout of
/// the projection before and of the scan behind, so that no transpose stands between them.
#[derive(Debug, Clone)]
pub struct ConvInput {
    /// `[batch, length, channels]`.
    pub x: Tensor<3>,
    /// `[channels, width]`; the last column meets the present token.
    pub weight: Tensor<2>,
    /// `[channels]`.
    pub bias: Option<Tensor<1>>,
    /// The `width - 1` tokens before the first, `[batch, width - 1, channels]`; none means zeros.
    pub initial_state: Option<Tensor<3>>,
    /// Whether to apply SiLU to the sum.
    pub activation: bool,
}

/// What [`causal_conv1d`] returns.
#[derive(Debug, Clone)]
pub struct ConvOutput {
    /// `[batch, length, channels]`.
    pub y: Tensor<3>,
    /// The last `width - 1` tokens seen, `[batch, width - 1, channels]`: the next call's
    /// `initial_state`.
    pub final_state: Tensor<3>,
}

/// `y[t, c] = act(bias[c] + sum_k weight[c, k] * x[t - width + 1 + k, c])`, tokens before the first
/// taken from the initial state.
///
/// # Panics
///
/// When shapes disagree or the width is zero.
///
/// Source: `causal_conv1d.causal_conv1d_fn`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{ConvInput, causal_conv1d};
///
/// let device = Device::default();
/// let out = causal_conv1d(ConvInput {
///     x: Tensor::from_floats([[[1.0], [2.0], [3.0]]], &device),
///     weight: Tensor::from_floats([[10.0, 1.0]], &device),
///     bias: None,
///     initial_state: None,
///     activation: false,
/// });
/// assert_eq!(out.y.into_data().try_to_vec::<f32>().unwrap(), vec![1.0, 12.0, 23.0]);
/// assert_eq!(out.final_state.into_data().try_to_vec::<f32>().unwrap(), vec![3.0]);
/// ```
pub fn causal_conv1d(input: ConvInput) -> ConvOutput {
    let [batch, _, channels] = input.x.dims();
    let [weight_channels, width] = input.weight.dims();
    assert_eq!(
        weight_channels, channels,
        "causal_conv1d: the weight has {weight_channels} channels, x has {channels}"
    );
    assert!(width > 0, "causal_conv1d: the weight's width is 0");
    if let Some(bias) = &input.bias {
        assert_eq!(
            bias.dims(),
            [channels],
            "causal_conv1d: the bias must have {channels} elements"
        );
    }
    if let Some(state) = &input.initial_state {
        assert_eq!(
            state.dims(),
            [batch, width - 1, channels],
            "causal_conv1d: the initial state must be [batch, width - 1, channels]"
        );
    }
    if has_kernels(&input.x.device(), input.x.dtype()) {
        native(input)
    } else {
        reference::causal_conv1d(input)
    }
}

/// The device's own implementation.
fn native(input: ConvInput) -> ConvOutput {
    let f32 = FloatDType::F32;
    let [batch, length, channels] = input.x.dims();
    let [_, width] = input.weight.dims();
    let x = input.x;
    let dtype = x.dtype();
    let past = input.initial_state.filter(|_| width > 1);
    let final_state = match (width - 1, &past) {
        // Burn neither joins nor narrows to an empty axis.
        (0, _) => Tensor::zeros([batch, 0, channels], (&x.device(), dtype)),
        (before, _) if length >= before => x.clone().narrow(1, length - before, before),
        (before, past) => {
            let past = past.clone().map_or_else(
                || Tensor::zeros([batch, before, channels], (&x.device(), dtype)),
                |past| narrow_to(past, dtype),
            );
            Tensor::cat(vec![past.narrow(1, length, before - length), x.clone()], 1)
        }
    };
    let operands = Operands {
        x: x.into_dispatch(),
        weight: widen(input.weight, f32).into_dispatch(),
        bias: Optional::of(input.bias.map(|bias| widen(bias, f32))),
        initial_state: Optional::of(past.map(|past| widen(past, f32))),
    };
    ConvOutput {
        y: Tensor::from_dispatch(Dispatch::causal_conv1d(operands, input.activation)),
        final_state,
    }
}
