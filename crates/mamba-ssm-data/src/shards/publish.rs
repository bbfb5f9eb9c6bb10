//! A set is written into a folder of its own and becomes the set by one rename.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::manifest::{MANIFEST, Manifest};
use crate::{Error, Result};

/// Prefix of the folders that hold the shards of one generation.
const FOLDER: &str = "set-";
/// Held locked while a set is written.
const LOCK: &str = ".lock";

/// A set that is being written. Dropped without [`publish`](Self::publish), it removes what it wrote.
#[derive(Debug)]
pub(crate) struct Staging {
    root: PathBuf,
    folder: PathBuf,
    generation: u64,
    published: bool,
    /// Locked until dropped. The operating system unlocks it if the process dies.
    _lock: File,
}

impl Staging {
    /// Creates the folder of the next generation, and clears away what killed runs have left.
    pub(crate) fn create(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(|e| Error::io(root, "create it", e))?;
        let lock_path = root.join(LOCK);
        let lock = File::create(&lock_path).map_err(|e| Error::io(&lock_path, "create it", e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: root.into() }),
            Err(TryLockError::Error(e)) => return Err(Error::io(&lock_path, "lock it", e)),
        }
        let live = live_generation(root);
        remove_generations(root, |generation| Some(generation) != live);
        let generation = live.map_or(1, |g| g + 1);
        let folder = root.join(folder_name(generation));
        fs::create_dir(&folder).map_err(|e| Error::io(&folder, "create it", e))?;
        Ok(Self {
            root: root.into(),
            folder,
            generation,
            published: false,
            _lock: lock,
        })
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Where the files of the set go.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file's path as the manifest writes it.
    pub(crate) fn relative(&self, file: &str) -> String {
        format!("{}/{file}", folder_name(self.generation))
    }

    /// Makes the set the one that readers see, and removes the one before.
    pub(crate) fn publish(mut self, manifest: &Manifest) -> Result<()> {
        sync_folder(&self.folder)?;
        let target = self.root.join(MANIFEST);
        let beside = self.root.join(format!("{MANIFEST}.tmp"));
        let action = "write the manifest";
        let text = serde_json::to_vec_pretty(manifest).map_err(|e| Error::Manifest {
            path: target.clone(),
            reason: e.to_string(),
        })?;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&beside)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&beside, &target)
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&beside);
            Error::io(&target, action, e)
        })?;
        self.published = true;
        sync_folder(&self.root)?;
        let live = self.generation;
        remove_generations(&self.root, |generation| generation != live);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn folder_name(generation: u64) -> String {
    format!("{FOLDER}{generation:06}")
}

/// The generation of the manifest that is in place, if one can be read.
fn live_generation(root: &Path) -> Option<u64> {
    let bytes = fs::read(root.join(MANIFEST)).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    value.get("generation")?.as_u64()
}

/// Removes generations that nobody reads any more. A failure costs disk space alone, so it is let pass.
fn remove_generations(root: &Path, stale: impl Fn(u64) -> bool) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let generation = name
            .to_str()
            .and_then(|n| n.strip_prefix(FOLDER))
            .and_then(|n| n.parse::<u64>().ok())
            // `set-1` is somebody else's.
            .filter(|&g| name.to_str() == Some(&folder_name(g)));
        if generation.is_some_and(&stale) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Makes renames and new names in a folder survive a power cut.
fn sync_folder(folder: &Path) -> Result<()> {
    // Windows cannot open folders as files; there a rename is as durable as it gets.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(|e| Error::io(folder, "sync it", e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_writers_at_once_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Staging::create(dir.path()).unwrap();
        assert!(matches!(
            Staging::create(dir.path()),
            Err(Error::Busy { .. })
        ));
        drop(first);
        assert!(Staging::create(dir.path()).is_ok());
    }

    #[test]
    fn what_was_not_published_is_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("set-000009")).unwrap();
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        fs::create_dir(dir.path().join("set-1")).unwrap();
        let staging = Staging::create(dir.path()).unwrap();
        assert!(!dir.path().join("set-000009").exists());
        let folder = staging.folder().to_path_buf();
        fs::write(folder.join("x"), "x").unwrap();
        drop(staging);
        assert!(!folder.exists());
        assert!(dir.path().join("notes.txt").exists());
        assert!(dir.path().join("set-1").exists());
    }
}
