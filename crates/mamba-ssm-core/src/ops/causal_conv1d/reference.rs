//! The definition, in tensor operations.

use burn::tensor::{Tensor, activation::silu};

use super::{ConvInput, ConvOutput};
use crate::ops::precision::{compute_dtype, narrow_to, widen};

pub(super) fn causal_conv1d(input: ConvInput) -> ConvOutput {
    let dtype = input.x.dtype();
    let wide = compute_dtype(dtype);
    let [batch, length, channels] = input.x.dims();
    let [_, width] = input.weight.dims();

    let nothing = || Tensor::zeros([batch, width - 1, channels], (&input.x.device(), dtype));
    // A width of one has no past, and Burn neither joins nor narrows to an empty axis.
    let (seen, final_state) = if width == 1 {
        (input.x.clone(), nothing())
    } else {
        let past = input.initial_state.unwrap_or_else(nothing);
        let seen = Tensor::cat(vec![narrow_to(past, dtype), input.x.clone()], 1);
        (seen.clone(), seen.narrow(1, length, width - 1))
    };

    let seen = widen(seen, wide);
    let taps = widen(input.weight, wide).transpose(); // [width, channels]
    let tap = |k: usize| {
        let weight = taps.clone().narrow(0, k, 1).reshape([1, 1, channels]);
        seen.clone().narrow(1, k, length) * weight
    };
    let mut y = (1..width).fold(tap(0), |sum, k| sum + tap(k));
    if let Some(bias) = input.bias {
        y = y + widen(bias, wide).unsqueeze();
    }
    if input.activation {
        y = silu(y);
    }
    ConvOutput {
        y: narrow_to(y, dtype),
        final_state,
    }
}
