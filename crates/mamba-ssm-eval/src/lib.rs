//! Forecast evaluation: metrics, naive forecasters, skill, plots and reports.
//!
//! A forecast of minute prices can have an R2 of 0.999 and still be worse than repeating the last
//! price. So every score here stands beside the best of four naive forecasters ([`NaiveKind`]) on
//! the same rows, and the figure that counts is the skill: `1 - RMSE / naive RMSE`.
//!
//! The way through the crate: [`Forecasts`] (plain slices, z-score space) -> [`evaluate`] ->
//! [`Evaluation`] (`metrics.json`) -> [`write_report`] (a page and plots) or [`Comparison`]
//! (several models in one table). Slices in, files out: no tensor library is involved, and plots
//! need no fonts of the system.
//!
//! ```
//! use mamba_ssm_eval::{FeatureScale, Forecasts, ReportOptions, ScaleKind, evaluate, write_report};
//!
//! let scales = [
//!     FeatureScale::new("Close", ScaleKind::Log, 10.0, 0.5)?,
//!     FeatureScale::new("Volume", ScaleKind::Log1p, 2.0, 1.0)?,
//! ];
//! let timestamps: Vec<i64> = (0..100).map(|minute| 1_700_000_000 + 60 * minute).collect();
//! let series: Vec<f64> = (0..200).map(|value| (value as f64 * 0.1).sin()).collect();
//! let target_rows: Vec<usize> = (50..100).collect();
//! let predictions: Vec<f64> = series[100..].iter().map(|truth| truth + 0.01).collect();
//! let input = Forecasts {
//!     model: "off by a hundredth",
//!     protocol: "the second half",
//!     scales: &scales,
//!     timestamps: &timestamps,
//!     series: &series,
//!     target_rows: &target_rows,
//!     predictions: &predictions,
//! };
//! let evaluation = evaluate(&input)?;
//! assert!(evaluation.test["Close"].skill > Some(0.9));
//! print!("{}", evaluation.skill_table());
//! # let folder = tempfile::tempdir().unwrap();
//! # let folder = folder.path();
//! let files = write_report(folder, &input, &evaluation, &[], &ReportOptions::default())?;
//! assert!(files.report.is_file());
//! # Ok::<(), mamba_ssm_eval::EvalError>(())
//! ```

mod compare;
mod error;
mod evaluation;
mod files;
mod metrics;
mod naive;
mod plot;
mod report;
mod scale;
mod text;

#[cfg(test)]
mod testing;

pub use compare::{Comparison, ComparisonFiles};
pub use error::{EvalError, Result};
pub use evaluation::{
    AverageScores, BEST_OF_EACH, Counts, Evaluation, FeatureScores, Forecasts, LevelScores,
    evaluate,
};
pub use metrics::{MAPE_FLOOR, Metrics, MetricsAccumulator, metrics};
pub use naive::{NaiveForecaster, NaiveKind};
pub use plot::{EpochRecord, ForecastPlot, forecast_svg, loss_svg};
pub use report::{ReportFiles, ReportOptions, write_report};
pub use scale::{FeatureScale, ScaleKind};

/// Compiles the README's snippet.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
