//! What a block adds, with dropout: `r = x + m y / (1 - p)`, `m` zero with probability `p` and else one,
//! drawn for each element.
//!
//! Source: Srivastava et al., *Dropout*, 2014; `torch.nn.functional.dropout`, then `+`.

mod autodiff;
mod backend;
#[cfg(feature = "cubecl")]
mod cube;
mod reference;

use backend::ResidualBackend;
use burn::backend::Dispatch;
use burn::nn::Dropout;
use burn::tensor::{DType, Distribution, Tensor};
use mamba_ssm_linear::device::has_cube_kernels;

/// `x + dropout(y)`, both `[batch, length, width]`; plainly `x + y` outside training.
///
/// The mask follows the device's seed, as Burn's own does.
pub(crate) fn add_dropped(x: Tensor<3>, y: Tensor<3>, dropout: &Dropout) -> Tensor<3> {
    let device = x.device();
    let drops = dropout.prob > 0.0 && dropout.training.is_enabled() && device.is_autodiff();
    if !drops {
        return x + y;
    }
    if !has_cube_kernels(&device, x.dtype()) || x.dtype() != y.dtype() {
        return reference::add_dropped(x, y, dropout);
    }
    let uniform = Distribution::Uniform(0.0, 1.0);
    let seed = Tensor::<1>::random([2], uniform, (&device.inner(), DType::F32));
    let [x, y] = [x, y].map(Tensor::into_dispatch);
    let r = Dispatch::add_dropped(x, y, seed.into_dispatch(), dropout.prob);
    Tensor::from_dispatch(r)
}
