//! A stack of layers: plain, each layer reading the one before (as in the published note), or pre-norm
//! residual, `x + layer(norm(x))` with a norm at the end (as in the official language models).

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::checkpoint::{Checkpoint, Parameters};
use crate::error::{ConfigError, at_least_one};
use crate::layers::{Mamba1, Mamba1Config, Mamba1State, Mamba2, Mamba2Config, Mamba2State};
use crate::ops::gated_rms_norm::{GatedNormInput, GatedNormOptions, gated_rms_norm};

/// Which layer a stack is made of.
#[derive(Config, Debug, PartialEq)]
pub enum MambaLayerConfig {
    /// Mamba-1 layers.
    Mamba1(Mamba1Config),
    /// Mamba-2 layers.
    Mamba2(Mamba2Config),
}

impl From<Mamba1Config> for MambaLayerConfig {
    fn from(config: Mamba1Config) -> Self {
        Self::Mamba1(config)
    }
}

impl From<Mamba2Config> for MambaLayerConfig {
    fn from(config: Mamba2Config) -> Self {
        Self::Mamba2(config)
    }
}

impl MambaLayerConfig {
    fn d_model(&self) -> usize {
        match self {
            Self::Mamba1(config) => config.d_model,
            Self::Mamba2(config) => config.d_model,
        }
    }

    fn try_init(&self, device: &Device) -> Result<MambaLayer, ConfigError> {
        Ok(match self {
            Self::Mamba1(config) => MambaLayer::Mamba1(config.try_init(device)?),
            Self::Mamba2(config) => MambaLayer::Mamba2(config.try_init(device)?),
        })
    }
}

/// Configuration of a [`MambaStack`].
#[derive(Config, Debug, PartialEq)]
pub struct MambaStackConfig {
    /// The layer, the same at every depth.
    pub layer: MambaLayerConfig,
    /// How many layers.
    pub n_layer: usize,
    /// Pre-norm residual (`x + layer(norm(x))`, a norm at the end) instead of plain.
    #[config(default = false)]
    pub residual: bool,
    /// Added to the mean square in the norms.
    #[config(default = 1e-5)]
    pub norm_eps: f64,
}

impl MambaStackConfig {
    /// Creates the stack.
    ///
    /// # Errors
    ///
    /// When `n_layer` is zero or the layer's configuration cannot work.
    pub fn try_init(&self, device: &Device) -> Result<MambaStack, ConfigError> {
        at_least_one("n_layer", self.n_layer)?;
        let d_model = self.layer.d_model();
        let norm = || Param::from_tensor(Tensor::<1>::ones([d_model], device));
        let norms = if self.residual { self.n_layer } else { 0 };
        Ok(MambaStack {
            layers: (0..self.n_layer)
                .map(|_| self.layer.try_init(device))
                .collect::<Result<_, _>>()?,
            norm_weights: (0..norms).map(|_| norm()).collect(),
            norm_f_weight: self.residual.then(norm),
            norm_eps: self.norm_eps,
        })
    }

    /// [`try_init`](Self::try_init).
    ///
    /// # Panics
    ///
    /// With the same words, where `try_init` returns an error.
    pub fn init(&self, device: &Device) -> MambaStack {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("MambaStackConfig: {error}"))
    }
}

/// One layer of a stack.
#[derive(Module, Debug)]
pub enum MambaLayer {
    /// A Mamba-1 layer.
    Mamba1(Mamba1),
    /// A Mamba-2 layer.
    Mamba2(Mamba2),
}

/// The state of one layer of a stack.
#[derive(Debug, Clone)]
pub enum LayerState {
    /// Of a Mamba-1 layer.
    Mamba1(Mamba1State),
    /// Of a Mamba-2 layer.
    Mamba2(Mamba2State),
}

/// What a [`MambaStack`] carries from token to token, a state per layer.
pub type StackState = Vec<LayerState>;

impl MambaLayer {
    fn d_model(&self) -> usize {
        match self {
            Self::Mamba1(layer) => layer.config.d_model,
            Self::Mamba2(layer) => layer.config.d_model,
        }
    }

    fn empty_state(&self, batch: usize, device: &Device) -> LayerState {
        match self {
            Self::Mamba1(layer) => LayerState::Mamba1(layer.empty_state(batch, device)),
            Self::Mamba2(layer) => LayerState::Mamba2(layer.empty_state(batch, device)),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Mamba1(layer) => layer.forward(x),
            Self::Mamba2(layer) => layer.forward(x),
        }
    }

    fn forward_from(&self, x: Tensor<3>, state: LayerState) -> (Tensor<3>, LayerState) {
        match (self, state) {
            (Self::Mamba1(layer), LayerState::Mamba1(state)) => {
                let (y, state) = layer.forward_from(x, state);
                (y, LayerState::Mamba1(state))
            }
            (Self::Mamba2(layer), LayerState::Mamba2(state)) => {
                let (y, state) = layer.forward_from(x, state);
                (y, LayerState::Mamba2(state))
            }
            _ => panic!("MambaStack: the state belongs to a stack of the other kind of layer"),
        }
    }
}

