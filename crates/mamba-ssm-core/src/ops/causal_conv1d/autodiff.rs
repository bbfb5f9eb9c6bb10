//! The backward step registered with Burn's autodiff. It keeps the operands alone: what stands before the
//! activation is computed again.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::backend::{ConvBackend, Operands};
use mamba_ssm_linear::gradients::register;

#[derive(Debug)]
struct Conv;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    operands: Operands<B>,
    activation: bool,
}

impl<B: ConvBackend> Backward<B, 4> for Conv {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 4>,
        grads: &mut grads::Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let Saved {
            operands,
            activation,
        } = ops.state;
        let found = B::causal_conv1d_backward(operands, dy, activation);
        let gradients = [found.x, found.weight, found.bias, found.initial_state];
        register::<B, 4>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            gradients,
            grads,
        );
    }
}

impl<B: ConvBackend, C: CheckpointStrategy> ConvBackend for Autodiff<B, C> {
    fn causal_conv1d(operands: Operands<Self>, activation: bool) -> FloatTensor<Self> {
        let guards = [
            operands.x.node(),
            operands.weight.node(),
            operands.bias.node(&operands.x),
            operands.initial_state.node(&operands.x),
        ];
        let operands = Operands::<B> {
            x: operands.x.into_primitive(),
            weight: operands.weight.into_primitive(),
            bias: operands.bias.into_inner(),
            initial_state: operands.initial_state.into_inner(),
        };
        match Conv.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let saved = Saved {
                    operands: operands.clone(),
                    activation,
                };
                prep.finish(saved, B::causal_conv1d_forward(operands, activation))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::causal_conv1d_forward(operands, activation)),
        }
    }
}
