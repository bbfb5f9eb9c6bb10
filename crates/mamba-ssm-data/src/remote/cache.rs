//! Copies of shards on this machine, within a number of bytes.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tempfile::NamedTempFile;
use xxhash_rust::xxh3::Xxh3;

use super::transfer::Sink;
use crate::shards::{Shard, check_content};
use crate::{Error, Result};

/// How the names of copies end.
const COPY: &str = ".shard";
/// How the names of copies that are being written end.
const PART: &str = ".part";
/// A part that has not been written to for so long belongs to nobody.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// A folder of copies, named by checksum and size, so that equal shards of several sets are one.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    bytes: u64,
    /// Bytes that transfers of this process will need.
    reserved: Mutex<u64>,
}

/// Room for a copy that is being written; given back when dropped.
pub(super) struct Room<'a> {
    cache: &'a Cache,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        *self.cache.reserved() -= self.bytes;
    }
}

impl Cache {
    pub(super) fn new(folder: &Path, bytes: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create it", e))?;
        let cache = Self {
            folder: folder.into(),
            bytes,
            reserved: Mutex::default(),
        };
        for (path, _, changed) in cache.files(PART) {
            if changed.elapsed().is_ok_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(path);
            }
        }
        Ok(cache)
    }

    /// Copies of shards of this size that are kept at once.
    pub(super) fn holds(&self, shard_bytes: u64) -> usize {
        usize::try_from(self.bytes / shard_bytes.max(1)).unwrap_or(usize::MAX)
    }

    /// A whole and unaltered copy, if there is one; a damaged one is removed.
    pub(super) fn find(&self, shard: &Shard) -> Result<Option<File>> {
        let path = self.path(shard);
        let Ok(mut file) = File::open(&path) else {
            return Ok(None);
        };
        if check_content(&path, shard, &mut file).is_err() {
            fs::remove_file(&path).map_err(|e| Error::io(&path, "remove a damaged copy", e))?;
            return Ok(None);
        }
        // The time of last use, by which copies are let go. Without it they go too early, no more.
        let _ = File::options()
            .append(true)
            .open(&path)
            .and_then(|f| f.set_modified(SystemTime::now()));
        Ok(Some(file))
    }

    /// Lets copies go until one more fits.
    pub(super) fn make_room(&self, shard: &Shard) -> Result<Room<'_>> {
        if shard.bytes > self.bytes {
            return Err(Error::InvalidOption {
                option: "cache_bytes",
                reason: format!(
                    "{} is too few: the shard `{}` alone has {} bytes",
                    self.bytes, shard.file, shard.bytes
                ),
            });
        }
        let mut reserved = self.reserved();
        let mut copies = self.files(COPY);
        copies.sort_by_key(|(_, _, used)| std::cmp::Reverse(*used));
        let mut kept: u64 = copies.iter().map(|(_, bytes, _)| bytes).sum();
        let room = self.bytes.saturating_sub(*reserved + shard.bytes);
        while kept > room {
            let Some((path, bytes, _)) = copies.pop() else {
                break;
            };
            let _ = fs::remove_file(path);
            kept -= bytes;
        }
        *reserved += shard.bytes;
        Ok(Room {
            cache: self,
            bytes: shard.bytes,
        })
    }

    /// An empty file for a copy.
    pub(super) fn part(&self) -> Result<Part> {
        tempfile::Builder::new()
            .suffix(PART)
            .tempfile_in(&self.folder)
            .map(|file| Part {
                file,
                hash: Xxh3::new(),
            })
            .map_err(|e| Error::io(&self.folder, "write a copy of a shard", e))
    }

    /// Makes a part a copy.
    pub(super) fn keep(&self, part: Part, shard: &Shard) -> Result<File> {
        let path = self.path(shard);
        let failed = |e| Error::io(&path, "write a copy of a shard", e);
        part.file.as_file().sync_all().map_err(failed)?;
        part.file.persist(&path).map_err(|e| failed(e.error))?;
        File::open(&path).map_err(failed)
    }

    fn path(&self, shard: &Shard) -> PathBuf {
        // The checksum comes from a manifest: nothing but its hexadecimal digits makes a name.
        let digits: String = shard
            .xxh3
            .chars()
            .filter(char::is_ascii_hexdigit)
            .take(16)
            .collect();
        self.folder.join(format!("{digits}-{}{COPY}", shard.bytes))
    }

    /// Path, size and time of last use of the files with this ending.
    fn files(&self, ending: &str) -> Vec<(PathBuf, u64, SystemTime)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter(|e| e.file_name().to_string_lossy().ends_with(ending))
            .filter_map(|e| {
                let meta = e.metadata().ok()?;
                Some((e.path(), meta.len(), meta.modified().ok()?))
            })
            .collect()
    }

    fn reserved(&self) -> MutexGuard<'_, u64> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy that is being written.
