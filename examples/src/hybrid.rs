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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    /// Layers of width 12, attention looking back on `window` rows.
    fn config(n_layer: usize, attention_every: usize, window: Option<usize>) -> HybridConfig {
        HybridConfig {
            mamba: Mamba2Config::new(12).with_d_state(5).with_headdim(6),
            attention: AttentionConfig::new(12, 3).with_window(window),
            n_layer,
            attention_every,
        }
    }

    fn draw(shape: [usize; 3]) -> Tensor<3> {
        Tensor::random(shape, Distribution::Default, &Device::default())
    }

    fn largest(difference: Tensor<3>) -> f32 {
        difference.abs().max().into_scalar()
    }

    /// One letter per layer.
    fn kinds(config: &HybridConfig) -> String {
        let stack = config.try_init(&Device::default()).unwrap();
        let letter = |layer: &HybridLayer| match layer.mixer {
            Mixer::Mamba(_) => 'm',
            Mixer::Attention(_) => 'a',
        };
        stack.layers.iter().map(letter).collect()
    }

    #[test]
    fn every_so_many_layers_one_is_attention() {
        for (every, expected) in [(1, "aaaaa"), (2, "mamam"), (3, "mmamm"), (9, "mmmmm")] {
            assert_eq!(kinds(&config(5, every, None)), expected);
        }
    }

    #[test]
    fn shapes_are_kept_for_any_batch_and_length() {
        let stack = config(3, 2, Some(4)).try_init(&Device::default()).unwrap();
        for shape in [[1, 1, 12], [2, 7, 12], [3, 33, 12]] {
            let y = stack.forward(draw(shape));
            assert_eq!(y.dims(), shape);
            assert!(largest(y).is_finite());
        }
    }

    #[test]
    fn a_later_row_never_changes_an_earlier_answer() {
        for window in [None, Some(4)] {
            let stack = config(4, 2, window).try_init(&Device::default()).unwrap();
            let x = draw([2, 21, 12]);
            let whole = stack.forward(x.clone());
            for cut in [1, 8, 20] {
                let later = draw([2, 21 - cut, 12]) * 9.0;
                let changed = Tensor::cat(vec![x.clone().narrow(1, 0, cut), later], 1);
                let off = whole.clone() - stack.forward(changed);
                let before = largest(off.clone().narrow(1, 0, cut));
                assert!(before < 1e-6, "{window:?}, row {cut}: {before}");
                assert!(largest(off.narrow(1, cut, 1)) > 1e-3, "{window:?}");
            }
        }
    }

    #[test]
    fn attention_forgets_what_lies_beyond_its_window_and_mamba_does_not() {
        let reach = |every: usize| {
            let stack = config(1, every, Some(4))
                .try_init(&Device::default())
                .unwrap();
            let x = draw([1, 12, 12]);
            let changed = Tensor::cat(vec![draw([1, 1, 12]), x.clone().narrow(1, 1, 11)], 1);
            let off = stack.forward(x) - stack.forward(changed);
            [3, 4].map(|row| largest(off.clone().narrow(1, row, 1)))
        };
        let [inside, beyond] = reach(1);
        assert!(inside > 1e-6 && beyond == 0.0, "{inside} {beyond}");
        let [inside, beyond] = reach(2);
        assert!(inside > 0.0 && beyond > 0.0, "{inside} {beyond}");
    }

    #[test]
    fn rows_one_by_one_answer_as_all_at_once() {
        let device = Device::default();
        let stack = config(4, 2, Some(5)).try_init(&device).unwrap();
        let x = draw([2, 17, 12]);
        let whole = stack.forward(x.clone());
        let mut state = stack.empty_state(2, &device);
        for t in 0..17 {
            let (y, next) = stack.forward_from(x.clone().narrow(1, t, 1), state);
            state = next;
            let off = largest(y - whole.clone().narrow(1, t, 1));
            assert!(off < 1e-4, "row {t}: {off}");
        }
    }

    #[test]
    fn stacks_that_cannot_work_name_the_setting() {
        let refused = |config: HybridConfig| {
            let error = config.try_init(&Device::default()).unwrap_err();
            error.to_string()
        };
        assert!(refused(config(0, 2, None)).contains("model.n_layer is 0"));
        assert!(refused(config(2, 0, None)).contains("model.attention_every is 0"));
        let mut wrong = config(2, 2, None);
        wrong.attention = AttentionConfig::new(12, 5);
        assert!(refused(wrong).contains('5'));
    }
}
