use burn::tensor::Tensor;
use mamba_ssm_core::{ConvInput, GatedNormInput, GatedNormOptions, causal_conv1d, gated_rms_norm};

use crate::support::{assert_close, assert_gradient, device, normal, silu, values};

/// The sum as written, one number at a time.
fn conv_truth(input: &ConvInput) -> Vec<f64> {
    let [batch, length, channels] = input.x.dims();
    let [_, width] = input.weight.dims();
    let (x, weight) = (values(&input.x), values(&input.weight));
    let bias = input.bias.as_ref().map(values);
    let past = input.initial_state.as_ref().map(values);
    let mut y = Vec::new();
    for i in 0..batch {
        for t in 0..length {
            for c in 0..channels {
                let mut sum = bias.as_ref().map_or(0.0, |b| b[c]);
                for k in 0..width {
                    // Position in the sequence with its past in front.
                    let at = t + k;
                    let seen = if at < width - 1 {
                        let of = |p: &Vec<f64>| p[(i * (width - 1) + at) * channels + c];
                        past.as_ref().map_or(0.0, of)
                    } else {
                        x[(i * length + at + 1 - width) * channels + c]
                    };
                    sum += weight[c * width + k] * seen;
                }
                y.push(if input.activation { silu(sum) } else { sum });
            }
        }
    }
    y
}

#[test]
fn the_convolution_agrees_with_its_sum_and_splits_anywhere() {
    let device = device(1);
    for (length, channels, width) in [(1, 1, 4), (2, 5, 4), (63, 3, 2), (65, 7, 3), (9, 4, 1)] {
        let past = (width > 1).then(|| normal([2, width - 1, channels], &device));
        let input = ConvInput {
            x: normal([2, length, channels], &device),
            weight: normal([channels, width], &device),
            bias: Some(normal([channels], &device)),
            initial_state: past,
            activation: true,
        };
        let out = causal_conv1d(input.clone());
        assert_close("y", &values(&out.y), &conv_truth(&input), 1e-12);
        let bare = ConvInput {
            bias: None,
            initial_state: None,
            activation: false,
            ..input.clone()
        };
        let y = causal_conv1d(bare.clone()).y;
        assert_close("bare y", &values(&y), &conv_truth(&bare), 1e-12);

        if length > 1 && width > 1 {
            let cut = length / 2;
            let part = |start, length, state| ConvInput {
                x: input.x.clone().narrow(1, start, length),
                initial_state: state,
                ..input.clone()
            };
            let first = causal_conv1d(part(0, cut, input.initial_state.clone()));
            let second = causal_conv1d(part(cut, length - cut, Some(first.final_state)));
            let joined = Tensor::cat(vec![first.y, second.y], 1);
            assert_close("split", &values(&joined), &values(&out.y), 1e-13);
        }
    }
}

#[test]
fn the_convolutions_gradients_agree_with_finite_differences() {
    let plain = device(2);
    let input = ConvInput {
        x: normal([2, 9, 3], &plain),
        weight: normal([3, 4], &plain),
        bias: Some(normal([3], &plain)),
        initial_state: Some(normal([2, 3, 3], &plain)),
        activation: true,
    };
    let w = normal([2, 9, 3], &plain);
    let loss = |input: ConvInput, w: Tensor<3>| {
        let out = causal_conv1d(input);
        (out.y * w).sum() + out.final_state.sum()
    };
    let scalar = |input: ConvInput| loss(input, w.clone()).into_scalar::<f64>();
    let leaf = ConvInput {
        x: input.x.clone().autodiff().require_grad(),
        weight: input.weight.clone().autodiff().require_grad(),
        bias: input.bias.clone().map(|t| t.autodiff().require_grad()),
        initial_state: input
            .initial_state
            .clone()
            .map(|t| t.autodiff().require_grad()),
        activation: true,
    };
    let grads = loss(leaf.clone(), w.clone().autodiff()).backward();
    let i = || input.clone();
    let dx = leaf.x.grad(&grads).unwrap();
    assert_gradient("x", &input.x, &dx, |x| scalar(ConvInput { x, ..i() }));
    let dw = leaf.weight.grad(&grads).unwrap();
    assert_gradient("weight", &input.weight, &dw, |weight| {
        scalar(ConvInput { weight, ..i() })
    });
    let (bias, db) = (
        input.bias.clone().unwrap(),
        leaf.bias.unwrap().grad(&grads).unwrap(),
    );
    assert_gradient("bias", &bias, &db, |b| {
        scalar(ConvInput {
            bias: Some(b),
            ..i()
        })
    });
    let past = input.initial_state.clone().unwrap();
    let dp = leaf.initial_state.unwrap().grad(&grads).unwrap();
    assert_gradient("initial_state", &past, &dp, |s| {
        scalar(ConvInput {
            initial_state: Some(s),
            ..i()
        })
    });
}

#[test]
fn the_norm_agrees_with_its_formula_for_groups_and_both_orders() {
    let device = device(3);
    let (x, z) = (normal([2, 5, 12], &device), normal([2, 5, 12], &device));
    let weight = normal([12], &device);
    for (group, before) in [(12, false), (4, false), (4, true), (12, true)] {
        let options = GatedNormOptions {
            group_size: Some(group),
            norm_before_gate: before,
            ..GatedNormOptions::default()
        };
        let input = GatedNormInput {
            x: x.clone(),
            z: Some(z.clone()),
            weight: weight.clone(),
        };
        let (xs, zs, ws) = (values(&x), values(&z), values(&weight));
        let gated = |i: usize| if before { xs[i] } else { xs[i] * silu(zs[i]) };
        let expected: Vec<f64> = (0..xs.len())
            .map(|i| {
                let start = i / group * group;
                let mean = (start..start + group)
                    .map(|j| gated(j).powi(2))
                    .sum::<f64>();
                let normed = gated(i) / (mean / group as f64 + 1e-5).sqrt() * ws[i % 12];
                if before { normed * silu(zs[i]) } else { normed }
            })
            .collect();
        let y = gated_rms_norm(input, &options);
        assert_close(&format!("groups of {group}"), &values(&y), &expected, 1e-12);
    }
}

#[test]
#[should_panic(expected = "dim = 12 is not a multiple of group_size = 5")]
fn a_group_that_does_not_divide_the_channels_is_refused() {
    let device = device(4);
    let input = GatedNormInput {
        x: normal([1, 1, 12], &device),
        z: None,
        weight: normal([12], &device),
    };
    let options = GatedNormOptions {
        group_size: Some(5),
        ..GatedNormOptions::default()
    };
    gated_rms_norm(input, &options);
}

#[test]
#[should_panic(expected = "the weight has 4 channels, x has 3")]
fn a_convolution_of_other_channels_is_refused() {
    let device = device(5);
    causal_conv1d(ConvInput {
        x: normal([1, 2, 3], &device),
        weight: normal([4, 2], &device),
        bias: None,
        initial_state: None,
        activation: false,
    });
}
