//! What the trainer asks of data and models.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::config::Precision;
use crate::error::{BoxError, TrainError};

/// A model that maps a sequence to a sequence of forecasts.
///
/// Implement it for any Burn module; the trainer knows nothing else about the model.
pub trait Forecaster: Module {
    /// Maps `input` `[batch, length, features in]` to forecasts `[batch, length, features out]`;
    /// position `t` forecasts whatever position `t` of [`TrainBatch::target`] holds.
    fn forward(&self, input: Tensor<3>) -> Tensor<3>;

    /// Whether [`forward_with`](Self::forward_with) can run in `precision`. By default only
    /// [`Precision::F32`].
    fn supports(&self, precision: Precision) -> bool {
        precision == Precision::F32
    }

    /// As [`forward`](Self::forward), with activations in `precision`.
    ///
    /// `input` is f32; the forecast may be of either type. Parameters are f32 and are to be cast
    /// where they are used, so that their gradients come back as f32; what needs the range or
    /// precision of f32 (normalisation, recurrent states, the addition of a large known level)
    /// stays f32. By default [`forward`](Self::forward).
    fn forward_with(&self, input: Tensor<3>, precision: Precision) -> Tensor<3> {
        let _ = precision;
        self.forward(input)
    }
}

/// One micro-batch, with target and mask already aligned to the positions of the forecasts.
///
/// The tensors live on the model's device; they need no autodiff.
#[derive(Debug, Clone)]
pub struct TrainBatch {
    /// What the model sees, `[batch, length, features in]`.
    pub input: Tensor<3>,
    /// What it should answer, `[batch, length, features out]`.
    pub target: Tensor<3>,
    /// Above zero where the target counts, `[batch, length]`.
    pub mask: Tensor<2>,
}

impl TrainBatch {
    /// The number of positions in the input, batch times length.
    pub fn tokens(&self) -> usize {
        let [batch, length, _] = self.input.dims();
        batch * length
    }

    /// Compares target and mask with the prediction and the number of feature weights.
    pub(crate) fn check(
        &self,
        stage: &'static str,
        prediction: &Tensor<3>,
        weights: usize,
    ) -> Result<(), TrainError> {
        let [batch, length, features] = prediction.dims();
        let mismatch = |tensor, expected: &[usize], found: &[usize]| TrainError::BatchShape {
            stage,
            tensor,
            expected: expected.to_vec(),
            found: found.to_vec(),
        };
        let target = self.target.dims();
        if target != [batch, length, features] {
            return Err(mismatch("target", &[batch, length, features], &target));
        }
        let mask = self.mask.dims();
        if mask != [batch, length] {
            return Err(mismatch("mask", &[batch, length], &mask));
        }
        if weights != 0 && weights != features {
            return Err(mismatch("loss.feature_weights", &[features], &[weights]));
        }
        Ok(())
    }
}

/// Batches one after another.
pub type BatchIter<'a> = Box<dyn Iterator<Item = Result<TrainBatch, BoxError>> + 'a>;

/// Where batches come from.
///
/// A run can be resumed exactly if the same `epoch` always yields the same batches in the same
/// order: derive any shuffling from a seed and the epoch number.
pub trait BatchSource {
    /// The number of micro-batches in one training epoch.
    fn train_len(&self) -> usize;

    /// The training micro-batches of `epoch` (counted from zero), from micro-batch `start` on
    /// (`start` may equal [`train_len`](Self::train_len): then there are none).
    ///
    /// # Errors
    ///
    /// Whatever keeps the epoch from starting; later failures are items of the iterator.
    fn train_epoch(&mut self, epoch: usize, start: usize) -> Result<BatchIter<'_>, BoxError>;

    /// The validation batches, always the same in the same order.
    ///
    /// # Errors
    ///
    /// As [`train_epoch`](Self::train_epoch).
    fn validation(&mut self) -> Result<BatchIter<'_>, BoxError>;
}
