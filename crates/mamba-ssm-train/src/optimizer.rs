//! AdamW over a whole module, with a state that can be saved and restored by parameter name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState};
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, View};

use crate::config::TrainConfig;
use crate::error::TrainError;

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with PyTorch's semantics: decoupled weight
/// decay `p -= lr * weight_decay * p`, bias-corrected moments, `eps` added after the square root.
///
/// The update rule is Burn's; this type keeps the moments under the parameters' names, so that a
/// saved state fits any instance of the same architecture and is restored on the device of its
/// parameter (Burn's own record is keyed by identifiers drawn at construction, and passes through
/// the default device).
pub struct ModuleAdamW {
    rule: AdamW,
    moments: BTreeMap<String, AdamWState<1>>,
}

impl ModuleAdamW {
    /// Takes `betas`, `eps` and `weight_decay` from the configuration.
    pub fn new(config: &TrainConfig) -> Self {
        let rule = AdamWConfig::new()
            .with_beta_1(config.betas[0] as f32)
            .with_beta_2(config.betas[1] as f32)
            .with_epsilon(config.eps as f32)
            .with_weight_decay(config.weight_decay as f32)
            .build();
        Self {
            rule,
            moments: BTreeMap::new(),
        }
    }

    /// Updates every parameter that has a gradient.
    pub fn step<M: Module>(&mut self, lr: f64, model: M, gradients: GradientsParams) -> M {
        model.map(&mut Update {
            optimizer: self,
            gradients,
            lr,
            path: Vec::new(),
        })
    }

    /// Writes the moments to a safetensors file: `<parameter>.moment_1`, `.moment_2` (f32, flat)
    /// and `.time` (i64).
    ///
    /// # Errors
    ///
    /// [`TrainError::Damaged`] if a moment cannot be read back or the file not be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        let failed = |problem: String| TrainError::damaged(path, problem);
        let mut entries = Vec::new();
        for (name, state) in &self.moments {
            let momentum = &state.momentum;
            for (leaf, tensor) in [
                ("moment_1", &momentum.moment_1),
                ("moment_2", &momentum.moment_2),
            ] {
                let data = tensor
                    .clone()
                    .try_into_data_as::<f32>()
                    .map_err(|error| failed(format!("{name}: {error:?}")))?;
                entries.push((format!("{name}.{leaf}"), Entry::floats(&data)));
            }
            entries.push((format!("{name}.time"), Entry::integer(momentum.time)));
        }
        safetensors::serialize_to_file(entries, None, path)
            .map_err(|error| failed(error.to_string()))
    }

    /// Reads what [`save`](Self::save) wrote, for the parameters of `model`.
    ///
    /// # Errors
    ///
    /// [`TrainError::Io`] or [`TrainError::Damaged`] if the file cannot be read;
    /// [`TrainError::Architecture`] if a moment has no parameter or another size.
    pub fn load<M: Module>(&mut self, path: &Path, model: &M) -> Result<(), TrainError> {
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| TrainError::damaged(path, error.to_string()))?;
        let parameters = parameters(model);
        for name in file.names() {
            let parameter = name
                .rsplit_once('.')
                .map_or(name, |(parameter, _)| parameter);
            if !parameters.iter().any(|(known, ..)| known == parameter) {
                return Err(architecture(path, parameter, "nothing", "moments"));
            }
        }
        let mut moments = BTreeMap::new();
        for (name, size, device) in &parameters {
            if file.tensor(&format!("{name}.time")).is_ok() {
                moments.insert(name.clone(), read_state(&file, path, name, *size, device)?);
            }
        }
        self.moments = moments;
        Ok(())
    }
}

fn architecture(path: &Path, parameter: &str, expected: &str, found: &str) -> TrainError {
    TrainError::Architecture {
        path: path.into(),
        parameter: parameter.into(),
        expected: expected.into(),
        found: found.into(),
    }
}

