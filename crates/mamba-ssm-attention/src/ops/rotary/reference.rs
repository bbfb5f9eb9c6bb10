//! The definition, in tensor operations.

use burn::tensor::Tensor;

use super::{RotaryStyle, RotaryTable};

/// `x`: `[batch, heads, length, head_dim]`; shapes are checked by the caller.
pub(super) fn rotate(x: Tensor<4>, table: &RotaryTable) -> Tensor<4> {
    let [batch, heads, length, head_dim] = x.dims();
    let half = table.cos.dims()[1];
    let dtype = x.dtype();
    // Angles and products in the table's precision: bf16 cosines would shift far positions.
    let wide = table.cos.dtype();
    let turned = x.clone().slice_dim(3, 0..2 * half).cast(wide);
    let cos = table.cos.clone().unsqueeze::<4>();
    let sin = table.sin.clone().unsqueeze::<4>();
    let (a, b) = match table.style {
        RotaryStyle::HalfSplit => (
            turned.clone().slice_dim(3, 0..half),
            turned.slice_dim(3, half..2 * half),
        ),
        RotaryStyle::Interleaved => {
            let pairs = turned.reshape([batch, heads, length, half, 2]);
            (
                pairs.clone().slice_dim(4, 0..1).squeeze_dim(4),
                pairs.slice_dim(4, 1..2).squeeze_dim(4),
            )
        }
    };
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = a * sin + b * cos;
    let turned = match table.style {
        RotaryStyle::HalfSplit => Tensor::cat(vec![first, second], 3),
        RotaryStyle::Interleaved => {
            Tensor::stack::<5>(vec![first, second], 4).reshape([batch, heads, length, 2 * half])
        }
    };
    let turned = turned.cast(dtype);
    if head_dim == 2 * half {
        return turned;
    }
    Tensor::cat(vec![turned, x.slice_dim(3, 2 * half..head_dim)], 3)
}
