//! A stack that interleaves Mamba-2 layers with attention: the state-space layers carry the distant past at
//! a constant cost per row, the attention layers look at single rows, all of them or the last few.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mamba_ssm_attention::{Attention, AttentionConfig, AttentionState};
use mamba_ssm_core::{
    GatedNormInput, GatedNormOptions, Mamba2, Mamba2Config, Mamba2State, gated_rms_norm,
};

use crate::{Error, Result};

/// What a hybrid stack is made of.
#[derive(Debug, Clone)]
pub struct HybridConfig {
    /// The state-space layer.
    pub mamba: Mamba2Config,
    /// The attention layer.
    pub attention: AttentionConfig,
    /// Layers in all.
    pub n_layer: usize,
    /// Every so many layers one is attention, the last of them first: 2 makes Mamba-2, attention,
    /// Mamba-2, attention.
    pub attention_every: usize,
}

impl HybridConfig {
    /// Creates the stack.
    ///
    /// # Errors
    ///
    /// When there are no layers, `attention_every` is zero, or a layer's settings cannot work.
    pub fn try_init(&self, device: &Device) -> Result<Hybrid> {
        for (name, value) in [
            ("n_layer", self.n_layer),
            ("attention_every", self.attention_every),
        ] {
            if value == 0 {
                return Err(Error::Usage(format!(
                    "model.{name} is 0; a hybrid stack needs 1 or more"
                )));
            }
        }
        let norm = || Param::from_tensor(Tensor::<1>::ones([self.mamba.d_model], device));
        let layer = |index: usize| {
            let mixer = if (index + 1).is_multiple_of(self.attention_every) {
                Mixer::Attention(self.attention.try_init(device)?)
            } else {
                Mixer::Mamba(self.mamba.try_init(device)?)
            };
            Ok(HybridLayer {
                norm_weight: norm(),
                mixer,
            })
        };
        Ok(Hybrid {
            layers: (0..self.n_layer).map(layer).collect::<Result<_>>()?,
            norm_f_weight: norm(),
        })
    }
}

/// What mixes rows in a layer.
// A handful of layers: the room that the smaller kind leaves unused does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum Mixer {
    /// A state-space layer.
    Mamba(Mamba2),
    /// Causal attention.
    Attention(Attention),
}

/// One layer: `x + mixer(norm(x))`.
#[derive(Module, Debug)]
pub struct HybridLayer {
    /// The norm before the mixer, `[d_model]`.
    pub norm_weight: Param<Tensor<1>>,
    /// The mixer.
    pub mixer: Mixer,
}

/// Mamba-2 and attention layers in turn, pre-norm residual, with a norm at the end.
#[derive(Module, Debug)]
pub struct Hybrid {
    /// The layers, in order.
    pub layers: Vec<HybridLayer>,
    /// The norm at the end, `[d_model]`.
    pub norm_f_weight: Param<Tensor<1>>,
}

/// The state of one layer.
#[derive(Debug, Clone)]
pub enum HybridLayerState {
    /// Of a state-space layer: its size does not depend on the rows seen.
    Mamba(Mamba2State),
    /// Of an attention layer: keys and values of the rows it looks back on.
    Attention(AttentionState),
}

/// What a [`Hybrid`] carries from row to row, a state per layer.
pub type HybridState = Vec<HybridLayerState>;

impl Hybrid {
    /// The state before the first row.
    pub fn empty_state(&self, batch: usize, device: &Device) -> HybridState {
        let of = |layer: &HybridLayer| match &layer.mixer {
            Mixer::Mamba(mamba) => HybridLayerState::Mamba(mamba.empty_state(batch, device)),
            Mixer::Attention(_) => HybridLayerState::Attention(AttentionState::default()),
        };
        self.layers.iter().map(of).collect()
    }

    /// A whole sequence: `[batch, length, d_model]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.layers.iter().fold(x, |x, layer| {
            let normed = norm(x.clone(), &layer.norm_weight);
            x + match &layer.mixer {
                Mixer::Mamba(mamba) => mamba.forward(normed),
                Mixer::Attention(attention) => attention.forward(normed),
            }
        });
        norm(y, &self.norm_f_weight)
    }

    /// Some rows from a carried state, and the state after them.
    ///
    /// # Panics
    ///
    /// When the state is not one of this stack.
    pub fn forward_from(&self, x: Tensor<3>, state: HybridState) -> (Tensor<3>, HybridState) {
        assert_eq!(
            state.len(),
            self.layers.len(),
            "Hybrid: the state has as many layers as on the left, the stack as on the right"
        );
        let (mut x, mut states) = (x, Vec::with_capacity(state.len()));
        for (layer, state) in self.layers.iter().zip(state) {
            let (y, state) = layer.mixer.run(norm(x.clone(), &layer.norm_weight), state);
            x = x + y;
            states.push(state);
        }
        (norm(x, &self.norm_f_weight), states)
    }
}

impl Mixer {
    fn run(&self, x: Tensor<3>, state: HybridLayerState) -> (Tensor<3>, HybridLayerState) {
        match (self, state) {
            (Self::Mamba(mamba), HybridLayerState::Mamba(state)) => {
                let (y, state) = mamba.forward_from(x, state);
                (y, HybridLayerState::Mamba(state))
            }
            (Self::Attention(attention), HybridLayerState::Attention(state)) => {
                let (y, state) = attention.forward_from(x, state);
                (y, HybridLayerState::Attention(state))
            }
            _ => panic!("Hybrid: the state belongs to a stack with other layers"),
        }
    }
}

fn norm(x: Tensor<3>, weight: &Param<Tensor<1>>) -> Tensor<3> {
    let input = GatedNormInput {
        x,
        z: None,
        weight: weight.val(),
    };
    gated_rms_norm(input, &GatedNormOptions::default())
}
