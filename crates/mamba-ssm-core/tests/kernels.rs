//! Every device's own implementations against the definition in f64: outputs and every gradient, on
//! random shapes. Devices are those that the features compile in; one that is not there is skipped with a
//! printed reason.

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use mamba_ssm_core::{Checkpoint, Mamba2, Mamba2Config, SkipWeight, SsdInput, SsdOptions, ssd};

use crate::support::{assert_close, normal, relative_l2, seed, uniform, values};

/// Devices with implementations of their own, and the types they take.
pub fn devices() -> Vec<(Device, Vec<FloatDType>)> {
    let mut devices = Vec::new();
    if cfg!(feature = "flex") {
        devices.push((Device::flex(), vec![FloatDType::F32]));
    }
    #[cfg(feature = "cpu")]
    devices.push((Device::cpu(), vec![FloatDType::F32, FloatDType::BF16]));
    #[cfg(feature = "cuda")]
    if burn::tensor::Device::enumerate(burn::tensor::DeviceType::Cuda).is_empty() {
        println!("skipped on CUDA: no such device");
    } else {
        devices.push((Device::cuda(0), vec![FloatDType::F32, FloatDType::BF16]));
    }
    devices
}

/// Every one of [`devices`] with every type it takes.
pub fn cases() -> impl Iterator<Item = (Device, FloatDType)> {
    devices()
        .into_iter()
        .flat_map(|(device, dtypes)| dtypes.into_iter().map(move |dtype| (device.clone(), dtype)))
}

/// Relative errors allowed for outputs and gradients.
///
/// bf16 rounds every operand of a matrix product to 8 bits, so single terms are off by 2^-9; sums of
/// many average that out.
pub fn tolerance(dtype: FloatDType) -> (f64, f64) {
    match dtype {
        FloatDType::F32 => (2e-5, 1e-4),
        _ => (2e-2, 2e-2),
    }
}

/// Asserts that every named result is close.
pub fn compare(
    what: &str,
    found: &[(&str, Vec<f64>)],
    expected: &[(&str, Vec<f64>)],
    dtype: FloatDType,
) {
    let (outputs, gradients) = tolerance(dtype);
    let mut bad = Vec::new();
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let allowed = if name.starts_with('d') {
            gradients
        } else {
            outputs
        };
        let error = relative_l2(found, expected);
        if error > allowed {
            bad.push(format!("{name}: {error:.2e}, allowed {allowed:.0e}"));
        }
    }
    assert!(bad.is_empty(), "{what}\n{}", bad.join("\n"));
}

/// Asserts that every result is finite, gradients among them, and that the outputs are close to what f64 finds.
///
/// The tolerance of f32 is 1e-3: beside a sum of steps of 50 at a rate of 100 small steps keep few digits, which is
/// 2.4e-4 of an output where all but the sums is exact.
pub fn finite_and_close(
    what: &str,
    found: &[(&str, Vec<f64>)],
    expected: &[(&str, Vec<f64>)],
    dtype: FloatDType,
) {
    let allowed = tolerance(dtype).0.max(1e-3);
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let bad = found.iter().filter(|v| !v.is_finite()).count();
        assert_eq!(bad, 0, "{what}: numbers of {name} that are not finite");
        if !name.starts_with('d') {
            assert_close(&format!("{what}: {name}"), found, expected, allowed);
        }
    }
}

/// A tensor in f64, as it is after rounding to `dtype`.
pub fn rounded<const D: usize>(tensor: Tensor<D>, dtype: FloatDType) -> Tensor<D> {
    tensor.cast(dtype).cast(FloatDType::F64)
}

/// A tensor on a device, a leaf of its graph.
pub fn leaf<const D: usize>(tensor: &Tensor<D>, device: &Device, dtype: FloatDType) -> Tensor<D> {
    let dtype = DType::from(dtype);
    Tensor::from_data(tensor.to_data_dtype(dtype), (device, dtype)).require_grad()
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    batch: usize,
    length: usize,
    heads: usize,
    headdim: usize,
    groups: usize,
    state: usize,
}

fn operands(s: Shape, dtype: FloatDType) -> SsdInput {
    let flex = Device::flex();
    let bc = [s.batch, s.length, s.groups, s.state];
    SsdInput {
        x: rounded(
            normal([s.batch, s.length, s.heads, s.headdim], &flex),
            dtype,
        ),
        dt: rounded(normal([s.batch, s.length, s.heads], &flex), dtype),
        a: uniform([s.heads], (-4.0, -0.2), &flex),
        b: rounded(normal(bc, &flex), dtype),
        c: rounded(normal(bc, &flex), dtype),
        d: Some(normal([s.heads], &flex).into()),
        z: None,
        dt_bias: Some(normal([s.heads], &flex)),
        initial_state: Some(normal([s.batch, s.heads, s.headdim, s.state], &flex)),
    }
}

