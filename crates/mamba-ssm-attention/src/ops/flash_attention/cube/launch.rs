//! Launches of the kernels: memory and arguments.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use mamba_ssm_linear::cube::fragment::{LANES, SIDE};
use mamba_ssm_linear::cube::{address_type, alone, elem, empty_like, grid};

use super::backward::{backward_keys, backward_queries};
use super::common::{CallLaunch, Plan};
use super::forward::forward as forward_kernel;
use super::matrix::{
    MatrixPlan, SHARERS, backward_keys_matrix, backward_queries_matrix, finish, forward_matrix,
    prepare, sums_of_head,
};
use super::plan::Kernels;
use crate::ops::flash_attention::{Spec, dropout};

/// Sizes of one call.
struct Sizes<'a> {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    lq: usize,
    lk: usize,
    spec: &'a Spec,
}

impl<'a> Sizes<'a> {
    fn new(q: &CubeTensor, k: &CubeTensor, spec: &'a Spec) -> Self {
        let (q_shape, k_shape) = (&q.meta.shape, &k.meta.shape);
        Self {
            batch: q_shape[0],
            heads: q_shape[1],
            kv_heads: k_shape[1],
            lq: q_shape[2],
            lk: k_shape[2],
            spec,
        }
    }

    /// Grid and arguments of a kernel whose cubes own `block` queries.
    fn by_queries(&self, block: usize) -> (CubeCount, CallLaunch) {
        self.grid(self.batch * self.heads, self.lq.div_ceil(block))
    }

    /// Grid and arguments of a kernel whose cubes own `block` keys.
    fn by_keys(&self, block: usize) -> (CubeCount, CallLaunch) {
        self.grid(self.batch * self.kv_heads, self.lk.div_ceil(block))
    }

    /// A grid of `blocks` cubes for each of `planes` planes.
    fn grid(&self, planes: usize, blocks: usize) -> (CubeCount, CallLaunch) {
        let cubes = planes * blocks;
        let words = self
            .spec
            .dropout
            .map_or([0; 4], |d| dropout::seed_words(d.seed));
        let call = CallLaunch::new(
            cubes as u32,
            blocks as u32,
            self.heads as u32,
            (self.heads / self.kv_heads) as u32,
            self.lq as u32,
            self.lk as u32,
            self.spec.window.unwrap_or(0).min(self.lq + self.lk) as u32,
            self.spec.scale as f32,
            words[0],
            words[1],
            words[2],
            words[3],
            self.spec.dropout.as_ref().map_or(0, dropout::threshold),
            self.spec.dropout.map_or(1.0, |d| 1.0 / (1.0 - d.prob)) as f32,
        );
        (grid(cubes), call)
    }
}

/// Something to pass in place of a tensor that there is not.
fn dummy(like: &CubeTensor) -> CubeTensor {
    empty_like(like, [1], DType::F32)
}

/// The padding, or something to pass in its place.
fn padding_or_dummy(padding: Option<CubeTensor>, like: &CubeTensor) -> CubeTensor {
    padding.map_or_else(|| dummy(like), into_contiguous)
}

pub(super) fn forward(
    inputs: [CubeTensor; 3],
    padding: Option<CubeTensor>,
    kernels: &Kernels,
    spec: &Spec,
) -> (CubeTensor, CubeTensor) {
    let [q, k, v] = inputs.map(into_contiguous);
    let sizes = Sizes::new(&q, &k, spec);
    let padding = padding_or_dummy(padding, &q);
    let out = empty_like(&q, q.meta.shape.clone(), q.dtype);
    let lse_shape = [sizes.batch, sizes.heads, sizes.lq, 1];
    let lse = empty_like(&q, lse_shape, DType::F32);
    let (client, elem) = (q.client.clone(), elem(q.dtype));
    let addresses = address_type(&[&q, &k, &lse]);
    macro_rules! launch {
        ($kernel:ident, $plan:expr) => {{
            let plan = $plan;
            let (count, call) = sizes.by_queries(plan.block());
            // SAFETY: the kernels reach no token past the lengths they are given.
            unsafe {
                $kernel::launch_unchecked(
                    &client,
                    count,
                    CubeDim::new_1d(plan.units() as u32),
                    addresses,
                    q.into_buffer_arg(),
                    k.into_buffer_arg(),
                    v.into_buffer_arg(),
                    padding.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    lse.clone().into_buffer_arg(),
                    call,
                    plan,
                    elem,
                )
            }
        }};
    }
    match kernels {
        Kernels::Matrix(plans) => launch!(forward_matrix, plans.forward),
        Kernels::Units(plan) => launch!(forward_kernel, *plan),
    }
    (out, lse)
}

/// Gradients of `q`, `k` and `v`; `tensors` are those, the output, the log-sum-exp and the gradient of
/// the output.
pub(super) fn backward(
    tensors: [CubeTensor; 6],
    padding: Option<CubeTensor>,
    kernels: &Kernels,
    spec: &Spec,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let tensors = tensors.map(into_contiguous);
    let [q, k, ..] = &tensors;
    let sizes = Sizes::new(q, k, spec);
    let padding = padding_or_dummy(padding, q);
    match kernels {
        Kernels::Matrix(plans) if plans.keys.joint => {
            joint(tensors, padding, kernels, plans.keys, &sizes)
        }
        _ => {
            let (dq, delta) = queries(&tensors, &padding, kernels, &sizes);
            let (dk, dv) = keys(tensors, padding, delta, None, kernels, &sizes);
            (dq, dk, dv)
        }
    }
}

