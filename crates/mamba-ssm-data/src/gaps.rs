//! Missing minutes and invalid rows, filled or left.

use crate::series::RawSeries;
use crate::source::Block;
use crate::windows::GapPolicy;
use crate::{Error, Result};

/// Rows that `mask` may add: this many, or [`GROWTH`] times the rows there are.
const ALWAYS_ALLOWED: usize = 1 << 20;
const GROWTH: usize = 4;

/// Applies a gap policy: the series with rows filled in as the policy asks.
///
/// Filled rows carry the values of the last row before them (cell by cell where only some cells
/// are missing), stand on the schema's clock, and are marked as invalid. `Split` and `Ignore` return
/// the series as it is. A jump that is no multiple of the schema's step is never filled, and no window of
/// `Fill` or `Mask` crosses it: rows put between would not stand on the clock on one of its sides.
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
    let Some(mut filler) = Filler::new(policy, series.schema.step, &series.origin) else {
        return Ok(series);
    };
    let block = Block {
        timestamps: series.timestamps,
        columns: series.columns,
        valid: series.valid,
    };
    let mut out = filler.push(&block)?;
    let rest = filler.finish();
    out.extend(&rest, 0..rest.len());
    Ok(RawSeries {
        schema: series.schema,
        timestamps: out.timestamps,
        columns: out.columns,
        valid: out.valid,
        origin: series.origin,
    })
}

/// Fills rows as they come. Holds back at most `limit` rows, whose fate a later row decides.
pub(crate) struct Filler {
    step: i64,
    limit: usize,
    origin: String,
    /// Invalid rows since the last valid one that may still be filled.
    held: Block,
    /// The run has grown too long to be filled, or nothing came before it.
    given_up: bool,
    last_time: Option<i64>,
    /// The cells of the last row before `held`, all finite.
    last_cells: Vec<f64>,
    seen: usize,
    added: usize,
}

impl Filler {
    /// `None` for the policies that fill nothing.
    pub(crate) fn new(policy: &GapPolicy, step: i64, origin: &str) -> Option<Self> {
        let limit = match policy {
            GapPolicy::Split | GapPolicy::Ignore => return None,
            GapPolicy::Fill { limit } => *limit,
            GapPolicy::Mask { .. } => usize::MAX,
        };
        Some(Self {
            step,
            limit,
            origin: origin.into(),
            held: Block::default(),
            given_up: true,
            last_time: None,
            last_cells: Vec::new(),
            seen: 0,
            added: 0,
        })
    }

    /// Takes the next rows; returns those whose values are settled.
    pub(crate) fn push(&mut self, block: &Block) -> Result<Block> {
        let width = block.columns.len();
        if self.held.columns.len() != width {
            self.held = Block::with_width(width, 0);
        }
        let mut out = Block::with_width(width, block.len());
        let missing_row = vec![f64::NAN; width];
        for row in 0..block.len() {
            let time = block.timestamps[row];
            self.seen += 1;
            if let Some(last) = self.last_time.replace(time) {
                let missing = self.missing_between(last, time)?;
                for i in 1..=missing as i64 {
                    self.invalid_row(last + i * self.step, &missing_row, &mut out);
                }
            }
            let cells: Vec<f64> = block.columns.iter().map(|c| c[row]).collect();
            if block.valid[row] {
                self.settle(&mut out);
                push_row(&mut out, time, &cells, true);
                self.last_cells = cells;
                self.given_up = false;
            } else {
                self.invalid_row(time, &cells, &mut out);
            }
        }
        Ok(out)
    }

    /// The rows held back to the end.
    pub(crate) fn finish(&mut self) -> Block {
        let mut out = Block::with_width(self.held.columns.len(), self.held.len());
        self.settle(&mut out);
        out
    }

