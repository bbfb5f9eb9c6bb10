//! Results of the official package in float64 (`tests/golden/README.md`), case by case.
//!
//! The folder is `MAMBA_GOLDEN_DIR`, by default `tests/golden`. Every case of every `*.safetensors` file in it
//! is run, whatever the file is called: what a case is about is read from the tensors it has, and a case that
//! is about nothing known is a failure.

mod blocks;
mod operators;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_core::{NamedTensor, StateDict};

/// Relative L2 norm allowed on outputs and states, in f32.
pub const OUTPUT: f64 = 1e-4;
/// Relative L2 norm allowed on gradients, in f32.
pub const GRADIENT: f64 = 1e-3;

/// What a case is about. Each has a test of its own, which runs all cases of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaseKind {
    SelectiveScan,
    Ssd,
    Layer,
    Forecaster,
}

/// The tensors of one case, by name.
pub struct Case {
    /// File and name.
    pub name: String,
    tensors: BTreeMap<String, NamedTensor>,
    /// The names that a test has asked for.
    used: RefCell<BTreeSet<String>>,
}

/// Runs `check` on every case of a kind, and asserts that it looked at every gradient the case states.
pub fn for_each(kind: CaseKind, check: impl Fn(&Case)) {
    let cases = cases_of(read_folder(&golden_folder()), kind);
    // Another folder may hold a few kinds alone; that it holds something is tested below.
    assert!(
        !cases.is_empty() || std::env::var_os("MAMBA_GOLDEN_DIR").is_some(),
        "tests/golden holds no case of the kind {kind:?}"
    );
    for case in &cases {
        check(case);
        case.assert_gradients_used();
    }
    println!("{} cases of the kind {kind:?}", cases.len());
}

fn golden_folder() -> PathBuf {
    match std::env::var_os("MAMBA_GOLDEN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(
            std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into()),
        )
        .join("golden"),
    }
}

/// Every case of every file, in the order of their names.
fn read_folder(folder: &Path) -> Vec<Case> {
    let entries = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("golden vectors: {}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a folder that can be listed").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    let cases: Vec<Case> = paths.iter().flat_map(|path| read_file(path)).collect();
    assert!(
        !cases.is_empty(),
        "golden vectors: {} holds no case in a .safetensors file",
        folder.display()
    );
    cases
}

fn read_file(path: &Path) -> Vec<Case> {
    let dict = StateDict::read(path).unwrap_or_else(|error| panic!("golden vectors: {error}"));
    let file = path.file_name().expect("a file").to_string_lossy();
    let mut cases: BTreeMap<&str, BTreeMap<String, NamedTensor>> = BTreeMap::new();
    for (key, tensor) in dict.iter() {
        let (case, name) = key
            .split_once('/')
            .unwrap_or_else(|| panic!("{file}: `{key}` is not `case/tensor`"));
        let case = cases.entry(case).or_default();
        case.insert(name.to_owned(), tensor.clone());
    }
    let case = |(name, tensors)| Case::new(format!("{file}: {name}"), tensors);
    cases.into_iter().map(case).collect()
}

/// The cases of one kind; the kinds of all of them are asked for, so that none is passed over.
fn cases_of(cases: Vec<Case>, kind: CaseKind) -> Vec<Case> {
    cases.into_iter().filter(|c| c.kind() == kind).collect()
}

impl Case {
    fn new(name: String, tensors: BTreeMap<String, NamedTensor>) -> Self {
        Self {
            name,
            tensors,
            used: RefCell::default(),
        }
    }

    /// What the case is about.
    fn kind(&self) -> CaseKind {
        let all = |names: &[&str]| names.iter().all(|name| self.tensors.contains_key(*name));
        if all(&["param.input_projection.weight", "input"]) {
            CaseKind::Forecaster
        } else if all(&["param.in_proj.weight", "input"]) {
            CaseKind::Layer
        } else if all(&["u", "delta", "A", "B", "C"]) {
            CaseKind::SelectiveScan
        } else if all(&["x", "dt", "A", "B", "C"]) {
            CaseKind::Ssd
        } else {
            let names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            panic!(
                "golden vectors: no test knows what case {} is about: it holds {}",
                self.name,
                names.join(", ")
            )
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn named(&self, name: &str) -> &NamedTensor {
        self.used.borrow_mut().insert(name.to_owned());
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("case {} has no tensor {name}", self.name))
    }

    /// The axes of a tensor.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.named(name).shape
    }

