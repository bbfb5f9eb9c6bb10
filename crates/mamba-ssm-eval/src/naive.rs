//! Forecasters that know nothing: what a model has to beat.
//!
//! Each forecasts one row from the rows before it and from nothing else.

use crate::{EvalError, FeatureScale, Result};
use std::ops::Range;

const HOUR: i64 = 3_600;
const DAY: i64 = 86_400;

/// The naive forecasters, in the order in which a tie is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NaiveKind {
    /// The last close, for all four prices (moved between the features' z-score spaces).
    LastClose,
    /// The feature's last value.
    LastValue,
    /// The feature's mean over the last hour: rows with timestamps in `(t - 3600, t]`, where `t`
    /// is the time of the last row before the target. In z-score space, that is, the mean of
    /// logarithms.
    HourMean,
    /// The feature's value exactly one day before the target's time; the last value where that
    /// minute is missing.
    DayBefore,
}

impl NaiveKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::LastClose,
        Self::LastValue,
        Self::HourMean,
        Self::DayBefore,
    ];

    /// The name used in files: `last_close`, `last_value`, `hour_mean`, `day_before`.
    pub fn name(self) -> &'static str {
        match self {
            Self::LastClose => "last_close",
            Self::LastValue => "last_value",
            Self::HourMean => "hour_mean",
            Self::DayBefore => "day_before",
        }
    }

    /// A few words for readers, given the [`name`](Self::name) or
    /// [`BEST_OF_EACH`](crate::BEST_OF_EACH); unknown names come back as they are.
    pub fn describe(name: &str) -> &str {
        match name {
            "last_close" => "last close",
            "last_value" => "last value",
            "hour_mean" => "mean of the last hour",
            "day_before" => "same minute a day before",
            crate::BEST_OF_EACH => "best of each feature",
            other => other,
        }
    }
}

/// The naive forecasts of a series, each in constant or logarithmic time.
///
/// Setting up costs one pass over the rows from an hour before the first target to the last one,
/// and keeps 12 bytes for each value in it; the series itself is borrowed.
///
/// ```
/// use mamba_ssm_eval::{FeatureScale, NaiveForecaster, NaiveKind, ScaleKind};
///
/// let scales = [FeatureScale::new("Close", ScaleKind::Identity, 0.0, 1.0)?];
/// let (times, closes) = ([0, 60, 120], [1.0, 3.0, 7.0]);
/// let naive = NaiveForecaster::new(&scales, &times, &closes, &[2])?;
/// assert_eq!(naive.predict(NaiveKind::LastValue, 2, 0), Some(3.0));
/// assert_eq!(naive.predict(NaiveKind::HourMean, 2, 0), Some(2.0));
/// # Ok::<(), mamba_ssm_eval::EvalError>(())
/// ```
#[derive(Debug, Clone)]
pub struct NaiveForecaster<'a> {
    scales: &'a [FeatureScale],
    timestamps: &'a [i64],
    series: &'a [f64],
    close: Option<usize>,
    /// Rows that may be forecast.
    targets: Range<usize>,
    /// Row of the first running sum.
    first: usize,
    /// `sums[(r - first) * features + f]`: sum over the finite values of rows `first..r`.
    sums: Vec<f64>,
    counts: Vec<u32>,
}

impl<'a> NaiveForecaster<'a> {
    /// Prepares the forecasts of `target_rows`.
    ///
    /// `timestamps` are `[rows]` in unix seconds and rise; `series` is `[rows, features]`,
    /// row-major, in z-score space, where a value that is not finite counts as missing.
    ///
    /// # Errors
    ///
    /// When shapes disagree, a scale is unusable, a feature name repeats, timestamps do not rise,
    /// or a target row is not in the series or is its first.
    pub fn new(
        scales: &'a [FeatureScale],
        timestamps: &'a [i64],
        series: &'a [f64],
        target_rows: &[usize],
    ) -> Result<Self> {
        check_series(scales, timestamps, series)?;
        let targets = target_range(target_rows, timestamps.len())?;
        let since = timestamps[targets.start - 1] - HOUR;
        let first = timestamps.partition_point(|&t| t <= since);
        let mut forecaster = Self {
            scales,
            timestamps,
            series,
            close: scales.iter().position(|scale| scale.name == "Close"),
            first,
            sums: Vec::new(),
            counts: Vec::new(),
            targets,
        };
        forecaster.accumulate();
        Ok(forecaster)
    }

    fn accumulate(&mut self) {
        let width = self.scales.len();
        let rows = self.targets.end - self.first;
        self.sums = Vec::with_capacity(rows * width);
        self.counts = Vec::with_capacity(rows * width);
        self.sums.resize(width, 0.0);
        self.counts.resize(width, 0);
        let values = &self.series[self.first * width..(self.targets.end - 1) * width];
        for (index, &value) in values.iter().enumerate() {
            let known = value.is_finite();
            let step = if known { value } else { 0.0 };
            self.sums.push(self.sums[index] + step);
            self.counts.push(self.counts[index] + u32::from(known));
        }
    }

