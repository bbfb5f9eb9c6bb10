//! The loss of every forecaster case among the golden vectors.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_train::{HuberConfig, masked_huber, next_step};
use safetensors::SafeTensors;

fn folder() -> PathBuf {
    std::env::var_os("MAMBA_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
        PathBuf::from,
    )
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
    let config = HuberConfig {
        beta: 0.01,
        feature_weights: vec![1.0, 1.0, 1.0, 1.0, 0.25],
    };
    let mut cases = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "safetensors")
        {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for name in file.names() {
            let Some(case) = name.strip_suffix("/loss") else {
                continue;
            };
            let (prediction, target, mask) = next_step(
                tensor(&file, &format!("{case}/out")),
                tensor(&file, &format!("{case}/input")),
                tensor(&file, &format!("{case}/mask")),
            );
            let loss: f32 = masked_huber(prediction, target, mask, &config).into_scalar();
            let expected: f32 = tensor::<1>(&file, name).into_scalar();
            assert!(
                ((loss - expected) / expected).abs() < 1e-5,
                "{case}: {loss} instead of {expected}"
            );
            cases += 1;
        }
    }
    assert!(cases > 0, "no case with a loss in {}", folder().display());
}
