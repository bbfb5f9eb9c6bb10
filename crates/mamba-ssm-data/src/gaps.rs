//! Missing minutes and invalid rows, filled or left.

use crate::series::RawSeries;
use crate::windows::GapPolicy;
use crate::{Error, Result};

/// Rows that `mask` may add: this many, or [`GROWTH`] times the rows there are.
const ALWAYS_ALLOWED: usize = 1 << 20;
const GROWTH: usize = 4;

/// Applies a gap policy: the series with rows filled in as the policy asks.
///
/// Filled rows carry the values of the last row before them (cell by cell where only some cells
/// are missing), stand on the schema's clock, and are marked as invalid. `Split` and `Ignore` return
/// the series as it is. A step that is no multiple of the schema's is never filled.
///
/// # Errors
///
/// [`Error::InvalidOption`] when the policy's numbers are out of range; [`Error::Source`] when
/// `Mask` would have to add far more rows than there are (a stray timestamp).
///
/// ```
/// use mamba_ssm_data::{GapPolicy, RawSeries, Schema, fill_gaps};
///
/// let price = vec![10.0, 11.0];
/// let series = RawSeries::from_columns(
///     Schema::ohlcv(),
///     vec![0, 180],
///     vec![price.clone(), price.clone(), price.clone(), price, vec![1.0, 2.0]],
/// )?;
/// let filled = fill_gaps(series, &GapPolicy::Fill { limit: 5 })?;
/// assert_eq!(filled.timestamps, [0, 60, 120, 180]);
/// assert_eq!(filled.valid, [true, false, false, true]);
/// assert_eq!(filled.columns[3], [10.0, 10.0, 10.0, 11.0]);
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn fill_gaps(series: RawSeries, policy: &GapPolicy) -> Result<RawSeries> {
    policy.validate()?;
    let limit = match policy {
        GapPolicy::Split | GapPolicy::Ignore => return Ok(series),
        GapPolicy::Fill { limit } => *limit,
        GapPolicy::Mask { .. } => usize::MAX,
    };
    let mut filler = Filler::new(&series, limit);
    for row in 0..series.len() {
        filler.push(row)?;
    }
    filler.close_run(filler.out.len());
    Ok(filler.out)
}

/// Whether a row may stand in a window: true rows, and filled ones.
pub(crate) fn is_usable(columns: &[Vec<f64>], valid: &[bool], row: usize) -> bool {
    valid[row] || columns.iter().all(|c| c[row].is_finite())
}

struct Filler<'a> {
    series: &'a RawSeries,
    limit: usize,
    out: RawSeries,
    /// First row of `out` in the current run of invalid rows.
    run: Option<usize>,
    added: usize,
}

impl<'a> Filler<'a> {
    fn new(series: &'a RawSeries, limit: usize) -> Self {
        Self {
            series,
            limit,
            out: RawSeries::empty(series.schema.clone(), series.origin.clone()),
            run: None,
            added: 0,
        }
    }

    /// Takes over one row, and the missing rows before it.
    fn push(&mut self, row: usize) -> Result<()> {
        let time = self.series.timestamps[row];
        if let Some(&last) = self.out.timestamps.last() {
            let missing = self.missing_between(last, time)?;
            for i in 1..=missing as i64 {
                self.add(last + i * self.series.schema.step, None);
            }
        }
        self.add(time, Some(row));
        if self.series.valid[row] {
            self.close_run(self.out.len() - 1);
        }
        Ok(())
    }

    /// Rows to add between two timestamps.
    fn missing_between(&mut self, last: i64, time: i64) -> Result<usize> {
        let step = self.series.schema.step;
        let distance = time.abs_diff(last);
        let step = step.unsigned_abs();
        let missing = usize::try_from((distance / step).saturating_sub(1)).unwrap_or(usize::MAX);
        if !distance.is_multiple_of(step) || missing > self.limit {
            return Ok(0);
        }
        self.added = self.added.saturating_add(missing);
        if self.added > ALWAYS_ALLOWED.max(self.series.len().saturating_mul(GROWTH)) {
            return Err(Error::Source {
                path: self.series.origin.clone(),
                reason: format!(
                    "the gap from {} to {} would take {missing} masked rows; use the policy `split` or `fill`",
                    crate::format_time(last),
                    crate::format_time(time)
                ),
            });
        }
        Ok(missing)
    }

