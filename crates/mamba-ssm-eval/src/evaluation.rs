//! Scores forecasts against the truth and against those who know nothing.

use crate::metrics::{Metrics, MetricsAccumulator};
use crate::naive::{NaiveForecaster, NaiveKind};
use crate::{EvalError, FeatureScale, Result, files, text};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What an evaluation is made from. Everything is borrowed, row-major and in z-score space.
///
/// The truth is `series[target_rows]`; there is no separate argument that could disagree with it.
#[derive(Debug, Clone, Copy)]
pub struct Forecasts<'a> {
    /// Name of the model, for reports and comparisons.
    pub model: &'a str,
    /// How rows were split and statistics fitted, in words for the reader.
    pub protocol: &'a str,
    /// The features, in column order.
    pub scales: &'a [FeatureScale],
    /// `[rows]` unix seconds, rising.
    pub timestamps: &'a [i64],
    /// `[rows, features]` the series. Values that are not finite count as missing and may stand
    /// anywhere but in target rows.
    pub series: &'a [f64],
    /// `[targets]` the rows forecast: indices from 1 on, in any order; a row forecast from
    /// several windows may occur several times and counts each time.
    pub target_rows: &'a [usize],
    /// `[targets, features]` the model's forecasts of those rows.
    pub predictions: &'a [f64],
}

impl Forecasts<'_> {
    /// The column of a feature.
    ///
    /// # Errors
    ///
    /// [`EvalError::UnknownFeature`] when there is none of that name.
    pub fn column(&self, feature: &str) -> Result<usize> {
        let found = self.scales.iter().position(|scale| scale.name == feature);
        found.ok_or_else(|| {
            let known: Vec<&str> = self
                .scales
                .iter()
                .map(|scale| scale.name.as_str())
                .collect();
            EvalError::UnknownFeature {
                name: feature.to_owned(),
                known: known.join(", "),
            }
        })
    }
}

/// How much was scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Forecasts scored; a row forecast several times counts each time.
    pub scored: u64,
    /// Different rows among them.
    pub distinct_rows: u64,
    /// Features.
    pub features: usize,
    /// Time of the first row scored, unix seconds.
    pub first_timestamp: i64,
    /// Time of the last row scored, unix seconds.
    pub last_timestamp: i64,
}

/// One feature's scores in z-score space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureScores {
    /// The model's error measures.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// The naive forecaster with the lowest RMSE on the same rows, by [`NaiveKind::name`].
    pub naive: String,
    /// That forecaster's RMSE.
    pub naive_rmse: f64,
    /// `1 - rmse / naive_rmse`: above zero when the model knows more than the best naive
    /// forecaster. `None` (`null` in JSON) when, and only when, `naive_rmse` is 0: nobody can do
    /// better than a forecaster that makes no error at all.
    pub skill: Option<f64>,
}

/// The name of the naive forecaster behind averages: of each feature, its best.
pub const BEST_OF_EACH: &str = "best_of_each";

/// Arithmetic means of the features' scores in z-score space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AverageScores {
    /// Means of the model's error measures.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// Always [`BEST_OF_EACH`]: every feature has a best naive forecaster of its own.
    pub naive: String,
    /// Mean RMSE of each feature's best naive forecaster.
    pub naive_rmse: f64,
    /// Mean of the features' skills that are defined. `None` (`null` in JSON) when none is.
    pub skill: Option<f64>,
}

/// One feature's scores in level space. There is no average over features: dollars and coins
/// do not add.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelScores {
    /// The model's error measures, in [`unit`](Self::unit) where they have one.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// RMSE in this space of the naive forecaster named for the feature in z-score space.
    pub naive_rmse: f64,
    /// Unit of the level.
    pub unit: String,
}

