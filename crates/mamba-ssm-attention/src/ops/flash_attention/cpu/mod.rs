//! Attention for Burn's Flex backend: tiles in native Rust, vectorised, in parallel over planes and
//! tiles.

mod backward;
mod forward;
mod simd;
mod tile;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Element, Flex, TensorMetadata};
use burn::tensor::{DType, FloatDType, Shape, TensorData};
use rayon::prelude::*;

use super::Spec;
use super::backend::{FlashAttentionBackend, Padding};
use backward::Outputs;
use forward::Inputs;
use simd::Real;
use tile::{COLUMNS, Plane, ROWS, Sight, wide};

impl FlashAttentionBackend for Flex {
    fn flash_attention_forward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        padding: Padding<Self>,
        spec: Spec,
    ) -> (FlexTensor, FlexTensor) {
        let dtype = q.dtype();
        let padding = padding_bytes(padding);
        let padding = padding.as_deref();
        match dtype {
            DType::F64 => forward_typed::<f64>([&q, &k, &v], padding, &spec),
            DType::F32 => forward_typed::<f32>([&q, &k, &v], padding, &spec),
            _ => {
                let [q, k, v] = [q, k, v].map(to_f32);
                let (out, lse) = forward_typed::<f32>([&q, &k, &v], padding, &spec);
                (Flex::float_cast(out, dtype.into()), lse)
            }
        }
    }

    fn flash_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        padding: Padding<Self>,
        out: FlexTensor,
        lse: FlexTensor,
        dout: FlexTensor,
        spec: Spec,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let dtype = q.dtype();
        let padding = padding_bytes(padding);
        let padding = padding.as_deref();
        let inputs = [q, k, v, out, dout];
        let [dq, dk, dv] = match dtype {
            DType::F64 => backward_typed::<f64>(&inputs, &lse, padding, &spec),
            DType::F32 => backward_typed::<f32>(&inputs, &lse, padding, &spec),
            _ => backward_typed::<f32>(&inputs.map(to_f32), &lse, padding, &spec)
                .map(|grad| Flex::float_cast(grad, dtype.into())),
        };
        (dq, dk, dv)
    }
}

fn to_f32(tensor: FlexTensor) -> FlexTensor {
    Flex::float_cast(tensor, FloatDType::F32)
}

/// Nonzero at padding, `[batch, length_k]` in order.
fn padding_bytes(padding: Padding<Flex>) -> Option<Vec<u8>> {
    match padding {
        Padding::None => None,
        Padding::Keys(mask) => {
            let bits = mask.into_data().convert::<bool>();
            Some(bits.iter::<bool>().map(u8::from).collect())
        }
    }
}

/// A tensor `[batch, heads, length, dim]` whose features lie next to each other.
struct Planes<'a, T> {
    values: &'a [T],
    heads: usize,
    dim: usize,
    strides: [usize; 3],
}

/// The tensor itself, or a copy if its features are not next to each other.
fn with_adjacent_features(tensor: &FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    let usable = strides[..3].iter().all(|stride| *stride >= 0) && strides[3] == 1;
    if usable {
        tensor.clone()
    } else {
        tensor.to_contiguous()
    }
}

impl<'a, T: Real + Element> Planes<'a, T> {
    fn new(tensor: &'a FlexTensor) -> Self {
        let layout: &Layout = tensor.layout();
        let shape = layout.shape();
        let strides = layout.strides();
        Self {
            values: &tensor.storage::<T>()[layout.start_offset()..],
            heads: shape[1],
            dim: shape[3],
            strides: [0, 1, 2].map(|axis| strides[axis] as usize),
        }
    }

    /// Plane `n` of `batch * heads`.
    fn plane(&self, n: usize) -> Plane<'a, T> {
        let [batch, head, token] = self.strides;
        let start = n / self.heads * batch + n % self.heads * head;
        Plane {
            values: &self.values[start..],
            stride: token,
            dim: self.dim,
        }
    }
}

/// Everything about a call but the values.
#[derive(Clone, Copy)]
struct Call<'a> {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    lq: usize,
    lk: usize,
    dim: usize,
    spec: &'a Spec,
    padding: Option<&'a [u8]>,
}

