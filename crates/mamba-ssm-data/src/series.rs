//! A series of rows as it was read: nothing fitted, nothing scaled.

use std::ops::Range;

use crate::schema::Schema;
use crate::time::is_in_calendar;
use crate::{Error, Result};

/// Timestamps, named `f64` columns and one validity flag per row.
///
/// A row is valid when all of its columns hold finite numbers in the domain of their scale.
/// Columns of invalid rows may hold NaN. Memory: 9 bytes plus 8 per column, for each row.
#[derive(Debug, Clone, PartialEq)]
pub struct RawSeries {
    /// What the columns are.
    pub schema: Schema,
    /// Unix seconds, rising.
    pub timestamps: Vec<i64>,
    /// One vector per column of the schema, each as long as `timestamps`.
    pub columns: Vec<Vec<f64>>,
    /// Whether the row holds a finite number in every column.
    pub valid: Vec<bool>,
    /// Where the rows come from, for messages.
    pub origin: String,
}

impl RawSeries {
    /// A series without rows.
    pub fn empty(schema: Schema, origin: impl Into<String>) -> Self {
        let columns = schema.columns.iter().map(|_| Vec::new()).collect();
        Self {
            schema,
            timestamps: Vec::new(),
            columns,
            valid: Vec::new(),
            origin: origin.into(),
        }
    }

    /// Builds a series from columns in memory; non-finite cells make their row invalid.
    ///
    /// # Errors
    ///
    /// The schema is wrong, the columns differ in number or length from it, timestamps do not
    /// rise, or a finite value lies outside of its scale's domain (zero or negative prices).
    ///
    /// ```
    /// use mamba_ssm_data::{RawSeries, Schema};
    ///
    /// let price = vec![10.0, 11.0, f64::NAN];
    /// let series = RawSeries::from_columns(
    ///     Schema::ohlcv(),
    ///     vec![0, 60, 120],
    ///     vec![price.clone(), price.clone(), price.clone(), price, vec![0.0, 1.0, 2.0]],
    /// )?;
    /// assert_eq!(series.len(), 3);
    /// assert_eq!(series.valid, [true, true, false]);
    /// # Ok::<(), mamba_ssm_data::Error>(())
    /// ```
    pub fn from_columns(
        schema: Schema,
        timestamps: Vec<i64>,
        columns: Vec<Vec<f64>>,
    ) -> Result<Self> {
        schema.validate()?;
        let rows = timestamps.len();
        let shape_is_right =
            columns.len() == schema.columns.len() && columns.iter().all(|c| c.len() == rows);
        if !shape_is_right {
            let lengths: Vec<usize> = columns.iter().map(Vec::len).collect();
            return Err(Error::InvalidOption {
                option: "columns",
                reason: format!(
                    "lengths are {lengths:?}; expected {} columns of {rows} rows",
                    schema.columns.len()
                ),
            });
        }
        let mut series = Self {
            schema,
            timestamps,
            columns,
            valid: vec![true; rows],
            origin: "series".into(),
        };
        series.check()?;
        Ok(series)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.timestamps.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.timestamps.is_empty()
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// The rows of a range, copied.
    ///
    /// # Panics
    ///
    /// When the range reaches past the end.
    pub fn slice(&self, rows: Range<usize>) -> Self {
        Self {
            schema: self.schema.clone(),
            timestamps: self.timestamps[rows.clone()].to_vec(),
            columns: self
                .columns
                .iter()
                .map(|c| c[rows.clone()].to_vec())
                .collect(),
            valid: self.valid[rows].to_vec(),
            origin: self.origin.clone(),
        }
    }

    /// Orders, domains and validity of rows that did not come through a reader.
    fn check(&mut self) -> Result<()> {
        if let Some(i) = self.timestamps.iter().position(|&t| !is_in_calendar(t)) {
            return Err(Error::NotANumber {
                path: self.origin.clone(),
                row: i as u64 + 1,
                column: self.schema.time.name.clone(),
                value: self.timestamps[i].to_string(),
                expected: "a time within the calendar (unix seconds)",
            });
        }
        if let Some(i) = self.timestamps.windows(2).position(|w| w[1] <= w[0]) {
            return Err(Error::OutOfOrder {
                path: self.origin.clone(),
                row: i as u64 + 2,
                previous: self.timestamps[i],
                current: self.timestamps[i + 1],
            });
        }
        for (spec, column) in self.schema.columns.iter().zip(&self.columns) {
            for (row, (&value, valid)) in column.iter().zip(&mut self.valid).enumerate() {
                if !value.is_finite() {
                    *valid = false;
                } else if !spec.scale.accepts(value) {
                    return Err(Error::OutOfDomain {
                        path: self.origin.clone(),
                        row: row as u64 + 1,
                        column: spec.name.clone(),
                        value,
                        expected: spec.scale.expected(),
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ColumnSpec, Scale};

    fn one_column(values: Vec<f64>, scale: Scale) -> Result<RawSeries> {
        let schema = Schema {
            columns: vec![ColumnSpec::new("x", scale)],
            ..Schema::ohlcv()
        };
        let times = (0..values.len() as i64).map(|i| i * 60).collect();
        RawSeries::from_columns(schema, times, vec![values])
    }

    #[test]
    fn a_zero_price_is_refused_with_its_place() {
        let message = one_column(vec![1.0, 0.0], Scale::Log)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("row 2") && message.contains("`x`"),
            "{message}"
        );
        assert!(one_column(vec![1.0, 0.0], Scale::Log1p).is_ok());
        assert!(one_column(vec![1.0, -0.5], Scale::Log1p).is_err());
    }

    #[test]
    fn a_time_that_no_calendar_knows_is_refused_with_its_place() {
        let schema = Schema {
            columns: vec![ColumnSpec::new("x", Scale::Identity)],
            ..Schema::ohlcv()
        };
        for times in [vec![i64::MIN, 0], vec![0, i64::MAX]] {
            let found = RawSeries::from_columns(schema.clone(), times, vec![vec![1.0; 2]]);
            let message = found.unwrap_err().to_string();
            assert!(
                message.contains("row") && message.contains("within the calendar"),
                "{message}"
            );
        }
    }

    #[test]
    fn columns_of_other_lengths_are_refused() {
        let schema = Schema::ohlcv();
        let message = RawSeries::from_columns(schema, vec![0], vec![vec![1.0]])
            .unwrap_err()
            .to_string();
        assert!(message.contains("5 columns"), "{message}");
    }
}
