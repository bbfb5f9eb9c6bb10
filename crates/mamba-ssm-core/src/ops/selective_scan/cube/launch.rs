//! Sizes, memory, arguments.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::Plane;
use cubecl::prelude::*;

use super::backward::{backward as backward_kernel, sum_blocks};
use super::common::{CallLaunch, GroupStridesLaunch, Plan, StridesLaunch};
use super::forward::forward as forward_kernel;
use crate::ops::cube::reduce::sum_rows;
use crate::ops::cube::{address_type, alone, as_f32, common_vector, elem, empty_like, grid};
use crate::ops::selective_scan::backend::{Forward, Gradients, Operands, chunk};

/// Units of a cube; fewer where the states of a channel need fewer or the device has fewer.
const UNITS: usize = 128;

/// Channels of a cube, at most.
const CHANNELS: usize = 32;

/// Tokens of a tile forwards, at most.
const TOKENS: usize = 32;

/// Bytes of shared memory that a cube takes, at most.
const MEMORY: usize = 40 * 1024;

/// Channels of a unit on a device whose units share no plane: what they add up stays with them.
const ALONE: usize = 4;

/// The larger vectors in which u and its like are read.
const WIDTH: usize = 4;

/// A scan: the operands as the kernels read them.
struct Scan {
    u: CubeTensor,
    delta: CubeTensor,
    z: Option<CubeTensor>,
    b: CubeTensor,
    c: CubeTensor,
    a: CubeTensor,
    d: Option<CubeTensor>,
    bias: Option<CubeTensor>,
    initial: Option<CubeTensor>,
    batch: usize,
    length: usize,
    dim: usize,
    groups: usize,
    state: usize,
    by_token: bool,
    group_by_token: bool,
    softplus: bool,
}

/// Whether the tokens of `[batch, length, ..]` lie side by side.
fn is_by_token(tensor: &CubeTensor) -> bool {
    tensor.meta.shape[1] > 1 && tensor.meta.strides[1] == 1 && !tensor.meta.is_tiled()
}

/// The tensor with either its tokens or its last axis side by side: where it lies so already, itself.
fn laid(tensor: CubeTensor, by_token: bool) -> CubeTensor {
    let axis = if by_token {
        1
    } else {
        tensor.meta.shape.rank() - 1
    };
    let fits = tensor.meta.strides[axis] == 1 || tensor.meta.shape[axis] == 1;
    if fits && !tensor.meta.is_tiled() {
        return tensor;
    }
    let last = tensor.meta.shape.rank() - 1;
    if by_token {
        let turned = into_contiguous(CubeBackend::float_swap_dims(tensor, 1, last));
        CubeBackend::float_swap_dims(turned, 1, last)
    } else {
        into_contiguous(tensor)
    }
}

fn strides(tensor: &CubeTensor) -> StridesLaunch {
    let s = tensor.meta.strides();
    StridesLaunch::new(s[0], s[1], s[2])
}

fn group_strides(tensor: &CubeTensor) -> GroupStridesLaunch {
    let s = tensor.meta.strides();
    GroupStridesLaunch::new(s[0], s[1], s[2], s[3])
}

impl Scan {
    fn new(operands: Operands<CubeBackend>, softplus: bool) -> Self {
        let [batch, length, dim] = operands.u.meta.shape.dims();
        let [_, _, groups, state] = operands.b.meta.shape.dims();
        let by_token = is_by_token(&operands.u);
        let group_by_token = is_by_token(&operands.b);
        Self {
            u: laid(operands.u, by_token),
            delta: laid(operands.delta, by_token),
            z: operands.z.into_option().map(|z| laid(z, by_token)),
            b: laid(operands.b, group_by_token),
            c: laid(operands.c, group_by_token),
            a: as_f32(operands.a),
            d: operands.d.into_option().map(as_f32),
            bias: operands.delta_bias.into_option().map(as_f32),
            initial: operands.initial_state.into_option().map(as_f32),
            batch,
            length,
            dim,
            groups,
            state,
            by_token,
            group_by_token,
            softplus,
        }
    }

    /// A new tensor that lies as u does.
    fn like_u(&self) -> CubeTensor {
        if self.by_token {
            let turned = empty_like(&self.u, [self.batch, self.dim, self.length], self.u.dtype);
            CubeBackend::float_swap_dims(turned, 1, 2)
        } else {
            empty_like(&self.u, [self.batch, self.length, self.dim], self.u.dtype)
        }
    }

    /// The elements that can be read at once of all of `tensors`, which lie as u does.
    fn width(&self, tensors: &[&CubeTensor]) -> usize {
        let (along, across) = match self.by_token {
            true => (self.length, 2),
            false => (self.dim / self.groups, 1),
        };
        tensors.iter().fold(WIDTH, |width, tensor| {
            let strides = tensor.meta.strides();
            common_vector(width, &[along, strides[0], strides[across]])
        })
    }

