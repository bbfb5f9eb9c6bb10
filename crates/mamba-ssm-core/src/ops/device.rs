//! Which devices have implementations of their own.

use burn::tensor::{DType, Device};

/// Whether the device has kernels for operands of a type; where not, the definition runs.
pub(crate) fn has_kernels(device: &Device, dtype: DType) -> bool {
    let device = device.clone().inner();
    match device.as_dispatch() {
        #[cfg(feature = "flex")]
        burn::backend::DispatchDevice::Flex(_) => dtype == DType::F32,
        _ => cfg!(feature = "cubecl") && matches!(dtype, DType::F32 | DType::F16 | DType::BF16),
    }
}
