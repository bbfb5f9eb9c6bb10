//! The backward step registered with Burn's autodiff. It keeps the seed alone: the mask is drawn again.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::backend::ResidualBackend;

#[derive(Debug)]
struct AddDropped;

impl<B: ResidualBackend> Backward<B, 2> for AddDropped {
    type State = (FloatTensor<B>, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dr = grads.consume::<B>(&ops.node);
        let ([x, y], (seed, prob)) = (ops.parents, ops.state);
        if let Some(y) = y {
            grads.register::<B>(y.id, B::add_dropped_backward(dr.clone(), seed, prob));
        }
        if let Some(x) = x {
            grads.register::<B>(x.id, dr);
        }
    }
}

impl<B: ResidualBackend, C: CheckpointStrategy> ResidualBackend for Autodiff<B, C> {
    fn add_dropped(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        seed: FloatTensor<Self>,
        prob: f64,
    ) -> FloatTensor<Self> {
        let guards = [x.node(), y.node()];
        let [x, y, seed] = [x, y, seed].map(|tensor| tensor.into_primitive());
        match AddDropped.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let r = B::add_dropped_forward(x, y, seed.clone(), prob);
                prep.finish((seed, prob), r)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::add_dropped_forward(x, y, seed, prob)),
        }
    }
}
