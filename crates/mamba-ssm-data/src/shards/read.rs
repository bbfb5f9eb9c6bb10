//! Parquet files back to rows, checked before they are trusted.

use std::sync::Arc;

use arrow::array::{Array, BooleanArray, Float32Array, TimestampMillisecondArray};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use rayon::prelude::*;

use super::files::Files;
use super::manifest::{MANIFEST, Manifest};
use super::open::{Handles, OpenShard, check_content, damaged};
use super::write::arrow_schema;
use crate::parquet_file::{SharedFile, quietly};
use crate::transform::Normalised;
use crate::{Error, Result};

/// Reads the shards of one set, a page (row group) at a time.
#[derive(Debug)]
pub(crate) struct ShardReader {
    files: Box<dyn Files>,
    pub(crate) manifest: Manifest,
    /// Shards that have been opened and found whole.
    handles: Handles,
}

/// The rows of one row group.
#[derive(Debug)]
pub(crate) struct Page {
    /// `[rows, width]`.
    pub(crate) values: Vec<f32>,
    pub(crate) valid: Vec<bool>,
}

impl ShardReader {
    /// Reads the manifest and checks that every shard is there with its full size.
    pub(crate) fn open(files: Box<dyn Files>) -> Result<Self> {
        let manifest = Manifest::parse(&files.place(MANIFEST), &files.manifest()?)?;
        for shard in &manifest.shards {
            files.check(shard)?;
        }
        let largest = manifest.shards.iter().map(|s| s.bytes).max().unwrap_or(0);
        let handles = Handles::new(manifest.shards.len(), files.holds_at_once(largest));
        Ok(Self {
            files,
            manifest,
            handles,
        })
    }

    /// The place of the manifest, for messages.
    pub(crate) fn place(&self) -> String {
        self.files.place(MANIFEST).display().to_string()
    }

    /// Rows of a page; the last one may have fewer.
    pub(crate) fn page_rows(&self) -> usize {
        self.manifest.group_rows as usize
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        (self.manifest.rows as usize).div_ceil(self.page_rows())
    }

    /// The shard that a page lies in.
    pub(crate) fn shard_of(&self, page: usize) -> usize {
        self.locate(page).0
    }

    /// The shard that a page lies in, and its row group there.
    fn locate(&self, page: usize) -> (usize, usize) {
        let row = page as u64 * self.manifest.group_rows;
        let shards = &self.manifest.shards;
        let shard = shards
            .partition_point(|s| s.first_row <= row)
            .saturating_sub(1);
        let group = (row - shards[shard].first_row) / self.manifest.group_rows;
        (shard, group as usize)
    }

    /// Reads one page.
    pub(crate) fn page(&self, page: usize) -> Result<Page> {
        let (shard, group) = self.locate(page);
        let width = self.manifest.transform.width();
        let mut out = Page {
            values: Vec::new(),
            valid: Vec::new(),
        };
        self.read_group(shard, group, false, |batch| {
            let start = out.values.len();
            out.values.resize(start + batch.num_rows() * width, 0.0);
            out.valid.resize(out.valid.len() + batch.num_rows(), false);
            let valid_start = out.valid.len() - batch.num_rows();
            copy_rows(
                batch,
                width,
                &mut out.values[start..],
                &mut out.valid[valid_start..],
            )
        })?;
        let rows = self
            .page_rows()
            .min(self.manifest.rows as usize - page * self.page_rows());
        match out.valid.len() == rows {
            true => Ok(out),
            false => Err(self.wrong(shard, format!("row group {group} has not {rows} rows"))),
        }
    }

    /// Says that a page will be wanted soon.
    pub(crate) fn prefetch(&self, page: usize) {
        let shard = self.shard_of(page);
        if !self.handles.is_open(shard) {
            self.files.prefetch(&self.manifest.shards[shard]);
        }
    }

    /// Reads all rows, with their timestamps.
    pub(crate) fn read_all(&self) -> Result<Normalised> {
        let width = self.manifest.transform.width();
        // Row counts are checked against the files before room is made for them.
        (0..self.manifest.shards.len())
            .into_par_iter()
            .try_for_each(|shard| self.shard(shard).map(drop))?;
        let rows = self.manifest.rows as usize;
        let mut out = Normalised {
            timestamps: vec![0; rows],
            values: vec![0.0; rows * width],
            valid: vec![false; rows],
            width,
        };
        let page_rows = self.page_rows();
        out.timestamps
            .par_chunks_mut(page_rows)
            .zip(out.values.par_chunks_mut(page_rows * width))
            .zip(out.valid.par_chunks_mut(page_rows))
            .enumerate()
            .try_for_each(|(page, ((times, values), valid))| {
                self.fill_page(page, times, values, valid)
            })?;
        Ok(out)
    }

