//! What a backend implements to run [`mamba2_inner`](super::mamba2_inner) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::{DType, Shape};

use super::InnerSpec;
use crate::ops::optional::Optional;

/// The operands; parameters in f32.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Operands<B: Backend> {
    /// `[batch, length, 2 d_inner + 2 groups state + heads]`.
    pub zxbcdt: FloatTensor<B>,
    /// `[conv_dim, d_conv]`.
    pub conv_weight: FloatTensor<B>,
    /// `[conv_dim]`.
    #[extension_type]
    pub conv_bias: Optional<B>,
    /// `[heads]`.
    pub dt_bias: FloatTensor<B>,
    /// `[heads]`.
    pub a: FloatTensor<B>,
    /// `[heads, headdim]`.
    pub d: FloatTensor<B>,
    /// `[d_inner]`.
    pub norm_weight: FloatTensor<B>,
}

/// What the forward pass returns.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Forward<B: Backend> {
    /// `[batch, length, d_inner]`.
    pub y: FloatTensor<B>,
    /// What the convolution made, `[batch, length, conv_dim]`.
    pub convolved: FloatTensor<B>,
    /// What the scan made, `[batch, length, d_inner]`.
    pub scanned: FloatTensor<B>,
    /// The states before the chunks.
    pub states: FloatTensor<B>,
}

/// The gradients, each in the shape and type of its operand; that of `conv_bias` is present whether or
/// not the operand is.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Gradients<B: Backend> {
    pub zxbcdt: FloatTensor<B>,
    pub conv_weight: FloatTensor<B>,
    pub conv_bias: FloatTensor<B>,
    pub dt_bias: FloatTensor<B>,
    pub a: FloatTensor<B>,
    pub d: FloatTensor<B>,
    pub norm_weight: FloatTensor<B>,
}

/// A backend with the inner block of Mamba-2.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait InnerBackend: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn mamba2_inner(
        #[extension_type] operands: Operands<Self>,
        spec: InnerSpec,
    ) -> FloatTensor<Self> {
        Self::mamba2_inner_forward(operands, spec).y
    }

    /// The forward pass.
    #[fusion(meta = forward_specs)]
    fn mamba2_inner_forward(
        #[extension_type] operands: Operands<Self>,
        spec: InnerSpec,
    ) -> Forward<Self> {
        let _ = (operands, spec);
        unreachable!("forward passes run below autodiff")
    }

    /// The backward pass.
    #[fusion(meta = backward_specs)]
    fn mamba2_inner_backward(
        #[extension_type] operands: Operands<Self>,
        convolved: FloatTensor<Self>,
        scanned: FloatTensor<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: InnerSpec,
    ) -> Gradients<Self> {
        let _ = (operands, convolved, scanned, states, dy, spec);
        unreachable!("backward passes run below autodiff")
    }
}

#[cfg(feature = "cubecl")]
fn forward_specs(operands: &OperandsMetadata, spec: &InnerSpec) -> ForwardMetadata {
    use crate::ops::ssd::cube::{states_dtype, states_shape};
    let dtype = operands.zxbcdt.dtype;
    let [batch, length, _]: [usize; 3] = operands.zxbcdt.shape.dims();
    let wide = TensorSpec::new(Shape::new([batch, length, spec.d_inner()]), dtype);
    let x = [batch, length, spec.heads, spec.headdim];
    let states = states_shape(x, [batch, length, spec.groups, spec.state]);
    ForwardMetadata {
        y: wide.clone(),
        convolved: TensorSpec::new(Shape::new([batch, length, spec.conv_dim()]), dtype),
        scanned: wide,
        states: TensorSpec::new(Shape::new(states), states_dtype(dtype)),
    }
}

#[cfg(feature = "cubecl")]
fn backward_specs(
    operands: &OperandsMetadata,
    _convolved: &TensorSpec,
    _scanned: &TensorSpec,
    _states: &TensorSpec,
    _dy: &TensorSpec,
    spec: &InnerSpec,
) -> GradientsMetadata {
    let f32 = |shape: &[usize]| TensorSpec::new(Shape::from(shape.to_vec()), DType::F32);
    GradientsMetadata {
        zxbcdt: operands.zxbcdt.clone(),
        conv_weight: operands.conv_weight.clone(),
        conv_bias: f32(&[spec.conv_dim()]),
        dt_bias: operands.dt_bias.clone(),
        a: operands.a.clone(),
        d: operands.d.clone(),
        norm_weight: operands.norm_weight.clone(),
    }
}
