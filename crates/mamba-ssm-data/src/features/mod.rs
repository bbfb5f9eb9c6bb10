//! Columns computed from other columns, row by row and forwards only.
//!
//! Every step sees its own row and earlier ones, never a later one. Windows count rows: a gap in time is
//! not seen. Until a window is full (and in rows with a missing cell) a feature is missing, and
//! its row invalid; rows with a missing cell do not enter any window.

mod rolling;
mod steps;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::schema::{ColumnSpec, Role, Scale, Schema};
use crate::series::RawSeries;
use crate::source::Block;
use crate::{Error, Result};

use steps::{Step, step_for};

/// A computed column (or several). All are free of units, so that they mean the same at any price.
///
/// `of` names the column it is computed from; without it the column with the role
/// [`Role::Close`]. Ranges and volumes are found by their roles.
///
/// ```
/// use mamba_ssm_data::Feature;
/// let features: Vec<Feature> = serde_json::from_str(
///     r#"[{"kind": "rsi", "window": 14}, {"kind": "time_of_day"}]"#,
/// )?;
/// assert_eq!(features[0].names(), ["rsi_14"]);
/// assert_eq!(features[1].names(), ["day_sin", "day_cos"]);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Feature {
    /// `ln(x[t] / x[t - steps])`.
    Return {
        /// Column, default the close.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// Rows to look back.
        steps: usize,
    },
    /// Sample standard deviation of the last `window` one-row log returns.
    Volatility {
        /// Column, default the close.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// Returns in the window.
        window: usize,
    },
    /// Relative strength index, 0 to 100, with Wilder's smoothing ("New Concepts in Technical
    /// Trading Systems", 1978).
    Rsi {
        /// Column, default the close.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// Rows of the smoothing.
        window: usize,
    },
    /// Moving average convergence divergence, in shares of the slow average: the line, its signal,
    /// and the difference of the two.
    Macd {
        /// Column, default the close.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// Rows of the fast exponential average, usually 12.
        fast: usize,
        /// Rows of the slow exponential average, usually 26.
        slow: usize,
        /// Rows of the signal's exponential average, usually 9.
        signal: usize,
    },
    /// Average true range with Wilder's smoothing, as a share of the close.
    Atr {
        /// Rows of the smoothing.
        window: usize,
    },
    /// Log of the close over the volume-weighted average price of the last `window` rows; 0 where
    /// nothing was traded in the window.
    VwapDistance {
        /// Rows in the window.
        window: usize,
    },
    /// Sine and cosine of the time of day (UTC).
    TimeOfDay,
    /// Sine and cosine of the time of week (UTC, from Monday 00:00).
    TimeOfWeek,
    /// 1 where the rolling volatility lies above this quantile of its own last `lookback` values, else 0.
    Regime {
        /// Column, default the close.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// Returns in the volatility's window.
        window: usize,
        /// Volatilities that the quantile is taken of, this row's included.
        lookback: usize,
        /// 0 to 1.
        quantile: f64,
    },
}

impl Feature {
    /// Names of the columns it adds.
    pub fn names(&self) -> Vec<String> {
        let base = match self {
            Feature::Return { steps, .. } => format!("return_{steps}"),
            Feature::Volatility { window, .. } => format!("volatility_{window}"),
            Feature::Rsi { window, .. } => format!("rsi_{window}"),
            Feature::Macd {
                fast, slow, signal, ..
            } => format!("macd_{fast}_{slow}_{signal}"),
            Feature::Atr { window } => format!("atr_{window}"),
            Feature::VwapDistance { window } => format!("vwap_distance_{window}"),
            Feature::TimeOfDay => return vec!["day_sin".into(), "day_cos".into()],
            Feature::TimeOfWeek => return vec!["week_sin".into(), "week_cos".into()],
            Feature::Regime {
                window,
                lookback,
                quantile,
                ..
            } => format!("regime_{window}_{lookback}_q{quantile}"),
        };
        let base = self.of().map_or(base.clone(), |of| format!("{of}_{base}"));
        match self {
            Feature::Macd { .. } => vec![
                base.clone(),
                format!("{base}_signal"),
                format!("{base}_histogram"),
            ],
            _ => vec![base],
        }
    }