fn read_state(
    file: &SafeTensors<'_>,
    path: &Path,
    name: &str,
    size: usize,
    device: &Device,
) -> Result<AdamWState<1>, TrainError> {
    let bytes = |leaf: &str, dtype: Dtype, len: usize| {
        let view = file
            .tensor(&format!("{name}.{leaf}"))
            .map_err(|error| TrainError::damaged(path, error.to_string()))?;
        if view.dtype() != dtype || view.shape() != [len] {
            let found = format!("{:?} {:?}", view.shape(), view.dtype());
            let expected = format!("[{len}] {dtype:?}");
            return Err(architecture(path, name, &expected, &found));
        }
        Ok(view.data())
    };
    let moment = |leaf: &str| -> Result<Tensor<1>, TrainError> {
        let values: Vec<f32> = bytes(leaf, Dtype::F32, size)?
            .as_chunks::<4>()
            .0
            .iter()
            .map(|chunk| f32::from_le_bytes(*chunk))
            .collect();
        Ok(Tensor::from_data(TensorData::new(values, [size]), device))
    };
    let time = bytes("time", Dtype::I64, 1)?;
    let time = time
        .first_chunk::<8>()
        .map_or(0, |c| i64::from_le_bytes(*c));
    let time = usize::try_from(time)
        .map_err(|_| TrainError::damaged(path, format!("`{name}.time` is {time}")))?;
    Ok(AdamWState::new(AdaptiveMomentumState::new(
        time,
        moment("moment_1")?,
        moment("moment_2")?,
    )))
}

struct Update<'a> {
    optimizer: &'a mut ModuleAdamW,
    gradients: GradientsParams,
    lr: f64,
    path: Vec<String>,
}

impl ModuleMapper for Update<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove::<D>(param.id) else {
            return param;
        };
        let (id, tensor, mapper) = param.consume();
        let require_grad = tensor.is_require_grad();
        let strategy = tensor.gradient_checkpointing_strategy();
        let shape = tensor.shape();

        let name = self.path.join(".");
        let state = self.optimizer.moments.remove(&name);
        // Moments of any rank are kept flat, so one map holds them all.
        let count = shape.num_elements();
        let (updated, state) = self.optimizer.rule.step(
            self.lr,
            tensor.inner().reshape([count]),
            gradient.reshape([count]),
            state,
        );
        if let Some(state) = state {
            self.optimizer.moments.insert(name, state);
        }

        // The update left the tape; put the parameter back the way it was found.
        let mut updated = Tensor::from_inner(updated.reshape(shape));
        if let Some(strategy) = strategy {
            updated = updated.with_gradient_checkpointing_strategy(strategy);
        }
        Param::from_mapped_value(id, updated.set_require_grad(require_grad), mapper)
    }
}

/// Draws the initial values of every parameter that has none yet.
pub(crate) fn initialise<M: Module>(model: &M) {
    parameters(model);
}

/// Name, element count and device (without autodiff) of every float parameter.
fn parameters<M: Module>(model: &M) -> Vec<(String, usize, Device)> {
    let mut visitor = Parameters {
        path: Vec::new(),
        found: Vec::new(),
    };
    model.visit(&mut visitor);
    visitor.found
}

struct Parameters {
    path: Vec<String>,
    found: Vec<(String, usize, Device)>,
}

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        self.found.push((
            self.path.join("."),
            tensor.shape().num_elements(),
            tensor.device().inner(),
        ));
    }
}

/// One tensor of the state file.
struct Entry {
    dtype: Dtype,
    shape: [usize; 1],
    bytes: Vec<u8>,
}

impl Entry {
    fn floats(data: &TensorData) -> Self {
        let bytes: Vec<u8> = data.iter::<f32>().flat_map(f32::to_le_bytes).collect();
        Self {
            dtype: Dtype::F32,
            shape: [bytes.len() / 4],
            bytes,
        }
    }

    fn integer(value: usize) -> Self {
        Self {
            dtype: Dtype::I64,
            shape: [1],
            bytes: (value as i64).to_le_bytes().to_vec(),
        }
    }
}

