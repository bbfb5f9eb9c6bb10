//! Token projections: forward, input gradient, and weight and bias gradient, ours and Burn's.
//!
//! `cargo bench -p benches --bench linear` on the CPU; with `--features cuda` (or
//! another device) the full sizes run, in bf16 and f32. A line per case gives two medians in ms:
//! `device`, the device's own clock around one call, and `call`, the host's over many calls in a row.

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use benches::{ACCELERATOR, finish};
use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use mamba_ssm_linear::ops::project::{input_gradient, parameter_gradients};
use mamba_ssm_linear::project;

/// Calls between two waits for the device: enough that the wait does not count.
const CALLS: usize = if ACCELERATOR { 50 } else { 1 };

/// Name, d_input, d_output.
const SHAPES: [(&str, usize, usize); 2] = [("in_proj", 64, 656), ("out_proj", 256, 64)];

fn dtypes(device: &Device) -> Vec<DType> {
    if ACCELERATOR && device.supports_dtype(DType::BF16) {
        vec![DType::BF16, DType::F32]
    } else {
        vec![DType::F32]
    }
}

/// Waits for a future that needs no executor.
fn wait<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            return output;
        }
        std::thread::yield_now();
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Median of the device's own clock around one call, ms.
fn device_time(device: &Device, run: &(impl Fn() -> Vec<Tensor<2>> + Sync)) -> Option<f64> {
    let times = (0..30)
        .filter_map(|_| {
            let (out, duration) = device
                .profile(|| {
                    let out = run();
                    // What fusion holds back belongs to the call.
                    device.flush().expect("the device works");
                    out
                })
                .ok()?;
            black_box(out);
            let ticks = wait(duration.resolve())?;
            Some(ticks.duration().as_secs_f64() * 1e3)
        })
        .collect::<Vec<_>>();
    (!times.is_empty()).then(|| median(times))
}

/// `calls` calls, then one wait.
fn burst(device: &Device, calls: usize, run: &impl Fn() -> Vec<Tensor<2>>) -> Duration {
    let start = Instant::now();
    for _ in 0..calls {
        black_box(run());
        device.flush().expect("the device works");
    }
    finish(device);
    start.elapsed()
}

fn case(c: &mut Criterion, name: &str, device: &Device, run: impl Fn() -> Vec<Tensor<2>> + Sync) {
    // Compiles the kernels, tunes Burn's, and warms up.
    burst(device, 3, &run);
    burst(device, CALLS, &run);
    let call = median(
        (0..11)
            .map(|_| burst(device, CALLS, &run).as_secs_f64() * 1e3 / CALLS as f64)
            .collect(),
    );
    let own = device_time(device, &run).map_or("-".into(), |time| format!("{time:.4}"));
    println!("LINEAR {name}: device {own} ms, call {call:.4} ms");
    c.bench_function(name, |bench| {
        bench.iter_custom(|calls| burst(device, calls as usize, &run));
    });
}

fn linear(c: &mut Criterion) {
    let device = Device::default();
    let tokens = if ACCELERATOR { 65_536 } else { 4_096 };
    for dtype in dtypes(&device) {
        for (shape, d_input, d_output) in SHAPES {
            let draw = |rows, columns| {
                Tensor::<2>::random([rows, columns], Distribution::Normal(0.0, 1.0), &device)
                    .cast(dtype)
            };
            let (x, dy) = (draw(tokens, d_input), draw(tokens, d_output));
            let weight = draw(d_input, d_output);
            let bias = draw(1, d_output).reshape([d_output]);
            finish(&device);
            let name = |what: &str| format!("{shape} T{tokens} {dtype:?}/{what}");
            case(c, &name("forward"), &device, || {
                vec![project(x.clone(), weight.clone(), None)]
            });
            case(c, &name("forward with bias"), &device, || {
                vec![project(x.clone(), weight.clone(), Some(bias.clone()))]
            });
            case(c, &name("input gradient"), &device, || {
                vec![input_gradient(dy.clone(), weight.clone())]
            });
            case(c, &name("weight and bias gradient"), &device, || {
                let (weight, bias) = parameter_gradients(x.clone(), dy.clone());
                vec![weight, bias.unsqueeze()]
            });
            case(c, &name("Burn's forward"), &device, || {
                vec![x.clone().matmul(weight.clone())]
            });
            case(c, &name("Burn's input gradient"), &device, || {
                vec![dy.clone().matmul(weight.clone().transpose())]
            });
            case(c, &name("Burn's weight gradient"), &device, || {
                vec![x.clone().transpose().matmul(dy.clone())]
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = linear
}
criterion_main!(benches);
