//! The definition, in tensor operations.

use burn::tensor::Tensor;

/// `x [tokens, d_input]`, `weight [d_input, d_output]`, `bias [d_output]` -> `[tokens, d_output]`.
///
/// Two axes only: with a leading batch axis, Burn would compute one weight gradient per batch entry
/// and sum them afterwards.
pub(super) fn project(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let y = x.matmul(weight);
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}
