//! What the benchmarks share. Each measures the default device of the features it was built with: an
//! accelerator where there is one.

#[cfg(feature = "cubek")]
pub mod cubek;

use std::cell::OnceCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion};

/// Memory of results goes back and forth at every call: this one keeps it, where the system's would take it back and
/// bring it in again page by page.
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whether the default device is an accelerator: sizes that suit one would take minutes on a CPU.
pub const ACCELERATOR: bool = cfg!(any(
    feature = "cuda",
    feature = "rocm",
    feature = "metal",
    feature = "vulkan",
    feature = "wgpu"
));

/// bf16 on an accelerator that has it, else f32.
pub fn dtype(device: &Device) -> DType {
    if ACCELERATOR && device.supports_dtype(DType::BF16) {
        DType::BF16
    } else {
        DType::F32
    }
}

/// Batch, heads, length and head_dim of the benchmarks of attention.
pub const ATTENTION: [[usize; 4]; 3] = if ACCELERATOR {
    [[32, 8, 2048, 8], [32, 8, 2048, 64], [4, 16, 8192, 64]]
} else {
    [[1, 8, 2048, 8], [1, 8, 2048, 64], [1, 1, 8192, 64]]
};

/// Of what is drawn: the time of some work depends on its numbers.
const SEED: u64 = 1;

/// Waits for the device, so that a timing is of the work and not of its submission.
///
/// # Panics
///
/// When the device reports an error.
pub fn finish(device: &Device) {
    device.sync().expect("the device works");
}

/// Random inputs in the type of [`dtype`].
pub fn draw<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    leaf(Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), device).cast(dtype(device)))
}

/// A leaf of the graph, where the device keeps one.
pub fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.device().is_autodiff() {
        tensor.detach().require_grad()
    } else {
        tensor
    }
}

/// The time of `calls` runs of `work`, all of them finished.
///
/// Calls are queued one behind the other and waited for together, as in the stack of a model: what a
/// call costs the device, or the host where that is slower.
pub fn queue<T>(device: &Device, calls: u64, work: impl Fn() -> T) -> Duration {
    finish(device);
    let start = Instant::now();
    for _ in 0..calls {
        black_box(work());
    }
    finish(device);
    start.elapsed()
}

/// What the device's allocator holds, where it says. It keeps what it once needed, so that after work of one
/// kind this is the greatest need of that work, padding and gaps included.
pub fn held_mebibytes(device: &Device) -> Option<f64> {
    let usage = device.memory_pool_usage()?;
    Some(usage.bytes_reserved as f64 / f64::from(1 << 20))
}

/// Times `run` on plain tensors, and with its gradients on tracked ones (those of the sum of what it
/// returns). `inputs` draws what is passed.
pub fn both<I: Clone, const D: usize>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    inputs: impl Fn(&Device) -> I,
    run: impl Fn(I) -> Tensor<D>,
) {
    let device = Device::default();
    let tracked = device.clone().autodiff();
    // Drawn when first timed: a filter may leave a benchmark out.
    let plain = OnceCell::new();
    group.bench_function(format!("{name}/forward"), |bench| {
        let plain = plain.get_or_init(|| {
            device.seed(SEED);
            let plain = inputs(&device);
            // Compiles the kernels: a first call of seconds would leave one call to a sample.
            queue(&device, 3, || run(plain.clone()));
            plain
        });
        bench.iter_custom(|calls| queue(&device, calls, || run(plain.clone())));
    });
    if plain.into_inner().is_some() {
        finish(&device);
        device.memory_cleanup();
    }
    let leaves = OnceCell::new();
    group.bench_function(format!("{name}/forward and backward"), |bench| {
        let leaves = leaves.get_or_init(|| {
            tracked.seed(SEED);
            let leaves = inputs(&tracked);
            queue(&device, 3, || run(leaves.clone()).backward());
            leaves
        });
        bench.iter_custom(|calls| queue(&device, calls, || run(leaves.clone()).backward()));
    });
    if let (Some(_), Some(held)) = (leaves.get(), held_mebibytes(&device)) {
        println!("{name}/memory: {held:.0} MiB");
    }
}

/// Settings of all groups.
pub fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
}
