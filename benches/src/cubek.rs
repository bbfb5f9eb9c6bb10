//! cubek-attention's kernels wired to autodiff: what there was to be had before kernels of our own.
//!
//! Its forward pass is what Burn's `attention` runs. Its backward pass is f32 alone and wants the log-sum-exp of every row
//! of scores, which the forward pass does not return: here tensor operations find it, and hold all scores to do so.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::ops::ModuleOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use cubecl::prelude::*;
use cubek_attention::backward::{BackwardConfig, flash_attention_backward};
use cubek_attention::forward::definition::AttentionGlobalTypes;
use mamba_ssm_linear::cube::empty_like;
use mamba_ssm_linear::gradients::register;

/// Causal attention; operands are f32, `[batch, heads, length, head_dim]`.
pub fn cubek_attention([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    let lse = if q.device().is_autodiff() {
        log_sum_exp(q.clone().detach(), k.clone().detach())
    } else {
        // Nothing asks for it.
        Tensor::zeros([1, 1, 1], &q.device())
    };
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::cubek_attention(q, k, v, lse.into_dispatch()))
}

/// Of every row of scores, `[batch, heads, length]`.
fn log_sum_exp(q: Tensor<4>, k: Tensor<4>) -> Tensor<3> {
    let [_, _, length, head_dim] = q.dims();
    let device = q.device();
    let scores = q.matmul(k.swap_dims(2, 3)) * (head_dim as f64).powf(-0.5);
    let later = Tensor::<2, Bool>::tril_mask([length, length], 0, &device);
    let scores = scores.mask_fill(later.unsqueeze(), f32::NEG_INFINITY);
    let most = scores.clone().max_dim(3);
    let sum = (scores - most.clone()).exp().sum_dim(3);
    (sum.log() + most).squeeze_dim(3)
}

/// A backend with cubek-attention's kernels.
#[backend_extension(Cube, Fusion, Autodiff)]
pub trait CubekAttention: Backend {
    /// The output; differentiable where the backend is.
    #[fusion(default)]
    fn cubek_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        lse: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let _ = lse;
        Self::cubek_attention_forward(q, k, v)
    }

    /// The output.
    #[fusion(meta = forward_spec)]
    fn cubek_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let _ = (q, k, v);
        unreachable!("forward passes run below autodiff, on a device of CubeCL's")
    }

    /// The gradients of `q`, `k` and `v`.
    #[fusion(meta = backward_specs)]
    fn cubek_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dout: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let _ = (q, k, v, out, lse, dout);
        unreachable!("backward passes run below autodiff, on a device of CubeCL's")
    }
}

fn forward_spec(q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec) -> TensorSpec {
    q.clone()
}

fn backward_specs(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    _out: &TensorSpec,
    _lse: &TensorSpec,
    _dout: &TensorSpec,
) -> (TensorSpec, TensorSpec, TensorSpec) {
    (q.clone(), k.clone(), v.clone())
}

impl CubekAttention for CubeBackend {
    fn cubek_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let options = AttentionModuleOptions {
            is_causal: true,
            ..Default::default()
        };
        Self::attention(q, k, v, None, None, options)
    }

    fn cubek_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        dout: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let client = q.client.clone();
        let [dq, dk, dv] = [&q, &k, &v].map(|t| empty_like(t, t.meta.shape.clone(), t.dtype));
        let types = AttentionGlobalTypes::from_single_float_dtype(
            f32::elem_type_native(),
            AttentionGlobalTypes::mask_dtype(&client),
        );
        let config = BackwardConfig {
            causal: true,
            ..BackwardConfig::from_head_dim(q.meta.shape[3])
        };
        let read = [q, k, v, out, lse, dout].map(|tensor| into_contiguous(tensor).binding());
        let [q, k, v, out, lse, dout] = read;
        let [to_q, to_k, to_v] = [&dq, &dk, &dv].map(|tensor| tensor.clone().binding());
        flash_attention_backward(
            &client, q, k, v, out, lse, dout, to_q, to_k, to_v, &types, config,
        )
        .expect("a size it has");
        (dq, dk, dv)
    }
}

#[derive(Debug)]
struct Cubek;

impl<B: CubekAttention> Backward<B, 3> for Cubek {
    /// `q`, `k`, `v`, the output and the log-sum-exp.
    type State = [FloatTensor<B>; 5];

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let [q, k, v, out, lse] = ops.state;
        let (dq, dk, dv) = B::cubek_attention_backward(q, k, v, out, lse, dout);
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 3>(parents, [dq, dk, dv], grads);
    }
}

impl<B: CubekAttention, C: CheckpointStrategy> CubekAttention for Autodiff<B, C> {
    fn cubek_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        lse: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let guards = [q.node(), k.node(), v.node()];
        let [q, k, v, lse] = [q, k, v, lse].map(|tensor| tensor.into_primitive());
        let out = B::cubek_attention_forward(q.clone(), k.clone(), v.clone());
        match Cubek.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish([q, k, v, out.clone(), lse], out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};
    use mamba_ssm_attention::{FlashAttentionOptions, flash_attention};

    use super::*;

    /// Output and gradients of the sum of its products with weights.
    fn run(
        operands: &[Tensor<4>; 3],
        attention: impl Fn([Tensor<4>; 3]) -> Tensor<4>,
    ) -> Vec<Tensor<4>> {
        let leaves = operands.clone().map(|tensor| tensor.require_grad());
        let out = attention(leaves.clone());
        let weights = operands[0].clone().cos().detach();
        let gradients = (out.clone() * weights).sum().backward();
        let mut found = vec![out.inner()];
        found.extend(leaves.map(|leaf| leaf.grad(&gradients).expect("a gradient")));
        found
    }

    #[test]
    fn gradients_agree_with_flash_attention() {
        let device = Device::default().autodiff();
        device.seed(1);
        let normal = Distribution::Normal(0.0, 1.0);
        let operands = [(); 3].map(|()| Tensor::random([2, 3, 70, 16], normal, &device));
        let options = FlashAttentionOptions::causal();
        let found = run(&operands, cubek_attention);
        let wanted = run(&operands, |[q, k, v]| flash_attention(q, k, v, &options));
        for (found, wanted) in found.into_iter().zip(wanted) {
            let tolerance = Tolerance::<f32>::rel_abs(1e-3, 1e-4);
            found
                .into_data()
                .assert_approx_eq::<f32>(&wanted.into_data(), tolerance);
        }
    }
}
