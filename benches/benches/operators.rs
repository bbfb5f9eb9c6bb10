//! The state-space operators, the projections and the layers: forward, and forward with backward.
//!
//! `cargo bench -p benches --bench operators` on the CPU; `-- ssd` picks one group. With
//! `--features cuda` (or another device) the full sizes run, in bf16 where the
//! device has it.

use std::hint::black_box;

use benches::{ACCELERATOR, both, config, draw, dtype, finish, leaf};
use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use mamba_ssm_core::{
    ConvInput, GatedNormInput, GatedNormOptions, Mamba1Config, Mamba2, Mamba2Config,
    MambaStackConfig, ScanInput, ScanOptions, SsdInput, SsdOptions, causal_conv1d, gated_rms_norm,
    selective_scan, ssd,
};
use mamba_ssm_linear::{LinearConfig, project};

/// Parameters, f32 as mixed precision keeps them; negative, so that they serve as rates of decay.
fn small<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    leaf(Tensor::random(
        shape,
        Distribution::Uniform(-3.0, -0.5),
        device,
    ))
}

/// Batch, length, heads, headdim, groups, state.
fn ssd_shapes() -> Vec<[usize; 6]> {
    if ACCELERATOR {
        vec![
            [32, 2048, 16, 16, 1, 64],
            [8, 4096, 32, 64, 1, 128],
            [1, 65536, 32, 64, 1, 128],
        ]
    } else {
        vec![[2, 2048, 16, 16, 1, 64], [2, 256, 8, 64, 1, 64]]
    }
}

/// How fast states decay: a walk over a segment begins where anything is left of them at its end.
#[derive(Clone, Copy)]
enum Decay {
    /// By 34 a chunk of 64 tokens in the mean, some heads by 2.
    Random,
    /// As the official package starts a model: rates 1 to 16, steps 0.001 to 0.1.
    Start,
    /// Not at all.
    None,
}

/// Rates and the bias of steps.
fn decay([heads]: [usize; 1], decay: Decay, device: &Device) -> [Tensor<1>; 2] {
    let between =
        |low, high| Tensor::<1>::random([heads], Distribution::Uniform(low, high), device);
    match decay {
        Decay::Random => [(); 2].map(|()| small([heads], device)),
        Decay::Start => {
            let steps = between(0.001f64.ln(), 0.1f64.ln()).exp();
            [between(-16.0, -1.0), (steps.exp() - 1.0).log()].map(leaf)
        }
        Decay::None => [small([heads], device), leaf(between(-11.0, -8.5))],
    }
}

fn ssd_group(c: &mut Criterion) {
    let mut group = c.benchmark_group("ssd");
    let longest = ssd_shapes().into_iter().last();
    let others = [
        (Decay::Start, ", as a model starts"),
        (Decay::None, ", no decay"),
    ];
    let others = others.map(|kind| longest.map(|shape| (shape, kind)));
    let shapes = ssd_shapes()
        .into_iter()
        .map(|shape| (shape, (Decay::Random, "")));
    for ([b, l, h, p, g, n], (kind, what)) in shapes.chain(others.into_iter().flatten()) {
        let name = format!("B{b} L{l} H{h} P{p} G{g} N{n}{what}");
        let inputs = |device: &Device| {
            let [a, dt_bias] = decay([h], kind, device);
            let dt = draw([b, l, h], device);
            SsdInput {
                x: draw([b, l, h, p], device),
                dt: match kind {
                    Decay::Start => leaf(dt.detach() * 0.1),
                    _ => dt,
                },
                a,
                b: draw([b, l, g, n], device),
                c: draw([b, l, g, n], device),
                d: Some(small([h], device).into()),
                z: None,
                dt_bias: Some(dt_bias),
                initial_state: None,
            }
        };
        both(&mut group, &name, inputs, |input| {
            ssd(input, &SsdOptions::default()).y
        });
    }
    group.finish();
}