    pub fn scalar(&self, name: &str) -> f32 {
        self.named(name).values[0]
    }

    /// A flag that is not set where the case is silent.
    pub fn flag(&self, name: &str) -> bool {
        self.has(name) && self.scalar(name) != 0.0
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
                self.used.borrow_mut().insert(name.clone());
                dict.insert(rest, tensor.clone());
            }
        }
        dict
    }

    /// The case as if it did not have these tensors.
    pub fn without(&self, names: &[&str]) -> Self {
        let mut tensors = self.tensors.clone();
        tensors.retain(|name, _| !names.contains(&name.as_str()));
        Self::new(self.name.clone(), tensors)
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

    /// As [`assert_close`](Self::assert_close), where the case has that tensor.
    pub fn assert_close_if<const D: usize>(&self, name: &str, found: Tensor<D>, tolerance: f64) {
        if self.has(name) {
            self.assert_close(name, found, tolerance);
        }
    }

    /// Asserts that values agree within a relative L2 norm, and says how well they do.
    pub fn assert_values(&self, name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
        let error = relative_l2(found, expected);
        println!("{:>40} {name:<40} {error:.2e}", self.name);
        assert!(
            error <= tolerance,
            "case {}: {name} is off by {error:.3e} (relative L2), allowed {tolerance:.0e}",
            self.name
        );
    }

    /// A gradient under a name that the test does not know must not pass unseen.
    fn assert_gradients_used(&self) {
        let used = self.used.borrow();
        let unseen = self
            .tensors
            .keys()
            .find(|name| name.starts_with("grad") && !used.contains(*name));
        assert_eq!(unseen, None, "case {}: a gradient of what?", self.name);
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

#[test]
fn golden_cases_are_all_of_a_known_kind() {
    let cases = read_folder(&golden_folder());
    for case in &cases {
        println!("{:>40} {:?}", case.name, case.kind());
    }
}

/// A folder with one file of these tensors, all of one element.
fn folder_with(file: &str, keys: &[&str]) -> tempfile::TempDir {
    let mut dict = StateDict::default();
    for key in keys {
        let (shape, values) = (vec![1], vec![1.0]);
        dict.insert(*key, NamedTensor { shape, values });
    }
    let folder = tempfile::tempdir().expect("a folder for the test");
    dict.write(folder.path().join(file)).expect("a golden file");
    folder
}

#[test]
fn golden_files_of_any_name_are_read() {
    let keys = [
        "one/u",
        "one/delta",
        "one/A",
        "one/B",
        "one/C",
        "two/x",
        "two/dt",
    ];
    let more = [
        "two/A",
        "two/B",
        "two/C",
        "three/input",
        "three/param.in_proj.weight",
    ];
    let folder = folder_with(
        "something_new.safetensors",
        &[&keys[..], &more[..]].concat(),
    );
    let cases = read_folder(folder.path());
    let kinds: Vec<CaseKind> = cases.iter().map(Case::kind).collect();
    assert_eq!(
        kinds,
        [CaseKind::SelectiveScan, CaseKind::Layer, CaseKind::Ssd]
    );
    assert_eq!(cases[0].name, "something_new.safetensors: one");
    assert_eq!(cases_of(cases, CaseKind::Ssd).len(), 1);
}

#[test]
#[should_panic(
    expected = "no test knows what case extra.safetensors: mamba3 is about: it holds y, z"
)]
fn golden_cases_that_nobody_knows_fail_by_name() {
    let folder = folder_with("extra.safetensors", &["mamba3/y", "mamba3/z"]);
    cases_of(read_folder(folder.path()), CaseKind::Layer);
}

#[test]
#[should_panic(expected = "holds no case")]
fn golden_folders_without_a_case_fail() {
    let folder = folder_with("notes.txt", &["one/u"]);
    read_folder(folder.path());
}
