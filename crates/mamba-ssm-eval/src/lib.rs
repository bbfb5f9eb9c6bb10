//! Forecast evaluation: metrics, naive forecasters, skill, plots and reports.

mod error;
mod evaluation;
mod files;
mod metrics;
mod naive;
mod scale;
mod text;

#[cfg(test)]
mod testing;

pub use error::{EvalError, Result};
pub use evaluation::{
    AverageScores, Counts, Evaluation, FeatureScores, Forecasts, LevelScores, evaluate,
};
pub use metrics::{MAPE_FLOOR, Metrics, MetricsAccumulator, metrics};
pub use naive::{NaiveForecaster, NaiveKind};
pub use scale::{FeatureScale, ScaleKind};
