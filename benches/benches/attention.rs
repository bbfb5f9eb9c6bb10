//! Attention and the Transformer: forward, and forward with backward.
//!
//! `cargo bench -p benches --bench attention` on the CPU; with `--no-default-features --features cuda`
//! (or another device) the full sizes run, in bf16 where the device has it.

use std::time::Duration;

use burn::module::Module;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mamba_ssm_attention::{FlashAttentionOptions, TransformerConfig, flash_attention};

/// Whether the default device is an accelerator: large sizes would take minutes on a CPU.
const ACCELERATOR: bool = cfg!(not(any(feature = "flex", feature = "cpu")));

/// Batch, heads, length, head_dim.
fn shapes() -> Vec<[usize; 4]> {
    if ACCELERATOR {
        vec![[32, 8, 2048, 8], [32, 8, 2048, 64], [4, 16, 8192, 64]]
    } else {
        vec![[1, 8, 2048, 8], [1, 8, 2048, 64], [1, 1, 8192, 64]]
    }
}

fn dtype(device: &Device) -> DType {
    if ACCELERATOR && device.supports_dtype(DType::BF16) {
        DType::BF16
    } else {
        DType::F32
    }
}

fn inputs(shape: [usize; 4], device: &Device) -> [Tensor<4>; 3] {
    [(); 3].map(|()| {
        Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), device)
            .cast(dtype(device))
            .require_grad()
    })
}

/// Waits for the device, so that a timing is of the work and not of its submission.
fn finish(device: &Device) {
    device.sync().expect("the device works");
}

fn operator(c: &mut Criterion) {
    let device = Device::default();
    let tracked = device.clone().autodiff();
    let options = FlashAttentionOptions::causal();
    let mut group = c.benchmark_group("flash_attention");
    for shape in shapes() {
        let [b, h, l, d] = shape;
        let name = format!("B{b} H{h} L{l} D{d}");
        let [q, k, v] = inputs(shape, &tracked);
        let [q0, k0, v0] = [&q, &k, &v].map(|x| x.clone().inner());
        group.bench_function(BenchmarkId::new("forward", &name), |bench| {
            bench.iter(|| {
                let out = flash_attention(q0.clone(), k0.clone(), v0.clone(), &options);
                finish(&device);
                out
            });
        });
        group.bench_function(BenchmarkId::new("forward and backward", &name), |bench| {
            bench.iter(|| {
                let out = flash_attention(q.clone(), k.clone(), v.clone(), &options);
                let grads = out.sum().backward();
                finish(&device);
                grads
            });
        });
        group.bench_function(
            BenchmarkId::new("Burn's attention, forward", &name),
            |bench| {
                bench.iter(|| {
                    let options = AttentionModuleOptions {
                        is_causal: true,
                        ..Default::default()
                    };
                    let out = attention(q0.clone(), k0.clone(), v0.clone(), None, None, options);
                    finish(&device);
                    out
                });
            },
        );
    }
    group.finish();
}

fn transformer(c: &mut Criterion) {
    let tracked = Device::default().autodiff();
    let model = TransformerConfig::new(64).init(&tracked);
    let batch = if ACCELERATOR { 32 } else { 1 };
    let x = Tensor::<3>::random([batch, 2048, 64], Distribution::Normal(0.0, 1.0), &tracked);
    let mut group = c.benchmark_group(format!("Transformer, embed 64, {batch} x 2048"));
    let (plain, x0) = (model.valid(), x.clone().inner());
    group.bench_function("forward", |bench| {
        bench.iter(|| {
            let y = plain.forward(x0.clone());
            finish(&tracked);
            y
        });
    });
    group.bench_function("forward and backward", |bench| {
        bench.iter(|| {
            let grads = model.forward(x.clone()).square().mean().backward();
            finish(&tracked);
            grads
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = operator, transformer
}
criterion_main!(benches);
