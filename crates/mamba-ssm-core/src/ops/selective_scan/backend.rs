//! What a backend implements to run [`selective_scan`](super::selective_scan) natively.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::{DType, Shape};

use crate::ops::optional::Optional;

/// The operands, channels last; all but `u`, `delta`, `b`, `c` and `z` in f32.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Operands<B: Backend> {
    /// `[batch, length, dim]`.
    pub u: FloatTensor<B>,
    /// `[batch, length, dim]`.
    pub delta: FloatTensor<B>,
    /// `[dim, state]`.
    pub a: FloatTensor<B>,
    /// `[batch, length, groups, state]`.
    pub b: FloatTensor<B>,
    /// `[batch, length, groups, state]`.
    pub c: FloatTensor<B>,
    /// `[dim]`.
    #[extension_type]
    pub d: Optional<B>,
    /// `[batch, length, dim]`.
    #[extension_type]
    pub z: Optional<B>,
    /// `[dim]`.
    #[extension_type]
    pub delta_bias: Optional<B>,
    /// `[batch, dim, state]`.
    #[extension_type]
    pub initial_state: Optional<B>,
}

/// What the forward pass returns.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Forward<B: Backend> {
    /// As `u`.
    pub y: FloatTensor<B>,
    /// `[batch, dim, state]`, f32.
    pub final_state: FloatTensor<B>,
    /// What the backward pass needs: the states before the chunks.
    pub states: FloatTensor<B>,
}

/// The gradients, each in the shape and type of its operand. Those of `d`, `delta_bias` and
/// `initial_state` are present whether or not the operand is; that of `z` is anything where there is
/// none.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Gradients<B: Backend> {
    pub u: FloatTensor<B>,
    pub delta: FloatTensor<B>,
    pub a: FloatTensor<B>,
    pub b: FloatTensor<B>,
    pub c: FloatTensor<B>,
    pub d: FloatTensor<B>,
    pub z: FloatTensor<B>,
    pub delta_bias: FloatTensor<B>,
    pub initial_state: FloatTensor<B>,
}

/// A backend with the scan of Mamba-1.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait ScanBackend: Backend {
    /// Output and final state; differentiable where the backend is.
    #[fusion(default)]
    fn selective_scan(
        #[extension_type] operands: Operands<Self>,
        softplus: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let forward = Self::selective_scan_forward(operands, softplus, false);
        (forward.y, forward.final_state)
    }

    /// The forward pass. Without `keep` the states need not be kept and may be anything.
    #[fusion(meta = forward_specs)]
    fn selective_scan_forward(
        #[extension_type] operands: Operands<Self>,
        softplus: bool,
        keep: bool,
    ) -> Forward<Self> {
        let _ = (operands, softplus, keep);
        unreachable!("forward passes run below autodiff, where has_kernels() holds")
    }

    /// The backward pass, from the gradients of both outputs.
    #[fusion(meta = backward_specs)]
    fn selective_scan_backward(
        #[extension_type] operands: Operands<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dfinal_state: FloatTensor<Self>,
        softplus: bool,
    ) -> Gradients<Self> {
        let _ = (operands, states, dy, dfinal_state, softplus);
        unreachable!("backward passes run below autodiff, where has_kernels() holds")
    }
}

/// States per channel that kernels take.
pub(super) const MOST_STATES: usize = 256;

/// Tokens between two states that kernels keep for the backward pass, which has those of a chunk in
/// registers.
#[cfg(feature = "cubecl")]
pub(super) fn chunk(state: usize) -> usize {
    if state > 128 { 8 } else { 16 }
}

#[cfg(feature = "cubecl")]
fn state_spec(u: &TensorSpec, a: &TensorSpec) -> TensorSpec {
    TensorSpec::new(Shape::new([u.shape[0], u.shape[2], a.shape[1]]), DType::F32)
}

#[cfg(feature = "cubecl")]
fn forward_specs(operands: &OperandsMetadata, _softplus: &bool, keep: &bool) -> ForwardMetadata {
    let OperandsMetadata { u, a, .. } = operands;
    let [batch, length, dim]: [usize; 3] = u.shape.dims();
    let state = a.shape[1];
    let kept = match keep {
        true => batch * length.div_ceil(chunk(state)) * dim * state.next_power_of_two(),
        false => 1,
    };
    ForwardMetadata {
        y: u.clone(),
        final_state: state_spec(u, a),
        states: TensorSpec::new(Shape::new([kept]), DType::F32),
    }
}

#[cfg(feature = "cubecl")]
fn backward_specs(
    operands: &OperandsMetadata,
    _states: &TensorSpec,
    _dy: &TensorSpec,
    _dfinal_state: &TensorSpec,
    _softplus: &bool,
) -> GradientsMetadata {
    let OperandsMetadata {
        u, delta, a, b, c, ..
    } = operands;
    let dim = TensorSpec::new(Shape::new([u.shape[2]]), DType::F32);
    GradientsMetadata {
        u: u.clone(),
        delta: delta.clone(),
        a: a.clone(),
        b: b.clone(),
        c: c.clone(),
        d: dim.clone(),
        z: u.clone(),
        delta_bias: dim,
        initial_state: state_spec(u, a),
    }
}
