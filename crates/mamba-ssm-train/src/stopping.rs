//! Early stopping.

use serde::{Deserialize, Serialize};

/// What [`EarlyStopping`] remembers between epochs; part of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoppingState {
    /// The best value so far; `None` before the first.
    pub best: Option<f64>,
    /// Epochs without improvement since then.
    pub bad_epochs: usize,
}

/// Stops a run after `patience` epochs in a row without an improvement of more than `min_delta`,
/// as PyTorch Lightning's `EarlyStopping` in mode `min`. A patience of 0 never stops.
///
/// # Example
///
/// ```
/// use mamba_ssm_train::EarlyStopping;
///
/// let mut stopping = EarlyStopping::new(2, 0.0);
/// let stop = [1.0, 0.9, 0.95, 0.91].map(|value| stopping.step(value));
/// assert_eq!(stop, [false, false, false, true]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct EarlyStopping {
    patience: usize,
    min_delta: f64,
    state: StoppingState,
}

impl EarlyStopping {
    /// `patience` in epochs (0: never stop), `min_delta` in the unit of the value.
    pub fn new(patience: usize, min_delta: f64) -> Self {
        Self::restore(patience, min_delta, StoppingState::default())
    }

    /// Continues from a saved state.
    pub fn restore(patience: usize, min_delta: f64, state: StoppingState) -> Self {
        Self {
            patience,
            min_delta,
            state,
        }
    }

    /// The state to save.
    pub fn state(&self) -> &StoppingState {
        &self.state
    }

    /// Takes the value of one finished epoch; true means stop. NaN and infinity count as no
    /// improvement.
    pub fn step(&mut self, value: f64) -> bool {
        let improved = match self.state.best {
            None => value < f64::INFINITY,
            Some(best) => value < best - self.min_delta,
        };
        if improved {
            self.state.best = Some(value);
            self.state.bad_epochs = 0;
        } else {
            self.state.bad_epochs += 1;
        }
        self.exhausted()
    }

    /// Whether the patience is used up.
    pub fn exhausted(&self) -> bool {
        self.patience > 0 && self.state.bad_epochs >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops_at(patience: usize, min_delta: f64, values: &[f64]) -> Option<usize> {
        let mut stopping = EarlyStopping::new(patience, min_delta);
        values.iter().position(|value| stopping.step(*value))
    }

    #[test]
    fn counts_epochs_in_a_row() {
        assert_eq!(stops_at(2, 0.0, &[1.0, 1.1, 0.9, 1.0, 0.9]), Some(4));
        assert_eq!(stops_at(3, 0.0, &[1.0, 1.1, 0.9, 1.0, 0.9]), None);
    }

    #[test]
    fn small_improvements_do_not_count() {
        assert_eq!(stops_at(2, 0.1, &[1.0, 0.95, 0.91]), Some(2));
        assert_eq!(stops_at(2, 0.1, &[1.0, 0.95, 0.89]), None);
    }

    #[test]
    fn nan_counts_as_bad_and_zero_patience_never_stops() {
        assert_eq!(stops_at(2, 0.0, &[1.0, f64::NAN, f64::NAN]), Some(2));
        assert_eq!(stops_at(0, 0.0, &[1.0, 2.0, 3.0, 4.0]), None);
    }

    #[test]
    fn a_raised_patience_continues_a_stopped_run() {
        let mut stopping = EarlyStopping::new(1, 0.0);
        stopping.step(1.0);
        assert!(stopping.step(2.0));
        let more = EarlyStopping::restore(2, 0.0, stopping.state().clone());
        assert!(!more.exhausted());
    }
}
