//! What can go wrong, and what to do about it.

use std::path::PathBuf;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, EvalError>;

/// Everything that stops an evaluation, a report or a comparison.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// There is nothing to score, plot or compare.
    #[error("{what} is empty; at least one is needed")]
    Empty {
        /// What was empty.
        what: &'static str,
    },
    /// Two slices that must agree in length do not.
    #[error("{what} has {found} values, expected {expected} ({layout})")]
    LengthMismatch {
        /// The slice at fault.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length it must have.
        expected: usize,
        /// How the expected length comes about.
        layout: String,
    },
    /// A prediction is NaN or infinite, or becomes so in level space.
    #[error(
        "the prediction of {feature} for row {row} ({time}) is {value} in {space}; \
         the model has diverged or its output was not turned back into levels"
    )]
    NonFinitePrediction {
        /// The feature predicted.
        feature: String,
        /// The target row in the series.
        row: usize,
        /// The row's time, UTC.
        time: String,
        /// The value found.
        value: f64,
        /// `z-score space` or the level unit.
        space: String,
    },
    /// A row to be scored holds no number.
    #[error(
        "the target {feature} of row {row} ({time}) is {value}; \
         leave rows with missing values out of the target rows"
    )]
    NonFiniteTarget {
        /// The feature.
        feature: String,
        /// The target row in the series.
        row: usize,
        /// The row's time, UTC.
        time: String,
        /// The value found.
        value: f64,
    },
    /// A value handed to a metric is NaN or infinite.
    #[error("{what}[{index}] is {value}; metrics need finite values")]
    NonFiniteValue {
        /// `predictions` or `targets`.
        what: &'static str,
        /// Where it stands.
        index: usize,
        /// The value found.
        value: f64,
    },
    /// No feature of that name was evaluated.
    #[error("no feature named {name:?}; the features are {known}")]
    UnknownFeature {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// Two features share a name.
    #[error("the feature name {name:?} occurs twice; metrics are keyed by name")]
    RepeatedFeature {
        /// The name.
        name: String,
    },
    /// A mean or standard deviation that cannot scale anything.
    #[error(
        "the scale of {feature} has mean {mean} and standard deviation {std}; \
         the mean must be finite, the deviation finite and above zero"
    )]
    BadScale {
        /// The feature.
        feature: String,
        /// The mean given.
        mean: f64,
        /// The standard deviation given.
        std: f64,
    },
    /// A target row that is not in the series, or has no row before it.
    #[error(
        "target row {row} cannot be scored: rows 1 to {last} of the series have a row before \
         them to forecast from"
    )]
    TargetRow {
        /// The row.
        row: usize,
        /// The last row of the series.
        last: usize,
    },
    /// Timestamps repeat or run backwards.
    #[error(
        "timestamps must rise from row to row, but row {row} has {found} after {previous}; \
         sort the rows and drop repeats first"
    )]
    Timestamps {
        /// The row at fault.
        row: usize,
        /// Its timestamp.
        found: i64,
        /// The timestamp of the row before.
        previous: i64,
    },
    /// No naive forecast exists because a feature has no earlier value.
    #[error(
        "no value of {feature} precedes row {row}, so no naive forecast of it exists; \
         start scoring later"
    )]
    NoHistory {
        /// The feature.
        feature: String,
        /// The target row.
        row: usize,
    },
    /// Evaluations of different features cannot stand in one table.
    #[error("{model} was evaluated on {found}, {first} on {expected}; compare like with like")]
    FeaturesDiffer {
        /// The model at fault.
        model: String,
        /// Its features.
        found: String,
        /// The model it is compared with.
        first: String,
        /// That model's features.
        expected: String,
    },
    /// A file could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// `cannot read`, `cannot write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A metrics file that is not one of ours.
    #[error("{path} is not a metrics file written by an evaluation: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// The plotting library refused.
    #[error("cannot draw {plot}: {reason}")]
    Plot {
        /// Which plot.
        plot: String,
        /// The library's reason.
        reason: String,
    },
}
