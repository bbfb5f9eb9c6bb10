//! Strings the passes together: sizes, memory, arguments.

use burn::backend::Backend;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::gradients::gradients;
use super::outputs::outputs;
use super::plan::{Call, CallLaunch, PlaceLaunch, Plan, Sizes, common_vector, plan};
use super::states::{Walk, pass, walk};
use super::steps::{steps, steps_backward};
use crate::ops::cube::reduce::sum_rows;
use crate::ops::cube::{elem, empty_like, filled, grid, tile_dtype};
use crate::ops::optional::Optional;
use crate::ops::ssd::backend::{Forward, Gradients, Operands, Spec};

/// The shortest chunk of any plan.
const SHORTEST: usize = 16;

/// Cubes that keep a large device busy.
const ENOUGH_CUBES: usize = 512;

/// Room for the states before the chunks, whatever chunk the device's plan will have.
pub(in crate::ops::ssd) fn states_shape(x: [usize; 4], b: [usize; 4]) -> [usize; 1] {
    let [batch, length, heads, headdim] = x;
    [batch * length.div_ceil(SHORTEST) * heads * headdim * b[3]]
}

/// States between chunks are kept in the type of the operands; f16 has not the range.
pub(in crate::ops::ssd) fn states_dtype(x: DType) -> DType {
    match x {
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// An operand whose rows the kernels read: elements of a row side by side, rows evenly spaced.
struct Rows {
    tensor: CubeTensor,
    row: usize,
}

impl Rows {
    fn new(tensor: CubeTensor) -> Self {
        let tensor = into_contiguous(tensor);
        let row = tensor.meta.shape.iter().skip(2).product();
        Self { tensor, row }
    }

    fn place(&self) -> PlaceLaunch {
        PlaceLaunch::new(0, self.row)
    }
}

/// A call's operands, made ready, and what was decided about them.
struct Ready {
    x: Rows,
    b: Rows,
    c: Rows,
    dt: Rows,
    a: CubeTensor,
    d: CubeTensor,
    bias: CubeTensor,
    initial: Option<CubeTensor>,
    sizes: Sizes,
    plan: Plan,
    /// Types of inputs, tiles, and states between chunks.
    types: [ElemType; 3],
    states: DType,
    limit: [f32; 2],
}

fn as_f32(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(CubeBackend::float_cast(tensor, FloatDType::F32))
}

impl Ready {
    fn new(operands: Operands<CubeBackend>, spec: &Spec) -> Self {
        let x = Rows::new(operands.x);
        let dtype = x.tensor.dtype;
        let [batch, length, heads, headdim] = x.tensor.meta.shape.dims();
        let [_, _, groups, state] = operands.b.meta.shape.dims();
        let sizes = Sizes {
            batch,
            length,
            heads,
            headdim,
            groups,
            state,
        };
        let client = x.tensor.client.clone();
        let tile = tile_dtype(&client, dtype);
        let states = states_dtype(dtype);
        let skip = matches!(operands.d, Optional::Present(_));
        let optional = |operand: Optional<CubeBackend>, zeros: usize| match operand {
            Optional::Present(tensor) => as_f32(tensor),
            Optional::Absent => filled(&x.tensor, [zeros], 0.0),
        };
        let vectors = [
            common_vector(16 / dtype.size(), &[headdim]),
            common_vector(16 / dtype.size(), &[state]),
        ];
        let plan = plan(&client, &sizes, vectors, spec.softplus, skip, tile).unwrap_or_else(|| {
            panic!(
                "ssd: headdim = {headdim} and state = {state} need more shared memory than the \
                 device has; use smaller ones"
            )
        });
        Self {
            b: Rows::new(operands.b),
            c: Rows::new(operands.c),
            dt: Rows::new(operands.dt),
            a: as_f32(operands.a),
            d: optional(operands.d, 16),
            bias: optional(operands.dt_bias, heads),
            initial: operands.initial_state.into_option().map(as_f32),
            sizes,
            plan,
            types: [elem(dtype), elem(tile), elem(states)],
            states,
            limit: [
                spec.limit.0 as f32,
                spec.limit.1.min(f64::from(f32::MAX)) as f32,
            ],
            x,
        }
    }

    fn client(&self) -> Client {
        self.x.tensor.client.clone()
    }

    fn chunks(&self) -> usize {
        self.sizes.length.div_ceil(self.plan.chunk)
    }

    fn tiles(&self) -> usize {
        self.sizes.heads / self.plan.heads
    }

    fn vectors(&self) -> [usize; 2] {
        [self.plan.vector_x, self.plan.vector_n]
    }

    /// Segments walked side by side: enough cubes to fill a device, at least four chunks each.
    fn segments(&self) -> (usize, usize) {
        let walkers = self.sizes.batch * self.tiles();
        let wanted = ENOUGH_CUBES
            .div_ceil(walkers)
            .min(self.chunks().div_ceil(4))
            .max(1);
        let each = self.chunks().div_ceil(wanted);
        (self.chunks().div_ceil(each), each)
    }

    /// Tiles that one cube of the passes over chunks treats: all of a group while there are cubes enough.
    fn tiles_per_cube(&self) -> usize {
        let mut tiles = self.tiles() / self.sizes.groups;
        let cubes = |tiles: usize| self.sizes.batch * self.chunks() * self.tiles() / tiles;
        while cubes(tiles) < ENOUGH_CUBES {
            match (2..=tiles).find(|divisor| tiles.is_multiple_of(*divisor)) {
                Some(divisor) => tiles /= divisor,
                None => break,
            }
        }
        tiles
    }

    /// Elements of the states of one batch entry.
    fn state_size(&self) -> usize {
        self.sizes.heads * self.sizes.headdim * self.sizes.state
    }

    fn call(&self, cubes: usize, x: PlaceLaunch, b: PlaceLaunch) -> CallLaunch {
        let (segments, each) = self.segments();
        CallLaunch::new(
            cubes,
            self.sizes.length,
            self.chunks(),
            self.sizes.heads,
            self.sizes.groups,
            segments,
            each,
            self.tiles_per_cube(),
            x,
            b,
            self.c.place(),
            self.dt.place(),
        )
    }

    fn own_call(&self, cubes: usize) -> CallLaunch {
        self.call(cubes, self.x.place(), self.b.place())
    }

    /// A launch with one unit to each of `elements`.
    fn elementwise(&self, elements: usize) -> (CubeCount, CubeDim) {
        let most = self
            .x
            .tensor
            .client
            .properties()
            .hardware
            .max_units_per_cube as usize;
        let units = 256.min(most);
        (
            grid(elements.div_ceil(units)),
            CubeDim::new_1d(units as u32),
        )
    }

    /// Step sizes and their sums, `[batch, chunks * chunk, heads]`.
    fn steps(&self) -> (CubeTensor, CubeTensor) {
        let shape = [
            self.sizes.batch,
            self.chunks() * self.plan.chunk,
            self.sizes.heads,
        ];
        let [step, sum] = [0, 1].map(|_| empty_like(&self.x.tensor, shape, DType::F32));
        let elements = self.sizes.batch * self.chunks() * self.sizes.heads;
        let (count, dim) = self.elementwise(elements);
        steps::launch(
            &self.client(),
            count,
            dim,
            self.dt.tensor.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            self.a.clone().into_buffer_arg(),
            step.clone().into_buffer_arg(),
            sum.clone().into_buffer_arg(),
            self.limit[0],
            self.limit[1],
            self.own_call(elements),
            self.plan,
            elem(self.dt.tensor.dtype),
        );
        (step, sum)
    }

    /// The states at the boundaries of chunks and behind the last, from `rows` and `onto`: x and B
    /// forwards, dy and C backwards.
    fn walk(
        &self,
        rows: &Rows,
        onto: &Rows,
        start: Option<CubeTensor>,
        (step, sum): (&CubeTensor, &CubeTensor),
        backwards: bool,
    ) -> (CubeTensor, CubeTensor) {
        let Sizes {
            batch,
            heads,
            headdim,
            state,
            ..
        } = self.sizes;
        let (segments, _) = self.segments();
        let cubes = batch * self.tiles() * segments;
        let like = &self.x.tensor;
        let size = self.state_size();
        let nothing = || filled(like, [1], 0.0);
        let launch = |start: CubeTensor, states: CubeTensor, last: CubeTensor, mode: Walk| {
            walk::launch(
                &self.client(),
                grid(cubes),
                self.plan.team.cube_dim(),
                rows.tensor.clone().into_buffer_arg(),
                onto.tensor.clone().into_buffer_arg(),
                step.clone().into_buffer_arg(),
                sum.clone().into_buffer_arg(),
                start.into_buffer_arg(),
                states.into_buffer_arg(),
                last.into_buffer_arg(),
                self.call(cubes, rows.place(), onto.place()),
                self.plan,
                mode,
                self.types,
                self.vectors(),
            );
        };
        let mut mode = Walk {
            backwards,
            start: start.is_some(),
            emit: true,
            ends: false,
        };
        let mut start = start;
        if segments > 1 {
            let ends = empty_like(like, [batch, segments, size], DType::F32);
            let states = empty_like(like, [1], self.states);
            let alone = Walk {
                start: false,
                emit: false,
                ends: true,
                ..mode
            };
            launch(nothing(), states, ends.clone(), alone);
            let (count, dim) = self.elementwise(batch * size);
            pass::launch(
                &self.client(),
                count,
                dim,
                sum.clone().into_buffer_arg(),
                start.unwrap_or_else(nothing).into_buffer_arg(),
                ends.clone().into_buffer_arg(),
                size,
                self.own_call(batch * size),
                self.plan,
                mode,
            );
            start = Some(ends);
            mode.start = true;
        }
        let states = empty_like(like, [batch * self.chunks() * size], self.states);
        let last = empty_like(like, [batch, heads, headdim, state], DType::F32);
        let start = start.unwrap_or_else(nothing);
        launch(start, states.clone(), last.clone(), mode);
        (states, last)
    }
}

pub(super) fn forward(operands: Operands<CubeBackend>, spec: &Spec) -> Forward<CubeBackend> {
    let ready = Ready::new(operands, spec);
    let (step, sum) = ready.steps();
    let start = ready.initial.clone();
    let (states, final_state) = ready.walk(&ready.x, &ready.b, start, (&step, &sum), false);
    let y = empty_like::<4>(
        &ready.x.tensor,
        ready.x.tensor.meta.shape.dims(),
        ready.x.tensor.dtype,
    );
    let cubes = ready.sizes.batch * ready.chunks() * ready.tiles() / ready.tiles_per_cube();
    outputs::launch(
        &ready.client(),
        grid(cubes),
        ready.plan.team.cube_dim(),
        ready.x.tensor.clone().into_buffer_arg(),
        ready.b.tensor.clone().into_buffer_arg(),
        ready.c.tensor.clone().into_buffer_arg(),
        ready.d.clone().into_buffer_arg(),
        step.into_buffer_arg(),
        sum.into_buffer_arg(),
        states.clone().into_buffer_arg(),
        y.clone().into_buffer_arg(),
        ready.own_call(cubes),
        ready.plan,
        ready.types,
        ready.vectors(),
    );
    Forward {
        y,
        final_state,
        states,
    }
}

pub(super) fn backward(
    operands: Operands<CubeBackend>,
    [states, dy, dfinal_state]: [CubeTensor; 3],
    spec: &Spec,
) -> Gradients<CubeBackend> {
    let a_dtype = operands.a.dtype;
    let ready = Ready::new(operands, spec);
    let Sizes {
        batch,
        length,
        heads,
        headdim,
        groups,
        state,
    } = ready.sizes;
    let like = ready.x.tensor.clone();
    let dy = Rows::new(dy);
    let (step, sum) = ready.steps();
    let start = Some(as_f32(dfinal_state));
    let (dstates, dinitial) = ready.walk(&dy, &ready.c, start, (&step, &sum), true);

    let padded = [batch, ready.chunks() * ready.plan.chunk, heads];
    let [dsteps, decays] = [0, 1].map(|_| empty_like(&like, padded, DType::F32));
    let dx = empty_like::<4>(&like, like.meta.shape.dims(), like.dtype);
    let tiles = ready.tiles_per_cube();
    let parts = ready.tiles() / groups / tiles;
    let dtype = if parts == 1 { like.dtype } else { DType::F32 };
    let shape = [parts, batch, length, groups, state];
    let [db, dc] = [0, 1].map(|_| empty_like(&like, shape, dtype));
    let dd_rows = if ready.plan.skip {
        batch * ready.chunks()
    } else {
        1
    };
    let dd = empty_like(&like, [dd_rows, heads * headdim], DType::F32);
    let cubes = batch * ready.chunks() * ready.tiles() / tiles;
    let [input, tile, kept] = ready.types;
    gradients::launch(
        &ready.client(),
        grid(cubes),
        ready.plan.team.cube_dim(),
        ready.x.tensor.clone().into_buffer_arg(),
        ready.b.tensor.clone().into_buffer_arg(),
        ready.c.tensor.clone().into_buffer_arg(),
        ready.a.clone().into_buffer_arg(),
        ready.d.clone().into_buffer_arg(),
        dy.tensor.clone().into_buffer_arg(),
        step.into_buffer_arg(),
        sum.into_buffer_arg(),
        states.into_buffer_arg(),
        dstates.into_buffer_arg(),
        dx.clone().into_buffer_arg(),
        db.clone().into_buffer_arg(),
        dc.clone().into_buffer_arg(),
        dsteps.clone().into_buffer_arg(),
        decays.clone().into_buffer_arg(),
        dd.clone().into_buffer_arg(),
        ready.own_call(cubes),
        ready.plan,
        [input, tile, kept, elem(dtype)],
        ready.vectors(),
    );
    let (ddt, dbias) = ready.steps_backward(dsteps);
    let [db, dc] =
        [db, dc].map(|parts| sum_parts(parts, [batch, length, groups, state], like.dtype));
    let reshape =
        |tensor, shape: &[usize]| CubeBackend::float_reshape(tensor, Shape::from(shape.to_vec()));
    let dd = if ready.plan.skip {
        sum_rows(dd, dd_rows, heads * headdim)
    } else {
        filled(&like, [heads * headdim], 0.0)
    };
    Gradients {
        x: dx,
        dt: ddt,
        a: CubeBackend::float_cast(
            sum_rows(decays, padded[0] * padded[1], heads),
            a_dtype.into(),
        ),
        b: db,
        c: dc,
        d: reshape(dd, &[heads, headdim]),
        dt_bias: sum_rows(dbias, batch * length, heads),
        initial_state: dinitial,
    }
}

/// `[parts, ..]` summed over its parts.
fn sum_parts(parts: CubeTensor, shape: [usize; 4], dtype: DType) -> CubeTensor {
    let count = parts.meta.shape[0];
    let sum = if count == 1 {
        parts
    } else {
        sum_rows(parts, count, shape.iter().product())
    };
    let sum = CubeBackend::float_reshape(sum, Shape::new(shape));
    if sum.dtype == dtype {
        sum
    } else {
        CubeBackend::float_cast(sum, dtype.into())
    }
}

impl Ready {
    /// The gradient of `dt`, and in f32 for its bias.
    fn steps_backward(&self, dsteps: CubeTensor) -> (CubeTensor, CubeTensor) {
        let Sizes {
            batch,
            length,
            heads,
            ..
        } = self.sizes;
        let shape = [batch, length, heads];
        let ddt = empty_like(&self.x.tensor, shape, self.dt.tensor.dtype);
        let dbias = empty_like(&self.x.tensor, shape, DType::F32);
        let elements = batch * length * heads;
        let (count, dim) = self.elementwise(elements);
        steps_backward::launch(
            &self.client(),
            count,
            dim,
            self.dt.tensor.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            dsteps.into_buffer_arg(),
            ddt.clone().into_buffer_arg(),
            dbias.clone().into_buffer_arg(),
            self.limit[0],
            self.limit[1],
            self.own_call(elements),
            self.plan,
            elem(self.dt.tensor.dtype),
        );
        (ddt, dbias)
    }
}