/// The scores of one model on one set of rows: what `metrics.json` holds.
///
/// `test.<feature>` and `average` have the same eight keys: `mse`, `rmse`, `mae`, `mape`, `r2`, `naive`,
/// `naive_rmse`, `skill`. All are numbers but `naive`, a name, and a `skill` that is not defined: `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Name of the model.
    pub model: String,
    /// How rows were split and statistics fitted.
    pub protocol: String,
    /// How much was scored.
    pub counts: Counts,
    /// Scores by feature, z-score space.
    pub test: IndexMap<String, FeatureScores>,
    /// Their averages.
    pub average: AverageScores,
    /// Scores by feature, level space (dollars, coins).
    pub levels: IndexMap<String, LevelScores>,
    /// Every naive forecaster's error measures by forecaster and feature, z-score space.
    pub naives: IndexMap<String, IndexMap<String, Metrics>>,
}

/// Scores `input`.
///
/// ```
/// use mamba_ssm_eval::{FeatureScale, Forecasts, ScaleKind, evaluate};
///
/// let scales = [FeatureScale::new("Close", ScaleKind::Identity, 0.0, 1.0)?];
/// let evaluation = evaluate(&Forecasts {
///     model: "half the move",
///     protocol: "an example",
///     scales: &scales,
///     timestamps: &[0, 60, 120],
///     series: &[1.0, 2.0, 4.0],
///     target_rows: &[1, 2],
///     predictions: &[1.5, 3.0],
/// })?;
/// assert_eq!(evaluation.test["Close"].naive, "last_close");
/// assert_eq!(evaluation.test["Close"].skill, Some(0.5));
/// # Ok::<(), mamba_ssm_eval::EvalError>(())
/// ```
///
/// Time is linear in rows and targets; memory beyond the input is 12 bytes for each value between
/// the first and the last target row.
///
/// # Errors
///
/// When shapes disagree, nothing is to be scored, timestamps do not rise, a target row is out of
/// range or holds a missing value, or a prediction is not finite in either space. The error names
/// feature, row and time.
pub fn evaluate(input: &Forecasts) -> Result<Evaluation> {
    let naive = NaiveForecaster::new(
        input.scales,
        input.timestamps,
        input.series,
        input.target_rows,
    )?;
    let expected = input.target_rows.len() * input.scales.len();
    if input.predictions.len() != expected {
        return Err(EvalError::LengthMismatch {
            what: "predictions",
            found: input.predictions.len(),
            expected,
            layout: format!(
                "{} targets x {} features",
                input.target_rows.len(),
                input.scales.len()
            ),
        });
    }
    let mut scored = Vec::with_capacity(input.scales.len());
    for (feature, scale) in input.scales.iter().enumerate() {
        scored.push((scale, score_feature(input, &naive, feature)?));
    }
    Ok(assemble(input, &scored))
}

/// A forecaster's measures in both spaces.
#[derive(Clone, Copy)]
struct Scores {
    z: Metrics,
    level: Metrics,
}

struct FeatureResult {
    model: Scores,
    naives: Vec<(NaiveKind, Scores)>,
}

impl FeatureResult {
    /// Lowest RMSE; the first of [`NaiveKind::ALL`] on a tie.
    fn best(&self) -> &(NaiveKind, Scores) {
        let mut best = &self.naives[0];
        for other in &self.naives[1..] {
            if other.1.z.rmse < best.1.z.rmse {
                best = other;
            }
        }
        best
    }
}

#[derive(Clone, Copy, Default)]
struct Accumulators {
    z: MetricsAccumulator,
    level: MetricsAccumulator,
}

impl Accumulators {
    fn push(&mut self, scale: &FeatureScale, z: f64, target: f64, target_level: f64) {
        self.z.push(z, target);
        self.level.push(scale.to_level(z), target_level);
    }

    /// `None` unless all `targets` were forecast.
    fn finish(self, targets: usize) -> Option<Scores> {
        if self.z.count() != targets as u64 {
            return None;
        }
        Some(Scores {
            z: self.z.finish()?,
            level: self.level.finish()?,
        })
    }
}

