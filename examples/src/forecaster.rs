//! The forecaster: input projection, a stack of layers, output projection.
//!
//! Its defaults and names are those of the published note "Forecasting Bitcoin with Mamba State Space Models".

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};
use mamba_ssm_attention::{AttentionConfig, Transformer, TransformerConfig, TransformerState};
use mamba_ssm_core::checkpoint::Parameters;
use mamba_ssm_core::{Checkpoint, Mamba2Config, MambaStack, MambaStackConfig, StackState};
use mamba_ssm_linear::{Linear, LinearConfig};
use mamba_ssm_train::Precision;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::hybrid::{Hybrid, HybridConfig, HybridState};

/// Which network stands between the projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A stack of Mamba-2 layers.
    Mamba2,
    /// The Transformer baseline.
    Transformer,
    /// Mamba-2 and attention layers in turn.
    Hybrid,
}

/// The network's settings; those of the other kind are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Which network.
    pub kind: Kind,
    /// Features of a token between the projections.
    pub d_model: usize,
    /// Layers.
    pub n_layer: usize,
    /// Mamba-2: size of the state per channel.
    pub d_state: usize,
    /// Mamba-2: width of the causal convolution.
    pub d_conv: usize,
    /// Mamba-2: inner features per feature.
    pub expand: usize,
    /// Mamba-2: channels of a head.
    pub headdim: usize,
    /// Mamba-2: groups of heads that share B and C.
    pub ngroups: usize,
    /// Mamba-2: pre-norm residual layers instead of plain ones.
    pub residual: bool,
    /// Mamba-2: tokens computed together; changes speed, not results.
    pub chunk_size: usize,
    /// Transformer and hybrid: attention heads.
    pub n_heads: usize,
    /// Transformer: hidden features of the MLP per feature.
    pub mlp_ratio: usize,
    /// Transformer: share of features dropped while training.
    pub dropout: f64,
    /// Transformer and hybrid: rows that an attention layer looks back on, its own among them; 0 for all.
    pub window: usize,
    /// Hybrid: every so many layers one is attention.
    pub attention_every: usize,
}

impl Default for ModelConfig {
    /// The published note's Mamba-2 and Transformer.
    fn default() -> Self {
        Self {
            kind: Kind::Mamba2,
            d_model: 64,
            n_layer: 4,
            d_state: 64,
            d_conv: 4,
            expand: 4,
            headdim: 16,
            ngroups: 1,
            residual: false,
            chunk_size: 64,
            n_heads: 8,
            mlp_ratio: 4,
            dropout: 0.05,
            window: 0,
            attention_every: 2,
        }
    }
}

impl ModelConfig {
    /// Creates the forecaster for so many features in and out.
    ///
    /// # Errors
    ///
    /// When the settings cannot work.
    pub fn init(&self, inputs: usize, outputs: usize, device: &Device) -> Result<Forecaster> {
        let backbone = match self.kind {
            Kind::Mamba2 => Backbone::Mamba(self.mamba().try_init(device)?),
            Kind::Transformer => Backbone::Transformer(self.transformer().try_init(device)?),
            Kind::Hybrid => Backbone::Hybrid(self.hybrid().try_init(device)?),
        };
        Ok(Forecaster {
            input_projection: LinearConfig::new(inputs, self.d_model).init(device),
            backbone,
            linear: LinearConfig::new(self.d_model, outputs).init(device),
        })
    }

    fn layer(&self) -> Mamba2Config {
        Mamba2Config::new(self.d_model)
            .with_d_state(self.d_state)
            .with_d_conv(self.d_conv)
            .with_expand(self.expand)
            .with_headdim(self.headdim)
            .with_ngroups(self.ngroups)
            .with_chunk_size(self.chunk_size)
    }

    fn mamba(&self) -> MambaStackConfig {
        MambaStackConfig::new(self.layer().into(), self.n_layer).with_residual(self.residual)
    }

    fn window(&self) -> Option<usize> {
        (self.window > 0).then_some(self.window)
    }

