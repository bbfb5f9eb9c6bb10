use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

use super::norm::normalised;
use super::{Attention, AttentionConfig, AttentionState, Mlp, MlpConfig};
use crate::AttentionError;
use crate::error::{at_least_one, positive, probability};
use crate::ops::residual::add_dropped;
use crate::ops::rotary::RotaryTable;

/// Configuration of [`Transformer`]. With `d_model = 64` the defaults are those of the published
/// comparison with Mamba: 8 heads, 4 layers, rotary positions, feed-forward x 4, dropout 0.05.
#[derive(Config, Debug)]
pub struct TransformerConfig {
    /// Width of a token.
    pub d_model: usize,
    /// Number of blocks.
    #[config(default = 4)]
    pub n_layers: usize,
    /// Number of query heads.
    #[config(default = 8)]
    pub n_heads: usize,
    /// Number of key/value heads; `n_heads` when `None`.
    pub n_kv_heads: Option<usize>,
    /// Width of the feed-forward part, in multiples of `d_model`.
    #[config(default = 4)]
    pub mlp_ratio: usize,
    /// See only the last `window` positions; all when `None`.
    pub window: Option<usize>,
    /// Base of the rotary angles.
    #[config(default = 10000.0)]
    pub rotary_base: f64,
    /// Probability of dropping a feature of what a block adds, in training.
    #[config(default = 0.05)]
    pub dropout: f64,
    /// Probability of dropping an attention probability, in training.
    #[config(default = 0.0)]
    pub attention_dropout: f64,
    /// Seed of the attention dropout.
    #[config(default = 0)]
    pub dropout_seed: u64,
    /// Whether the gradients of attention must repeat to the bit: see
    /// [`FlashAttentionOptions::deterministic`](crate::FlashAttentionOptions::deterministic).
    #[config(default = false)]
    pub deterministic: bool,
    /// Whether the attention projections have a bias; those of the feed-forward part always do.
    #[config(default = false)]
    pub attention_bias: bool,
    /// Added to the mean square in the norms.
    #[config(default = 1e-5)]
    pub norm_epsilon: f64,
    /// Whether the result is normalised once more after the last block.
    #[config(default = true)]
    pub final_norm: bool,
}

