//! Attention and the Transformer: forward, and forward with backward.
//!
//! `cargo bench -p benches --bench attention` on the CPU; with `--features cuda` (or
//! another device) the full sizes run, in bf16 where the device has it. `-- "L8192"` picks the cases
//! whose names contain it.

use std::cell::OnceCell;

use benches::{ACCELERATOR, ATTENTION, both, config, draw, queue};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use mamba_ssm_attention::{FlashAttentionOptions, TransformerConfig, flash_attention};

/// Burn's own, of which it has the forward pass.
fn burns([q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    let options = AttentionModuleOptions {
        is_causal: true,
        ..Default::default()
    };
    attention(q, k, v, None, None, options)
}

fn operator(c: &mut Criterion) {
    let device = Device::default();
    let options = FlashAttentionOptions::causal();
    let mut group = c.benchmark_group("flash_attention");
    for shape in ATTENTION {
        let [b, h, l, d] = shape;
        let name = format!("B{b} H{h} L{l} D{d}");
        let inputs = |device: &Device| [(); 3].map(|()| draw(shape, device));
        both(&mut group, &name, inputs, |[q, k, v]| {
            flash_attention(q, k, v, &options)
        });
        let plain = OnceCell::new();
        group.bench_function(format!("{name}/Burn's attention, forward"), |bench| {
            let plain: &[Tensor<4>; 3] = plain.get_or_init(|| inputs(&device));
            bench.iter_custom(|calls| queue(&device, calls, || burns(plain.clone())));
        });
    }
    group.finish();
}

/// The published comparison's stack; parameters in f32, as in training.
fn transformer(c: &mut Criterion) {
    let batch = if ACCELERATOR { 32 } else { 1 };
    let mut group = c.benchmark_group("Transformer");
    let inputs = |device: &Device| {
        let model = TransformerConfig::new(64).init(device);
        (model, draw([batch, 2048, 64], device))
    };
    let name = format!("embed 64, {batch} x 2048");
    both(&mut group, &name, inputs, |(model, x)| {
        model.forward(x).square().mean()
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = config();
    targets = operator, transformer
}
criterion_main!(benches);
