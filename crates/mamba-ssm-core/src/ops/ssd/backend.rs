//! What a backend implements to run [`ssd`](super::ssd) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::{DType, Shape};

use crate::ops::optional::Optional;

/// The operands; shapes as in [`SsdInput`](super::SsdInput), the gate left out.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Operands<B: Backend> {
    /// `[batch, length, heads, headdim]`.
    pub x: FloatTensor<B>,
    /// `[batch, length, heads]`.
    pub dt: FloatTensor<B>,
    /// `[heads]`.
    pub a: FloatTensor<B>,
    /// `[batch, length, groups, state]`.
    pub b: FloatTensor<B>,
    /// `[batch, length, groups, state]`.
    pub c: FloatTensor<B>,
    /// `[heads, headdim]`.
    #[extension_type]
    pub d: Optional<B>,
    /// `[heads]`.
    #[extension_type]
    pub dt_bias: Optional<B>,
    /// `[batch, heads, headdim, state]`.
    #[extension_type]
    pub initial_state: Optional<B>,
}

/// What the forward pass returns.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Forward<B: Backend> {
    /// As `x`.
    pub y: FloatTensor<B>,
    /// `[batch, heads, headdim, state]`, f32.
    pub final_state: FloatTensor<B>,
    /// What the backward pass needs: the states before the chunks.
    pub states: FloatTensor<B>,
}

/// The gradients; each in the shape and type of its operand. Those of `d`, `dt_bias` and
/// `initial_state` are f32 and present whether or not the operand is.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Gradients<B: Backend> {
    pub x: FloatTensor<B>,
    pub dt: FloatTensor<B>,
    pub a: FloatTensor<B>,
    pub b: FloatTensor<B>,
    pub c: FloatTensor<B>,
    pub d: FloatTensor<B>,
    pub dt_bias: FloatTensor<B>,
    pub initial_state: FloatTensor<B>,
}

/// How the step sizes are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spec {
    pub softplus: bool,
    pub limit: (f64, f64),
}

/// A backend with the scan of Mamba-2. Operands f32, f16 or bf16; `x`, `b` and `c` of one type.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait SsdBackend: Backend {
    /// Output and final state; differentiable where the backend is.
    #[fusion(default)]
    fn ssd(
        #[extension_type] operands: Operands<Self>,
        spec: Spec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let forward = Self::ssd_forward(operands, spec, false);
        (forward.y, forward.final_state)
    }

    /// The forward pass. Without `keep` the states need not be kept and may be anything.
    #[fusion(meta = forward_specs)]
    fn ssd_forward(
        #[extension_type] operands: Operands<Self>,
        spec: Spec,
        keep: bool,
    ) -> Forward<Self> {
        let _ = (operands, spec, keep);
        unreachable!("forward passes run below autodiff")
    }

    /// The backward pass, from the gradients of both outputs.
    #[fusion(meta = backward_specs)]
    fn ssd_backward(
        #[extension_type] operands: Operands<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dfinal_state: FloatTensor<Self>,
        spec: Spec,
    ) -> Gradients<Self> {
        let _ = (operands, states, dy, dfinal_state, spec);
        unreachable!("backward passes run below autodiff")
    }
}

#[cfg(feature = "cubecl")]
fn state_shape(x: &TensorSpec, b: &TensorSpec) -> Shape {
    Shape::new([x.shape[0], x.shape[2], x.shape[3], b.shape[3]])
}

#[cfg(feature = "cubecl")]
fn forward_specs(operands: &OperandsMetadata, _spec: &Spec, _keep: &bool) -> ForwardMetadata {
    let OperandsMetadata { x, b, .. } = operands;
    let states = super::cube::states_shape(x.shape.dims(), b.shape.dims());
    ForwardMetadata {
        y: x.clone(),
        final_state: TensorSpec::new(state_shape(x, b), DType::F32),
        states: TensorSpec::new(Shape::new(states), super::cube::states_dtype(x.dtype)),
    }
}

#[cfg(feature = "cubecl")]
fn backward_specs(
    operands: &OperandsMetadata,
    _states: &TensorSpec,
    _dy: &TensorSpec,
    _dfinal_state: &TensorSpec,
    _spec: &Spec,
) -> GradientsMetadata {
    let OperandsMetadata { x, dt, a, b, c, .. } = operands;
    let [_, _, heads, headdim]: [usize; 4] = x.shape.dims();
    GradientsMetadata {
        x: x.clone(),
        dt: dt.clone(),
        a: a.clone(),
        b: b.clone(),
        c: c.clone(),
        d: TensorSpec::new(Shape::new([heads, headdim]), DType::F32),
        dt_bias: TensorSpec::new(Shape::new([heads]), DType::F32),
        initial_state: TensorSpec::new(state_shape(x, b), DType::F32),
    }
}