/// Outputs and gradients of `sum(y w) + sum(final_state v)`.
fn run(
    input: &SsdInput,
    options: &SsdOptions,
    device: &Device,
    dtype: FloatDType,
) -> Vec<(&'static str, Vec<f64>)> {
    let device = device.clone().autodiff();
    let wide = if dtype == FloatDType::F64 {
        FloatDType::F64
    } else {
        FloatDType::F32
    };
    let x = leaf(&input.x, &device, dtype);
    let dt = leaf(&input.dt, &device, dtype);
    let a = leaf(&input.a, &device, wide);
    let b = leaf(&input.b, &device, dtype);
    let c = leaf(&input.c, &device, dtype);
    let per_head = match &input.d {
        Some(SkipWeight::PerHead(d)) => Some(leaf(d, &device, wide)),
        _ => None,
    };
    let per_channel = match &input.d {
        Some(SkipWeight::PerChannel(d)) => Some(leaf(d, &device, wide)),
        _ => None,
    };
    let z = input.z.as_ref().map(|z| leaf(z, &device, dtype));
    let dt_bias = input.dt_bias.as_ref().map(|t| leaf(t, &device, wide));
    let initial = input.initial_state.as_ref().map(|t| leaf(t, &device, wide));
    let d = match (&per_head, &per_channel) {
        (Some(d), _) => Some(d.clone().into()),
        (_, Some(d)) => Some(d.clone().into()),
        _ => None,
    };
    let out = ssd(
        SsdInput {
            x: x.clone(),
            dt: dt.clone(),
            a: a.clone(),
            b: b.clone(),
            c: c.clone(),
            d,
            z: z.clone(),
            dt_bias: dt_bias.clone(),
            initial_state: initial.clone(),
        },
        options,
    );
    let mut found = vec![("y", values(&out.y)), ("h", values(&out.final_state))];
    let weights = |shape: [usize; 4], seed: f64| {
        // Made in f64 for every device: an f32 sine of a large number is another weight.
        let numbers: Vec<f64> = (0..shape.iter().product::<usize>())
            .map(|n| (n as f64 * seed).sin())
            .collect();
        let data = TensorData::new(numbers, shape).convert_dtype(wide.into());
        Tensor::<4>::from_data(data, (&device, DType::from(wide)))
    };
    let wy = weights(out.y.dims(), 0.731);
    let wh = weights(out.final_state.dims(), 1.113);
    let loss = (out.y.cast(wide) * wy).sum() + (out.final_state.cast(wide) * wh).sum();
    let grads = loss.backward();
    fn push<const D: usize>(
        found: &mut Vec<(&'static str, Vec<f64>)>,
        name: &'static str,
        tensor: Option<&Tensor<D>>,
        grads: &burn::tensor::Gradients,
    ) {
        if let Some(tensor) = tensor {
            found.push((name, values(&tensor.grad(grads).expect(name))));
        }
    }
    push(&mut found, "dx", Some(&x), &grads);
    push(&mut found, "ddt", Some(&dt), &grads);
    push(&mut found, "da", Some(&a), &grads);
    push(&mut found, "db", Some(&b), &grads);
    push(&mut found, "dc", Some(&c), &grads);
    push(&mut found, "dd", per_head.as_ref(), &grads);
    push(&mut found, "dd per channel", per_channel.as_ref(), &grads);
    push(&mut found, "dz", z.as_ref(), &grads);
    push(&mut found, "dbias", dt_bias.as_ref(), &grads);
    push(&mut found, "dinitial", initial.as_ref(), &grads);
    found
}

fn check(input: &SsdInput, options: &SsdOptions, what: &str, dtype: FloatDType, device: &Device) {
    let expected = run(input, options, &Device::flex(), FloatDType::F64);
    let found = run(input, options, device, dtype);
    compare(
        &format!("{what}, {dtype:?} on {device:?}"),
        &found,
        &expected,
        dtype,
    );
}

fn check_everywhere(shape: Shape) {
    for (device, dtype) in cases() {
        seed(7);
        let input = operands(shape, dtype);
        check(
            &input,
            &SsdOptions::default(),
            &format!("{shape:?}"),
            dtype,
            &device,
        );
    }
}

#[test]
fn ssd_of_a_chunk_and_less() {
    for length in [1, 2, 63, 64] {
        check_everywhere(Shape {
            batch: 2,
            length,
            heads: 2,
            headdim: 16,
            groups: 1,
            state: 16,
        });
    }
}

#[test]
fn ssd_of_several_chunks() {
    for length in [65, 127, 211] {
        check_everywhere(Shape {
            batch: 1,
            length,
            heads: 4,
            headdim: 16,
            groups: 2,
            state: 32,
        });
    }
}

#[test]
fn ssd_of_a_long_sequence_in_segments() {
    check_everywhere(Shape {
        batch: 1,
        length: 1000,
        heads: 1,
        headdim: 16,
        groups: 1,
        state: 16,
    });
}

/// Small steps, so that what one chunk leaves still counts several chunks later.
#[test]
fn ssd_that_remembers() {
    for length in [70, 200] {
        let shape = Shape {
            batch: 2,
            length,
            heads: 4,
            headdim: 8,
            groups: 1,
            state: 16,
        };
        for (device, dtype) in cases() {
            seed(7);
            let input = operands(shape, dtype);
            let dt_bias = input.dt_bias.clone().map(|bias| bias - 5.0);
            let input = SsdInput { dt_bias, ..input };
            check(
                &input,
                &SsdOptions::default(),
                &format!("{shape:?}"),
                dtype,
                &device,
            );
        }
    }
}

/// Rates so different that of one head nothing is left a few chunks later and of another everything, and one that grows:
/// a walk for what a segment adds begins where the first head to matter does.
#[test]
fn ssd_of_heads_that_forget_and_remember() {
    let rates = [
        [-60.0, -45.0, -0.5, -40.0],
        [-3.0, -60.0, -0.001, 0.001],
        [-4.0, -5.0, -50.0, -6.0],
    ];
    for (device, dtype) in cases() {
        for a in rates {
            seed(13);
            let shape = Shape {
                batch: 1,
                length: 1111,
                heads: 4,
                headdim: 8,
                groups: 1,
                state: 16,
            };
            let input = SsdInput {
                a: Tensor::from_data(TensorData::from(a), (&Device::flex(), DType::F64)),
                ..operands(shape, dtype)
            };
            let what = format!("{shape:?}, rates {a:?}");
            check(&input, &SsdOptions::default(), &what, dtype, &device);
        }
    }
}

/// |dt| to 50 before the softplus and |A| to 100.
#[test]
fn ssd_of_the_largest_steps_and_rates() {
    for (device, dtype) in cases() {
        seed(15);
        let shape = Shape {
            batch: 1,
            length: 200,
            heads: 4,
            headdim: 8,
            groups: 1,
            state: 16,
        };
        let flex = Device::flex();
        let input = SsdInput {
            dt: rounded(uniform([1, 200, 4], (-50.0, 50.0), &flex), dtype),
            dt_bias: None,
            a: Tensor::from_data([-100.0, -1.0, -1e-3, -30.0], (&flex, DType::F64)),
            ..operands(shape, dtype)
        };
        let options = SsdOptions::default();
        let expected = run(&input, &options, &flex, FloatDType::F64);
        let found = run(&input, &options, &device, dtype);
        let what = format!("{dtype:?} on {device:?}");
        finite_and_close(&what, &found, &expected, dtype);
    }
}

#[test]
fn ssd_of_odd_sizes() {
    check_everywhere(Shape {
        batch: 1,
        length: 70,
        heads: 3,
        headdim: 1,
        groups: 1,
        state: 1,
    });
    check_everywhere(Shape {
        batch: 1,
        length: 70,
        heads: 3,
        headdim: 24,
        groups: 3,
        state: 16,
    });
    check_everywhere(Shape {
        batch: 1,
        length: 33,
        heads: 16,
        headdim: 16,
        groups: 4,
        state: 64,
    });
    check_everywhere(Shape {
        batch: 1,
        length: 66,
        heads: 2,
        headdim: 64,
        groups: 1,
        state: 128,
    });
}

/// Heads as wide as cubes are, with the largest state: on matrix units a cube has one of them, and the kernels take
/// turns with shared memory, over several segments of chunks; twice as wide, they have no room to.
#[test]
fn ssd_of_wide_heads() {
    for (length, headdim) in [(700, 64), (200, 128)] {
        check_everywhere(Shape {
            batch: 1,
            length,
            heads: 2,
            headdim,
            groups: 1,
            state: 128,
        });
    }
}

#[test]
fn ssd_without_what_it_may_lack() {
    let shape = Shape {
        batch: 1,
        length: 67,
        heads: 2,
        headdim: 16,
        groups: 1,
        state: 16,
    };
    for (device, dtype) in cases() {
        seed(11);
        let full = operands(shape, dtype);
        let bare = SsdInput {
            d: None,
            dt_bias: None,
            initial_state: None,
            ..full.clone()
        };
        check(&bare, &SsdOptions::default(), "bare", dtype, &device);
        let flex = Device::flex();
        let dressed = SsdInput {
            d: Some(normal([2, 16], &flex).into()),
            z: Some(rounded(normal([1, 67, 2, 16], &flex), dtype)),
            ..full.clone()
        };
        check(
            &dressed,
            &SsdOptions::default(),
            "gate and D per channel",
            dtype,
            &device,
        );
        let limited = SsdOptions {
            dt_limit: (0.3, 1.1),
            ..SsdOptions::default()
        };
        check(&full, &limited, "limited steps", dtype, &device);
        let positive = SsdInput {
            dt: full.dt.clone().abs(),
            dt_bias: None,
            ..full
        };
        let plain = SsdOptions {
            dt_softplus: false,
            ..SsdOptions::default()
        };
        check(&positive, &plain, "no softplus", dtype, &device);
    }
}

/// Output and gradients of a Mamba-2 layer, f32.
fn run_layer(layer: &Mamba2, x: &Tensor<3>, device: &Device) -> Vec<(String, Vec<f64>)> {
    let device = device.clone().autodiff();
    let mut own = layer.config.init(&device);
    own.load_state_dict("", &layer.state_dict(""))
        .expect("the same architecture");
    let x = leaf(x, &device, FloatDType::F32);
    let y = own.forward(x.clone());
    // Not drawn: the random stream is shared with the tests that run beside this one.
    let numbers: Vec<f32> = (0..y.dims().iter().product::<usize>())
        .map(|n| (n as f64 * 0.731).sin() as f32)
        .collect();
    let weights = Tensor::from_data(TensorData::new(numbers, y.dims()), &device);
    let mut found = vec![("y".to_string(), values(&y))];
    let grads = (y * weights).sum().backward();
    found.push(("dx".into(), values(&x.grad(&grads).expect("dx"))));
    for (name, tensor) in own.gradient_dict("", &grads).iter() {
        let gradient = tensor
            .values
            .iter()
            .map(|value| f64::from(*value))
            .collect();
        found.push((format!("d {name}"), gradient));
    }
    found
}

#[test]
fn layers_with_their_inner_block_as_one_operator() {
    let configs = [
        (Mamba2Config::new(16).with_d_state(16).with_headdim(8), 70),
        (
            Mamba2Config::new(32)
                .with_d_state(32)
                .with_headdim(16)
                .with_ngroups(2),
            131,
        ),
        (
            Mamba2Config::new(8)
                .with_d_state(8)
                .with_headdim(4)
                .with_d_has_hdim(true),
            3,
        ),
        // Several heads: the gradient of one head's A or D is one number, in which terms of both signs cancel.
        (
            Mamba2Config::new(24)
                .with_d_state(8)
                .with_headdim(16)
                .with_conv_bias(false)
                .with_norm_before_gate(true)
                .with_bias(true),
            65,
        ),
    ];
    for (device, _) in devices() {
        for (config, length) in &configs {
            let flex = Device::flex();
            seed(5);
            let layer = config.init(&flex);
            let x = normal([2, *length, config.d_model], &flex);
            let expected = run_layer(&layer, &x, &flex);
            let found = run_layer(&layer, &x, &device);
            let what = format!("{config:?} on {device:?}");
            assert_eq!(found.len(), expected.len());
            compare(
                &what,
                &borrowed(&found),
                &borrowed(&expected),
                FloatDType::F32,
            );
        }
    }
}

#[test]
fn two_runs_are_equal_to_the_last_bit() {
    let shape = Shape {
        batch: 2,
        length: 150,
        heads: 4,
        headdim: 8,
        groups: 2,
        state: 16,
    };
    for (device, dtype) in cases() {
        seed(17);
        let input = operands(shape, dtype);
        let scan = || run(&input, &SsdOptions::default(), &device, dtype);
        assert!(scan() == scan(), "ssd, {dtype:?} on {device:?}");
    }
    for (device, _) in devices() {
        let flex = Device::flex();
        seed(17);
        let layer = Mamba2Config::new(16)
            .with_d_state(16)
            .with_headdim(8)
            .init(&flex);
        let x = normal([2, 150, 16], &flex);
        let layer = || run_layer(&layer, &x, &device);
        assert!(layer() == layer(), "a layer on {device:?}");
    }
}

fn borrowed(results: &[(String, Vec<f64>)]) -> Vec<(&str, Vec<f64>)> {
    results
        .iter()
        .map(|(name, values)| (name.as_str(), values.clone()))
        .collect()
}
