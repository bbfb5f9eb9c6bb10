//! Learning-rate schedule: reduce on plateau.

use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// Settings of [`ReduceOnPlateau`]; the names and defaults of PyTorch's `ReduceLROnPlateau`,
/// with the patience and factor of this crate's default run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlateauConfig {
    /// The learning rate is multiplied by this on a plateau; in (0, 1). Default 0.5.
    pub factor: f64,
    /// Epochs without improvement that are tolerated; the rate drops after one more. Default 2.
    pub patience: usize,
    /// Relative improvement that counts: `value < best * (1 - threshold)`. Default 1e-4.
    pub threshold: f64,
    /// Epochs after a reduction in which bad epochs are not counted. Default 0.
    pub cooldown: usize,
    /// The rate never drops below this. Default 0.
    pub min_lr: f64,
}

impl Default for PlateauConfig {
    fn default() -> Self {
        Self {
            factor: 0.5,
            patience: 2,
            threshold: 1e-4,
            cooldown: 0,
            min_lr: 0.0,
        }
    }
}

impl PlateauConfig {
    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] naming the setting.
    pub fn validate(&self) -> Result<(), TrainError> {
        let config = |field, problem| Err(TrainError::Config { field, problem });
        if !(self.factor > 0.0 && self.factor < 1.0) {
            return config(
                "plateau.factor",
                format!("is {}, but must lie between 0 and 1", self.factor),
            );
        }
        if !(self.threshold >= 0.0 && self.threshold < 1.0) {
            return config(
                "plateau.threshold",
                format!("is {}, but must lie in [0, 1)", self.threshold),
            );
        }
        if !(self.min_lr.is_finite() && self.min_lr >= 0.0) {
            return config(
                "plateau.min_lr",
                format!("is {}, but must not be negative", self.min_lr),
            );
        }
        Ok(())
    }
}

/// What [`ReduceOnPlateau`] remembers between epochs; part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlateauState {
    /// The current learning rate.
    pub lr: f64,
    /// The best value so far; `None` before the first.
    pub best: Option<f64>,
    /// Epochs without improvement since the best value or the last reduction.
    pub bad_epochs: usize,
    /// Epochs of cooldown left.
    pub cooldown_left: usize,
}

/// Lowers the learning rate when a value stops falling, exactly as
/// `torch.optim.lr_scheduler.ReduceLROnPlateau` does in mode `min` with a relative threshold.
///
/// NaN and infinity count as no improvement.
///
/// # Example
///
/// ```
/// use mamba_ssm_train::{PlateauConfig, ReduceOnPlateau};
///
/// let config = PlateauConfig { patience: 1, ..PlateauConfig::default() };
/// let mut schedule = ReduceOnPlateau::new(0.1, config);
/// let rates = [1.0, 1.0, 1.0, 0.5].map(|value| schedule.step(value));
/// assert_eq!(rates, [0.1, 0.1, 0.05, 0.05]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ReduceOnPlateau {
    config: PlateauConfig,
    state: PlateauState,
}

/// PyTorch's `eps`: a smaller change of the rate is not made.
const SMALLEST_CHANGE: f64 = 1e-8;

impl ReduceOnPlateau {
    /// Starts at learning rate `lr`.
    pub fn new(lr: f64, config: PlateauConfig) -> Self {
        let state = PlateauState {
            lr,
            best: None,
            bad_epochs: 0,
            cooldown_left: 0,
        };
        Self { config, state }
    }

    /// Continues from a saved state.
    pub fn restore(config: PlateauConfig, state: PlateauState) -> Self {
        Self { config, state }
    }

    /// The state to save.
    pub fn state(&self) -> &PlateauState {
        &self.state
    }

    /// The current learning rate.
    pub fn lr(&self) -> f64 {
        self.state.lr
    }

