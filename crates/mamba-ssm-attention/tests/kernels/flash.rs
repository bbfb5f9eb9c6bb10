//! Flash attention against the operator in f64 on Flex (itself held against plain loops by the unit tests):
//! output and gradients, over shapes and options.

use burn::tensor::{Bool, DType, Device, Distribution, FloatDType, Tensor, TensorData};
use mamba_ssm_attention::{FlashAttentionOptions, flash_attention};

use crate::{Tested, devices, relative_l2, tolerance};

/// Batch, heads, key/value heads, length of queries, of keys, head size.
type Shape = [usize; 6];

struct Problem {
    shape: Shape,
    options: FlashAttentionOptions,
    padding: Option<Vec<bool>>,
    /// `q`, `k`, `v` and the gradient of the output, in f64 on Flex.
    tensors: [Tensor<4>; 4],
}

impl Problem {
    fn new(shape: Shape, options: FlashAttentionOptions, seed: u64) -> Self {
        let flex = Device::flex();
        flex.seed(seed);
        let [b, h, hk, lq, lk, d] = shape;
        let tensors = [[h, lq], [hk, lk], [hk, lk], [h, lq]].map(|[heads, length]| {
            let normal = Distribution::Normal(0.0, 1.0);
            Tensor::random([b, heads, length, d], normal, (&flex, DType::F64))
        });
        Self {
            shape,
            options,
            padding: None,
            tensors,
        }
    }

    /// Pads keys here and there, and every key of the last sequence of the batch.
    fn with_padding(mut self) -> Self {
        let [b, _, _, _, lk, _] = self.shape;
        let padded = |n: usize| (b > 1 && n / lk == b - 1) || n * 7919 % 11 < 3;
        self.padding = Some((0..b * lk).map(padded).collect());
        self
    }

    /// Output and gradients of `q`, `k` and `v`.
    fn solve(&self, device: &Device, dtype: FloatDType, rounded: FloatDType) -> [Vec<f64>; 4] {
        let device = device.clone().autodiff();
        let dtype = DType::from(dtype);
        let [q, k, v, dout] = &self.tensors;
        let [q, k, v, dout] = [q, k, v, dout].map(|x| {
            let data = x.clone().cast(rounded).to_data_dtype(dtype);
            Tensor::<4>::from_data(data, (&device, dtype)).require_grad()
        });
        let mut options = self.options.clone();
        if let Some(padding) = &self.padding {
            let data = TensorData::new(padding.clone(), [self.shape[0], self.shape[4]]);
            options.key_padding = Some(Tensor::<2, Bool>::from_data(data, &device));
        }
        let out = flash_attention(q.clone(), k.clone(), v.clone(), &options);
        assert_eq!(out.dtype(), dtype);
        let grads = (out.clone() * dout).sum().backward();
        let [dq, dk, dv] = [q, k, v].map(|x| x.grad(&grads).expect("a gradient"));
        [out, dq, dk, dv].map(|x| {
            let data = x.to_data_dtype(DType::F64);
            data.try_to_vec().expect("converted to f64")
        })
    }

    /// Asserts that every device with kernels finds what f64 finds.
    fn check(&self) {
        self.check_in(&[FloatDType::F32, FloatDType::BF16, FloatDType::F16]);
    }

    /// The same in some types alone: each has kernels of its own, and compiling them is what a test takes long
    /// for. Those of f16 and bf16 differ in a type's name and an approximation of the exponential.
    fn check_in(&self, types: &[FloatDType]) {
        for Tested {
            device,
            dtypes,
            tf32,
            widest,
        } in devices()
        {
            if self.shape[5] > widest {
                println!("skipped on {device:?}: a head wider than {widest}");
                continue;
            }
            for dtype in dtypes.into_iter().filter(|dtype| types.contains(dtype)) {
                let expected = self.solve(&Device::flex(), FloatDType::F64, dtype);
                let found = self.solve(&device, dtype, dtype);
                let (output, gradient) = match dtype {
                    // Wider heads of f32 have no kernel: their products are Burn's, with ten bits.
                    FloatDType::F32 if tf32 && self.shape[5] > 64 => (2e-3, 2e-3),
                    _ => tolerance(dtype),
                };
                let allowed = [output, gradient, gradient, gradient];
                for (n, name) in ["output", "dq", "dk", "dv"].into_iter().enumerate() {
                    let error = relative_l2(&found[n], &expected[n]);
                    let (shape, options) = (self.shape, &self.options);
                    assert!(
                        error <= allowed[n],
                        "{name} of {shape:?} {dtype:?} {options:?}, padding {}: {error:.2e}",
                        self.padding.is_some()
                    );
                }
            }
        }
    }
}

fn options(causal: bool) -> FlashAttentionOptions {
    FlashAttentionOptions {
        causal,
        ..Default::default()
    }
}

