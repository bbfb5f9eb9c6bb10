//! Token projections for Burn: `[tokens, d_input] x [d_input, d_output]` where the tokens are many
//! (tens of thousands) and the features few (tens to hundreds).
//!
//! Sequence models spend much of a training step in such projections. What makes them special is the
//! *weight gradient*: a product whose inner dimension is the number of tokens. This crate is the one
//! place that decides how those products are computed, so that every layer built on it gets the same
//! speed. It is a leaf: it knows tensors and nothing else.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use mamba_ssm_linear::LinearConfig;
//!
//! let device = Device::default();
//! let projection = LinearConfig::new(64, 656).with_bias(false).init(&device);
//! let tokens = Tensor::<3>::random([2, 128, 64], Distribution::Default, &device);
//! assert_eq!(projection.forward(tokens).dims(), [2, 128, 656]);
//! ```
//!
//! # Features
//!
//! `flex` (default, pure Rust CPU), `cuda`, `rocm`, `metal`, `vulkan`, `wgpu` and `cpu` forward to Burn's.

/// For the crates that build their operators on this one; no part of the interface.
#[cfg(feature = "cubecl")]
#[doc(hidden)]
pub mod cube;
#[cfg(feature = "flex")]
mod decoder;
/// As `cube`.
#[doc(hidden)]
pub mod device;
/// As `cube`.
#[doc(hidden)]
pub mod gradients;
mod linear;
/// As `cube`.
#[cfg(feature = "flex")]
#[doc(hidden)]
pub mod memory;
pub mod ops;
/// As `cube`.
#[cfg(feature = "flex")]
#[doc(hidden)]
pub mod simd;

#[cfg(feature = "flex")]
pub use decoder::LinearDecoder;
pub use linear::{Linear, LinearConfig};
pub use ops::project::project;
