//! What a backend implements to run [`self_attention`](super::self_attention()) natively.

// Without kernels there is nothing to route a call to.
#![cfg_attr(not(feature = "cubecl"), allow(unused_variables))]

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::{DType, Shape};

#[cfg(feature = "cubecl")]
use super::Heads;
use super::SelfSpec;

/// How queries and keys are turned.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub enum Positions<B: Backend> {
    /// Not at all.
    Ignored,
    /// By these cosines and sines, `[length, pairs]` in f32.
    Turned(FloatTensor<B>, FloatTensor<B>),
}

/// What the forward pass returns.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Forward<B: Backend> {
    /// `[batch, length, heads head_dim]`.
    pub y: FloatTensor<B>,
    /// What the backward pass reads.
    #[extension_type]
    pub kept: Kept<B>,
}

/// What the backward pass reads: the heads as attention saw them, its output and log-sum-exp.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub struct Kept<B: Backend> {
    /// `[batch, heads, length, head_dim]`.
    pub q: FloatTensor<B>,
    /// `[batch, kv_heads, length, head_dim]`.
    pub k: FloatTensor<B>,
    /// `[batch, kv_heads, length, head_dim]`.
    pub v: FloatTensor<B>,
    /// `[batch, heads, length, head_dim]`.
    pub out: FloatTensor<B>,
    /// `[batch, heads, length, 1]`, f32.
    pub lse: FloatTensor<B>,
}

/// A backend with the operator; `qkv` is f32, f16 or bf16.
#[backend_extension(
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait SelfAttentionBackend: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn self_attention(
        qkv: FloatTensor<Self>,
        #[extension_type] positions: Positions<Self>,
        spec: SelfSpec,
    ) -> FloatTensor<Self> {
        Self::self_attention_forward(qkv, positions, spec).y
    }

    /// The forward pass.
    #[fusion(meta = forward_specs)]
    fn self_attention_forward(
        qkv: FloatTensor<Self>,
        #[extension_type] positions: Positions<Self>,
        spec: SelfSpec,
    ) -> Forward<Self> {
        let _ = (qkv, positions, spec);
        unreachable!("forward passes run below autodiff, where has_cube_kernels() holds")
    }

    /// The gradient of `qkv`.
    #[fusion(meta = backward_spec)]
    fn self_attention_backward(
        #[extension_type] kept: Kept<Self>,
        #[extension_type] positions: Positions<Self>,
        dy: FloatTensor<Self>,
        spec: SelfSpec,
    ) -> FloatTensor<Self> {
        let _ = (kept, positions, dy, spec);
        unreachable!("backward passes run below autodiff, where has_cube_kernels() holds")
    }
}

#[cfg(feature = "cubecl")]
fn forward_specs(
    qkv: &TensorSpec,
    _positions: &PositionsMetadata,
    spec: &SelfSpec,
) -> ForwardMetadata {
    let dtype = qkv.dtype;
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = spec.heads;
    let [batch, length, _]: [usize; 3] = qkv.shape.dims();
    let of = |count| {
        let shape = [batch, count, length, head_dim];
        TensorSpec::new(Shape::new(shape), dtype)
    };
    let y = [batch, length, heads * head_dim];
    let lse = [batch, heads, length, 1];
    ForwardMetadata {
        y: TensorSpec::new(Shape::new(y), dtype),
        kept: KeptMetadata {
            q: of(heads),
            k: of(kv_heads),
            v: of(kv_heads),
            out: of(heads),
            lse: TensorSpec::new(Shape::new(lse), DType::F32),
        },
    }
}

#[cfg(feature = "cubecl")]
fn backward_spec(
    kept: &KeptMetadata,
    _positions: &PositionsMetadata,
    dy: &TensorSpec,
    spec: &SelfSpec,
) -> TensorSpec {
    let [batch, _, length, _]: [usize; 4] = kept.q.shape.dims();
    let width = spec.heads.width();
    TensorSpec::new(Shape::new([batch, length, width]), dy.dtype)
}
