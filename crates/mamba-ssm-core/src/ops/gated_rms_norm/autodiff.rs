//! The backward step registered with Burn's autodiff. It keeps the operands alone: the mean square is
//! computed again.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::backend::{NormBackend, Operands, Spec};
use mamba_ssm_linear::gradients::register;

#[derive(Debug)]
struct Norm;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    operands: Operands<B>,
    spec: Spec,
}

impl<B: NormBackend> Backward<B, 3> for Norm {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut grads::Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let Saved { operands, spec } = ops.state;
        let found = B::gated_rms_norm_backward(operands, dy, spec);
        register::<B, 3>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            [found.x, found.z, found.weight],
            grads,
        );
    }
}

impl<B: NormBackend, C: CheckpointStrategy> NormBackend for Autodiff<B, C> {
    fn gated_rms_norm(operands: Operands<Self>, spec: Spec) -> FloatTensor<Self> {
        let guards = [
            operands.x.node(),
            operands.z.node(&operands.x),
            operands.weight.node(),
        ];
        let operands = Operands::<B> {
            x: operands.x.into_primitive(),
            z: operands.z.into_inner(),
            weight: operands.weight.into_primitive(),
        };
        match Norm.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let saved = Saved {
                    operands: operands.clone(),
                    spec,
                };
                prep.finish(saved, B::gated_rms_norm_forward(operands, spec))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::gated_rms_norm_forward(operands, spec)),
        }
    }
}
