//! State and accumulation are never narrower than f32.

use burn::tensor::{DType, FloatDType, Tensor};

/// The type to compute in: f64 for f64 tensors, f32 for everything narrower.
pub(crate) fn compute_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

/// `tensor` in the type to compute in (no operation where it has it already).
pub(crate) fn widen<const D: usize>(tensor: Tensor<D>, to: FloatDType) -> Tensor<D> {
    if tensor.dtype() == DType::from(to) {
        tensor
    } else {
        tensor.cast(to)
    }
}

/// `tensor` back in the type its operand came in.
pub(crate) fn narrow_to<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype {
        tensor
    } else {
        tensor.cast(dtype)
    }
}
