//! Sequences of 1,048,577 tokens in one call, on every device, and tensors of more than 2^32 elements on
//! accelerators.

use burn::tensor::{DType, Device, Tensor};
use mamba_ssm_core::{
    ConvInput, ScanInput, ScanOptions, SsdInput, SsdOptions, causal_conv1d, selective_scan, ssd,
};

use crate::kernels::devices;
use crate::support::{assert_close, normal, seed, uniform, values};

/// One more than a multiple of every chunk.
const LENGTH: usize = 1_048_577;

/// Where the sequence is cut: no multiple of a chunk, and near enough to the end for that to remember it.
const CUT: usize = LENGTH - 1500;

/// The last tokens, whose outputs depend on all before them.
const LAST: usize = 1000;

fn is_slow(device: &Device) -> bool {
    #[cfg(feature = "cpu")]
    return *device == Device::cpu();
    #[cfg(not(feature = "cpu"))]
    return {
        let _ = device;
        false
    };
}

/// Devices that run a million tokens in seconds: CubeCL's CPU runtime interprets too slowly for that.
fn fast_devices() -> Vec<Device> {
    let (skipped, devices) = devices()
        .into_iter()
        .map(|(device, _)| device)
        .partition::<Vec<_>, _>(is_slow);
    for device in skipped {
        println!("skipped on {device:?}: a million tokens take minutes there");
    }
    devices
}

/// On a device in f32, a leaf where the device keeps a graph.
fn to<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    let tensor = Tensor::from_data(tensor.to_data_dtype(DType::F32), (device, DType::F32));
    match device.is_autodiff() {
        true => tensor.require_grad(),
        false => tensor,
    }
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    to(&normal(shape, &Device::flex()), device)
}

/// Rates of decay so slow that a token a thousand steps back still counts.
fn slow_rates<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    to(&uniform(shape, (-2e-3, -1e-3), &Device::flex()), device)
}

#[test]
fn ssd_of_a_million_tokens() {
    for device in fast_devices() {
        seed(31);
        let device = device.autodiff();
        let input = SsdInput {
            x: random([1, LENGTH, 1, 4], &device),
            dt: random([1, LENGTH, 1], &device),
            a: slow_rates([1], &device),
            b: random([1, LENGTH, 1, 4], &device),
            c: random([1, LENGTH, 1, 4], &device),
            d: None,
            z: None,
            dt_bias: None,
            initial_state: None,
        };
        let options = SsdOptions::default();
        let whole = ssd(input.clone(), &options);
        let part = |start: usize, length: usize, state: Option<Tensor<4>>| SsdInput {
            x: input.x.clone().narrow(1, start, length),
            dt: input.dt.clone().narrow(1, start, length),
            b: input.b.clone().narrow(1, start, length),
            c: input.c.clone().narrow(1, start, length),
            initial_state: state,
            ..input.clone()
        };
        let first = ssd(part(0, CUT, None), &options);
        let second = ssd(
            part(CUT, LENGTH - CUT, Some(first.final_state.clone())),
            &options,
        );
        let tail = |y: Tensor<4>| {
            let length = y.dims()[1];
            y.narrow(1, length - LAST, LAST)
        };
        let (found, expected) = (tail(whole.y.clone()), tail(second.y.clone()));
        let what = format!("{device:?}");
        // f32 rounds once more where a chunk is cut.
        assert_close(&what, &values(&found), &values(&expected), 1e-4);
        // The state carries the gradient of the last tokens to those before the cut.
        let dx = |y: Tensor<4>| {
            let gradients = tail(y).sum().backward();
            let dx = input.x.grad(&gradients).expect("x is a leaf");
            values(&dx.narrow(1, CUT - LAST, 2 * LAST))
        };
        assert_close(&what, &dx(whole.y), &dx(second.y), 1e-4);
    }
}

