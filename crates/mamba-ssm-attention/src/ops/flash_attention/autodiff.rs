//! The backward step registered with Burn's autodiff. It keeps the inputs, the output and the
//! log-sum-exp: nothing that grows with the square of the length.

use burn::backend::Autodiff;
use burn::backend::Backend;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use mamba_ssm_linear::gradients::register;

use super::Spec;
use super::backend::{FlashAttentionBackend, Padding};

#[derive(Debug)]
struct FlashAttention;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    padding: Padding<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    spec: Spec,
}

impl<B: FlashAttentionBackend> Backward<B, 3> for FlashAttention {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let Saved {
            q,
            k,
            v,
            padding,
            out,
            lse,
            spec,
        } = ops.state;
        let (dq, dk, dv) = B::flash_attention_backward(q, k, v, padding, out, lse, dout, spec);
        register::<B, 3>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            [dq, dk, dv],
            grads,
        );
    }
}

impl<B: FlashAttentionBackend, C: CheckpointStrategy> FlashAttentionBackend for Autodiff<B, C> {
    fn flash_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        padding: Padding<Self>,
        spec: Spec,
    ) -> FloatTensor<Self> {
        let padding = match padding {
            Padding::None => Padding::None,
            Padding::Keys(mask) => Padding::Keys(mask),
        };
        let guards = [q.node(), k.node(), v.node()];
        let [q, k, v] = [q, k, v].map(|tensor| tensor.into_primitive());
        match FlashAttention
            .prepare::<C>(guards)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (out, lse) = B::flash_attention_forward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    padding.clone(),
                    spec,
                );
                let saved = Saved {
                    q,
                    k,
                    v,
                    padding,
                    out: out.clone(),
                    lse,
                    spec,
                };
                prep.finish(saved, out)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::flash_attention_forward(q, k, v, padding, spec).0)
            }
        }
    }
}
