//! Root-mean-square normalisation without a weight: `y = x / sqrt(mean(x^2) + epsilon)` over the last axis.
//!
//! Source: Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019, eq. 4, the gain aside.

mod autodiff;
mod backend;
#[cfg(feature = "cubecl")]
mod cube;
mod reference;

use backend::NormaliseBackend;
use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};
use mamba_ssm_linear::device::has_cube_kernels;

/// Normalises each token of `x`, `[batch, length, width]`, in its type; computed in `wide` where the
/// device has no kernel, in f32 where it has one.
pub(crate) fn normalise(x: Tensor<3>, epsilon: f64, wide: FloatDType) -> Tensor<3> {
    if !has_cube_kernels(&x.device(), x.dtype()) {
        return reference::normalise(x, epsilon, wide);
    }
    Tensor::from_dispatch(Dispatch::normalise(x.into_dispatch(), epsilon))
}
