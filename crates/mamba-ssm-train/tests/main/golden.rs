//! The loss of every forecaster case among the golden vectors.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_train::{HuberConfig, masked_huber, next_step};
use safetensors::SafeTensors;

/// The folder that `MAMBA_GOLDEN_DIR` names, or the workspace's; none in a published crate, which has no
/// workspace around it.
fn folder() -> Option<PathBuf> {
    let workspace = || {
        let folder = PathBuf::from(
            std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into()),
        )
        .join("../../tests/golden");
        folder.is_dir().then_some(folder)
    };
    std::env::var_os("MAMBA_GOLDEN_DIR").map_or_else(workspace, |folder| Some(folder.into()))
}

fn tensor<const D: usize>(file: &SafeTensors<'_>, name: &str) -> Tensor<D> {
    let view = file.tensor(name).unwrap();
    let (chunks, _) = view.data().as_chunks::<4>();
    let values: Vec<f32> = chunks.iter().map(|c| f32::from_le_bytes(*c)).collect();
    Tensor::from_data(
        TensorData::new(values, view.shape().to_vec()),
        &Device::default(),
    )
}

#[test]
fn golden_loss() {
    let Some(folder) = folder() else {
        println!("skipped: no golden vectors here; MAMBA_GOLDEN_DIR names a folder with some");
        return;
    };
    let entries = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    let cases: usize = files.map(|path| check_file(&path)).sum();
    println!("{cases} cases with a loss in {}", folder.display());
    assert!(
        cases > 0 || std::env::var_os("MAMBA_GOLDEN_DIR").is_some(),
        "no case with a loss in {}",
        folder.display()
    );
}

/// The number of cases with a loss.
fn check_file(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let cases: Vec<String> = file
        .names()
        .into_iter()
        .filter_map(|name| name.strip_suffix("/loss"))
        .map(str::to_owned)
        .collect();
    cases.iter().for_each(|case| check_loss(&file, case));
    cases.len()
}

fn check_loss(file: &SafeTensors<'_>, case: &str) {
    let config = HuberConfig {
        beta: 0.01,
        feature_weights: vec![1.0, 1.0, 1.0, 1.0, 0.25],
    };
    let (prediction, target, mask) = next_step(
        tensor(file, &format!("{case}/out")),
        tensor(file, &format!("{case}/input")),
        tensor(file, &format!("{case}/mask")),
    );
    let loss: f32 = masked_huber(prediction, target, mask, &config).into_scalar();
    let expected: f32 = tensor::<1>(file, &format!("{case}/loss")).into_scalar();
    assert!(
        ((loss - expected) / expected).abs() < 1e-5,
        "{case}: {loss} instead of {expected}"
    );
}
