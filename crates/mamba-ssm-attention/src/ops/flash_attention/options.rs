use std::ops::Range;

use burn::backend::Dispatch;
use burn::tensor::{Bool, Tensor};

use super::backend::Padding;

/// The widest head supported.
pub const MAX_HEAD_DIM: usize = 256;

/// Dropout of attention probabilities.
///
/// Whether probability `(b, h, i, j)` is kept is a hash of `seed` and the position: the forward and
/// the backward pass, and every backend and tile size, drop the same ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDropout {
    /// Probability of dropping, `0 <= p < 1`. What is kept is scaled by `1 / (1 - p)`.
    pub prob: f64,
    /// Take another one for every layer and step.
    pub seed: u64,
}

/// What [`flash_attention`](super::flash_attention) should do; the default is full attention with
/// `scale = 1 / sqrt(head_dim)`.
#[derive(Clone, Debug, Default)]
pub struct FlashAttentionOptions {
    /// Whether a query sees no key after its own position.
    pub causal: bool,
    /// Factor of the scores; `1 / sqrt(head_dim)` when `None`.
    pub scale: Option<f64>,
    /// Keep to keys less than this many positions away: with `causal`, the query's own position and
    /// the `window - 1` before it; without, as many after it as well.
    pub window: Option<usize>,
    /// `[batch, length_k]`, `true` where a key is padding and no query may see it.
    pub key_padding: Option<Tensor<2, Bool>>,
    /// Dropout of the probabilities.
    pub dropout: Option<AttentionDropout>,
    /// Whether gradients must repeat to the bit. The backward pass on matrix units is slower then, since it may
    /// not add to the gradient of `q` in any order; all else always repeats. (`deterministic` of the official
    /// `flash_attn_func`.)
    pub deterministic: bool,
}

impl FlashAttentionOptions {
    /// Every query sees its own position and those before it.
    pub fn causal() -> Self {
        Self {
            causal: true,
            ..Self::default()
        }
    }

    /// Sets the factor of the scores.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the window.
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = Some(window);
        self
    }

    /// Sets the padding mask, `[batch, length_k]`, `true` at padding.
    pub fn with_key_padding(mut self, mask: Tensor<2, Bool>) -> Self {
        self.key_padding = Some(mask);
        self
    }

    /// Sets the dropout of the probabilities.
    pub fn with_dropout(mut self, prob: f64, seed: u64) -> Self {
        self.dropout = Some(AttentionDropout { prob, seed });
        self
    }

    /// Makes gradients repeat to the bit.
    pub fn with_deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Checks everything that can be wrong with a call.
    pub(crate) fn check(&self, q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Spec {
        let ([batch, heads, lq, dim], [kb, kv_heads, lk, kd]) = (q.dims(), k.dims());
        let shapes = || {
            format!(
                "q {:?}, k {:?}, v {:?} ([batch, heads, length, head_dim])",
                q.dims(),
                k.dims(),
                v.dims()
            )
        };
        assert!(
            batch * heads * lq * kv_heads * lk > 0,
            "flash_attention: no axis may be empty: {}",
            shapes()
        );
        assert!(
            k.dims() == v.dims() && kb == batch && kd == dim && heads.is_multiple_of(kv_heads),
            "flash_attention: k and v must have the same shape, q's batch and head_dim, and a \
             number of heads that divides q's: {}",
            shapes()
        );
        assert!(
            (1..=MAX_HEAD_DIM).contains(&dim),
            "flash_attention: head_dim must be 1 to {MAX_HEAD_DIM}: {}",
            shapes()
        );
        assert!(
            q.dtype() == k.dtype() && q.dtype() == v.dtype(),
            "flash_attention: q, k and v must have one dtype, got {:?}, {:?}, {:?}",
            q.dtype(),
            k.dtype(),
            v.dtype()
        );
        if let Some(mask) = &self.key_padding {
            assert!(
                mask.dims() == [batch, lk],
                "flash_attention: key_padding must be [batch, length_k] = [{batch}, {lk}], got {:?}",
                mask.dims()
            );
        }
        self.check_numbers();
        self.spec(dim)
    }

    /// What backends take, for heads of `dim` features.
    pub(crate) fn spec(&self, dim: usize) -> Spec {
        Spec {
            causal: self.causal,
            scale: self.scale.unwrap_or((dim as f64).powf(-0.5)),
            window: self.window,
            dropout: self.dropout.filter(|dropout| dropout.prob > 0.0),
            deterministic: self.deterministic,
        }
    }

    /// The padding mask as backends take it.
    pub(crate) fn padding(&self) -> Padding<Dispatch> {
        match &self.key_padding {
            Some(mask) => Padding::Keys(mask.clone().into_dispatch()),
            None => Padding::None,
        }
    }

    fn check_numbers(&self) {
        assert!(
            self.window != Some(0),
            "flash_attention: a window of 0 sees nothing; use 1 or more"
        );
        if let Some(scale) = self.scale {
            assert!(
                scale.is_finite(),
                "flash_attention: scale must be finite, got {scale}"
            );
        }
        if let Some(dropout) = self.dropout {
            assert!(
                (0.0..1.0).contains(&dropout.prob),
                "flash_attention: dropout probability must be in [0, 1), got {}",
                dropout.prob
            );
        }
    }
}

/// Checked options without tensors: what an implementation needs beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    pub(crate) causal: bool,
    pub(crate) scale: f64,
    pub(crate) window: Option<usize>,
    pub(crate) dropout: Option<AttentionDropout>,
    pub(crate) deterministic: bool,
}

impl Spec {
    /// The keys that query `i` of `lq` may see among `lk`, padding aside.
    pub(crate) fn visible(&self, i: usize, lq: usize, lk: usize) -> Range<usize> {
        // One past the query's position; zero or less when it stands before the first key.
        let after = (i + 1 + lk) as i64 - lq as i64;
        let clamp = |n: i64| n.clamp(0, lk as i64) as usize;
        let window = self.window.map(|w| w.min(i64::MAX as usize / 4) as i64);
        let start = window.map_or(0, |w| clamp(after - w));
        let end = match (self.causal, window) {
            (true, _) => clamp(after),
            (false, Some(w)) => clamp(after - 1 + w),
            (false, None) => lk,
        };
        start..end.max(start)
    }

    /// The keys that any of the queries `rows` may see. Both ends of `visible` grow with `i`.
    pub(crate) fn visible_to_any(&self, rows: Range<usize>, lq: usize, lk: usize) -> Range<usize> {
        self.visible(rows.start, lq, lk).start..self.visible(rows.end - 1, lq, lk).end
    }

    /// Whether every query sees every key, padding aside.
    pub(crate) fn sees_all(&self) -> bool {
        !self.causal && self.window.is_none()
    }
}
