//! The backward step registered with Burn's autodiff. It keeps the operand alone: the mean square is computed
//! again.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::backend::NormaliseBackend;

#[derive(Debug)]
struct Normalise;

impl<B: NormaliseBackend> Backward<B, 1> for Normalise {
    type State = (FloatTensor<B>, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let ([parent], (x, epsilon)) = (ops.parents, ops.state);
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::normalise_backward(x, dy, epsilon));
        }
    }
}

impl<B: NormaliseBackend, C: CheckpointStrategy> NormaliseBackend for Autodiff<B, C> {
    fn normalise(x: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let guards = [x.node()];
        let x = x.into_primitive();
        match Normalise.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((x.clone(), epsilon), B::normalise_forward(x, epsilon))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::normalise_forward(x, epsilon)),
        }
    }
}