/// All three gradients in one pass over the keys.
fn joint(
    tensors: [CubeTensor; 6],
    padding: CubeTensor,
    kernels: &Kernels,
    plan: MatrixPlan,
    sizes: &Sizes,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [q, _, _, out, lse, dout] = &tensors;
    let (client, elem) = (q.client.clone(), elem(q.dtype));
    let delta = empty_like(q, lse.meta.shape.clone(), DType::F32);
    let dq = empty_like(q, q.meta.shape.clone(), q.dtype);
    let heads = sizes.batch * sizes.heads;
    let sums = empty_like(q, [heads * sums_of_head(sizes.lq, plan)], DType::F32);
    let addresses = address_type(&[q, &tensors[1], &sums]);
    let units = alone(q);
    let cubes = |all: usize| grid(all.div_ceil(units));
    let dim = CubeDim::new_1d(units as u32);
    // SAFETY: the kernels reach no token past the lengths they are given.
    unsafe {
        prepare::launch_unchecked(
            &client,
            cubes(heads * sizes.lq.next_multiple_of(SIDE) * SHARERS),
            dim,
            addresses,
            out.clone().into_buffer_arg(),
            dout.clone().into_buffer_arg(),
            delta.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            sizes.grid(heads, 1).1,
            plan,
            elem,
        );
    }
    let (dk, dv) = keys(tensors, padding, delta, Some(sums.clone()), kernels, sizes);
    // SAFETY: as above.
    unsafe {
        finish::launch_unchecked(
            &client,
            cubes(heads * sizes.lq.div_ceil(SIDE) * plan.steps() * LANES),
            dim,
            addresses,
            sums.into_buffer_arg(),
            dq.clone().into_buffer_arg(),
            sizes.grid(heads, 1).1,
            plan,
            elem,
        );
    }
    (dq, dk, dv)
}

/// Gradient of the queries, and the deltas.
fn queries(
    tensors: &[CubeTensor; 6],
    padding: &CubeTensor,
    kernels: &Kernels,
    sizes: &Sizes,
) -> (CubeTensor, CubeTensor) {
    let [q, k, v, out, lse, dout] = tensors;
    let delta = empty_like(q, lse.meta.shape.clone(), DType::F32);
    let dq = empty_like(q, q.meta.shape.clone(), q.dtype);
    let addresses = address_type(&[q, k, lse]);
    macro_rules! launch {
        ($kernel:ident, $plan:expr) => {{
            let plan = $plan;
            let (count, call) = sizes.by_queries(plan.block());
            // SAFETY: the kernels reach no token past the lengths they are given.
            unsafe {
                $kernel::launch_unchecked(
                    &q.client,
                    count,
                    CubeDim::new_1d(plan.units() as u32),
                    addresses,
                    q.clone().into_buffer_arg(),
                    k.clone().into_buffer_arg(),
                    v.clone().into_buffer_arg(),
                    padding.clone().into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    lse.clone().into_buffer_arg(),
                    dout.clone().into_buffer_arg(),
                    dq.clone().into_buffer_arg(),
                    delta.clone().into_buffer_arg(),
                    call,
                    plan,
                    elem(q.dtype),
                )
            }
        }};
    }
    match kernels {
        Kernels::Matrix(plans) => launch!(backward_queries_matrix, plans.queries),
        Kernels::Units(plan) => launch!(backward_queries, Plan { rows: 1, ..*plan }),
    }
    (dq, delta)
}

/// Gradients of the keys and values; `sums` takes that of the queries, where it is found as well.
fn keys(
    tensors: [CubeTensor; 6],
    padding: CubeTensor,
    delta: CubeTensor,
    sums: Option<CubeTensor>,
    kernels: &Kernels,
    sizes: &Sizes,
) -> (CubeTensor, CubeTensor) {
    let [q, k, v, _, lse, dout] = tensors;
    let [dk, dv] = [&k, &v].map(|x| empty_like(x, x.meta.shape.clone(), x.dtype));
    let (client, elem) = (q.client.clone(), elem(q.dtype));
    let sums = sums.unwrap_or_else(|| dummy(&q));
    let addresses = address_type(&[&q, &k, &lse, &sums]);
    macro_rules! launch {
        ($kernel:ident, $plan:expr $(, $sums:expr)?) => {{
            let plan = $plan;
            let (count, call) = sizes.by_keys(plan.block());
            // SAFETY: the kernels reach no token past the lengths they are given.
            unsafe {
                $kernel::launch_unchecked(
                    &client,
                    count,
                    CubeDim::new_1d(plan.units() as u32),
                    addresses,
                    q.into_buffer_arg(),
                    k.into_buffer_arg(),
                    v.into_buffer_arg(),
                    padding.into_buffer_arg(),
                    lse.into_buffer_arg(),
                    delta.into_buffer_arg(),
                    dout.into_buffer_arg(),
                    dk.clone().into_buffer_arg(),
                    dv.clone().into_buffer_arg(),
                    $($sums.into_buffer_arg(),)?
                    call,
                    plan,
                    elem,
                )
            }
        }};
    }
    match kernels {
        Kernels::Matrix(plans) => launch!(backward_keys_matrix, plans.keys, sums),
        Kernels::Units(plan) => launch!(backward_keys, Plan { rows: 1, ..*plan }),
    }
    (dk, dv)
}
