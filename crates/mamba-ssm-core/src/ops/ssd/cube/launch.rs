//! Strings the passes together: sizes, memory, arguments.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::forward_matrix::forward_matrix;
use super::gradients::{gradients, skip_parts};
use super::gradients_matrix::{gradients_matrix, half_planes};
use super::outputs::outputs;
use super::plan::{CallLaunch, Plan, Sizes, plan};
use super::states::{Direction, pass, walk};
use super::states_matrix::walk_matrix;
use super::steps::{HEADS, steps, steps_backward};
use crate::ops::cube::place::Rows;
use crate::ops::cube::reduce::{sum_parts_into, sum_rows};
use crate::ops::cube::{address_type, alone, elem, empty_like, filled, grid, tile_dtype};
use crate::ops::ssd::backend::Spec;

/// The shortest chunk of any plan.
const SHORTEST: usize = 16;

/// Cubes that keep a large device busy.
const ENOUGH_CUBES: usize = 512;

/// Cubes that walk over the chunks' states side by side. Measured: fewer leave a device idle on one long
/// sequence, more only lengthen the passing from segment to segment (`docs/performance.md`).
const WALKERS: usize = 256;

/// Units that a multiprocessor runs of a walk for states with fragments, and of one for outputs too.
const STATE_UNITS: usize = 512;
const OUTPUT_UNITS: usize = 256;

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

/// A scan: its operands and where they lie.
pub(crate) struct Scan {
    pub(crate) x: Rows,
    pub(crate) b: Rows,
    pub(crate) c: Rows,
    pub(crate) dt: Rows,
    /// `[heads]`, f32.
    pub(crate) a: CubeTensor,
    /// `[heads, headdim]`, f32.
    pub(crate) d: Option<CubeTensor>,
    /// `[heads]`, f32.
    pub(crate) bias: Option<CubeTensor>,
    /// `[batch, heads, headdim, state]`, f32.
    pub(crate) initial: Option<CubeTensor>,
    pub(crate) sizes: Sizes,
    pub(crate) spec: Spec,
}

/// Where the gradients of the operands go.
pub(crate) struct Destinations {
    pub(crate) x: Rows,
    pub(crate) b: Rows,
    pub(crate) c: Rows,
    pub(crate) dt: Rows,
}

/// The gradients of the parameters, f32, and of the initial state.
pub(crate) struct ParameterGradients {
    pub(crate) a: CubeTensor,
    /// `[heads * headdim]`.
    pub(crate) d: CubeTensor,
    pub(crate) bias: CubeTensor,
    pub(crate) initial: CubeTensor,
}

/// A scan and what was decided about it.
struct Ready {
    scan: Scan,
    d: CubeTensor,
    bias: CubeTensor,
    sizes: Sizes,
    plan: Plan,
    /// Of the pass for gradients, which has more units.
    gradient_plan: Plan,
    /// Of a walk for states alone.
    state_plan: Plan,
    /// Types of inputs, tiles, and states between chunks.
    types: [ElemType; 3],
    states: DType,
    limit: [f32; 2],
    /// What indices into every tensor of the call need.
    addresses: AddressType,
}

/// What indices into every tensor of a call need: those that came in, and the largest that it makes.
fn addresses(scan: &Scan, outputs: &[&[&Rows]; 2], plan: &Plan) -> AddressType {
    let sizes = &scan.sizes;
    let operands = [&scan.x, &scan.b, &scan.c, &scan.dt];
    let given = operands.iter().chain(outputs[0]).chain(outputs[1]);
    let given: Vec<_> = given.map(|rows| &rows.tensor).collect();
    let chunks = sizes.batch * sizes.length.div_ceil(plan.chunk);
    let states = chunks * sizes.heads * sizes.headdim * sizes.state;
    let steps = chunks * plan.chunk * sizes.heads;
    // Parts of the gradients of B and C, one for each tile of heads at most.
    let parts = steps / plan.heads * sizes.state;
    address_type(&given).max(AddressType::from_len(states.max(steps).max(parts)))
}

