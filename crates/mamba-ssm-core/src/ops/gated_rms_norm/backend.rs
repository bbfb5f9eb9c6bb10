//! What a backend implements to run [`gated_rms_norm`](super::gated_rms_norm) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};

use crate::ops::optional::Optional;

/// The operands; `z` in the type of `x`, the weight in f32.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Operands<B: Backend> {
    /// `[batch, length, dim]`.
    pub x: FloatTensor<B>,
    /// `[batch, length, dim]`.
    #[extension_type]
    pub z: Optional<B>,
    /// `[dim]`.
    pub weight: FloatTensor<B>,
}

/// The gradients, each in the shape and type of its operand; that of `z` is anything where there is none.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Gradients<B: Backend> {
    pub x: FloatTensor<B>,
    pub z: FloatTensor<B>,
    pub weight: FloatTensor<B>,
}

/// How to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spec {
    pub(crate) group: usize,
    pub(crate) eps: f64,
    pub(crate) norm_before_gate: bool,
}

/// A backend with the norm. `x` is f32, f16 or bf16.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait NormBackend: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn gated_rms_norm(#[extension_type] operands: Operands<Self>, spec: Spec) -> FloatTensor<Self> {
        Self::gated_rms_norm_forward(operands, spec)
    }

    /// The forward pass.
    #[fusion(meta = forward_spec)]
    fn gated_rms_norm_forward(
        #[extension_type] operands: Operands<Self>,
        spec: Spec,
    ) -> FloatTensor<Self> {
        let _ = (operands, spec);
        unreachable!("forward passes run below autodiff, where has_kernels() holds")
    }

    /// The backward pass.
    #[fusion(meta = backward_specs)]
    fn gated_rms_norm_backward(
        #[extension_type] operands: Operands<Self>,
        dy: FloatTensor<Self>,
        spec: Spec,
    ) -> Gradients<Self> {
        let _ = (operands, dy, spec);
        unreachable!("backward passes run below autodiff, where has_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_spec(operands: &OperandsMetadata, _spec: &Spec) -> TensorSpec {
    operands.x.clone()
}

#[cfg(feature = "cubecl")]
fn backward_specs(
    operands: &OperandsMetadata,
    _dy: &TensorSpec,
    _spec: &Spec,
) -> GradientsMetadata {
    GradientsMetadata {
        x: operands.x.clone(),
        z: operands.x.clone(),
        weight: operands.weight.clone(),
    }
}
