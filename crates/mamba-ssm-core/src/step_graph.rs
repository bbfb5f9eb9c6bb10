//! One token at a time on a GPU, all kernels of a step as one launch.
//!
//! A token's work is too small for a GPU to notice: a step through tensors is spent in launching kernels. A
//! [`StepGraph`] records them once, against memory that stays where it is, and launches the record.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;

use burn::tensor::{Device, Graph, Tensor, TensorData, capture};

use crate::layers::{Mamba1State, Mamba2State};
use crate::stack::{LayerState, MambaStack, StackState};

/// What the recorded step reads and writes; nothing in it is ever replaced by memory elsewhere.
struct Buffers {
    /// `[batch, d_model]`.
    x: Option<Tensor<2>>,
    state: Option<StackState>,
}

/// Why a buffer is there: it is taken only to be overwritten.
const PRESENT: &str = "taken for a moment alone";

/// A step of the stack as it is recorded.
type Step = Box<dyn FnMut() -> Tensor<2>>;

/// A [`MambaStack`] that answers one token at a time for a batch of sequences, by a recorded step: one launch a
/// token on CUDA and HIP, the same operations again on other devices.
///
/// It belongs to the thread that made it: the record, what it reads and what is read of it must go through one
/// queue of the device. While a step is being recorded, no other thread may use the device: CUDA refuses what
/// they ask for (status 900).
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{Mamba2Config, MambaStackConfig};
///
/// let device = Device::default();
/// let layer = Mamba2Config::new(32).with_d_state(8).with_headdim(8);
/// let stack = MambaStackConfig::new(layer.into(), 2).init(&device);
///
/// let mut graph = stack.step_graph(3);
/// let first = graph.step(Tensor::ones([3, 32], &device));
/// let second = graph.step(first);
/// assert_eq!(second.dims(), [3, 32]);
/// ```
pub struct StepGraph {
    stack: MambaStack,
    buffers: Rc<RefCell<Buffers>>,
    /// None where steps run one operation after the other.
    record: Option<Graph<Tensor<2>, Step>>,
    empty: StackState,
    shape: [usize; 2],
    /// Queues of a device belong to threads.
    _thread: PhantomData<Rc<()>>,
}

impl std::fmt::Debug for StepGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepGraph")
            .field("shape", &self.shape)
            .field("recorded", &self.is_recorded())
            .finish()
    }
}

impl Buffers {
    /// A step: the state is overwritten, the answer new.
    fn step(&mut self, stack: &MambaStack) -> Tensor<2> {
        let x = self.x.clone().expect(PRESENT);
        let state = self.state.take().expect(PRESENT);
        let (y, next) = stack.step(x, state.clone());
        self.state = Some(overwritten_state(state, next));
        y
    }
}

/// `to` with the numbers of `from`, in the memory of `to`.
fn overwritten<const D: usize>(to: Tensor<D>, from: Tensor<D>) -> Tensor<D> {
    let all = to.dims().map(|length| 0..length);
    to.slice_assign(all, from)
}

fn overwritten_state(to: StackState, from: StackState) -> StackState {
    let one = |(to, from)| match (to, from) {
        (LayerState::Mamba1(to), LayerState::Mamba1(from)) => LayerState::Mamba1(Mamba1State {
            conv: overwritten(to.conv, from.conv),
            ssm: overwritten(to.ssm, from.ssm),
        }),
        (LayerState::Mamba2(to), LayerState::Mamba2(from)) => LayerState::Mamba2(Mamba2State {
            conv: overwritten(to.conv, from.conv),
            ssm: overwritten(to.ssm, from.ssm),
        }),
        _ => panic!("StepGraph: the state belongs to a stack of the other kind of layer"),
    };
    to.into_iter().zip(from).map(one).collect()
}

