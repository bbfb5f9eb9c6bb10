//! What the launches of kernels share: memory, types, grids; and products in registers.

pub mod fragment;

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::{DType, Shape};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// A new tensor on the device of another.
pub fn empty_like(tensor: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

/// The kernels' name of a type.
pub fn elem(dtype: DType) -> ElemType {
    dtype_to_elem_type(dtype)
}

/// What indices into all of these tensors need: 32 bits, or 64 where those would wrap.
pub fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|tensor| tensor.required_address_type());
    types.max().unwrap_or_default()
}

/// A grid of `cubes` cubes in a row, bent where the device limits an axis. Kernels leave at once where
/// `CUBE_POS` is not below `cubes`.
pub fn grid(cubes: usize) -> CubeCount {
    // Devices limit each axis of the grid to 65,535.
    let x = cubes.clamp(1, 32_768);
    CubeCount::Static(x as u32, cubes.div_ceil(x) as u32, 1)
}

/// Units of a cube whose units work alone: at most 256.
pub fn alone(tensor: &CubeTensor) -> usize {
    256.min(tensor.client.properties().hardware.max_units_per_cube as usize)
}

/// The largest power of two up to `most` that divides all of `numbers`.
pub fn common_vector(most: usize, numbers: &[usize]) -> usize {
    let mut vector = most;
    while vector > 1 && numbers.iter().any(|n| !n.is_multiple_of(vector)) {
        vector /= 2;
    }
    vector
}