fn over_causal(shapes: &[Shape], types: &[FloatDType]) {
    for (seed, shape) in shapes.iter().enumerate() {
        for causal in [false, true] {
            let options = taking_turns(options(causal), seed + usize::from(causal));
            Problem::new(*shape, options, seed as u64).check_in(types);
        }
    }
}

/// Gradients that repeat to the bit have kernels of their own: both kinds in turn.
fn taking_turns(options: FlashAttentionOptions, turn: usize) -> FlashAttentionOptions {
    options.with_deterministic(turn.is_multiple_of(2))
}

#[test]
fn single_tokens_and_odd_heads() {
    over_causal(
        &[
            [1, 1, 1, 1, 1, 1],
            [2, 2, 2, 1, 1, 8],
            [1, 3, 3, 1, 37, 24],
            [1, 6, 2, 17, 19, 5],
            [1, 2, 1, 70, 33, 1],
        ],
        &[FloatDType::F32, FloatDType::BF16],
    );
}

#[test]
fn lengths_that_fill_no_tile() {
    over_causal(
        &[
            [2, 2, 1, 65, 65, 8],
            [1, 4, 2, 130, 130, 24],
            [2, 1, 1, 64, 128, 8],
            [1, 2, 2, 257, 257, 8],
            [1, 2, 1, 515, 700, 16],
        ],
        &[FloatDType::F32, FloatDType::BF16, FloatDType::F16],
    );
}

#[test]
fn wide_heads() {
    over_causal(
        &[
            [1, 1, 1, 140, 140, 64],
            [1, 4, 2, 300, 333, 64],
            [2, 2, 1, 129, 127, 40],
            [1, 2, 2, 33, 70, 128],
            [1, 1, 1, 200, 200, 104],
            [1, 1, 1, 3, 150, 256],
        ],
        &[FloatDType::F32, FloatDType::BF16],
    );
}

#[test]
fn scales_windows_padding_and_dropout() {
    let shape = [2, 4, 2, 75, 75, 8];
    let types = &[FloatDType::F32, FloatDType::BF16];
    for causal in [false, true] {
        let base = || options(causal);
        let all = [
            base().with_scale(-0.7),
            base().with_window(1),
            base().with_window(20).with_dropout(0.1, 12),
            base().with_dropout(0.3, 11),
        ];
        for (n, o) in all.into_iter().enumerate() {
            let turn = n + usize::from(causal);
            Problem::new(shape, taking_turns(o.clone(), turn), 3).check_in(types);
            Problem::new(shape, taking_turns(o, turn + 1), 4)
                .with_padding()
                .check_in(types);
        }
    }
}

#[test]
fn windows_padding_and_dropout_over_many_tiles() {
    // Wider than what the CPU runtime is tested with: for devices with matrix units, which take half precision.
    let types = &[FloatDType::BF16];
    for (n, dim) in [16, 64, 128].into_iter().enumerate() {
        for causal in [false, true] {
            let others = [
                options(causal).with_window(100),
                options(causal).with_window(33).with_dropout(0.2, 5),
                options(causal).with_dropout(0.1, 6),
            ];
            let o = others[(n + usize::from(causal)) % 3].clone();
            let turn = n + usize::from(causal);
            Problem::new([1, 2, 1, 391, 391, dim], taking_turns(o.clone(), turn), 9)
                .check_in(types);
            Problem::new([2, 2, 1, 300, 260, dim], taking_turns(o, turn + 1), 10)
                .with_padding()
                .check_in(types);
        }
    }
}

#[test]
fn queries_before_the_first_key_are_zero() {
    for causal in [false, true] {
        let o = options(causal).with_window(7);
        Problem::new([1, 2, 1, 90, 40, 8], o, 5).check();
    }
}

#[test]
fn large_scores_stay_finite() {
    for Tested { device, dtypes, .. } in devices() {
        for dtype in dtypes {
            let mut problem = Problem::new([1, 1, 1, 70, 70, 8], options(true), 8);
            // Scores of a few thousand; products of f16 stay within its range.
            for x in &mut problem.tensors[..2] {
                *x = x.clone() * 60.0;
            }
            let expected = problem.solve(&Device::flex(), FloatDType::F64, dtype);
            let found = problem.solve(&device, dtype, dtype);
            assert!(found.iter().flatten().all(|x| x.is_finite()), "{dtype:?}");
            // One key takes all: what is left is its value.
            assert!(relative_l2(&found[0], &expected[0]) < 2e-2, "{dtype:?}");
        }
    }
}

#[test]
fn a_run_repeats_to_the_bit() {
    for Tested { device, dtypes, .. } in devices() {
        for dtype in dtypes {
            let options = options(true).with_deterministic(true);
            let problem = Problem::new([2, 4, 2, 300, 300, 8], options, 13);
            let once = problem.solve(&device, dtype, dtype);
            for _ in 0..3 {
                assert_eq!(once, problem.solve(&device, dtype, dtype), "{dtype:?}");
            }
        }
    }
}