    /// The columns it adds.
    pub(crate) fn columns(&self) -> impl Iterator<Item = ColumnSpec> {
        self.names()
            .into_iter()
            .map(|name| ColumnSpec::new(name, Scale::Identity))
    }

    fn of(&self) -> Option<&str> {
        match self {
            Feature::Return { of, .. }
            | Feature::Volatility { of, .. }
            | Feature::Rsi { of, .. }
            | Feature::Macd { of, .. }
            | Feature::Regime { of, .. } => of.as_deref(),
            _ => None,
        }
    }

    /// Checks the numbers, and that the columns it needs are there.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] naming the feature.
    pub fn validate(&self, schema: &Schema) -> Result<()> {
        let name = self.names().swap_remove(0);
        let bad = |reason: &str| {
            Err(Error::InvalidOption {
                option: "features",
                reason: format!("`{name}`: {reason}"),
            })
        };
        let (least, windows): (usize, Vec<usize>) = match self {
            Feature::Return { steps, .. } => (1, vec![*steps]),
            Feature::Rsi { window, .. }
            | Feature::Atr { window }
            | Feature::VwapDistance { window } => (1, vec![*window]),
            Feature::Volatility { window, .. } => (2, vec![*window]),
            Feature::Regime {
                window, lookback, ..
            } => (2, vec![*window, *lookback]),
            Feature::Macd {
                fast, slow, signal, ..
            } => (1, vec![*fast, *slow, *signal]),
            Feature::TimeOfDay | Feature::TimeOfWeek => (0, vec![]),
        };
        if windows.iter().any(|w| *w < least || *w > LONGEST_WINDOW) {
            return bad(&format!(
                "windows are {windows:?}; expected {least} to {LONGEST_WINDOW} rows"
            ));
        }
        if let Feature::Macd { fast, slow, .. } = self
            && fast >= slow
        {
            return bad("the fast average must be shorter than the slow one");
        }
        if let Feature::Regime { quantile, .. } = self
            && !(0.0..=1.0).contains(quantile)
        {
            return bad("the quantile must lie between 0 and 1");
        }
        match self.inputs(schema) {
            Some(_) => Ok(()),
            None => bad("a column it is computed from is not in the schema"),
        }
    }

    /// Places of the columns it reads.
    fn inputs(&self, schema: &Schema) -> Option<Vec<usize>> {
        let roles: &[Role] = match self {
            Feature::Atr { .. } => &[Role::High, Role::Low, Role::Close],
            Feature::VwapDistance { .. } => &[Role::High, Role::Low, Role::Close, Role::Volume],
            Feature::TimeOfDay | Feature::TimeOfWeek => &[],
            _ => match self.of() {
                Some(name) => return schema.index_of(name).map(|i| vec![i]),
                None => &[Role::Close],
            },
        };
        roles
            .iter()
            .map(|role| schema.index_of_role(*role))
            .collect()
    }
}

/// The longest window: bounds the memory of a step.
const LONGEST_WINDOW: usize = 1 << 20;

/// The steps of all features, in the middle of their way through a series.
pub(crate) struct FeatureSteps {
    steps: Vec<Bound>,
}

/// A step and the columns it reads and writes.
struct Bound {
    step: Box<dyn Step>,
    inputs: Vec<usize>,
    outputs: usize,
}

impl FeatureSteps {
    /// Steps at the start of a series. Features must have been validated.
    pub(crate) fn new(features: &[Feature], schema: &Schema) -> Self {
        let steps = features
            .iter()
            .map(|feature| Bound {
                step: step_for(feature),
                inputs: feature.inputs(schema).unwrap_or_default(),
                outputs: feature.names().len(),
            })
            .collect();
        Self { steps }
    }

