//! A training loop for sequence forecasters in Burn.
//!
//! It knows nothing of what is forecast or of the network that does it: a model is a
//! [`Forecaster`], data come from a [`BatchSource`], and [`Trainer`] does the rest:
//!
//! - [`masked_huber`]: Smooth L1 loss over valid positions, weighted per feature;
//! - [`ModuleAdamW`] with gradients accumulated over micro-batches ([`Accumulation`]) and clipped
//!   by their global norm ([`clip_gradients`]); a NaN or infinite gradient skips the step;
//! - [`ReduceOnPlateau`] and [`EarlyStopping`] on the validation loss;
//! - `best` and `last` checkpoints that survive a kill at any moment, and an exact resume;
//! - a history for plots ([`read_history`]) and progress for a terminal ([`Reporter`]).
//!
//! # Example
//!
//! A linear model learns to continue `x`, `2 x`, `4 x`, ...:
//!
//! ```
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::tensor::{Device, Tensor};
//! use mamba_ssm_train::{
//!     BatchIter, BatchSource, BoxError, CheckpointKind, Forecaster, HuberConfig, Outcome,
//!     TrainBatch, TrainConfig, Trainer, load_model,
//! };
//!
//! #[derive(Module, Debug)]
//! struct Toy {
//!     linear: Linear,
//! }
//!
//! impl Forecaster for Toy {
//!     fn forward(&self, input: Tensor<3>) -> Tensor<3> {
//!         self.linear.forward(input)
//!     }
//! }
//!
//! struct Doubling(Device);
//!
//! impl Doubling {
//!     fn batch(&self, start: f32) -> TrainBatch {
//!         let values = [0, 1, 2, 3].map(|i| [start * f32::powi(2.0, i)]);
//!         let values = Tensor::<3>::from_floats([values], &self.0);
//!         TrainBatch {
//!             input: values.clone().narrow(1, 0, 3),
//!             target: values.narrow(1, 1, 3),
//!             mask: Tensor::ones([1, 3], &self.0),
//!         }
//!     }
//! }
//!
//! impl BatchSource for Doubling {
//!     fn train_len(&self) -> usize {
//!         16
//!     }
//!     fn train_epoch(&mut self, _epoch: usize, start: usize) -> Result<BatchIter<'_>, BoxError> {
//!         Ok(Box::new((start..16).map(|i| Ok(self.batch(0.01 * i as f32)))))
//!     }
//!     fn validation(&mut self) -> Result<BatchIter<'_>, BoxError> {
//!         Ok(Box::new(std::iter::once(Ok(self.batch(0.1)))))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::default();
//! let run = tempfile::tempdir()?;
//! let config = TrainConfig {
//!     epochs: 20,
//!     lr: 0.1,
//!     accumulation: 2,
//!     loss: HuberConfig { beta: 0.1, ..HuberConfig::default() },
//!     ..TrainConfig::default()
//! };
//! let model = Toy { linear: LinearConfig::new(1, 1).init(&device) };
//! let mut source = Doubling(device.clone());
//! let fit = Trainer::new(config, run.path())?.fit(model, &mut source)?;
//! assert!(matches!(fit.outcome, Outcome::Finished | Outcome::EarlyStopped));
//!
//! let fresh = Toy { linear: LinearConfig::new(1, 1).init(&device) };
//! let best = load_model(run.path(), CheckpointKind::Best, fresh)?;
//! let four: f32 = best.forward(Tensor::<3>::from_floats([[[2.0]]], &device)).into_scalar();
//! assert!((four - 4.0).abs() < 0.5, "{four}");
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod accumulate;
mod batch;
mod checkpoint;
mod clip;
mod config;
mod error;
mod files;
mod history;
mod loss;
mod optimizer;
mod progress;
mod schedule;
mod session;
mod stopping;
mod trainer;

pub use accumulate::{Accumulated, Accumulation};
pub use batch::{BatchIter, BatchSource, Forecaster, TrainBatch};
pub use checkpoint::{
    Best, CheckpointKind, MODEL_FILE, OPTIMIZER_FILE, PartialEpoch, STATE_FILE, TrainState,
    load_model, load_parameters, load_state, save_parameters,
};
pub use clip::{clip_gradients, gradient_norm, scale_gradients};
pub use config::{Precision, TrainConfig};
pub use error::{BoxError, TrainError};
pub use history::{EpochRecord, HISTORY_FILE, read_history};
pub use loss::{HuberConfig, masked_huber, masked_huber_sum, next_step};
pub use optimizer::ModuleAdamW;
pub use progress::{LiveLine, PlainLines, Reporter, Silent, StepReport, default_reporter};
pub use schedule::{PlateauConfig, PlateauState, ReduceOnPlateau};
pub use stopping::{EarlyStopping, StoppingState};
pub use trainer::{Fit, Outcome, StopFlag, Trainer};

/// Compiles the README's snippet.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
