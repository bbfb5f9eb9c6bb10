//! The operators: one folder each, with the definition in tensor operations beside the fast versions.

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

#[cfg(feature = "cubecl")]
mod cube;
pub mod flash_attention;
pub(crate) mod gelu;
pub(crate) mod normalise;
pub(crate) mod residual;
pub mod rotary;
pub(crate) mod self_attention;
