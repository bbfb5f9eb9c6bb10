//! The operator against loops in f64, over shapes, options and dtypes.

mod plain;

use burn::backend::Dispatch;
use burn::tensor::{Bool, DType, Device, Tensor, TensorData};

use super::{FlashAttentionOptions, flash_attention, reference};
use plain::Problem;

/// Largest relative L2 errors of the output and of the gradients.
#[derive(Clone, Copy)]
struct Tolerances {
    output: f64,
    gradient: f64,
}

const F64: Tolerances = Tolerances {
    output: 1e-12,
    gradient: 1e-12,
};
const F32: Tolerances = Tolerances {
    output: 2e-6,
    gradient: 5e-6,
};
const BF16: Tolerances = Tolerances {
    output: 1e-2,
    gradient: 2e-2,
};

/// Output and gradients of `q`, `k` and `v`, from these and the gradient of the output.
type Solve = fn([Tensor<4>; 4], &FlashAttentionOptions) -> [Tensor<4>; 4];

/// The public function and Burn's autodiff.
fn operator([q, k, v, dout]: [Tensor<4>; 4], options: &FlashAttentionOptions) -> [Tensor<4>; 4] {
    let [q, k, v] = [q, k, v].map(Tensor::require_grad);
    let out = flash_attention(q.clone(), k.clone(), v.clone(), options);
    let grads = (out.clone() * dout).sum().backward();
    let [dq, dk, dv] = [q, k, v].map(|x| x.grad(&grads).unwrap());
    [out, dq, dk, dv]
}

/// The definition, differentiated by Burn's autodiff.
fn definition([q, k, v, dout]: [Tensor<4>; 4], options: &FlashAttentionOptions) -> [Tensor<4>; 4] {
    let spec = options.check(&q, &k, &v);
    let [q, k, v] = [q, k, v].map(Tensor::require_grad);
    let [a, b, c] = [&q, &k, &v].map(|x| x.clone().into_dispatch());
    let (out, _) = reference::forward::<Dispatch>(a, b, c, options.padding(), &spec);
    let out = Tensor::<4>::from_dispatch(out);
    let grads = (out.clone() * dout).sum().backward();
    let [dq, dk, dv] = [q, k, v].map(|x| x.grad(&grads).unwrap());
    [out, dq, dk, dv]
}

/// The definition's own backward pass.
fn by_hand(inputs: [Tensor<4>; 4], options: &FlashAttentionOptions) -> [Tensor<4>; 4] {
    let [q, k, v, dout] = inputs.map(Tensor::inner);
    let spec = options.check(&q, &k, &v);
    let mut options = options.clone();
    options.key_padding = options.key_padding.map(Tensor::inner);
    let [q, k, v, dout] = [q, k, v, dout].map(Tensor::into_dispatch);
    let (out, lse) =
        reference::forward::<Dispatch>(q.clone(), k.clone(), v.clone(), options.padding(), &spec);
    let tensors = [q, k, v, out.clone(), lse, dout];
    let (dq, dk, dv) = reference::backward::<Dispatch>(tensors, options.padding(), &spec);
    [out, dq, dk, dv].map(Tensor::from_dispatch)
}

fn tensor(values: &[f64], shape: [usize; 4], dtype: DType, device: &Device) -> Tensor<4> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().try_to_vec().unwrap()
}

fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let gap = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    let size = norm(&mut want.iter().copied());
    assert!(gap.is_finite(), "not a number in the result");
    if size == 0.0 { gap } else { gap / size }
}

/// Runs output and gradients by `solve` and compares them with the loops.
fn check(problem: &Problem, solve: Solve, dtype: DType, tolerances: Tolerances) {
    let device = Device::default().autodiff();
    // The loops start from the values the operator sees, rounded to its dtype.
    let mut problem = problem.clone();
    for values in [
        &mut problem.q,
        &mut problem.k,
        &mut problem.v,
        &mut problem.dout,
    ] {
        let n = values.len();
        *values = read(tensor(values, [1, 1, 1, n], dtype, &Device::default()));
    }
    let (q_shape, kv_shape) = (problem.q_shape(), problem.kv_shape());
    let inputs = [
        tensor(&problem.q, q_shape, dtype, &device),
        tensor(&problem.k, kv_shape, dtype, &device),
        tensor(&problem.v, kv_shape, dtype, &device),
        tensor(&problem.dout, q_shape, dtype, &device),
    ];
    let mut options = problem.options.clone();
    if let Some(padding) = &problem.padding {
        let mask = TensorData::new(padding.clone(), [kv_shape[0], kv_shape[2]]);
        options.key_padding = Some(Tensor::<2, Bool>::from_data(mask, &device));
    }
    let got = solve(inputs, &options);
    let want = problem.solve();
    let shapes = [q_shape, q_shape, kv_shape, kv_shape];
    let limits = [
        tolerances.output,
        tolerances.gradient,
        tolerances.gradient,
        tolerances.gradient,
    ];
    let names = ["output", "dq", "dk", "dv"];
    for (n, (got, want)) in got
        .into_iter()
        .zip([&want.out, &want.dq, &want.dk, &want.dv])
        .enumerate()
    {
        let name = names[n];
        assert_eq!(
            (got.dims(), got.dtype()),
            (shapes[n], dtype),
            "{name} of {problem}"
        );
        let (error, limit) = (relative_error(&read(got), want), limits[n]);
        assert!(
            error <= limit,
            "{name} of {problem}: {error:.2e} > {limit:.0e} ({dtype:?})"
        );
    }
}

