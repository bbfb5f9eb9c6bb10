//! Random operands, relative errors, finite differences.

use std::cell::Cell;
use std::f64::consts::TAU;

use burn::tensor::{DType, Device, Tensor, TensorData};

thread_local! {
    /// The random stream of a test. A device has one for all tests, which run side by side: what one of them drew
    /// would depend on the others.
    static STREAM: Cell<u64> = const { Cell::new(0) };
}

/// Starts the test's random stream, and the device's, from which layers draw their parameters.
pub fn seed(seed: u64) {
    STREAM.set(seed << 32);
    Device::flex().seed(seed);
}

/// The device under test, with random streams of their own.
pub fn device(start: u64) -> Device {
    seed(start);
    Device::flex()
}

/// The next number of the stream, uniform and above zero (SplitMix64).
fn draw() -> f64 {
    let state = STREAM.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    STREAM.set(state);
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1u64 << 53) as f64
}

fn drawn<const D: usize>(
    shape: [usize; D],
    device: &Device,
    number: impl Fn() -> f64,
) -> Tensor<D> {
    let numbers: Vec<f64> = (0..shape.iter().product()).map(|_| number()).collect();
    Tensor::from_data(TensorData::new(numbers, shape), (device, DType::F64))
}

/// Normal numbers in f64.
pub fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    drawn(shape, device, || {
        (-2.0 * draw().ln()).sqrt() * (TAU * draw()).cos()
    })
}

/// Uniform numbers in f64.
pub fn uniform<const D: usize>(
    shape: [usize; D],
    (low, high): (f64, f64),
    device: &Device,
) -> Tensor<D> {
    drawn(shape, device, || low + (high - low) * draw())
}

/// All elements, row by row.
pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor
        .to_data_dtype(DType::F64)
        .try_to_vec::<f64>()
        .expect("converted to f64")
}

/// `|found - expected| / |expected|` in the L2 norm; infinite where something is NaN.
pub fn relative_l2(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |v: f64| v * v;
    let off: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    let size: f64 = expected.iter().copied().map(square).sum();
    let error = (off / size.max(1e-300)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Asserts a relative L2 error.
pub fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    let error = relative_l2(found, expected);
    assert!(
        error <= tolerance,
        "{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
    );
}

/// Central differences of `loss` at `at`, along a few elements spread over it, against `gradient`.
pub fn assert_gradient<const D: usize>(
    what: &str,
    at: &Tensor<D>,
    gradient: &Tensor<D>,
    loss: impl Fn(Tensor<D>) -> f64,
) {
    let h = 1e-6;
    let (start, gradient) = (values(at), values(gradient));
    let shifted = |index: usize, by: f64| {
        let mut moved = start.clone();
        moved[index] += by;
        loss(Tensor::from_data(
            TensorData::new(moved, at.dims()),
            (&at.device(), DType::F64),
        ))
    };
    let stride = (start.len() / 7).max(1);
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for index in (0..start.len()).step_by(stride) {
        expected.push((shifted(index, h) - shifted(index, -h)) / (2.0 * h));
        found.push(gradient[index]);
    }
    // Central differences in f64 are good to about h^2 + epsilon / h.
    assert_close(&format!("gradient of {what}"), &found, &expected, 1e-6);
}

/// `log(1 + e^x)`.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `x / (1 + e^-x)`.
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
