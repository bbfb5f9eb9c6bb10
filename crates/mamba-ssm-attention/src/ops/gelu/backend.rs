//! What a backend implements to run [`gelu`](super::gelu()) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

/// A backend with the activation; `x` is f32, f16 or bf16.
#[backend_extension(
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait GeluBackend: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn exact_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::exact_gelu_forward(x)
    }

    /// The forward pass.
    #[fusion(meta = forward_spec)]
    fn exact_gelu_forward(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let _ = x;
        unreachable!("forward passes run below autodiff, where has_cube_kernels() holds")
    }

    /// The gradient of `x`.
    #[fusion(meta = backward_spec)]
    fn exact_gelu_backward(x: FloatTensor<Self>, dy: FloatTensor<Self>) -> FloatTensor<Self> {
        let _ = (x, dy);
        unreachable!("backward passes run below autodiff, where has_cube_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_spec(x: &TensorSpec) -> TensorSpec {
    x.clone()
}

#[cfg(feature = "cubecl")]
fn backward_spec(x: &TensorSpec, _dy: &TensorSpec) -> TensorSpec {
    x.clone()
}
