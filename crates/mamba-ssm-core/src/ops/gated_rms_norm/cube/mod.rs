//! The gated norm on Burn's CubeCL backends.

mod backward;
mod forward;
mod launch;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
pub(crate) use launch::Norm;

use super::backend::{Gradients, NormBackend, Operands, Spec};
use crate::ops::cube::place::Rows;
use crate::ops::cube::{as_f32, empty_like};

/// The norm of whole rows.
fn norm(operands: Operands<CubeBackend>, spec: Spec) -> Norm {
    let [batch, length, _]: [usize; 3] = operands.x.meta.shape.dims();
    Norm {
        x: Rows::whole(operands.x),
        z: operands.z.into_option().map(Rows::whole),
        weight: as_f32(operands.weight),
        tokens: batch * length,
        group: spec.group,
        eps: spec.eps,
        norm_first: spec.norm_before_gate,
    }
}

/// New rows of the shape of others.
fn rows(like: &Rows) -> Rows {
    let shape: [usize; 3] = like.tensor.meta.shape.dims();
    Rows::whole(empty_like(&like.tensor, shape, like.tensor.dtype))
}

impl NormBackend for CubeBackend {
    fn gated_rms_norm_forward(operands: Operands<Self>, spec: Spec) -> FloatTensor<Self> {
        let norm = norm(operands, spec);
        let y = rows(&norm.x);
        norm.forward(&y);
        y.tensor
    }

    fn gated_rms_norm_backward(
        operands: Operands<Self>,
        dy: FloatTensor<Self>,
        spec: Spec,
    ) -> Gradients<Self> {
        let norm = norm(operands, spec);
        let [dx, dz] = [rows(&norm.x), rows(&norm.x)];
        let weight = norm.backward(&Rows::whole(dy), &dx, norm.z.is_some().then_some(&dz));
        Gradients {
            x: dx.tensor,
            z: dz.tensor,
            weight,
        }
    }
}
