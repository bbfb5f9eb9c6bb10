//! The backward step registered with Burn's autodiff. It keeps the operands, what the convolution and the
//! scan made, and the states between chunks.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::InnerSpec;
use super::backend::{InnerBackend, Operands};
use mamba_ssm_linear::gradients::register;

#[derive(Debug)]
struct Inner;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    operands: Operands<B>,
    convolved: FloatTensor<B>,
    scanned: FloatTensor<B>,
    states: FloatTensor<B>,
    spec: InnerSpec,
}

impl<B: InnerBackend> Backward<B, 7> for Inner {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 7>,
        grads: &mut grads::Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let Saved {
            operands,
            convolved,
            scanned,
            states,
            spec,
        } = ops.state;
        let found = B::mamba2_inner_backward(operands, convolved, scanned, states, dy, spec);
        let gradients = [
            found.zxbcdt,
            found.conv_weight,
            found.conv_bias,
            found.dt_bias,
            found.a,
            found.d,
            found.norm_weight,
        ];
        register::<B, 7>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            gradients,
            grads,
        );
    }
}

impl<B: InnerBackend, C: CheckpointStrategy> InnerBackend for Autodiff<B, C> {
    fn mamba2_inner(operands: Operands<Self>, spec: InnerSpec) -> FloatTensor<Self> {
        let guards = [
            operands.zxbcdt.node(),
            operands.conv_weight.node(),
            operands.conv_bias.node(&operands.zxbcdt),
            operands.dt_bias.node(),
            operands.a.node(),
            operands.d.node(),
            operands.norm_weight.node(),
        ];
        let operands = Operands::<B> {
            zxbcdt: operands.zxbcdt.into_primitive(),
            conv_weight: operands.conv_weight.into_primitive(),
            conv_bias: operands.conv_bias.into_inner(),
            dt_bias: operands.dt_bias.into_primitive(),
            a: operands.a.into_primitive(),
            d: operands.d.into_primitive(),
            norm_weight: operands.norm_weight.into_primitive(),
        };
        match Inner.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let forward = B::mamba2_inner_forward(operands.clone(), spec);
                let saved = Saved {
                    operands,
                    convolved: forward.convolved,
                    scanned: forward.scanned,
                    states: forward.states,
                    spec,
                };
                prep.finish(saved, forward.y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::mamba2_inner(operands, spec)),
        }
    }
}
