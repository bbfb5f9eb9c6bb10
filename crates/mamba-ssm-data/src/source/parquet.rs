//! Rows from Parquet files with named columns.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, Schema as ArrowSchema, TimeUnit};
use arrow::record_batch::RecordBatch;
use arrow::util::display::array_value_to_string;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::Length;

use super::block::check_order;
use super::number::{parse_seconds, to_seconds};
use super::{Block, BlockSource, OrderPolicy, ReadOptions};
use crate::error::shorten;
use crate::parquet_file::{SharedFile, quietly};
use crate::schema::ColumnSpec;
use crate::shards::VALID;
use crate::time::is_in_calendar;
use crate::{Error, Result};

/// Rows read at once.
const BATCH: usize = 1 << 16;

/// Reads a Parquet file block by block.
pub(super) struct ParquetReader<'a> {
    name: String,
    options: &'a ReadOptions,
    reader: ParquetRecordBatchReader,
    /// Where the time and each column lie in a batch.
    time: usize,
    places: Vec<usize>,
    /// Where the column is that tells observations from filled rows, if the file has one.
    valid: Option<usize>,
    row: u64,
    last_time: Option<i64>,
    bytes: u64,
    rows: u64,
    read: Arc<AtomicU64>,
}

impl<'a> ParquetReader<'a> {
    /// Opens the file and finds its columns.
    pub(super) fn open(path: &Path, options: &'a ReadOptions) -> Result<Self> {
        let name = path.display().to_string();
        let file = SharedFile::new(Arc::new(super::bytes::open(path)?));
        let bytes = file.len();
        let metadata = file.metadata(&name)?;
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata);
        let found: Vec<String> = builder
            .schema()
            .fields()
            .iter()
            .map(|f| f.name().clone())
            .collect();
        let roots = roots_of(&name, &found, options)?;
        let valid = valid_of(builder.schema());
        let mut wanted = roots.clone();
        wanted.extend(valid);
        wanted.sort_unstable();
        wanted.dedup();
        let place = |root: &usize| wanted.binary_search(root).unwrap_or_default();
        let places = roots[1..].iter().map(place).collect();
        let time = place(&roots[0]);
        let valid = valid.as_ref().map(place);
        let rows = builder.metadata().file_metadata().num_rows().max(1) as u64;
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.iter().copied());
        let reader = quietly(&name, || {
            builder.with_projection(mask).with_batch_size(BATCH).build()
        })?;
        Ok(Self {
            name,
            options,
            reader,
            time,
            places,
            valid,
            row: 0,
            last_time: None,
            bytes,
            rows,
            read: Arc::default(),
        })
    }

    fn block(&mut self, batch: &RecordBatch) -> Result<Block> {
        let columns = &self.options.schema.columns;
        let mut block = Block::with_width(columns.len(), batch.num_rows());
        let times = self.seconds(batch.column(self.time))?;
        let mut levels = Vec::with_capacity(columns.len());
        for (spec, place) in columns.iter().zip(&self.places) {
            levels.push(self.floats(spec, batch.column(*place))?);
        }
        if self.options.order == OrderPolicy::Refuse {
            check_order(&self.name, self.row + 1, self.last_time, &times)?;
        }
        let observed = self.valid.map(|place| batch.column(place).as_boolean());
        for (i, &time) in times.iter().enumerate() {
            if !self.options.keeps(time) {
                continue;
            }
            // What was filled in is not taken for true, nor carried on: it is missing, for the policy of gaps to fill.
            let missing = observed.is_some_and(|flags| flags.is_null(i) || !flags.value(i));
            let mut valid = true;
            for ((spec, from), to) in columns.iter().zip(&levels).zip(&mut block.columns) {
                let value = if missing { f64::NAN } else { from[i] };
                if !value.is_finite() {
                    valid = false;
                } else if !spec.scale.accepts(value) {
                    return Err(Error::OutOfDomain {
                        path: self.name.clone(),
                        row: self.row + i as u64 + 1,
                        column: spec.name.clone(),
                        value,
                        expected: spec.scale.expected(),
                    });
                }
                to.push(value);
            }
            block.timestamps.push(time);
            block.valid.push(valid);
        }
        self.last_time = times.last().copied().or(self.last_time);
        self.row += times.len() as u64;
        Ok(block)
    }

    /// A column of numbers; nulls become NaN.
    fn floats(&self, spec: &ColumnSpec, array: &ArrayRef) -> Result<Vec<f64>> {
        let cast = self.numbers(spec, array, &DataType::Float64)?;
        let floats = cast.as_primitive::<Float64Type>();
        Ok(floats.iter().map(|v| v.unwrap_or(f64::NAN)).collect())
    }

    /// The column of time as unix seconds.
    fn seconds(&self, array: &ArrayRef) -> Result<Vec<i64>> {
        let found: Vec<Option<i64>> = match array.data_type() {
            DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
            | DataType::Dictionary(..) => {
                let text = self.cast_to(array, &DataType::Utf8)?;
                let text = text.as_string::<i32>().iter();
                text.map(|t| parse_seconds(t?.as_bytes())).collect()
            }
            kind => {
                let to_second = second_of(kind);
                let ticks = self.ticks(array)?;
                let ticks = ticks.as_primitive::<Int64Type>().iter();
                ticks.map(|t| t.map(to_second)).collect()
            }
        };
        let wrong = found
            .iter()
            .position(|second| !second.is_some_and(is_in_calendar));
        match wrong {
            Some(row) => Err(self.no_time(array, row)),
            None => Ok(found.into_iter().flatten().collect()),
        }
    }

    /// A column of time that is not text, as whole numbers.
    fn ticks(&self, array: &ArrayRef) -> Result<ArrayRef> {
        match array.data_type() {
            // Days are 32 bits wide, and cannot be cast at once.
            DataType::Date32 => {
                self.cast_to(&self.cast_to(array, &DataType::Int32)?, &DataType::Int64)
            }
            DataType::Date64 => self.cast_to(array, &DataType::Int64),
            _ => self.numbers(&self.options.schema.time, array, &DataType::Int64),
        }
    }

    /// The error for a cell of the column of time.
    fn no_time(&self, array: &ArrayRef, row: usize) -> Error {
        let value = match array.is_null(row) {
            true => "null".into(),
            false => array_value_to_string(array, row).unwrap_or_else(|_| "out of range".into()),
        };
        Error::NotANumber {
            path: self.name.clone(),
            row: self.row + row as u64 + 1,
            column: self.options.schema.time.name.clone(),
            value: shorten(&value),
            expected: "a time within the calendar (a unix time or a date)",
        }
    }

    fn numbers(&self, spec: &ColumnSpec, array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
        let from = array.data_type();
        let numeric = from.is_numeric() || matches!(from, DataType::Timestamp(..));
        if !numeric {
            return Err(Error::Source {
                path: self.name.clone(),
                reason: format!("column `{}` holds {from}; expected numbers", spec.name),
            });
        }
        self.cast_to(array, to)
    }

    fn cast_to(&self, array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
        cast(array, to).map_err(|e| Error::Damaged {
            path: self.name.clone(),
            format: "Parquet",
            reason: e.to_string(),
        })
    }
}

