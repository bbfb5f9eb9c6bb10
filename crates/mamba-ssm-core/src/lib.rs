//! Selective state-space models for Burn: the operators of Mamba-1 and Mamba-2, their layers, and the
//! official checkpoints.
//!
//! The crate knows tensors and nothing of prices, files of data, or training. Tensors carry their
//! device, so the same code runs on every backend that Burn is built with; nothing here names one.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use mamba_ssm_core::Mamba2Config;
//!
//! let device = Device::default();
//! let layer = Mamba2Config::new(64).with_d_state(16).with_headdim(16).init(&device);
//!
//! // A whole sequence: [batch, length, d_model].
//! let x = Tensor::<3>::random([2, 100, 64], Distribution::Default, &device);
//! let y = layer.forward(x.clone());
//! assert_eq!(y.dims(), [2, 100, 64]);
//!
//! // The same sequence in two parts, the state carried from one to the next.
//! let state = layer.empty_state(2, &device);
//! let (first, state) = layer.forward_from(x.clone().narrow(1, 0, 60), state);
//! let (second, state) = layer.forward_from(x.clone().narrow(1, 60, 40), state);
//! let parts = Tensor::cat(vec![first, second], 1);
//! assert!((y - parts).abs().max().into_scalar::<f32>() < 1e-4);
//!
//! // And one token more: [batch, d_model].
//! let (next, _state) = layer.step(x.narrow(1, 0, 1).squeeze_dim(1), state);
//! assert_eq!(next.dims(), [2, 64]);
//! ```
//!
//! # What is where
//!
//! - [`ops`]: the operators, a room each: [`ssd()`](ops::ssd::ssd) (Mamba-2),
//!   [`selective_scan()`](ops::selective_scan::selective_scan) (Mamba-1),
//!   [`causal_conv1d()`](ops::causal_conv1d::causal_conv1d),
//!   [`gated_rms_norm()`](ops::gated_rms_norm::gated_rms_norm).
//! - [`layers`]: [`Mamba1`] and [`Mamba2`], with `forward`, `forward_from` and `step`.
//! - [`stack`]: a stack of layers, plain or pre-norm residual.
//! - [`decode`]: one token at a time on the CPU, without allocating (feature `flex`).
//! - [`step_graph`]: one token at a time on a GPU, as one launch.
//! - [`checkpoint`]: the official parameter names, safetensors in and out.
//!
//! # Features
//!
//! `flex` (default, pure Rust CPU), `cuda`, `rocm`, `metal`, `vulkan`, `wgpu` and `cpu` forward to Burn's.

pub mod checkpoint;
#[cfg(feature = "flex")]
pub mod decode;
mod error;
pub mod layers;
pub mod ops;
pub mod stack;
pub mod step_graph;

pub use checkpoint::{Checkpoint, CheckpointError, NamedTensor, StateDict};
#[cfg(feature = "flex")]
pub use decode::Decoder;
pub use error::ConfigError;
pub use layers::{Mamba1, Mamba1Config, Mamba1State, Mamba2, Mamba2Config, Mamba2State};
pub use ops::causal_conv1d::{ConvInput, ConvOutput, causal_conv1d};
pub use ops::gated_rms_norm::{GatedNormInput, GatedNormOptions, gated_rms_norm};
pub use ops::selective_scan::{ScanInput, ScanOptions, ScanOutput, selective_scan};
pub use ops::ssd::{SkipWeight, SsdInput, SsdOptions, SsdOutput, ssd};
pub use stack::{MambaLayer, MambaLayerConfig, MambaStack, MambaStackConfig, StackState};
pub use step_graph::StepGraph;
