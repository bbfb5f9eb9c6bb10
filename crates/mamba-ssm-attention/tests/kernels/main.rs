//! Every device's own implementation against Flex. Devices are those that the features compile in; one that
//! is not there is skipped with a printed reason.

mod flash;
mod layers;

use burn::tensor::{Device, FloatDType};

/// A device with kernels.
struct Tested {
    device: Device,
    dtypes: Vec<FloatDType>,
    /// Whether Burn's own matrix products of f32 round to ten bits.
    tf32: bool,
    /// The widest head tested: CubeCL's CPU runtime takes half a minute to compile the kernels of a wide
    /// one, whose code differs from that of a narrow one in nothing but the length of its loops.
    widest: usize,
}

fn devices() -> Vec<Tested> {
    #[allow(unused_mut)]
    let mut devices: Vec<Tested> = [
        #[cfg(feature = "cpu")]
        Tested {
            device: Device::cpu(),
            dtypes: vec![FloatDType::F32],
            tf32: false,
            widest: 8,
        },
    ]
    .into_iter()
    .collect();
    #[cfg(feature = "cuda")]
    if Device::enumerate(burn::tensor::DeviceType::Cuda).is_empty() {
        println!("skipped on CUDA: no such device");
    } else {
        devices.push(Tested {
            device: Device::cuda(0),
            dtypes: vec![FloatDType::F32, FloatDType::BF16, FloatDType::F16],
            tf32: true,
            widest: usize::MAX,
        });
    }
    if devices.is_empty() {
        println!("skipped: built without a feature whose devices have kernels");
    }
    devices
}

/// Relative errors allowed for output and gradients.
fn tolerance(dtype: FloatDType) -> (f64, f64) {
    match dtype {
        FloatDType::F32 => (5e-6, 2e-5),
        // Weights and their gradients are rounded to the type before the second product, and the result
        // after it: a few units of 2^-9, and of 2^-12.
        FloatDType::BF16 => (1e-2, 1e-2),
        _ => (2e-3, 2e-3),
    }
}

/// Infinite where something is not a number; absolute where nothing but zero is expected.
fn relative_l2(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let off: f64 = found
        .iter()
        .zip(expected)
        .map(|(f, e)| (f - e).powi(2))
        .sum();
    let size: f64 = expected.iter().map(|e| e * e).sum();
    let error = if size == 0.0 {
        off.sqrt()
    } else {
        (off / size).sqrt()
    };
    if error.is_nan() { f64::INFINITY } else { error }
}
