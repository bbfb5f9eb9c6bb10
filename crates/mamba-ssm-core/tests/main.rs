//! The crate from outside: operators against plain loops and finite differences, layers against
//! themselves step by step, checkpoints, and what is refused.

mod conv_and_norm;
#[cfg(feature = "flex")]
mod decode;
mod kernels;
mod kernels_local;
mod kernels_scan;
mod layers;
#[cfg(feature = "flex")]
mod long;
#[cfg(feature = "flex")]
mod native;
mod selective_scan;
mod ssd;
mod step_graph;
mod support;