    fn hybrid(&self) -> HybridConfig {
        HybridConfig {
            mamba: self.layer(),
            attention: AttentionConfig::new(self.d_model, self.n_heads).with_window(self.window()),
            n_layer: self.n_layer,
            attention_every: self.attention_every,
        }
    }

    fn transformer(&self) -> TransformerConfig {
        TransformerConfig::new(self.d_model)
            .with_n_layers(self.n_layer)
            .with_n_heads(self.n_heads)
            .with_mlp_ratio(self.mlp_ratio)
            .with_window(self.window())
            .with_dropout(self.dropout)
    }
}

/// What stands between the projections.
#[derive(Module, Debug)]
pub enum Backbone {
    /// A stack of Mamba layers.
    Mamba(MambaStack),
    /// A Transformer.
    Transformer(Transformer),
    /// Mamba-2 and attention layers in turn.
    Hybrid(Hybrid),
}

/// What a forecaster carries from row to row.
#[derive(Debug, Clone)]
pub enum ForecasterState {
    /// Of a stack of Mamba layers: its size does not depend on the rows seen.
    Mamba(StackState),
    /// Of a Transformer: keys and values of all rows seen.
    Transformer(TransformerState),
    /// Of a hybrid stack.
    Hybrid(HybridState),
}

/// A sequence-to-sequence forecaster: position `t` of the output speaks of row `t + 1`.
#[derive(Module, Debug)]
pub struct Forecaster {
    /// `[inputs, d_model]`.
    pub input_projection: Linear,
    /// `[batch, length, d_model]` to the same shape.
    pub backbone: Backbone,
    /// `[d_model, outputs]`.
    pub linear: Linear,
}

impl Forecaster {
    /// `[batch, length, inputs]` to `[batch, length, outputs]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.linear
            .forward(self.through(self.input_projection.forward(x)))
    }

    /// As [`forward`](Self::forward), with what stands between the projections in `dtype`. The first
    /// projection's operands and the last one's stay as they are: levels need the digits of f32.
    pub fn forward_in(&self, x: Tensor<3>, dtype: FloatDType) -> Tensor<3> {
        let own = x.dtype();
        let x = self.through(self.input_projection.forward(x).cast(dtype));
        self.linear.forward(x.cast(own))
    }

    fn through(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.backbone {
            Backbone::Mamba(stack) => stack.forward(x),
            Backbone::Transformer(stack) => stack.forward(x),
            Backbone::Hybrid(stack) => stack.forward(x),
        }
    }

    /// The state before the first row.
    pub fn empty_state(&self, batch: usize, device: &Device) -> ForecasterState {
        match &self.backbone {
            Backbone::Mamba(stack) => ForecasterState::Mamba(stack.empty_state(batch, device)),
            Backbone::Transformer(stack) => ForecasterState::Transformer(stack.empty_state()),
            Backbone::Hybrid(stack) => ForecasterState::Hybrid(stack.empty_state(batch, device)),
        }
    }

    /// Some rows from a carried state: `[batch, length, inputs]` to `[batch, length, outputs]`, and the
    /// state after them.
    ///
    /// # Panics
    ///
    /// When the state is one of the other kind of network.
    pub fn forward_from(
        &self,
        x: Tensor<3>,
        state: ForecasterState,
    ) -> (Tensor<3>, ForecasterState) {
        let x = self.input_projection.forward(x);
        let (y, state) = match (&self.backbone, state) {
            (Backbone::Mamba(stack), ForecasterState::Mamba(state)) => {
                let (y, state) = stack.forward_from(x, state);
                (y, ForecasterState::Mamba(state))
            }
            (Backbone::Transformer(stack), ForecasterState::Transformer(state)) => {
                let (y, state) = stack.forward_from(x, state);
                (y, ForecasterState::Transformer(state))
            }
            (Backbone::Hybrid(stack), ForecasterState::Hybrid(state)) => {
                let (y, state) = stack.forward_from(x, state);
                (y, ForecasterState::Hybrid(state))
            }
            _ => panic!("Forecaster: the state belongs to the other kind of network"),
        };
        (self.linear.forward(y), state)
    }
}