    /// Takes the value of one finished epoch and returns the learning rate for the next.
    pub fn step(&mut self, value: f64) -> f64 {
        let state = &mut self.state;
        let improved = match state.best {
            None => value < f64::INFINITY,
            Some(best) => value < best * (1.0 - self.config.threshold),
        };
        if improved {
            state.best = Some(value);
            state.bad_epochs = 0;
        } else {
            state.bad_epochs += 1;
        }
        if state.cooldown_left > 0 {
            state.cooldown_left -= 1;
            state.bad_epochs = 0;
        }
        if state.bad_epochs > self.config.patience {
            let lowered = (state.lr * self.config.factor).max(self.config.min_lr);
            if state.lr - lowered > SMALLEST_CHANGE {
                state.lr = lowered;
            }
            state.cooldown_left = self.config.cooldown;
            state.bad_epochs = 0;
        }
        state.lr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rates are those of torch 2.4.1's `ReduceLROnPlateau` on the same values.
    fn assert_rates(config: PlateauConfig, values: &[f64], expected: &[f64]) {
        let mut schedule = ReduceOnPlateau::new(expected[0], config);
        let rates: Vec<f64> = values.iter().map(|v| schedule.step(*v)).collect();
        assert_eq!(rates, expected);
    }

    #[test]
    fn waits_patience_and_one_more() {
        let config = PlateauConfig::default();
        assert_rates(
            config,
            &[1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9],
            &[1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125],
        );
    }

    #[test]
    fn improvements_below_the_relative_threshold_do_not_count() {
        let config = PlateauConfig {
            patience: 0,
            threshold: 0.1,
            ..PlateauConfig::default()
        };
        // 0.95 > 1 * 0.9 is bad; 0.85 is good; 0.80 > 0.85 * 0.9 is bad.
        assert_rates(config, &[1.0, 0.95, 0.85, 0.80], &[1.0, 0.5, 0.5, 0.25]);
    }

    #[test]
    fn cooldown_and_lower_bound() {
        let config = PlateauConfig {
            patience: 0,
            cooldown: 2,
            min_lr: 0.3,
            ..PlateauConfig::default()
        };
        assert_rates(
            config,
            &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            &[1.0, 0.5, 0.5, 0.5, 0.3, 0.3],
        );
    }

    #[test]
    fn a_long_and_noisy_run() {
        let config = PlateauConfig {
            patience: 1,
            threshold: 1e-2,
            cooldown: 1,
            min_lr: 1e-5,
            ..PlateauConfig::default()
        };
        let values = [
            1.071, 0.997, 0.825, 0.806, 0.743, 0.52, 0.458, 0.668, 0.462, 0.427, 0.632, 0.454,
            0.545, 0.421, 0.455, 0.295, 0.429, 0.488, 0.374, 0.431, 0.401, 0.212, 0.413, 0.356,
        ];
        let expected = [(8, 1e-4), (3, 5e-5), (6, 2.5e-5), (3, 1.25e-5), (4, 1e-5)]
            .map(|(epochs, lr)| vec![lr; epochs])
            .concat();
        assert_rates(config, &values, &expected);
    }

    #[test]
    fn nan_is_a_bad_epoch_and_changes_below_eps_are_not_made() {
        let config = PlateauConfig {
            patience: 0,
            ..PlateauConfig::default()
        };
        let mut schedule = ReduceOnPlateau::new(1.5e-8, config);
        assert_eq!(schedule.step(f64::NAN), 1.5e-8);
        assert_eq!(schedule.state().best, None);
        assert_eq!(schedule.step(1.0), 1.5e-8);
        assert_eq!(schedule.state().best, Some(1.0));

        let config = PlateauConfig {
            patience: 0,
            ..PlateauConfig::default()
        };
        let mut schedule = ReduceOnPlateau::new(1.0, config);
        let rates = [f64::INFINITY, f64::NAN, 1.0].map(|value| schedule.step(value));
        assert_eq!(rates, [0.5, 0.25, 0.25]);
    }

    #[test]
    fn a_saved_state_continues_the_same_way() {
        let config = PlateauConfig::default();
        let mut whole = ReduceOnPlateau::new(1.0, config.clone());
        let mut first = whole.clone();
        let values = [1.0, 1.0, 1.1, 1.2, 1.0, 0.5, 0.6, 0.7, 0.8];
        let expected: Vec<f64> = values.iter().map(|v| whole.step(*v)).collect();
        let mut rates: Vec<f64> = values[..3].iter().map(|v| first.step(*v)).collect();
        let text = serde_json::to_string(first.state()).unwrap();
        let mut second = ReduceOnPlateau::restore(config, serde_json::from_str(&text).unwrap());
        rates.extend(values[3..].iter().map(|v| second.step(*v)));
        assert_eq!(rates, expected);
    }

    #[test]
    fn bad_settings_are_refused() {
        for (factor, threshold, min_lr, field) in [
            (1.0, 0.0, 0.0, "plateau.factor"),
            (0.5, -1.0, 0.0, "plateau.threshold"),
            (0.5, 0.0, f64::NAN, "plateau.min_lr"),
        ] {
            let config = PlateauConfig {
                factor,
                threshold,
                min_lr,
                ..PlateauConfig::default()
            };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
