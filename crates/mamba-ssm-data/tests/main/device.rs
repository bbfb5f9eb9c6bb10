//! A series on the device gives the batches that the loader gives.

use burn::tensor::Device;
use mamba_ssm_data::{
    Dataset, GapPolicy, LoaderOptions, PrepareOptions, Resident, Split, WindowOptions, prepare,
};

use crate::support::{candle_rows, candles, folder, small_windows, write};

/// Candles with a hole, filled: the mask is not all ones.
fn data() -> (tempfile::TempDir, Dataset) {
    let dir = folder();
    let csv = write(
        dir.path(),
        "c.csv",
        candles(1000).replace(&candle_rows(100..102), ""),
    );
    let windows = WindowOptions {
        gaps: GapPolicy::Fill { limit: 3 },
        ..small_windows()
    };
    let out = dir.path().join("set");
    prepare(&PrepareOptions::new(csv, &out).with_windows(windows)).unwrap();
    (dir, Dataset::open(out).unwrap())
}

fn on_device(data: &Dataset) -> Resident {
    Resident::new(data, usize::MAX, &Device::default())
        .unwrap()
        .unwrap()
}

#[test]
fn batches_of_the_device_are_those_of_the_loader() {
    let (_dir, data) = data();
    let resident = on_device(&data);
    let base = LoaderOptions::new(8).shuffled(3).with_epoch(2);
    for (split, options) in [
        (Split::Train, base.clone()),
        (Split::Train, base.clone().skipping(5).limited(9)),
        (Split::Train, base.clone().sharded(1, 3).with_workers(2, 1)),
        (Split::Validation, LoaderOptions::new(5)),
        (Split::Test, base.dropping_last()),
    ] {
        let mut host = data.loader(split, &options).unwrap();
        let mut device = resident.batches(split, &options).unwrap();
        assert_eq!(
            (device.len(), device.batches()),
            (host.len(), host.batches())
        );
        let mut masked = 0;
        while let Some(batch) = host.next() {
            let (batch, found) = (batch.unwrap(), device.next().unwrap());
            assert_eq!(device.position(), host.position());
            assert_eq!(found.starts, batch.starts);
            assert_eq!(
                found.values.dims(),
                [batch.batch, batch.length, batch.features]
            );
            let values: Vec<f32> = found.values.into_data().try_into_vec().unwrap();
            let mask: Vec<f32> = found.mask.into_data().try_into_vec().unwrap();
            assert!(values == batch.values, "{split}");
            assert!(mask == batch.mask, "{split}");
            masked += mask.iter().filter(|&&m| m == 0.0).count();
        }
        assert!(device.next().is_none());
        if split == Split::Train && options.world == 1 && options.skip == 0 {
            assert!(masked > 0, "no filled row came by");
        }
    }
}

#[test]
fn what_does_not_fit_stays_away() {
    let (_dir, data) = data();
    let bytes = Resident::bytes(&data);
    assert_eq!(bytes, 1000 * 24);
    let device = Device::default();
    assert!(Resident::new(&data, bytes - 1, &device).unwrap().is_none());
    assert!(Resident::new(&data, bytes, &device).unwrap().is_some());
}

#[test]
fn windows_behind_the_end_are_refused() {
    let (_dir, data) = data();
    let resident = on_device(&data);
    assert!(resident.gather(vec![0, 984]).is_ok());
    for starts in [vec![0, 985], vec![u64::MAX]] {
        let message = resident.gather(starts).unwrap_err().to_string();
        assert!(message.contains("ends behind row 1000"), "{message}");
    }
    let message = resident.gather(Vec::new()).unwrap_err().to_string();
    assert!(message.contains("at least one window"), "{message}");
}
