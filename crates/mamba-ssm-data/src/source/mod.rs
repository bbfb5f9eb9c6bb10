//! From files to rows.

mod bytes;
mod csv;
mod number;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::schema::Schema;
use crate::series::RawSeries;
use crate::time::format_time;
use crate::{Error, Result};

/// What to do with timestamps that do not rise within one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum OrderPolicy {
    /// An error that names the row.
    #[default]
    Refuse,
    /// Sort by time; of rows with the same timestamp the last one in the file stays.
    Sort,
}

/// How to read a source.
///
/// ```
/// use mamba_ssm_data::{ReadOptions, parse_time};
/// let options = ReadOptions::default()
///     .with_from(parse_time("2023-01-01")?)
///     .with_to(parse_time("2024-01-01")?);
/// assert_eq!(options.schema.columns.len(), 5);
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct ReadOptions {
    /// The columns to read.
    pub schema: Schema,
    /// First timestamp to keep, unix seconds.
    pub from: Option<i64>,
    /// First timestamp not to keep, unix seconds.
    pub to: Option<i64>,
    /// What to do with timestamps that do not rise within one file.
    pub order: OrderPolicy,
}

impl ReadOptions {
    /// Reads these columns.
    pub fn with_schema(mut self, schema: Schema) -> Self {
        self.schema = schema;
        self
    }

    /// Keeps rows from this time on (unix seconds).
    pub fn with_from(mut self, from: i64) -> Self {
        self.from = Some(from);
        self
    }

    /// Keeps rows before this time (unix seconds).
    pub fn with_to(mut self, to: i64) -> Self {
        self.to = Some(to);
        self
    }

    /// Sets the order policy.
    pub fn with_order(mut self, order: OrderPolicy) -> Self {
        self.order = order;
        self
    }

    /// Checks the schema and the range of time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        self.schema.validate()?;
        match (self.from, self.to) {
            (Some(from), Some(to)) if from >= to => Err(Error::InvalidOption {
                option: "from",
                reason: format!(
                    "{} is not before `to`, {}",
                    format_time(from),
                    format_time(to)
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Whether a timestamp is asked for.
    fn keeps(&self, time: i64) -> bool {
        self.from.is_none_or(|from| time >= from) && self.to.is_none_or(|to| time < to)
    }

    /// The range of time in words, for a message.
    fn range_in_words(&self) -> String {
        match (self.from, self.to) {
            (None, None) => String::new(),
            (Some(from), None) => format!(" from {}", format_time(from)),
            (None, Some(to)) => format!(" before {}", format_time(to)),
            (Some(from), Some(to)) => {
                format!(" from {} to {}", format_time(from), format_time(to))
            }
        }
    }
}

/// Some rows of a source, in the order of the file.
#[derive(Debug, Default, Clone)]
pub(crate) struct Block {
    pub(crate) timestamps: Vec<i64>,
    pub(crate) columns: Vec<Vec<f64>>,
    pub(crate) valid: Vec<bool>,
}

impl Block {
    pub(crate) fn with_width(width: usize, rows: usize) -> Self {
        Self {
            timestamps: Vec::with_capacity(rows),
            columns: (0..width).map(|_| Vec::with_capacity(rows)).collect(),
            valid: Vec::with_capacity(rows),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.timestamps.len()
    }
}

/// Reads a CSV file, plain or gzip, into memory.
///
/// The header names the columns, in any order and any case; columns that the schema does not ask
/// for are passed over. Timestamps are unix times in seconds to nanoseconds, whole or with a
/// fraction, or dates. Empty cells, `NaN` and the like make their row invalid. A file without a
/// header is taken for Binance klines when it has their twelve columns.
///
/// # Errors
///
/// No such file, an empty one, a header alone, missing columns, a word where a number belongs, a
/// price of zero or less, timestamps that do not rise (see [`OrderPolicy`]): each names the file and,
/// where it can, row and column.
///
/// ```
/// use mamba_ssm_data::{ReadOptions, read_series};
/// # let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("candles.csv");
/// std::fs::write(&path, "Timestamp,Open,High,Low,Close,Volume\n60.0,1,2,0.5,1.5,0\n120.0,1.5,2,1,2,3\n")?;
/// let series = read_series(&path, &ReadOptions::default())?;
/// assert_eq!(series.timestamps, [60, 120]);
/// assert_eq!(series.columns[3], [1.5, 2.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_series(path: impl AsRef<Path>, options: &ReadOptions) -> Result<RawSeries> {
    read_with(path.as_ref(), options, &mut |_| Ok(()))
}

/// [`read_series`] that tells how many bytes of the file have been read.
pub(crate) fn read_with(
    path: &Path,
    options: &ReadOptions,
    on_bytes: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<RawSeries> {
    options.validate()?;
    let mut reader = csv::CsvReader::open(path, options)?;
    let mut series = RawSeries::empty(options.schema.clone(), path.display().to_string());
    while let Some(block) = reader.next_block()? {
        on_bytes(reader.bytes_read())?;
        append(&mut series, block);
    }
    if options.order == OrderPolicy::Sort {
        sort_keeping_last(&mut series);
    }
    if series.is_empty() {
        return Err(Error::NoRows {
            path: series.origin,
            range: options.range_in_words(),
        });
    }
    Ok(series)
}

fn append(series: &mut RawSeries, block: Block) {
    series.timestamps.extend_from_slice(&block.timestamps);
    series.valid.extend_from_slice(&block.valid);
    for (all, new) in series.columns.iter_mut().zip(&block.columns) {
        all.extend_from_slice(new);
    }
}

/// Sorts by time; of rows with the same timestamp the last one stays.
fn sort_keeping_last(series: &mut RawSeries) {
    if series.timestamps.windows(2).all(|w| w[0] < w[1]) {
        return;
    }
    let times = &series.timestamps;
    let mut order: Vec<usize> = (0..times.len()).collect();
    order.sort_by_key(|&i| times[i]);
    let mut kept: Vec<usize> = Vec::with_capacity(order.len());
    for row in order {
        match kept.last_mut() {
            Some(last) if times[*last] == times[row] => *last = row,
            _ => kept.push(row),
        }
    }
    for column in &mut series.columns {
        *column = kept.iter().map(|&i| column[i]).collect();
    }
    series.valid = kept.iter().map(|&i| series.valid[i]).collect();
    series.timestamps = kept.iter().map(|&i| series.timestamps[i]).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorting_keeps_the_last_of_each_timestamp() {
        let mut series = RawSeries::empty(Schema::ohlcv(), "x");
        series.timestamps = vec![120, 60, 120, 180];
        series.valid = vec![true, true, false, true];
        series.columns = vec![vec![1.0, 2.0, 3.0, 4.0]; 5];
        sort_keeping_last(&mut series);
        assert_eq!(series.timestamps, [60, 120, 180]);
        assert_eq!(series.columns[4], [2.0, 3.0, 4.0]);
        assert_eq!(series.valid, [true, false, true]);
    }

    #[test]
    fn a_range_that_ends_before_it_starts_is_refused() {
        let options = ReadOptions::default().with_from(60).with_to(60);
        assert!(options.validate().unwrap_err().to_string().contains("from"));
    }
}
