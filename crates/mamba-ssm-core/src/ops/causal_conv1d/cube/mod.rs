//! The convolution on Burn's CubeCL backends.

mod backward;
mod forward;
mod launch;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
pub(crate) use launch::Conv;

use super::backend::{ConvBackend, Gradients, Operands};
use crate::ops::cube::empty_like;
use crate::ops::cube::place::Rows;

/// The convolution of whole rows.
fn conv(operands: Operands<CubeBackend>, activation: bool) -> Conv {
    let [batch, length, channels] = operands.x.meta.shape.dims();
    Conv {
        x: Rows::spaced(operands.x),
        batch,
        length,
        channels,
        weight: operands.weight,
        bias: operands.bias.into_option(),
        initial: operands.initial_state.into_option(),
        activation,
    }
}

/// New rows like the convolution's own.
fn rows(conv: &Conv) -> Rows {
    let x = &conv.x.tensor;
    Rows::whole(empty_like(
        x,
        [conv.batch, conv.length, conv.channels],
        x.dtype,
    ))
}

impl ConvBackend for CubeBackend {
    fn causal_conv1d_forward(operands: Operands<Self>, activation: bool) -> FloatTensor<Self> {
        let conv = conv(operands, activation);
        let y = rows(&conv);
        conv.forward(&y);
        y.tensor
    }

    fn causal_conv1d_backward(
        operands: Operands<Self>,
        dy: FloatTensor<Self>,
        activation: bool,
    ) -> Gradients<Self> {
        let conv = conv(operands, activation);
        let dx = rows(&conv);
        let found = conv.backward(&Rows::spaced(dy), &dx);
        Gradients {
            x: dx.tensor,
            weight: found.weight,
            bias: found.bias,
            initial_state: found.initial,
        }
    }
}
