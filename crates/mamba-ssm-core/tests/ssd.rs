use burn::tensor::{DType, Device, FloatDType, Tensor};
use mamba_ssm_core::{SkipWeight, SsdInput, SsdOptions, ssd};

use crate::support::{
    assert_close, assert_gradient, device, normal, relative_l2, silu, softplus, uniform, values,
};

#[derive(Debug, Clone, Copy)]
struct Shape {
    batch: usize,
    length: usize,
    heads: usize,
    headdim: usize,
    groups: usize,
    state: usize,
}

/// Every optional operand present, f64.
fn operands(s: Shape, device: &Device) -> SsdInput {
    let bc = [s.batch, s.length, s.groups, s.state];
    let x = [s.batch, s.length, s.heads, s.headdim];
    SsdInput {
        x: normal(x, device),
        dt: normal([s.batch, s.length, s.heads], device),
        a: uniform([s.heads], (-4.0, -0.2), device),
        b: normal(bc, device),
        c: normal(bc, device),
        d: Some(normal([s.heads], device).into()),
        z: Some(normal(x, device)),
        dt_bias: Some(normal([s.heads], device)),
        initial_state: Some(normal([s.batch, s.heads, s.headdim, s.state], device)),
    }
}

/// The recurrence as written, one number at a time.
fn truth(input: &SsdInput, options: &SsdOptions) -> (Vec<f64>, Vec<f64>) {
    let [batch, length, heads, headdim] = input.x.dims();
    let [_, _, groups, state] = input.b.dims();
    let (x, dt, a) = (values(&input.x), values(&input.dt), values(&input.a));
    let (b, c) = (values(&input.b), values(&input.c));
    let bias = input.dt_bias.as_ref().map(values);
    let z = input.z.as_ref().map(values);
    let d: Option<Vec<f64>> = input.d.as_ref().map(|d| match d {
        SkipWeight::PerHead(d) => values(d)
            .iter()
            .flat_map(|d| std::iter::repeat_n(*d, headdim))
            .collect(),
        SkipWeight::PerChannel(d) => values(d),
    });
    let mut h = match &input.initial_state {
        Some(h) => values(h),
        None => vec![0.0; batch * heads * headdim * state],
    };
    let mut y = vec![0.0; x.len()];
    for i in 0..batch {
        for t in 0..length {
            for head in 0..heads {
                let at = (i * length + t) * heads + head;
                let mut step = dt[at] + bias.as_ref().map_or(0.0, |bias| bias[head]);
                if options.dt_softplus {
                    step = softplus(step);
                }
                step = step.clamp(options.dt_limit.0, options.dt_limit.1);
                let decay = (step * a[head]).exp();
                let group = ((i * length + t) * groups + head / (heads / groups)) * state;
                for p in 0..headdim {
                    let xi = at * headdim + p;
                    let hs = ((i * heads + head) * headdim + p) * state;
                    let mut sum = 0.0;
                    for n in 0..state {
                        h[hs + n] = decay * h[hs + n] + step * x[xi] * b[group + n];
                        sum += h[hs + n] * c[group + n];
                    }
                    sum += d.as_ref().map_or(0.0, |d| d[head * headdim + p] * x[xi]);
                    y[xi] = sum * z.as_ref().map_or(1.0, |z| silu(z[xi]));
                }
            }
        }
    }
    (y, h)
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (length, heads, groups, headdim, state) in [
        (1, 1, 1, 1, 1),
        (2, 3, 1, 16, 16),
        (63, 4, 2, 24, 16),
        (64, 4, 4, 16, 64),
        (65, 3, 3, 8, 16),
        (127, 4, 1, 16, 128),
        (131, 16, 2, 4, 8),
        (1000, 2, 1, 3, 5),
        // More chunks than one block of the carry, and not a whole number of blocks.
        (2111, 1, 1, 2, 3),
    ] {
        shapes.push(Shape {
            batch: 2,
            length,
            heads,
            headdim,
            groups,
            state,
        });
    }
    shapes
}

#[test]
fn agrees_with_the_recurrence_on_all_shapes_and_chunk_sizes() {
    for (index, shape) in shapes().into_iter().enumerate() {
        let input = operands(shape, &device(index as u64));
        for chunk_size in [1, 16, 64, 100] {
            if shape.length > 1500 && chunk_size == 1 {
                continue;
            }
            let options = SsdOptions {
                chunk_size,
                ..SsdOptions::default()
            };
            let (y, state) = truth(&input, &options);
            let out = ssd(input.clone(), &options);
            let what = format!("{shape:?}, chunk {chunk_size}");
            assert_close(&what, &values(&out.y), &y, 1e-12);
            assert_close(&what, &values(&out.final_state), &state, 1e-12);
        }
    }
}

