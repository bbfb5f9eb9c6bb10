//! The backward step registered with Burn's autodiff. It keeps the operands and the states before the
//! chunks: nothing of size `[batch, length, heads, state]`.
//!
//! The operator has two outputs and a step of Burn's has one. So the final state is the step with the
//! operands as parents, and the output a step on top of it, which leaves its gradient in a place both
//! share: the whole backward pass runs when the step below is reached.

use std::sync::{Arc, Mutex};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::Shape;

use super::backend::{Operands, Spec, SsdBackend};
use mamba_ssm_linear::gradients::register;

#[derive(Debug)]
struct FinalState;

#[derive(Debug)]
struct Output;

/// Where the step of the output leaves its gradient.
type Shared<B> = Arc<Mutex<Option<FloatTensor<B>>>>;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    operands: Operands<B>,
    states: FloatTensor<B>,
    shape: Shape,
    dy: Shared<B>,
    spec: Spec,
}

impl<B: SsdBackend> Backward<B, 8> for FinalState {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 8>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dfinal_state = grads.consume::<B>(&ops.node);
        let saved = ops.state;
        let x = &saved.operands.x;
        let dy = saved.dy.lock().expect("no step panics with it").take();
        let dy = dy.unwrap_or_else(|| B::float_zeros(saved.shape, &x.device(), x.dtype().into()));
        let found = B::ssd_backward(saved.operands, saved.states, dy, dfinal_state, saved.spec);
        let gradients = [
            found.x,
            found.dt,
            found.a,
            found.b,
            found.c,
            found.d,
            found.dt_bias,
            found.initial_state,
        ];
        register::<B, 8>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            gradients,
            grads,
        );
    }
}

impl<B: SsdBackend> Backward<B, 1> for Output {
    type State = (Shared<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (place, nothing) = ops.state;
        *place.lock().expect("no step panics with it") = Some(grads.consume::<B>(&ops.node));
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            // So that the step below is reached even when nothing else uses the final state.
            grads.register::<B>(parent.id, nothing);
        }
    }
}

impl<B: SsdBackend, C: CheckpointStrategy> SsdBackend for Autodiff<B, C> {
    fn ssd(operands: Operands<Self>, spec: Spec) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let guards = [
            operands.x.node(),
            operands.dt.node(),
            operands.a.node(),
            operands.b.node(),
            operands.c.node(),
            operands.d.node(&operands.x),
            operands.dt_bias.node(&operands.x),
            operands.initial_state.node(&operands.x),
        ];
        let operands = Operands::<B> {
            x: operands.x.into_primitive(),
            dt: operands.dt.into_primitive(),
            a: operands.a.into_primitive(),
            b: operands.b.into_primitive(),
            c: operands.c.into_primitive(),
            d: operands.d.into_inner(),
            dt_bias: operands.dt_bias.into_inner(),
            initial_state: operands.initial_state.into_inner(),
        };
        let shape = operands.x.shape();
        match FinalState.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let forward = B::ssd_forward(operands.clone(), spec, true);
                let device = forward.final_state.device();
                let dtype = forward.final_state.dtype();
                let nothing = B::float_zeros(forward.final_state.shape(), &device, dtype.into());
                let dy = Shared::<B>::default();
                let saved = Saved {
                    operands,
                    states: forward.states,
                    shape,
                    dy: dy.clone(),
                    spec,
                };
                let final_state = prep.finish(saved, forward.final_state);
                let y = match Output
                    .prepare::<C>([final_state.node()])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish((dy, nothing), forward.y),
                    OpsKind::UnTracked(prep) => prep.finish(forward.y),
                };
                (y, final_state)
            }
            OpsKind::UnTracked(prep) => {
                let forward = B::ssd_forward(operands, spec, false);
                let final_state = prep.finish(forward.final_state);
                let guard = final_state.node();
                let y = match Output.prepare::<C>([guard]).compute_bound().stateful() {
                    OpsKind::Tracked(_) => unreachable!("its parent is not tracked"),
                    OpsKind::UnTracked(prep) => prep.finish(forward.y),
                };
                (y, final_state)
            }
        }
    }
}
