//! The definition, in tensor operations, a band of queries at a time.

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Int, Tensor};

use super::{Spec, dropout};

/// Scores held at once, per batch and head, when no gradient is wanted.
const BAND: usize = 1 << 18;

/// `q`: `[batch, heads, lq, dim]`; `k`, `v`: `[batch, kv_heads, lk, dim]`; `padding`: `[batch, lk]`.
/// Shapes are checked by the caller.
pub(crate) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    padding: Option<Tensor<2, Bool>>,
    spec: &Spec,
) -> Tensor<4> {
    let [_, heads, lq, _] = q.dims();
    let lk = k.dims()[2];
    let dtype = q.dtype();
    let wide = if dtype == DType::F64 {
        dtype
    } else {
        DType::F32
    };
    let q = q.cast(wide) * spec.scale;
    let k = repeat_heads(k.cast(wide), heads).swap_dims(2, 3);
    let v = repeat_heads(v.cast(wide), heads);

    let rows = (BAND / lk).clamp(1, lq);
    let bands = (0..lq)
        .step_by(rows)
        .map(|start| {
            let rows = start..(start + rows).min(lq);
            let columns = spec.visible_to_any(rows.clone(), lq, lk);
            let q = q.clone().slice_dim(2, rows.clone());
            if columns.is_empty() {
                return q * 0.0;
            }
            let k = k.clone().slice_dim(3, columns.clone());
            let v = v.clone().slice_dim(2, columns.clone());
            let padding = padding
                .clone()
                .map(|padding| padding.slice_dim(1, columns.clone()));
            let hidden = hidden(spec, &rows, &columns, [lq, lk], padding, &q.device());
            let dropped = spec.dropout.map(|dropout| {
                let [batch, heads, _, _] = q.dims();
                let device = q.device();
                dropout::dropped(&dropout, [batch, heads], rows, columns, &device)
            });
            let p = probabilities(q.matmul(k), hidden);
            let p = match (dropped, spec.dropout) {
                (Some(dropped), Some(dropout)) => {
                    p.mask_fill(dropped, 0.0) * (1.0 / (1.0 - dropout.prob))
                }
                _ => p,
            };
            p.matmul(v)
        })
        .collect();
    Tensor::cat(bands, 2).cast(dtype)
}

/// Softmax over the last axis, zero where `hidden`; all zero when everything is hidden.
fn probabilities(scores: Tensor<4>, hidden: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let shape = scores.shape();
    let hidden = hidden.map(|hidden| hidden.expand(shape));
    let scores = match hidden.clone() {
        // Finite: a row of infinities alone would give NaN below.
        Some(hidden) => scores.mask_fill(hidden, -1e30),
        None => scores,
    };
    let top = scores.clone().max_dim(3).detach();
    let weights = (scores - top).exp();
    let weights = match hidden {
        Some(hidden) => weights.mask_fill(hidden, 0.0),
        None => weights,
    };
    let sum = weights.clone().sum_dim(3);
    let empty = sum.clone().equal_elem(0.0);
    weights / sum.mask_fill(empty, 1.0)
}

/// Repeats each key/value head for the query heads of its group.
fn repeat_heads(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, length, dim] = x.dims();
    if kv_heads == heads {
        return x;
    }
    let group = heads / kv_heads;
    x.unsqueeze_dim::<5>(2)
        .expand([batch, kv_heads, group, length, dim])
        .reshape([batch, heads, length, dim])
}

/// `true` where a query may not see a key: `[batch or 1, 1, rows, columns]`.
fn hidden(
    spec: &Spec,
    rows: &Range<usize>,
    columns: &Range<usize>,
    [lq, lk]: [usize; 2],
    padding: Option<Tensor<2, Bool>>,
    device: &Device,
) -> Option<Tensor<4, Bool>> {
    let padding = padding.map(|padding| {
        let [batch, columns] = padding.dims();
        padding
            .reshape([batch, 1, 1, columns])
            .expand([batch, 1, rows.len(), columns])
    });
    let outside = (!spec.sees_all()).then(|| {
        let range =
            |r: Range<usize>| Tensor::<1, Int>::arange(r.start as i64..r.end as i64, device);
        let shape = [1, 1, rows.len(), columns.len()];
        let column = range(columns.clone())
            .reshape([1, 1, 1, columns.len()])
            .expand(shape);
        let row = range(rows.clone())
            .reshape([1, 1, rows.len(), 1])
            .expand(shape);
        // Positive after the query's position, negative before it.
        let ahead = column - row - (lk as i64 - lq as i64);
        let window = spec.window.map(|w| w.min(lq + lk) as i64);
        let late = match (spec.causal, window) {
            (true, _) => Some(ahead.clone().greater_elem(0)),
            (false, Some(w)) => Some(ahead.clone().greater_equal_elem(w)),
            (false, None) => None,
        };
        let early = window.map(|w| ahead.lower_equal_elem(-w));
        match (late, early) {
            (Some(late), Some(early)) => late.bool_or(early),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => unreachable!("either causal or a window"),
        }
    });
    match (outside, padding) {
        (Some(outside), Some(padding)) => {
            let shape = padding.shape();
            Some(outside.expand(shape).bool_or(padding))
        }
        (one, None) | (None, one) => one,
    }
}
