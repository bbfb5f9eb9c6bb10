//! Recorded steps against a pass over the whole sequence, on every device; on CUDA only where the environment
//! says that no other test is running, since recording shuts other threads out.

use burn::tensor::{DType, Device, FloatDType, Tensor};
use mamba_ssm_core::{
    Checkpoint, Mamba1Config, Mamba2Config, MambaLayerConfig, MambaStack, MambaStackConfig,
    StackState, StepGraph,
};

use crate::kernels::{devices, tolerance};
use crate::support::{assert_close, normal, seed, values};

const BATCH: usize = 3;
const LENGTH: usize = 7;
const WIDTH: usize = 16;

fn stacks() -> [MambaStackConfig; 2] {
    let mamba2 = Mamba2Config::new(WIDTH).with_d_state(8).with_headdim(8);
    [
        MambaStackConfig::new(MambaLayerConfig::from(mamba2), 2),
        MambaStackConfig::new(Mamba1Config::new(WIDTH).into(), 2).with_residual(true),
    ]
}

/// Whether the device records steps.
fn records(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if *device == Device::cuda(0) {
        return true;
    }
    let _ = device;
    false
}

/// Devices that may be used now.
fn free() -> Vec<Device> {
    let alone = std::env::var_os("MAMBA_TEST_ALONE").is_some();
    let free = |device: &Device| {
        let free = alone || !records(device);
        if !free {
            println!("skipped on {device:?}: run alone, with MAMBA_TEST_ALONE set");
        }
        free
    };
    let all = devices().into_iter().map(|(device, _)| device);
    all.filter(free).collect()
}

/// The stack on a device, and a sequence.
fn problem(config: &MambaStackConfig, device: &Device) -> (MambaStack, Tensor<3>) {
    let flex = Device::flex();
    seed(11);
    let source = config.init(&flex);
    let mut stack = config.init(device);
    stack
        .load_state_dict("", &source.state_dict(""))
        .expect("the same architecture");
    let x = normal([BATCH, LENGTH, WIDTH], &flex).to_data_dtype(DType::F32);
    (stack, Tensor::from_data(x, device))
}

fn token(x: &Tensor<3>, t: usize) -> Tensor<2> {
    x.clone().slice_dim(1, t..t + 1).squeeze_dim(1)
}

/// The answers to the tokens `from..`, side by side.
fn answers(graph: &mut StepGraph, x: &Tensor<3>, from: usize) -> Vec<f64> {
    let steps = (from..LENGTH).map(|t| graph.step(token(x, t)).unsqueeze_dim(1));
    // Read after the last step: no step may reach into the answer of one before.
    values(&Tensor::<3>::cat(steps.collect(), 1))
}

fn states(state: &StackState) -> Vec<f64> {
    use mamba_ssm_core::stack::LayerState::{Mamba1, Mamba2};
    let both = |layer: &_| match layer {
        Mamba1(state) => [values(&state.conv), values(&state.ssm)].concat(),
        Mamba2(state) => [values(&state.conv), values(&state.ssm)].concat(),
    };
    state.iter().flat_map(both).collect()
}

#[test]
fn recorded_steps_equal_the_whole_sequence() {
    let (outputs, _) = tolerance(FloatDType::F32);
    for device in free() {
        for config in stacks() {
            let (stack, x) = problem(&config, &device);
            let empty = stack.empty_state(BATCH, &device);
            let (expected, last) = stack.forward_from(x.clone(), empty.clone());
            let what = format!("{device:?} {config:?}");

            let mut graph = stack.step_graph(BATCH);
            assert_eq!(graph.is_recorded(), records(&device), "{what}");
            let found = answers(&mut graph, &x, 0);
            assert_close(&what, &found, &values(&expected), outputs);
            assert_close(&what, &states(&graph.state()), &states(&last), outputs);

            // Once more from the start, and from the middle.
            graph.reset();
            let again = answers(&mut graph, &x, 0);
            assert_eq!(found, again, "{what}");
            let head = x.clone().slice_dim(1, 0..4);
            let (_, middle) = stack.forward_from(head, empty);
            graph.set_state(&middle);
            let found = answers(&mut graph, &x, 4);
            let expected = values(&expected.slice_dim(1, 4..LENGTH));
            assert_close(&what, &found, &expected, outputs);
        }
    }
}

#[test]
fn a_token_of_another_type_is_taken() {
    let (stack, x) = problem(&stacks()[0], &Device::flex());
    let mut graph = stack.step_graph(BATCH);
    let whole = graph.step(token(&x, 0));
    graph.reset();
    let narrow = graph.step(token(&x, 0).cast(FloatDType::BF16));
    assert_eq!(narrow.dtype(), whole.dtype());
    assert_close("bf16", &values(&narrow), &values(&whole), 2e-2);
}

#[test]
#[should_panic(expected = "x must be [batch, d_model] as recorded")]
fn another_batch_is_refused() {
    let (stack, x) = problem(&stacks()[0], &Device::flex());
    stack.step_graph(2).step(token(&x, 0));
}

#[test]
#[should_panic(expected = "take `valid()` of the stack")]
fn a_stack_in_training_is_refused() {
    let device = Device::flex().autodiff();
    stacks()[0].init(&device).step_graph(1);
}
