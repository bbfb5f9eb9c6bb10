//! Which devices have implementations of their own.

use burn::tensor::{DType, Device};

/// Whether the device is Burn's own CPU backend.
fn is_flex(device: &Device) -> bool {
    match device.clone().inner().as_dispatch() {
        #[cfg(feature = "flex")]
        burn::backend::DispatchDevice::Flex(_) => true,
        _ => false,
    }
}

/// Whether the device is a CPU with native implementations for operands of a type.
pub fn has_cpu_kernels(device: &Device, dtype: DType) -> bool {
    dtype == DType::F32 && is_flex(device)
}

/// Whether the device has kernels for operands of a type; where not, the definition runs.
pub fn has_kernels(device: &Device, dtype: DType) -> bool {
    let narrow = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    match is_flex(device) {
        true => dtype == DType::F32,
        false => cfg!(feature = "cubecl") && narrow,
    }
}

/// Whether the device has CubeCL kernels for operands of a type.
pub fn has_cube_kernels(device: &Device, dtype: DType) -> bool {
    !is_flex(device) && has_kernels(device, dtype)
}
