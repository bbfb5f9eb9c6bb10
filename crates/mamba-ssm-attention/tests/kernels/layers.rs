//! Layers whose inner parts are operators of their own on devices with kernels: output and gradients against
//! those of Flex, where they are tensor operations.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, FloatDType, Gradients, Tensor, TensorData, bf16};
use mamba_ssm_attention::{
    Attention, AttentionConfig, Mlp, MlpConfig, RotaryStyle, Transformer, TransformerConfig,
};

use crate::{devices, relative_l2};

/// Devices have one stream of random numbers: while one test draws from it, and wants what it drew before, no
/// other may.
static DRAWING: Mutex<()> = Mutex::new(());

/// A layer on a device, its parameters numbers of their own.
fn filled<L: Module>(init: impl FnOnce(&Device) -> L, device: &Device) -> L {
    let layer = init(device);
    // What is drawn here is drawn now, and not when it is read.
    device.sync().expect("a device that works");
    layer.map(&mut Fill {
        start: 0,
        gamma: false,
    })
}

fn drawing() -> MutexGuard<'static, ()> {
    DRAWING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Numbers between -1 and 1, the same everywhere.
fn waves<const D: usize>(shape: [usize; D], start: usize, to: (&Device, DType)) -> Tensor<D> {
    changed_waves(shape, start, to, |wave| wave)
}

fn changed_waves<const D: usize>(
    shape: [usize; D],
    start: usize,
    to: (&Device, DType),
    change: impl Fn(f32) -> f32,
) -> Tensor<D> {
    let count = shape.iter().product::<usize>();
    let numbers: Vec<f32> = (start..start + count)
        .map(|n| change((n as f64 * n as f64 * 0.731).sin() as f32))
        .collect();
    let data = TensorData::new(numbers, shape).convert_dtype(to.1);
    Tensor::from_data(data, to)
}

/// Gives every parameter numbers of its own, small and of both signs: what one layer rounds must not grow in the next.
///
/// bf16 holds them, and a norm's weight times them, as they are. Matrix units round parameters of f32 to the type of the
/// tokens, as mixed precision does, which Flex does not, and such an error would be the same for all tokens.
struct Fill {
    start: usize,
    /// Whether the parameter is a norm's weight.
    gamma: bool,
}

impl ModuleMapper for Fill {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.gamma = name == "gamma";
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.start += 1000;
        let (start, gamma) = (self.start, self.gamma);
        param.map(|tensor| {
            let to = (&tensor.device(), tensor.dtype());
            let filled = changed_waves(tensor.dims(), start, to, |wave| match gamma {
                true => 2.0f32.powi(wave.round() as i32 - 1),
                false => bf16::from_f32(wave * 0.5).to_f32(),
            });
            filled.detach().require_grad()
        })
    }
}

/// Reads every parameter's gradient.
struct Read<'a>(&'a Gradients, Vec<Vec<f64>>);

impl ModuleVisitor for Read<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(self.0).expect("a gradient");
        self.1.push(values(gradient));
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    let data = tensor.to_data_dtype(DType::F64);
    data.try_to_vec().expect("converted to f64")
}

trait Layer: Module {
    fn run(&self, x: Tensor<3>) -> Tensor<3>;
}

impl Layer for Attention {
    fn run(&self, x: Tensor<3>) -> Tensor<3> {
        self.forward(x)
    }
}

impl Layer for Mlp {
    fn run(&self, x: Tensor<3>) -> Tensor<3> {
        self.forward(x)
    }
}

impl Layer for Transformer {
    fn run(&self, x: Tensor<3>) -> Tensor<3> {
        self.forward(x)
    }
}

/// The output, the gradient of x and those of the parameters; parameters in f32.
fn solve<L: Layer>(
    init: &dyn Fn(&Device) -> L,
    shape: [usize; 3],
    device: &Device,
    dtype: FloatDType,
) -> Vec<Vec<f64>> {
    let device = device.clone().autodiff();
    let layer = {
        let _drawing = drawing();
        filled(init, &device)
    };
    let dtype = DType::from(dtype);
    // Read first: what is read on CubeCL's CPU runtime shares memory that later operations may write to.
    let x = waves(shape, 7, (&device, dtype)).require_grad();
    let y = layer.run(x.clone());
    assert_eq!(y.dtype(), dtype);
    let weights = waves(shape, 5, (&device, dtype));
    let grads = (y.clone() * weights).sum().backward();
    let mut found = vec![values(y), values(x.grad(&grads).expect("dx"))];
    let mut read = Read(&grads, Vec::new());
    layer.visit(&mut read);
    found.extend(read.1);
    found
}

fn check<L: Layer>(what: &str, init: &dyn Fn(&Device) -> L, shape: [usize; 3]) {
    let expected = solve(init, shape, &Device::flex(), FloatDType::F32);
    for tested in devices() {
        // Kernels of f16 differ from those of bf16 in a type's name; compiling them takes most of the time.
        let types = tested.dtypes.into_iter();
        for dtype in types.filter(|dtype| *dtype != FloatDType::F16) {
            let found = solve(init, shape, &tested.device, dtype);
            // What rounding between a layer's parts does depends on the layer: as much as on Flex, twice over.
            let rounded = match dtype {
                FloatDType::F32 => expected.clone(),
                _ => solve(init, shape, &Device::flex(), dtype),
            };
            let least = match dtype {
                FloatDType::F32 if tested.tf32 => 5e-3,
                FloatDType::F32 => 1e-4,
                _ => 1e-2,
            };
            assert_eq!(found.len(), expected.len());
            for (n, found) in found.iter().enumerate() {
                let error = relative_l2(found, &expected[n]);
                let allowed = least + 2.0 * relative_l2(&rounded[n], &expected[n]);
                assert!(
                    error <= allowed,
                    "{what} {shape:?} {dtype:?} on {:?}, number {n}: {error:.2e} of {allowed:.2e}",
                    tested.device
                );
            }
        }
    }
}

