//! Named tensors and the file they live in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use thiserror::Error;

/// A checkpoint that cannot be read, written, or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file cannot be opened, read, written, or renamed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not safetensors, or is cut short.
    #[error("{}: not a whole safetensors file: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor has a type that holds no floating-point numbers.
    #[error("{}: tensor `{name}` has type {dtype}: expected F64, F32, F16 or BF16", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A parameter of the module is not in the checkpoint.
    #[error(
        "the checkpoint has no tensor `{name}` (shape {expected:?}): is it of another architecture?"
    )]
    Missing {
        /// The official name.
        name: String,
        /// The shape the module needs.
        expected: Vec<usize>,
    },
    /// A tensor of the checkpoint belongs to no parameter of the module.
    #[error(
        "the checkpoint has a tensor `{name}` that the module does not: is it of another architecture? \
         (`load_part` leaves such tensors alone)"
    )]
    Unexpected {
        /// The name in the checkpoint.
        name: String,
    },
    /// A tensor has another shape than the parameter.
    #[error(
        "tensor `{name}` has shape {found:?}, the module needs {expected:?}: is it of another architecture?"
    )]
    Shape {
        /// The official name.
        name: String,
        /// The shape in the checkpoint.
        found: Vec<usize>,
        /// The shape the module needs.
        expected: Vec<usize>,
    },
}

/// One tensor of a [`StateDict`], in the official layout.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// The sizes of its axes.
    pub shape: Vec<usize>,
    /// Its elements, row by row.
    pub values: Vec<f32>,
}

/// Tensors by name, as a checkpoint file holds them; kept in f32.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StateDict {
    tensors: BTreeMap<String, NamedTensor>,
}

impl StateDict {
    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&NamedTensor> {
        self.tensors.get(name)
    }

    /// Adds a tensor, replacing one of the same name.
    ///
    /// # Panics
    ///
    /// When the shape and the number of values disagree.
    pub fn insert(&mut self, name: impl Into<String>, tensor: NamedTensor) {
        let name = name.into();
        assert_eq!(
            tensor.shape.iter().product::<usize>(),
            tensor.values.len(),
            "tensor `{name}`: the shape {:?} does not hold the values given",
            tensor.shape
        );
        self.tensors.insert(name, tensor);
    }

    /// Takes a tensor out.
    pub fn remove(&mut self, name: &str) -> Option<NamedTensor> {
        self.tensors.remove(name)
    }

    /// Keeps the tensors whose names are `wanted` and drops the others.
    pub fn retain(&mut self, mut wanted: impl FnMut(&str) -> bool) {
        self.tensors.retain(|name, _| wanted(name));
    }

    /// Names and tensors, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &NamedTensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Reads a safetensors file; F64, F16 and BF16 become f32.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is no whole safetensors file, or holds a tensor of another type.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| io(path, source))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| format_error(path, &error))?;
        let mut dict = Self::default();
        for (name, view) in file.tensors() {
            let values = floats(&view).ok_or_else(|| CheckpointError::Type {
                path: path.to_owned(),
                name: name.clone(),
                dtype: format!("{:?}", view.dtype()),
            })?;
            let shape = view.shape().to_vec();
            dict.insert(name, NamedTensor { shape, values });
        }
        Ok(dict)
    }

    /// Writes a safetensors file in f32, beside `path` first and then renamed onto it.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written; `path` is then as it was.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let path = path.as_ref();
        let bytes: Vec<(&str, Vec<u8>)> = self
            .iter()
            .map(|(name, tensor)| {
                let bytes = tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                (name, bytes)
            })
            .collect();
        let views = bytes
            .iter()
            .zip(self.tensors.values())
            .map(|((name, bytes), tensor)| {
                TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map(|view| (*name, view))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format_error(path, &error))?;
        let file =
            safetensors::serialize(views, None).map_err(|error| format_error(path, &error))?;

        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = File::create(&beside)
            .and_then(|mut out| out.write_all(&file).and_then(|()| out.sync_all()))
            .and_then(|()| fs::rename(&beside, path));
        written.map_err(|source| {
            // The error to report is the first one; a leftover that cannot be removed adds nothing.
            let _ = fs::remove_file(&beside);
            io(path, source)
        })
    }

    /// `Err` unless `found` has the names of `self`, with the same shapes; it may have others.
    pub(super) fn check_against(&self, found: &StateDict) -> Result<(), CheckpointError> {
        for (name, expected) in self.iter() {
            let Some(tensor) = found.get(name) else {
                return Err(CheckpointError::Missing {
                    name: name.to_owned(),
                    expected: expected.shape.clone(),
                });
            };
            if tensor.shape != expected.shape {
                return Err(CheckpointError::Shape {
                    name: name.to_owned(),
                    found: tensor.shape.clone(),
                    expected: expected.shape.clone(),
                });
            }
        }
        Ok(())
    }
}

