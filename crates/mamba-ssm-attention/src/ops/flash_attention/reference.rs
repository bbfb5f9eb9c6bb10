//! The definition, in tensor operations, a band of queries at a time: forward, and backward from the
//! log-sum-exp. It serves every backend without kernels of its own.
//!
//! A band holds [`BUDGET`] scores, or one query of every plane if that is more, so memory grows
//! with the length and not with its square.

use std::ops::Range;

use burn::backend::tensor::{BoolTensor, Device, FloatTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{BoolDType, DType, FloatDType, Shape, Slice, TensorData};

use super::backend::Padding;
use super::values::Values;
use super::{Spec, dropout};

/// Scores held at once (256 MiB in f32, a few times over).
const BUDGET: usize = 1 << 26;

/// A score no key can reach; finite, so that differences of two are not NaN.
const HIDDEN: f64 = -1e30;

/// Output, in `q`'s dtype, and natural log-sum-exp, `[batch, heads, lq, 1]`.
pub(crate) fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    padding: Padding<B>,
    spec: &Spec,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = q.dtype();
    let call = Call::<B>::new(&q, &k, padding, spec);
    let [q, k, v] = call.widen([q, k, v]);
    let mut outs = Vec::new();
    let mut sums = Vec::new();
    for rows in call.bands() {
        let columns = spec.visible_to_any(rows.clone(), call.lq, call.lk);
        if columns.is_empty() {
            outs.push(call.constant(0.0, rows.len(), call.dim).0);
            sums.push(call.constant(-HIDDEN, rows.len(), 1).0);
            continue;
        }
        let band = call.band(rows, columns);
        let scores = band.scores(&q, &k);
        let top = scores.clone().max().detach();
        let weights = band.hide((scores - top.clone()).exp(), 0.0);
        let sum = weights.clone().sum();
        let empty = sum.is_zero(call.bool_dtype);
        let sum = sum.fill(empty.clone(), 1.0);
        sums.push((top + sum.clone().log()).fill(empty, -HIDDEN).0);
        let kept = band.drop(weights / sum);
        outs.push(kept.matmul(v.columns(&band.columns)).0);
    }
    let out = Values::<B>(B::float_cat(outs, 2)).cast(dtype.into());
    (out.0, B::float_cat(sums, 2))
}

/// Gradients of `q`, `k` and `v`; `tensors` are `q`, `k`, `v`, the output, the log-sum-exp and the
/// gradient of the output.
pub(crate) fn backward<B: Backend>(
    tensors: [FloatTensor<B>; 6],
    padding: Padding<B>,
    spec: &Spec,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let [q, k, v, out, lse, dout] = tensors;
    let dtype: FloatDType = q.dtype().into();
    let call = Call::<B>::new(&q, &k, padding, spec);
    let [q, k, v] = call.widen([q, k, v]);
    let [out, dout] = [out, dout].map(|x| Values::<B>(x).cast(call.wide));
    let lse = Values::<B>(lse);
    let delta = (out * dout.clone()).sum();

    let mut dq = Vec::new();
    let mut dk = call.zeros_like_keys();
    let mut dv = call.zeros_like_keys();
    for rows in call.bands() {
        let columns = spec.visible_to_any(rows.clone(), call.lq, call.lk);
        if columns.is_empty() {
            dq.push(call.constant(0.0, rows.len(), call.dim).0);
            continue;
        }
        let band = call.band(rows, columns);
        let p = band.hide((band.scores(&q, &k) - lse.rows(&band.rows)).exp(), 0.0);
        let dout = dout.rows(&band.rows);
        let dp = band.drop(dout.clone().matmul(v.columns(&band.columns).transpose()));
        let ds = (p.clone() * (dp - delta.rows(&band.rows))).scale(spec.scale);
        dq.push(ds.clone().matmul(k.columns(&band.columns)).0);
        let dk_band = ds.transpose().matmul(q.rows(&band.rows));
        let dv_band = band.drop(p).transpose().matmul(dout);
        dk = dk.add_to_columns(&band.columns, call.sum_groups(dk_band));
        dv = dv.add_to_columns(&band.columns, call.sum_groups(dv_band));
    }
    let dq = Values::<B>(B::float_cat(dq, 2));
    (dq.cast(dtype).0, dk.cast(dtype).0, dv.cast(dtype).0)
}

/// Everything about a call but the values.
struct Call<'a, B: Backend> {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    lq: usize,
    lk: usize,
    dim: usize,
    spec: &'a Spec,
    padding: Padding<B>,
    device: Device<B>,
    /// Dtype of scores and sums.
    wide: FloatDType,
    bool_dtype: BoolDType,
}

impl<'a, B: Backend> Call<'a, B> {
    fn new(q: &FloatTensor<B>, k: &FloatTensor<B>, padding: Padding<B>, spec: &'a Spec) -> Self {
        let (q_shape, k_shape) = (q.shape(), k.shape());
        let device = q.device();
        Self {
            batch: q_shape[0],
            heads: q_shape[1],
            kv_heads: k_shape[1],
            lq: q_shape[2],
            lk: k_shape[2],
            dim: q_shape[3],
            spec,
            padding,
            bool_dtype: get_or_init_device_settings::<B>(&device).bool_dtype,
            device,
            wide: match q.dtype() {
                DType::F64 => FloatDType::F64,
                _ => FloatDType::F32,
            },
        }
    }

    /// Casts to the wide dtype and repeats key/value heads for the query heads of their group.
    fn widen(&self, [q, k, v]: [FloatTensor<B>; 3]) -> [Values<B>; 3] {
        let group = self.heads / self.kv_heads;
        let repeat = |x: Values<B>| {
            if group == 1 {
                return x;
            }
            let Self {
                batch,
                kv_heads,
                heads,
                lk,
                dim,
                ..
            } = *self;
            x.reshape(&[batch, kv_heads, 1, lk, dim])
                .expand(&[batch, kv_heads, group, lk, dim])
                .reshape(&[batch, heads, lk, dim])
        };
        let [q, k, v] = [q, k, v].map(|x| Values::<B>(x).cast(self.wide));
        [q, repeat(k), repeat(v)]
    }