#[test]
fn attention_layers() {
    let base = AttentionConfig::new(16, 2);
    for (what, config, shape) in [
        ("plain", base.clone(), [2, 65, 16]),
        ("one token", base.clone(), [1, 1, 16]),
        (
            "grouped keys",
            AttentionConfig::new(32, 4)
                .with_n_kv_heads(Some(2))
                .with_bias(true),
            [2, 31, 32],
        ),
        (
            "some features turned",
            base.clone().with_rotary_dim(Some(4)),
            [1, 33, 16],
        ),
        (
            "neighbours turned",
            base.clone().with_rotary_style(RotaryStyle::Interleaved),
            [1, 33, 16],
        ),
        (
            "odd heads, no turning",
            base.with_rotary(false).with_head_dim(Some(5)),
            [3, 17, 16],
        ),
    ] {
        check(what, &|device| config.init(device), shape);
    }
}

#[test]
fn feed_forward_parts() {
    for width in [3, 16] {
        let config = MlpConfig::new(width);
        check("mlp", &|device| config.init(device), [2, 37, width]);
    }
}

#[test]
fn transformers() {
    for (width, heads, window) in [(16, 2, None), (24, 3, Some(9))] {
        let config = TransformerConfig::new(width)
            .with_n_layers(2)
            .with_n_heads(heads)
            .with_window(window)
            .with_dropout(0.0);
        check("transformer", &|device| config.init(device), [2, 40, width]);
    }
}

#[test]
fn dropout_of_what_a_block_adds_is_drawn_anew_and_repeats_with_the_seed() {
    for tested in devices() {
        let device = tested.device.clone().autodiff();
        let config = TransformerConfig::new(16)
            .with_n_layers(1)
            .with_n_heads(2)
            .with_final_norm(false)
            .with_dropout(0.25);
        let _drawing = drawing();
        let model = filled(|device| config.init(device), &device);
        let x = waves([4, 250, 16], 3, (&device, DType::F32));
        let run = |seed| {
            device.seed(seed);
            values(model.forward(x.clone()))
        };
        let (once, again, other) = (run(1), run(1), run(2));
        assert_eq!(once, again, "on {:?}", tested.device);
        assert_ne!(once, other, "on {:?}", tested.device);

        // Where both parts were dropped, x is left: one element in sixteen.
        let x = values(x);
        let same = once.iter().zip(&x).filter(|(y, x)| y == x).count() as f64 / x.len() as f64;
        assert!(
            (same - 0.0625).abs() < 0.01,
            "{same} on {:?}",
            tested.device
        );
    }
}

/// The gradient of what is dropped is zero where its value was.
#[test]
fn dropout_keeps_its_mask_for_the_gradient() {
    for tested in devices() {
        let device = tested.device.clone().autodiff();
        let prob = 0.25;
        let config = TransformerConfig::new(16)
            .with_n_layers(1)
            .with_n_heads(2)
            .with_final_norm(false)
            .with_dropout(prob);
        let _drawing = drawing();
        let mut model = filled(|device| config.init(device), &device);
        // The second part adds its last bias alone, the first nothing: y - x is the mask times the bias, and
        // the bias's gradient the sum of the mask.
        let zero = |weight: Param<Tensor<2>>| weight.map(|w| w.zeros_like().require_grad());
        let block = &mut model.layers[0];
        block.mlp.down.weight = zero(block.mlp.down.weight.clone());
        block.attention.out.weight = zero(block.attention.out.weight.clone());
        let bias = block
            .mlp
            .down
            .bias
            .clone()
            .expect("the part has a bias")
            .val();

        let x = waves([4, 250, 16], 3, (&device, DType::F32));
        let y = model.forward(x.clone());
        let grads = y.clone().sum().backward();
        let gradient = values(bias.grad(&grads).expect("a gradient"));
        let (x, y, bias) = (values(x), values(y), values(bias));
        let mut sums = vec![0.0; 16];
        for (n, (y, x)) in y.iter().zip(&x).enumerate() {
            let factor = (y - x) / bias[n % 16];
            let kept = if factor.abs() < 1e-3 {
                0.0
            } else {
                1.0 / (1.0 - prob)
            };
            assert!(
                (factor - kept).abs() < 1e-3,
                "{factor} on {:?}",
                tested.device
            );
            sums[n % 16] += kept;
        }
        let kept = sums.iter().sum::<f64>() * (1.0 - prob) / y.len() as f64;
        assert!((kept - (1.0 - prob)).abs() < 0.02, "{kept} kept");
        assert!(
            relative_l2(&gradient, &sums) < 1e-3,
            "on {:?}",
            tested.device
        );
    }
}
