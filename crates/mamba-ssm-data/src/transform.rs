//! Scale and standardise: the fitted, invertible way from levels to z-scores.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::schema::{Scale, Schema};
use crate::series::RawSeries;
use crate::{Error, Result};

/// Rows summed in one go. Fixed, so that sums do not depend on the number of threads.
const BLOCK: usize = 1 << 16;

/// What is known about one feature after fitting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureStats {
    /// Name of the column.
    pub name: String,
    /// The function applied first.
    pub scale: Scale,
    /// Mean of the scaled values of the fitted rows.
    pub mean: f64,
    /// Sample standard deviation (n - 1) of the same; 1 for a column that does not vary.
    pub std: f64,
}

impl FeatureStats {
    /// Level to z-score: `(scale(x) - mean) / std`.
    #[inline]
    pub fn apply(&self, level: f64) -> f64 {
        self.standardise(self.scale.forward(level))
    }

    /// Scaled value to z-score.
    #[inline]
    pub(crate) fn standardise(&self, scaled: f64) -> f64 {
        (scaled - self.mean) / self.std
    }

    /// z-score to level.
    #[inline]
    pub fn invert(&self, z: f64) -> f64 {
        self.scale.inverse(z * self.std + self.mean)
    }
}

/// The fitted transform of all features. Saved with the shards, to be saved with every run.
///
/// ```
/// use mamba_ssm_data::{RawSeries, Schema, Transform};
///
/// let price = vec![10.0, 11.0, 12.0, 13.0];
/// let series = RawSeries::from_columns(
///     Schema::ohlcv(),
///     vec![0, 60, 120, 180],
///     vec![price.clone(), price.clone(), price.clone(), price, vec![5.0, 0.0, 2.0, 1.0]],
/// )?;
/// let transform = Transform::fit(&series, 0..3)?;
/// let normal = transform.apply(&series)?;
/// let z = normal.row(3)[0];
/// assert!((transform.invert(0, z) - 13.0).abs() < 1e-5);
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transform {
    /// One entry per feature, in order.
    pub features: Vec<FeatureStats>,
}

impl Transform {
    /// Fits mean and sample standard deviation of the scaled columns on the valid rows of `rows`.
    ///
    /// # Errors
    ///
    /// [`Error::TooFewRows`] when fewer than two valid rows lie in the range.
    ///
    /// # Panics
    ///
    /// When the range reaches past the end of the series.
    pub fn fit(series: &RawSeries, rows: Range<usize>) -> Result<Self> {
        let valid = &series.valid[rows.clone()];
        let moments = series
            .schema
            .columns
            .iter()
            .zip(&series.columns)
            .map(|(spec, column)| {
                Moments::of_column(&column[rows.clone()], valid, |x| spec.scale.forward(x))
            })
            .collect::<Vec<_>>();
        Self::from_moments(&series.schema, &moments, &series.origin)
    }

    /// The transform with these moments of the scaled columns of `origin`.
    pub(crate) fn from_moments(schema: &Schema, moments: &[Moments], origin: &str) -> Result<Self> {
        let rows = moments.iter().map(|m| m.count).min().unwrap_or(0);
        if rows < 2 {
            return Err(Error::TooFewRows {
                path: origin.into(),
                rows: rows as usize,
                needed: 2,
                longest: rows as usize,
            });
        }
        let features = schema
            .columns
            .iter()
            .zip(moments)
            .map(|(spec, m)| FeatureStats {
                name: spec.name.clone(),
                scale: spec.scale,
                mean: m.mean,
                std: m.std(),
            })
            .collect();
        Ok(Self { features })
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.features.len()
    }

    /// Names of the features, in order.
    pub fn names(&self) -> Vec<String> {
        self.features.iter().map(|f| f.name.clone()).collect()
    }