fn options(causal: bool) -> FlashAttentionOptions {
    FlashAttentionOptions {
        causal,
        ..Default::default()
    }
}

/// Shapes: batch, heads, key/value heads, length_q, length_k, head_dim.
const SHAPES: [[usize; 6]; 12] = [
    [1, 1, 1, 1, 1, 1],
    [2, 2, 2, 1, 1, 8],
    [1, 3, 3, 1, 37, 24],
    [2, 2, 1, 65, 65, 8],
    [1, 4, 2, 130, 130, 24],
    [1, 1, 1, 200, 200, 64],
    [1, 2, 2, 33, 70, 128],
    [1, 2, 1, 70, 33, 1],
    [2, 1, 1, 64, 128, 8],
    [1, 6, 2, 17, 19, 5],
    [1, 1, 1, 3, 300, 256],
    [1, 2, 2, 257, 257, 8],
];

fn over_shapes(solve: Solve, dtype: DType, tolerances: Tolerances) {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for causal in [false, true] {
            check(
                &Problem::new(shape, options(causal), seed),
                solve,
                dtype,
                tolerances,
            );
        }
    }
}

fn over_options(solve: Solve, dtype: DType, tolerances: Tolerances) {
    let shape = [2, 4, 2, 75, 75, 8];
    for causal in [false, true] {
        let base = || options(causal);
        for o in [
            base().with_scale(0.7),
            base().with_scale(-2.0),
            base().with_window(1),
            base().with_window(10),
            base().with_window(usize::MAX),
            base().with_dropout(0.3, 11),
            base().with_window(20).with_dropout(0.1, 12),
        ] {
            check(&Problem::new(shape, o.clone(), 3), solve, dtype, tolerances);
            let padded = Problem::new(shape, o, 4).with_random_padding();
            check(&padded, solve, dtype, tolerances);
        }
        // Queries that stand before the first key, and every key of one sequence padded.
        let early = Problem::new([1, 2, 1, 90, 40, 8], base().with_window(7), 5);
        check(&early, solve, dtype, tolerances);
        let blind = Problem::new(shape, base(), 6).with_padded_sequence(1);
        check(&blind, solve, dtype, tolerances);
    }
}

#[test]
fn definition_equals_the_loops_in_f64() {
    for solve in [definition, by_hand] {
        over_shapes(solve, DType::F64, F64);
        over_options(solve, DType::F64, F64);
    }
}

#[test]
fn definition_equals_the_loops_in_bf16() {
    over_shapes(by_hand, DType::BF16, BF16);
}

#[test]
fn operator_equals_the_loops_in_f64() {
    over_shapes(operator, DType::F64, F64);
    over_options(operator, DType::F64, F64);
}

#[test]
fn operator_equals_the_loops_in_f32() {
    over_shapes(operator, DType::F32, F32);
    over_options(operator, DType::F32, F32);
}

#[test]
fn operator_equals_the_loops_in_bf16() {
    over_shapes(operator, DType::BF16, BF16);
    over_options(operator, DType::BF16, BF16);
}

#[test]
fn large_scores_do_not_overflow() {
    let scaled = |factor: f64| {
        let mut problem = Problem::new([1, 2, 2, 70, 70, 8], options(true), 8);
        for values in [&mut problem.q, &mut problem.k] {
            values.iter_mut().for_each(|v| *v *= factor);
        }
        problem
    };
    let limits = |output, gradient| Tolerances { output, gradient };
    // Scores near 50: rounding them is what limits f32.
    check(&scaled(4.0), operator, DType::F64, limits(1e-11, 1e-10));
    check(&scaled(4.0), operator, DType::F32, limits(1e-4, 1e-3));
    // Scores near 10^4: one key takes all, and the gradients of q and k are rounding, but finite.
    check(
        &scaled(100.0),
        operator,
        DType::F64,
        limits(1e-10, f64::MAX),
    );
    check(&scaled(100.0), operator, DType::F32, limits(1e-2, f64::MAX));
}

