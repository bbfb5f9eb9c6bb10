//! The native CPU implementations (f32) against the definition (f64): the shapes they have to serve,
//! values at the edge of the range, sequences in parts, and the same bits every time.

use burn::tensor::{DType, Device, FloatDType, Gradients, Tensor, TensorData};
use mamba_ssm_core::{
    ConvInput, GatedNormInput, GatedNormOptions, Mamba1Config, Mamba2Config, MambaStackConfig,
    ScanInput, ScanOptions, SkipWeight, SsdInput, SsdOptions, causal_conv1d, gated_rms_norm,
    selective_scan, ssd,
};

use crate::kernels::{compare, leaf};
use crate::support::{assert_close, normal, relative_l2, seed, uniform, values};

type Named = Vec<(&'static str, Vec<f64>)>;

/// Fixed weights for a loss.
fn weights<const D: usize>(like: &Tensor<D>, seed: f64) -> Tensor<D> {
    let numbers: Vec<f64> = (0..like.dims().iter().product::<usize>())
        .map(|n| (n as f64 * seed).sin())
        .collect();
    let data = TensorData::new(numbers, like.dims()).convert_dtype(like.dtype());
    Tensor::from_data(data, (&like.device(), like.dtype()))
}

fn push<const D: usize>(
    found: &mut Named,
    name: &'static str,
    tensor: Option<&Tensor<D>>,
    grads: &Gradients,
) {
    if let Some(tensor) = tensor {
        found.push((name, values(&tensor.grad(grads).expect(name))));
    }
}

fn at<const D: usize>(tensor: &Tensor<D>, dtype: FloatDType) -> Tensor<D> {
    leaf(tensor, &Device::flex().autodiff(), dtype)
}

/// Outputs and gradients of `sum(y w) + sum(final_state v)`.
fn run_ssd(input: &SsdInput, options: &SsdOptions, dtype: FloatDType) -> Named {
    let (per_head, per_channel) = match &input.d {
        Some(SkipWeight::PerHead(d)) => (Some(at(d, dtype)), None),
        Some(SkipWeight::PerChannel(d)) => (None, Some(at(d, dtype))),
        None => (None, None),
    };
    let leaves = SsdInput {
        x: at(&input.x, dtype),
        dt: at(&input.dt, dtype),
        a: at(&input.a, dtype),
        b: at(&input.b, dtype),
        c: at(&input.c, dtype),
        d: per_head
            .clone()
            .map(SkipWeight::from)
            .or(per_channel.clone().map(SkipWeight::from)),
        z: input.z.as_ref().map(|z| at(z, dtype)),
        dt_bias: input.dt_bias.as_ref().map(|bias| at(bias, dtype)),
        initial_state: input.initial_state.as_ref().map(|h| at(h, dtype)),
    };
    let out = ssd(leaves.clone(), options);
    let mut found = vec![("y", values(&out.y)), ("h", values(&out.final_state))];
    let (wy, wh) = (weights(&out.y, 0.731), weights(&out.final_state, 1.113));
    let grads = ((out.y * wy).sum() + (out.final_state * wh).sum()).backward();
    push(&mut found, "dx", Some(&leaves.x), &grads);
    push(&mut found, "ddt", Some(&leaves.dt), &grads);
    push(&mut found, "da", Some(&leaves.a), &grads);
    push(&mut found, "db", Some(&leaves.b), &grads);
    push(&mut found, "dc", Some(&leaves.c), &grads);
    push(&mut found, "dd", per_head.as_ref(), &grads);
    push(&mut found, "dd per channel", per_channel.as_ref(), &grads);
    push(&mut found, "dz", leaves.z.as_ref(), &grads);
    push(&mut found, "dbias", leaves.dt_bias.as_ref(), &grads);
    push(
        &mut found,
        "dinitial",
        leaves.initial_state.as_ref(),
        &grads,
    );
    found
}

/// Batch, length, heads, headdim, groups, state. Numbers that f32 holds, in f64.
fn ssd_operands([batch, length, heads, headdim, groups, state]: [usize; 6]) -> SsdInput {
    let flex = Device::flex();
    let round = |tensor: Tensor<4>| tensor.cast(FloatDType::F32).cast(FloatDType::F64);
    SsdInput {
        x: round(normal([batch, length, heads, headdim], &flex)),
        dt: round(normal([batch, length, heads, 1], &flex)).reshape([batch, length, heads]),
        a: uniform([heads], (-4.0, -0.2), &flex),
        b: round(normal([batch, length, groups, state], &flex)),
        c: round(normal([batch, length, groups, state], &flex)),
        d: Some(normal([heads], &flex).into()),
        z: None,
        dt_bias: Some(normal([heads], &flex) - 1.0),
        initial_state: Some(normal([batch, heads, headdim, state], &flex)),
    }
}

#[test]
fn ssd_agrees_with_the_definition_on_every_size() {
    let shapes = [
        [2, 1, 1, 1, 1, 1],
        [1, 2, 3, 16, 1, 16],
        [1, 63, 16, 16, 4, 64],
        [2, 64, 3, 24, 3, 16],
        [1, 65, 16, 64, 2, 128],
        [1, 127, 4, 1, 2, 64],
        [2, 131, 3, 24, 1, 1],
        [1, 1000, 1, 16, 1, 16],
        [1, 257, 16, 16, 1, 64],
        // More chunks than one segment.
        [2, 4_201, 2, 3, 1, 5],
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        seed(index as u64);
        let mut input = ssd_operands(shape);
        if index % 3 == 1 {
            input.d = Some(normal([shape[2], shape[3]], &Device::flex()).into());
        }
        if index % 3 == 2 {
            (input.d, input.dt_bias, input.initial_state) = (None, None, None);
            input.z = Some(normal(input.x.dims(), &Device::flex()));
        }
        let options = SsdOptions::default();
        compare(
            &format!("{shape:?}"),
            &run_ssd(&input, &options, FloatDType::F32),
            &run_ssd(&input, &options, FloatDType::F64),
            FloatDType::F32,
        );
    }
}

fn run_scan(input: &ScanInput, options: &ScanOptions, dtype: FloatDType) -> Named {
    let leaves = ScanInput {
        u: at(&input.u, dtype),
        delta: at(&input.delta, dtype),
        a: at(&input.a, dtype),
        b: at(&input.b, dtype),
        c: at(&input.c, dtype),
        d: input.d.as_ref().map(|d| at(d, dtype)),
        z: input.z.as_ref().map(|z| at(z, dtype)),
        delta_bias: input.delta_bias.as_ref().map(|bias| at(bias, dtype)),
        initial_state: input.initial_state.as_ref().map(|h| at(h, dtype)),
    };
    let out = selective_scan(leaves.clone(), options);
    let mut found = vec![("y", values(&out.y)), ("h", values(&out.final_state))];
    let (wy, wh) = (weights(&out.y, 0.731), weights(&out.final_state, 1.113));
    let grads = ((out.y * wy).sum() + (out.final_state * wh).sum()).backward();
    push(&mut found, "du", Some(&leaves.u), &grads);
    push(&mut found, "ddelta", Some(&leaves.delta), &grads);
    push(&mut found, "da", Some(&leaves.a), &grads);
    push(&mut found, "db", Some(&leaves.b), &grads);
    push(&mut found, "dc", Some(&leaves.c), &grads);
    push(&mut found, "dd", leaves.d.as_ref(), &grads);
    push(&mut found, "dz", leaves.z.as_ref(), &grads);
    push(&mut found, "dbias", leaves.delta_bias.as_ref(), &grads);
    push(
        &mut found,
        "dinitial",
        leaves.initial_state.as_ref(),
        &grads,
    );
    found
}

/// Batch, dim, length, groups, state.
fn scan_operands([batch, dim, length, groups, state]: [usize; 5]) -> ScanInput {
    let flex = Device::flex();
    ScanInput {
        u: normal([batch, dim, length], &flex),
        delta: normal([batch, dim, length], &flex),
        a: uniform([dim, state], (-4.0, -0.2), &flex),
        b: normal([batch, groups, state, length], &flex),
        c: normal([batch, groups, state, length], &flex),
        d: Some(normal([dim], &flex)),
        z: Some(normal([batch, dim, length], &flex)),
        delta_bias: Some(normal([dim], &flex) - 1.0),
        initial_state: Some(normal([batch, dim, state], &flex)),
    }
}

#[test]
fn selective_scan_agrees_with_the_definition_on_every_size() {
    let shapes = [
        [2, 1, 1, 1, 1],
        [1, 16, 2, 1, 16],
        [1, 24, 31, 2, 16],
        [2, 3, 32, 1, 5],
        [1, 130, 33, 1, 16],
        [1, 80, 63, 4, 64],
        [2, 64, 65, 1, 128],
        [1, 17, 127, 1, 1],
        [1, 40, 1_000, 2, 16],
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        seed(index as u64);
        let mut input = scan_operands(shape);
        let mut options = ScanOptions::default();
        if index % 3 == 1 {
            (input.d, input.z) = (None, None);
            (input.delta_bias, input.initial_state) = (None, None);
            input.delta = input.delta.abs();
            options.delta_softplus = false;
        }
        compare(
            &format!("{shape:?}"),
            &run_scan(&input, &options, FloatDType::F32),
            &run_scan(&input, &options, FloatDType::F64),
            FloatDType::F32,
        );
    }
}

/// |dt| to 50 before the softplus, |A| to 100: finite, and the outputs right.
#[test]
fn extreme_steps_and_rates_leave_no_nan() {
    let flex = Device::flex();
    seed(3);
    let mut input = ssd_operands([1, 200, 4, 16, 1, 16]);
    input.dt = uniform([1, 200, 4], (-50.0, 50.0), &flex);
    input.a = Tensor::from_data(
        TensorData::new(vec![-100.0, -1.0, -1e-3, -30.0], [4]),
        (&flex, DType::F64),
    );
    input.dt_bias = None;
    let options = SsdOptions::default();
    let found = run_ssd(&input, &options, FloatDType::F32);
    let expected = run_ssd(&input, &options, FloatDType::F64);
    finite_and_close(&found, &expected);

    let mut input = scan_operands([1, 20, 200, 1, 16]);
    input.delta = uniform([1, 20, 200], (-50.0, 50.0), &flex);
    input.a = uniform([20, 16], (-100.0, -1e-3), &flex);
    input.delta_bias = None;
    let options = ScanOptions::default();
    let found = run_scan(&input, &options, FloatDType::F32);
    let expected = run_scan(&input, &options, FloatDType::F64);
    finite_and_close(&found, &expected);
}

fn finite_and_close(found: &Named, expected: &Named) {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        assert!(found.iter().all(|v| v.is_finite()), "{name} is not finite");
        assert_close(name, found, expected, 1e-3);
    }
}

