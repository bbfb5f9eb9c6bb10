//! The data pipeline: a file to shards, a shard set to its first batch, windows a second.
//!
//! `MAMBA_BENCH_CSV` names a file of candles to use; without it half a million made-up minutes are.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

use burn::tensor::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use mamba_ssm_data::{Dataset, LoaderOptions, PrepareOptions, Resident, Split, prepare};

/// Windows of a batch.
const BATCH: usize = 32;

fn source(folder: &std::path::Path) -> PathBuf {
    if let Some(path) = std::env::var_os("MAMBA_BENCH_CSV") {
        return path.into();
    }
    let path = folder.join("market.csv");
    write_csv(&path, &generate(&MarketConfig::new(500_000))).expect("a writable folder");
    path
}

fn data(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let csv = source(dir.path());
    let set = dir.path().join("set");
    let options = PrepareOptions::new(&csv, &set);
    // Also where a filter leaves the first benchmark out.
    prepare(&options).expect("a good source");

    let mut group = c.benchmark_group("data");
    let bytes = csv.metadata().expect("the source").len();
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("prepare", |bench| {
        bench.iter(|| prepare(&options).expect("a good source"));
    });

    group.throughput(Throughput::Elements(BATCH as u64));
    let loading = LoaderOptions::new(BATCH).shuffled(1);
    group.bench_function("open and first batch", |bench| {
        bench.iter(|| {
            let data = Dataset::open(&set).expect("a set");
            let mut loader = data.loader(Split::Train, &loading).expect("windows");
            black_box(loader.next().expect("a batch").expect("rows"))
        });
    });

    let data = Dataset::open(&set).expect("a set");
    let mut epoch = 0;
    let mut loader = None;
    group.bench_function("batch of shuffled windows from shards", |bench| {
        bench.iter(|| {
            loop {
                let batches = loader.get_or_insert_with(|| {
                    epoch += 1;
                    let options = loading.clone().with_epoch(epoch);
                    data.loader(Split::Train, &options).expect("windows")
                });
                match batches.next() {
                    Some(batch) => break black_box(batch.expect("rows")),
                    None => loader = None,
                }
            }
        });
    });

    let device = Device::default();
    let resident = Resident::new(&data, usize::MAX, &device)
        .expect("rows")
        .expect("no limit");
    let starts: Vec<u64> = data.starts(Split::Train)[..BATCH].to_vec();
    group.bench_function("batch gathered on the device", |bench| {
        bench.iter(|| {
            let batch = resident.gather(starts.clone()).expect("windows");
            device.sync().expect("a device that works");
            batch
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = data
}
criterion_main!(benches);
