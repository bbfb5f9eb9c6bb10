//! Row groups to Parquet files of about equal size, encoded on all threads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float32Array, TimestampMillisecondArray};
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, TimeUnit};
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{ArrowColumnChunk, ArrowRowGroupWriterFactory, compute_leaves};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::ColumnPath;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::Shard;
use super::{GROUP_ROWS, Staging, TIMESTAMP, VALID, row_bytes};
use crate::{Error, Result};

/// What a shard's bytes are written for, in an error.
const ACTION: &str = "write a shard";

/// The rows of one row group, column by column.
pub(crate) struct RowGroup {
    pub(crate) timestamps: Vec<i64>,
    pub(crate) columns: Vec<Vec<f32>>,
    pub(crate) valid: Vec<bool>,
}

/// Writes row groups, all of [`GROUP_ROWS`] rows but the last, into shards.
pub(crate) struct ShardWriter<'a> {
    staging: &'a Staging,
    names: Vec<String>,
    schema: Arc<ArrowSchema>,
    properties: Arc<WriterProperties>,
    groups_per_shard: usize,
    open: Option<OpenShard>,
    done: Vec<Shard>,
    next_row: u64,
}

struct OpenShard {
    path: PathBuf,
    file: String,
    writer: SerializedFileWriter<HashingFile>,
    factory: ArrowRowGroupWriterFactory,
    groups: usize,
    first_row: u64,
    rows: u64,
}

impl<'a> ShardWriter<'a> {
    /// Shards of about `shard_bytes` of rows each (before compression), described by `metadata`.
    pub(crate) fn new(
        staging: &'a Staging,
        names: Vec<String>,
        shard_bytes: usize,
        metadata: Vec<(String, String)>,
    ) -> Result<Self> {
        let group_bytes = row_bytes(names.len()) * GROUP_ROWS;
        Ok(Self {
            staging,
            schema: arrow_schema(&names),
            properties: Arc::new(properties(&names, metadata)?),
            names,
            groups_per_shard: (shard_bytes / group_bytes).max(1),
            open: None,
            done: Vec::new(),
            next_row: 0,
        })
    }

    /// Encodes row groups on all threads and appends them in order.
    pub(crate) fn write(&mut self, groups: Vec<RowGroup>) -> Result<()> {
        let mut rest = groups;
        while !rest.is_empty() {
            if self
                .open
                .as_ref()
                .is_some_and(|s| s.groups == self.groups_per_shard)
            {
                self.close_shard()?;
            }
            let mut shard = match self.open.take() {
                Some(shard) => shard,
                None => self.open_shard()?,
            };
            let room = (self.groups_per_shard - shard.groups).min(rest.len());
            let later = rest.split_off(room);
            self.next_row += shard.append(rest, &self.schema)?;
            self.open = Some(shard);
            rest = later;
        }
        Ok(())
    }

    /// Closes the last shard; returns all of them.
    pub(crate) fn finish(mut self) -> Result<Vec<Shard>> {
        self.close_shard()?;
        Ok(self.done)
    }

    fn open_shard(&self) -> Result<OpenShard> {
        let file = format!("part-{:05}.parquet", self.done.len());
        let path = self.staging.folder().join(&file);
        let out = HashingFile::create(&path)?;
        let converted = ArrowSchemaConverter::new().convert(&self.schema);
        let writer = converted
            .and_then(|s| {
                SerializedFileWriter::new(out, s.root_schema_ptr(), self.properties.clone())
            })
            .map_err(|e| parquet_error(&path, e))?;
        let factory = ArrowRowGroupWriterFactory::new(&writer, self.schema.clone());
        Ok(OpenShard {
            path,
            file: self.staging.relative(&file),
            writer,
            factory,
            groups: 0,
            first_row: self.next_row,
            rows: 0,
        })
    }

    fn close_shard(&mut self) -> Result<()> {
        debug_assert_eq!(self.schema.fields().len(), self.names.len() + 2);
        if let Some(shard) = self.open.take() {
            self.done.push(shard.close()?);
        }
        Ok(())
    }
}

impl OpenShard {
    /// Appends row groups; returns the rows written.
    fn append(&mut self, groups: Vec<RowGroup>, schema: &Arc<ArrowSchema>) -> Result<u64> {
        let first = self.groups;
        let encoded: Vec<_> = groups
            .into_par_iter()
            .enumerate()
            .map(|(i, group)| {
                let rows = group.timestamps.len() as u64;
                encode(group, schema, &self.factory, first + i).map(|columns| (rows, columns))
            })
            .collect();
        let mut written = 0;
        for outcome in encoded {
            let (rows, columns) = outcome.map_err(|e| parquet_error(&self.path, e))?;
            self.append_encoded(columns)
                .map_err(|e| parquet_error(&self.path, e))?;
            self.groups += 1;
            written += rows;
        }
        self.rows += written;
        Ok(written)
    }

