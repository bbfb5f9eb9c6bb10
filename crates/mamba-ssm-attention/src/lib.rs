//! Causal attention with rotary positions and a Transformer forecaster for Burn.
//!
//! - [`flash_attention`]: exact attention with tiles and an online softmax; the backward pass
//!   recomputes the scores, so memory grows with the length, not with its square.
//! - [`Attention`], [`Mlp`], [`Transformer`]: layers on top of it, with a key/value cache and a
//!   `step` for decoding that equals the full pass.
//! - [`Rotary`]: rotary positions, half-split (NeoX) or interleaved (GPT-J).
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use mamba_ssm_attention::TransformerConfig;
//!
//! let device = Device::default();
//! let model = TransformerConfig::new(64).with_n_layers(2).init(&device);
//! let x = Tensor::<3>::random([1, 10, 64], Distribution::Default, &device);
//! let y = model.forward(x.clone()); // [batch, length, d_model]
//!
//! // The same, a token at a time.
//! let mut state = model.empty_state();
//! for t in 0..10 {
//!     let x_t = x.clone().slice([0..1, t..t + 1]).reshape([1, 64]);
//!     let y_t;
//!     (y_t, state) = model.step(x_t, state);
//!     assert_eq!(y_t.dims(), [1, 64]);
//! }
//! assert_eq!(y.dims(), [1, 10, 64]);
//! ```

#[doc = include_str!("../README.md")]
#[cfg(doctest)]
struct Readme;

mod error;
pub mod layers;
pub mod ops;

pub use error::AttentionError;
pub use layers::{
    Attention, AttentionConfig, AttentionState, Mlp, MlpConfig, Transformer, TransformerBlock,
    TransformerConfig, TransformerState,
};
pub use ops::flash_attention::{
    AttentionDropout, FlashAttentionOptions, MAX_HEAD_DIM, flash_attention,
};
pub use ops::rotary::{Rotary, RotaryConfig, RotaryStyle, RotaryTable};
