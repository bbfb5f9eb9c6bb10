//! The definition, in tensor operations.

use burn::tensor::{FloatDType, Tensor};

pub(super) fn normalise(x: Tensor<3>, epsilon: f64, wide: FloatDType) -> Tensor<3> {
    let own = x.dtype();
    let x = x.cast(wide);
    let size = (x.clone().square().mean_dim(2) + epsilon).sqrt();
    (x / size).cast(own)
}
