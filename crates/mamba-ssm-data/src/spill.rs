//! Blocks of rows that wait in a file without a name.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::read_at::read_at;
use crate::source::Block;
use crate::{Error, Result};

/// Bytes of memory for rows, and the folder for those that do not fit in it.
#[derive(Debug, Clone)]
pub(crate) struct Scratch {
    pub(crate) memory: usize,
    pub(crate) beside: PathBuf,
}

impl Scratch {
    /// Everything in memory.
    pub(crate) fn unlimited() -> Self {
        Self {
            memory: usize::MAX,
            beside: std::env::temp_dir(),
        }
    }
}

/// Blocks in a file that goes with this value or with the process, whichever ends first.
#[derive(Debug)]
pub(crate) struct Spill {
    beside: PathBuf,
    width: usize,
    file: Option<File>,
    /// First byte and rows of each block.
    places: Vec<(u64, usize)>,
    bytes: u64,
}

impl Spill {
    /// No blocks yet, and no file. Blocks will have `width` columns.
    pub(crate) fn new(beside: &Path, width: usize) -> Self {
        Self {
            beside: beside.into(),
            width,
            file: None,
            places: Vec::new(),
            bytes: 0,
        }
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Adds a block at the end.
    pub(crate) fn push(&mut self, block: &Block) -> Result<()> {
        let failed = |e| Error::io(&self.beside, "write rows beside the shards", e);
        if self.file.is_none() {
            self.file = Some(tempfile::tempfile_in(&self.beside).map_err(failed)?);
        }
        let bytes = to_bytes(block);
        if let Some(file) = &mut self.file {
            file.write_all(&bytes).map_err(failed)?;
        }
        self.places.push((self.bytes, block.len()));
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Reads a block back; several threads may at once.
    ///
    /// # Panics
    ///
    /// When there is no such block.
    pub(crate) fn get(&self, index: usize) -> Result<Block> {
        let (start, rows) = self.places[index];
        let mut bytes = vec![0u8; rows * row_bytes(self.width)];
        let missing = || std::io::ErrorKind::NotFound.into();
        self.file
            .as_ref()
            .ok_or_else(missing)
            .and_then(|file| read_at(file, &mut bytes, start))
            .map_err(|e| Error::io(&self.beside, "read rows back", e))?;
        Ok(from_bytes(&bytes, self.width))
    }
}

/// Bytes of a row: time, cells, validity.
pub(crate) fn row_bytes(width: usize) -> usize {
    9 + 8 * width
}

fn to_bytes(block: &Block) -> Vec<u8> {
    let mut out = Vec::with_capacity(block.len() * row_bytes(block.columns.len()));
    out.extend(block.timestamps.iter().flat_map(|t| t.to_le_bytes()));
    for column in &block.columns {
        out.extend(column.iter().flat_map(|x| x.to_le_bytes()));
    }
    out.extend(block.valid.iter().map(|&v| u8::from(v)));
    out
}

fn from_bytes(bytes: &[u8], width: usize) -> Block {
    let rows = bytes.len() / row_bytes(width);
    let (words, flags) = bytes.split_at(rows * 8 * (width + 1));
    let (words, _) = words.as_chunks::<8>();
    let (times, cells) = words.split_at(rows);
    Block {
        timestamps: times.iter().map(|w| i64::from_le_bytes(*w)).collect(),
        columns: cells
            .chunks(rows.max(1))
            .map(|column| column.iter().map(|w| f64::from_le_bytes(*w)).collect())
            .collect(),
        valid: flags.iter().map(|&f| f != 0).collect(),
    }
}
