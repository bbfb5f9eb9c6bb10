//! Strings the passes together: memory and arguments.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::gradients::gradients;
use super::gradients_matrix::gradients_matrix;
use super::outputs::outputs;
use super::plan::Sizes;
use super::ready::{Destinations, Ready, Scan};
use crate::ops::cube::place::Rows;
use crate::ops::cube::reduce::{sum_parts_into, sum_rows};
use crate::ops::cube::{elem, empty_like, filled, grid};

/// The shortest chunk of any plan.
const SHORTEST: usize = 16;

/// Room for the states before the chunks, whatever chunk the device's plan will have.
pub(crate) fn states_shape(x: [usize; 4], b: [usize; 4]) -> [usize; 1] {
    let [batch, length, heads, headdim] = x;
    [batch * length.div_ceil(SHORTEST) * heads * headdim * b[3]]
}

/// States between chunks are kept in the type of the operands; f16 has not the range.
pub(crate) fn states_dtype(x: DType) -> DType {
    match x {
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// The gradients of the parameters, f32, and of the initial state.
pub(crate) struct ParameterGradients {
    pub(crate) a: CubeTensor,
    /// `[heads * headdim]`.
    pub(crate) d: CubeTensor,
    pub(crate) bias: CubeTensor,
    pub(crate) initial: CubeTensor,
}

/// The forward pass: the output into `y`'s rows; returns the final state and the states between chunks, or,
/// where those are not to be kept, anything.
pub(crate) fn forward(scan: Scan, y: &Rows, keep: bool) -> (CubeTensor, CubeTensor) {
    let ready = Ready::new(scan, [&[y], &[]]);
    let (step, sum) = ready.steps();
    if ready.plan.fragments {
        let [states, final_state] = ready.forward_matrix([&step, &sum], y, keep);
        return (final_state, states);
    }
    let Scan {
        x, b, c, initial, ..
    } = &ready.scan;
    let [states, final_state] = ready.states([x, b], [&step, &sum], initial.clone(), false);
    let cubes = ready.sizes.batch * ready.chunks() * ready.tiles() / ready.tiles_per_cube();
    let to = Destinations {
        x: y.clone(),
        ..ready.own()
    };
    outputs::launch(
        &ready.client(),
        grid(cubes),
        ready.plan.team.cube_dim(),
        ready.addresses,
        x.tensor.clone().into_buffer_arg(),
        b.tensor.clone().into_buffer_arg(),
        c.tensor.clone().into_buffer_arg(),
        ready.d.clone().into_buffer_arg(),
        step.into_buffer_arg(),
        sum.into_buffer_arg(),
        states.clone().into_buffer_arg(),
        y.tensor.clone().into_buffer_arg(),
        ready.call(cubes, [x, b], &to, false),
        ready.plan,
        ready.types,
        ready.vectors(),
    );
    (final_state, states)
}

/// The backward pass: the gradients of the operands into their rows; returns those of the parameters.
pub(crate) fn backward(
    scan: Scan,
    states: CubeTensor,
    dy: &Rows,
    dfinal_state: Option<CubeTensor>,
    to: &Destinations,
) -> ParameterGradients {
    let ready = Ready::new(scan, [&[dy, &to.x], &[]]);
    let Sizes {
        batch,
        length,
        heads,
        headdim,
        groups,
        state,
    } = ready.sizes;
    let like = ready.scan.x.tensor.clone();
    let (step, sum) = ready.steps();
    let [dstates, dinitial] = ready.states([dy, &ready.scan.c], [&step, &sum], dfinal_state, true);

    let padded = [batch, ready.chunks() * ready.plan.chunk, heads];
    let [dsteps, decays] = [0, 1].map(|_| empty_like(&like, padded, DType::F32));
    let tiles = ready.tiles_per_cube();
    let parts = ready.tiles() / groups / tiles;
    // Blocks of heads of one group leave parts, which are summed afterwards.
    let own = |rows: &Rows| match parts {
        1 => rows.clone(),
        _ => Rows::whole(empty_like(
            &like,
            [parts, batch * length, groups * state],
            DType::F32,
        )),
    };
    let direct = Destinations {
        x: to.x.clone(),
        b: own(&to.b),
        c: own(&to.c),
        dt: to.dt.clone(),
    };
    let dd_rows = if ready.plan.skip {
        batch * ready.chunks() * ready.skip_parts()
    } else {
        1
    };
    let dd = empty_like(&like, [dd_rows, heads * headdim], DType::F32);
    let cubes = batch * ready.chunks() * ready.tiles() / tiles;
    let [input, tile, kept] = ready.types;
    let out = elem(direct.b.tensor.dtype);
    let (client, count) = (ready.client(), grid(cubes));
    let read = [&ready.scan.x, &ready.scan.b, &ready.scan.c].map(|rows| rows.tensor.clone());
    let parameters = [ready.scan.a.clone(), ready.d.clone()];
    let made = [step, sum, states, dstates];
    let written = [&direct.x, &direct.b, &direct.c].map(|rows| rows.tensor.clone());
    let terms = [dsteps.clone(), decays.clone(), dd.clone()];
    let [x, b, c] = read.map(CubeTensor::into_buffer_arg);
    let [a, d] = parameters.map(CubeTensor::into_buffer_arg);
    let dy = dy.tensor.clone().into_buffer_arg();
    let [step, sum, states, dstates] = made.map(CubeTensor::into_buffer_arg);
    let [dx, db, dc] = written.map(CubeTensor::into_buffer_arg);
    let [dsteps_arg, decays_arg, dd_arg] = terms.map(CubeTensor::into_buffer_arg);
    let call = ready.call(cubes, [&ready.scan.x, &ready.scan.b], &direct, true);
    if ready.plan.fragments {
        let dim = CubeDim::new_1d(ready.plan.gradient_units() as u32);
        gradients_matrix::launch(
            &client,
            count,
            dim,
            ready.addresses,
            x,
            b,
            c,
            a,
            d,
            dy,
            step,
            sum,
            states,
            dstates,
            dx,
            db,
            dc,
            dsteps_arg,
            decays_arg,
            dd_arg,
            call,
            ready.plan,
            [input, kept, out],
            ready.vectors(),
        );
    } else {
        let (plan, dim) = (ready.gradient_plan, ready.gradient_plan.team.cube_dim());
        gradients::launch(
            &client,
            count,
            dim,
            ready.addresses,
            x,
            b,
            c,
            a,
            d,
            dy,
            step,
            sum,
            states,
            dstates,
            dx,
            db,
            dc,
            dsteps_arg,
            decays_arg,
            dd_arg,
            call,
            plan,
            [input, tile, kept, out],
            ready.vectors(),
        );
    }
    if parts > 1 {
        let shape = [parts, batch * length, groups * state];
        sum_parts_into(direct.b.tensor, shape, &to.b);
        sum_parts_into(direct.c.tensor, shape, &to.c);
    }
    let dbias = ready.steps_backward(dsteps, to);
    let whole = heads / ready.plan.parts;
    ParameterGradients {
        a: sum_of_parts(sum_rows(decays, padded[0] * padded[1], heads), whole),
        d: if ready.plan.skip {
            sum_rows(dd, dd_rows, heads * headdim)
        } else {
            filled(&like, [heads * headdim], 0.0)
        },
        bias: sum_rows(dbias, batch * length, whole),
        initial: dinitial,
    }
}

/// Sums what the parts of each head have: `[heads]`.
fn sum_of_parts(x: CubeTensor, heads: usize) -> CubeTensor {
    let parts = x.meta.num_elements() / heads;
    if parts == 1 {
        return x;
    }
    let x = CubeBackend::float_reshape(x, Shape::new([heads, parts]));
    CubeBackend::float_reshape(CubeBackend::float_sum_dim(x, 1), Shape::new([heads]))
}
