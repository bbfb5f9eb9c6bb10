//! Results of the official package in float64 (`tests/golden/README.md`), case by case.
//!
//! The folder is `MAMBA_GOLDEN_DIR`, by default `tests/golden`; every case a file holds is run.

mod blocks;
mod operators;

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_core::{NamedTensor, StateDict};

/// Relative L2 norm allowed on outputs and states, in f32.
pub const OUTPUT: f64 = 1e-4;
/// Relative L2 norm allowed on gradients, in f32.
pub const GRADIENT: f64 = 1e-3;

/// The tensors of one case, by name.
pub struct Case {
    pub name: String,
    tensors: BTreeMap<String, NamedTensor>,
}

/// Every case of a file, in the order of their names.
pub fn cases(file: &str) -> Vec<Case> {
    let folder = match std::env::var_os("MAMBA_GOLDEN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden"),
    };
    let path = folder.join(file);
    let dict = StateDict::read(&path).unwrap_or_else(|error| panic!("golden vectors: {error}"));
    let mut cases: BTreeMap<String, BTreeMap<String, NamedTensor>> = BTreeMap::new();
    for (key, tensor) in dict.iter() {
        let (case, name) = key.split_once('/').expect("keys are `case/tensor`");
        let case = cases.entry(case.to_owned()).or_default();
        case.insert(name.to_owned(), tensor.clone());
    }
    assert!(!cases.is_empty(), "{} holds no cases", path.display());
    cases
        .into_iter()
        .map(|(name, tensors)| Case { name, tensors })
        .collect()
}

impl Case {
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn named(&self, name: &str) -> &NamedTensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("case {} has no tensor {name}", self.name))
    }

    pub fn scalar(&self, name: &str) -> f32 {
        self.named(name).values[0]
    }

    /// A size of the configuration, if the case states it.
    pub fn size(&self, name: &str) -> Option<usize> {
        self.has(name).then(|| self.scalar(name) as usize)
    }

    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let named = self.named(name);
        let data = TensorData::new(named.values.clone(), named.shape.clone());
        Tensor::from_data(data, device)
    }

    /// An operand, tracked, where the case has it.
    pub fn operand<const D: usize>(&self, name: &str, device: &Device) -> Option<Tensor<D>> {
        self.has(name).then(|| self.need(name, device))
    }

    /// The names below `prefix`, the prefix taken off.
    pub fn below(&self, prefix: &str) -> StateDict {
        let mut dict = StateDict::default();
        for (name, tensor) in &self.tensors {
            if let Some(rest) = name.strip_prefix(prefix) {
                dict.insert(rest, tensor.clone());
            }
        }
        dict
    }

    /// An operand, tracked, that every case must have.
    pub fn need<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        self.tensor(name, device).require_grad()
    }

    /// Asserts that `found` is the case's tensor `name`, within a relative L2 norm.
    pub fn assert_close<const D: usize>(&self, name: &str, found: Tensor<D>, tolerance: f64) {
        let shape = found.dims();
        let found = found.into_data().convert::<f32>();
        let found = found.try_to_vec::<f32>().expect("converted to f32");
        let expected = self.named(name);
        assert_eq!(
            shape.to_vec(),
            expected.shape,
            "case {}: shape of {name}",
            self.name
        );
        self.assert_values(name, &found, &expected.values, tolerance);
    }

    /// Asserts that values agree within a relative L2 norm, and says how well they do.
    pub fn assert_values(&self, name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
        let error = relative_l2(found, expected);
        println!("{:>24} {name:<40} {error:.2e}", self.name);
        assert!(
            error <= tolerance,
            "case {}: {name} is off by {error:.3e} (relative L2), allowed {tolerance:.0e}",
            self.name
        );
    }
}

fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let squared = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = squared(
        &mut found
            .iter()
            .zip(expected)
            .map(|(f, e)| f64::from(*f) - f64::from(*e)),
    );
    let size = squared(&mut expected.iter().map(|e| f64::from(*e)));
    // NaN must not pass as "not larger than".
    let error = (difference / size.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}
