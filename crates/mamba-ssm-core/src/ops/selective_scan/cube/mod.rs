//! The scan on Burn's CubeCL backends.

mod backward;
mod common;
mod forward;
mod launch;
mod tiles;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;

use super::backend::{Forward, Gradients, Operands, ScanBackend};

impl ScanBackend for CubeBackend {
    fn selective_scan_forward(
        operands: Operands<Self>,
        softplus: bool,
        keep: bool,
    ) -> Forward<Self> {
        launch::forward(operands, softplus, keep)
    }

    fn selective_scan_backward(
        operands: Operands<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dfinal_state: FloatTensor<Self>,
        softplus: bool,
    ) -> Gradients<Self> {
        launch::backward(operands, states, dy, dfinal_state, softplus)
    }
}