impl mamba_ssm_train::Forecaster for Forecaster {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        Forecaster::forward(self, input)
    }

    fn supports(&self, _precision: Precision) -> bool {
        true
    }

    fn forward_with(&self, input: Tensor<3>, precision: Precision) -> Tensor<3> {
        match precision {
            Precision::F32 => self.forward(input),
            Precision::Bf16 => self.forward_in(input, FloatDType::BF16),
        }
    }
}

/// The published note's names, for its Mamba model: `input_projection`, `layers.N.mamba`, `linear`.
///
/// # Panics
///
/// For a Transformer or a hybrid stack, of which the published note gives no names.
impl Checkpoint for Forecaster {
    fn parameters(&mut self, visit: &mut Parameters<'_>) {
        visit.linear("input_projection", &mut self.input_projection);
        match &mut self.backbone {
            Backbone::Mamba(stack) => visit.module("", stack),
            Backbone::Transformer(_) => panic!("the Transformer has no official names"),
            Backbone::Hybrid(_) => panic!("the hybrid stack has no official names"),
        }
        visit.linear("linear", &mut self.linear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_notes_model_to_the_parameter() {
        let device = Device::default();
        let model = ModelConfig::default().init(5, 5, &device).unwrap();
        assert_eq!(model.num_params(), 243_077);
        let transformer = ModelConfig {
            kind: Kind::Transformer,
            ..ModelConfig::default()
        };
        let model = transformer.init(5, 5, &device).unwrap();
        assert_eq!(model.num_params(), 198_464 + 5 * 64 + 64 + 64 * 5 + 5);
    }

    #[test]
    fn bf16_answers_as_f32_and_leaves_gradients_in_f32() {
        let device = Device::default().autodiff();
        for kind in [Kind::Mamba2, Kind::Transformer, Kind::Hybrid] {
            let config = ModelConfig {
                kind,
                n_layer: 2,
                residual: true,
                dropout: 0.0,
                ..ModelConfig::default()
            };
            let model = config.init(3, 2, &device).unwrap();
            let draw = burn::tensor::Distribution::Default;
            let x = Tensor::<3>::random([2, 20, 3], draw, &device);
            let [wide, narrow] = [Precision::F32, Precision::Bf16].map(|precision| {
                mamba_ssm_train::Forecaster::forward_with(&model, x.clone(), precision)
            });
            assert_eq!(narrow.dtype(), wide.dtype(), "{kind:?}");
            let size = wide.clone().inner().abs().mean().into_scalar::<f32>();
            let off = (wide.inner() - narrow.clone().inner()).abs().mean();
            let off = off.into_scalar::<f32>() / size;
            // bf16 keeps 8 bits: the answer must differ, or nothing ran in it, and differ little.
            assert!((1e-5..3e-2).contains(&off), "{kind:?}: {off}");
            let grads = narrow.sum().backward();
            let weight = model.input_projection.weight.val();
            let gradient = weight.grad(&grads).expect("a gradient");
            assert_eq!(gradient.dtype(), weight.dtype(), "{kind:?}");
        }
    }

    #[test]
    fn a_carried_state_continues_both_networks() {
        let device = Device::default();
        for kind in [Kind::Mamba2, Kind::Transformer, Kind::Hybrid] {
            let config = ModelConfig {
                kind,
                n_layer: 2,
                ..ModelConfig::default()
            };
            let model = config.init(3, 2, &device).unwrap();
            let draw = burn::tensor::Distribution::Default;
            let x = Tensor::<3>::random([2, 20, 3], draw, &device);
            let whole = model.forward(x.clone());
            let state = model.empty_state(2, &device);
            let (a, state) = model.forward_from(x.clone().narrow(1, 0, 13), state);
            let (b, _) = model.forward_from(x.narrow(1, 13, 7), state);
            let off = (whole - Tensor::cat(vec![a, b], 1)).abs().max();
            assert!(off.into_scalar::<f32>() < 1e-4, "{kind:?}");
        }
    }
}
