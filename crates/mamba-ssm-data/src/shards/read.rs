//! Parquet files back to rows, checked before they are trusted.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, BooleanArray, Float32Array, TimestampMillisecondArray};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::files::Files;
use super::manifest::{MANIFEST, Manifest, Shard};
use super::write::arrow_schema;
use crate::source::quietly;
use crate::transform::Normalised;
use crate::{Error, Result};

/// Reads the shards of one set, a page (row group) at a time.
#[derive(Debug)]
pub(crate) struct ShardReader {
    files: Box<dyn Files>,
    pub(crate) manifest: Manifest,
    /// Shards that have been opened and found whole.
    open: Vec<Mutex<Option<Arc<OpenShard>>>>,
}

/// A shard that has been found whole.
#[derive(Debug)]
struct OpenShard {
    file: File,
    metadata: ArrowReaderMetadata,
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
        let open = manifest.shards.iter().map(|_| Mutex::default()).collect();
        Ok(Self {
            files,
            manifest,
            open,
        })
    }

    /// Rows of a page; the last one may have fewer.
    pub(crate) fn page_rows(&self) -> usize {
        self.manifest.group_rows as usize
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        (self.manifest.rows as usize).div_ceil(self.page_rows())
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
        let (shard, _) = self.locate(page);
        let slot = self.open[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            self.files.prefetch(&self.manifest.shards[shard]);
        }
    }

    /// Reads all rows, with their timestamps.
    pub(crate) fn read_all(&self) -> Result<Normalised> {
        let width = self.manifest.transform.width();
        // Row counts are checked against the files before room is made for them.
        (0..self.open.len())
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
        let path = self.files.place(&self.manifest.shards[index].file);
        let file = shard
            .file
            .try_clone()
            .map_err(|e| Error::io(&path, "open it", e))?;
        let metadata = shard.metadata.clone();
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

    /// Opens a shard and checks its checksum, columns and row groups; once.
    fn shard(&self, index: usize) -> Result<Arc<OpenShard>> {
        let mut slot = self.open[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = slot.as_ref() {
            return Ok(shard.clone());
        }
        let entry = &self.manifest.shards[index];
        let path = self.files.place(&entry.file);
        let mut file = self.files.open(entry)?;
        verify(&path, entry, &mut file)?;
        let shared = SharedFile::new(
            file.try_clone()
                .map_err(|e| Error::io(&path, "open it", e))?,
        );
        let metadata = quietly("footer", || {
            ArrowReaderMetadata::load(&shared, Default::default())
        })
        .map_err(|e| self.wrong(index, e.to_string()))?;
        self.check_layout(index, &metadata)?;
        let shard = Arc::new(OpenShard { file, metadata });
        *slot = Some(shard.clone());
        Ok(shard)
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

/// A file that several threads read at places of their own.
struct SharedFile {
    file: Arc<File>,
    length: u64,
}

impl SharedFile {
    fn new(file: File) -> Self {
        let length = file.metadata().map_or(0, |m| m.len());
        Self {
            file: Arc::new(file),
            length,
        }
    }
}

impl parquet::file::reader::Length for SharedFile {
    fn len(&self) -> u64 {
        self.length
    }
}

/// Reads on from a place, a little at a time: page headers are asked for without their length.
struct ReadFrom {
    file: Arc<File>,
    at: u64,
    length: u64,
}

impl Read for ReadFrom {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.length.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        read_at(&self.file, &mut buffer[..wanted], self.at)?;
        self.at += wanted as u64;
        Ok(wanted)
    }
}

impl parquet::file::reader::ChunkReader for SharedFile {
    type T = BufReader<ReadFrom>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let from = ReadFrom {
            file: self.file.clone(),
            at: start,
            length: self.length,
        };
        Ok(BufReader::with_capacity(1 << 10, from))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        if start
            .checked_add(length as u64)
            .is_none_or(|end| end > self.length)
        {
            return Err(parquet::errors::ParquetError::EOF(
                "a range lies past the end".into(),
            ));
        }
        let mut buffer = vec![0u8; length];
        read_at(&self.file, &mut buffer, start)?;
        Ok(buffer.into())
    }
}

/// Reads at a place without moving the cursor that all handles of the file share.
#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, start)
}

/// Reads at a place without moving the cursor that all handles of the file share.
#[cfg(windows)]
fn read_at(file: &File, mut buffer: &mut [u8], mut start: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, buffer, start)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[read..];
        start += read as u64;
    }
    Ok(())
}

/// Compares size and checksum with the manifest's.
fn verify(path: &Path, shard: &Shard, file: &mut File) -> Result<()> {
    let failed = |e| Error::io(path, "read it", e);
    let mut hash = Xxh3::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0u64;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    check_size(path, shard, bytes)?;
    let found = format!("{:016x}", hash.digest());
    match found == shard.xxh3 {
        true => Ok(()),
        false => Err(damaged(
            path,
            format!("its checksum is {found}; expected {}", shard.xxh3),
        )),
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

pub(super) fn check_size(path: &Path, shard: &Shard, found: u64) -> Result<()> {
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

pub(super) fn damaged(path: &Path, reason: String) -> Error {
    Error::Shard {
        path: path.into(),
        reason,
    }
}
