//! Exact attention, `softmax(q kᵀ scale + mask) v`, in tiles with an online softmax.
//!
//! Source: Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*,
//! 2023, algorithms 1 and 2; the conventions are those of the official `flash_attn_func`.

mod autodiff;
pub(crate) mod backend;
#[cfg(feature = "flex")]
mod cpu;
#[cfg(feature = "cubecl")]
mod cube;
mod dropout;
mod options;
mod reference;
mod values;

pub(crate) use options::Spec;
pub use options::{AttentionDropout, FlashAttentionOptions, MAX_HEAD_DIM};

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use backend::FlashAttentionBackend;

/// Attention of every query to the keys it may see.
///
/// For head `h` of batch `b`, query `i`:
/// `out[i] = sum_j p[i, j] v[j]`, `p[i, :] = softmax_j(scale q[i] . k[j])` over the keys `j` that the
/// options leave visible. A query that sees no key gets zeros (and passes no gradient).
///
/// | tensor | shape | |
/// | --- | --- | --- |
/// | `q` | `[batch, heads, length_q, head_dim]` | |
/// | `k`, `v` | `[batch, kv_heads, length_k, head_dim]` | `heads` a multiple of `kv_heads`; query head `h` uses key/value head `h / (heads / kv_heads)` |
/// | result | `[batch, heads, length_q, head_dim]` | in `q`'s dtype; scores and sums in f32 (f64 for f64) |
///
/// Queries stand at the end of the keys: query `i` is at position `i + length_k - length_q`, so a
/// causal call with one query and a cache of keys is a decoding step.
///
/// Differentiable in `q`, `k` and `v`. The backward pass keeps the inputs, the output and one number
/// per query, and computes the scores again, so memory grows with the length.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mamba_ssm_attention::{FlashAttentionOptions, flash_attention};
///
/// let device = Device::default().autodiff();
/// let draw = || Tensor::<4>::random([2, 4, 100, 8], Distribution::Default, &device).require_grad();
/// let (q, k, v) = (draw(), draw(), draw());
/// let out = flash_attention(q.clone(), k, v, &FlashAttentionOptions::causal());
/// let grads = out.sum().backward();
/// assert_eq!(q.grad(&grads).unwrap().dims(), [2, 4, 100, 8]);
/// ```
///
/// # Panics
///
/// When the shapes, dtypes or options do not fit together, with all of them in the message.
pub fn flash_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &FlashAttentionOptions,
) -> Tensor<4> {
    let spec = options.check(&q, &k, &v);
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    let padding = options.padding();
    Tensor::from_dispatch(Dispatch::flash_attention(q, k, v, padding, spec))
}

#[cfg(test)]
mod tests;
