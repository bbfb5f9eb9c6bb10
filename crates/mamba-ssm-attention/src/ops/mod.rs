//! The operators: one folder each, with the definition in tensor operations beside the fast versions.

#[cfg(feature = "cubecl")]
mod cube;
pub mod flash_attention;
pub(crate) mod gelu;
pub(crate) mod normalise;
pub(crate) mod residual;
pub mod rotary;
pub(crate) mod self_attention;
