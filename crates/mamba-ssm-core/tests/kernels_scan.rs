//! The selective scan on devices with implementations of their own, against the definition in f64.

use burn::tensor::{DType, Device, FloatDType, Gradients, Tensor, TensorData};
use mamba_ssm_core::{ScanInput, ScanOptions, ScanOutput, selective_scan};

use crate::kernels::{cases, compare, devices, finite_and_close, leaf, rounded};
use crate::support::{assert_close, normal, seed, uniform, values};

type Named = Vec<(&'static str, Vec<f64>)>;

#[derive(Debug, Clone, Copy)]
struct Shape {
    batch: usize,
    dim: usize,
    length: usize,
    groups: usize,
    state: usize,
}

/// Whether the channels of a token lie side by side in memory, as in a layer, or the tokens of a channel,
/// as in the official layout.
type ChannelsLast = bool;

fn operands(s: Shape, dtype: FloatDType) -> ScanInput {
    let flex = Device::flex();
    let (wide, bc) = (
        [s.batch, s.dim, s.length],
        [s.batch, s.groups, s.state, s.length],
    );
    let narrow = |tensor: Tensor<3>| rounded(tensor, dtype);
    ScanInput {
        u: narrow(normal(wide, &flex)),
        delta: narrow(normal(wide, &flex)),
        a: rounded(
            uniform([s.dim, s.state], (-4.0, -0.2), &flex),
            FloatDType::F32,
        ),
        b: rounded(normal(bc, &flex), dtype),
        c: rounded(normal(bc, &flex), dtype),
        d: Some(rounded(normal([s.dim], &flex), FloatDType::F32)),
        z: Some(narrow(normal(wide, &flex))),
        delta_bias: Some(rounded(normal([s.dim], &flex), FloatDType::F32)),
        initial_state: Some(rounded(
            normal([s.batch, s.dim, s.state], &flex),
            FloatDType::F32,
        )),
    }
}

fn wide(dtype: FloatDType) -> FloatDType {
    match dtype {
        FloatDType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

/// A leaf that lies in memory with its first two axes swapped, and the view to pass.
fn turned<const D: usize>(
    tensor: &Tensor<D>,
    channels_last: ChannelsLast,
    axes: [usize; D],
    back: [usize; D],
    device: &Device,
    dtype: FloatDType,
) -> (Tensor<D>, Tensor<D>) {
    if channels_last {
        let leaf = leaf(&tensor.clone().permute(axes), device, dtype);
        (leaf.clone(), leaf.permute(back))
    } else {
        let leaf = leaf(tensor, device, dtype);
        (leaf.clone(), leaf)
    }
}

/// Fixed weights, made in f64 for every device: an f32 sine of a large number is another weight.
fn weights(shape: [usize; 3], seed: f64, device: &Device, dtype: FloatDType) -> Tensor<3> {
    let numbers: Vec<f64> = (0..shape.iter().product::<usize>())
        .map(|n| (n as f64 * seed).sin())
        .collect();
    let dtype = DType::from(dtype);
    let data = TensorData::new(numbers, shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
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

/// Outputs and gradients of `sum(y w) + sum(final_state v)`, the gradients as the leaves lie.
fn run(
    input: &ScanInput,
    options: &ScanOptions,
    device: &Device,
    dtype: FloatDType,
    channels_last: ChannelsLast,
) -> Named {
    let device = device.clone().autodiff();
    let parameter = |tensor: &Tensor<1>| leaf(tensor, &device, wide(dtype));
    let big = |tensor: &Tensor<3>| {
        let axes = [0, 2, 1];
        turned(tensor, channels_last, axes, axes, &device, dtype)
    };
    let group = |tensor: &Tensor<4>| {
        let (axes, back) = ([0, 3, 1, 2], [0, 2, 3, 1]);
        turned(tensor, channels_last, axes, back, &device, dtype)
    };
    let (u, u_view) = big(&input.u);
    let (delta, delta_view) = big(&input.delta);
    let (b, b_view) = group(&input.b);
    let (c, c_view) = group(&input.c);
    let (z, z_view) = input.z.as_ref().map(big).unzip();
    let a = leaf(&input.a, &device, wide(dtype));
    let d = input.d.as_ref().map(parameter);
    let bias = input.delta_bias.as_ref().map(parameter);
    let initial = input.initial_state.as_ref();
    let initial = initial.map(|state| leaf(state, &device, wide(dtype)));
    let ScanOutput { y, final_state } = selective_scan(
        ScanInput {
            u: u_view,
            delta: delta_view,
            a: a.clone(),
            b: b_view,
            c: c_view,
            d: d.clone(),
            z: z_view,
            delta_bias: bias.clone(),
            initial_state: initial.clone(),
        },
        options,
    );
    let mut found = vec![("y", values(&y)), ("h", values(&final_state))];
    let wy = weights(y.dims(), 0.731, &device, wide(dtype));
    let wh = weights(final_state.dims(), 1.113, &device, wide(dtype));
    let loss = (y.cast(wide(dtype)) * wy).sum() + (final_state.cast(wide(dtype)) * wh).sum();
    let grads = loss.backward();
    push(&mut found, "du", Some(&u), &grads);
    push(&mut found, "ddelta", Some(&delta), &grads);
    push(&mut found, "da", Some(&a), &grads);
    push(&mut found, "db", Some(&b), &grads);
    push(&mut found, "dc", Some(&c), &grads);
    push(&mut found, "dd", d.as_ref(), &grads);
    push(&mut found, "dz", z.as_ref(), &grads);
    push(&mut found, "dbias", bias.as_ref(), &grads);
    push(&mut found, "dinitial", initial.as_ref(), &grads);
    found
}

fn check(
    what: &str,
    input: &ScanInput,
    options: &ScanOptions,
    (device, dtype): (&Device, FloatDType),
    channels_last: ChannelsLast,
) {
    let expected = run(
        input,
        options,
        &Device::flex(),
        FloatDType::F64,
        channels_last,
    );
    let found = run(input, options, device, dtype, channels_last);
    let what = format!("{what}, channels last: {channels_last}, {dtype:?} on {device:?}");
    compare(&what, &found, &expected, dtype);
}

fn check_everywhere(s: Shape, layouts: &[ChannelsLast]) {
    for (device, dtype) in cases() {
        seed(7);
        let input = operands(s, dtype);
        for layout in layouts {
            let options = ScanOptions::default();
            check(
                &format!("{s:?}"),
                &input,
                &options,
                (&device, dtype),
                *layout,
            );
        }
    }
}

const SMALL: Shape = Shape {
    batch: 2,
    dim: 3,
    length: 1,
    groups: 1,
    state: 16,
};

#[test]
fn scans_of_any_length() {
    for length in [1, 2, 63, 65, 127] {
        check_everywhere(Shape { length, ..SMALL }, &[false]);
    }
    for length in [1, 63, 65] {
        check_everywhere(Shape { length, ..SMALL }, &[true]);
    }
}

#[test]
fn scans_read_in_vectors() {
    let shape = Shape {
        dim: 40,
        length: 64,
        ..SMALL
    };
    check_everywhere(shape, &[false, true]);
}

#[test]
fn scans_of_several_groups() {
    for (groups, dim, length) in [(2, 40, 70), (4, 16, 33)] {
        let shape = Shape {
            dim,
            length,
            groups,
            ..SMALL
        };
        check_everywhere(shape, &[groups == 4]);
    }
}

#[test]
fn scans_of_any_state() {
    for (state, dim) in [(1, 1), (64, 16), (3, 40), (20, 5)] {
        let shape = Shape {
            batch: 1,
            dim,
            length: 37,
            groups: 1,
            state,
        };
        check_everywhere(shape, &[state == 64]);
    }
}

/// Sizes that only a GPU compiles in reasonable time.
#[cfg(feature = "cuda")]
#[test]
fn scans_of_many_sizes() {
    // A kernel per size and layout: each costs seconds to compile.
    // Several channels at least: D's gradient of one is one number, in which terms of both signs cancel.
    let sizes = [(5, 50), (33, 17), (72, 80)];
    for (n, state) in [2, 8, 16, 32, 128, 129, 256].into_iter().enumerate() {
        let (dim, length) = sizes[n % sizes.len()];
        let shape = Shape {
            batch: 2,
            dim,
            length,
            groups: 1,
            state,
        };
        check_everywhere(shape, &[n % 2 == 0]);
    }
    let large = Shape {
        batch: 3,
        dim: 520,
        length: 500,
        groups: 2,
        state: 16,
    };
    check_everywhere(large, &[false, true]);
}

#[test]
fn scans_of_long_sequences() {
    let shape = Shape {
        length: 1000,
        batch: 1,
        ..SMALL
    };
    check_everywhere(shape, &[false]);
}

/// Small steps, so that what one chunk leaves still counts several chunks later.
#[test]
fn scans_that_remember() {
    for (device, dtype) in cases() {
        seed(9);
        let input = operands(
            Shape {
                length: 127,
                ..SMALL
            },
            dtype,
        );
        let delta_bias = input.delta_bias.clone();
        let delta_bias = delta_bias.map(|bias| rounded(bias - 5.0, FloatDType::F32));
        let input = ScanInput {
            delta_bias,
            ..input
        };
        let options = ScanOptions::default();
        check("small steps", &input, &options, (&device, dtype), false);
    }
}

/// |delta| to 50 before the softplus and |A| to 100.
#[test]
fn scans_of_the_largest_steps_and_rates() {
    for (device, dtype) in cases() {
        seed(15);
        let (length, flex) = (127, Device::flex());
        let input = ScanInput {
            delta: rounded(uniform([2, 3, length], (-50.0, 50.0), &flex), dtype),
            delta_bias: None,
            a: rounded(uniform([3, 16], (-100.0, -1e-3), &flex), FloatDType::F32),
            ..operands(Shape { length, ..SMALL }, dtype)
        };
        let options = ScanOptions::default();
        let expected = run(&input, &options, &flex, FloatDType::F64, false);
        let found = run(&input, &options, &device, dtype, false);
        let what = format!("{dtype:?} on {device:?}");
        finite_and_close(&what, &found, &expected, dtype);
    }
}

#[test]
fn scans_without_what_they_may_lack() {
    for (device, dtype) in cases() {
        seed(11);
        let full = operands(
            Shape {
                length: 37,
                ..SMALL
            },
            dtype,
        );
        let bare = ScanInput {
            d: None,
            z: None,
            delta_bias: None,
            initial_state: None,
            ..full.clone()
        };
        let options = ScanOptions::default();
        check("bare", &bare, &options, (&device, dtype), false);
        let positive = ScanInput {
            delta: full.delta.clone().abs(),
            ..bare
        };
        let options = ScanOptions {
            delta_softplus: false,
        };
        check("no softplus", &positive, &options, (&device, dtype), false);
    }
}

/// Operands on a device, not tracked.
fn on(input: &ScanInput, device: &Device, dtype: FloatDType) -> ScanInput {
    fn to<const D: usize>(tensor: &Tensor<D>, device: &Device, dtype: FloatDType) -> Tensor<D> {
        let dtype = DType::from(dtype);
        Tensor::from_data(tensor.to_data_dtype(dtype), (device, dtype))
    }
    let f32 = FloatDType::F32;
    ScanInput {
        u: to(&input.u, device, dtype),
        delta: to(&input.delta, device, dtype),
        a: to(&input.a, device, f32),
        b: to(&input.b, device, dtype),
        c: to(&input.c, device, dtype),
        d: input.d.as_ref().map(|d| to(d, device, f32)),
        z: input.z.as_ref().map(|z| to(z, device, dtype)),
        delta_bias: input.delta_bias.as_ref().map(|t| to(t, device, f32)),
        initial_state: input.initial_state.as_ref().map(|t| to(t, device, f32)),
    }
}

#[test]
fn scans_of_parts_join_to_the_whole() {
    for (device, _) in devices() {
        seed(13);
        let input = operands(
            Shape {
                length: 65,
                ..SMALL
            },
            FloatDType::F32,
        );
        let input = on(&input, &device, FloatDType::F32);
        let options = ScanOptions::default();
        let whole = selective_scan(input.clone(), &options);
        for cut in [1, 16, 33] {
            let part = |start: usize, length: usize, state: Option<Tensor<3>>| ScanInput {
                u: input.u.clone().narrow(2, start, length),
                delta: input.delta.clone().narrow(2, start, length),
                b: input.b.clone().narrow(3, start, length),
                c: input.c.clone().narrow(3, start, length),
                z: input.z.clone().map(|z| z.narrow(2, start, length)),
                initial_state: state,
                ..input.clone()
            };
            let first = selective_scan(part(0, cut, input.initial_state.clone()), &options);
            let second = selective_scan(part(cut, 65 - cut, Some(first.final_state)), &options);
            let joined = Tensor::cat(vec![first.y, second.y], 2);
            let what = format!("cut at {cut} on {device:?}");
            assert_close(&what, &values(&joined), &values(&whole.y), 1e-6);
            let state = values(&second.final_state);
            assert_close(&what, &state, &values(&whole.final_state), 1e-6);
        }
    }
}

#[test]
fn scans_repeat_to_the_bit() {
    for (device, dtype) in cases() {
        seed(15);
        let shape = Shape {
            dim: 40,
            length: 64,
            ..SMALL
        };
        let input = operands(shape, dtype);
        let run = || run(&input, &ScanOptions::default(), &device, dtype, false);
        assert!(run() == run(), "{dtype:?} on {device:?}");
    }
}
