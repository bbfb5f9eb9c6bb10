//! The scan on Burn's CubeCL backends.
//!
//! `steps` makes step sizes and their sums; `states` walks the chunks for the states between them;
//! `outputs` computes every chunk from the state before it; `gradients` is the backward pass over chunks,
//! with `states` walked backwards. `plan` chooses sizes; `launch` strings the passes together.

mod gradients;
mod launch;
mod outputs;
mod plan;
mod states;
mod steps;

use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;

use super::backend::{Forward, Gradients, Operands, Spec, SsdBackend};
pub(super) use launch::{states_dtype, states_shape};

impl SsdBackend for CubeBackend {
    fn ssd_forward(operands: Operands<Self>, spec: Spec, _keep: bool) -> Forward<Self> {
        launch::forward(operands, &spec)
    }

    fn ssd_backward(
        operands: Operands<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dfinal_state: FloatTensor<Self>,
        spec: Spec,
    ) -> Gradients<Self> {
        launch::backward(operands, [states, dy, dfinal_state], &spec)
    }
}

/// Whether the kernels take a type.
pub(super) fn supports(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}
