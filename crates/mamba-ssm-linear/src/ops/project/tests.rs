//! The operator against loops in f64, on every device that the features give.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::project;

/// Every device compiled in, by name. CUDA is left out, with a word, where there is none.
fn devices() -> Vec<(&'static str, Device)> {
    let cuda: Option<(&'static str, Device)> = None;
    #[cfg(feature = "cuda")]
    let cuda = if Device::enumerate(burn::tensor::DeviceType::Cuda).is_empty() {
        println!("no CUDA device: its tests are skipped");
        cuda
    } else {
        Some(("cuda", Device::cuda(0)))
    };
    let devices = [
        #[cfg(feature = "flex")]
        ("flex", Device::flex()),
        #[cfg(feature = "cpu")]
        ("cpu", Device::cpu()),
    ];
    devices.into_iter().chain(cuda).collect()
}

/// Numbers in [-1, 1) from a seed.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

/// One projection and the gradient of its result.
#[derive(Clone)]
struct Problem {
    tokens: usize,
    d_input: usize,
    d_output: usize,
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    dy: Vec<f64>,
    /// Type of weight and bias, where it is another than that of x.
    parameters: Option<DType>,
}

/// The result and the gradients of `x`, the weight and the bias.
type Solution = [Vec<f64>; 4];

impl Problem {
    fn new([tokens, d_input, d_output]: [usize; 3], bias: bool, dtype: DType) -> Self {
        let seed = (tokens * 31 + d_input * 7 + d_output) as u64;
        // Rounded, so that the loops start from what the operator sees.
        let draw = |count, n| round(&numbers(count, seed + n), dtype);
        Self {
            tokens,
            d_input,
            d_output,
            x: draw(tokens * d_input, 1),
            weight: draw(d_input * d_output, 2),
            bias: bias.then(|| draw(d_output, 3)),
            dy: draw(tokens * d_output, 4),
            parameters: None,
        }
    }

    /// With parameters in f32, as mixed precision keeps them.
    fn mixed(self) -> Self {
        Self {
            parameters: Some(DType::F32),
            ..self
        }
    }

    fn forward(&self) -> Vec<f64> {
        let mut y = match &self.bias {
            Some(bias) => bias.repeat(self.tokens),
            None => vec![0.0; self.tokens * self.d_output],
        };
        for (x, y) in self
            .x
            .chunks_exact(self.d_input)
            .zip(y.chunks_exact_mut(self.d_output))
        {
            for (x, weight) in x.iter().zip(self.weight.chunks_exact(self.d_output)) {
                y.iter_mut().zip(weight).for_each(|(y, w)| *y += x * w);
            }
        }
        y
    }

    fn solve(&self) -> Solution {
        let mut dx = vec![0.0; self.x.len()];
        let mut dweight = vec![0.0; self.weight.len()];
        let mut dbias = vec![0.0; self.d_output];
        for token in 0..self.tokens {
            let dy = &self.dy[token * self.d_output..][..self.d_output];
            dbias.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            for i in 0..self.d_input {
                let row = i * self.d_output..(i + 1) * self.d_output;
                let at = token * self.d_input + i;
                dx[at] = dy
                    .iter()
                    .zip(&self.weight[row.clone()])
                    .map(|(a, b)| a * b)
                    .sum();
                for (sum, dy) in dweight[row].iter_mut().zip(dy) {
                    *sum += self.x[at] * dy;
                }
            }
        }
        [self.forward(), dx, dweight, dbias]
    }

    /// `sum(y dy)`, whose gradients the operator's are.
    fn loss(&self) -> f64 {
        self.forward()
            .iter()
            .zip(&self.dy)
            .map(|(y, dy)| y * dy)
            .sum()
    }

    fn run(&self, device: &Device, dtype: DType) -> Solution {
        let device = device.clone().autodiff();
        let own = self.parameters.unwrap_or(dtype);
        let x = tensor(&self.x, [self.tokens, self.d_input], dtype, &device).require_grad();
        let weight =
            tensor(&self.weight, [self.d_input, self.d_output], own, &device).require_grad();
        let bias = self
            .bias
            .as_ref()
            .map(|bias| tensor(bias, [self.d_output], own, &device).require_grad());
        let dy = tensor(&self.dy, [self.tokens, self.d_output], dtype, &device);
        let y = project(x.clone(), weight.clone(), bias.clone());
        let grads = (y.clone() * dy).sum().backward();
        let dbias = bias.map_or(Vec::new(), |bias| read(bias.grad(&grads).unwrap()));
        let dweight = weight.grad(&grads).unwrap();
        assert_eq!((y.dtype(), dweight.dtype()), (dtype, own));
        [read(y), read(x.grad(&grads).unwrap()), read(dweight), dbias]
    }

    fn check(&self, name: &str, device: &Device, dtype: DType) {
        // A sum over tokens whose terms cancel keeps fewer of f32's digits.
        let limit = if dtype == DType::F32 { 3e-5 } else { 6e-3 };
        self.check_within(limit, name, device, dtype);
    }

    fn check_within(&self, limit: f64, name: &str, device: &Device, dtype: DType) {
        let mut want = self.solve();
        if self.bias.is_none() {
            want[3].clear();
        }
        let got = self.run(device, dtype);
        let what = ["y", "dx", "dweight", "dbias"];
        for ((got, want), what) in got.iter().zip(&want).zip(what) {
            let error = relative_error(got, want);
            assert!(
                error < limit,
                "{name} {dtype:?}: {what} of {} x {} x {}, bias {}: off by {error:e}",
                self.tokens,
                self.d_input,
                self.d_output,
                self.bias.is_some(),
            );
        }
    }
}

fn tensor<const D: usize>(
    values: &[f64],
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().try_to_vec().unwrap()
}

fn round(values: &[f64], dtype: DType) -> Vec<f64> {
    let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
    data.convert::<f64>().try_to_vec().unwrap()
}

fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let gap = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    let size = norm(&mut want.iter().copied());
    assert!(gap.is_finite(), "not a number in the result");
    if size == 0.0 { gap } else { gap / size }
}

