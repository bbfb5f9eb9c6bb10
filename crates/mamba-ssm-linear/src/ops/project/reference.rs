//! The definition, in the operations of any backend.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{FloatDType, Shape};

use super::backend::Bias;

/// `x [tokens, d_input]`, `weight [d_input, d_output]`, `bias [d_output]` -> `[tokens, d_output]`.
///
/// Two axes only: with a leading batch axis, Burn would compute one weight gradient per batch entry
/// and sum them afterwards.
pub(crate) fn forward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Bias<B>,
) -> FloatTensor<B> {
    let dtype = x.dtype().into();
    let y = B::float_matmul(x, cast::<B>(weight, dtype));
    match bias {
        Bias::Without => y,
        Bias::With(bias) => {
            let bias = cast::<B>(bias, dtype);
            let width = bias.shape()[0];
            B::float_add(y, B::float_reshape(bias, Shape::new([1, width])))
        }
    }
}

/// `dy weight^T`: the gradient of `x`.
pub(crate) fn input_gradient<B: Backend>(
    dy: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    let weight = cast::<B>(weight, dy.dtype().into());
    B::float_matmul(dy, B::float_transpose(weight))
}

/// `x^T dy`: the gradient of the weight.
pub(crate) fn weight_gradient<B: Backend>(
    x: FloatTensor<B>,
    dy: FloatTensor<B>,
    dtype: FloatDType,
) -> FloatTensor<B> {
    cast::<B>(B::float_matmul(B::float_transpose(x), dy), dtype)
}

/// The sum of `dy` over tokens: the gradient of the bias.
pub(crate) fn bias_gradient<B: Backend>(dy: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
    let width = dy.shape()[1];
    let sum = B::float_reshape(B::float_sum_dim(dy, 0), Shape::new([width]));
    cast::<B>(sum, dtype)
}

fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
    if tensor.dtype() == dtype.into() {
        tensor
    } else {
        B::float_cast(tensor, dtype)
    }
}
