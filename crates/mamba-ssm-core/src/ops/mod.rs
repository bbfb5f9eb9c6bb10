//! The operators, one room each. In every room `mod.rs` holds the public function (shapes, panics,
//! source equation) and `reference.rs` the definition in tensor operations, differentiable on any
//! backend.

pub mod causal_conv1d;
pub mod gated_rms_norm;
pub(crate) mod mamba2_inner;
pub mod selective_scan;
pub mod ssd;

#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
pub(crate) mod native;
mod optional;
mod precision;