    /// z-score of feature `feature` to its level (dollars, coins).
    ///
    /// # Panics
    ///
    /// When there is no such feature.
    #[inline]
    pub fn invert(&self, feature: usize, z: f32) -> f64 {
        self.features[feature].invert(f64::from(z))
    }

    /// Scales and standardises all rows. Cells of invalid rows that are not finite become 0 (the
    /// mean), so that no NaN leaves this function; their rows stay marked as invalid.
    ///
    /// # Errors
    ///
    /// [`Error::FeatureMismatch`] when the series has other columns than the transform.
    pub fn apply(&self, series: &RawSeries) -> Result<Normalised> {
        self.check_columns(&series.schema, &series.origin)?;
        let width = self.width();
        let mut values = vec![0f32; series.len() * width];
        values
            .par_chunks_mut(BLOCK * width)
            .enumerate()
            .for_each(|(block, out)| {
                let start = block * BLOCK;
                for (f, (stats, column)) in self.features.iter().zip(&series.columns).enumerate() {
                    let column = &column[start..];
                    for (row, &level) in out.chunks_exact_mut(width).zip(column) {
                        row[f] = finite_or_zero(stats.apply(level));
                    }
                }
            });
        Ok(Normalised {
            timestamps: series.timestamps.clone(),
            values,
            valid: series.valid.clone(),
            width,
        })
    }

    /// Refuses a series (of `origin`) whose columns (names, order, scales) are not those of the transform.
    pub(crate) fn check_columns(&self, schema: &Schema, origin: &str) -> Result<()> {
        let same = self.width() == schema.columns.len()
            && self
                .features
                .iter()
                .zip(&schema.columns)
                .all(|(f, c)| f.name == c.name && f.scale == c.scale);
        if same {
            return Ok(());
        }
        let describe = |name: &str, scale: Scale| format!("{name} ({scale:?})").to_lowercase();
        Err(Error::FeatureMismatch {
            path: origin.into(),
            expected: self
                .features
                .iter()
                .map(|f| describe(&f.name, f.scale))
                .collect(),
            found: schema
                .columns
                .iter()
                .map(|c| describe(&c.name, c.scale))
                .collect(),
        })
    }
}

/// NaN and infinities become 0, the mean in z-score space.
#[inline]
pub(crate) fn finite_or_zero(z: f64) -> f32 {
    let z = z as f32;
    if z.is_finite() { z } else { 0.0 }
}

/// Rows in z-score space, one after another.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Normalised {
    /// Unix seconds, one per row.
    pub timestamps: Vec<i64>,
    /// `[rows, width]`, row after row; always finite.
    pub values: Vec<f32>,
    /// Whether the row is a true observation (not missing, not filled).
    pub valid: Vec<bool>,
    /// Features of a row.
    pub width: usize,
}

impl Normalised {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.timestamps.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.timestamps.is_empty()
    }

    /// The features of one row.
    ///
    /// # Panics
    ///
    /// When there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }
}

/// Count, mean and sum of squared deviations, merged by the formula of Chan, Golub and LeVeque
/// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Moments {
    pub(crate) count: u64,
    mean: f64,
    m2: f64,
}

impl Moments {
    /// The moments of the valid cells of a column, after a function.
    pub(crate) fn of_column(
        column: &[f64],
        valid: &[bool],
        function: impl Fn(f64) -> f64 + Sync,
    ) -> Self {
        let parts: Vec<Self> = column
            .par_chunks(BLOCK)
            .zip(valid.par_chunks(BLOCK))
            .map(|(cells, valid)| {
                let scaled: Vec<f64> = cells.iter().map(|x| function(*x)).collect();
                Self::of_valid(&scaled, valid)
            })
            .collect();
        parts.into_iter().fold(Self::default(), Self::merge)
    }