fn io(path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io {
        path: path.to_owned(),
        source,
    }
}

fn format_error(path: &Path, error: &dyn std::fmt::Display) -> CheckpointError {
    CheckpointError::Format {
        path: path.to_owned(),
        message: error.to_string(),
    }
}

/// The elements as f32, or none where the type is no floating-point one.
fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|c| read(*c)).collect()
    }
    let bytes = view.data();
    match view.dtype() {
        Dtype::F64 => Some(each::<8>(bytes, |b| f64::from_le_bytes(b) as f32)),
        Dtype::F32 => Some(each::<4>(bytes, f32::from_le_bytes)),
        Dtype::F16 => Some(each::<2>(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Some(each::<2>(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dict(entries: &[(&str, &[usize])]) -> StateDict {
        let mut dict = StateDict::default();
        for (name, shape) in entries {
            let values = (0..shape.iter().product()).map(|i| i as f32).collect();
            let shape = shape.to_vec();
            dict.insert(*name, NamedTensor { shape, values });
        }
        dict
    }

    #[test]
    fn a_file_reads_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let written = dict(&[("a.weight", &[2, 3]), ("b", &[4])]);
        written.write(&path).unwrap();
        assert_eq!(StateDict::read(&path).unwrap(), written);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn narrow_and_wide_floats_become_f32_and_integers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let half = bf16::from_f32(1.5).to_le_bytes();
        let wide = 2.25_f64.to_le_bytes();
        let views = [
            (
                "half",
                TensorView::new(Dtype::BF16, vec![1], &half).unwrap(),
            ),
            ("wide", TensorView::new(Dtype::F64, vec![1], &wide).unwrap()),
        ];
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let read = StateDict::read(&path).unwrap();
        assert_eq!(read.get("half").unwrap().values, [1.5]);
        assert_eq!(read.get("wide").unwrap().values, [2.25]);

        let integer = [(
            "count",
            TensorView::new(Dtype::I64, vec![1], &wide).unwrap(),
        )];
        fs::write(&path, safetensors::serialize(integer, None).unwrap()).unwrap();
        let error = StateDict::read(&path).unwrap_err().to_string();
        assert!(error.contains("`count` has type I64"), "{error}");
    }

    #[test]
    fn a_missing_or_cut_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let error = StateDict::read(&path).unwrap_err();
        assert!(matches!(error, CheckpointError::Io { .. }));
        assert!(error.to_string().contains("model.safetensors"));

        dict(&[("a", &[100])]).write(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
        let error = StateDict::read(&path).unwrap_err();
        assert!(matches!(error, CheckpointError::Format { .. }), "{error}");
    }

    #[test]
    fn another_architecture_is_named_by_its_first_difference() {
        let model = dict(&[("m.a", &[2, 3]), ("m.b", &[4])]);
        let check = |other: &[(&str, &[usize])]| {
            let error = model.check_against(&dict(other)).unwrap_err();
            error.to_string()
        };
        assert!(check(&[("m.a", &[2, 3])]).contains("no tensor `m.b`"));
        assert!(check(&[("m.a", &[3, 2]), ("m.b", &[4])]).contains("[3, 2]"));
        let more = dict(&[("m.a", &[2, 3]), ("m.b", &[4]), ("m.c", &[1])]);
        model.check_against(&more).unwrap();
    }

    #[test]
    fn tensors_are_taken_out_by_name() {
        let mut model = dict(&[("m.a", &[2, 3]), ("m.b", &[4]), ("head", &[1])]);
        assert_eq!(model.remove("head").unwrap().shape, [1]);
        assert!(model.remove("head").is_none());
        model.retain(|name| name.ends_with('b'));
        assert_eq!(model, dict(&[("m.b", &[4])]));
    }
}