impl MambaStack {
    /// Records a step for `batch` sequences, from the empty state, on the device of the parameters, and compares
    /// the record with steps that are not recorded; one that differs is not used. The parameters are those of
    /// now: later changes may or may not reach the record.
    ///
    /// # Panics
    ///
    /// When the stack is one that is being trained: take `valid()` of it.
    pub fn step_graph(&self, batch: usize) -> StepGraph {
        let device = self.device();
        assert!(
            !device.is_autodiff(),
            "step_graph: a recorded step has no gradients: take `valid()` of the stack"
        );
        let shape = [batch, self.d_model()];
        let buffers = Rc::new(RefCell::new(Buffers {
            x: Some(Tensor::zeros(shape, &device)),
            state: Some(self.empty_state(batch, &device)),
        }));
        let (stack, own) = (self.clone(), buffers.clone());
        let step: Step = Box::new(move || own.borrow_mut().step(&stack));
        let record = capture(&device, step);
        let mut graph = StepGraph {
            stack: self.clone(),
            buffers,
            record: record.is_hardware().then_some(record),
            empty: self.empty_state(batch, &device),
            shape,
            _thread: PhantomData,
        };
        if graph.is_recorded() && !graph.agrees(&device) {
            graph.record = None;
        }
        // Recording and comparing took steps.
        graph.reset();
        graph
    }

    fn device(&self) -> Device {
        let devices = burn::module::Module::devices(self);
        devices.first().cloned().unwrap_or_default()
    }
}

impl StepGraph {
    /// The answer to the next token of every sequence: `[batch, d_model]` to the same shape, computed and
    /// returned in the device's own type of floats, f32 unless it was told otherwise.
    ///
    /// # Panics
    ///
    /// When `x` has another shape.
    pub fn step(&mut self, x: Tensor<2>) -> Tensor<2> {
        assert_eq!(
            x.dims(),
            self.shape,
            "StepGraph::step: x must be [batch, d_model] as recorded"
        );
        let mut own = self.buffers.borrow_mut();
        let to = own.x.take().expect(PRESENT);
        let x = x.cast(to.dtype());
        own.x = Some(overwritten(to, x));
        let Some(record) = &mut self.record else {
            return own.step(&self.stack);
        };
        // SAFETY: all that the record reads and writes belongs to its closure or to `self.buffers`, which
        // live as long as it does; `self` never leaves its thread, so everything goes through one queue.
        let y = unsafe { record.replay() };
        // A copy: the next step overwrites what the record wrote.
        y.clone().mul_scalar(1.0)
    }

    /// Whether two steps of the record give what they give unrecorded. That a record reads and writes the
    /// memory which it was made with is a promise of Burn's memory management, kept by no type.
    fn agrees(&mut self, device: &Device) -> bool {
        self.reset();
        let count = self.shape[0] * self.shape[1];
        let mut state = self.empty.clone();
        (1..=2).all(|step| {
            let numbers: Vec<f32> = (0..count).map(|n| (n as f32 * step as f32).sin()).collect();
            let x = Tensor::from_data(TensorData::new(numbers, self.shape), device);
            let (expected, next) = self.stack.step(x.clone(), state.clone());
            state = next;
            let size = expected.clone().abs().max().into_scalar::<f32>();
            let off = (self.step(x) - expected).abs().max().into_scalar::<f32>();
            // Far above rounding, far below what another state or token would give.
            off <= 1e-2 * size
        })
    }

    /// Goes back to the empty state.
    pub fn reset(&mut self) {
        let empty = self.empty.clone();
        self.write_state(empty);
    }

    /// Goes on from a state, as [`MambaStack::forward_from`] returns it.
    ///
    /// # Panics
    ///
    /// When it is not a state of this stack for this batch.
    pub fn set_state(&mut self, state: &StackState) {
        assert_eq!(
            state.len(),
            self.empty.len(),
            "StepGraph::set_state: the state has as many layers as on the left, the stack as on the right"
        );
        self.write_state(state.clone());
    }

    /// The state after the tokens so far.
    pub fn state(&self) -> StackState {
        let own = self.buffers.borrow();
        let state = own.state.clone().expect(PRESENT);
        overwritten_state(self.empty.clone(), state)
    }

    /// Whether a step is one launch; otherwise its operations run one by one.
    pub fn is_recorded(&self) -> bool {
        self.record.is_some()
    }

    fn write_state(&mut self, state: StackState) {
        let mut own = self.buffers.borrow_mut();
        let to = own.state.take().expect(PRESENT);
        own.state = Some(overwritten_state(to, state));
    }
}
