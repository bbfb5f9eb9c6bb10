//! Where the crates meet: a forecaster of minute candles from `mamba-ssm-core` or `mamba-ssm-attention`,
//! the adapters between the data crate's batches and the trainer's, and the commands of the `bitcoin`
//! example.
//!
//! The way of one number: [`encoding`] turns a window of z-scores into what a network sees and should
//! answer, and its answers back into z-scores; [`batches`] feeds encoded windows to the trainer;
//! [`forecaster`] is the network, [`hybrid`] one of its backbones; [`scoring`] forecasts every row of a split
//! once and hands levels to the evaluation; [`run`] is the folder where one training run lives; [`preset`] the
//! settings by name, among them those of the published note "Forecasting Bitcoin with Mamba State Space Models",
//! whose job this is.

pub mod batches;
pub mod bitcoin;
pub mod device;
pub mod encoding;
mod error;
pub mod forecaster;
pub mod hybrid;
pub mod preset;
pub mod run;
pub mod scoring;

pub use error::{Error, Result};

/// Every step of training allocates what the step before gave back. The system's allocator returns it in between, and
/// brings it in again page by page: up to 40 % of a step on a CPU (`docs/performance.md`).
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;