/// Every shape of the note's model, and those at the edges of tiles, slices and vectors.
const SIZES: [[usize; 2]; 12] = [
    [64, 656],
    [256, 64],
    [5, 64],
    [64, 5],
    [1, 1],
    [1, 16],
    [16, 1],
    [243, 16],
    [16, 243],
    [65, 63],
    [144, 136],
    [656, 100],
];

const TOKENS: [usize; 10] = [1, 2, 63, 64, 65, 127, 131, 257, 1000, 1021];

fn check_sizes(dtype: DType) {
    for (name, device) in devices() {
        for (n, tokens) in TOKENS.into_iter().enumerate() {
            for (m, [d_input, d_output]) in SIZES.into_iter().enumerate() {
                // Kernels run slowly on a CPU: there, a third of the pairs.
                if name == "cpu" && (n + m) % 3 != 0 {
                    continue;
                }
                let bias = (n + m) % 2 == 0;
                Problem::new([tokens, d_input, d_output], bias, dtype).check(name, &device, dtype);
            }
        }
    }
}

#[test]
fn f32_equals_the_loops_at_every_size() {
    check_sizes(DType::F32);
}

#[test]
fn bf16_equals_the_loops_at_every_size() {
    check_sizes(DType::BF16);
}

#[test]
fn f16_equals_the_loops() {
    for (name, device) in devices() {
        let problem = Problem::new([300, 64, 80], true, DType::F16);
        problem.check(name, &device, DType::F16);
    }
}

#[test]
fn half_precision_with_parameters_in_f32_equals_the_loops() {
    for (name, device) in devices() {
        for (dtype, bias) in [
            (DType::BF16, true),
            (DType::BF16, false),
            (DType::F16, true),
        ] {
            for [d_input, d_output] in [[64, 80], [64, 656], [5, 64], [64, 5]] {
                let problem = Problem::new([300, d_input, d_output], bias, dtype);
                problem.mixed().check(name, &device, dtype);
            }
        }
    }
}