    /// The forecast of `feature` (an index into the scales) at `row`, in that feature's z-score
    /// space, from rows before `row` alone.
    ///
    /// `None` where there is none: no finite value before the row, a forecaster that does not
    /// cover the feature, or a row outside the range of the target rows.
    pub fn predict(&self, kind: NaiveKind, row: usize, feature: usize) -> Option<f64> {
        if !self.targets.contains(&row) || feature >= self.scales.len() {
            return None;
        }
        match kind {
            NaiveKind::LastClose => self.last_close(row, feature),
            NaiveKind::LastValue => self.last_value(row, feature),
            NaiveKind::HourMean => self
                .hour_mean(row, feature)
                .or_else(|| self.last_value(row, feature)),
            NaiveKind::DayBefore => self
                .day_before(row, feature)
                .or_else(|| self.last_value(row, feature)),
        }
    }

    fn at(&self, row: usize, feature: usize) -> Option<f64> {
        let value = self.series[row * self.scales.len() + feature];
        value.is_finite().then_some(value)
    }

    fn last_value(&self, row: usize, feature: usize) -> Option<f64> {
        (0..row).rev().find_map(|earlier| self.at(earlier, feature))
    }

    fn last_close(&self, row: usize, feature: usize) -> Option<f64> {
        let close = self.close?;
        if !self.scales[feature].is_price() {
            return None;
        }
        let value = self.last_value(row, close)?;
        if feature == close {
            // No round trip, so that it ties with the last value to the bit.
            return Some(value);
        }
        Some(self.scales[feature].to_z(self.scales[close].to_level(value)))
    }

    fn hour_mean(&self, row: usize, feature: usize) -> Option<f64> {
        let since = self.timestamps[row - 1] - HOUR;
        let from = self.first + self.timestamps[self.first..row].partition_point(|&t| t <= since);
        let width = self.scales.len();
        let low = (from - self.first) * width + feature;
        let high = (row - self.first) * width + feature;
        let count = self.counts[high] - self.counts[low];
        (count > 0).then(|| (self.sums[high] - self.sums[low]) / f64::from(count))
    }

    fn day_before(&self, row: usize, feature: usize) -> Option<f64> {
        let wanted = self.timestamps[row] - DAY;
        let earlier = self.timestamps[..row].binary_search(&wanted).ok()?;
        self.at(earlier, feature)
    }
}

fn check_series(scales: &[FeatureScale], timestamps: &[i64], series: &[f64]) -> Result<()> {
    if scales.is_empty() {
        return Err(EvalError::Empty { what: "scales" });
    }
    for (index, scale) in scales.iter().enumerate() {
        scale.check()?;
        if scales[..index].iter().any(|other| other.name == scale.name) {
            return Err(EvalError::RepeatedFeature {
                name: scale.name.clone(),
            });
        }
    }
    let expected = timestamps.len() * scales.len();
    if series.len() != expected {
        return Err(EvalError::LengthMismatch {
            what: "series",
            found: series.len(),
            expected,
            layout: format!("{} rows x {} features", timestamps.len(), scales.len()),
        });
    }
    match timestamps.windows(2).position(|pair| pair[0] >= pair[1]) {
        None => Ok(()),
        Some(at) => Err(EvalError::Timestamps {
            row: at + 1,
            found: timestamps[at + 1],
            previous: timestamps[at],
        }),
    }
}

