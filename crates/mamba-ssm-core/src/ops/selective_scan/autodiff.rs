//! The backward step registered with Burn's autodiff. It keeps the operands and the states before the
//! chunks: nothing of size `[batch, length, dim, state]`.
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

use super::backend::{Operands, ScanBackend};
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
    softplus: bool,
}

impl<B: ScanBackend> Backward<B, 9> for FinalState {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 9>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dfinal_state = grads.consume::<B>(&ops.node);
        let saved = ops.state;
        let u = &saved.operands.u;
        let dy = saved.dy.lock().expect("no step panics with it").take();
        let dy = dy.unwrap_or_else(|| B::float_zeros(saved.shape, &u.device(), u.dtype().into()));
        let found = B::selective_scan_backward(
            saved.operands,
            saved.states,
            dy,
            dfinal_state,
            saved.softplus,
        );
        let gradients = [
            found.u,
            found.delta,
            found.a,
            found.b,
            found.c,
            found.d,
            found.z,
            found.delta_bias,
            found.initial_state,
        ];
        register::<B, 9>(
            ops.parents.map(|parent| parent.map(|node| node.id)),
            gradients,
            grads,
        );
    }
}

impl<B: ScanBackend> Backward<B, 1> for Output {
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

impl<B: ScanBackend, C: CheckpointStrategy> ScanBackend for Autodiff<B, C> {
    fn selective_scan(
        operands: Operands<Self>,
        softplus: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let guards = [
            operands.u.node(),
            operands.delta.node(),
            operands.a.node(),
            operands.b.node(),
            operands.c.node(),
            operands.d.node(&operands.u),
            operands.z.node(&operands.u),
            operands.delta_bias.node(&operands.u),
            operands.initial_state.node(&operands.u),
        ];
        let operands = Operands::<B> {
            u: operands.u.into_primitive(),
            delta: operands.delta.into_primitive(),
            a: operands.a.into_primitive(),
            b: operands.b.into_primitive(),
            c: operands.c.into_primitive(),
            d: operands.d.into_inner(),
            z: operands.z.into_inner(),
            delta_bias: operands.delta_bias.into_inner(),
            initial_state: operands.initial_state.into_inner(),
        };
        let shape = operands.u.shape();
        match FinalState.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let forward = B::selective_scan_forward(operands.clone(), softplus, true);
                let device = forward.final_state.device();
                let dtype = forward.final_state.dtype();
                let nothing = B::float_zeros(forward.final_state.shape(), &device, dtype.into());
                let dy = Shared::<B>::default();
                let saved = Saved {
                    operands,
                    states: forward.states,
                    shape,
                    dy: dy.clone(),
                    softplus,
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
                let forward = B::selective_scan_forward(operands, softplus, false);
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