#[test]
fn a_sequence_split_anywhere_gives_the_output_of_one_pass() {
    seed(9);
    let length = 150;
    let f32 = |tensor: Tensor<4>| tensor.cast(FloatDType::F32);
    let input = ssd_operands([1, length, 3, 8, 1, 16]);
    let input = SsdInput {
        x: f32(input.x),
        dt: input.dt.cast(FloatDType::F32),
        b: f32(input.b),
        c: f32(input.c),
        ..input
    };
    let options = SsdOptions::default();
    let whole = ssd(input.clone(), &options);
    for at in [1, 2, 63, 64, 65, 127, 149] {
        let part = |start, size, state| {
            let cut = |tensor: &Tensor<4>| tensor.clone().narrow(1, start, size);
            ssd(
                SsdInput {
                    x: cut(&input.x),
                    dt: input.dt.clone().narrow(1, start, size),
                    b: cut(&input.b),
                    c: cut(&input.c),
                    initial_state: state,
                    ..input.clone()
                },
                &options,
            )
        };
        let first = part(0, at, input.initial_state.clone());
        let second = part(at, length - at, Some(first.final_state));
        let joined = Tensor::cat(vec![first.y, second.y], 1);
        assert_close(
            &format!("y cut at {at}"),
            &values(&joined),
            &values(&whole.y),
            1e-5,
        );
        assert_close(
            &format!("state cut at {at}"),
            &values(&second.final_state),
            &values(&whole.final_state),
            1e-5,
        );
    }
}