#[test]
fn optional_operands_and_options_mean_what_the_recurrence_says() {
    let shape = shapes()[2];
    let whole = operands(shape, &device(20));
    let per_channel = normal([shape.heads, shape.headdim], &device(21));
    let bare = SsdInput {
        d: None,
        z: None,
        dt_bias: None,
        initial_state: None,
        ..whole.clone()
    };
    let limited = SsdOptions {
        dt_limit: (0.3, 0.9),
        ..SsdOptions::default()
    };
    let raw = SsdOptions {
        dt_softplus: false,
        ..SsdOptions::default()
    };
    let positive = SsdInput {
        dt: whole.dt.clone().abs(),
        dt_bias: None,
        ..whole.clone()
    };
    let channels = SsdInput {
        d: Some(per_channel.into()),
        ..whole.clone()
    };
    for (what, input, options) in [
        ("nothing optional", bare, SsdOptions::default()),
        ("D per channel", channels, SsdOptions::default()),
        ("dt_limit", whole, limited),
        ("no softplus", positive, raw),
    ] {
        let (y, state) = truth(&input, &options);
        let out = ssd(input, &options);
        assert_close(what, &values(&out.y), &y, 1e-12);
        assert_close(what, &values(&out.final_state), &state, 1e-12);
    }
}

#[test]
fn f32_is_as_good_as_f32_can_be_and_bf16_keeps_an_f32_state() {
    let input = operands(shapes()[5], &device(30));
    let (y, state) = truth(&input, &SsdOptions::default());
    for (dtype, tolerance) in [(FloatDType::F32, 2e-6), (FloatDType::BF16, 2e-2)] {
        let out = ssd(cast(&input, dtype), &SsdOptions::default());
        assert_eq!(out.y.dtype(), DType::from(dtype));
        assert_eq!(out.final_state.dtype(), DType::F32);
        assert_close("y", &values(&out.y), &y, tolerance);
        assert_close("state", &values(&out.final_state), &state, tolerance);
    }
}

fn cast(input: &SsdInput, to: FloatDType) -> SsdInput {
    let i = input.clone();
    SsdInput {
        x: i.x.cast(to),
        dt: i.dt.cast(to),
        a: i.a.cast(to),
        b: i.b.cast(to),
        c: i.c.cast(to),
        d: i.d.map(|d| match d {
            SkipWeight::PerHead(d) => d.cast(to).into(),
            SkipWeight::PerChannel(d) => d.cast(to).into(),
        }),
        z: i.z.map(|z| z.cast(to)),
        dt_bias: i.dt_bias.map(|t| t.cast(to)),
        initial_state: i.initial_state.map(|t| t.cast(to)),
    }
}

#[test]
fn a_sequence_split_anywhere_gives_the_same_output() {
    let shape = shapes()[4];
    let input = operands(shape, &device(40));
    let options = SsdOptions {
        chunk_size: 16,
        ..SsdOptions::default()
    };
    let whole = ssd(input.clone(), &options);
    for cut in [1, 15, 16, 17, 33, 64] {
        let part = |start: usize, length: usize, state: Option<Tensor<4>>| SsdInput {
            x: input.x.clone().narrow(1, start, length),
            dt: input.dt.clone().narrow(1, start, length),
            b: input.b.clone().narrow(1, start, length),
            c: input.c.clone().narrow(1, start, length),
            z: input.z.clone().map(|z| z.narrow(1, start, length)),
            initial_state: state,
            ..input.clone()
        };
        let first = ssd(part(0, cut, input.initial_state.clone()), &options);
        let rest = part(cut, shape.length - cut, Some(first.final_state));
        let second = ssd(rest, &options);
        let joined = Tensor::cat(vec![first.y, second.y], 1);
        assert_close("y", &values(&joined), &values(&whole.y), 1e-13);
        let state = values(&second.final_state);
        assert_close("state", &state, &values(&whole.final_state), 1e-13);
    }
}

/// A loss through both results, weighted at random.
fn loss(input: SsdInput, wy: &Tensor<4>, wh: &Tensor<4>) -> Tensor<1> {
    let options = SsdOptions {
        chunk_size: 8,
        ..SsdOptions::default()
    };
    let out = ssd(input, &options);
    (out.y * wy.clone()).sum() + (out.final_state * wh.clone()).sum()
}