#[test]
fn many_slices_equal_the_loops() {
    for (name, device) in devices() {
        for dtype in [DType::F32, DType::BF16] {
            Problem::new([20_011, 24, 40], true, dtype).check(name, &device, dtype);
        }
    }
}

#[test]
fn many_tokens_equal_the_loops() {
    for (name, device) in devices() {
        let sizes = [
            [64, 656],
            [24, 40],
            [256, 64],
            [64, 256],
            [136, 8],
            [8, 136],
        ];
        for (n, [d_input, d_output]) in sizes.into_iter().enumerate() {
            let problem = Problem::new([4_111, d_input, d_output], n % 2 == 0, DType::BF16);
            problem.clone().check(name, &device, DType::BF16);
            problem.mixed().check(name, &device, DType::BF16);
            // Kernels run slowly on a CPU.
            if name == "cpu" {
                break;
            }
        }
    }
}

#[test]
fn weights_past_the_kernels_limit_equal_the_loops() {
    for (name, device) in devices() {
        // Burn tunes its products there for a minute.
        if name == "cpu" {
            continue;
        }
        // Burn's product rounds f32 operands to the 10 bits of TF32 on CUDA: 2.6e-4 on an H100.
        let limit = if name == "cuda" { 1e-3 } else { 3e-5 };
        Problem::new([40, 513, 520], true, DType::F32).check_within(
            limit,
            name,
            &device,
            DType::F32,
        );
    }
}

#[test]
fn gradients_are_the_differences_of_the_loss() {
    // The loss is linear in each operand, so a difference of any size is exact but for rounding.
    let problem = Problem::new([7, 5, 3], true, DType::F32);
    let slope = |change: &dyn Fn(&mut Problem, f64)| {
        let at = |step| {
            let mut changed = problem.clone();
            change(&mut changed, step);
            changed.loss()
        };
        (at(0.5) - at(-0.5)) / 1.0
    };
    let dx: Vec<f64> = (0..problem.x.len())
        .map(|n| slope(&|problem, step| problem.x[n] += step))
        .collect();
    let dweight: Vec<f64> = (0..problem.weight.len())
        .map(|n| slope(&|problem, step| problem.weight[n] += step))
        .collect();
    let dbias: Vec<f64> = (0..problem.d_output)
        .map(|n| slope(&|problem, step| problem.bias.as_mut().unwrap()[n] += step))
        .collect();
    for (name, device) in devices() {
        let got = problem.run(&device, DType::F32);
        for (got, want) in got[1..].iter().zip([&dx, &dweight, &dbias]) {
            assert!(relative_error(got, want) < 2e-6, "{name}");
        }
    }
}

#[test]
fn two_runs_are_equal_to_the_last_bit() {
    for (name, device) in devices() {
        for dtype in [DType::F32, DType::BF16] {
            let problem = Problem::new([1500, 24, 40], true, dtype);
            let first = problem.run(&device, dtype);
            assert!(first == problem.run(&device, dtype), "{name} {dtype:?}");
        }
    }
}

#[test]
fn operands_need_not_be_contiguous() {
    for (name, device) in devices() {
        for dtype in [DType::F32, DType::BF16] {
            let problem = Problem::new([70, 16, 24], false, dtype);
            let device = device.clone().autodiff();
            // Rows of x lie in a wider matrix, the weight's lie across, and the gradient of the result is
            // one number.
            let wide = Tensor::cat(
                vec![
                    tensor(&problem.dy, [70, 24], dtype, &device),
                    tensor(&problem.x, [70, 16], dtype, &device),
                ],
                1,
            );
            let weight = tensor(&problem.weight, [16, 24], dtype, &device);
            let across = weight.transpose().require_grad();
            let x = wide.require_grad();
            let rows = x.clone().slice([0..70, 24..40]);
            let y = project(rows, across.clone().transpose(), None);
            let grads = y.clone().sum().backward();
            let want = Problem {
                dy: vec![1.0; 70 * 24],
                ..problem
            }
            .solve();
            let limit = if dtype == DType::F32 { 2e-6 } else { 6e-3 };
            let dx = x.grad(&grads).unwrap().slice([0..70, 24..40]);
            let dweight = across.grad(&grads).unwrap().transpose();
            for (got, want) in [read(y), read(dx), read(dweight)].iter().zip(&want) {
                assert!(relative_error(got, want) < limit, "{name} {dtype:?}");
            }
        }
    }
}

