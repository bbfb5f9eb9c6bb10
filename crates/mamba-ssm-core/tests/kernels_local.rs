//! The convolution and the norm on devices with kernels of their own, against the definition in f64.

use burn::tensor::{DType, Device, FloatDType, Gradients, Tensor, TensorData};
use mamba_ssm_core::{ConvInput, GatedNormInput, GatedNormOptions, causal_conv1d, gated_rms_norm};

use crate::kernels::{cases, compare, leaf, rounded};
use crate::support::{normal, seed, values};

type Named = Vec<(&'static str, Vec<f64>)>;

fn wide(dtype: FloatDType) -> FloatDType {
    match dtype {
        FloatDType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

/// The gradients of `sum(y w)` for fixed weights `w`.
fn backward(y: &Tensor<3>, dtype: FloatDType) -> Gradients {
    let numbers: Vec<f64> = (0..y.dims().iter().product::<usize>())
        .map(|n| (n as f64 * 0.731).sin())
        .collect();
    let dtype = DType::from(wide(dtype));
    let data = TensorData::new(numbers, y.dims()).convert_dtype(dtype);
    let weights = Tensor::<3>::from_data(data, (&y.device(), dtype));
    (y.clone().cast(dtype) * weights).sum().backward()
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

fn run_conv(input: &ConvInput, device: &Device, dtype: FloatDType) -> Named {
    let device = device.clone().autodiff();
    let x = leaf(&input.x, &device, dtype);
    let weight = leaf(&input.weight, &device, wide(dtype));
    let bias = input
        .bias
        .as_ref()
        .map(|bias| leaf(bias, &device, wide(dtype)));
    let initial = input
        .initial_state
        .as_ref()
        .map(|state| leaf(state, &device, dtype));
    let out = causal_conv1d(ConvInput {
        x: x.clone(),
        weight: weight.clone(),
        bias: bias.clone(),
        initial_state: initial.clone(),
        activation: input.activation,
    });
    let mut found = vec![("y", values(&out.y)), ("h", values(&out.final_state))];
    let grads = backward(&out.y, dtype);
    push(&mut found, "dx", Some(&x), &grads);
    push(&mut found, "dweight", Some(&weight), &grads);
    push(&mut found, "dbias", bias.as_ref(), &grads);
    push(&mut found, "dinitial", initial.as_ref(), &grads);
    found
}

#[test]
fn convolutions() {
    let shapes = [
        (2, 1, 3, 4),
        (1, 63, 8, 4),
        (2, 131, 24, 2),
        (1, 70, 5, 3),
        (3, 2, 16, 4),
    ];
    let flex = Device::flex();
    for (device, dtype) in cases() {
        for (index, (batch, length, channels, width)) in shapes.into_iter().enumerate() {
            seed(17);
            let input = ConvInput {
                x: rounded(normal([batch, length, channels], &flex), dtype),
                weight: rounded(normal([channels, width], &flex), FloatDType::F32),
                bias: (index != 3).then(|| rounded(normal([channels], &flex), FloatDType::F32)),
                initial_state: (index != 1)
                    .then(|| rounded(normal([batch, width - 1, channels], &flex), dtype)),
                activation: index != 2,
            };
            let expected = run_conv(&input, &flex, FloatDType::F64);
            let found = run_conv(&input, &device, dtype);
            let what = format!("{:?} {dtype:?} on {device:?}", shapes[index]);
            compare(&what, &found, &expected, dtype);
        }
    }
}

fn run_norm(
    input: &GatedNormInput,
    options: &GatedNormOptions,
    device: &Device,
    dtype: FloatDType,
) -> Named {
    let device = device.clone().autodiff();
    let x = leaf(&input.x, &device, dtype);
    let z = input.z.as_ref().map(|z| leaf(z, &device, dtype));
    let weight = leaf(&input.weight, &device, wide(dtype));
    let y = gated_rms_norm(
        GatedNormInput {
            x: x.clone(),
            z: z.clone(),
            weight: weight.clone(),
        },
        options,
    );
    let mut found = vec![("y", values(&y))];
    let grads = backward(&y, dtype);
    push(&mut found, "dx", Some(&x), &grads);
    push(&mut found, "dz", z.as_ref(), &grads);
    push(&mut found, "dweight", Some(&weight), &grads);
    found
}

#[test]
fn gated_norms() {
    let shapes = [
        (2, 37, 24, 24),
        (1, 5, 12, 3),
        (3, 1, 64, 32),
        (1, 33, 96, 96),
    ];
    let flex = Device::flex();
    for (device, dtype) in cases() {
        for (index, (batch, length, dim, group)) in shapes.into_iter().enumerate() {
            seed(19);
            let input = GatedNormInput {
                x: rounded(normal([batch, length, dim], &flex), dtype),
                z: (index != 2).then(|| rounded(normal([batch, length, dim], &flex), dtype)),
                weight: rounded(normal([dim], &flex), FloatDType::F32),
            };
            let options = GatedNormOptions {
                group_size: Some(group),
                norm_before_gate: index == 1,
                ..GatedNormOptions::default()
            };
            let expected = run_norm(&input, &options, &flex, FloatDType::F64);
            let found = run_norm(&input, &options, &device, dtype);
            let what = format!("{:?} {dtype:?} on {device:?}", shapes[index]);
            compare(&what, &found, &expected, dtype);
        }
    }
}
