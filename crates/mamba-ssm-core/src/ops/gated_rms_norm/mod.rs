//! Root-mean-square normalisation with a SiLU gate, as Mamba-2 closes its inner block.

mod autodiff;
pub(crate) mod backend;
#[cfg(feature = "flex")]
pub(crate) mod cpu;
#[cfg(feature = "cubecl")]
pub(crate) mod cube;
mod reference;

use backend::{NormBackend, Operands, Spec};
use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};
use mamba_ssm_linear::device::has_kernels;

use crate::ops::optional::Optional;
use crate::ops::precision::{narrow_to, widen};

/// The operands of [`gated_rms_norm`].
#[derive(Debug, Clone)]
pub struct GatedNormInput {
    /// `[batch, length, dim]`.
    pub x: Tensor<3>,
    /// The gate, `[batch, length, dim]`; none leaves a plain RMS norm.
    pub z: Option<Tensor<3>>,
    /// `[dim]`.
    pub weight: Tensor<1>,
}

/// How to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedNormOptions {
    /// Added to the mean square.
    pub eps: f64,
    /// Channels that share one mean square; none takes all of them. Must divide `dim`.
    pub group_size: Option<usize>,
    /// Whether the norm comes before the gate (`norm(x) * silu(z)`) or after it (`norm(x * silu(z))`).
    pub norm_before_gate: bool,
}

impl Default for GatedNormOptions {
    /// `eps` 1e-5, one group, norm after the gate: what Mamba-2 uses.
    fn default() -> Self {
        Self {
            eps: 1e-5,
            group_size: None,
            norm_before_gate: false,
        }
    }
}

/// `rms_norm(x * silu(z)) * weight`, or `rms_norm(x) * weight * silu(z)` with `norm_before_gate`,
/// where `rms_norm(v) = v / sqrt(mean(v^2) + eps)` over each group of channels.
///
/// Returns `[batch, length, dim]` in the type of `x`; computed in f32 at least.
///
/// # Panics
///
/// When shapes disagree or the group size does not divide `dim`.
///
/// Source: `mamba_ssm.ops.triton.layernorm_gated.RMSNorm`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{GatedNormInput, GatedNormOptions, gated_rms_norm};
///
/// let device = Device::default();
/// let x = Tensor::<3>::from_floats([[[3.0, 4.0]]], &device);
/// let weight = Tensor::<1>::from_floats([1.0, 2.0], &device);
/// let input = GatedNormInput { x, z: None, weight };
/// let y = gated_rms_norm(input, &GatedNormOptions::default());
/// let rms = 12.5_f32.sqrt();
/// let y = y.into_data().try_to_vec::<f32>().unwrap();
/// assert!((y[0] - 3.0 / rms).abs() < 1e-5 && (y[1] - 8.0 / rms).abs() < 1e-5);
/// ```
pub fn gated_rms_norm(input: GatedNormInput, options: &GatedNormOptions) -> Tensor<3> {
    let [_, _, dim] = input.x.dims();
    assert_eq!(
        input.weight.dims(),
        [dim],
        "gated_rms_norm: the weight must have x's dim = {dim} elements"
    );
    if let Some(z) = &input.z {
        assert_eq!(
            z.dims(),
            input.x.dims(),
            "gated_rms_norm: z must have the shape of x"
        );
    }
    let group = options.group_size.unwrap_or(dim);
    assert!(
        group > 0 && dim.is_multiple_of(group),
        "gated_rms_norm: dim = {dim} is not a multiple of group_size = {group}"
    );
    let dtype = input.x.dtype();
    if !has_kernels(&input.x.device(), dtype) {
        return reference::gated_rms_norm(input, group, options);
    }
    let operands = Operands {
        x: input.x.into_dispatch(),
        z: Optional::of(input.z.map(|z| narrow_to(z, dtype))),
        weight: widen(input.weight, FloatDType::F32).into_dispatch(),
    };
    let spec = Spec {
        group,
        eps: options.eps,
        norm_before_gate: options.norm_before_gate,
    };
    Tensor::from_dispatch(Dispatch::gated_rms_norm(operands, spec))
}