    /// Rows to add between two timestamps.
    fn missing_between(&mut self, last: i64, time: i64) -> Result<usize> {
        let distance = time.abs_diff(last);
        let step = self.step.unsigned_abs();
        let missing = usize::try_from((distance / step).saturating_sub(1)).unwrap_or(usize::MAX);
        if !distance.is_multiple_of(step) || missing > self.limit {
            return Ok(0);
        }
        self.added = self.added.saturating_add(missing);
        if self.added > ALWAYS_ALLOWED.max(self.seen.saturating_mul(GROWTH)) {
            return Err(Error::Source {
                path: self.origin.clone(),
                reason: format!(
                    "the gap from {} to {} would take {missing} masked rows; use the policy `split` or `fill`",
                    crate::format_time(last),
                    crate::format_time(time)
                ),
            });
        }
        Ok(missing)
    }

    /// Takes an invalid row: fills it at once, holds it back, or lets it go as it is.
    fn invalid_row(&mut self, time: i64, cells: &[f64], out: &mut Block) {
        if self.given_up {
            push_row(out, time, cells, false);
        } else if self.limit == usize::MAX {
            self.fill_row(time, cells, out);
        } else {
            push_row(&mut self.held, time, cells, false);
            if self.held.len() > self.limit {
                self.given_up = true;
                out.extend(&self.held, 0..self.held.len());
                self.held = Block::with_width(self.held.columns.len(), 0);
            }
        }
    }

    /// Fills what has been held back.
    fn settle(&mut self, out: &mut Block) {
        let held = std::mem::take(&mut self.held);
        for (row, &time) in held.timestamps.iter().enumerate() {
            let cells: Vec<f64> = held.columns.iter().map(|c| c[row]).collect();
            self.fill_row(time, &cells, out);
        }
        self.held = Block::with_width(held.columns.len(), 0);
    }

    fn fill_row(&mut self, time: i64, cells: &[f64], out: &mut Block) {
        for (last, &cell) in self.last_cells.iter_mut().zip(cells) {
            if cell.is_finite() {
                *last = cell;
            }
        }
        push_row(out, time, &self.last_cells, false);
    }
}

fn push_row(out: &mut Block, time: i64, cells: &[f64], valid: bool) {
    out.timestamps.push(time);
    out.valid.push(valid);
    for (column, &cell) in out.columns.iter_mut().zip(cells) {
        column.push(cell);
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
        assert_eq!(filled.columns[0][5], 6.0);
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
            series(&[0, 1 << 36], &[1.0, 2.0]),
            &GapPolicy::Mask { min_valid: 0.5 },
        )
        .unwrap_err()
        .to_string();
        assert!(message.contains("masked rows"), "{message}");
    }

    #[test]
    fn blocks_of_any_size_are_filled_alike() {
        let nan = f64::NAN;
        let input = series(
            &[0, 1, 4, 5, 6, 9, 20, 21, 24],
            &[1.0, nan, 3.0, nan, nan, 6.0, nan, 8.0, 9.0],
        );
        for policy in [
            GapPolicy::Fill { limit: 3 },
            GapPolicy::Mask { min_valid: 0.0 },
        ] {
            let whole = fill_gaps(input.clone(), &policy).unwrap();
            let mut filler = Filler::new(&policy, 60, "x").unwrap();
            let mut out = Block::with_width(1, 0);
            for row in 0..input.len() {
                let part = input.slice(row..row + 1);
                let block = Block {
                    timestamps: part.timestamps,
                    columns: part.columns,
                    valid: part.valid,
                };
                let filled = filler.push(&block).unwrap();
                out.extend(&filled, 0..filled.len());
            }
            let rest = filler.finish();
            out.extend(&rest, 0..rest.len());
            assert_eq!(out.timestamps, whole.timestamps);
            assert_eq!(out.valid, whole.valid);
            let same = out.columns[0]
                .iter()
                .zip(&whole.columns[0])
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{policy:?}");
        }
    }

    #[test]
    fn a_step_off_the_clock_is_a_gap() {
        let mut input = series(&[0, 2], &[1.0, 2.0]);
        input.timestamps[1] = 90;
        let filled = fill_gaps(input, &GapPolicy::Mask { min_valid: 0.0 }).unwrap();
        assert_eq!(filled.timestamps, [0, 90]);
    }
}