    /// What all plans share: how the states are split.
    fn plan(&self, width: usize) -> Plan {
        let hardware = &self.u.client.properties().hardware;
        let planes = self
            .u
            .client
            .properties()
            .features
            .plane
            .contains(Plane::Ops);
        let most = 1usize << hardware.max_units_per_cube.max(1).ilog2();
        let alone = hardware.plane_size_max <= 1;
        let states = self.state.next_power_of_two();
        let vector = states.min(4);
        let split = match alone {
            true => 1,
            false => (states / vector).min(32),
        };
        let shares = if alone { ALONE } else { 1 };
        let mut units = UNITS.min(most).min(CHANNELS * split / shares).max(split);
        let plane = hardware.plane_size_min as usize;
        let fixed = planes && hardware.plane_size_max as usize == plane;
        // Smaller cubes where there are too few to keep the device busy; larger ones leave fewer gradients of
        // B and C to add up.
        let enough = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
        let cubes = |units: usize| {
            let channels = units / split * shares;
            self.batch * self.groups * (self.dim / self.groups).div_ceil(channels)
        };
        while !alone && units > split.max(plane) && cubes(units) < enough {
            units /= 2;
        }
        let channels = units / split * shares;
        let lanes = if fixed && units >= plane {
            plane.max(split)
        } else {
            split
        };
        Plan {
            state: self.state,
            units,
            split,
            shares,
            vectors: states / vector / split,
            vector,
            lanes,
            tokens: TOKENS,
            chunk: chunk(self.state),
            waiting: 1,
            width: if self.by_token {
                width
            } else {
                width.min(channels)
            },
            by_token: self.by_token,
            group_by_token: self.group_by_token,
            softplus: self.softplus,
            bias: self.bias.is_some(),
            skip: self.d.is_some(),
            gate: self.z.is_some(),
            initial: self.initial.is_some(),
            keep: false,
            unroll: !alone,
        }
    }

    fn memory(&self) -> usize {
        MEMORY.min(self.u.client.properties().hardware.max_shared_memory_size)
    }

    /// The plan of the forward pass: the longest tile that fits.
    fn forward_plan(&self, width: usize, keep: bool) -> Plan {
        let mut plan = Plan {
            keep,
            ..self.plan(width)
        };
        let bytes = |plan: &Plan| 4 * (2 * plan.tile() + 2 * plan.group_tile() + plan.parts());
        while plan.tokens > 4.max(plan.width) && bytes(&plan) > self.memory() {
            plan.tokens /= 2;
        }
        plan
    }

    /// The plan of the backward pass: tiles are chunks, and as many tokens' gradients of B and C wait as
    /// fit.
    fn backward_plan(&self, width: usize) -> Plan {
        let plan = self.plan(width);
        let mut plan = Plan {
            tokens: plan.chunk,
            waiting: plan.chunk,
            ..plan
        };
        let bytes = |plan: &Plan| {
            let tiles = 5 * plan.tile() + 2 * plan.group_tile() + 2 * plan.parts();
            4 * (tiles + plan.waiting * plan.row())
        };
        while plan.waiting > 1 && bytes(&plan) > self.memory() {
            plan.waiting /= 2;
        }
        plan
    }

    fn blocks(&self, plan: &Plan) -> usize {
        (self.dim / self.groups).div_ceil(plan.channels())
    }

    fn cubes(&self, plan: &Plan) -> usize {
        self.batch * self.groups * self.blocks(plan)
    }

    fn chunks(&self) -> usize {
        self.length.div_ceil(chunk(self.state))
    }

    fn call(&self, plan: &Plan, out: &CubeTensor) -> CallLaunch {
        CallLaunch::new(
            self.cubes(plan),
            self.length,
            self.dim,
            self.groups,
            self.blocks(plan),
            self.chunks(),
            strides(&self.u),
            strides(&self.delta),
            strides(self.z.as_ref().unwrap_or(&self.u)),
            strides(out),
            group_strides(&self.b),
            group_strides(&self.c),
        )
    }

    /// An optional parameter's buffer; anything where there is none.
    fn or_any(&self, parameter: &Option<CubeTensor>) -> BufferArg {
        parameter
            .as_ref()
            .unwrap_or(&self.a)
            .clone()
            .into_buffer_arg()
    }

    fn gate(&self) -> BufferArg {
        self.z.as_ref().unwrap_or(&self.u).clone().into_buffer_arg()
    }
}