/// What every operator is run on, drawn once: the random stream is shared with other tests.
struct Drawn {
    ssd: SsdInput,
    scan: ScanInput,
    x: Tensor<3>,
    weight: Tensor<2>,
    norm: Tensor<1>,
}

/// All outputs and gradients of every operator, bit by bit.
fn everything(drawn: &Drawn) -> Vec<u64> {
    let f32 = FloatDType::F32;
    let mut all = run_ssd(&drawn.ssd, &SsdOptions::default(), f32);
    all.extend(run_scan(&drawn.scan, &ScanOptions::default(), f32));
    let (x, weight, norm) = (
        at(&drawn.x, f32),
        at(&drawn.weight, f32),
        at(&drawn.norm, f32),
    );
    let convolved = causal_conv1d(ConvInput {
        x: x.clone(),
        weight: weight.clone(),
        bias: None,
        initial_state: None,
        activation: true,
    });
    let y = gated_rms_norm(
        GatedNormInput {
            x: convolved.y,
            z: Some(x.clone()),
            weight: norm.clone(),
        },
        &GatedNormOptions::default(),
    );
    all.push(("y", values(&y)));
    let grads = (y.clone() * weights(&y, 0.3)).sum().backward();
    push(&mut all, "dx", Some(&x), &grads);
    push(&mut all, "dweight", Some(&weight), &grads);
    push(&mut all, "dnorm", Some(&norm), &grads);
    all.into_iter()
        .flat_map(|(_, values)| values.into_iter().map(f64::to_bits))
        .collect()
}

