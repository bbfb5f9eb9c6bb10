//! Where the files of a set are.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::manifest::{MANIFEST, Manifest, Shard};
use super::open::{check_size, damaged};
use crate::{Error, Result};

/// Gives the manifest and the shards of a set, wherever they are kept.
pub(crate) trait Files: Send + Sync + std::fmt::Debug {
    /// The bytes of the manifest.
    fn manifest(&self) -> Result<Vec<u8>>;

    /// Checks what can be checked without reading: that the shard is there with its full size.
    fn check(&self, shard: &Shard) -> Result<()>;

    /// Opens a shard on this machine.
    fn open(&self, shard: &Shard) -> Result<File>;

    /// The place of a file of the set, for messages.
    fn place(&self, file: &str) -> PathBuf;

    /// Shards of this size (the largest of the set) that can be held at once.
    fn holds_at_once(&self, _largest: u64) -> usize {
        usize::MAX
    }

    /// Says that a shard will be wanted soon.
    fn prefetch(&self, _shard: &Shard) {}
}

/// A folder on this machine.
#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// Why a shard is not there: each set has a folder of its own, which goes when the next set is published.
    fn missing(&self, shard: &Shard) -> Error {
        let path = self.place(&shard.file);
        let is_of_another_set = self
            .manifest()
            .ok()
            .and_then(|bytes| Manifest::parse(&path, &bytes).ok())
            .is_some_and(|now| now.shards.iter().all(|s| s.file != shard.file));
        match is_of_another_set {
            true => Error::Replaced { path },
            false => damaged(&path, "it is missing".into()),
        }
    }
}

impl Files for Folder {
    fn manifest(&self) -> Result<Vec<u8>> {
        let path = self.0.join(MANIFEST);
        match fs::read(&path) {
            Ok(bytes) => Ok(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(match self.0.exists() {
                true => Error::NotAShardSet {
                    path: self.0.clone(),
                },
                false => Error::NotFound {
                    path: self.0.clone(),
                },
            }),
            Err(e) => Err(Error::io(&path, "read it", e)),
        }
    }

    fn check(&self, shard: &Shard) -> Result<()> {
        let path = self.place(&shard.file);
        match fs::metadata(&path) {
            Ok(meta) => check_size(&path, shard, meta.len()),
            Err(_) => Err(self.missing(shard)),
        }
    }

    fn open(&self, shard: &Shard) -> Result<File> {
        let path = self.place(&shard.file);
        File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => self.missing(shard),
            _ => Error::io(&path, "open it", e),
        })
    }

    fn place(&self, file: &str) -> PathBuf {
        self.0.join(Path::new(file))
    }
}