/// How a column of this type counts time.
fn second_of(kind: &DataType) -> fn(i64) -> i64 {
    match kind {
        DataType::Timestamp(TimeUnit::Second, _) => |t| t,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => |t| t.div_euclid(1_000),
        DataType::Timestamp(TimeUnit::Microsecond, _) => |t| t.div_euclid(1_000_000),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => |t| t.div_euclid(1_000_000_000),
        DataType::Date32 => |days| days * 86_400,
        _ => to_seconds,
    }
}

/// Index of the shards' own column of validity.
fn valid_of(schema: &ArrowSchema) -> Option<usize> {
    let mut fields = schema.fields().iter();
    fields.position(|f| f.name() == VALID && f.data_type() == &DataType::Boolean)
}

impl BlockSource for ParquetReader<'_> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        loop {
            let name = self.name.clone();
            let reader = &mut self.reader;
            let Some(batch) = quietly(&name, || reader.next().transpose())? else {
                return Ok(None);
            };
            let block = self.block(&batch)?;
            let share = u128::from(self.bytes) * u128::from(self.row) / u128::from(self.rows);
            self.read.store(share as u64, Ordering::Relaxed);
            if block.len() > 0 {
                return Ok(Some(block));
            }
        }
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

/// Indices of the time column and the schema's columns among the file's.
fn roots_of(path: &str, found: &[String], options: &ReadOptions) -> Result<Vec<usize>> {
    let specs: Vec<&ColumnSpec> = std::iter::once(&options.schema.time)
        .chain(&options.schema.columns)
        .collect();
    let places: Vec<Option<usize>> = specs.iter().map(|s| super::find_column(found, s)).collect();
    let missing: Vec<String> = specs
        .iter()
        .zip(&places)
        .filter(|(_, place)| place.is_none())
        .map(|(spec, _)| spec.name.clone())
        .collect();
    if missing.is_empty() {
        return Ok(places.into_iter().flatten().collect());
    }
    Err(Error::MissingColumns {
        path: path.into(),
        missing,
        found: found.to_vec(),
    })
}