impl Ready {
    /// Of a scan whose outputs go to `outputs`: rows of x's and of B's width.
    fn new(scan: Scan, outputs: [&[&Rows]; 2]) -> Self {
        let like = &scan.x.tensor;
        let dtype = like.dtype;
        let sizes = scan.sizes;
        let client = like.client.clone();
        let tile = tile_dtype(&client, dtype);
        let states = states_dtype(dtype);
        let vector = |own: &[&Rows], others: &[&Rows], width: usize| {
            own.iter()
                .chain(others)
                .map(|rows| rows.vector(width))
                .min()
                .unwrap_or(1)
        };
        let vectors = [
            vector(&[&scan.x], outputs[0], sizes.headdim),
            vector(&[&scan.b, &scan.c], outputs[1], sizes.state),
        ];
        let skip = scan.d.is_some();
        let plan =
            plan(&client, &sizes, vectors, scan.spec.softplus, skip, tile).unwrap_or_else(|| {
                panic!(
                    "ssd: headdim = {} and state = {} need more shared memory than the device has; \
                     use smaller ones",
                    sizes.headdim, sizes.state
                )
            });
        let limit = scan.spec.limit;
        let addresses = addresses(&scan, &outputs, &plan);
        Self {
            addresses,
            d: scan.d.clone().unwrap_or_else(|| filled(like, [16], 0.0)),
            bias: scan
                .bias
                .clone()
                .unwrap_or_else(|| filled(like, [sizes.heads], 0.0)),
            sizes,
            plan,
            gradient_plan: plan.for_gradients(&client, tile),
            state_plan: if plan.fragments {
                plan.for_states(&sizes, &client.properties().hardware)
            } else {
                plan
            },
            types: [elem(dtype), elem(tile), elem(states)],
            states,
            limit: [limit.0 as f32, limit.1.min(f64::from(f32::MAX)) as f32],
            scan,
        }
    }

    /// Parts in which the gradient of D is summed over a chunk.
    fn skip_parts(&self) -> usize {
        if self.plan.fragments {
            half_planes(self.plan)
        } else {
            skip_parts(self.gradient_plan)
        }
    }

