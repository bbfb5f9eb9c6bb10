use burn::tensor::{DType, Device, FloatDType, Tensor};
use mamba_ssm_core::{ScanInput, ScanOptions, selective_scan};

use crate::support::{
    assert_close, assert_gradient, device, normal, silu, softplus, uniform, values,
};

/// batch, dim, length, groups, state.
type Shape = [usize; 5];

fn operands([batch, dim, length, groups, state]: Shape, device: &Device) -> ScanInput {
    let bc = [batch, groups, state, length];
    ScanInput {
        u: normal([batch, dim, length], device),
        delta: normal([batch, dim, length], device),
        a: uniform([dim, state], (-4.0, -0.2), device),
        b: normal(bc, device),
        c: normal(bc, device),
        d: Some(normal([dim], device)),
        z: Some(normal([batch, dim, length], device)),
        delta_bias: Some(normal([dim], device)),
        initial_state: Some(normal([batch, dim, state], device)),
    }
}

/// The recurrence as written, one number at a time.
fn truth(input: &ScanInput, options: &ScanOptions) -> (Vec<f64>, Vec<f64>) {
    let [batch, dim, length] = input.u.dims();
    let [_, groups, state, _] = input.b.dims();
    let (u, delta, a) = (values(&input.u), values(&input.delta), values(&input.a));
    let (b, c) = (values(&input.b), values(&input.c));
    let (d, z) = (input.d.as_ref().map(values), input.z.as_ref().map(values));
    let bias = input.delta_bias.as_ref().map(values);
    let mut h = match &input.initial_state {
        Some(h) => values(h),
        None => vec![0.0; batch * dim * state],
    };
    let mut y = vec![0.0; u.len()];
    for i in 0..batch {
        for channel in 0..dim {
            for t in 0..length {
                let at = (i * dim + channel) * length + t;
                let mut step = delta[at] + bias.as_ref().map_or(0.0, |bias| bias[channel]);
                if options.delta_softplus {
                    step = softplus(step);
                }
                let mut sum = d.as_ref().map_or(0.0, |d| d[channel] * u[at]);
                for n in 0..state {
                    let bc = ((i * groups + channel / (dim / groups)) * state + n) * length + t;
                    let hs = (i * dim + channel) * state + n;
                    h[hs] = (step * a[channel * state + n]).exp() * h[hs] + step * u[at] * b[bc];
                    sum += h[hs] * c[bc];
                }
                y[at] = sum * z.as_ref().map_or(1.0, |z| silu(z[at]));
            }
        }
    }
    (y, h)
}

const SHAPES: [Shape; 6] = [
    [1, 1, 1, 1, 1],
    [2, 6, 2, 3, 16],
    [2, 8, 63, 2, 4],
    [1, 5, 64, 1, 16],
    [2, 3, 65, 1, 64],
    [1, 4, 1009, 4, 2],
];

#[test]
fn agrees_with_the_recurrence_on_all_shapes() {
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let whole = operands(shape, &device(index as u64));
        let bare = ScanInput {
            d: None,
            z: None,
            delta_bias: None,
            initial_state: None,
            ..whole.clone()
        };
        for (input, delta_softplus) in [(whole.clone(), true), (bare, true)] {
            let options = ScanOptions { delta_softplus };
            let (y, state) = truth(&input, &options);
            let out = selective_scan(input, &options);
            assert_close(&format!("{shape:?}"), &values(&out.y), &y, 1e-12);
            assert_close(
                &format!("{shape:?}"),
                &values(&out.final_state),
                &state,
                1e-12,
            );
        }
    }
}

#[test]
fn without_softplus_the_steps_are_taken_as_they_are() {
    let input = operands(SHAPES[2], &device(10));
    let input = ScanInput {
        delta: input.delta.clone().abs(),
        delta_bias: None,
        ..input
    };
    let options = ScanOptions {
        delta_softplus: false,
    };
    let (y, _) = truth(&input, &options);
    assert_close("y", &values(&selective_scan(input, &options).y), &y, 1e-12);
}

