//! What a backend implements to run [`normalise`](super::normalise()) natively.

// Without kernels there is nothing to route a call to.
#![cfg_attr(not(feature = "cubecl"), allow(unused_variables))]

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

/// A backend with the norm; `x` is f32, f16 or bf16.
#[backend_extension(
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait NormaliseBackend: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn normalise(x: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        Self::normalise_forward(x, epsilon)
    }

    /// The forward pass.
    #[fusion(meta = forward_spec)]
    fn normalise_forward(x: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let _ = (x, epsilon);
        unreachable!("forward passes run below autodiff, where has_cube_kernels() holds")
    }

    /// The gradient of `x`.
    #[fusion(meta = backward_spec)]
    fn normalise_backward(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let _ = (x, dy, epsilon);
        unreachable!("backward passes run below autodiff, where has_cube_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_spec(x: &TensorSpec, _epsilon: &f64) -> TensorSpec {
    x.clone()
}

#[cfg(feature = "cubecl")]
fn backward_spec(x: &TensorSpec, _dy: &TensorSpec, _epsilon: &f64) -> TensorSpec {
    x.clone()
}
