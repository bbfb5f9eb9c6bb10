//! The definition, in tensor operations.

use burn::tensor::Tensor;

use super::Heads;
use crate::ops::flash_attention::{FlashAttentionOptions, flash_attention};
use crate::ops::rotary::RotaryTable;

pub(super) fn self_attention(
    qkv: Tensor<3>,
    table: Option<&RotaryTable>,
    heads: Heads,
    options: &FlashAttentionOptions,
) -> Tensor<3> {
    let [q, k, v] = heads_apart(qkv, table, heads);
    heads_together(flash_attention(q, k, v, options))
}

/// Queries `[batch, heads, length, head_dim]`, keys and values `[batch, kv_heads, ..]` out of
/// `[batch, length, (heads + 2 kv_heads) head_dim]`; queries and keys turned.
pub(crate) fn heads_apart(
    qkv: Tensor<3>,
    table: Option<&RotaryTable>,
    heads: Heads,
) -> [Tensor<4>; 3] {
    let [batch, length, _] = qkv.dims();
    let (n, kv) = (heads.heads, heads.kv_heads);
    let qkv = qkv
        .reshape([batch, length, n + 2 * kv, heads.head_dim])
        .swap_dims(1, 2);
    // Queries and keys turn together: one pass over both.
    let qk = qkv.clone().slice_dim(1, 0..n + kv);
    let qk = match table {
        Some(table) => table.apply(qk),
        None => qk,
    };
    [
        qk.clone().slice_dim(1, 0..n),
        qk.slice_dim(1, n..n + kv),
        qkv.slice_dim(1, n + kv..n + 2 * kv),
    ]
}

/// `[batch, heads, length, head_dim]` to `[batch, length, heads head_dim]`.
pub(crate) fn heads_together(y: Tensor<4>) -> Tensor<3> {
    let [batch, heads, length, head_dim] = y.dims();
    y.swap_dims(1, 2).reshape([batch, length, heads * head_dim])
}
