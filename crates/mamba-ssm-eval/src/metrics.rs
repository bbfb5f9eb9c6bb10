//! Streaming error measures in double precision.

use crate::{EvalError, Result};
use serde::{Deserialize, Serialize};

/// Smallest divisor of a percentage error, so that targets near zero do not divide by zero.
pub const MAPE_FLOOR: f64 = 1e-8;

/// The error measures of one feature.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Mean squared error.
    pub mse: f64,
    /// Root of the mean squared error.
    pub rmse: f64,
    /// Mean absolute error.
    pub mae: f64,
    /// Mean absolute percentage error, in percent:
    /// `100 * mean(|prediction - target| / max(|target|, 1e-8))`.
    ///
    /// In z-score space targets cross zero, so this figure is large and unstable there by
    /// nature; in level space it reads as usual.
    pub mape: f64,
    /// Coefficient of determination, `1 - sum of squared errors / sum of squared deviations of
    /// the targets from their mean`. For targets that are all equal: 1 when every prediction is
    /// exact, else 0 (scikit-learn's convention), so it is always a number.
    pub r2: f64,
}

/// Accumulates [`Metrics`] one pair at a time, in constant memory.
///
/// The spread of the targets is tracked with Welford's update (Knuth, TAOCP 2, 4.2.2), so an R2
/// of 0.999999 on targets far from zero keeps its digits.
///
/// ```
/// use mamba_ssm_eval::MetricsAccumulator;
///
/// let mut scores = MetricsAccumulator::new();
/// for (prediction, target) in [(1.0, 1.0), (2.0, 3.0)] {
///     scores.push(prediction, target);
/// }
/// let metrics = scores.finish().expect("two pairs were pushed");
/// assert_eq!(metrics.mse, 0.5);
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct MetricsAccumulator {
    count: u64,
    squared: f64,
    absolute: f64,
    relative: f64,
    target_mean: f64,
    target_spread: f64,
}

impl MetricsAccumulator {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one pair in. Values must be finite for the result to be so.
    pub fn push(&mut self, prediction: f64, target: f64) {
        let error = (prediction - target).abs();
        self.count += 1;
        self.squared += error * error;
        self.absolute += error;
        self.relative += error / target.abs().max(MAPE_FLOOR);
        let before = target - self.target_mean;
        self.target_mean += before / self.count as f64;
        self.target_spread += before * (target - self.target_mean);
    }

    /// Pairs taken in so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The measures of what was taken in; `None` before the first pair.
    pub fn finish(&self) -> Option<Metrics> {
        if self.count == 0 {
            return None;
        }
        let count = self.count as f64;
        let mse = self.squared / count;
        let r2 = if self.target_spread > 0.0 {
            1.0 - self.squared / self.target_spread
        } else if self.squared == 0.0 {
            1.0
        } else {
            0.0
        };
        Some(Metrics {
            mse,
            rmse: mse.sqrt(),
            mae: self.absolute / count,
            mape: 100.0 * self.relative / count,
            r2,
        })
    }
}

/// The measures of `predictions` against `targets`, both `[rows]`.
///
/// # Errors
///
/// When the slices are empty, differ in length, or hold a value that is not finite.
pub fn metrics(predictions: &[f64], targets: &[f64]) -> Result<Metrics> {
    if predictions.len() != targets.len() {
        return Err(EvalError::LengthMismatch {
            what: "predictions",
            found: predictions.len(),
            expected: targets.len(),
            layout: "one per target".to_owned(),
        });
    }
    let mut scores = MetricsAccumulator::new();
    for (index, (&prediction, &target)) in predictions.iter().zip(targets).enumerate() {
        for (what, value) in [("predictions", prediction), ("targets", target)] {
            if !value.is_finite() {
                return Err(EvalError::NonFiniteValue { what, index, value });
            }
        }
        scores.push(prediction, target);
    }
    scores.finish().ok_or(EvalError::Empty { what: "targets" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // errors 0.5, -1, 0, 2 against targets with mean 2.5 and spread 5
        let found = metrics(&[1.5, 1.0, 3.0, 6.0], &[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert!((found.mse - 5.25 / 4.0).abs() < 1e-15);
        assert!((found.rmse - (5.25f64 / 4.0).sqrt()).abs() < 1e-15);
        assert!((found.mae - 3.5 / 4.0).abs() < 1e-15);
        assert!((found.mape - 100.0 * (0.5 + 0.5 + 0.0 + 0.5) / 4.0).abs() < 1e-12);
        assert!((found.r2 - (1.0 - 5.25 / 5.0)).abs() < 1e-15);
    }

    #[test]
    fn r2_keeps_its_digits_far_from_zero() {
        // A unit square wave at one million with an error of 0.001: R2 = 1 - 1e-6 exactly.
        let mut scores = MetricsAccumulator::new();
        for i in 0..400_000 {
            let target = 1e6 + if i % 2 == 0 { 1.0 } else { -1.0 };
            scores.push(target + 1e-3, target);
        }
        let r2 = scores.finish().unwrap().r2;
        assert!(((1.0 - r2) * 1e6 - 1.0).abs() < 1e-5, "{r2}");
    }

    #[test]
    fn mape_has_its_floor() {
        let found = metrics(&[1e-8], &[0.0]).unwrap();
        assert!((found.mape - 100.0).abs() < 1e-9);
    }

    #[test]
    fn constant_targets_leave_r2_a_number() {
        assert_eq!(metrics(&[2.0, 2.0], &[2.0, 2.0]).unwrap().r2, 1.0);
        assert_eq!(metrics(&[2.0, 3.0], &[2.0, 2.0]).unwrap().r2, 0.0);
    }

    #[test]
    fn bad_input_is_named() {
        let error = metrics(&[1.0], &[1.0, 2.0]).unwrap_err();
        assert!(matches!(
            error,
            EvalError::LengthMismatch {
                found: 1,
                expected: 2,
                ..
            }
        ));
        let error = metrics(&[], &[]).unwrap_err();
        assert!(matches!(error, EvalError::Empty { what: "targets" }));
        let error = metrics(&[1.0, f64::NAN], &[1.0, 2.0]).unwrap_err();
        assert!(
            error.to_string().starts_with("predictions[1] is NaN"),
            "{error}"
        );
    }
}
