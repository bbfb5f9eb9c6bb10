//! Replacing files and folders so that a kill at any moment leaves the old or the new one.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::TrainError;

/// A moment at which a process may be killed; tests fail the replacement at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Filled,
    Synced,
    OldMovedAway,
    NewInPlace,
}

/// Replaces the file at `path`.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let beside = sibling(path, "new");
    let mut file = File::create(&beside).map_err(TrainError::io("write", &beside))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(TrainError::io("write", &beside))?;
    fs::rename(&beside, path).map_err(TrainError::io("replace", path))?;
    sync_parent(path)
}

/// Replaces the folder at `target` by one that `fill` writes beside it.
///
/// Folders cannot be exchanged in one move on every system, so there is an instant in which
/// `target` is missing; [`recover`] finishes what a kill in that instant left undone.
pub(crate) fn replace_folder(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
    reached: &mut dyn FnMut(Stage) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    recover(target)?;
    let (new, old) = (sibling(target, "new"), sibling(target, "old"));
    remove_folder(&new)?;
    remove_folder(&old)?;
    fs::create_dir_all(&new).map_err(TrainError::io("create", &new))?;
    fill(&new)?;
    reached(Stage::Filled)?;
    sync_folder(&new)?;
    reached(Stage::Synced)?;
    if target.exists() {
        fs::rename(target, &old).map_err(TrainError::io("move", target))?;
        reached(Stage::OldMovedAway)?;
    }
    fs::rename(&new, target).map_err(TrainError::io("move", &new))?;
    reached(Stage::NewInPlace)?;
    sync_parent(target)?;
    remove_folder(&old)
}

/// Puts a folder back whose replacement was interrupted between its two moves.
pub(crate) fn recover(target: &Path) -> Result<(), TrainError> {
    let (new, old) = (sibling(target, "new"), sibling(target, "old"));
    if target.exists() || !old.exists() {
        return Ok(());
    }
    // The old folder is moved away only once the new one is complete and on disk.
    let complete = if new.exists() { new } else { old };
    fs::rename(&complete, target).map_err(TrainError::io("move", &complete))?;
    sync_parent(target)
}

/// `folder/name` to `folder/.name.suffix`.
fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{suffix}"))
}

fn remove_folder(path: &Path) -> Result<(), TrainError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Brings every file of a folder, and the folder itself, to the disk.
fn sync_folder(folder: &Path) -> Result<(), TrainError> {
    let entries = fs::read_dir(folder).map_err(TrainError::io("read", folder))?;
    for entry in entries {
        let path = entry.map_err(TrainError::io("read", folder))?.path();
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.sync_all())
            .map_err(TrainError::io("write", &path))?;
    }
    sync_directory(folder)
}

fn sync_parent(path: &Path) -> Result<(), TrainError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// Only Unix lets a folder be opened and synced.
fn sync_directory(folder: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|file| file.sync_all())
            .map_err(TrainError::io("write", folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killed() -> TrainError {
        TrainError::damaged("", "killed here")
    }

    /// Replaces "folder" by one whose two files hold `content`, killed at `kill`, if any:
    /// 0 and 1 are after that many files, 2.. are the stages in order.
    fn replace(target: &Path, content: &str, kill: Option<usize>) -> Result<(), TrainError> {
        let moment = std::cell::Cell::new(0);
        let pass = || {
            let now = moment.get();
            moment.set(now + 1);
            if Some(now) == kill {
                Err(killed())
            } else {
                Ok(())
            }
        };
        replace_folder(
            target,
            |new| {
                fs::write(new.join("a"), content).unwrap();
                pass()?;
                fs::write(new.join("b"), content).unwrap();
                pass()
            },
            &mut |_| pass(),
        )
    }

    fn content(target: &Path) -> String {
        recover(target).unwrap();
        let a = fs::read_to_string(target.join("a")).unwrap();
        let b = fs::read_to_string(target.join("b")).unwrap();
        assert_eq!(a, b, "a mixture of old and new");
        a
    }

    #[test]
    fn a_kill_at_any_moment_leaves_the_old_or_the_new_folder() {
        // Two files, then four stages.
        for kill in 0..6 {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("last");
            replace(&target, "old", None).unwrap();
            replace(&target, "new", Some(kill)).unwrap_err();
            let expected = if kill < 4 { "old" } else { "new" };
            assert_eq!(content(&target), expected, "killed at {kill}");
            // What was left behind is no obstacle for the next one.
            replace(&target, "newer", None).unwrap();
            assert_eq!(content(&target), "newer");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_kill_while_writing_the_first_folder_leaves_none() {
        for kill in 0..4 {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("last");
            replace(&target, "new", Some(kill)).unwrap_err();
            recover(&target).unwrap();
            assert!(!target.exists(), "killed at {kill}");
        }
    }

    #[test]
    fn files_are_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        write_atomically(&path, b"one, and longer").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