#[test]
fn scans_of_a_million_tokens() {
    for device in fast_devices() {
        seed(32);
        let input = ScanInput {
            u: random([1, 2, LENGTH], &device),
            delta: random([1, 2, LENGTH], &device),
            a: slow_rates([2, 2], &device),
            b: random([1, 1, 2, LENGTH], &device),
            c: random([1, 1, 2, LENGTH], &device),
            d: None,
            z: None,
            delta_bias: None,
            initial_state: None,
        };
        let options = ScanOptions::default();
        let whole = selective_scan(input.clone(), &options);
        let part = |start: usize, length: usize, state: Option<Tensor<3>>| ScanInput {
            u: input.u.clone().narrow(2, start, length),
            delta: input.delta.clone().narrow(2, start, length),
            b: input.b.clone().narrow(3, start, length),
            c: input.c.clone().narrow(3, start, length),
            initial_state: state,
            ..input.clone()
        };
        let first = selective_scan(part(0, CUT, None), &options);
        let second = selective_scan(part(CUT, LENGTH - CUT, Some(first.final_state)), &options);
        let tail = |y: Tensor<3>| {
            let length = y.dims()[2];
            values(&y.narrow(2, length - LAST, LAST))
        };
        let what = format!("{device:?}");
        assert_close(&what, &tail(whole.y), &tail(second.y), 1e-4);
    }
}

#[test]
fn convolutions_of_a_million_tokens() {
    for device in fast_devices() {
        seed(33);
        let x = random([1, LENGTH, 4], &device);
        let input = ConvInput {
            x: x.clone(),
            weight: random([4, 4], &device),
            bias: None,
            initial_state: None,
            activation: true,
        };
        let whole = causal_conv1d(input.clone()).y;
        let last = causal_conv1d(ConvInput {
            x: x.narrow(1, LENGTH - LAST - 3, LAST + 3),
            ..input
        })
        .y;
        let found = values(&whole.narrow(1, LENGTH - LAST, LAST));
        assert_close(
            &format!("{device:?}"),
            &found,
            &values(&last.narrow(1, 3, LAST)),
            1e-6,
        );
    }
}

/// The operands of the last tokens lie past what 32 bits can index; the scan forgets so fast that those
/// tokens alone give the same outputs.
#[cfg(feature = "cuda")]
#[test]
fn ssd_of_more_than_4_billion_elements() {
    let (batch, heads, headdim, state) = (1, 66, 64, 16);
    const TILE: usize = 4096;
    let length = 256 * TILE;
    for device in fast_devices() {
        if !format!("{device:?}").contains("Cuda") {
            continue;
        }
        seed(34);
        let tile = |width: [usize; 2]| {
            let [first, second] = width;
            normal([batch, TILE, first, second], &Device::flex()).cast(DType::BF16)
        };
        let on = |tile: Tensor<4>, times: usize| {
            Tensor::<4>::from_data(tile.to_data(), (&device, DType::BF16)).repeat_dim(1, times)
        };
        let [x, b, c] = [tile([heads, headdim]), tile([1, state]), tile([1, state])];
        let run = |times: usize| {
            let [x, b, c] = [&x, &b, &c].map(|tile| on(tile.clone(), times));
            let dt = Tensor::<3>::full([batch, times * TILE, heads], 1.0, (&device, DType::BF16));
            let a = Tensor::<1>::full([heads], -4.0, &device);
            let options = SsdOptions::default();
            let y = ssd(
                SsdInput {
                    x,
                    dt,
                    a,
                    b,
                    c,
                    d: None,
                    z: None,
                    dt_bias: None,
                    initial_state: None,
                },
                &options,
            )
            .y;
            values(&y.narrow(1, (times - 1) * TILE + TILE - 64, 64))
        };
        assert!(length * heads * headdim > 1 << 32);
        // Equal up to the rounding of states far below it.
        assert_close("the last tokens", &run(256), &run(2), 1e-6);
    }
}
