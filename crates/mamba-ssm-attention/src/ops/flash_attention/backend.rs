//! What a backend does for the operator, and how calls reach it.

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "cubecl")]
use burn::tensor::DType;

use super::{Spec, reference};

/// Padding of keys.
#[derive(ExtensionType, Debug, Clone)]
#[cfg_attr(feature = "cubecl", extension_type(fusion))]
pub enum Padding<B: Backend> {
    /// No key is padding.
    None,
    /// `[batch, length_k]`, `true` at padding.
    Keys(BoolTensor<B>),
}

/// Attention of a backend. Shapes are those of [`flash_attention`](super::flash_attention); the
/// log-sum-exp is `[batch, heads, length_q, 1]` in f32 (f64 for f64), huge or infinite for queries
/// without keys.
///
/// The defaults work tile by tile in the backend's own tensor operations.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait FlashAttentionBackend: Backend {
    /// The output alone; differentiable where the backend is.
    #[fusion(default)]
    fn flash_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] padding: Padding<Self>,
        spec: Spec,
    ) -> FloatTensor<Self> {
        Self::flash_attention_forward(q, k, v, padding, spec).0
    }

    /// Output and log-sum-exp.
    #[fusion(meta = forward_specs)]
    fn flash_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] padding: Padding<Self>,
        spec: Spec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::forward::<Self>(q, k, v, padding, &spec)
    }

    /// Gradients of `q`, `k` and `v`.
    #[fusion(meta = backward_specs)]
    #[allow(clippy::too_many_arguments)]
    fn flash_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] padding: Padding<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dout: FloatTensor<Self>,
        spec: Spec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        reference::backward::<Self>([q, k, v, out, lse, dout], padding, &spec)
    }
}

#[cfg(feature = "cubecl")]
fn forward_specs(
    q: &TensorSpec,
    _k: &TensorSpec,
    _v: &TensorSpec,
    _padding: &PaddingMetadata,
    _spec: &Spec,
) -> (TensorSpec, TensorSpec) {
    let mut lse = q.clone();
    lse.shape[3] = 1;
    if lse.dtype != DType::F64 {
        lse.dtype = DType::F32;
    }
    (q.clone(), lse)
}

#[cfg(feature = "cubecl")]
#[allow(clippy::too_many_arguments)]
fn backward_specs(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    _padding: &PaddingMetadata,
    _out: &TensorSpec,
    _lse: &TensorSpec,
    _dout: &TensorSpec,
    _spec: &Spec,
) -> (TensorSpec, TensorSpec, TensorSpec) {
    (q.clone(), k.clone(), v.clone())
}