fn target_range(target_rows: &[usize], rows: usize) -> Result<Range<usize>> {
    let (Some(&low), Some(&high)) = (target_rows.iter().min(), target_rows.iter().max()) else {
        return Err(EvalError::Empty {
            what: "target_rows",
        });
    };
    let last = rows.saturating_sub(1);
    for row in [low, high] {
        if row == 0 || row > last {
            return Err(EvalError::TargetRow { row, last });
        }
    }
    Ok(low..high + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScaleKind;

    fn identity(name: &str) -> FeatureScale {
        FeatureScale::new(name, ScaleKind::Identity, 0.0, 1.0).unwrap()
    }

    #[test]
    fn forecasts_over_gaps() {
        // Minutes 0, 1, then an outage of two hours, then minutes 122, 123; a day later two more.
        let times = [0, 60, 7_320, 7_380, DAY + 60, DAY + 120];
        let series = [1.0, 2.0, 10.0, 20.0, 5.0, 6.0];
        let scales = [identity("Volume")];
        let naive = NaiveForecaster::new(&scales, &times, &series, &[2, 3, 4, 5]).unwrap();
        let at = |kind, row| naive.predict(kind, row, 0).unwrap();
        assert_eq!(at(NaiveKind::LastValue, 2), 2.0);
        // The hour ends at the last row known, not at the target, so the outage empties nothing.
        assert_eq!(at(NaiveKind::HourMean, 2), 1.5);
        assert_eq!(at(NaiveKind::HourMean, 3), 10.0);
        assert_eq!(at(NaiveKind::HourMean, 4), 15.0);
        assert_eq!(at(NaiveKind::DayBefore, 4), 2.0);
        assert_eq!(
            at(NaiveKind::DayBefore, 5),
            5.0,
            "no such minute: the last value"
        );
        assert_eq!(naive.predict(NaiveKind::LastClose, 2, 0), None);
        assert_eq!(
            naive.predict(NaiveKind::LastValue, 1, 0),
            None,
            "not a target"
        );
    }

    #[test]
    fn the_hour_is_open_at_its_start() {
        let times: Vec<i64> = (0..70).map(|i| i * 60).collect();
        let series: Vec<f64> = (0..70).map(f64::from).collect();
        let scales = [identity("Volume")];
        let naive = NaiveForecaster::new(&scales, &times, &series, &[69]).unwrap();
        // Rows 9 to 68: sixty minutes.
        assert_eq!(naive.predict(NaiveKind::HourMean, 69, 0), Some(38.5));
    }

    #[test]
    fn the_last_close_changes_z_space() {
        let scales = [
            FeatureScale::new("High", ScaleKind::Log, 2.0, 0.5).unwrap(),
            FeatureScale::new("Close", ScaleKind::Log, 1.0, 0.25).unwrap(),
        ];
        let series = [scales[0].to_z(103.0), scales[1].to_z(100.0), 0.0, 0.0];
        let naive = NaiveForecaster::new(&scales, &[0, 60], &series, &[1]).unwrap();
        let high = naive.predict(NaiveKind::LastClose, 1, 0).unwrap();
        assert!((scales[0].to_level(high) - 100.0).abs() < 1e-9);
        let close = naive.predict(NaiveKind::LastClose, 1, 1);
        assert_eq!(close, naive.predict(NaiveKind::LastValue, 1, 1));
    }

    #[test]
    fn missing_values_are_passed_over() {
        let scales = [identity("Volume"), identity("Close")];
        let nan = f64::NAN;
        let series = [1.0, 4.0, 3.0, nan, nan, nan, 9.0, 9.0];
        let naive = NaiveForecaster::new(&scales, &[0, 60, 120, 180], &series, &[3]).unwrap();
        assert_eq!(naive.predict(NaiveKind::LastValue, 3, 0), Some(3.0));
        assert_eq!(naive.predict(NaiveKind::HourMean, 3, 0), Some(2.0));
        assert_eq!(naive.predict(NaiveKind::LastClose, 3, 1), Some(4.0));
    }

    #[test]
    fn no_forecast_sees_its_own_row_or_a_later_one() {
        let scales = [identity("Close"), identity("Volume")];
        let rows = 3_000usize;
        let times: Vec<i64> = (0..rows as i64).map(|i| i * 60 + (i / 100) * 600).collect();
        let series: Vec<f64> = (0..rows * 2).map(|i| (i as f64 * 0.37).sin()).collect();
        let targets: Vec<usize> = (1..rows).collect();
        let all = |series: &[f64], upto: usize| -> Vec<Option<f64>> {
            let naive = NaiveForecaster::new(&scales, &times, series, &targets).unwrap();
            (1..=upto)
                .flat_map(|row| [(row, 0), (row, 1)])
                .flat_map(|(row, feature)| {
                    NaiveKind::ALL.map(|kind| naive.predict(kind, row, feature))
                })
                .collect()
        };
        for changed in [1, 700, 1_999, rows - 1] {
            let mut other = series.clone();
            other[changed * 2..].fill(1e3);
            assert_eq!(all(&series, changed), all(&other, changed), "row {changed}");
        }
    }

    #[test]
    fn bad_input_is_named() {
        let scales = [identity("Close")];
        let new = |times: &[i64], series: &[f64], rows: &[usize]| {
            NaiveForecaster::new(&scales, times, series, rows)
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(new(&[0, 60], &[1.0], &[1]).contains("2 rows x 1 features"));
        assert!(new(&[0, 60], &[1.0, 2.0], &[]).contains("target_rows is empty"));
        assert!(new(&[0, 60], &[1.0, 2.0], &[0]).contains("target row 0"));
        assert!(new(&[0, 60], &[1.0, 2.0], &[2]).contains("target row 2"));
        assert!(new(&[0, 60, 60], &[1.0; 3], &[1]).contains("row 2 has 60 after 60"));
        let twice = [identity("Close"), identity("Close")];
        let error = NaiveForecaster::new(&twice, &[0], &[1.0, 1.0], &[]).unwrap_err();
        assert!(matches!(error, EvalError::RepeatedFeature { .. }));
        let error = NaiveForecaster::new(&[], &[], &[], &[]).unwrap_err();
        assert!(matches!(error, EvalError::Empty { what: "scales" }));
    }
}