    fn fill_page(
        &self,
        page: usize,
        times: &mut [i64],
        values: &mut [f32],
        valid: &mut [bool],
    ) -> Result<()> {
        let (shard, group) = self.locate(page);
        let width = self.manifest.transform.width();
        let mut at = 0;
        self.read_group(shard, group, true, |batch| {
            let end = at + batch.num_rows();
            let time = batch
                .column(0)
                .as_any()
                .downcast_ref::<TimestampMillisecondArray>()?;
            for (to, from) in times.get_mut(at..end)?.iter_mut().zip(time.values()) {
                *to = from.div_euclid(1000);
            }
            copy_rows(
                batch,
                width,
                values.get_mut(at * width..end * width)?,
                valid.get_mut(at..end)?,
            )?;
            at = end;
            Some(())
        })?;
        match at == times.len() {
            true => Ok(()),
            false => Err(self.wrong(
                shard,
                format!("row group {group} has {at} rows; expected {}", times.len()),
            )),
        }
    }

    /// Gives the record batches of a row group to a function; `None` from it means they do not fit.
    fn read_group(
        &self,
        index: usize,
        group: usize,
        times: bool,
        mut take: impl FnMut(&RecordBatch) -> Option<()>,
    ) -> Result<()> {
        let shard = self.shard(index)?;
        let OpenShard { file, metadata } = shard;
        let wrong = |e: Error| self.wrong(index, e.to_string());
        let reader = quietly("row groups", || {
            let mask = match times {
                true => ProjectionMask::all(),
                false => ProjectionMask::roots(
                    metadata.parquet_schema(),
                    1..metadata.schema().fields().len(),
                ),
            };
            ParquetRecordBatchReaderBuilder::new_with_metadata(SharedFile::new(file), metadata)
                .with_row_groups(vec![group])
                .with_projection(mask)
                .with_batch_size(self.page_rows())
                .build()
        });
        let mut reader = reader.map_err(wrong)?;
        while let Some(batch) =
            quietly("row groups", || reader.next().transpose()).map_err(wrong)?
        {
            take(&batch)
                .ok_or_else(|| self.wrong(index, "its rows are not as the manifest says".into()))?;
        }
        Ok(())
    }

    /// Opens a shard; checks its checksum, columns and row groups the first time.
    fn shard(&self, index: usize) -> Result<OpenShard> {
        let mut slot = self.handles.slot(index);
        if let Some(shard) = slot.get() {
            return Ok(shard);
        }
        let entry = &self.manifest.shards[index];
        let path = self.files.place(&entry.file);
        let mut file = self.files.open(entry)?;
        let metadata = match slot.metadata() {
            Some(metadata) => metadata,
            None => {
                check_content(&path, entry, &mut file)?;
                let shared = SharedFile::new(Arc::new(file));
                let metadata = shared
                    .metadata("footer")
                    .map_err(|e| self.wrong(index, e.to_string()))?;
                self.check_layout(index, &metadata)?;
                return Ok(slot.set(shared.file, metadata));
            }
        };
        Ok(slot.set(Arc::new(file), metadata))
    }

    /// Columns and row groups must be those of the manifest.
    fn check_layout(&self, index: usize, metadata: &ArrowReaderMetadata) -> Result<()> {
        let expected = arrow_schema(&self.manifest.transform.names());
        let found = metadata.schema().fields();
        let same = found.len() == expected.fields().len()
            && found
                .iter()
                .zip(expected.fields())
                .all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
        if !same {
            return Err(self.wrong(index, "its columns are not those of the manifest".into()));
        }
        let mut left = self.manifest.shards[index].rows;
        for group in metadata.metadata().row_groups() {
            let expected = left.min(self.manifest.group_rows);
            if group.num_rows() != expected as i64 || expected == 0 {
                let reason = format!(
                    "a row group has {} rows; expected {expected}",
                    group.num_rows()
                );
                return Err(self.wrong(index, reason));
            }
            left -= expected;
        }
        match left {
            0 => Ok(()),
            missing => Err(self.wrong(index, format!("{missing} rows are missing"))),
        }
    }

    fn wrong(&self, shard: usize, reason: String) -> Error {
        damaged(&self.files.place(&self.manifest.shards[shard].file), reason)
    }
}

/// Copies features (columns to rows) and validity, the last columns of a record batch; `None`
/// when a column has another type or size.
fn copy_rows(
    batch: &RecordBatch,
    width: usize,
    values: &mut [f32],
    valid: &mut [bool],
) -> Option<()> {
    let columns = batch.columns();
    let (features, flags) = columns.split_at(columns.len().checked_sub(1)?);
    let features = &features[features.len().checked_sub(width)?..];
    let flags: &BooleanArray = flags[0].as_any().downcast_ref()?;
    if valid.len() != batch.num_rows() || columns.iter().any(|c| c.null_count() > 0) {
        return None;
    }
    for (to, from) in valid.iter_mut().zip(flags.values().iter()) {
        *to = from;
    }
    for (feature, column) in features.iter().enumerate() {
        let column: &Float32Array = column.as_any().downcast_ref()?;
        for (row, &value) in values.chunks_exact_mut(width).zip(column.values()) {
            row[feature] = value;
        }
    }
    Some(())
}