fn score_feature(
    input: &Forecasts,
    naive: &NaiveForecaster,
    feature: usize,
) -> Result<FeatureResult> {
    let scale = &input.scales[feature];
    let width = input.scales.len();
    let mut model = Accumulators::default();
    let mut naives = NaiveKind::ALL.map(|kind| (kind, Accumulators::default()));
    for (index, &row) in input.target_rows.iter().enumerate() {
        let target = input.series[row * width + feature];
        let target_level = check_target(input, scale, row, target)?;
        let prediction = input.predictions[index * width + feature];
        check_prediction(input, scale, row, prediction)?;
        model.push(scale, prediction, target, target_level);
        for (kind, scores) in &mut naives {
            if let Some(forecast) = naive.predict(*kind, row, feature) {
                scores.push(scale, forecast, target, target_level);
            }
        }
        if naives
            .iter()
            .all(|(_, scores)| scores.z.count() <= index as u64)
        {
            return Err(EvalError::NoHistory {
                feature: scale.name.clone(),
                row,
            });
        }
    }
    let targets = input.target_rows.len();
    let model = model.finish(targets).ok_or(EvalError::Empty {
        what: "target_rows",
    })?;
    let naives: Vec<_> = naives
        .into_iter()
        .filter_map(|(kind, scores)| Some((kind, scores.finish(targets)?)))
        .collect();
    Ok(FeatureResult { model, naives })
}

/// The target's level.
fn check_target(input: &Forecasts, scale: &FeatureScale, row: usize, z: f64) -> Result<f64> {
    let level = scale.to_level(z);
    if z.is_finite() && level.is_finite() {
        return Ok(level);
    }
    Err(EvalError::NonFiniteTarget {
        feature: scale.name.clone(),
        row,
        time: text::utc(input.timestamps[row]),
        value: z,
    })
}

fn check_prediction(input: &Forecasts, scale: &FeatureScale, row: usize, z: f64) -> Result<()> {
    let level = scale.to_level(z);
    // The sum of squared errors must stay finite too, or the measures would not be numbers.
    let fits = |value: f64| value.abs() < 1e100;
    if fits(z) && fits(level) {
        return Ok(());
    }
    let (value, space) = if fits(z) {
        (level, format!("level space ({})", scale.unit))
    } else {
        (z, "z-score space".to_owned())
    };
    Err(EvalError::NonFinitePrediction {
        feature: scale.name.clone(),
        row,
        time: text::utc(input.timestamps[row]),
        value,
        space,
    })
}

fn assemble(input: &Forecasts, scored: &[(&FeatureScale, FeatureResult)]) -> Evaluation {
    let mut test = IndexMap::new();
    let mut levels = IndexMap::new();
    let mut naives: IndexMap<String, IndexMap<String, Metrics>> = IndexMap::new();
    for (scale, result) in scored {
        let (kind, best) = result.best();
        test.insert(
            scale.name.clone(),
            FeatureScores {
                metrics: result.model.z,
                naive: kind.name().to_owned(),
                naive_rmse: best.z.rmse,
                skill: skill(result.model.z.rmse, best.z.rmse),
            },
        );
        levels.insert(
            scale.name.clone(),
            LevelScores {
                metrics: result.model.level,
                naive_rmse: best.level.rmse,
                unit: scale.unit.clone(),
            },
        );
        for (kind, scores) in &result.naives {
            let by_feature = naives.entry(kind.name().to_owned()).or_default();
            by_feature.insert(scale.name.clone(), scores.z);
        }
    }
    Evaluation {
        model: input.model.to_owned(),
        protocol: input.protocol.to_owned(),
        counts: count(input),
        average: average(&test),
        test,
        levels,
        naives,
    }
}

/// `1 - rmse / naive_rmse`, where that is a number.
pub(crate) fn skill(rmse: f64, naive_rmse: f64) -> Option<f64> {
    let skill = 1.0 - rmse / naive_rmse;
    skill.is_finite().then_some(skill)
}

fn average(test: &IndexMap<String, FeatureScores>) -> AverageScores {
    let skills: Vec<f64> = test.values().filter_map(|scores| scores.skill).collect();
    AverageScores {
        metrics: mean_metrics(test.values().map(|scores| scores.metrics)),
        naive: BEST_OF_EACH.to_owned(),
        naive_rmse: test.values().map(|scores| scores.naive_rmse).sum::<f64>() / test.len() as f64,
        skill: (!skills.is_empty()).then(|| skills.iter().sum::<f64>() / skills.len() as f64),
    }
}

