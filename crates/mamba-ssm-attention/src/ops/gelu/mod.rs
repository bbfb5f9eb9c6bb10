//! The exact Gaussian error linear unit: `y = x P(x)`, `P` the normal distribution function.
//!
//! Source: Hendrycks and Gimpel, *Gaussian Error Linear Units*, 2016; `torch.nn.functional.gelu`.

mod autodiff;
mod backend;
#[cfg(feature = "cubecl")]
mod cube;
mod reference;

use backend::GeluBackend;
use burn::backend::Dispatch;
use burn::tensor::Tensor;
use mamba_ssm_linear::device::has_cube_kernels;

/// The GELU of every element.
pub(crate) fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if !has_cube_kernels(&x.device(), x.dtype()) {
        return reference::gelu(x);
    }
    Tensor::from_dispatch(Dispatch::exact_gelu(x.into_dispatch()))
}
