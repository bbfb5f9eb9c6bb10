//! The scan on Burn's CubeCL backends.
//!
//! `steps` makes step sizes and their sums; `states` walks the chunks for the states between them;
//! `outputs` computes every chunk from the state before it; `gradients` is the backward pass over chunks,
//! with `states` walked backwards. On devices that multiply fragments in registers `states_matrix` and
//! `gradients_matrix` take their place, and `forward_matrix` walks for states and outputs (`outputs_matrix`)
//! together, from products that `scores_matrix` finds for many heads. `plan` and `ready` choose sizes, `walks`
//! strings the walks together, `launch` all passes.

mod forward_matrix;
mod gradients;
mod gradients_matrix;
mod launch;
mod outputs;
mod outputs_matrix;
mod plan;
mod ready;
mod scores_matrix;
mod states;
mod states_matrix;
mod steps;
mod walks;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use burn_cubecl::CubeBackend;

use super::backend::{Forward, Gradients, Operands, Spec, SsdBackend};
use crate::ops::cube::place::Rows;
use crate::ops::cube::{as_f32, empty_like};
pub(crate) use launch::{backward, forward, states_dtype, states_shape};
pub(crate) use plan::Sizes;
pub(crate) use ready::{Destinations, Scan};

fn scan(operands: Operands<CubeBackend>, spec: Spec) -> Scan {
    let [batch, length, heads, headdim] = operands.x.meta.shape.dims();
    let [_, _, groups, state] = operands.b.meta.shape.dims();
    Scan {
        x: Rows::whole(operands.x),
        b: Rows::whole(operands.b),
        c: Rows::whole(operands.c),
        dt: Rows::whole(operands.dt),
        a: as_f32(operands.a),
        d: operands.d.into_option().map(as_f32),
        bias: operands.dt_bias.into_option().map(as_f32),
        initial: operands.initial_state.into_option().map(as_f32),
        sizes: Sizes {
            batch,
            length,
            heads,
            headdim,
            groups,
            state,
        },
        spec,
    }
}

/// Rows of a new tensor of another's shape and type.
fn rows_like(rows: &Rows) -> Rows {
    let tensor = &rows.tensor;
    let shape = [tensor.meta.shape.num_elements() / rows.row, 1, rows.row];
    Rows::whole(empty_like(tensor, shape, tensor.dtype))
}

fn shaped(rows: Rows, shape: Shape) -> FloatTensor<CubeBackend> {
    CubeBackend::float_reshape(rows.tensor, shape)
}

impl SsdBackend for CubeBackend {
    fn ssd_forward(operands: Operands<Self>, spec: Spec, keep: bool) -> Forward<Self> {
        let shape = operands.x.meta.shape.clone();
        let scan = scan(operands, spec);
        let y = rows_like(&scan.x);
        let (final_state, states) = forward(scan, &y, keep);
        Forward {
            y: shaped(y, shape),
            final_state,
            states,
        }
    }

    fn ssd_backward(
        operands: Operands<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dfinal_state: FloatTensor<Self>,
        spec: Spec,
    ) -> Gradients<Self> {
        let shapes = [&operands.x, &operands.dt, &operands.b, &operands.c]
            .map(|tensor| tensor.meta.shape.clone());
        let scan = scan(operands, spec);
        let sizes = scan.sizes;
        let to = Destinations {
            x: rows_like(&scan.x),
            b: rows_like(&scan.b),
            c: rows_like(&scan.c),
            dt: rows_like(&scan.dt),
        };
        let found = backward(
            scan,
            states,
            &Rows::whole(dy),
            Some(as_f32(dfinal_state)),
            &to,
        );
        let [x, dt, b, c] = shapes;
        Gradients {
            x: shaped(to.x, x),
            dt: shaped(to.dt, dt),
            a: found.a,
            b: shaped(to.b, b),
            c: shaped(to.c, c),
            d: CubeBackend::float_reshape(found.d, Shape::new([sizes.heads, sizes.headdim])),
            dt_bias: found.bias,
            initial_state: found.initial,
        }
    }
}