/// Arithmetic mean, measure by measure.
pub(crate) fn mean_metrics(all: impl ExactSizeIterator<Item = Metrics> + Clone) -> Metrics {
    let count = all.len() as f64;
    let mean = |pick: fn(&Metrics) -> f64| all.clone().map(|m| pick(&m)).sum::<f64>() / count;
    Metrics {
        mse: mean(|m| m.mse),
        rmse: mean(|m| m.rmse),
        mae: mean(|m| m.mae),
        mape: mean(|m| m.mape),
        r2: mean(|m| m.r2),
    }
}

fn count(input: &Forecasts) -> Counts {
    let mut rows = input.target_rows.to_vec();
    rows.sort_unstable();
    rows.dedup();
    let time = |row: Option<&usize>| row.map_or(0, |&row| input.timestamps[row]);
    Counts {
        scored: input.target_rows.len() as u64,
        distinct_rows: rows.len() as u64,
        features: input.scales.len(),
        first_timestamp: time(rows.first()),
        last_timestamp: time(rows.last()),
    }
}

impl Evaluation {
    /// Reads a `metrics.json`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or was not written by [`write`](Self::write).
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = files::read(path)?;
        serde_json::from_slice(&bytes).map_err(|source| EvalError::Json {
            path: path.to_owned(),
            source,
        })
    }

    /// Writes a `metrics.json`: beside `path` first, then renamed.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|source| EvalError::Json {
            path: path.to_owned(),
            source,
        })?;
        json.push(b'\n');
        files::write_atomic(path, &json)
    }

    /// The scores of one feature.
    ///
    /// # Errors
    ///
    /// [`EvalError::UnknownFeature`] when it was not evaluated.
    pub fn feature(&self, name: &str) -> Result<&FeatureScores> {
        self.test
            .get(name)
            .ok_or_else(|| EvalError::UnknownFeature {
                name: name.to_owned(),
                known: self.feature_names().join(", "),
            })
    }

    /// The error measures of a feature's best naive forecaster, z-score space.
    ///
    /// # Errors
    ///
    /// [`EvalError::UnknownFeature`] when the feature was not evaluated.
    pub fn best_naive(&self, name: &str) -> Result<Metrics> {
        let scores = self.feature(name)?;
        let found = self.naives.get(&scores.naive).and_then(|by| by.get(name));
        found.copied().ok_or_else(|| EvalError::UnknownFeature {
            name: format!("{name} of {}", scores.naive),
            known: self.feature_names().join(", "),
        })
    }

    pub(crate) fn feature_names(&self) -> Vec<&str> {
        self.test.keys().map(String::as_str).collect()
    }

    /// The skills as an aligned table in plain text, for a terminal. Ends with a line break.
    pub fn skill_table(&self) -> String {
        let mut rows =
            vec![["feature", "rmse", "naive rmse", "skill", "best naive"].map(String::from)];
        for (name, scores) in &self.test {
            rows.push([
                name.clone(),
                text::number(scores.metrics.rmse),
                text::number(scores.naive_rmse),
                text::skill(scores.skill),
                NaiveKind::describe(&scores.naive).to_owned(),
            ]);
        }
        rows.push([
            "average".to_owned(),
            text::number(self.average.metrics.rmse),
            text::number(self.average.naive_rmse),
            text::skill(self.average.skill),
            NaiveKind::describe(&self.average.naive).to_owned(),
        ]);
        align(&rows)
    }
}

/// First and last column to the left, numbers to the right.
fn align(rows: &[[String; 5]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let mut out = String::new();
    for [name, rmse, naive_rmse, skill, naive] in rows {
        let [a, b, c, d] = widths;
        let line = format!("{name:<a$}  {rmse:>b$}  {naive_rmse:>c$}  {skill:>d$}  {naive}");
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests;
