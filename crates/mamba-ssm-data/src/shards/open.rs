//! Shards that are open, and what makes them trusted.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::Shard;
use crate::{Error, Result};

/// The most files that are held open at once.
const MOST_OPEN: usize = 256;

/// A shard that has been found whole.
#[derive(Debug, Clone)]
pub(super) struct OpenShard {
    pub(super) file: Arc<File>,
    pub(super) metadata: ArrowReaderMetadata,
}

/// The open shards of a set: so many of them, those used longest ago are closed first.
#[derive(Debug)]
pub(super) struct Handles {
    slots: Vec<Mutex<Kept>>,
    /// Shards that are open, in order of their last use.
    used: Mutex<Vec<usize>>,
    limit: usize,
}

/// What is kept of a shard. Its layout stays known when it is closed.
#[derive(Debug, Default)]
struct Kept {
    file: Option<Arc<File>>,
    metadata: Option<ArrowReaderMetadata>,
}

/// The place of one shard; nobody else can open or close it meanwhile.
pub(super) struct Slot<'a> {
    handles: &'a Handles,
    index: usize,
    kept: MutexGuard<'a, Kept>,
}

impl Handles {
    pub(super) fn new(shards: usize, limit: usize) -> Self {
        Self {
            slots: (0..shards).map(|_| Mutex::default()).collect(),
            used: Mutex::default(),
            limit: limit.clamp(1, MOST_OPEN),
        }
    }

    pub(super) fn slot(&self, index: usize) -> Slot<'_> {
        Slot {
            handles: self,
            index,
            kept: lock(&self.slots[index]),
        }
    }

    /// Whether a shard is open, or being opened.
    pub(super) fn is_open(&self, index: usize) -> bool {
        match self.slots[index].try_lock() {
            Ok(kept) => kept.file.is_some(),
            Err(_) => true,
        }
    }

    /// Notes a use, and closes what has not been used for longest.
    fn touch(&self, index: usize) {
        let mut used = lock(&self.used);
        used.retain(|&i| i != index);
        used.push(index);
        while used.len() > self.limit {
            let oldest = used.remove(0);
            // One that somebody holds is in use after all; it is closed another time.
            if let Ok(mut kept) = self.slots[oldest].try_lock() {
                kept.file = None;
            }
        }
    }
}

impl Slot<'_> {
    /// The shard, if it is open.
    pub(super) fn get(&self) -> Option<OpenShard> {
        let file = self.kept.file.clone()?;
        let metadata = self.kept.metadata.clone()?;
        self.handles.touch(self.index);
        Some(OpenShard { file, metadata })
    }

    /// The layout of a shard that has been found whole before.
    pub(super) fn metadata(&self) -> Option<ArrowReaderMetadata> {
        self.kept.metadata.clone()
    }

    /// Notes that the shard is open.
    pub(super) fn set(&mut self, file: Arc<File>, metadata: ArrowReaderMetadata) -> OpenShard {
        self.kept.file = Some(file.clone());
        self.kept.metadata = Some(metadata.clone());
        self.handles.touch(self.index);
        OpenShard { file, metadata }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compares size and checksum with the manifest's.
pub(crate) fn check_content(path: &Path, shard: &Shard, file: &mut File) -> Result<()> {
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
