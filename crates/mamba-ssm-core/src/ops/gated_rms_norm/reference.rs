//! The definition, in tensor operations.

use burn::tensor::{Tensor, activation::silu};

use super::{GatedNormInput, GatedNormOptions};
use crate::ops::precision::{compute_dtype, narrow_to, widen};

pub(super) fn gated_rms_norm(
    input: GatedNormInput,
    group: usize,
    options: &GatedNormOptions,
) -> Tensor<3> {
    let dtype = input.x.dtype();
    let wide = compute_dtype(dtype);
    let [batch, length, dim] = input.x.dims();
    let gate = input.z.map(|z| silu(widen(z, wide)));
    let mut x = widen(input.x, wide);
    if let (Some(gate), false) = (&gate, options.norm_before_gate) {
        x = x * gate.clone();
    }

    let groups = x.reshape([batch, length, dim / group, group]);
    let mean_square = groups.clone().square().mean_dim(3);
    let normed = (groups / (mean_square + options.eps).sqrt()).reshape([batch, length, dim]);
    let mut y = normed * widen(input.weight, wide).unsqueeze();

    if let (Some(gate), true) = (gate, options.norm_before_gate) {
        y = y * gate;
    }
    narrow_to(y, dtype)
}