    fn client(&self) -> Client {
        self.scan.x.tensor.client.clone()
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

    /// Cubes of a walk over one segment.
    fn walkers(&self, plan: &Plan) -> usize {
        self.sizes.batch * self.sizes.heads / plan.heads
    }

    /// Segments walked side by side, and chunks of each: as many as keep the device busy, at least four chunks
    /// each.
    fn segments(&self, backwards: bool) -> (usize, usize) {
        let multiprocessors = self
            .client()
            .properties()
            .hardware
            .num_streaming_multiprocessors;
        let enough = match multiprocessors {
            // One more than there is room for would have to wait for all the others.
            Some(count) if self.plan.fragments => {
                let (room, units, walkers) = if backwards {
                    let plan = &self.state_plan;
                    (STATE_UNITS, plan.walk_units(), self.walkers(plan))
                } else {
                    let plan = &self.plan;
                    (OUTPUT_UNITS, plan.forward_units(), self.walkers(plan))
                };
                count as usize * (room / units).max(1) / walkers
            }
            _ => WALKERS.div_ceil(self.walkers(&self.plan)),
        };
        let wanted = enough.clamp(1, self.chunks().div_ceil(4));
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

    /// Of a pass in one direction.
    fn call(
        &self,
        cubes: usize,
        [x, b]: [&Rows; 2],
        to: &Destinations,
        backwards: bool,
    ) -> CallLaunch {
        let (segments, each) = self.segments(backwards);
        CallLaunch::new(
            cubes,
            self.sizes.length,
            self.chunks(),
            self.sizes.heads,
            self.sizes.groups,
            segments,
            each,
            self.tiles_per_cube(),
            x.place(),
            b.place(),
            self.scan.c.place(),
            self.scan.dt.place(),
            to.x.place(),
            to.b.place(),
            to.c.place(),
            to.dt.place(),
        )
    }

    /// A call that writes no rows, or whole ones.
    fn own_call(&self, cubes: usize, backwards: bool) -> CallLaunch {
        self.call(cubes, [&self.scan.x, &self.scan.b], &self.own(), backwards)
    }

    /// The operands' own places.
    fn own(&self) -> Destinations {
        let Scan { x, b, c, dt, .. } = &self.scan;
        Destinations {
            x: x.clone(),
            b: b.clone(),
            c: c.clone(),
            dt: dt.clone(),
        }
    }

    /// A launch with one unit to each of `elements`.
    fn elementwise(&self, elements: usize) -> (CubeCount, CubeDim) {
        let units = alone(&self.scan.x.tensor);
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
        let [step, sum] = [0, 1].map(|_| empty_like(&self.scan.x.tensor, shape, DType::F32));
        let blocks = self.sizes.heads.div_ceil(HEADS);
        let cubes = self.sizes.batch * self.chunks() * blocks;
        steps::launch(
            &self.client(),
            grid(cubes),
            self.plan.team.cube_dim(),
            self.addresses,
            self.scan.dt.tensor.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            self.scan.a.clone().into_buffer_arg(),
            step.clone().into_buffer_arg(),
            sum.clone().into_buffer_arg(),
            self.limit[0],
            self.limit[1],
            self.own_call(cubes, false),
            self.plan,
            elem(self.scan.dt.tensor.dtype),
        );
        (step, sum)
    }

    /// One walk over the chunks of every segment, from `rows` and `onto`: x and B forwards, dy and C
    /// backwards. Writes what the mode names.
    fn walk(
        &self,
        [rows, onto]: [&Rows; 2],
        [step, sum]: [&CubeTensor; 2],
        start: CubeTensor,
        [states, last, totals]: [CubeTensor; 3],
        mode: Direction,
    ) {
        let cubes = self.walkers(&self.state_plan) * self.segments(mode.backwards).0;
        let (client, count) = (self.client(), grid(cubes));
        let read = [&rows.tensor, &onto.tensor, step, sum, &start];
        let [x, b, step, sum, start] = read.map(|tensor| tensor.clone().into_buffer_arg());
        let [states, last, totals] = [states, last, totals].map(CubeTensor::into_buffer_arg);
        let call = self.call(cubes, [rows, onto], &self.own(), mode.backwards);
        let (plan, addresses, vectors) = (self.state_plan, self.addresses, self.vectors());
        if plan.fragments {
            let [input, _, kept] = self.types;
            let dim = CubeDim::new_1d(plan.walk_units() as u32);
            walk_matrix::launch(
                &client,
                count,
                dim,
                addresses,
                x,
                b,
                step,
                sum,
                start,
                states,
                last,
                totals,
                call,
                plan,
                mode,
                [input, kept],
                vectors,
            );
        } else {
            walk::launch(
                &client,
                count,
                plan.team.cube_dim(),
                addresses,
                x,
                b,
                step,
                sum,
                start,
                states,
                last,
                totals,
                call,
                plan,
                mode,
                self.types,
                vectors,
            );
        }
    }

    /// A tensor in place of one that is not wanted.
    fn nothing(&self) -> CubeTensor {
        empty_like(&self.scan.x.tensor, [16], DType::F32)
    }

    /// What every segment's walk starts from: with more than one, a walk of its own finds what each adds.
    fn starts(
        &self,
        rows: [&Rows; 2],
        steps: [&CubeTensor; 2],
        start: Option<CubeTensor>,
        backwards: bool,
    ) -> Option<CubeTensor> {
        let (segments, _) = self.segments(backwards);
        if segments == 1 {
            return start;
        }
        let (like, size) = (&self.scan.x.tensor, self.state_size());
        let Sizes { batch, heads, .. } = self.sizes;
        let ends = empty_like(like, [batch, segments, size], DType::F32);
        let totals = empty_like(like, [batch, segments, heads], DType::F32);
        let states = empty_like(like, [16], self.states);
        let alone = Direction {
            backwards,
            start: false,
            emit: false,
            ends: true,
        };
        let to = [states, ends.clone(), totals.clone()];
        self.walk(rows, steps, self.nothing(), to, alone);
        let mode = Direction {
            start: start.is_some(),
            ..alone
        };
        let vectors = batch * size / self.plan.vector_n;
        let (count, dim) = self.elementwise(vectors);
        pass::launch(
            &self.client(),
            count,
            dim,
            self.addresses,
            totals.into_buffer_arg(),
            start.unwrap_or_else(|| self.nothing()).into_buffer_arg(),
            ends.clone().into_buffer_arg(),
            size,
            self.own_call(vectors, backwards),
            self.plan,
            mode,
            self.plan.vector_n,
        );
        Some(ends)
    }

    /// Room for the states at the boundaries of chunks, or nothing, and for that behind the last.
    fn room(&self, keep: bool) -> [CubeTensor; 2] {
        let Sizes {
            batch,
            heads,
            headdim,
            state,
            ..
        } = self.sizes;
        let like = &self.scan.x.tensor;
        let kept = if keep {
            batch * self.chunks() * self.state_size()
        } else {
            16
        };
        [
            empty_like(like, [kept], self.states),
            empty_like(like, [batch, heads, headdim, state], DType::F32),
        ]
    }

    /// The states at the boundaries of chunks and behind the last.
    fn states(
        &self,
        rows: [&Rows; 2],
        steps: [&CubeTensor; 2],
        start: Option<CubeTensor>,
        backwards: bool,
    ) -> [CubeTensor; 2] {
        let start = self.starts(rows, steps, start, backwards);
        let [states, last] = self.room(true);
        let mode = Direction {
            backwards,
            start: start.is_some(),
            emit: true,
            ends: false,
        };
        let start = start.unwrap_or_else(|| self.nothing());
        let to = [states.clone(), last.clone(), self.nothing()];
        self.walk(rows, steps, start, to, mode);
        [states, last]
    }

    /// Outputs and states in one walk, with fragments.
    fn forward_matrix(&self, steps: [&CubeTensor; 2], y: &Rows, keep: bool) -> [CubeTensor; 2] {
        let Scan { x, b, c, .. } = &self.scan;
        let start = self.starts([x, b], steps, self.scan.initial.clone(), false);
        let [states, last] = self.room(keep);
        let mode = Direction {
            backwards: false,
            start: start.is_some(),
            emit: keep,
            ends: false,
        };
        let cubes = self.walkers(&self.plan) * self.segments(false).0;
        let to = Destinations {
            x: y.clone(),
            ..self.own()
        };
        let [input, _, kept] = self.types;
        forward_matrix::launch(
            &self.client(),
            grid(cubes),
            CubeDim::new_1d(self.plan.forward_units() as u32),
            self.addresses,
            x.tensor.clone().into_buffer_arg(),
            b.tensor.clone().into_buffer_arg(),
            c.tensor.clone().into_buffer_arg(),
            self.d.clone().into_buffer_arg(),
            steps[0].clone().into_buffer_arg(),
            steps[1].clone().into_buffer_arg(),
            start.unwrap_or_else(|| self.nothing()).into_buffer_arg(),
            y.tensor.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            last.clone().into_buffer_arg(),
            self.call(cubes, [x, b], &to, false),
            self.plan,
            mode,
            [input, kept],
            self.vectors(),
        );
        [states, last]
    }
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
    ParameterGradients {
        a: sum_rows(decays, padded[0] * padded[1], heads),
        d: if ready.plan.skip {
            sum_rows(dd, dd_rows, heads * headdim)
        } else {
            filled(&like, [heads * headdim], 0.0)
        },
        bias: sum_rows(dbias, batch * length, heads),
        initial: dinitial,
    }
}

impl Ready {
    /// The gradient of `dt` into its rows; returns it in f32, for its bias.
    fn steps_backward(&self, dsteps: CubeTensor, to: &Destinations) -> CubeTensor {
        let Sizes {
            batch,
            length,
            heads,
            ..
        } = self.sizes;
        let dbias = empty_like(&self.scan.x.tensor, [batch, length, heads], DType::F32);
        let elements = batch * length * heads;
        let (count, dim) = self.elementwise(elements);
        steps_backward::launch(
            &self.client(),
            count,
            dim,
            self.addresses,
            self.scan.dt.tensor.clone().into_buffer_arg(),
            self.bias.clone().into_buffer_arg(),
            dsteps.into_buffer_arg(),
            to.dt.tensor.clone().into_buffer_arg(),
            dbias.clone().into_buffer_arg(),
            self.limit[0],
            self.limit[1],
            self.call(elements, [&self.scan.x, &self.scan.b], to, true),
            self.plan,
            elem(self.scan.dt.tensor.dtype),
        );
        dbias
    }
}
