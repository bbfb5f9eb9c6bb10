use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, RmsNorm};
use burn::tensor::{Device, Tensor};
use mamba_ssm_linear::{Linear, LinearConfig};

use super::norm::project_normalised;
use crate::error::{at_least_one, probability};
use crate::ops::rotary::RotaryTable;
use crate::ops::self_attention::{Heads, heads_apart, heads_together, self_attention};
use crate::{
    AttentionError, FlashAttentionOptions, MAX_HEAD_DIM, Rotary, RotaryConfig, RotaryStyle,
    flash_attention,
};

/// Configuration of [`Attention`].
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Width of a token.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key/value heads, a divisor of `n_heads`; `n_heads` when `None`.
    pub n_kv_heads: Option<usize>,
    /// Features per head; `d_model / n_heads` when `None`.
    pub head_dim: Option<usize>,
    /// Whether a token sees no later one.
    #[config(default = true)]
    pub causal: bool,
    /// See only the last `window` positions, one's own included; all when `None`.
    pub window: Option<usize>,
    /// Whether queries and keys are turned by their positions.
    #[config(default = true)]
    pub rotary: bool,
    /// Features turned per head, even; all of them when `None`.
    pub rotary_dim: Option<usize>,
    /// Base of the rotary angles.
    #[config(default = 10000.0)]
    pub rotary_base: f64,
    /// Which features form a rotary pair.
    #[config(default = "RotaryStyle::HalfSplit")]
    pub rotary_style: RotaryStyle,
    /// Whether the projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Probability of dropping an attention probability in training.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Seed of that dropout; each forward pass of the layer draws the next mask of its series.
    #[config(default = 0)]
    pub dropout_seed: u64,
    /// Whether gradients must repeat to the bit: see [`FlashAttentionOptions::deterministic`].
    #[config(default = false)]
    pub deterministic: bool,
}

impl AttentionConfig {
    fn head_dim(&self) -> Result<usize, AttentionError> {
        match self.head_dim {
            Some(dim) => Ok(dim),
            None if self.d_model.is_multiple_of(self.n_heads) => Ok(self.d_model / self.n_heads),
            None => Err(AttentionError::HeadsDoNotDivide {
                d_model: self.d_model,
                n_heads: self.n_heads,
            }),
        }
    }

    fn rotary(&self, head_dim: usize) -> Result<Option<Rotary>, AttentionError> {
        if !self.rotary {
            return Ok(None);
        }
        let dim = self.rotary_dim.unwrap_or(head_dim);
        if dim > head_dim || !dim.is_multiple_of(2) {
            return Err(AttentionError::RotaryDim { dim, head_dim });
        }
        RotaryConfig::new(dim)
            .with_base(self.rotary_base)
            .with_style(self.rotary_style)
            .try_init()
            .map(Some)
    }

    /// Creates the layer.
    ///
    /// # Errors
    ///
    /// Sizes of zero; head counts that do not divide; a head wider than [`MAX_HEAD_DIM`]; an odd number
    /// of rotary features; a dropout outside `[0, 1)`.
    pub fn try_init(&self, device: &Device) -> Result<Attention, AttentionError> {
        let kv_heads = self.n_kv_heads.unwrap_or(self.n_heads);
        at_least_one("d_model", self.d_model)?;
        at_least_one("n_heads", self.n_heads)?;
        at_least_one("n_kv_heads", kv_heads)?;
        at_least_one("window", self.window.unwrap_or(1))?;
        probability("dropout", self.dropout)?;
        if !self.n_heads.is_multiple_of(kv_heads) {
            return Err(AttentionError::KvHeadsDoNotDivide {
                n_heads: self.n_heads,
                n_kv_heads: kv_heads,
            });
        }
        let head_dim = self.head_dim()?;
        at_least_one("head_dim", head_dim)?;
        if head_dim > MAX_HEAD_DIM {
            return Err(AttentionError::HeadTooWide {
                head_dim,
                max: MAX_HEAD_DIM,
            });
        }
        let linear = |from, to| {
            LinearConfig::new(from, to)
                .with_bias(self.bias)
                .init(device)
        };
        Ok(Attention {
            qkv: linear(self.d_model, (self.n_heads + 2 * kv_heads) * head_dim),
            out: linear(self.n_heads * head_dim, self.d_model),
            dropout: DropoutConfig::new(self.dropout).init(),
            rotary: self.rotary(head_dim)?,
            heads: self.n_heads,
            kv_heads,
            head_dim,
            causal: self.causal,
            window: self.window,
            dropout_seed: self.dropout_seed,
            dropout_calls: Arc::default(),
            deterministic: self.deterministic,
        })
    }