impl View for Entry {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};

    use super::*;

    fn model() -> Linear {
        let device = Device::default().autodiff();
        let mut model = LinearConfig::new(2, 1).init(&device);
        model.weight = Param::from_tensor(Tensor::from_floats([[1.0], [-2.0]], &device));
        model.bias = Some(Param::from_tensor(Tensor::from_floats([0.5], &device)));
        model
    }

    fn step(optimizer: &mut ModuleAdamW, model: Linear, gradient: [f32; 3]) -> Linear {
        let device = Device::default();
        let mut gradients = GradientsParams::new();
        let [a, b, c] = gradient;
        gradients.register(
            model.weight.id,
            Tensor::<2>::from_floats([[a], [b]], &device),
        );
        let bias = model.bias.as_ref().unwrap().id;
        gradients.register(bias, Tensor::<1>::from_floats([c], &device));
        optimizer.step(0.1, model, gradients)
    }

    fn values(model: &Linear) -> Vec<f32> {
        let bias = model.bias.as_ref().unwrap().val().into_data();
        let weight = model.weight.val().into_data();
        weight.iter::<f32>().chain(bias.iter()).collect()
    }

    fn config() -> TrainConfig {
        TrainConfig {
            weight_decay: 0.1,
            ..TrainConfig::default()
        }
    }

    /// The published rule, in f64.
    fn by_hand(start: f64, gradients: &[f64], lr: f64, decay: f64) -> f64 {
        let (mut p, mut m, mut v) = (start, 0.0, 0.0);
        for (t, g) in gradients.iter().enumerate() {
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let correct = |beta: f64| 1.0 - beta.powi(t as i32 + 1);
            p -= lr * decay * p;
            p -= lr * (m / correct(0.9)) / ((v / correct(0.999)).sqrt() + 1e-8);
        }
        p
    }

    const GRADIENTS: [[f32; 3]; 3] = [[0.5, -1.0, 1e-6], [0.25, 3.0, -2e-6], [-1.0, 0.0, 1e-6]];

    #[test]
    fn follows_the_published_rule() {
        let mut optimizer = ModuleAdamW::new(&config());
        let mut model = model();
        for gradient in GRADIENTS {
            model = step(&mut optimizer, model, gradient);
        }
        for (i, (value, start)) in values(&model).iter().zip([1.0, -2.0, 0.5]).enumerate() {
            let gradients: Vec<f64> = GRADIENTS.iter().map(|g| g[i].into()).collect();
            let expected = by_hand(start, &gradients, 0.1, 0.1);
            assert!(
                (f64::from(*value) - expected).abs() < 2e-5,
                "{value} {expected}"
            );
        }
        assert!(model.weight.is_require_grad());
    }

    #[test]
    fn a_saved_state_continues_bit_for_bit_in_another_instance() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let mut first = ModuleAdamW::new(&config());
        let trained = step(&mut first, model(), GRADIENTS[0]);
        first.save(&path).unwrap();

        let mut twin = model();
        twin.weight = Param::from_tensor(trained.weight.val().detach()).set_require_grad(true);
        let bias = trained.bias.as_ref().unwrap().val().detach();
        twin.bias = Some(Param::from_tensor(bias).set_require_grad(true));
        let mut second = ModuleAdamW::new(&config());
        second.load(&path, &twin).unwrap();
        let expected = step(&mut first, trained, GRADIENTS[1]);
        let found = step(&mut second, twin, GRADIENTS[1]);
        assert_eq!(values(&found), values(&expected));
    }

    #[test]
    fn a_parameter_without_gradient_stays() {
        let mut optimizer = ModuleAdamW::new(&config());
        let before = values(&model());
        let after = optimizer.step(0.1, model(), GradientsParams::new());
        assert_eq!(values(&after), before);
    }

    #[test]
    fn states_of_another_architecture_or_cut_short_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let mut optimizer = ModuleAdamW::new(&config());
        step(&mut optimizer, model(), GRADIENTS[0]);
        optimizer.save(&path).unwrap();

        let device = Device::default().autodiff();
        let wider = LinearConfig::new(3, 1).init(&device);
        let error = optimizer.load(&path, &wider).unwrap_err().to_string();
        assert!(
            error.contains("`weight`: expected [3] F32, found [2] F32"),
            "{error}"
        );
        let unbiased = LinearConfig::new(2, 1).with_bias(false).init(&device);
        let error = optimizer.load(&path, &unbiased).unwrap_err().to_string();
        assert!(error.contains("`bias`: expected nothing"), "{error}");

        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let error = optimizer.load(&path, &model()).unwrap_err();
        assert!(matches!(error, TrainError::Damaged { .. }), "{error}");
    }
}
