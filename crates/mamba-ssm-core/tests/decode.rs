//! Decoders against the stacks they were made from, token by token, and what a token costs in memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_core::{
    Mamba1Config, Mamba2Config, MambaLayerConfig, MambaStack, MambaStackConfig, StackState,
};

use crate::support::{assert_close, device, values};

/// The system's allocator, counting what each thread asks for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn d_model(layer: &MambaLayerConfig) -> usize {
    match layer {
        MambaLayerConfig::Mamba1(c) => c.d_model,
        MambaLayerConfig::Mamba2(c) => c.d_model,
    }
}

/// Heads and channels that fill no register, several groups, every option.
fn layers() -> Vec<MambaLayerConfig> {
    let odd = Mamba2Config::new(9).with_headdim(6).with_d_state(5);
    vec![
        Mamba2Config::new(64)
            .with_headdim(16)
            .with_d_state(64)
            .with_expand(4)
            .into(),
        odd.clone().with_rmsnorm(false).with_bias(true).into(),
        odd.with_norm_before_gate(true).with_conv_bias(false).into(),
        Mamba2Config::new(40)
            .with_headdim(20)
            .with_ngroups(4)
            .with_d_state(3)
            .with_d_has_hdim(true)
            .into(),
        Mamba2Config::new(8)
            .with_headdim(16)
            .with_d_conv(1)
            .with_dt_limit(Some((0.01, 0.05)))
            .into(),
        Mamba1Config::new(7).with_d_state(3).with_d_conv(2).into(),
        Mamba1Config::new(20).with_bias(true).into(),
    ]
}

/// Answers to tokens, as a stack gives them, and the state behind the last.
fn by_stack(stack: &MambaStack, x: &Tensor<3>, device: &Device) -> (Vec<f64>, StackState) {
    let (y, state) = stack.forward_from(x.clone(), stack.empty_state(1, device));
    (values(&y), state)
}

/// Rows of f32, token by token.
fn rows(x: &Tensor<3>) -> Vec<Vec<f32>> {
    let width = x.dims()[2];
    let all: Vec<f32> = values(x).iter().map(|v| *v as f32).collect();
    all.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_decoder_answers_as_its_stack() {
    let device = device(21);
    for layer in layers() {
        for residual in [false, true] {
            let stack = MambaStackConfig::new(layer.clone(), 2)
                .with_residual(residual)
                .init(&device);
            let normal = Distribution::Normal(0.0, 1.0);
            let x = Tensor::<3>::random([1, 23, d_model(&layer)], normal, &device);
            let (expected, _) = by_stack(&stack, &x, &device);
            let mut decoder = stack.decoder();
            for round in ["first", "after a reset"] {
                let found: Vec<f64> = rows(&x)
                    .iter()
                    .flat_map(|row| decoder.step(row).to_vec())
                    .map(f64::from)
                    .collect();
                assert_close(&format!("{layer:?}, {round}"), &found, &expected, 1e-5);
                decoder.reset();
            }
        }
    }
}

#[test]
fn a_state_goes_from_a_stack_to_a_decoder_and_back() {
    let device = device(22);
    for layer in layers() {
        let stack = MambaStackConfig::new(layer.clone(), 2).init(&device);
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([1, 30, d_model(&layer)], normal, &device);
        let whole = values(&stack.forward(x.clone()));
        let part = |start: usize, length: usize| x.clone().narrow(1, start, length);

        let (first, state) = by_stack(&stack, &part(0, 11), &device);
        let mut decoder = stack.decoder();
        decoder.set_state(&state);
        let second: Vec<f64> = rows(&part(11, 9))
            .iter()
            .flat_map(|row| decoder.step(row).to_vec())
            .map(f64::from)
            .collect();
        let (third, _) = stack.forward_from(part(20, 10), decoder.state(&device));
        let joined = [first, second, values(&third)].concat();
        assert_close(&format!("{layer:?}"), &joined, &whole, 1e-5);
    }
}

#[test]
fn a_token_allocates_nothing() {
    let device = device(23);
    for layer in layers() {
        let stack = MambaStackConfig::new(layer.clone(), 2)
            .with_residual(true)
            .init(&device);
        let mut decoder = stack.decoder();
        let row = vec![0.5; d_model(&layer)];
        let before = ALLOCATIONS.get();
        for _ in 0..10 {
            std::hint::black_box(decoder.step(&row));
        }
        assert_eq!(ALLOCATIONS.get(), before, "{layer:?}");
    }
}

#[test]
#[should_panic(expected = "features of the token")]
fn a_token_of_another_size_is_refused() {
    let layer = Mamba2Config::new(8).with_headdim(8);
    let stack = MambaStackConfig::new(layer.into(), 1).init(&device(24));
    stack.decoder().step(&[0.0; 7]);
}