    /// Creates the layer.
    ///
    /// # Panics
    ///
    /// With the words of [`try_init`](Self::try_init)'s error.
    pub fn init(&self, device: &Device) -> Attention {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Self-attention of a sequence, with rotary positions and a key/value cache.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mamba_ssm_attention::AttentionConfig;
///
/// let device = Device::default();
/// let attention = AttentionConfig::new(32, 4).with_n_kv_heads(Some(2)).init(&device);
/// let x = Tensor::<3>::random([2, 10, 32], Distribution::Default, &device);
/// assert_eq!(attention.forward(x).dims(), [2, 10, 32]);
/// ```
#[derive(Module, Debug)]
pub struct Attention {
    /// Queries, keys and values: `d_model` to `(n_heads + 2 n_kv_heads) head_dim`, in this order, head
    /// by head.
    pub qkv: Linear,
    /// `n_heads head_dim` to `d_model`.
    pub out: Linear,
    /// Dropout of the attention probabilities.
    pub dropout: Dropout,
    #[module(skip)]
    rotary: Option<Rotary>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    kv_heads: usize,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    causal: bool,
    #[module(skip)]
    window: Option<usize>,
    #[module(skip)]
    dropout_seed: u64,
    #[module(skip)]
    dropout_calls: Arc<AtomicU64>,
    #[module(skip)]
    deterministic: bool,
}

/// What an [`Attention`] layer remembers of the tokens it has seen: their keys, turned, and values.
///
/// With a window only the keys that later tokens can see are kept.
#[derive(Clone, Debug, Default)]
pub struct AttentionState {
    /// `[batch, kv_heads, kept, head_dim]` each.
    cache: Option<(Tensor<4>, Tensor<4>)>,
    position: usize,
}

impl AttentionState {
    /// Number of tokens seen.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Number of tokens whose keys and values are kept.
    pub fn kept(&self) -> usize {
        self.cache.as_ref().map_or(0, |(keys, _)| keys.dims()[2])
    }
}

impl Attention {
    /// Attends within each sequence of `x`, `[batch, length, d_model]`, from position 0 on.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let table = self.rotary_table(&x, 0);
        self.forward_with(x, None, table.as_ref())
    }

    /// [`forward`](Self::forward), of the norm of `x` if there is one, with a table of positions shared
    /// between layers.
    pub(crate) fn forward_with(
        &self,
        x: Tensor<3>,
        norm: Option<&RmsNorm>,
        table: Option<&RotaryTable>,
    ) -> Tensor<3> {
        let options = self.options(&x.device());
        let qkv = self.project(x, norm);
        self.out
            .forward(self_attention(qkv, table, self.heads(), &options))
    }

    /// Continues from `state`: `x`, `[batch, length, d_model]`, follows the tokens already seen.
    /// Equals the same positions of one [`forward`](Self::forward) over the whole sequence.
    ///
    /// # Panics
    ///
    /// When the layer is not causal, or `x` does not fit it or the state.
    pub fn forward_from(&self, x: Tensor<3>, state: AttentionState) -> (Tensor<3>, AttentionState) {
        let table = self.rotary_table(&x, state.position);
        self.forward_from_with(x, None, state, table.as_ref())
    }

    pub(crate) fn forward_from_with(
        &self,
        x: Tensor<3>,
        norm: Option<&RmsNorm>,
        state: AttentionState,
        table: Option<&RotaryTable>,
    ) -> (Tensor<3>, AttentionState) {
        assert!(self.causal, "{}", AttentionError::NotCausal);
        let position = state.position + x.dims()[1];
        let options = self.options(&x.device());
        let [q, k, v] = heads_apart(self.project(x, norm), table, self.heads());
        let (k, v) = match state.cache {
            Some((keys, values)) => (
                Tensor::cat(vec![keys, k], 2),
                Tensor::cat(vec![values, v], 2),
            ),
            None => (k, v),
        };
        let cache = Some((self.keep(k.clone()), self.keep(v.clone())));
        let y = heads_together(flash_attention(q, k, v, &options));
        (self.out.forward(y), AttentionState { cache, position })
    }

    /// One token: `x`, `[batch, d_model]`, at the position after those seen. Equals the same position of
    /// a full pass.
    ///
    /// # Panics
    ///
    /// As [`forward_from`](Self::forward_from).
    pub fn step(&self, x: Tensor<2>, state: AttentionState) -> (Tensor<2>, AttentionState) {
        let (y, state) = self.forward_from(x.unsqueeze_dim(1), state);
        (y.squeeze_dim(1), state)
    }

    /// Positions for `x`, `[batch, length, d_model]`, from `start` on.
    pub(crate) fn rotary_table(&self, x: &Tensor<3>, start: usize) -> Option<RotaryTable> {
        let length = x.dims()[1];
        self.rotary
            .as_ref()
            .map(|rotary| rotary.table(start, length, x.dtype(), &x.device()))
    }

    /// Queries, keys and values side by side.
    fn project(&self, x: Tensor<3>, norm: Option<&RmsNorm>) -> Tensor<3> {
        match norm {
            Some(norm) => project_normalised(&self.qkv, norm, x),
            None => self.qkv.forward(x),
        }
    }

    fn heads(&self) -> Heads {
        Heads {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    pub(super) fn options(&self, device: &Device) -> FlashAttentionOptions {
        FlashAttentionOptions {
            causal: self.causal,
            window: self.window,
            dropout: self.draw_dropout(device),
            deterministic: self.deterministic,
            ..FlashAttentionOptions::default()
        }
    }

    /// The part of the cache that a later token can see.
    fn keep(&self, x: Tensor<4>) -> Tensor<4> {
        let length = x.dims()[2];
        // One stays even with a window of one: an empty tensor is trouble on some devices.
        let kept = self.window.map_or(length, |w| (w - 1).clamp(1, length));
        x.slice_dim(2, length - kept..length)
    }

    /// Dropout of this call, when training: the rule of [`Dropout::forward`].
    fn draw_dropout(&self, device: &Device) -> Option<crate::AttentionDropout> {
        let prob = self.dropout.prob;
        if prob == 0.0 || !self.dropout.training.is_enabled() || !device.is_autodiff() {
            return None;
        }
        let call = self.dropout_calls.fetch_add(1, Ordering::Relaxed);
        let seed = self.dropout_seed.rotate_left(32) ^ call;
        Some(crate::AttentionDropout { prob, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Distribution, Tolerance};

    fn close(a: Tensor<3>, b: Tensor<3>) {
        a.into_data()
            .assert_approx_eq::<f32>(&b.into_data(), Tolerance::absolute(2e-6));
    }

    fn random(shape: [usize; 3]) -> Tensor<3> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::default())
    }

    #[test]
    fn steps_and_pieces_equal_the_full_pass() {
        let device = Device::default();
        let base = AttentionConfig::new(24, 4);
        for config in [
            base.clone(),
            base.clone().with_n_kv_heads(Some(2)).with_bias(true),
            base.clone().with_window(Some(3)),
            base.clone().with_window(Some(1)),
            base.clone().with_rotary_style(RotaryStyle::Interleaved),
            base.clone().with_rotary(false).with_head_dim(Some(5)),
            base.with_rotary_dim(Some(4)),
        ] {
            let layer = config.init(&device);
            let x = random([2, 11, 24]);
            let full = layer.forward(x.clone());

            let mut state = AttentionState::default();
            let mut rows = Vec::new();
            for t in 0..11 {
                let x_t = x.clone().slice_dim(1, t..t + 1).squeeze_dim(1);
                let y_t;
                (y_t, state) = layer.step(x_t, state);
                rows.push(y_t.unsqueeze_dim::<3>(1));
            }
            assert_eq!(state.position(), 11);
            assert_eq!(
                state.kept(),
                config.window.map_or(11, |w| (w - 1).max(1)),
                "{config:?}"
            );
            close(Tensor::cat(rows, 1), full.clone());

            let (head, state) =
                layer.forward_from(x.clone().slice_dim(1, 0..4), AttentionState::default());
            let (tail, _) = layer.forward_from(x.slice_dim(1, 4..11), state);
            close(Tensor::cat(vec![head, tail], 1), full);
        }
    }

    #[test]
    fn a_token_does_not_see_later_ones_unless_asked_to() {
        let device = Device::default();
        let x = random([1, 6, 16]);
        let changed = Tensor::cat(vec![x.clone().slice_dim(1, 0..4), random([1, 2, 16])], 1);
        let difference = |causal| {
            let layer = AttentionConfig::new(16, 2)
                .with_causal(causal)
                .init(&device);
            let gap = layer.forward(x.clone()) - layer.forward(changed.clone());
            gap.slice_dim(1, 0..4).abs().max().into_scalar::<f32>()
        };
        assert_eq!(difference(true), 0.0);
        assert!(difference(false) > 1e-3);
    }

    #[test]
    fn dropout_acts_in_training_only_and_draws_anew() {
        let device = Device::default();
        let layer = AttentionConfig::new(16, 2).with_dropout(0.5);
        let x = random([1, 9, 16]);
        let still = layer.init(&device);
        close(still.forward(x.clone()), still.forward(x.clone()));

        let device = device.autodiff();
        let train = layer.init(&device);
        let x = Tensor::from_inner(x);
        let (a, b) = (train.forward(x.clone()), train.forward(x));
        assert!((a - b).abs().max().into_scalar::<f32>() > 1e-3);
    }

    #[test]
    fn configs_that_cannot_work_are_refused_by_name() {
        let device = Device::default();
        let refused = |config: AttentionConfig| config.try_init(&device).unwrap_err();
        let base = || AttentionConfig::new(16, 4);
        assert_eq!(
            refused(AttentionConfig::new(0, 4)),
            AttentionError::Zero { field: "d_model" }
        );
        assert_eq!(
            refused(AttentionConfig::new(16, 0)),
            AttentionError::Zero { field: "n_heads" }
        );
        assert_eq!(
            refused(AttentionConfig::new(18, 4)),
            AttentionError::HeadsDoNotDivide {
                d_model: 18,
                n_heads: 4
            }
        );
        assert_eq!(
            refused(base().with_n_kv_heads(Some(3))),
            AttentionError::KvHeadsDoNotDivide {
                n_heads: 4,
                n_kv_heads: 3
            }
        );
        assert_eq!(
            refused(base().with_n_kv_heads(Some(0))),
            AttentionError::Zero {
                field: "n_kv_heads"
            }
        );
        assert_eq!(
            refused(base().with_head_dim(Some(0))),
            AttentionError::Zero { field: "head_dim" }
        );
        assert_eq!(
            refused(base().with_head_dim(Some(257)).with_rotary(false)),
            AttentionError::HeadTooWide {
                head_dim: 257,
                max: 256
            }
        );
        assert_eq!(
            refused(base().with_head_dim(Some(3))),
            AttentionError::RotaryDim {
                dim: 3,
                head_dim: 3
            }
        );
        assert_eq!(
            refused(base().with_rotary_dim(Some(6))),
            AttentionError::RotaryDim {
                dim: 6,
                head_dim: 4
            }
        );
        assert_eq!(
            refused(base().with_window(Some(0))),
            AttentionError::Zero { field: "window" }
        );
        for p in [-0.1, 1.0, f64::NAN] {
            let words = refused(base().with_dropout(p)).to_string();
            assert!(
                words.contains("dropout") && words.contains("0 <= p < 1"),
                "{words}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "causal = false")]
    fn decoding_with_a_layer_that_sees_the_future_is_refused() {
        let layer = AttentionConfig::new(8, 2)
            .with_causal(false)
            .init(&Device::default());
        layer.forward_from(random([1, 2, 8]), AttentionState::default());
    }
}
