//! What stands between the projections of an attention layer as one operator: queries, keys and values are
//! taken out of the projection's rows, queries and keys turned by their positions, attended to, and the heads
//! put side by side again. Its parts never slice, concatenate or swap the wide tensors, which is most of what
//! they would cost one by one.

mod autodiff;
mod backend;
#[cfg(feature = "cubecl")]
mod cube;
mod reference;

use backend::{Positions, SelfAttentionBackend};
use burn::backend::Dispatch;
use burn::tensor::Tensor;
use mamba_ssm_linear::device::has_cube_kernels;
pub(crate) use reference::{heads_apart, heads_together};

use crate::ops::flash_attention::{FlashAttentionOptions, Spec};
use crate::ops::rotary::{RotaryStyle, RotaryTable};

/// Sizes and options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelfSpec {
    pub(crate) heads: Heads,
    pub(crate) style: RotaryStyle,
    pub(crate) attention: Spec,
}

/// The heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

#[cfg(feature = "cubecl")]
impl Heads {
    /// Queries, keys and values of a token, side by side.
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Attention within each sequence of `qkv`, `[batch, length, (heads + 2 kv_heads) head_dim]`: queries, keys
/// and values, head by head. Queries and keys are turned by `table`. Returns `[batch, length, heads head_dim]`.
///
/// Differentiable in `qkv`; the backward pass keeps the heads, the output and one number per query.
pub(crate) fn self_attention(
    qkv: Tensor<3>,
    table: Option<&RotaryTable>,
    heads: Heads,
    options: &FlashAttentionOptions,
) -> Tensor<3> {
    if !has_cube_kernels(&qkv.device(), qkv.dtype()) {
        return reference::self_attention(qkv, table, heads, options);
    }
    let spec = SelfSpec {
        heads,
        style: table.map_or(RotaryStyle::HalfSplit, |table| table.style),
        attention: options.spec(heads.head_dim),
    };
    let positions = table.map_or(Positions::Ignored, |table| {
        let [cos, sin] = [&table.cos, &table.sin].map(|x| x.clone().into_dispatch());
        Positions::Turned(cos, sin)
    });
    let y = Dispatch::self_attention(qkv.into_dispatch(), positions, spec);
    Tensor::from_dispatch(y)
}
