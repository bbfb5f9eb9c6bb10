//! The backward step registered with Burn's autodiff. It keeps the heads, the output and the log-sum-exp:
//! nothing that grows with the square of the length.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::SelfSpec;
use super::backend::{Kept, Positions, SelfAttentionBackend};

#[derive(Debug)]
struct SelfAttention;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    kept: Kept<B>,
    positions: Positions<B>,
    spec: SelfSpec,
}

impl<B: SelfAttentionBackend> Backward<B, 1> for SelfAttention {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let Saved {
            kept,
            positions,
            spec,
        } = ops.state;
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            let dqkv = B::self_attention_backward(kept, positions, dy, spec);
            grads.register::<B>(parent.id, dqkv);
        }
    }
}

impl<B: SelfAttentionBackend, C: CheckpointStrategy> SelfAttentionBackend for Autodiff<B, C> {
    fn self_attention(
        qkv: FloatTensor<Self>,
        positions: Positions<Self>,
        spec: SelfSpec,
    ) -> FloatTensor<Self> {
        let guards = [qkv.node()];
        let qkv = qkv.into_primitive();
        let positions = match positions {
            Positions::Ignored => Positions::Ignored,
            Positions::Turned(cos, sin) => {
                Positions::<B>::Turned(cos.into_primitive(), sin.into_primitive())
            }
        };
        match SelfAttention
            .prepare::<C>(guards)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let forward = B::self_attention_forward(qkv, positions.clone(), spec);
                let saved = Saved {
                    kept: forward.kept,
                    positions,
                    spec,
                };
                prep.finish(saved, forward.y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::self_attention_forward(qkv, positions, spec).y)
            }
        }
    }
}