/// The forward pass.
pub(super) fn forward(
    operands: Operands<CubeBackend>,
    softplus: bool,
    keep: bool,
) -> Forward<CubeBackend> {
    let scan = Scan::new(operands, softplus);
    let y = scan.like_u();
    let final_state = empty_like(&scan.u, [scan.batch, scan.dim, scan.state], DType::F32);
    let kept = match keep {
        true => scan.batch * scan.chunks() * scan.dim * scan.state.next_power_of_two(),
        false => 1,
    };
    let states = empty_like(&scan.u, [kept], DType::F32);
    let mut wide = vec![&scan.u, &scan.delta, &y];
    wide.extend(&scan.z);
    let plan = scan.forward_plan(scan.width(&wide), keep);
    wide.extend([&scan.b, &scan.c, &states]);
    forward_kernel::launch(
        &scan.u.client,
        grid(scan.cubes(&plan)),
        CubeDim::new_1d(plan.units as u32),
        address_type(&wide),
        scan.u.clone().into_buffer_arg(),
        scan.delta.clone().into_buffer_arg(),
        scan.a.clone().into_buffer_arg(),
        scan.b.clone().into_buffer_arg(),
        scan.c.clone().into_buffer_arg(),
        scan.or_any(&scan.d),
        scan.gate(),
        scan.or_any(&scan.bias),
        scan.or_any(&scan.initial),
        y.clone().into_buffer_arg(),
        final_state.clone().into_buffer_arg(),
        states.clone().into_buffer_arg(),
        scan.call(&plan, &y),
        plan,
        elem(scan.u.dtype),
        [plan.width, plan.vector, plan.part_vector()],
    );
    Forward {
        y,
        final_state,
        states,
    }
}

/// The backward pass.
pub(super) fn backward(
    operands: Operands<CubeBackend>,
    states: CubeTensor,
    dy: CubeTensor,
    dfinal_state: CubeTensor,
    softplus: bool,
) -> Gradients<CubeBackend> {
    let scan = Scan::new(operands, softplus);
    let dy = laid(dy, scan.by_token);
    let (du, ddelta) = (scan.like_u(), scan.like_u());
    // Without a gate its gradient is never asked for.
    let dz = if scan.z.is_some() {
        scan.like_u()
    } else {
        du.clone()
    };
    let mut wide = vec![&scan.u, &scan.delta, &dy, &du];
    wide.extend(&scan.z);
    let plan = scan.backward_plan(scan.width(&wide));
    let size = scan.batch * scan.length * scan.groups * scan.state;
    let parts = [0, 1].map(|_| empty_like(&scan.u, [scan.blocks(&plan), size], DType::F32));
    let columns = scan.dim * (scan.state + 2);
    let dparameters = empty_like(&scan.u, [scan.batch, columns], DType::F32);
    let dinitial = empty_like(&scan.u, [scan.batch, scan.dim, scan.state], DType::F32);
    wide.extend([&scan.b, &scan.c, &states, &parts[0]]);
    backward_kernel::launch(
        &scan.u.client,
        grid(scan.cubes(&plan)),
        CubeDim::new_1d(plan.units as u32),
        address_type(&wide),
        scan.u.clone().into_buffer_arg(),
        scan.delta.clone().into_buffer_arg(),
        scan.a.clone().into_buffer_arg(),
        scan.b.clone().into_buffer_arg(),
        scan.c.clone().into_buffer_arg(),
        scan.or_any(&scan.d),
        scan.gate(),
        scan.or_any(&scan.bias),
        states.clone().into_buffer_arg(),
        dy.clone().into_buffer_arg(),
        as_f32(dfinal_state).into_buffer_arg(),
        du.clone().into_buffer_arg(),
        ddelta.clone().into_buffer_arg(),
        dz.clone().into_buffer_arg(),
        parts[0].clone().into_buffer_arg(),
        parts[1].clone().into_buffer_arg(),
        dparameters.clone().into_buffer_arg(),
        dinitial.clone().into_buffer_arg(),
        strides(&dy),
        scan.call(&plan, &du),
        plan,
        elem(scan.u.dtype),
        [plan.width, plan.vector, plan.part_vector()],
    );
    let [b, c] = scan.sum_blocks(parts, scan.blocks(&plan), size);
    let parameters = sum_rows(dparameters, scan.batch, columns);
    let part =
        |from: usize, to: usize| CubeBackend::float_slice(parameters.clone(), &[(from..to).into()]);
    let rates = scan.dim * scan.state;
    let a = part(0, rates);
    Gradients {
        u: du,
        delta: ddelta,
        a: CubeBackend::float_reshape(a, Shape::new([scan.dim, scan.state])),
        b,
        c,
        d: part(rates, rates + scan.dim),
        z: dz,
        delta_bias: part(rates + scan.dim, rates + 2 * scan.dim),
        initial_state: dinitial,
    }
}

impl Scan {
    /// The gradients of B and C, `[batch, length, groups, state]` in their type.
    fn sum_blocks(&self, parts: [CubeTensor; 2], blocks: usize, size: usize) -> [CubeTensor; 2] {
        let shape = [self.batch, self.length, self.groups, self.state];
        let sums = [0, 1].map(|_| empty_like(&self.u, shape, self.b.dtype));
        let client = self.u.client.clone();
        let units = alone(&self.u);
        let [b, c] = parts;
        sum_blocks::launch(
            &client,
            grid(size.div_ceil(units)),
            CubeDim::new_1d(units as u32),
            address_type(&[&b]),
            b.into_buffer_arg(),
            c.into_buffer_arg(),
            sums[0].clone().into_buffer_arg(),
            sums[1].clone().into_buffer_arg(),
            blocks,
            size,
            elem(self.b.dtype),
        );
        sums
    }
}