    fn append_encoded(
        &mut self,
        columns: Vec<ArrowColumnChunk>,
    ) -> std::result::Result<(), ParquetError> {
        let mut group = self.writer.next_row_group()?;
        for column in columns {
            column.append_to_row_group(&mut group)?;
        }
        group.close().map(|_| ())
    }

    fn close(self) -> Result<Shard> {
        let Self {
            path, mut writer, ..
        } = self;
        writer.finish().map_err(|e| parquet_error(&path, e))?;
        let out = writer.inner_mut();
        out.sync().map_err(|e| Error::io(&path, ACTION, e))?;
        Ok(Shard {
            file: self.file,
            first_row: self.first_row,
            rows: self.rows,
            bytes: out.bytes,
            xxh3: format!("{:016x}", out.hash.digest()),
        })
    }
}

/// Encodes and compresses the columns of one row group.
fn encode(
    group: RowGroup,
    schema: &ArrowSchema,
    factory: &ArrowRowGroupWriterFactory,
    index: usize,
) -> std::result::Result<Vec<ArrowColumnChunk>, ParquetError> {
    let millis: Vec<i64> = group
        .timestamps
        .iter()
        .map(|t| t.saturating_mul(1000))
        .collect();
    let mut arrays: Vec<ArrayRef> = vec![Arc::new(
        TimestampMillisecondArray::from(millis).with_timezone("UTC"),
    )];
    for column in group.columns {
        arrays.push(Arc::new(Float32Array::from(column)));
    }
    arrays.push(Arc::new(BooleanArray::from(group.valid)));
    let writers = factory.create_column_writers(index)?;
    writers
        .into_iter()
        .zip(schema.fields())
        .zip(arrays)
        .map(|((mut writer, field), array)| {
            for leaf in compute_leaves(field, &array)? {
                writer.write(&leaf)?;
            }
            writer.close()
        })
        .collect()
}

/// `timestamp`, the features, `valid`: none of them nullable.
pub(super) fn arrow_schema(names: &[String]) -> Arc<ArrowSchema> {
    let time = DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()));
    let mut fields = vec![Field::new(TIMESTAMP, time, false)];
    fields.extend(
        names
            .iter()
            .map(|n| Field::new(n, DataType::Float32, false)),
    );
    fields.push(Field::new(VALID, DataType::Boolean, false));
    Arc::new(ArrowSchema::new(fields))
}

/// zstd; the bytes of floats split by significance, which lays their slow bytes side by side.
fn properties(names: &[String], metadata: Vec<(String, String)>) -> Result<WriterProperties> {
    let level = ZstdLevel::try_new(1).map_err(|e| Error::InvalidOption {
        option: "compression",
        reason: e.to_string(),
    })?;
    let metadata = metadata
        .into_iter()
        .map(|(k, v)| KeyValue::new(k, v))
        .collect();
    let mut builder = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_dictionary_enabled(false)
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_key_value_metadata(Some(metadata))
        .set_column_encoding(ColumnPath::from(TIMESTAMP), Encoding::DELTA_BINARY_PACKED);
    for name in names {
        let path = ColumnPath::new(vec![name.clone()]);
        builder = builder.set_column_encoding(path, Encoding::BYTE_STREAM_SPLIT);
    }
    Ok(builder.build())
}

/// Finds the I/O error inside of a Parquet error, so that a full disk is told from the rest.
fn parquet_error(path: &Path, error: ParquetError) -> Error {
    let source = match error {
        ParquetError::External(inner) => match inner.downcast::<std::io::Error>() {
            Ok(io) => *io,
            Err(other) => std::io::Error::other(other.to_string()),
        },
        other => std::io::Error::other(other.to_string()),
    };
    Error::io(path, ACTION, source)
}

/// A file that keeps count of its bytes and their checksum.
struct HashingFile {
    file: BufWriter<File>,
    hash: Xxh3,
    bytes: u64,
}

impl HashingFile {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|e| Error::io(path, ACTION, e))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 18, file),
            hash: Xxh3::new(),
            bytes: 0,
        })
    }

    fn sync(&mut self) -> std::io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}

impl Write for HashingFile {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.hash.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}
