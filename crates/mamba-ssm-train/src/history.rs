//! The record of a run: one row per epoch.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::TrainError;
use crate::files::write_atomically;

/// The name of the history file in a run folder: one JSON object per line.
pub const HISTORY_FILE: &str = "history.jsonl";

/// One epoch of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch, counted from one.
    pub epoch: usize,
    /// The part of the epoch that was trained: 1 unless a time limit cut it short.
    pub fraction: f64,
    /// Optimizer steps taken since the run began.
    pub step: usize,
    /// Mean training loss over the epoch's micro-batches.
    #[serde(with = "nan_as_null")]
    pub train_loss: f64,
    /// Mean validation loss over valid positions.
    #[serde(with = "nan_as_null")]
    pub val_loss: f64,
    /// The learning rate the epoch was trained with.
    pub lr: f64,
    /// Training positions (batch times length) per second.
    pub tokens_per_second: f64,
    /// Seconds spent training, validation not included.
    pub seconds: f64,
    /// Steps skipped in this epoch because the gradient was NaN or infinite.
    pub skipped_steps: usize,
}

/// Reads the history of the run in folder `run`, oldest epoch first.
///
/// # Errors
///
/// [`TrainError::Io`] if there is none; [`TrainError::Damaged`] naming the line that is not a row.
pub fn read_history(run: impl AsRef<Path>) -> Result<Vec<EpochRecord>, TrainError> {
    let path = run.as_ref().join(HISTORY_FILE);
    let text = std::fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
    text.lines()
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line)
                .map_err(|error| TrainError::damaged(&path, format!("line {}: {error}", index + 1)))
        })
        .collect()
}

/// Replaces the history of the run in folder `run`.
pub(crate) fn write_history<'a>(
    run: &Path,
    rows: impl IntoIterator<Item = &'a EpochRecord>,
) -> Result<(), TrainError> {
    let path = run.join(HISTORY_FILE);
    let mut text = String::new();
    for row in rows {
        let line = serde_json::to_string(row)
            .map_err(|error| TrainError::damaged(&path, error.to_string()))?;
        text.push_str(&line);
        text.push('\n');
    }
    write_atomically(&path, text.as_bytes())
}

/// JSON has no NaN or infinity; a loss that is not finite is written as null and read as NaN.
mod nan_as_null {
    use super::*;

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(epoch: usize, val_loss: f64) -> EpochRecord {
        EpochRecord {
            epoch,
            fraction: 1.0,
            step: 10 * epoch,
            train_loss: 0.1 + 0.2,
            val_loss,
            lr: 1e-4,
            tokens_per_second: 1e6,
            seconds: 12.5,
            skipped_steps: 0,
        }
    }

    #[test]
    fn rows_come_back_exactly_and_are_replaced_not_appended() {
        let run = tempfile::tempdir().unwrap();
        write_history(run.path(), &[row(1, 0.5), row(2, f64::NAN)]).unwrap();
        let rows = read_history(run.path()).unwrap();
        assert_eq!(rows[0], row(1, 0.5));
        assert!(rows[1].val_loss.is_nan());
        write_history(run.path(), &[row(1, 0.25)]).unwrap();
        assert_eq!(read_history(run.path()).unwrap(), vec![row(1, 0.25)]);
    }

    #[test]
    fn a_bad_line_is_named() {
        let run = tempfile::tempdir().unwrap();
        write_history(run.path(), &[row(1, 0.5)]).unwrap();
        let path = run.path().join(HISTORY_FILE);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"epoch\": 2");
        std::fs::write(&path, text).unwrap();
        let error = read_history(run.path()).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let missing = read_history(run.path().join("nowhere")).unwrap_err();
        assert!(matches!(missing, TrainError::Io { .. }));
    }
}
