//! What a backend does for the operator, and how calls reach it.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
use burn::tensor::FloatDType;
#[cfg(feature = "cubecl")]
use burn::tensor::Shape;

use super::reference;

/// The bias of a projection.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub enum Bias<B: Backend> {
    /// Nothing is added.
    Without,
    /// `[d_output]`.
    With(FloatTensor<B>),
}

/// Projections of a backend, over two axes: `x [tokens, d_input]`, `weight [d_input, d_output]`,
/// `dy [tokens, d_output]`, all of one dtype; or the parameters in f32 and the rest in half precision.
/// Gradients of parameters come in the type asked for. The defaults are the definition.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait ProjectBackend: Backend {
    /// `x weight + bias`; differentiable where the backend is.
    #[fusion(default)]
    fn project(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
    ) -> FloatTensor<Self> {
        Self::project_forward(x, weight, bias)
    }

    /// `x weight + bias`.
    #[fusion(meta = forward_spec)]
    fn project_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
    ) -> FloatTensor<Self> {
        reference::forward::<Self>(x, weight, bias)
    }

    /// `dy weight^T`.
    #[fusion(meta = input_gradient_spec)]
    fn project_input_gradient(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        reference::input_gradient::<Self>(dy, weight)
    }

    /// `x^T dy`.
    #[fusion(meta = weight_gradient_spec)]
    fn project_weight_gradient(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        reference::weight_gradient::<Self>(x, dy, dtype)
    }

    /// `x^T dy` and the sum of `dy` over tokens.
    #[fusion(meta = parameter_gradients_spec)]
    fn project_parameter_gradients(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: FloatDType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        (
            reference::weight_gradient::<Self>(x, dy.clone(), dtype),
            reference::bias_gradient::<Self>(dy, dtype),
        )
    }
}

#[cfg(feature = "cubecl")]
fn with_shape<const D: usize>(like: &TensorSpec, shape: [usize; D]) -> TensorSpec {
    let mut spec = like.clone();
    spec.shape = Shape::new(shape);
    spec
}

#[cfg(feature = "cubecl")]
fn forward_spec(x: &TensorSpec, weight: &TensorSpec, _bias: &BiasMetadata) -> TensorSpec {
    with_shape(x, [x.shape[0], weight.shape[1]])
}

#[cfg(feature = "cubecl")]
fn input_gradient_spec(dy: &TensorSpec, weight: &TensorSpec) -> TensorSpec {
    with_shape(dy, [dy.shape[0], weight.shape[0]])
}

#[cfg(feature = "cubecl")]
fn weight_gradient_spec(x: &TensorSpec, dy: &TensorSpec, dtype: &FloatDType) -> TensorSpec {
    TensorSpec::new(Shape::new([x.shape[1], dy.shape[1]]), (*dtype).into())
}

#[cfg(feature = "cubecl")]
fn parameter_gradients_spec(
    x: &TensorSpec,
    dy: &TensorSpec,
    dtype: &FloatDType,
) -> (TensorSpec, TensorSpec) {
    (
        weight_gradient_spec(x, dy, dtype),
        TensorSpec::new(Shape::new([dy.shape[1]]), (*dtype).into()),
    )
}
