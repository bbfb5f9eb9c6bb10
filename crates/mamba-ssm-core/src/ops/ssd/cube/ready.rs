//! A scan and what is decided about it before anything is launched: sizes, types, memory of steps.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::gradients::skip_parts;
use super::gradients_matrix::half_planes;
use super::launch::states_dtype;
use super::plan::{CallLaunch, OUTPUT_UNITS, Plan, Sizes, plan};

use super::scores_matrix::scores_size;
use super::steps::{HEADS, steps, steps_backward};
use crate::ops::cube::place::Rows;
use crate::ops::cube::{address_type, alone, elem, empty_like, filled, grid, tile_dtype};
use crate::ops::ssd::backend::Spec;

/// Cubes that keep a large device busy.
const ENOUGH_CUBES: usize = 512;

/// Cubes that walk over the chunks' states side by side. Measured: fewer leave a device idle on one long
/// sequence, more only lengthen the passing from segment to segment (`docs/performance.md`).
const WALKERS: usize = 256;

/// Units that a multiprocessor runs of a walk for states with fragments, where a plane has one block of channels.
const STATE_UNITS: usize = 512;

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

/// A scan and what was decided about it.
pub(super) struct Ready {
    pub(super) scan: Scan,
    pub(super) d: CubeTensor,
    pub(super) bias: CubeTensor,
    pub(super) sizes: Sizes,
    pub(super) plan: Plan,
    /// Of the pass for gradients, which has more units.
    pub(super) gradient_plan: Plan,
    /// Of a walk for states alone.
    pub(super) state_plan: Plan,
    /// Types of inputs, tiles, and states between chunks.
    pub(super) types: [ElemType; 3],
    pub(super) states: DType,
    pub(super) limit: [f32; 2],
    /// What indices into every tensor of the call need.
    pub(super) addresses: AddressType,
}

/// What indices into every tensor of a call need: those that came in, and the largest that it makes.
fn addresses(scan: &Scan, sizes: &Sizes, outputs: &[&[&Rows]; 2], plan: &Plan) -> AddressType {
    let operands = [&scan.x, &scan.b, &scan.c, &scan.dt];
    let given = operands.iter().chain(outputs[0]).chain(outputs[1]);
    let given: Vec<_> = given.map(|rows| &rows.tensor).collect();
    let chunks = sizes.batch * sizes.length.div_ceil(plan.chunk);
    let states = chunks * sizes.heads * sizes.headdim * sizes.state;
    let steps = chunks * plan.chunk * sizes.heads;
    // Parts of the gradients of B and C, one for each tile of heads at most.
    let parts = steps / plan.heads * sizes.state;
    let scores = chunks * sizes.groups * scores_size(*plan);
    let made = states.max(steps).max(parts).max(scores);
    address_type(&given).max(AddressType::from_len(made))
}

impl Ready {
    /// Of a scan whose outputs go to `outputs`: rows of x's and of B's width.
    pub(super) fn new(scan: Scan, outputs: [&[&Rows]; 2]) -> Self {
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
        let planned = |parts: usize| {
            let sizes = sizes.in_parts(parts);
            let vectors = [
                vector(&[&scan.x], outputs[0], sizes.headdim),
                vector(&[&scan.b, &scan.c], outputs[1], sizes.state),
            ];
            let (softplus, skip) = (scan.spec.softplus, scan.d.is_some());
            let plan = plan(&client, &sizes, vectors, softplus, skip, tile)?;
            Some((sizes, Plan { parts, ..plan }))
        };
        let (sizes, plan) = (1..=sizes.headdim)
            .filter(|parts| sizes.headdim.is_multiple_of(*parts))
            .find_map(planned)
            .unwrap_or_else(|| {
                panic!(
                    "ssd: state = {} needs more shared memory than the device has; use a smaller one",
                    sizes.state
                )
            });
        let limit = scan.spec.limit;
        let addresses = addresses(&scan, &sizes, &outputs, &plan);
        Self {
            addresses,
            d: scan.d.clone().unwrap_or_else(|| filled(like, [16], 0.0)),
            bias: scan
                .bias
                .clone()
                .unwrap_or_else(|| filled(like, [sizes.heads / plan.parts], 0.0)),
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
    pub(super) fn skip_parts(&self) -> usize {
        if self.plan.fragments {
            half_planes(self.plan)
        } else {
            skip_parts(self.gradient_plan)
        }
    }

    pub(super) fn client(&self) -> Client {
        self.scan.x.tensor.client.clone()
    }

    pub(super) fn chunks(&self) -> usize {
        self.sizes.length.div_ceil(self.plan.chunk)
    }

    pub(super) fn tiles(&self) -> usize {
        self.sizes.heads / self.plan.heads
    }

    pub(super) fn vectors(&self) -> [usize; 2] {
        [self.plan.vector_x, self.plan.vector_n]
    }

    /// Cubes of a walk over one segment.
    pub(super) fn walkers(&self, plan: &Plan) -> usize {
        self.sizes.batch * self.sizes.heads / plan.heads
    }

    /// Segments walked side by side, and chunks of each: as many as keep the device busy, at least four chunks
    /// each.
    pub(super) fn segments(&self, backwards: bool) -> (usize, usize) {
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
                    let room = STATE_UNITS / plan.row_blocks;
                    (room, plan.walk_units(), self.walkers(plan))
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
    pub(super) fn tiles_per_cube(&self) -> usize {
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
    pub(super) fn state_size(&self) -> usize {
        self.sizes.heads * self.sizes.headdim * self.sizes.state
    }

    /// Of a pass in one direction.
    pub(super) fn call(
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
    pub(super) fn own_call(&self, cubes: usize, backwards: bool) -> CallLaunch {
        self.call(cubes, [&self.scan.x, &self.scan.b], &self.own(), backwards)
    }

    /// The operands' own places.
    pub(super) fn own(&self) -> Destinations {
        let Scan { x, b, c, dt, .. } = &self.scan;
        Destinations {
            x: x.clone(),
            b: b.clone(),
            c: c.clone(),
            dt: dt.clone(),
        }
    }

    /// A launch with one unit to each of `elements`.
    pub(super) fn elementwise(&self, elements: usize) -> (CubeCount, CubeDim) {
        let units = alone(&self.scan.x.tensor);
        (
            grid(elements.div_ceil(units)),
            CubeDim::new_1d(units as u32),
        )
    }

    /// Step sizes and their sums, `[batch, chunks * chunk, heads]`.
    pub(super) fn steps(&self) -> (CubeTensor, CubeTensor) {
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

    /// The gradient of `dt` into its rows; returns it in f32, for its bias.
    pub(super) fn steps_backward(&self, dsteps: CubeTensor, to: &Destinations) -> CubeTensor {
        let Sizes {
            batch,
            length,
            heads,
            ..
        } = self.sizes;
        let heads = heads / self.plan.parts;
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
