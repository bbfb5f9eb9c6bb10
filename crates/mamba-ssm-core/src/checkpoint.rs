//! The official parameter names and layouts, as safetensors, in and out.
//!
//! A type lists its parameters once, by official name, in [`Checkpoint::parameters`]; reading, writing,
//! and naming gradients all follow from that list. PyTorch keeps a projection as `[out, in]` and a
//! depthwise convolution as `[channels, 1, width]`: the list says which parameter is which, and the
//! layout is converted on the way.
//!
//! # A part of a published checkpoint
//!
//! A language model has more in its checkpoint than its layers: an embedding, a head. What is loaded is
//! compared with the whole checkpoint by default ([`Checkpoint::load_state_dict`]), so that a wrong
//! file is noticed; [`Checkpoint::load_part`] takes a module's own parameters and lists what it left.
//!
//! ```
//! use burn::tensor::Device;
//! use mamba_ssm_core::{Checkpoint, Mamba2Config, MambaStackConfig, NamedTensor, StateDict};
//!
//! let layer = Mamba2Config::new(32).with_headdim(16).with_d_state(16);
//! let config = MambaStackConfig::new(layer.into(), 2).with_residual(true);
//! let mut stack = config.init(&Device::default());
//! # let mut dict = config.init(&Device::default()).state_dict("backbone.");
//! # let embedding = NamedTensor { shape: vec![10, 32], values: vec![0.5; 320] };
//! # dict.insert("backbone.embedding.weight", embedding.clone());
//! # dict.insert("lm_head.weight", embedding);
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.safetensors");
//! # dict.write(&path)?;
//!
//! let mut dict = StateDict::read(path)?; // backbone.layers.0.mixer.in_proj.weight, ...
//! let left = stack.load_part("backbone.", &dict)?;
//! assert_eq!(left, ["backbone.embedding.weight"]);
//!
//! // Or take the rest out, and have what remains compared name by name.
//! let embedding = dict.remove("backbone.embedding.weight").expect("a language model");
//! assert_eq!(embedding.shape[1], 32);
//! stack.load_state_dict("backbone.", &dict)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod state_dict;

use burn::module::Param;
use burn::tensor::{DType, Gradients, Tensor, TensorData};
use mamba_ssm_linear::Linear;

pub use state_dict::{CheckpointError, NamedTensor, StateDict};

/// A module whose parameters have official names.
///
/// ```
/// use burn::tensor::Device;
/// use mamba_ssm_core::{Checkpoint, Mamba2Config, StateDict};
///
/// let device = Device::default();
/// let config = Mamba2Config::new(32).with_headdim(16).with_d_state(16);
/// let layer = config.init(&device);
/// let dict = layer.state_dict("mixer.");
/// assert!(dict.get("mixer.A_log").is_some());
///
/// let mut other = config.init(&device);
/// other.load_state_dict("mixer.", &dict).unwrap();
/// assert_eq!(other.state_dict("mixer."), dict);
/// ```
pub trait Checkpoint: Clone {
    /// Shows every parameter to `visit`, under its official name.
    fn parameters(&mut self, visit: &mut Parameters<'_>);

    /// The parameters, in the official layouts, `prefix` before each name.
    fn state_dict(&self, prefix: &str) -> StateDict {
        let mut dict = StateDict::default();
        self.clone().parameters(&mut Parameters {
            prefix: prefix.to_owned(),
            action: Action::Export(&mut dict),
        });
        dict
    }

    /// The gradients of the parameters, under the same names and in the same layouts. A parameter that
    /// has none is left out.
    fn gradient_dict(&self, prefix: &str, gradients: &Gradients) -> StateDict {
        let mut dict = StateDict::default();
        self.clone().parameters(&mut Parameters {
            prefix: prefix.to_owned(),
            action: Action::Gradients(gradients, &mut dict),
        });
        dict
    }

    /// Takes the values of all parameters from `dict`, each on the parameter's own device.
    ///
    /// # Errors
    ///
    /// When a parameter is missing, has another shape, or when `dict` has a name under `prefix` that
    /// this module does not know ([`load_part`](Self::load_part) leaves such names alone). The module
    /// is then unchanged.
    fn load_state_dict(&mut self, prefix: &str, dict: &StateDict) -> Result<(), CheckpointError> {
        let mut loaded = self.clone();
        if let Some(name) = loaded.load_part(prefix, dict)?.into_iter().next() {
            return Err(CheckpointError::Unexpected { name });
        }
        *self = loaded;
        Ok(())
    }

    /// Takes the values of all parameters from a checkpoint that may hold more under `prefix`, such as
    /// a language model's embedding beside its layers, and returns the names that it left, sorted.
    ///
    /// A stack takes its own layers, the first ones, from a deeper model.
    ///
    /// # Errors
    ///
    /// When a parameter is missing or has another shape. The module is then unchanged.
    fn load_part(
        &mut self,
        prefix: &str,
        dict: &StateDict,
    ) -> Result<Vec<String>, CheckpointError> {
        let own = self.state_dict(prefix);
        own.check_against(dict)?;
        self.parameters(&mut Parameters {
            prefix: prefix.to_owned(),
            action: Action::Import(dict),
        });
        let left = |name: &&str| name.starts_with(prefix) && own.get(name).is_none();
        let names = dict.iter().map(|(name, _)| name);
        Ok(names.filter(left).map(str::to_owned).collect())
    }
}

/// What is done with each parameter that a [`Checkpoint`] shows.
pub struct Parameters<'a> {
    prefix: String,
    action: Action<'a>,
}

