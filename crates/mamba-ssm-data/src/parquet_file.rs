//! Parquet files that may be damaged, read by several threads at once.

use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::Arc;

use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use crate::read_at::read_at;
use crate::thrift::is_endless;
use crate::{Error, Result};

/// Bytes behind the footer: its length and the mark of the format.
const TAIL: u64 = 8;

/// A file that several threads read at places of their own.
#[derive(Debug, Clone)]
pub(crate) struct SharedFile {
    pub(crate) file: Arc<File>,
    length: u64,
}

impl SharedFile {
    pub(crate) fn new(file: Arc<File>) -> Self {
        let length = file.metadata().map_or(0, |m| m.len());
        Self { file, length }
    }

    /// Reads the footer. `name` is what an error calls the file.
    pub(crate) fn metadata(&self, name: &str) -> Result<ArrowReaderMetadata> {
        quietly(name, || match self.footer() {
            Some(footer) if is_endless(&footer[..]) => Err(endless()),
            _ => ArrowReaderMetadata::load(self, Default::default()),
        })
    }

    /// The bytes of the footer, if it has a place in the file.
    fn footer(&self) -> Option<Vec<u8>> {
        let end = self.length.checked_sub(TAIL)?;
        let mut length = [0; 4];
        read_at(&self.file, &mut length, end).ok()?;
        let length = u32::from_le_bytes(length);
        let start = end.checked_sub(u64::from(length))?;
        let mut footer = vec![0; length as usize];
        read_at(&self.file, &mut footer, start).ok()?;
        Some(footer)
    }
}

impl Length for SharedFile {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for SharedFile {
    type T = BufReader<ReadFrom>;

    /// Where a page header is, asked for without its length.
    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let reader = || {
            let from = ReadFrom {
                file: self.file.clone(),
                at: start,
                length: self.length,
            };
            BufReader::with_capacity(1 << 10, from)
        };
        match is_endless(reader()) {
            true => Err(endless()),
            false => Ok(reader()),
        }
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        if start
            .checked_add(length as u64)
            .is_none_or(|end| end > self.length)
        {
            return Err(ParquetError::EOF("a range lies past the end".into()));
        }
        let mut buffer = vec![0u8; length];
        read_at(&self.file, &mut buffer, start)?;
        Ok(buffer.into())
    }
}

fn endless() -> ParquetError {
    ParquetError::General("a list in its metadata is longer than anybody can mean".into())
}

/// Reads on from a place, a little at a time.
pub(crate) struct ReadFrom {
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

/// Runs a step of the Parquet reader; what it makes of a damaged file is an error, panics too.
pub(crate) fn quietly<T, E: std::fmt::Display>(
    path: &str,
    step: impl FnOnce() -> std::result::Result<T, E>,
) -> Result<T> {
    let damaged = |reason: String| Error::Damaged {
        path: path.into(),
        format: "Parquet",
        reason,
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(step)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(damaged(e.to_string())),
        Err(_) => Err(damaged("the reader gave up on its content".into())),
    }
}