/// A stack of Mamba layers, `[batch, length, d_model]` to the same shape.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{Mamba2Config, MambaStackConfig};
///
/// let device = Device::default();
/// let layer = Mamba2Config::new(32).with_d_state(8).with_headdim(8);
/// let stack = MambaStackConfig::new(layer.into(), 2).with_residual(true).init(&device);
/// let y = stack.forward(Tensor::ones([1, 10, 32], &device));
/// assert_eq!(y.dims(), [1, 10, 32]);
/// ```
#[derive(Module, Debug)]
pub struct MambaStack {
    /// The layers, in order.
    pub layers: Vec<MambaLayer>,
    /// The norm before each layer, `[d_model]` each; empty in a plain stack.
    pub norm_weights: Vec<Param<Tensor<1>>>,
    /// The norm at the end, `[d_model]`; none in a plain stack.
    pub norm_f_weight: Option<Param<Tensor<1>>>,
    norm_eps: f64,
}

impl MambaStack {
    /// Added to the mean square in the norms.
    pub fn norm_eps(&self) -> f64 {
        self.norm_eps
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.layers.first().map_or(0, MambaLayer::d_model)
    }

    /// The state before the first token: zeros.
    pub fn empty_state(&self, batch: usize, device: &Device) -> StackState {
        self.layers
            .iter()
            .map(|layer| layer.empty_state(batch, device))
            .collect()
    }

    /// A whole sequence from the empty state: `[batch, length, d_model]` to the same shape.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`, or the length is zero.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.fold(x, |_, layer, x| layer.forward(x))
    }

    /// A sequence from a carried state, and the state after it. See [`Mamba2::forward_from`].
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and when the state is not one of this stack.
    pub fn forward_from(&self, x: Tensor<3>, state: StackState) -> (Tensor<3>, StackState) {
        assert_eq!(
            state.len(),
            self.layers.len(),
            "MambaStack: the state has as many layers as on the left, the stack as on the right"
        );
        let mut states: Vec<Option<LayerState>> = state.into_iter().map(Some).collect();
        let y = self.fold(x, |index, layer, x| {
            let state = states[index].take().expect("each layer runs once");
            let (y, state) = layer.forward_from(x, state);
            states[index] = Some(state);
            y
        });
        (y, states.into_iter().flatten().collect())
    }

    /// One token: `[batch, d_model]` to the same shape, and the state after it.
    ///
    /// # Panics
    ///
    /// As [`forward_from`](Self::forward_from).
    pub fn step(&self, x: Tensor<2>, state: StackState) -> (Tensor<2>, StackState) {
        let (y, state) = self.forward_from(x.unsqueeze_dim(1), state);
        (y.squeeze_dim(1), state)
    }

    /// Norms and residuals around whatever `run` does with a layer.
    fn fold(
        &self,
        x: Tensor<3>,
        mut run: impl FnMut(usize, &MambaLayer, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let mut x = x;
        for (index, layer) in self.layers.iter().enumerate() {
            x = match self.norm_weights.get(index) {
                Some(weight) => x.clone() + run(index, layer, self.norm(x, weight)),
                None => run(index, layer, x),
            };
        }
        match &self.norm_f_weight {
            Some(weight) => self.norm(x, weight),
            None => x,
        }
    }

    fn norm(&self, x: Tensor<3>, weight: &Param<Tensor<1>>) -> Tensor<3> {
        let input = GatedNormInput {
            x,
            z: None,
            weight: weight.val(),
        };
        let options = GatedNormOptions {
            eps: self.norm_eps,
            ..Default::default()
        };
        gated_rms_norm(input, &options)
    }
}

/// Names: `layers.N.mamba.*` in a plain stack (the published note's), `layers.N.mixer.*`,
/// `layers.N.norm.weight` and `norm_f.weight` in a residual one (the official language models', below
/// `backbone.`).
impl Checkpoint for MambaStack {
    fn parameters(&mut self, visit: &mut Parameters<'_>) {
        let mixer = if self.norm_f_weight.is_some() {
            "mixer"
        } else {
            "mamba"
        };
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let prefix = format!("layers.{index}.{mixer}.");
            match layer {
                MambaLayer::Mamba1(layer) => visit.module(&prefix, layer),
                MambaLayer::Mamba2(layer) => visit.module(&prefix, layer),
            }
        }
        for (index, weight) in self.norm_weights.iter_mut().enumerate() {
            visit.tensor(&format!("layers.{index}.norm.weight"), weight);
        }
        if let Some(weight) = &mut self.norm_f_weight {
            visit.tensor("norm_f.weight", weight);
        }
    }
}