#[test]
fn a_gradient_is_had_for_each_operand_alone() {
    for (name, device) in devices() {
        let problem = Problem::new([33, 8, 12], true, DType::F32);
        let want = problem.solve();
        let device = device.autodiff();
        let bias = problem.bias.as_ref().unwrap();
        for tracked in 0..3 {
            let mut x = tensor(&problem.x, [33, 8], DType::F32, &device);
            let mut weight = tensor(&problem.weight, [8, 12], DType::F32, &device);
            let mut bias = tensor(bias, [12], DType::F32, &device);
            match tracked {
                0 => x = x.require_grad(),
                1 => weight = weight.require_grad(),
                _ => bias = bias.require_grad(),
            }
            let dy = tensor(&problem.dy, [33, 12], DType::F32, &device);
            let y = project(x.clone(), weight.clone(), Some(bias.clone()));
            let grads = (y * dy).sum().backward();
            let got = [
                x.grad(&grads).map(read),
                weight.grad(&grads).map(read),
                bias.grad(&grads).map(read),
            ];
            for (n, got) in got.iter().enumerate() {
                assert_eq!(
                    got.is_some(),
                    n == tracked,
                    "{name}: gradient {n} of {tracked}"
                );
                if let Some(got) = got {
                    assert!(relative_error(got, &want[n + 1]) < 2e-6, "{name}: {n}");
                }
            }
        }
    }
}

#[test]
fn a_million_tokens_are_reached() {
    for (name, device) in devices() {
        if name != "cuda" {
            continue;
        }
        let (tokens, d_input, d_output) = (1 << 20, 64, 656);
        let tail = Problem::new([100, d_input, d_output], false, DType::BF16);
        let dtype = DType::BF16;
        let device = device.autodiff();
        let weight = tensor(&tail.weight, [d_input, d_output], dtype, &device).require_grad();
        let zeros = Tensor::<2>::zeros([tokens - 100, d_input], (&device, dtype));
        let x = Tensor::cat(
            vec![zeros, tensor(&tail.x, [100, d_input], dtype, &device)],
            0,
        );
        let zeros = Tensor::<2>::zeros([tokens - 100, d_output], (&device, dtype));
        let dy = Tensor::cat(
            vec![zeros, tensor(&tail.dy, [100, d_output], dtype, &device)],
            0,
        );
        let y = project(x.require_grad(), weight.clone(), None);
        let got = read(y.clone().slice([tokens - 100..tokens, 0..d_output]));
        let want = tail.solve();
        assert!(relative_error(&got, &want[0]) < 6e-3);
        let grads = (y * dy).sum().backward();
        let dweight = read(weight.grad(&grads).unwrap());
        assert!(relative_error(&dweight, &want[2]) < 6e-3);
    }
}

#[test]
#[should_panic(expected = "one dtype")]
fn parameters_narrower_than_x_are_refused() {
    let device = Device::default();
    let x = Tensor::<2>::zeros([4, 3], (&device, DType::F32));
    let weight = Tensor::<2>::zeros([3, 2], (&device, DType::BF16));
    project(x, weight, None);
}

#[test]
#[should_panic(expected = "d_output = 2")]
fn a_bias_of_another_width_is_refused() {
    let device = Device::default();
    let weight = Tensor::<2>::zeros([3, 2], &device);
    project(
        Tensor::<2>::zeros([4, 3], &device),
        weight,
        Some(Tensor::zeros([3], &device)),
    );
}

#[test]
fn no_tokens_give_no_rows_and_no_gradient() {
    for (name, device) in devices() {
        if name == "flex" {
            let x = Tensor::<2>::zeros([0, 3], &device);
            let y = project(
                x,
                Tensor::ones([3, 2], &device),
                Some(Tensor::ones([2], &device)),
            );
            assert_eq!(y.dims(), [0, 2], "{name}");
        }
    }
}
