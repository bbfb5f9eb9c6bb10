//! What the kernels share: tiles in shared memory, their products there and in registers, sums over rows, and
//! functions.

pub(crate) mod math;
pub(crate) mod place;
pub(crate) mod product;
pub(crate) mod reduce;
pub(crate) mod tile;

use burn::backend::Scalar;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
pub(crate) use mamba_ssm_linear::cube::{
    address_type, alone, common_vector, elem, empty_like, fragment, grid,
};

/// How a cube works together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Team {
    /// Units of a cube.
    pub(crate) units: usize,
    /// Planes of a cube, each at work on tiles of its own.
    pub(crate) planes: usize,
    /// Whether products run on matrix units.
    pub(crate) matrix: bool,
}

/// Side of the tiles that matrix units take.
pub(crate) use fragment::SIDE;

impl Team {
    /// At most `units` units, matrix units where the device has them for the tile type.
    pub(crate) fn new(client: &Client, units: usize, tile: DType) -> Self {
        let hardware = &client.properties().hardware;
        // A power of two, so that the shares of a tile come out even.
        let units = 1usize << units.min(hardware.max_units_per_cube as usize).ilog2();
        let plane = hardware.plane_size_max as usize;
        let fixed = hardware.plane_size_min == hardware.plane_size_max;
        let matrix = fixed && units.is_multiple_of(plane) && has_matrix_units(client, tile);
        Self {
            units,
            planes: (units / plane).max(1),
            matrix,
        }
    }

    pub(crate) fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units as u32)
    }
}

fn has_matrix_units(client: &Client, tile: DType) -> bool {
    let kind = match tile {
        DType::BF16 => FloatKind::BF16,
        DType::F16 => FloatKind::F16,
        _ => return false,
    };
    client
        .properties()
        .features
        .matmul
        .cmma
        .contains(&MmaConfig {
            a_type: ElemType::Float(kind),
            b_type: ElemType::Float(kind),
            cd_type: ElemType::Float(FloatKind::F32),
            m: SIDE as u32,
            n: SIDE as u32,
            k: SIDE as u32,
        })
}

/// The type of the operands of products for inputs of a type: their own where matrix units take it, else
/// f32.
pub(crate) fn tile_dtype(client: &Client, input: DType) -> DType {
    if has_matrix_units(client, input) {
        input
    } else {
        DType::F32
    }
}

/// As [`empty_like`], f32, filled with a value.
pub(crate) fn filled<const D: usize>(
    tensor: &CubeTensor,
    shape: [usize; D],
    value: f32,
) -> CubeTensor {
    CubeBackend::float_full(
        Shape::new(shape),
        Scalar::from(value),
        &tensor.device,
        FloatDType::F32,
    )
}

/// A parameter as the kernels read it.
pub(crate) fn as_f32(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(CubeBackend::float_cast(tensor, FloatDType::F32))
}
