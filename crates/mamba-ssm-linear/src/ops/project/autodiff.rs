//! The backward step registered with Burn's autodiff. It keeps the input and the weight.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};

use super::backend::{Bias, ProjectBackend};

#[derive(Debug)]
struct Project;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
}

/// Registers the gradients of whatever of `x`, `weight` and `bias` has a node.
fn register<B: ProjectBackend>(
    saved: Saved<B>,
    dy: FloatTensor<B>,
    [x, weight, bias]: [Option<NodeId>; 3],
    grads: &mut Gradients,
) {
    let dtype = saved.weight.dtype().into();
    if let Some(node) = x {
        let dx = B::project_input_gradient(dy.clone(), saved.weight);
        grads.register::<B>(node, dx);
    }
    match (weight, bias) {
        (None, None) => {}
        (Some(weight), None) => {
            grads.register::<B>(weight, B::project_weight_gradient(saved.x, dy, dtype));
        }
        (weight, Some(bias)) => {
            let (dweight, dbias) = B::project_parameter_gradients(saved.x, dy, dtype);
            if let Some(weight) = weight {
                grads.register::<B>(weight, dweight);
            }
            grads.register::<B>(bias, dbias);
        }
    }
}

impl<B: ProjectBackend> Backward<B, 2> for Project {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let [x, weight] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        register(ops.state, dy, [x, weight, None], grads);
    }
}

impl<B: ProjectBackend> Backward<B, 3> for Project {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let nodes = ops.parents.map(|parent| parent.map(|parent| parent.id));
        register(ops.state, dy, nodes, grads);
    }
}

impl<B: ProjectBackend, C: CheckpointStrategy> ProjectBackend for Autodiff<B, C> {
    fn project(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), weight.node()];
        match bias {
            Bias::Without => {
                let [x, weight] = [x, weight].map(|tensor| tensor.into_primitive());
                let y = B::project_forward(x.clone(), weight.clone(), Bias::Without);
                match Backward::<B, 2>::prepare::<C>(Project, nodes)
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish(Saved { x, weight }, y),
                    OpsKind::UnTracked(prep) => prep.finish(y),
                }
            }
            Bias::With(bias) => {
                let [x_node, weight_node] = nodes;
                let nodes = [x_node, weight_node, bias.node()];
                let [x, weight, bias] = [x, weight, bias].map(|tensor| tensor.into_primitive());
                let y = B::project_forward(x.clone(), weight.clone(), Bias::With(bias));
                match Backward::<B, 3>::prepare::<C>(Project, nodes)
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish(Saved { x, weight }, y),
                    OpsKind::UnTracked(prep) => prep.finish(y),
                }
            }
        }
    }
}