pub(super) struct Part {
    file: NamedTempFile,
    hash: Xxh3,
}

impl Part {
    pub(super) fn checksum(&self) -> String {
        format!("{:016x}", self.hash.digest())
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(self.file.path(), "write a copy of a shard", error)
    }
}

impl Sink for Part {
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file
            .as_file_mut()
            .write_all(bytes)
            .map_err(|e| self.failed(e))
    }

    fn clear(&mut self) -> Result<()> {
        self.hash = Xxh3::new();
        let file = self.file.as_file_mut();
        file.set_len(0)
            .and_then(|()| file.rewind())
            .map_err(|e| self.failed(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(content: &[u8]) -> Shard {
        Shard {
            file: "set-000001/part-00000.parquet".into(),
            first_row: 0,
            rows: 1,
            bytes: content.len() as u64,
            xxh3: format!("{:016x}", xxhash_rust::xxh3::xxh3_64(content)),
        }
    }

    fn store(cache: &Cache, content: &[u8]) {
        let shard = shard(content);
        let _room = cache.make_room(&shard).unwrap();
        let mut part = cache.part().unwrap();
        part.take(content).unwrap();
        assert_eq!(part.checksum(), shard.xxh3);
        cache.keep(part, &shard).unwrap();
        // Times of files may be no finer than this.
        std::thread::sleep(Duration::from_millis(20));
    }

    #[test]
    fn copies_used_longest_ago_go_first_and_the_bound_holds() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), 250).unwrap();
        fs::write(dir.path().join("mine.txt"), "not a copy").unwrap();
        let contents: Vec<Vec<u8>> = (0..3u8).map(|i| vec![i; 100]).collect();
        store(&cache, &contents[0]);
        store(&cache, &contents[1]);
        assert!(cache.find(&shard(&contents[0])).unwrap().is_some());
        store(&cache, &contents[2]);
        let here = |i: usize| cache.find(&shard(&contents[i])).unwrap().is_some();
        assert_eq!([here(0), here(1), here(2)], [true, false, true]);
        assert!(dir.path().join("mine.txt").exists());

        let message = cache
            .make_room(&shard(&[9; 251]))
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains("cache_bytes") && message.contains("251"),
            "{message}"
        );
    }

    #[test]
    fn a_damaged_copy_is_no_copy() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), 1000).unwrap();
        store(&cache, &[7; 100]);
        let path = cache.path(&shard(&[7; 100]));
        fs::write(&path, [8; 100]).unwrap();
        assert!(cache.find(&shard(&[7; 100])).unwrap().is_none());
        assert!(!path.exists());
    }

    #[test]
    fn a_part_that_is_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), 1000).unwrap();
        let mut part = cache.part().unwrap();
        part.take(b"abc").unwrap();
        part.clear().unwrap();
        part.take(b"xyz").unwrap();
        assert_eq!(part.checksum(), shard(b"xyz").xxh3);
        drop(part);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