impl TransformerConfig {
    fn attention(&self, layer: usize) -> AttentionConfig {
        AttentionConfig::new(self.d_model, self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_window(self.window)
            .with_rotary_base(self.rotary_base)
            .with_bias(self.attention_bias)
            .with_dropout(self.attention_dropout)
            .with_deterministic(self.deterministic)
            // Layers of one model must not drop the same positions.
            .with_dropout_seed(self.dropout_seed.wrapping_mul(1 << 16) + layer as u64)
    }

    /// Creates the stack.
    ///
    /// # Errors
    ///
    /// Those of [`AttentionConfig::try_init`]; no layers; a zero `mlp_ratio`; a dropout outside
    /// `[0, 1)`; a norm epsilon that is not positive.
    pub fn try_init(&self, device: &Device) -> Result<Transformer, AttentionError> {
        at_least_one("n_layers", self.n_layers)?;
        at_least_one("mlp_ratio", self.mlp_ratio)?;
        probability("dropout", self.dropout)?;
        positive("norm_epsilon", self.norm_epsilon)?;
        let norm = || {
            RmsNormConfig::new(self.d_model)
                .with_epsilon(self.norm_epsilon)
                .init(device)
        };
        let block = |layer| {
            Ok(TransformerBlock {
                attention: self.attention(layer).try_init(device)?,
                mlp: MlpConfig::new(self.d_model)
                    .with_d_hidden(Some(self.mlp_ratio * self.d_model))
                    .try_init(device)?,
                attention_norm: norm(),
                mlp_norm: norm(),
                dropout: DropoutConfig::new(self.dropout).init(),
            })
        };
        Ok(Transformer {
            layers: (0..self.n_layers).map(block).collect::<Result<_, _>>()?,
            norm: self.final_norm.then(norm),
        })
    }

    /// Creates the stack.
    ///
    /// # Panics
    ///
    /// With the words of [`try_init`](Self::try_init)'s error.
    pub fn init(&self, device: &Device) -> Transformer {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

/// One block: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with dropout on what is added.
#[derive(Module, Debug)]
pub struct TransformerBlock {
    /// Causal self-attention.
    pub attention: Attention,
    /// Feed-forward part.
    pub mlp: Mlp,
    /// Norm before the attention.
    pub attention_norm: RmsNorm,
    /// Norm before the feed-forward part.
    pub mlp_norm: RmsNorm,
    /// Dropout of what each part adds.
    pub dropout: Dropout,
}

impl TransformerBlock {
    fn forward(&self, x: Tensor<3>, table: Option<&RotaryTable>) -> Tensor<3> {
        let y = self
            .attention
            .forward_with(x.clone(), Some(&self.attention_norm), table);
        let x = add_dropped(x, y, &self.dropout);
        self.feed_forward(x)
    }

    fn forward_from(
        &self,
        x: Tensor<3>,
        state: AttentionState,
        table: Option<&RotaryTable>,
    ) -> (Tensor<3>, AttentionState) {
        let norm = Some(&self.attention_norm);
        let (y, state) = self
            .attention
            .forward_from_with(x.clone(), norm, state, table);
        (self.feed_forward(add_dropped(x, y, &self.dropout)), state)
    }

    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.mlp.forward_normalised(&self.mlp_norm, x.clone());
        add_dropped(x, y, &self.dropout)
    }
}

/// A causal Transformer over embedded tokens, pre-norm, with rotary positions.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mamba_ssm_attention::TransformerConfig;
///
/// let device = Device::default();
/// let model = TransformerConfig::new(64).init(&device);
/// let x = Tensor::<3>::random([2, 12, 64], Distribution::Default, &device);
/// assert_eq!(model.forward(x).dims(), [2, 12, 64]);
/// ```
#[derive(Module, Debug)]
pub struct Transformer {
    /// The blocks, first to last.
    pub layers: Vec<TransformerBlock>,
    /// Norm of the result, if asked for.
    pub norm: Option<RmsNorm>,
}

/// What a [`Transformer`] remembers of the tokens it has seen, layer by layer.
#[derive(Clone, Debug)]
pub struct TransformerState {
    layers: Vec<AttentionState>,
}

impl TransformerState {
    /// Number of tokens seen.
    pub fn position(&self) -> usize {
        self.layers.first().map_or(0, AttentionState::position)
    }
}

impl Transformer {
    /// Maps `x`, `[batch, length, d_model]`, to the same shape; position `t` depends on positions `0..=t`.
    /// `x` may be half precision where the parameters are f32: norms and sums are f32 then, products and
    /// what stands between the layers of the type of `x`.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let table = self.rotary_table(&x, 0);
        let x = self
            .layers
            .iter()
            .fold(x, |x, layer| layer.forward(x, table.as_ref()));
        self.finish(x)
    }

    /// The state before the first token.
    pub fn empty_state(&self) -> TransformerState {
        TransformerState {
            layers: vec![AttentionState::default(); self.layers.len()],
        }
    }

    /// Continues from `state`: `x`, `[batch, length, d_model]`, follows the tokens already seen. Equals
    /// the same positions of one [`forward`](Self::forward) over the whole sequence.
    ///
    /// # Panics
    ///
    /// When `x` does not fit the model or the state, or the state has another number of layers.
    pub fn forward_from(
        &self,
        x: Tensor<3>,
        state: TransformerState,
    ) -> (Tensor<3>, TransformerState) {
        assert_eq!(
            state.layers.len(),
            self.layers.len(),
            "the state has {} layers, the model {}",
            state.layers.len(),
            self.layers.len()
        );
        let table = self.rotary_table(&x, state.position());
        let mut states = Vec::with_capacity(self.layers.len());
        let x = self
            .layers
            .iter()
            .zip(state.layers)
            .fold(x, |x, (layer, state)| {
                let (x, state) = layer.forward_from(x, state, table.as_ref());
                states.push(state);
                x
            });
        (self.finish(x), TransformerState { layers: states })
    }

    /// One token: `x`, `[batch, d_model]`, at the position after those seen. Equals the same position of
    /// a full pass.
    ///
    /// # Panics
    ///
    /// As [`forward_from`](Self::forward_from).
    pub fn step(&self, x: Tensor<2>, state: TransformerState) -> (Tensor<2>, TransformerState) {
        let (y, state) = self.forward_from(x.unsqueeze_dim(1), state);
        (y.squeeze_dim(1), state)
    }

    /// All layers turn by the same angles.
    fn rotary_table(&self, x: &Tensor<3>, start: usize) -> Option<RotaryTable> {
        self.layers
            .first()
            .and_then(|layer| layer.attention.rotary_table(x, start))
    }

    fn finish(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.norm {
            Some(norm) => normalised(norm, x),
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, Tolerance};

    fn random(shape: [usize; 3], device: &Device) -> Tensor<3> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
    }

    #[test]
    fn the_defaults_are_the_published_sizes() {
        let model = TransformerConfig::new(64).init(&Device::default());
        let attention = 64 * 192 + 64 * 64;
        let mlp = 64 * 256 + 256 + 256 * 64 + 64;
        assert_eq!(model.num_params(), 4 * (attention + mlp + 128) + 64);
    }

    #[test]
    fn what_attention_may_do_is_the_same_in_every_layer() {
        let config = TransformerConfig::new(64).with_window(Some(5));
        for deterministic in [false, true] {
            let config = config.clone().with_deterministic(deterministic);
            for layer in 0..config.n_layers {
                let attention = config.attention(layer);
                assert_eq!(attention.deterministic, deterministic);
                assert_eq!(attention.window, Some(5));
                let options = attention
                    .init(&Device::default())
                    .options(&Device::default());
                assert_eq!(options.deterministic, deterministic);
                assert_eq!(options.window, Some(5));
            }
        }
    }

    #[test]
    fn steps_and_pieces_equal_the_full_pass() {
        let device = Device::default();
        for window in [None, Some(4)] {
            let model = TransformerConfig::new(32)
                .with_n_layers(3)
                .with_n_heads(4)
                .with_window(window)
                .init(&device);
            let x = random([2, 9, 32], &device);
            let full = model.forward(x.clone());
            let (first, mut state) =
                model.forward_from(x.clone().slice_dim(1, 0..3), model.empty_state());
            let mut rows = vec![first];
            for t in 3..9 {
                assert_eq!(state.position(), t);
                let y;
                (y, state) = model.step(x.clone().slice_dim(1, t..t + 1).squeeze_dim(1), state);
                rows.push(y.unsqueeze_dim(1));
            }
            Tensor::cat(rows, 1)
                .into_data()
                .assert_approx_eq::<f32>(&full.into_data(), Tolerance::absolute(1e-5));
        }
    }

    #[test]
    fn every_parameter_gets_a_gradient_and_dropout_acts_in_training() {
        let device = Device::default().autodiff();
        let model = TransformerConfig::new(16).with_n_heads(2).init(&device);
        let x = random([2, 7, 16], &device);
        let (a, b) = (model.forward(x.clone()), model.forward(x.clone()));
        assert!((a - b).abs().max().into_scalar::<f32>() > 0.0);

        let grads = model.forward(x).square().sum().backward();
        for layer in &model.layers {
            for weight in [
                &layer.attention.qkv,
                &layer.attention.out,
                &layer.mlp.up,
                &layer.mlp.down,
            ] {
                let grad = weight.weight.val().grad(&grads).expect("a gradient");
                assert!(grad.abs().sum().into_scalar::<f32>() > 0.0);
            }
            for norm in [&layer.attention_norm, &layer.mlp_norm] {
                assert!(norm.gamma.val().grad(&grads).is_some());
            }
        }
    }

    #[test]
    fn configs_that_cannot_work_are_refused_by_name() {
        let device = Device::default();
        let refused = |config: TransformerConfig| config.try_init(&device).unwrap_err().to_string();
        let base = || TransformerConfig::new(64);
        assert!(refused(base().with_n_layers(0)).contains("n_layers is 0"));
        assert!(refused(base().with_mlp_ratio(0)).contains("mlp_ratio is 0"));
        assert!(
            refused(base().with_n_heads(7))
                .contains("d_model = 64 is not a multiple of n_heads = 7")
        );
        assert!(refused(base().with_dropout(1.0)).contains("dropout = 1"));
        assert!(refused(base().with_attention_dropout(-1.0)).contains("dropout = -1"));
        assert!(refused(base().with_norm_epsilon(0.0)).contains("norm_epsilon = 0"));
    }
}
