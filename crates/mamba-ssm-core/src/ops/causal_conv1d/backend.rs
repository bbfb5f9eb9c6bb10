//! What a backend implements to run [`causal_conv1d`](super::causal_conv1d) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::{DType, Shape};

use crate::ops::optional::Optional;

/// The operands; all but `x` in f32.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Operands<B: Backend> {
    /// `[batch, length, channels]`.
    pub x: FloatTensor<B>,
    /// `[channels, width]`.
    pub weight: FloatTensor<B>,
    /// `[channels]`.
    #[extension_type]
    pub bias: Optional<B>,
    /// `[batch, width - 1, channels]`; absent where the width is one.
    #[extension_type]
    pub initial_state: Optional<B>,
}

/// The gradients: that of `x` in its type, the others in f32. Those of `bias` and `initial_state` are
/// present whether or not the operand is.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Gradients<B: Backend> {
    pub x: FloatTensor<B>,
    pub weight: FloatTensor<B>,
    pub bias: FloatTensor<B>,
    /// `[batch, max(width - 1, 1), channels]`.
    pub initial_state: FloatTensor<B>,
}

/// A backend with the convolution. `x` is f32, f16 or bf16.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait ConvBackend: Backend {
    /// The output, with SiLU where `activation` is set; differentiable where the backend is.
    #[fusion(default)]
    fn causal_conv1d(
        #[extension_type] operands: Operands<Self>,
        activation: bool,
    ) -> FloatTensor<Self> {
        Self::causal_conv1d_forward(operands, activation)
    }

    /// The forward pass.
    #[fusion(meta = forward_spec)]
    fn causal_conv1d_forward(
        #[extension_type] operands: Operands<Self>,
        activation: bool,
    ) -> FloatTensor<Self> {
        let _ = (operands, activation);
        unreachable!("forward passes run below autodiff, where has_kernels() holds")
    }

    /// The backward pass.
    #[fusion(meta = backward_specs)]
    fn causal_conv1d_backward(
        #[extension_type] operands: Operands<Self>,
        dy: FloatTensor<Self>,
        activation: bool,
    ) -> Gradients<Self> {
        let _ = (operands, dy, activation);
        unreachable!("backward passes run below autodiff, where has_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_spec(operands: &OperandsMetadata, _activation: &bool) -> TensorSpec {
    operands.x.clone()
}

#[cfg(feature = "cubecl")]
fn backward_specs(
    operands: &OperandsMetadata,
    _dy: &TensorSpec,
    _activation: &bool,
) -> GradientsMetadata {
    let [batch, _, channels]: [usize; 3] = operands.x.shape.dims();
    let before = operands.weight.shape[1].saturating_sub(1).max(1);
    GradientsMetadata {
        x: operands.x.clone(),
        weight: operands.weight.clone(),
        bias: TensorSpec::new(Shape::new([channels]), DType::F32),
        initial_state: TensorSpec::new(Shape::new([batch, before, channels]), DType::F32),
    }
}