enum Action<'a> {
    Export(&'a mut StateDict),
    Gradients(&'a Gradients, &'a mut StateDict),
    Import(&'a StateDict),
}

impl Parameters<'_> {
    /// A parameter whose layout is the official one.
    pub fn tensor<const D: usize>(&mut self, name: &str, param: &mut Param<Tensor<D>>) {
        let shape = param.lazy_shape().to_vec();
        self.visit(name, param, &shape, |tensor| tensor);
    }

    /// A projection's weight: `[in, out]` here, `[out, in]` there.
    pub fn transposed(&mut self, name: &str, param: &mut Param<Tensor<2>>) {
        let mut shape = param.lazy_shape().to_vec();
        shape.reverse();
        self.visit(name, param, &shape, Tensor::transpose);
    }

    /// A depthwise convolution's weight: `[channels, width]` here, `[channels, 1, width]` there.
    pub fn depthwise(&mut self, name: &str, param: &mut Param<Tensor<2>>) {
        let [channels, width] = param.lazy_shape().dims();
        self.visit(name, param, &[channels, 1, width], |tensor| tensor);
    }

    /// A projection: `weight` and, if it has one, `bias`, below `name`.
    pub fn linear(&mut self, name: &str, linear: &mut Linear) {
        self.transposed(&format!("{name}.weight"), &mut linear.weight);
        if let Some(bias) = &mut linear.bias {
            self.tensor(&format!("{name}.bias"), bias);
        }
    }

    /// All parameters of a module inside this one, below `name` (which ends in a dot, or is empty).
    pub fn module(&mut self, name: &str, module: &mut impl Checkpoint) {
        let length = self.prefix.len();
        self.prefix.push_str(name);
        module.parameters(self);
        self.prefix.truncate(length);
    }

    /// `turn` takes our layout to the official one and, being its own inverse, back.
    fn visit<const D: usize>(
        &mut self,
        name: &str,
        param: &mut Param<Tensor<D>>,
        official: &[usize],
        turn: impl Fn(Tensor<D>) -> Tensor<D>,
    ) {
        let name = format!("{}{name}", self.prefix);
        let named = |tensor: Tensor<D>| NamedTensor {
            shape: official.to_vec(),
            values: read(turn(tensor)),
        };
        match &mut self.action {
            Action::Export(dict) => dict.insert(name, named(param.val())),
            Action::Gradients(gradients, dict) => {
                if let Some(gradient) = param.val().grad(gradients) {
                    dict.insert(name, named(gradient));
                }
            }
            Action::Import(dict) => {
                if let Some(found) = dict.get(&name) {
                    *param = replaced(param, found, official, turn);
                }
            }
        }
    }
}

/// `param` with the values of `found`; its device, type and training state stay.
fn replaced<const D: usize>(
    param: &Param<Tensor<D>>,
    found: &NamedTensor,
    official: &[usize],
    turn: impl Fn(Tensor<D>) -> Tensor<D>,
) -> Param<Tensor<D>> {
    param.clone().map(|old| {
        let mut stored = old.dims();
        if official.len() == D {
            stored.copy_from_slice(official);
        }
        let data = TensorData::new(found.values.clone(), stored);
        turn(Tensor::from_data(data, (&old.device(), old.dtype())))
            .set_require_grad(old.is_require_grad())
    })
}

/// The values as f32, row by row.
fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data_dtype(DType::F32)
        .try_to_vec::<f32>()
        .expect("the data were just converted to f32")
}

/// Compiles the README's snippet.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests;