#[test]
fn gradients_agree_with_finite_differences() {
    let plain = device(50);
    let shape = Shape {
        batch: 2,
        length: 21,
        heads: 4,
        headdim: 3,
        groups: 2,
        state: 5,
    };
    let input = operands(shape, &plain);
    let wy = normal(input.x.dims(), &plain);
    let wh = normal([2, 4, 3, 5], &plain);
    let scalar = |input: SsdInput| loss(input, &wy, &wh).into_scalar::<f64>();
    let (autodiff, tracked) = (plain.clone().autodiff(), |t: Tensor<4>| {
        t.autodiff().require_grad()
    });
    assert!(autodiff.is_autodiff());

    let d = match input.d.clone() {
        Some(SkipWeight::PerHead(d)) => d,
        _ => unreachable!("operands() makes a skip per head"),
    };
    let leaf = SsdInput {
        x: tracked(input.x.clone()),
        dt: input.dt.clone().autodiff().require_grad(),
        a: input.a.clone().autodiff().require_grad(),
        b: tracked(input.b.clone()),
        c: tracked(input.c.clone()),
        d: Some(d.clone().autodiff().require_grad().into()),
        z: input.z.clone().map(tracked),
        dt_bias: input.dt_bias.clone().map(|t| t.autodiff().require_grad()),
        initial_state: input.initial_state.clone().map(tracked),
    };
    let grads = loss(leaf.clone(), &wy.clone().autodiff(), &wh.clone().autodiff()).backward();
    let leaf_d = match leaf.d.clone() {
        Some(SkipWeight::PerHead(d)) => d,
        _ => unreachable!("made above"),
    };

    macro_rules! check {
        ($name:literal, $at:expr, $leaf:expr, |$moved:ident| $input:expr) => {
            assert_gradient($name, &$at, &$leaf.grad(&grads).expect($name), |$moved| {
                scalar($input)
            })
        };
    }
    let i = || input.clone();
    check!("x", input.x, leaf.x, |x| SsdInput { x, ..i() });
    check!("dt", input.dt, leaf.dt, |dt| SsdInput { dt, ..i() });
    check!("a", input.a, leaf.a, |a| SsdInput { a, ..i() });
    check!("b", input.b, leaf.b, |b| SsdInput { b, ..i() });
    check!("c", input.c, leaf.c, |c| SsdInput { c, ..i() });
    check!("d", d, leaf_d, |d| SsdInput {
        d: Some(d.into()),
        ..i()
    });
    let (z, leaf_z) = (input.z.clone().unwrap(), leaf.z.unwrap());
    check!("z", z, leaf_z, |z| SsdInput { z: Some(z), ..i() });
    let (bias, leaf_bias) = (input.dt_bias.clone().unwrap(), leaf.dt_bias.unwrap());
    check!("dt_bias", bias, leaf_bias, |t| SsdInput {
        dt_bias: Some(t),
        ..i()
    });
    let (h, leaf_h) = (
        input.initial_state.clone().unwrap(),
        leaf.initial_state.unwrap(),
    );
    check!("initial_state", h, leaf_h, |t| SsdInput {
        initial_state: Some(t),
        ..i()
    });
}

#[test]
fn the_largest_steps_and_rates_give_finite_results_and_gradients() {
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        let device = device(60).autodiff();
        let [b, l, h, p, n] = [1, 130, 2, 4, 4];
        let ramp = |low: f64, high: f64| uniform([b, l, h], (low, high), &device).cast(dtype);
        let dt = Tensor::cat(
            vec![ramp(-50.0, -49.0), ramp(49.0, 50.0), ramp(-50.0, 50.0)],
            1,
        );
        let x = normal([b, 3 * l, h, p], &device).cast(dtype).require_grad();
        let bc = || normal([b, 3 * l, 1, n], &device).cast(dtype).require_grad();
        let dt = dt.require_grad();
        let a = Tensor::<1>::from_floats([-100.0, -1e-3], &device)
            .cast(dtype)
            .require_grad();
        let input = SsdInput {
            x: x.clone(),
            dt: dt.clone(),
            a: a.clone(),
            b: bc(),
            c: bc(),
            d: None,
            z: None,
            dt_bias: None,
            initial_state: None,
        };
        let out = ssd(input, &SsdOptions::default());
        let grads = (out.y.clone().sum() + out.final_state.sum().cast(dtype)).backward();
        let finite = |what: &str, values: Vec<f64>| {
            let bad = values.iter().filter(|v| !v.is_finite()).count();
            assert_eq!(
                bad, 0,
                "{what} has {bad} values that are not finite in {dtype:?}"
            );
        };
        finite("y", values(&out.y.inner()));
        finite("gradient of dt", values(&dt.grad(&grads).unwrap()));
        finite("gradient of a", values(&a.grad(&grads).unwrap()));
        finite("gradient of x", values(&x.grad(&grads).unwrap()));
    }
}

#[test]
fn two_runs_are_bit_equal() {
    let input = cast(&operands(shapes()[5], &device(70)), FloatDType::F32);
    let run = || values(&ssd(input.clone(), &SsdOptions::default()).y);
    let (first, second) = (run(), run());
    assert_eq!(relative_l2(&first, &second), 0.0);
    assert!(first.iter().any(|v| *v != 0.0));
}

#[test]
#[should_panic(expected = "heads = 3 is not a multiple of groups = 2")]
fn groups_that_do_not_divide_the_heads_are_refused() {
    let shape = Shape {
        batch: 1,
        length: 4,
        heads: 3,
        headdim: 2,
        groups: 2,
        state: 2,
    };
    ssd(operands(shape, &device(80)), &SsdOptions::default());
}

#[test]
#[should_panic(expected = "initial_state has the shape on the left")]
fn a_state_of_another_batch_is_refused_by_name() {
    let device = device(81);
    let input = operands(shapes()[1], &device);
    let initial_state = Some(normal([5, 3, 16, 16], &device));
    ssd(
        SsdInput {
            initial_state,
            ..input
        },
        &SsdOptions::default(),
    );
}
