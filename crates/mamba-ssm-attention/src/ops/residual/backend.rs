//! What a backend implements to run [`add_dropped`](super::add_dropped()) natively.

// Without kernels there is nothing to route a call to.
#![cfg_attr(not(feature = "cubecl"), allow(unused_variables))]

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

/// A backend with the sum; `x` and `y` are f32, f16 or bf16, `seed` is two numbers in f32 whose bits
/// choose the mask.
#[backend_extension(
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait ResidualBackend: Backend {
    /// The output; differentiable in `x` and `y` where the backend is.
    #[fusion(default)]
    fn add_dropped(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        Self::add_dropped_forward(x, y, seed, prob)
    }

    /// The forward pass.
    #[fusion(meta = forward_spec)]
    fn add_dropped_forward(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        let _ = (x, y, seed, prob);
        unreachable!("forward passes run below autodiff, where has_cube_kernels() holds")
    }

    /// The gradient of `y`; that of `x` is `dr` itself.
    #[fusion(meta = backward_spec)]
    fn add_dropped_backward(
        dr: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        let _ = (dr, seed, prob);
        unreachable!("backward passes run below autodiff, where has_cube_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_spec(x: &TensorSpec, _y: &TensorSpec, _seed: &TensorSpec, _prob: &f64) -> TensorSpec {
    x.clone()
}

#[cfg(feature = "cubecl")]
fn backward_spec(dr: &TensorSpec, _seed: &TensorSpec, _prob: &f64) -> TensorSpec {
    dr.clone()
}