    /// Undoes the repetition of heads in a gradient.
    fn sum_groups(&self, x: Values<B>) -> Values<B> {
        let group = self.heads / self.kv_heads;
        if group == 1 {
            return x;
        }
        let columns = x.0.shape()[2];
        let Self {
            batch,
            kv_heads,
            dim,
            ..
        } = *self;
        let x = x.reshape(&[batch, kv_heads, group, columns, dim]);
        Values::<B>(B::float_sum_dim(x.0, 2)).reshape(&[batch, kv_heads, columns, dim])
    }

    fn constant(&self, value: f64, rows: usize, dim: usize) -> Values<B> {
        let shape = Shape::new([self.batch, self.heads, rows, dim]);
        Values(B::float_full(shape, value.into(), &self.device, self.wide))
    }

    fn zeros_like_keys(&self) -> Values<B> {
        let shape = Shape::new([self.batch, self.kv_heads, self.lk, self.dim]);
        Values(B::float_zeros(shape, &self.device, self.wide))
    }

    fn bands(&self) -> impl Iterator<Item = Range<usize>> + use<B> {
        let lq = self.lq;
        let rows = (BUDGET / (self.batch * self.heads * self.lk)).clamp(1, lq);
        (0..lq)
            .step_by(rows)
            .map(move |start| start..(start + rows).min(lq))
    }

    fn band(&self, rows: Range<usize>, columns: Range<usize>) -> Band<B> {
        let shape = Shape::new([self.batch, self.heads, rows.len(), columns.len()]);
        let hidden = self
            .hidden(&rows, &columns)
            .map(|hidden| B::bool_expand(hidden, shape));
        let dropped = self.spec.dropout.map(|dropout| {
            let (rows, columns) = (rows.clone(), columns.clone());
            let planes = [self.batch, self.heads];
            let dropped = dropout::dropped::<B>(&dropout, planes, rows, columns, &self.device);
            (dropped, 1.0 / (1.0 - dropout.prob))
        });
        Band {
            rows,
            columns,
            scale: self.spec.scale,
            hidden,
            dropped,
        }
    }

    /// `true` where a query may not see a key: `[batch or 1, 1, rows, columns]`.
    fn hidden(&self, rows: &Range<usize>, columns: &Range<usize>) -> Option<BoolTensor<B>> {
        let padding = match &self.padding {
            Padding::None => None,
            Padding::Keys(mask) => {
                let mask = B::bool_slice(mask.clone(), &[Slice::full(), columns.clone().into()]);
                let shape = Shape::new([self.batch, 1, 1, columns.len()]);
                let spread = Shape::new([self.batch, 1, rows.len(), columns.len()]);
                Some(B::bool_expand(B::bool_reshape(mask, shape), spread))
            }
        };
        match (self.outside(rows, columns), padding) {
            (Some(outside), Some(padding)) => {
                let outside = B::bool_expand(outside, padding.shape());
                Some(B::bool_or(outside, padding))
            }
            (one, None) | (None, one) => one,
        }
    }

    /// `true` where a key is too late or too early for a query: `[1, 1, rows, columns]`.
    fn outside(&self, rows: &Range<usize>, columns: &Range<usize>) -> Option<BoolTensor<B>> {
        if self.spec.sees_all() {
            return None;
        }
        let positions = |range: &Range<usize>, shift: i64, shape: [usize; 4]| {
            // Exact in f32 to sixteen million positions.
            let values: Vec<f32> = range.clone().map(|n| (n as i64 + shift) as f32).collect();
            let data = TensorData::new(values, shape);
            Values::<B>(B::float_from_data(data, &self.device))
        };
        let shift = self.lk as i64 - self.lq as i64;
        // Positive after the query's position, negative before it.
        let ahead = positions(columns, 0, [1, 1, 1, columns.len()])
            - positions(rows, shift, [1, 1, rows.len(), 1]);
        let window = self.spec.window.map(|w| w.min(self.lq + self.lk) as f64);
        let late = match (self.spec.causal, window) {
            (true, _) => Some(ahead.at_least(1.0, self.bool_dtype)),
            (false, window) => window.map(|w| ahead.at_least(w, self.bool_dtype)),
        };
        let early = window.map(|w| ahead.at_most(-w, self.bool_dtype));
        match (late, early) {
            (Some(late), Some(early)) => Some(B::bool_or(late, early)),
            (one, None) | (None, one) => one,
        }
    }
}

/// Some queries and the keys that any of them sees.
struct Band<B: Backend> {
    rows: Range<usize>,
    columns: Range<usize>,
    scale: f64,
    hidden: Option<BoolTensor<B>>,
    dropped: Option<(BoolTensor<B>, f64)>,
}

impl<B: Backend> Band<B> {
    fn scores(&self, q: &Values<B>, k: &Values<B>) -> Values<B> {
        let q = q.rows(&self.rows).scale(self.scale);
        self.hide(q.matmul(k.columns(&self.columns).transpose()), HIDDEN)
    }

    fn hide(&self, x: Values<B>, value: f64) -> Values<B> {
        match &self.hidden {
            Some(hidden) => x.fill(hidden.clone(), value),
            None => x,
        }
    }

    fn drop(&self, x: Values<B>) -> Values<B> {
        match &self.dropped {
            Some((dropped, factor)) => x.fill(dropped.clone(), 0.0).scale(*factor),
            None => x,
        }
    }
}