fn scan_group(c: &mut Criterion) {
    let shapes: Vec<[usize; 4]> = if ACCELERATOR {
        vec![
            [8, 2048, 2048, 16],
            [8, 2048, 8192, 16],
            [32, 256, 2048, 16],
        ]
    } else {
        vec![[2, 512, 256, 16]]
    };
    let mut group = c.benchmark_group("selective_scan");
    for [b, d, l, n] in shapes {
        let name = format!("B{b} D{d} L{l} N{n}");
        let inputs = |device: &Device| ScanInput {
            u: draw([b, d, l], device),
            delta: draw([b, d, l], device),
            a: small([d, n], device),
            b: draw([b, 1, n, l], device),
            c: draw([b, 1, n, l], device),
            d: Some(small([d], device)),
            z: Some(draw([b, d, l], device)),
            delta_bias: Some(small([d], device)),
            initial_state: None,
        };
        both(&mut group, &name, inputs, |input| {
            selective_scan(input, &ScanOptions::default()).y
        });
    }
    group.finish();
}

fn conv_group(c: &mut Criterion) {
    let [b, l, channels, width] = if ACCELERATOR {
        [32, 2048, 384, 4]
    } else {
        [2, 2048, 384, 4]
    };
    let mut group = c.benchmark_group("causal_conv1d");
    let inputs = |device: &Device| ConvInput {
        x: draw([b, l, channels], device),
        weight: small([channels, width], device),
        bias: Some(small([channels], device)),
        initial_state: None,
        activation: true,
    };
    let name = format!("B{b} C{channels} L{l} W{width}");
    both(&mut group, &name, inputs, |input| causal_conv1d(input).y);
    group.finish();
}

fn norm_group(c: &mut Criterion) {
    let [b, l, dim] = if ACCELERATOR {
        [32, 2048, 256]
    } else {
        [2, 2048, 256]
    };
    let mut group = c.benchmark_group("gated_rms_norm");
    let inputs = |device: &Device| GatedNormInput {
        x: draw([b, l, dim], device),
        z: Some(draw([b, l, dim], device)),
        weight: small([dim], device),
    };
    let name = format!("B{b} L{l} D{dim}");
    both(&mut group, &name, inputs, |input| {
        gated_rms_norm(input, &GatedNormOptions::default())
    });
    group.finish();
}

fn projection_group(c: &mut Criterion) {
    let tokens = if ACCELERATOR { 65_536 } else { 4096 };
    let mut group = c.benchmark_group("projection");
    for (name, d_input, d_output) in [("in_proj", 64, 656), ("out_proj", 256, 64)] {
        let inputs = |device: &Device| {
            (
                draw([tokens, d_input], device),
                draw([d_input, d_output], device),
            )
        };
        let name = format!("{name} T{tokens} {d_input}x{d_output}");
        both(&mut group, &name, inputs, |(x, weight)| {
            project(x, weight, None)
        });
    }
    group.finish();
}

/// The layers by name, with batch and length.
fn layers() -> Vec<(&'static str, Mamba2Config, [usize; 2])> {
    let note = Mamba2Config::new(64)
        .with_d_state(64)
        .with_headdim(16)
        .with_expand(4);
    let wide = Mamba2Config::new(256)
        .with_d_state(64)
        .with_headdim(64)
        .with_expand(2);
    if ACCELERATOR {
        vec![("note", note, [32, 2048])]
    } else {
        vec![("d_model 256", wide, [2, 256]), ("note", note, [2, 2048])]
    }
}