    /// The moments of the valid ones among some values.
    pub(crate) fn of_valid(values: &[f64], valid: &[bool]) -> Self {
        let kept = || {
            values
                .iter()
                .zip(valid)
                .filter(|(_, valid)| **valid)
                .map(|(x, _)| *x)
        };
        let count = kept().count();
        if count == 0 {
            return Self::default();
        }
        let mean = kept().sum::<f64>() / count as f64;
        Self {
            count: count as u64,
            mean,
            m2: kept().map(|x| (x - mean) * (x - mean)).sum(),
        }
    }

    /// The moments of both sets together.
    pub(crate) fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0 {
            return self;
        }
        let delta = other.mean - self.mean;
        let share = other.count as f64 / count as f64;
        Self {
            count,
            mean: self.mean + delta * share,
            m2: self.m2 + other.m2 + delta * delta * self.count as f64 * share,
        }
    }

    /// Sample standard deviation; 1 where it would be zero or nothing, so that it can divide.
    pub(crate) fn std(&self) -> f64 {
        let std = (self.m2 / (self.count as f64 - 1.0)).sqrt();
        let smallest = 1e-12 * self.mean.abs().max(f64::MIN_POSITIVE);
        if std.is_finite() && std > smallest {
            std
        } else {
            1.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::ColumnSpec;

    fn series(values: Vec<f64>, scale: Scale) -> RawSeries {
        let schema = Schema {
            columns: vec![ColumnSpec::new("x", scale)],
            ..Schema::ohlcv()
        };
        let times = (0..values.len() as i64).map(|i| i * 60).collect();
        RawSeries::from_columns(schema, times, vec![values]).unwrap()
    }

    #[test]
    fn mean_and_sample_std_of_the_fitted_rows_alone() {
        let series = series(vec![1.0, 2.0, 4.0, f64::NAN, 1e9], Scale::Identity);
        let transform = Transform::fit(&series, 0..4).unwrap();
        let f = &transform.features[0];
        assert!((f.mean - 7.0 / 3.0).abs() < 1e-12);
        assert!((f.std - (7.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_constant_column_is_left_in_place() {
        let series = series(vec![3.0; 5], Scale::Log);
        let transform = Transform::fit(&series, 0..5).unwrap();
        assert_eq!(transform.features[0].std, 1.0);
        assert_eq!(transform.apply(&series).unwrap().values, vec![0.0; 5]);
    }

    #[test]
    fn no_nan_gets_out_and_invalid_rows_stay_marked() {
        let series = series(vec![1.0, f64::NAN, 3.0], Scale::Log);
        let normal = Transform::fit(&series, 0..3)
            .unwrap()
            .apply(&series)
            .unwrap();
        assert_eq!(normal.values[1], 0.0);
        assert_eq!(normal.valid, [true, false, true]);
    }

    #[test]
    fn one_row_is_too_few_to_fit() {
        let series = series(vec![1.0, 2.0], Scale::Log);
        assert!(matches!(
            Transform::fit(&series, 0..1),
            Err(Error::TooFewRows { rows: 1, .. })
        ));
    }

    #[test]
    fn other_columns_are_refused() {
        let a = series(vec![1.0, 2.0], Scale::Log);
        let b = series(vec![1.0, 2.0], Scale::Identity);
        let transform = Transform::fit(&a, 0..2).unwrap();
        let message = transform.apply(&b).unwrap_err().to_string();
        assert!(message.contains("identity"), "{message}");
    }

    #[test]
    fn moments_merge_to_the_moments_of_the_whole() {
        let values: Vec<f64> = (0..1000).map(|i| ((i * 37) % 101) as f64 + 1e6).collect();
        let of = |values: &[f64]| Moments::of_valid(values, &vec![true; values.len()]);
        let whole = of(&values);
        let merged = values
            .chunks(77)
            .map(of)
            .fold(Moments::default(), Moments::merge);
        assert_eq!(whole.count, merged.count);
        assert!((whole.mean - merged.mean).abs() < 1e-9);
        assert!((whole.std() - merged.std()).abs() < 1e-9);
    }
}
