//! The official initialisation of what both layers share.

use burn::module::Param;
use burn::tensor::{Device, Distribution, Tensor};

/// Step sizes log-uniform in `dt_min..dt_max`, at least `floor`, seen through an inverse softplus, so
/// that `softplus(bias)` is the step size. `[size]`.
pub(super) fn dt_bias(
    size: usize,
    (dt_min, dt_max): (f64, f64),
    floor: f64,
    device: &Device,
) -> Param<Tensor<1>> {
    let log = Distribution::Uniform(dt_min.ln(), dt_max.ln());
    let dt = Tensor::<1>::random([size], log, device)
        .exp()
        .clamp_min(floor);
    // The inverse of softplus: dt + log(1 - exp(-dt)).
    let inverse = dt.clone() + (dt.neg().exp().neg() + 1.0).log();
    Param::from_tensor(inverse)
}

/// A depthwise convolution's weight `[channels, width]` and bias `[channels]`, from `U(-k, k)` with
/// `k = 1 / sqrt(width)` as PyTorch draws them.
pub(super) fn conv1d(
    channels: usize,
    width: usize,
    bias: bool,
    device: &Device,
) -> (Param<Tensor<2>>, Option<Param<Tensor<1>>>) {
    let k = 1.0 / (width as f64).sqrt();
    let draw = Distribution::Uniform(-k, k);
    let weight = Param::from_tensor(Tensor::random([channels, width], draw, device));
    let bias = bias.then(|| Param::from_tensor(Tensor::random([channels], draw, device)));
    (weight, bias)
}