fn layer_group(c: &mut Criterion) {
    let mut group = c.benchmark_group("mamba2");
    for (name, config, [batch, length]) in layers() {
        let d_model = config.d_model;
        let inputs = |device: &Device| {
            device.seed(1);
            let layer: Mamba2 = config.init(device);
            (layer, draw([batch, length, d_model], device))
        };
        let name = format!("{name} B{batch} L{length}");
        both(&mut group, &name, inputs, |(layer, x)| layer.forward(x));
    }
    group.finish();

    let mut group = c.benchmark_group("model");
    let [batch, length] = if ACCELERATOR { [32, 2048] } else { [2, 512] };
    let inputs = |device: &Device| {
        device.seed(1);
        let (_, layer, _) = layers().pop().expect("the note's layer is the last");
        let stack = MambaStackConfig::new(layer.into(), 4).init(device);
        let ends = [(5, 64), (64, 5)].map(|(from, to)| LinearConfig::new(from, to).init(device));
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([batch, length, 5], normal, device);
        (stack, ends, x)
    };
    let name = format!("note, 4 layers, mixed precision B{batch} L{length}");
    both(&mut group, &name, inputs, |(stack, [first, last], x)| {
        let narrow = dtype(&x.device());
        let y = stack.forward(first.forward(x).cast(narrow));
        last.forward(y.cast(DType::F32)).square().mean()
    });
    group.finish();

    let mut group = c.benchmark_group("mamba1");
    let inputs = |device: &Device| {
        (
            Mamba1Config::new(256).init(device),
            draw([2, 256, 256], device),
        )
    };
    both(&mut group, "d_model 256 B2 L256", inputs, |(layer, x)| {
        layer.forward(x)
    });
    group.finish();
}

fn step_group(c: &mut Criterion) {
    let device = Device::default();
    let mut group = c.benchmark_group("step");
    for (name, config, _) in layers() {
        let mut made = None;
        group.bench_function(format!("{name}, one token"), |bench| {
            let (layer, x, state) = made.get_or_insert_with(|| {
                let layer = config.init(&device.clone().autodiff()).valid();
                let x = Tensor::<2>::random([1, config.d_model], Distribution::Default, &device);
                let state = Some(layer.empty_state(1, &device));
                (layer, x, state)
            });
            bench.iter(|| {
                let (y, next) = layer.step(x.clone(), state.take().expect("a state"));
                *state = Some(next);
                finish(&device);
                y
            });
        });
    }
    let (name, layer, _) = layers().pop().expect("the note's layer is the last");
    let mut made = None;
    group.bench_function(
        format!("{name}, 4 layers, one token, step graph"),
        |bench| {
            let (graph, x) = made.get_or_insert_with(|| {
                let stack = MambaStackConfig::new(layer.clone().into(), 4).init(&device);
                let graph = stack.step_graph(1);
                println!("recorded: {}", graph.is_recorded());
                let x = Tensor::<2>::random([1, stack.d_model()], Distribution::Default, &device);
                (graph, x)
            });
            bench.iter(|| {
                let y = graph.step(x.clone());
                finish(&device);
                y
            });
        },
    );
    group.finish();
}

/// One token after the other through the note's whole model, on one core.
#[cfg(feature = "flex")]
fn decode_group(c: &mut Criterion) {
    let device = Device::default();
    let (_, layer, _) = layers().pop().expect("the note's layer is the last");
    let stack = MambaStackConfig::new(layer.into(), 4).init(&device);
    let [first, last] =
        [(5, 64), (64, 5)].map(|(from, to)| LinearConfig::new(from, to).init(&device).decoder());
    let mut decoder = stack.decoder();
    let (mut token, mut wide, mut answer) = (0u32, [0.0; 64], [0.0; 5]);
    let mut step = || {
        token += 1;
        let row = [1.0, 2.0, 3.0, 4.0, 5.0].map(|phase: f32| (phase * token as f32).sin());
        first.step(&row, &mut wide);
        last.step(decoder.step(&wide), &mut answer);
        answer
    };
    let mut group = c.benchmark_group("decode");
    for before in [1_000, 1_000_000] {
        let mut ready = false;
        let name = format!("note, 4 layers, one token after {before}");
        group.bench_function(name, |bench| {
            if !ready {
                for _ in 0..before {
                    black_box(step());
                }
                ready = true;
            }
            bench.iter(&mut step);
        });
    }
    group.finish();
}

/// Decoders are for the CPU, whose features this was built without.
#[cfg(not(feature = "flex"))]
fn decode_group(_: &mut Criterion) {}

criterion_group! {
    name = benches;
    config = config();
    targets = ssd_group, scan_group, conv_group, norm_group, projection_group, layer_group, step_group,
        decode_group
}
criterion_main!(benches);