#[test]
fn two_runs_agree_to_the_last_bit() {
    let flex = Device::flex();
    let drawn = Drawn {
        ssd: ssd_operands([2, 300, 4, 16, 2, 16]),
        scan: scan_operands([2, 150, 100, 1, 16]),
        x: normal([2, 200, 24], &flex),
        weight: normal([24, 4], &flex),
        norm: normal([24], &flex),
    };
    let first = everything(&drawn);
    for _ in 0..5 {
        assert!(everything(&drawn) == first, "another run, other bits");
    }
}

/// A layer whose parameters and input are in f32 against the same one made of definitions in f64.
#[test]
fn stacks_in_f32_agree_with_stacks_in_f64() {
    let flex = Device::flex();
    let wide = Mamba2Config::new(24)
        .with_d_state(20)
        .with_headdim(12)
        .with_ngroups(2);
    let gated = Mamba2Config::new(10).with_headdim(4).with_rmsnorm(false);
    let layers = [
        wide.clone().into(),
        wide.with_norm_before_gate(true)
            .with_d_has_hdim(true)
            .into(),
        gated.into(),
        Mamba1Config::new(20).into(),
    ];
    for layer in layers {
        seed(13);
        let stack = MambaStackConfig::new(layer, 2).init(&flex);
        let x = normal([2, 77, stack_width(&stack)], &flex);
        let narrow = values(&stack.forward(x.clone().cast(FloatDType::F32)));
        let wide = in_f64(stack).forward(x);
        let error = relative_l2(&narrow, &values(&wide));
        assert!(error < 5e-6, "relative error {error:.1e}");
    }
}

fn stack_width(stack: &mamba_ssm_core::MambaStack) -> usize {
    match &stack.layers[0] {
        mamba_ssm_core::MambaLayer::Mamba1(layer) => layer.config.d_model,
        mamba_ssm_core::MambaLayer::Mamba2(layer) => layer.config.d_model,
    }
}

/// The same parameters, cast.
fn in_f64(stack: mamba_ssm_core::MambaStack) -> mamba_ssm_core::MambaStack {
    struct Cast;
    impl burn::module::ModuleMapper for Cast {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            let (id, tensor, _) = param.consume();
            burn::module::Param::initialized(id, tensor.cast(FloatDType::F64))
        }
    }
    burn::module::Module::map(stack, &mut Cast)
}
