//! What stands between the projections of Mamba-2 as one operator: split, convolution with SiLU, scan,
//! gated norm. Its parts never slice or concatenate the wide tensors, which is most of what they would
//! cost one by one.

mod autodiff;
mod backend;
#[cfg(feature = "flex")]
mod cpu;
#[cfg(feature = "cubecl")]
mod cube;

use backend::{InnerBackend, Operands};
use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};
use mamba_ssm_linear::device::has_kernels;

use crate::ops::optional::Optional;
use crate::ops::precision::widen;

/// Sizes and constants of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InnerSpec {
    pub(crate) heads: usize,
    pub(crate) headdim: usize,
    pub(crate) groups: usize,
    pub(crate) state: usize,
    pub(crate) eps: f64,
    pub(crate) norm_before_gate: bool,
    pub(crate) dt_limit: (f64, f64),
}

#[cfg(any(feature = "flex", feature = "cubecl"))]
impl InnerSpec {
    pub(crate) fn d_inner(&self) -> usize {
        self.heads * self.headdim
    }

    pub(crate) fn conv_dim(&self) -> usize {
        self.d_inner() + 2 * self.groups * self.state
    }
}

/// The operands of [`mamba2_inner`].
#[derive(Debug, Clone)]
pub(crate) struct InnerInput {
    /// z, x, B, C and dt side by side: `[batch, length, 2 d_inner + 2 groups state + heads]`.
    pub(crate) zxbcdt: Tensor<3>,
    /// `[conv_dim, d_conv]`.
    pub(crate) conv_weight: Tensor<2>,
    /// `[conv_dim]`.
    pub(crate) conv_bias: Option<Tensor<1>>,
    /// `[heads]`.
    pub(crate) dt_bias: Tensor<1>,
    /// Decay rates, negative, `[heads]`.
    pub(crate) a: Tensor<1>,
    /// `[heads, headdim]`.
    pub(crate) d: Tensor<2>,
    /// `[d_inner]`.
    pub(crate) norm_weight: Tensor<1>,
}

/// Whether the device runs the block as one operator.
pub(crate) fn is_native(zxbcdt: &Tensor<3>) -> bool {
    has_kernels(&zxbcdt.device(), zxbcdt.dtype())
}

/// `gated_rms_norm(ssd(silu(conv(x, B, C)), dt), z)` from the empty state: `[batch, length, d_inner]`.
/// Differentiable in every operand. Only where [`is_native`].
///
/// Source: `mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined`.
pub(crate) fn mamba2_inner(input: InnerInput, spec: InnerSpec) -> Tensor<3> {
    let f32 = FloatDType::F32;
    let operands = Operands {
        zxbcdt: input.zxbcdt.into_dispatch(),
        conv_weight: widen(input.conv_weight, f32).into_dispatch(),
        conv_bias: Optional::of(input.conv_bias.map(|bias| widen(bias, f32))),
        dt_bias: widen(input.dt_bias, f32).into_dispatch(),
        a: widen(input.a, f32).into_dispatch(),
        d: widen(input.d, f32).into_dispatch(),
        norm_weight: widen(input.norm_weight, f32).into_dispatch(),
    };
    Tensor::from_dispatch(Dispatch::mamba2_inner(operands, spec))
}
