//! From files to rows.

mod block;
mod bytes;
mod csv;
mod merge;
mod number;
mod parquet;
mod sorted;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use self::block::{Block, BlockSource};
use crate::features::{Feature, FeatureSteps};
use crate::schema::{ColumnSpec, Schema};
use crate::series::RawSeries;
use crate::spill::Scratch;
use crate::time::format_time;
use crate::{Error, Result};

/// What to do with timestamps that do not rise within one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum OrderPolicy {
    /// An error that names the row.
    #[default]
    Refuse,
    /// Sort by time; of rows with the same timestamp the last one in the file stays. Within
    /// [`prepare`](crate::prepare) what does not fit into half of its memory waits in a file, run by sorted run,
    /// however many sources there are; each of them is read once.
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
    /// Columns to compute from them, each from its own row and earlier ones alone.
    pub features: Vec<Feature>,
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

    /// Adds computed columns.
    pub fn with_features(mut self, features: Vec<Feature>) -> Self {
        self.features = features;
        self
    }

    /// The columns of the series: those that are read, then those that are computed.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] when a feature needs a column that is not there, or two columns have one name.
    pub fn output_schema(&self) -> Result<Schema> {
        let mut schema = self.schema.clone();
        for feature in &self.features {
            feature.validate(&self.schema)?;
            schema.columns.extend(feature.columns());
        }
        schema.validate()?;
        Ok(schema)
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

    /// Checks the schema, the features and the range of time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        self.schema.validate()?;
        self.output_schema()?;
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

/// Reads a source into memory: one file, or all files that a pattern (`data/*.zip`) matches, as one series.
///
/// CSV, plain, gzip or zip (one table in it), and Parquet are told apart by their first bytes. The
/// header names the columns, in any order and any case; columns that the schema does not ask
/// for are passed over. Cells are separated by commas; they may be quoted, but not go on in the next line.
/// Timestamps are unix times in seconds to nanoseconds, whole or with a
/// fraction (rounded down to whole seconds), or dates. Empty cells, `NaN` and the like make their row invalid. A
/// file without a header is taken for Binance klines when it has their twelve columns.
///
/// A Parquet file with a column `valid` of booleans, as shards have it, says itself which rows are observations: the
/// others are taken as missing.
///
/// Several files are put in order of time. Where they overlap, of rows with the same timestamp a valid one goes
/// before an invalid one, and after that the file that comes later wins: later in the list as it was given, and
/// among the files of a pattern in the order of their names.
///
/// # Errors
///
/// No such file, an empty one, a header alone, missing columns, a word where a number belongs, a
/// quoted cell that goes on in the next line, a price of zero or less, timestamps that do not rise (see [`OrderPolicy`]): each names the file and,
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
    read_many(&[path], options)
}

/// [`read_series`] for several files or patterns at once.
///
/// # Errors
///
/// Those of [`read_series`].
pub fn read_many(paths: &[impl AsRef<Path>], options: &ReadOptions) -> Result<RawSeries> {
    let mut stream = Stream::open(paths, options, &Scratch::unlimited())?;
    let mut series = RawSeries::empty(stream.schema.clone(), stream.origin.clone());
    while let Some(block) = stream.next_block()? {
        append(&mut series, block);
    }
    Ok(series)
}

/// All rows of some sources, features added, block by block.
pub(crate) struct Stream<'a> {
    source: Box<dyn BlockSource + 'a>,
    steps: FeatureSteps,
    options: &'a ReadOptions,
    pub(crate) schema: Schema,
    /// The sources in words.
    pub(crate) origin: String,
    /// The files.
    pub(crate) files: Vec<PathBuf>,
    /// Bytes of all files.
    pub(crate) bytes: u64,
    any: bool,
}

impl<'a> Stream<'a> {
    pub(crate) fn open(
        paths: &[impl AsRef<Path>],
        options: &'a ReadOptions,
        scratch: &Scratch,
    ) -> Result<Self> {
        options.validate()?;
        let mut files = Vec::new();
        for path in paths {
            files.extend(expand(path.as_ref())?);
        }
        let origin = match &files[..] {
            [one] => one.display().to_string(),
            [first, .., last] => format!("{} to {}", first.display(), last.display()),
            [] => {
                return Err(Error::InvalidOption {
                    option: "input",
                    reason: "no file is named; expected at least one".into(),
                });
            }
        };
        let bytes = files
            .iter()
            .filter_map(|f| f.metadata().ok())
            .map(|m| m.len())
            .sum();
        let source: Box<dyn BlockSource + 'a> = match (options.order, &files[..]) {
            (OrderPolicy::Sort, _) => {
                Box::new(sorted::Sorted::open(files.clone(), options, scratch)?)
            }
            (OrderPolicy::Refuse, [one]) => open_file(one, options)?,
            (OrderPolicy::Refuse, _) => Box::new(merge::Merge::open(files.clone(), options)?),
        };
        Ok(Self {
            source,
            steps: FeatureSteps::new(&options.features, &options.schema),
            options,
            schema: options.output_schema()?,
            origin,
            files,
            bytes,
            any: false,
        })
    }

    /// Bytes of all files read so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.source.bytes_read()
    }

    /// The next rows; `None` at the end, an error when there were none at all.
    pub(crate) fn next_block(&mut self) -> Result<Option<Block>> {
        let Some(mut block) = self.source.next_block()? else {
            if self.any {
                return Ok(None);
            }
            return Err(Error::NoRows {
                path: self.origin.clone(),
                range: self.options.range_in_words(),
            });
        };
        self.any = true;
        self.steps.apply(&mut block);
        Ok(Some(block))
    }
}

/// Opens one file, in whatever format it is; its rows come as they stand in it.
fn open_file<'a>(path: &Path, options: &'a ReadOptions) -> Result<Box<dyn BlockSource + 'a>> {
    Ok(match bytes::detect(path)? {
        bytes::Format::Parquet => Box::new(parquet::ParquetReader::open(path, options)?),
        format => Box::new(csv::CsvReader::open(path, format, options)?),
    })
}

/// The files that a path or pattern stands for, in order of name.
fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let text = path.to_string_lossy();
    if path.exists() || !text.contains(['*', '?', '[']) {
        return Ok(vec![path.into()]);
    }
    let wrong = |reason: String| Error::Source {
        path: text.to_string(),
        reason,
    };
    let found = glob::glob(&text).map_err(|e| wrong(format!("this pattern cannot work: {e}")))?;
    let mut files = Vec::new();
    for entry in found {
        let file = entry.map_err(|e| wrong(e.to_string()))?;
        if file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(wrong("no file matches this pattern".into()));
    }
    files.sort();
    Ok(files)
}

/// The column named by the spec; its own name goes before its aliases.
fn find_column(names: &[String], spec: &ColumnSpec) -> Option<usize> {
    names
        .iter()
        .position(|n| n.eq_ignore_ascii_case(&spec.name))
        .or_else(|| names.iter().position(|n| spec.is_named(n)))
}

fn append(series: &mut RawSeries, block: Block) {
    series.timestamps.extend_from_slice(&block.timestamps);
    series.valid.extend_from_slice(&block.valid);
    for (all, new) in series.columns.iter_mut().zip(&block.columns) {
        all.extend_from_slice(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_ends_before_it_starts_is_refused() {
        let options = ReadOptions::default().with_from(60).with_to(60);
        assert!(options.validate().unwrap_err().to_string().contains("from"));
    }
}
