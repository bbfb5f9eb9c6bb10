//! The definition: Burn's.

use burn::tensor::Tensor;

pub(super) fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    burn::tensor::activation::gelu(x)
}