impl<'a> Call<'a> {
    fn new(q: &FlexTensor, k: &FlexTensor, padding: Option<&'a [u8]>, spec: &'a Spec) -> Self {
        let (q, k) = (q.shape(), k.shape());
        Self {
            batch: q[0],
            heads: q[1],
            kv_heads: k[1],
            lq: q[2],
            lk: k[2],
            dim: q[3],
            spec,
            padding,
        }
    }

    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn inputs<T: Real + Element>(
        &self,
        [q, k, v]: [&Planes<'a, T>; 3],
        plane: usize,
    ) -> Inputs<'a, T> {
        // Groups of query planes follow each other as the key/value planes do.
        let kv = plane / self.group();
        let batch = plane / self.heads;
        Inputs {
            q: q.plane(plane),
            k: k.plane(kv),
            v: v.plane(kv),
            sight: Sight {
                spec: self.spec,
                lq: self.lq,
                lk: self.lk,
                plane,
                padding: self
                    .padding
                    .map(|padding| &padding[batch * self.lk..][..self.lk]),
            },
        }
    }

    fn tensor<T: Real + Element>(
        &self,
        values: Vec<T>,
        heads: usize,
        length: usize,
        dim: usize,
    ) -> FlexTensor {
        let shape = Shape::new([self.batch, heads, length, dim]);
        FlexTensor::from_data(TensorData::new(values, shape))
    }
}

fn forward_typed<T: Real + Element>(
    tensors: [&FlexTensor; 3],
    padding: Option<&[u8]>,
    spec: &Spec,
) -> (FlexTensor, FlexTensor) {
    let call = Call::new(tensors[0], tensors[1], padding, spec);
    let tensors = tensors.map(with_adjacent_features);
    let planes = tensors.each_ref().map(Planes::<T>::new);
    let planes = planes.each_ref();
    let Call {
        batch,
        heads,
        lq,
        dim,
        ..
    } = call;
    let mut out = vec![T::ZERO; batch * heads * lq * dim];
    let mut lse = vec![T::ZERO; batch * heads * lq];
    out.par_chunks_mut(lq * dim)
        .zip(lse.par_chunks_mut(lq))
        .enumerate()
        .for_each(|(plane, (out, lse))| {
            let inputs = call.inputs(planes, plane);
            out.par_chunks_mut(ROWS * dim)
                .zip(lse.par_chunks_mut(ROWS))
                .enumerate()
                .for_each_init(
                    || forward::Scratch::new(dim),
                    |scratch, (tile, (out, lse))| {
                        let start = tile * ROWS;
                        forward::forward(&inputs, start..start + lse.len(), scratch, out, lse);
                    },
                );
        });
    (
        call.tensor(out, heads, lq, dim),
        call.tensor(lse, heads, lq, 1),
    )
}

fn backward_typed<T: Real + Element>(
    tensors: &[FlexTensor; 5],
    lse: &FlexTensor,
    padding: Option<&[u8]>,
    spec: &Spec,
) -> [FlexTensor; 3] {
    let call = Call::new(&tensors[0], &tensors[1], padding, spec);
    let tensors = tensors.each_ref().map(with_adjacent_features);
    let [q, k, v, out, dout] = tensors.each_ref().map(Planes::<T>::new);
    let lse = lse.to_contiguous();
    let lse = lse.storage::<T>();
    let delta = delta(&call, &out, &dout);
    let lq = call.lq;
    let head = |plane: usize| {
        let rows = plane * lq..(plane + 1) * lq;
        let outputs = Outputs {
            dout: dout.plane(plane),
            lse: &lse[rows.clone()],
            delta: &delta[rows],
        };
        (call.inputs([&q, &k, &v], plane), outputs)
    };
    // One pass over the scores if the planes keep every thread busy; else two passes, over tiles.
    let [dq, dk, dv] = if call.batch * call.kv_heads >= 2 * rayon::current_num_threads() {
        backward_by_plane(&call, head)
    } else {
        backward_by_tile(&call, head)
    };
    [
        call.tensor(dq, call.heads, lq, call.dim),
        call.tensor(dk, call.kv_heads, call.lk, call.dim),
        call.tensor(dv, call.kv_heads, call.lk, call.dim),
    ]
}

