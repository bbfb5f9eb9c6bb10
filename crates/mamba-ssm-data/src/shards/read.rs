//! Parquet files back to rows, checked before they are trusted.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, BooleanArray, Float32Array, TimestampMillisecondArray};
use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{MANIFEST, Manifest, Shard};
use super::write::arrow_schema;
use crate::transform::Normalised;
use crate::{Error, Result};

/// Reads the shards of one set.
#[derive(Debug, Clone)]
pub(crate) struct ShardReader {
    root: PathBuf,
    pub(crate) manifest: Arc<Manifest>,
}

impl ShardReader {
    /// Reads the manifest and checks that every shard is there with its full size.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let path = root.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(match root.exists() {
                    true => Error::NotAShardSet { path: root.into() },
                    false => Error::NotFound { path: root.into() },
                });
            }
            Err(e) => return Err(Error::io(&path, "read it", e)),
        };
        let manifest = Arc::new(Manifest::parse(&path, &bytes)?);
        for shard in &manifest.shards {
            let path = root.join(&shard.file);
            let found = fs::metadata(&path).map(|m| m.len());
            match found {
                Ok(found) => check_size(&path, shard, found)?,
                Err(_) => return Err(damaged(&path, "it is missing".into())),
            }
        }
        Ok(Self {
            root: root.into(),
            manifest,
        })
    }

    /// Reads all rows. Memory: the rows and one compressed shard.
    pub(crate) fn read_all(&self) -> Result<Normalised> {
        let width = self.manifest.transform.width();
        let rows = self.manifest.rows as usize;
        let mut out = Normalised {
            timestamps: vec![0; rows],
            values: vec![0.0; rows * width],
            valid: vec![false; rows],
            width,
        };
        let mut parts = Parts {
            timestamps: &mut out.timestamps,
            values: &mut out.values,
            valid: &mut out.valid,
        };
        for shard in &self.manifest.shards {
            let (part, rest) = parts.split_at(shard.rows as usize, width);
            self.read_shard(shard, part, width)?;
            parts = rest;
        }
        Ok(out)
    }

    /// Reads and checks one shard.
    fn read_shard(&self, shard: &Shard, out: Parts<'_>, width: usize) -> Result<()> {
        let path = self.root.join(&shard.file);
        let bytes = fs::read(&path).map_err(|e| Error::io(&path, "read it", e))?;
        check_size(&path, shard, bytes.len() as u64)?;
        let found = format!("{:016x}", xxh3_64(&bytes));
        if found != shard.xxh3 {
            let reason = format!("its checksum is {found}; expected {}", shard.xxh3);
            return Err(damaged(&path, reason));
        }
        self.decode(&path, Bytes::from(bytes), shard.rows as usize, out, width)
    }

    /// Decodes all row groups of a shard on all threads.
    fn decode(
        &self,
        path: &Path,
        bytes: Bytes,
        rows: usize,
        out: Parts<'_>,
        width: usize,
    ) -> Result<()> {
        let wrong = |e: &dyn std::fmt::Display| damaged(path, e.to_string());
        let metadata =
            ArrowReaderMetadata::load(&bytes, Default::default()).map_err(|e| wrong(&e))?;
        let expected = arrow_schema(&self.manifest.transform.names());
        let same = metadata.schema().fields().len() == expected.fields().len()
            && metadata
                .schema()
                .fields()
                .iter()
                .zip(expected.fields())
                .all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
        if !same {
            return Err(wrong(&"its columns are not those of the manifest"));
        }
        let sizes: Vec<usize> = metadata
            .metadata()
            .row_groups()
            .iter()
            .map(|g| g.num_rows().max(0) as usize)
            .collect();
        let total = sizes.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
        if total != Some(rows) {
            return Err(wrong(&format!("it holds {total:?} rows; expected {rows}")));
        }
        let mut jobs = Vec::new();
        let mut rest = out;
        for (group, &size) in sizes.iter().enumerate() {
            let (part, later) = rest.split_at(size, width);
            jobs.push((group, size, part));
            rest = later;
        }
        jobs.into_par_iter().try_for_each(|(group, size, part)| {
            let reader =
                ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), metadata.clone())
                    .with_row_groups(vec![group])
                    .with_batch_size(size.max(1))
                    .build()
                    .map_err(|e| wrong(&e))?;
            let mut part = part;
            for batch in reader {
                let batch = batch.map_err(|e| wrong(&e))?;
                let (now, later) = part.split_at(batch.num_rows(), width);
                copy_rows(&batch, now)
                    .ok_or_else(|| wrong(&"a column has another type than expected"))?;
                part = later;
            }
            match part.timestamps.len() {
                0 => Ok(()),
                missing => Err(wrong(&format!("row group {group} is {missing} rows short"))),
            }
        })
    }
}

/// Room for some rows.
struct Parts<'a> {
    timestamps: &'a mut [i64],
    values: &'a mut [f32],
    valid: &'a mut [bool],
}

impl<'a> Parts<'a> {
    /// The first `rows` rows, and the others.
    fn split_at(self, rows: usize, width: usize) -> (Parts<'a>, Parts<'a>) {
        let rows = rows.min(self.timestamps.len());
        let (t0, t1) = self.timestamps.split_at_mut(rows);
        let (v0, v1) = self.values.split_at_mut(rows * width);
        let (m0, m1) = self.valid.split_at_mut(rows);
        let part = |timestamps, values, valid| Parts {
            timestamps,
            values,
            valid,
        };
        (part(t0, v0, m0), part(t1, v1, m1))
    }
}

/// Copies a record batch, columns to rows; `None` when a column has another type or size.
fn copy_rows(batch: &RecordBatch, out: Parts<'_>) -> Option<()> {
    let width = batch.num_columns().checked_sub(2)?;
    let time: &TimestampMillisecondArray = batch.column(0).as_any().downcast_ref()?;
    let valid: &BooleanArray = batch.column(width + 1).as_any().downcast_ref()?;
    if out.timestamps.len() != batch.num_rows()
        || batch.columns().iter().any(|c| c.null_count() > 0)
    {
        return None;
    }
    for (to, from) in out.timestamps.iter_mut().zip(time.values()) {
        *to = from.div_euclid(1000);
    }
    for (to, from) in out.valid.iter_mut().zip(valid.values().iter()) {
        *to = from;
    }
    for feature in 0..width {
        let column: &Float32Array = batch.column(feature + 1).as_any().downcast_ref()?;
        for (row, &value) in out.values.chunks_exact_mut(width).zip(column.values()) {
            row[feature] = value;
        }
    }
    Some(())
}

fn check_size(path: &Path, shard: &Shard, found: u64) -> Result<()> {
    if found == shard.bytes {
        return Ok(());
    }
    let verb = if found < shard.bytes {
        "cut short"
    } else {
        "longer than written"
    };
    Err(damaged(
        path,
        format!("it is {verb}: {found} bytes; expected {}", shard.bytes),
    ))
}

fn damaged(path: &Path, reason: String) -> Error {
    Error::Shard {
        path: path.into(),
        reason,
    }
}
