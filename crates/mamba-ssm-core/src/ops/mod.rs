//! The operators, one room each. In every room `mod.rs` holds the public function (shapes, panics,
//! source equation) and `reference.rs` the definition in tensor operations, differentiable on any
//! backend.

// Kernels nest the ifs that are decided at run time inside those decided when they are compiled, assign products to
// what an index picks, and their numbers have no `is_multiple_of`.
#![cfg_attr(
    feature = "cubecl",
    allow(
        clippy::assign_op_pattern,
        clippy::collapsible_if,
        clippy::manual_is_multiple_of,
        clippy::needless_range_loop
    )
)]

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