/// `dout[i] . out[i]` of every query.
fn delta<T: Real + Element>(call: &Call<'_>, out: &Planes<'_, T>, dout: &Planes<'_, T>) -> Vec<T> {
    let mut delta = vec![T::ZERO; call.batch * call.heads * call.lq];
    delta
        .par_chunks_mut(call.lq)
        .enumerate()
        .for_each(|(plane, delta)| {
            let (out, dout) = (out.plane(plane), dout.plane(plane));
            for (i, delta) in delta.iter_mut().enumerate() {
                for (a, b) in out.row(i).iter().zip(dout.row(i)) {
                    *delta += *a * *b;
                }
            }
        });
    delta
}

fn backward_by_plane<'a, T: Real + Element>(
    call: &Call<'a>,
    head: impl Fn(usize) -> (Inputs<'a, T>, Outputs<'a, T>) + Sync,
) -> [Vec<T>; 3] {
    let Call {
        batch,
        heads,
        kv_heads,
        lq,
        lk,
        dim,
        spec,
        ..
    } = *call;
    let group = call.group();
    let mut dq = vec![T::ZERO; batch * heads * lq * dim];
    let mut dk = vec![T::ZERO; batch * kv_heads * lk * dim];
    let mut dv = dk.clone();
    dq.par_chunks_mut(group * lq * dim)
        .zip(dk.par_chunks_mut(lk * dim).zip(dv.par_chunks_mut(lk * dim)))
        .enumerate()
        .for_each_init(
            || {
                (
                    backward::Scratch::new(dim),
                    vec![T::ZERO; group * lq * wide(dim)],
                )
            },
            |(scratch, sums), (plane, (dq, (dk, dv)))| {
                let sharing: Vec<_> = (plane * group..(plane + 1) * group).map(&head).collect();
                sums.fill(T::ZERO);
                let tiles = dk
                    .chunks_mut(COLUMNS * dim)
                    .zip(dv.chunks_mut(COLUMNS * dim));
                for (tile, (dk, dv)) in tiles.enumerate() {
                    let columns = tile * COLUMNS..((tile + 1) * COLUMNS).min(lk);
                    backward::backward_keys(&sharing, columns, scratch, dk, dv, Some(sums));
                }
                backward::finish_queries(sums, dim, spec.scale, dq);
            },
        );
    [dq, dk, dv]
}

fn backward_by_tile<'a, T: Real + Element>(
    call: &Call<'a>,
    head: impl Fn(usize) -> (Inputs<'a, T>, Outputs<'a, T>) + Sync,
) -> [Vec<T>; 3] {
    let Call {
        batch,
        heads,
        kv_heads,
        lq,
        lk,
        dim,
        ..
    } = *call;
    let group = call.group();
    let mut dq = vec![T::ZERO; batch * heads * lq * dim];
    let mut dk = vec![T::ZERO; batch * kv_heads * lk * dim];
    let mut dv = dk.clone();
    dk.par_chunks_mut(lk * dim)
        .zip(dv.par_chunks_mut(lk * dim))
        .enumerate()
        .for_each(|(plane, (dk, dv))| {
            let sharing: Vec<_> = (plane * group..(plane + 1) * group).map(&head).collect();
            dk.par_chunks_mut(COLUMNS * dim)
                .zip(dv.par_chunks_mut(COLUMNS * dim))
                .enumerate()
                .for_each_init(
                    || backward::Scratch::new(dim),
                    |scratch, (tile, (dk, dv))| {
                        let columns = tile * COLUMNS..((tile + 1) * COLUMNS).min(lk);
                        backward::backward_keys(&sharing, columns, scratch, dk, dv, None);
                    },
                );
        });
    dq.par_chunks_mut(lq * dim)
        .enumerate()
        .for_each(|(plane, dq)| {
            let (inputs, outputs) = head(plane);
            dq.par_chunks_mut(ROWS * dim).enumerate().for_each_init(
                || backward::Scratch::new(dim),
                |scratch, (tile, dq)| {
                    let rows = tile * ROWS..((tile + 1) * ROWS).min(lq);
                    backward::backward_queries(&inputs, &outputs, rows, scratch, dq);
                },
            );
        });
    [dq, dk, dv]
}