#[test]
fn a_row_without_keys_is_zero_and_passes_no_gradient() {
    let problem = Problem::new([1, 1, 1, 5, 3, 4], options(true), 9);
    let device = Device::default().autodiff();
    let q = tensor(&problem.q, problem.q_shape(), DType::F32, &device).require_grad();
    let k = tensor(&problem.k, problem.kv_shape(), DType::F32, &device);
    let v = tensor(&problem.v, problem.kv_shape(), DType::F32, &device);
    let out = flash_attention(q.clone(), k, v, &problem.options);
    let grads = out.clone().sum().backward();
    assert_eq!(read(out.slice_dim(2, 0..2)), [0.0; 8]);
    assert_eq!(read(q.grad(&grads).unwrap().slice_dim(2, 0..2)), [0.0; 8]);
}

#[test]
fn gradients_equal_finite_differences() {
    let problem = Problem::new([1, 2, 1, 9, 9, 4], options(true).with_dropout(0.2, 5), 10);
    let device = Device::default().autodiff();
    let shapes = [problem.q_shape(), problem.kv_shape(), problem.kv_shape()];
    let values = [&problem.q, &problem.k, &problem.v];
    let dout = tensor(&problem.dout, problem.q_shape(), DType::F64, &device);
    let loss = |which: usize, n: usize, nudge: f64| {
        let inputs: Vec<Tensor<4>> = (0..3)
            .map(|i| {
                let mut x = values[i].clone();
                if i == which {
                    x[n] += nudge;
                }
                tensor(&x, shapes[i], DType::F64, &device).require_grad()
            })
            .collect();
        let [q, k, v] = [0, 1, 2].map(|i| inputs[i].clone());
        let loss = (flash_attention(q, k, v, &problem.options) * dout.clone()).sum();
        (loss, inputs)
    };
    for which in 0..3 {
        let (value, inputs) = loss(which, 0, 0.0);
        let grad = read(inputs[which].grad(&value.backward()).unwrap());
        for n in (0..grad.len()).step_by(5) {
            let at = |nudge| read(loss(which, n, nudge).0)[0];
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!(
                (slope - grad[n]).abs() < 1e-8,
                "input {which}[{n}]: {slope} {}",
                grad[n]
            );
        }
    }
}

#[test]
fn views_of_token_major_projections_give_the_same() {
    let device = Device::default();
    let problem = Problem::new([2, 3, 3, 50, 50, 8], options(true), 13);
    let straight = |values: &[f64]| tensor(values, [2, 3, 50, 8], DType::F32, &device);
    // The same values laid out [batch, length, heads, head_dim] in memory.
    let view = |values: &[f64]| {
        let there = straight(values).swap_dims(1, 2).into_data();
        Tensor::<4>::from_data(there, &device).swap_dims(1, 2)
    };
    let (q, k, v) = (&problem.q, &problem.k, &problem.v);
    let a = flash_attention(straight(q), straight(k), straight(v), &problem.options);
    let b = flash_attention(view(q), view(k), view(v), &problem.options);
    assert_eq!(read(a), read(b));
}

#[test]
fn calls_that_do_not_fit_are_refused_with_the_shapes() {
    let device = Device::default();
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &device);
    let refused = |q: [usize; 4], k: [usize; 4], v: [usize; 4], o: FlashAttentionOptions| {
        let call = || flash_attention(zeros(q), zeros(k), zeros(v), &o);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).unwrap_err();
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
            .unwrap()
    };
    let ok = [2, 4, 6, 8];
    let words = |q, k, v| refused(q, k, v, FlashAttentionOptions::causal());
    assert!(words(ok, [2, 3, 6, 8], [2, 3, 6, 8]).contains("[2, 3, 6, 8]"));
    assert!(words(ok, [1, 4, 6, 8], [1, 4, 6, 8]).contains("same shape"));
    assert!(words(ok, [2, 4, 6, 7], [2, 4, 6, 7]).contains("head_dim"));
    assert!(words(ok, ok, [2, 4, 5, 8]).contains("[2, 4, 5, 8]"));
    assert!(words([1, 1, 2, 257], [1, 1, 2, 257], [1, 1, 2, 257]).contains("1 to 256"));
    let with = |o| refused(ok, ok, ok, o);
    let base = FlashAttentionOptions::causal;
    assert!(with(base().with_window(0)).contains("window of 0"));
    assert!(with(base().with_scale(f64::NAN)).contains("scale must be finite"));
    assert!(with(base().with_dropout(1.0, 0)).contains("[0, 1)"));
    let mask = Tensor::<2, Bool>::from_bool([[true, false]], &device);
    assert!(with(base().with_key_padding(mask)).contains("[2, 6], got [1, 2]"));
    let mixed = || flash_attention(zeros(ok).cast(DType::F64), zeros(ok), zeros(ok), &base());
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(mixed)).unwrap_err();
    assert!(
        panic
            .downcast_ref::<String>()
            .unwrap()
            .contains("one dtype")
    );
}
