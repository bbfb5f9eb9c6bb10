//! Which kernels a call gets, and their sizes, from shapes, options and what the device has.
//!
//! | inputs | device | kernels |
//! | --- | --- | --- |
//! | f16, bf16; head size a multiple of 8 up to [`MAX_MATRIX_DIM`]; scale not negative | multiplies `16 x 16` by `16 x 8` blocks in registers | on matrix units |
//! | f32, f16, bf16; head size up to [`MAX_DIM`] | any | a unit per query or key |
//! | else | any | the definition, in tensor operations |

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::AtomicUsage;
use cubecl::ir::Type;
use mamba_ssm_linear::cube::elem;
use mamba_ssm_linear::cube::fragment::has_fragments;

use super::common::{Mask, Plan};
use super::matrix::{MatrixPlan, VECTOR};
use crate::ops::flash_attention::Spec;

/// The widest head of the kernels with a unit per query.
const MAX_DIM: usize = 64;

/// The widest head of the kernels on matrix units.
const MAX_MATRIX_DIM: usize = 128;

/// Units of a cube, where the device has as many.
const UNITS: usize = 128;

/// Planes of a cube on matrix units.
const PLANES: usize = 4;

/// Keys that the forward pass on matrix units meets at once; divides every tile.
const AT_ONCE: usize = 32;

/// Shared memory every device with matrix units has.
const SHARED: usize = 48 * 1024;

/// Kernels and sizes of a call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kernels {
    Matrix(MatrixPlans),
    Units(Plan),
}

/// Sizes on matrix units.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatrixPlans {
    pub(super) forward: MatrixPlan,
    pub(super) queries: MatrixPlan,
    pub(super) keys: MatrixPlan,
}

impl Kernels {
    /// What a call with these queries gets; nothing where the definition has to do.
    pub(super) fn new(q: &CubeTensor, padding: bool, spec: &Spec) -> Option<Self> {
        let mask = Mask {
            causal: spec.causal,
            window: spec.window.is_some(),
            padding,
            dropout: spec.dropout.is_some(),
        };
        let dim = q.meta.shape[3];
        let matrix = dim.is_multiple_of(VECTOR) && dim <= MAX_MATRIX_DIM && spec.scale >= 0.0;
        if matrix && has_matrix_units(q) {
            let hardware = &q.client.properties().hardware;
            let room = (!spec.deterministic && adds_atomically(q))
                .then_some(hardware.max_shared_memory_size);
            return Some(Self::Matrix(MatrixPlans::new(
                dim,
                mask,
                q.dtype == DType::F16,
                room,
            )));
        }
        let floats = matches!(q.dtype, DType::F32 | DType::F16 | DType::BF16);
        let most = q.client.properties().hardware.max_units_per_cube as usize;
        (floats && dim <= MAX_DIM).then(|| Self::Units(unit_plan(dim, mask, UNITS.min(most))))
    }
}

fn has_matrix_units(q: &CubeTensor) -> bool {
    q.client.properties().hardware.max_shared_memory_size >= SHARED
        && has_fragments(&q.client, q.dtype)
}

/// Whether f32 can be added to in memory by all at once.
fn adds_atomically(q: &CubeTensor) -> bool {
    let sums = Type::atomic(Type::new(elem(DType::F32)));
    let usage = q.client.properties().atomic_type_usage(sums);
    usage.contains(AtomicUsage::Add)
}

impl MatrixPlans {
    /// Within `room` bytes of shared memory the pass over keys finds the gradient of the queries as well.
    pub(super) fn new(dim: usize, mask: Mask, fine: bool, room: Option<usize>) -> Self {
        let plan = |frags| {
            let mut plan = MatrixPlan {
                dim,
                planes: PLANES,
                frags,
                tile: 64,
                at_once: AT_ONCE,
                joint: false,
                fine,
                mask,
            };
            while plan.shared_bytes() > SHARED {
                plan.tile /= 2;
            }
            plan
        };
        // Blocks of a plane: as many as its registers hold.
        let frags = if dim <= 64 { 2 } else { 1 };
        let keys = plan(if dim <= 32 { 2 } else { 1 });
        let joint = MatrixPlan {
            joint: true,
            ..keys
        };
        let fits = room.is_some_and(|room| joint.shared_bytes() <= room);
        Self {
            forward: plan(frags),
            queries: plan(frags),
            keys: if fits { joint } else { keys },
        }
    }
}

pub(super) fn unit_plan(dim: usize, mask: Mask, units: usize) -> Plan {
    Plan {
        dim,
        units,
        rows: if dim <= 16 { 2 } else { 1 },
        tile: if dim <= 32 { 64 } else { 32 },
        mask,
    }
}