    /// Adds the columns to the next rows of the series.
    pub(crate) fn apply(&mut self, block: &mut Block) {
        let base = &*block;
        let added: Vec<Vec<Vec<f64>>> = self
            .steps
            .par_iter_mut()
            .map(|bound| bound.run(base))
            .collect();
        for column in added.into_iter().flatten() {
            for (valid, value) in block.valid.iter_mut().zip(&column) {
                *valid &= value.is_finite();
            }
            block.columns.push(column);
        }
    }
}

impl Bound {
    fn run(&mut self, block: &Block) -> Vec<Vec<f64>> {
        let mut columns = vec![Vec::with_capacity(block.len()); self.outputs];
        let mut cells = vec![0.0; self.inputs.len()];
        let mut out = vec![f64::NAN; self.outputs];
        for row in 0..block.len() {
            for (cell, &input) in cells.iter_mut().zip(&self.inputs) {
                *cell = block.columns[input][row];
            }
            out.fill(f64::NAN);
            if cells.iter().all(|c| c.is_finite()) {
                self.step.push(block.timestamps[row], &cells, &mut out);
            }
            for (column, value) in columns.iter_mut().zip(&out) {
                column.push(*value);
            }
        }
        columns
    }
}

/// Adds computed columns to a series in memory.
///
/// # Errors
///
/// [`Error::InvalidOption`] when a feature cannot work on this series.
///
/// ```
/// use mamba_ssm_data::{Feature, RawSeries, Schema, add_features};
///
/// let price = vec![100.0, 110.0, 99.0];
/// let series = RawSeries::from_columns(
///     Schema::ohlcv(),
///     vec![0, 60, 120],
///     vec![price.clone(), price.clone(), price.clone(), price, vec![1.0; 3]],
/// )?;
/// let series = add_features(series, &[Feature::Return { of: None, steps: 1 }])?;
/// assert_eq!(series.schema.columns[5].name, "return_1");
/// assert_eq!(series.valid, [false, true, true]);
/// assert!((series.columns[5][1] - 1.1f64.ln()).abs() < 1e-12);
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn add_features(series: RawSeries, features: &[Feature]) -> Result<RawSeries> {
    let mut schema = series.schema.clone();
    for feature in features {
        feature.validate(&series.schema)?;
        schema.columns.extend(feature.columns());
    }
    schema.validate()?;
    let mut block = Block {
        timestamps: series.timestamps,
        columns: series.columns,
        valid: series.valid,
    };
    FeatureSteps::new(features, &series.schema).apply(&mut block);
    Ok(RawSeries {
        schema,
        timestamps: block.timestamps,
        columns: block.columns,
        valid: block.valid,
        origin: series.origin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn every_feature() -> Vec<Feature> {
        let of = None;
        vec![
            Feature::Return {
                of: of.clone(),
                steps: 3,
            },
            Feature::Return {
                of: Some("Volume".into()),
                steps: 1,
            },
            Feature::Volatility {
                of: of.clone(),
                window: 5,
            },
            Feature::Rsi {
                of: of.clone(),
                window: 4,
            },
            Feature::Macd {
                of: of.clone(),
                fast: 3,
                slow: 6,
                signal: 2,
            },
            Feature::Atr { window: 4 },
            Feature::VwapDistance { window: 5 },
            Feature::TimeOfDay,
            Feature::TimeOfWeek,
            Feature::Regime {
                of: of.clone(),
                window: 3,
                lookback: 8,
                quantile: 0.7,
            },
            Feature::Regime {
                of,
                window: 3,
                lookback: 8,
                quantile: 0.25,
            },
        ]
    }

    /// A number for each kind; a new kind does not compile until it has one.
    fn kind(feature: &Feature) -> usize {
        match feature {
            Feature::Return { .. } => 0,
            Feature::Volatility { .. } => 1,
            Feature::Rsi { .. } => 2,
            Feature::Macd { .. } => 3,
            Feature::Atr { .. } => 4,
            Feature::VwapDistance { .. } => 5,
            Feature::TimeOfDay => 6,
            Feature::TimeOfWeek => 7,
            Feature::Regime { .. } => 8,
        }
    }

    const KINDS: usize = 9;

    /// What the tests below say of every feature must be said of every kind.
    #[test]
    fn every_kind_is_among_the_features_that_are_tested() {
        let tested: std::collections::BTreeSet<usize> = every_feature().iter().map(kind).collect();
        assert!(tested.into_iter().eq(0..KINDS));
    }

    #[test]
    fn features_that_differ_in_a_number_alone_have_names_of_their_own() {
        let names: Vec<String> = every_feature().iter().flat_map(Feature::names).collect();
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
        assert_eq!(
            names[names.len() - 2..],
            ["regime_3_8_q0.7", "regime_3_8_q0.25"]
        );
    }

    fn series(rows: &[[f64; 5]]) -> RawSeries {
        let columns = (0..5)
            .map(|c| rows.iter().map(|r| r[c]).collect())
            .collect();
        let times = (0..rows.len() as i64)
            .map(|i| 1_600_000_020 + i * 60)
            .collect();
        RawSeries::from_columns(Schema::ohlcv(), times, columns).unwrap()
    }

    fn bits(series: &RawSeries, rows: usize) -> Vec<Vec<u64>> {
        series
            .columns
            .iter()
            .map(|c| c[..rows].iter().map(|v| v.to_bits()).collect())
            .collect()
    }

    fn row() -> impl Strategy<Value = [f64; 5]> {
        let cell = prop_oneof![9 => 0.01f64..1e5, 1 => Just(f64::NAN)];
        [cell.clone(), cell.clone(), cell.clone(), cell.clone(), cell]
    }

    proptest! {
        #[test]
        fn a_later_row_never_changes_an_earlier_feature(
            mut rows in proptest::collection::vec(row(), 2..80),
            other in row(),
            at in any::<proptest::sample::Index>(),
        ) {
            let before = add_features(series(&rows), &every_feature()).unwrap();
            let at = at.index(rows.len());
            rows[at] = other;
            let after = add_features(series(&rows), &every_feature()).unwrap();
            prop_assert_eq!(bits(&before, at), bits(&after, at));
            prop_assert_eq!(&before.valid[..at], &after.valid[..at]);
        }

        #[test]
        fn blocks_of_any_size_give_the_same_columns(
            rows in proptest::collection::vec(row(), 1..60),
            size in 1usize..20,
        ) {
            let whole = series(&rows);
            let expected = add_features(whole.clone(), &every_feature()).unwrap();
            let mut steps = FeatureSteps::new(&every_feature(), &whole.schema);
            let mut columns = vec![Vec::new(); expected.width()];
            for start in (0..rows.len()).step_by(size) {
                let part = whole.slice(start..(start + size).min(rows.len()));
                let mut block = Block { timestamps: part.timestamps, columns: part.columns, valid: part.valid };
                steps.apply(&mut block);
                for (to, from) in columns.iter_mut().zip(block.columns) {
                    to.extend(from);
                }
            }
            let same = expected.columns.iter().flatten().zip(columns.iter().flatten())
                .all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same);
        }
    }

    #[test]
    fn features_that_cannot_work_are_named() {
        let schema = Schema::ohlcv();
        let refused = |feature: Feature, word: &str| {
            let message = feature.validate(&schema).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        };
        refused(
            Feature::Rsi {
                of: Some("Spread".into()),
                window: 3,
            },
            "Spread_rsi_3",
        );
        refused(Feature::Atr { window: 0 }, "atr_0");
        refused(
            Feature::Macd {
                of: None,
                fast: 9,
                slow: 3,
                signal: 2,
            },
            "shorter",
        );
        refused(
            Feature::Regime {
                of: None,
                window: 9,
                lookback: 9,
                quantile: 2.0,
            },
            "quantile",
        );
        let twice = [Feature::TimeOfDay, Feature::TimeOfDay];
        let message = add_features(RawSeries::empty(schema, "x"), &twice)
            .unwrap_err()
            .to_string();
        assert!(message.contains("day_sin"), "{message}");
    }
}