    /// Adds a row; without a source row, or where that has no number, NaN marks what to fill.
    fn add(&mut self, time: i64, row: Option<usize>) {
        let valid = row.is_some_and(|r| self.series.valid[r]);
        if !valid && self.run.is_none() {
            self.run = Some(self.out.len());
        }
        self.out.timestamps.push(time);
        self.out.valid.push(valid);
        for (out, column) in self.out.columns.iter_mut().zip(&self.series.columns) {
            out.push(row.map_or(f64::NAN, |r| column[r]));
        }
    }

    /// Ends the run of invalid rows before `end`, filling it when it is short enough.
    fn close_run(&mut self, end: usize) {
        let Some(start) = self.run.take() else { return };
        if start == 0 || end - start > self.limit {
            return;
        }
        for column in &mut self.out.columns {
            for row in start..end {
                if !column[row].is_finite() {
                    column[row] = column[row - 1];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ColumnSpec, Scale, Schema};

    fn series(minutes: &[i64], values: &[f64]) -> RawSeries {
        let schema = Schema {
            columns: vec![ColumnSpec::new("x", Scale::Identity)],
            ..Schema::ohlcv()
        };
        let times = minutes.iter().map(|m| m * 60).collect();
        RawSeries::from_columns(schema, times, vec![values.to_vec()]).unwrap()
    }

    #[test]
    fn short_gaps_are_filled_and_long_ones_left() {
        let filled = fill_gaps(
            series(&[0, 3, 7], &[1.0, 2.0, 3.0]),
            &GapPolicy::Fill { limit: 2 },
        )
        .unwrap();
        assert_eq!(filled.timestamps, [0, 60, 120, 180, 420]);
        assert_eq!(filled.columns[0], [1.0, 1.0, 1.0, 2.0, 3.0]);
        assert_eq!(filled.valid, [true, false, false, true, true]);
    }

    #[test]
    fn invalid_rows_count_towards_the_limit() {
        let nan = f64::NAN;
        let input = series(&[0, 1, 2, 3, 4, 5], &[1.0, nan, nan, 4.0, nan, 6.0]);
        let filled = fill_gaps(input, &GapPolicy::Fill { limit: 1 }).unwrap();
        assert!(filled.columns[0][1].is_nan() && filled.columns[0][2].is_nan());
        assert_eq!(filled.columns[0][4], 4.0);
        assert!(!filled.valid[4]);
        let usable: Vec<bool> = (0..6)
            .map(|r| is_usable(&filled.columns, &filled.valid, r))
            .collect();
        assert_eq!(usable, [true, false, false, true, true, true]);
    }

    #[test]
    fn nothing_comes_before_the_first_row() {
        let nan = f64::NAN;
        let filled = fill_gaps(
            series(&[0, 1, 2, 9], &[nan, nan, 1.0, nan]),
            &GapPolicy::Mask { min_valid: 0.5 },
        )
        .unwrap();
        assert_eq!(filled.len(), 10);
        assert!(filled.columns[0][1].is_nan());
        assert_eq!(filled.columns[0][9], 1.0);
    }

    #[test]
    fn a_stray_timestamp_does_not_fill_the_memory() {
        let message = fill_gaps(
            series(&[0, 1 << 40], &[1.0, 2.0]),
            &GapPolicy::Mask { min_valid: 0.5 },
        )
        .unwrap_err()
        .to_string();
        assert!(message.contains("masked rows"), "{message}");
    }

    #[test]
    fn a_step_off_the_clock_is_a_gap() {
        let mut input = series(&[0, 2], &[1.0, 2.0]);
        input.timestamps[1] = 90;
        let filled = fill_gaps(input, &GapPolicy::Mask { min_valid: 0.0 }).unwrap();
        assert_eq!(filled.timestamps, [0, 90]);
    }
}
