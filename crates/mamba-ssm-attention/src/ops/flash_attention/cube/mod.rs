//! Attention for Burn's CubeCL backends: kernels on matrix units, kernels for devices and types without,
//! and the definition for the rest, whose products are matrix products there. `plan` says which.

mod backward;
mod common;
mod forward;
mod launch;
mod matrix;
mod plan;

use burn::backend::ops::BoolTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::FloatDType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::backend::{FlashAttentionBackend, Padding};
use super::{Spec, reference};
use plan::Kernels;

/// `[batch, length_k]`, one at padding.
fn as_float(padding: Padding<CubeBackend>) -> Option<CubeTensor> {
    match padding {
        Padding::None => None,
        Padding::Keys(mask) => Some(CubeBackend::bool_into_float(mask, FloatDType::F32)),
    }
}

impl FlashAttentionBackend for CubeBackend {
    fn flash_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        padding: Padding<Self>,
        spec: Spec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let padded = matches!(padding, Padding::Keys(_));
        match Kernels::new(&q, padded, &spec) {
            Some(kernels) => launch::forward([q, k, v], as_float(padding), &kernels, &spec),
            None => reference::forward::<Self>(q, k, v, padding, &spec),
        }
    }

    fn flash_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        padding: Padding<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dout: FloatTensor<Self>,
        spec: Spec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let padded = matches!(padding, Padding::Keys(_));
        let tensors = [q, k, v, out, lse, dout];
        match Kernels::new(&tensors[0], padded, &spec) {
            Some(kernels) => launch::backward(tensors, as_float(padding), &kernels, &spec),
            None => reference::backward::<Self>(tensors, padding, &spec),
        }
    }
}