#[test]
fn a_sequence_split_anywhere_gives_the_same_output() {
    let input = operands(SHAPES[4], &device(20));
    let options = ScanOptions::default();
    let whole = selective_scan(input.clone(), &options);
    for cut in [1, 31, 32, 64] {
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
        assert_close("y", &values(&joined), &values(&whole.y), 1e-13);
        let state = values(&second.final_state);
        assert_close("state", &state, &values(&whole.final_state), 1e-13);
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let plain = device(30);
    let input = operands([2, 4, 13, 2, 3], &plain);
    let (wy, wh) = (normal([2, 4, 13], &plain), normal([2, 4, 3], &plain));
    let loss = |input: ScanInput, wy: Tensor<3>, wh: Tensor<3>| {
        let out = selective_scan(input, &ScanOptions::default());
        (out.y * wy).sum() + (out.final_state * wh).sum()
    };
    let scalar = |input: ScanInput| loss(input, wy.clone(), wh.clone()).into_scalar::<f64>();
    let tracked = |t: Tensor<3>| t.autodiff().require_grad();
    let leaf = ScanInput {
        u: tracked(input.u.clone()),
        delta: tracked(input.delta.clone()),
        a: input.a.clone().autodiff().require_grad(),
        b: input.b.clone().autodiff().require_grad(),
        c: input.c.clone().autodiff().require_grad(),
        d: input.d.clone().map(|t| t.autodiff().require_grad()),
        z: input.z.clone().map(tracked),
        delta_bias: input
            .delta_bias
            .clone()
            .map(|t| t.autodiff().require_grad()),
        initial_state: input.initial_state.clone().map(tracked),
    };
    let grads = loss(leaf.clone(), wy.clone().autodiff(), wh.clone().autodiff()).backward();

    macro_rules! check {
        ($name:literal, $at:expr, $leaf:expr, |$moved:ident| $input:expr) => {
            assert_gradient($name, &$at, &$leaf.grad(&grads).expect($name), |$moved| {
                scalar($input)
            })
        };
    }
    let i = || input.clone();
    check!("u", input.u, leaf.u, |u| ScanInput { u, ..i() });
    check!("delta", input.delta, leaf.delta, |delta| ScanInput {
        delta,
        ..i()
    });
    check!("a", input.a, leaf.a, |a| ScanInput { a, ..i() });
    check!("b", input.b, leaf.b, |b| ScanInput { b, ..i() });
    check!("c", input.c, leaf.c, |c| ScanInput { c, ..i() });
    let (d, z) = (input.d.clone().unwrap(), input.z.clone().unwrap());
    check!("d", d, leaf.d.unwrap(), |d| ScanInput { d: Some(d), ..i() });
    check!("z", z, leaf.z.unwrap(), |z| ScanInput { z: Some(z), ..i() });
    let (bias, h) = (
        input.delta_bias.clone().unwrap(),
        input.initial_state.clone().unwrap(),
    );
    check!("delta_bias", bias, leaf.delta_bias.unwrap(), |t| {
        ScanInput {
            delta_bias: Some(t),
            ..i()
        }
    });
    check!("initial_state", h, leaf.initial_state.unwrap(), |t| {
        ScanInput {
            initial_state: Some(t),
            ..i()
        }
    });
}

#[test]
fn narrow_operands_keep_a_wide_state() {
    let i = operands(SHAPES[2], &device(40));
    let (y, _) = truth(&i, &ScanOptions::default());
    for (to, tolerance) in [(FloatDType::F32, 2e-6), (FloatDType::BF16, 2e-2)] {
        let i = i.clone();
        let input = ScanInput {
            u: i.u.cast(to),
            delta: i.delta.cast(to),
            a: i.a.cast(to),
            b: i.b.cast(to),
            c: i.c.cast(to),
            d: i.d.map(|t| t.cast(to)),
            z: i.z.map(|t| t.cast(to)),
            delta_bias: i.delta_bias.map(|t| t.cast(to)),
            initial_state: i.initial_state.map(|t| t.cast(to)),
        };
        let out = selective_scan(input, &ScanOptions::default());
        assert_eq!(out.y.dtype(), DType::from(to));
        assert_eq!(out.final_state.dtype(), DType::F32);
        assert_close("y", &values(&out.y), &y, tolerance);
    }
}

#[test]
#[should_panic(expected = "dim = 5 is not a multiple of groups = 2")]
fn groups_that_do_not_divide_the_channels_are_refused() {
    selective_scan(
        operands([1, 5, 4, 2, 2], &device(50)),
        &ScanOptions::default(),
    );
}
