//! The manifest: what a shard set holds. Small, JSON, and the one thing that is renamed into place.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::source::ReadOptions;
use crate::transform::Transform;
use crate::windows::{Split, SplitWindows, WindowOptions};
use crate::{Error, Result};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// What the `format` key says.
const FORMAT: &str = "mamba-ssm-data";
/// Version of the layout that is written and read.
const VERSION: u32 = 1;

/// One Parquet file of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Path below the set's folder, with forward slashes.
    pub file: String,
    /// Row of the series that comes first in it.
    pub first_row: u64,
    /// Rows in it.
    pub rows: u64,
    /// Size of the file.
    pub bytes: u64,
    /// XXH3 (64 bits) of the file, in hexadecimal.
    pub xxh3: String,
}

/// What a shard set holds: columns, statistics, windows, splits, files and checksums.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `mamba-ssm-data`.
    pub format: String,
    /// Version of the layout.
    pub version: u32,
    /// Counts the sets published in this folder.
    pub generation: u64,
    /// Where the rows came from.
    pub sources: Vec<String>,
    /// Rows of the series.
    pub rows: u64,
    /// Rows that are true observations.
    pub valid_rows: u64,
    /// First and last timestamp, unix seconds.
    pub time: (i64, i64),
    /// How the sources were read: columns, computed features, range of time.
    pub read: ReadOptions,
    /// The fitted transform.
    pub transform: Transform,
    /// Rows the transform was fitted on: first, and one past the last.
    pub fitted_rows: (u64, u64),
    /// Window length, stride, gap policy and protocol.
    pub windows: WindowOptions,
    /// The windows of each split.
    pub splits: Vec<SplitWindows>,
    /// Rows of a row group (the last one of a shard may be smaller).
    pub group_rows: u64,
    /// The files.
    pub shards: Vec<Shard>,
}

impl Manifest {
    /// The fixed first keys.
    pub(crate) fn signature() -> (String, u32) {
        (FORMAT.into(), VERSION)
    }

    /// Reads a manifest from its bytes and checks that it is whole and consistent.
    ///
    /// # Errors
    ///
    /// [`Error::Manifest`] naming what is wrong.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let wrong = |reason: String| Error::Manifest {
            path: path.into(),
            reason,
        };
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head =
            serde_json::from_slice(bytes).map_err(|e| wrong(format!("not a manifest: {e}")))?;
        if head.format != FORMAT {
            return Err(wrong(format!(
                "format is `{}`; expected `{FORMAT}`",
                head.format
            )));
        }
        if head.version != VERSION {
            return Err(wrong(format!(
                "version is {}; this program reads version {VERSION}: run `prepare` again",
                head.version
            )));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        manifest.check().map_err(wrong)?;
        Ok(manifest)
    }

    /// Consistency that no reader should have to doubt again.
    fn check(&self) -> std::result::Result<(), String> {
        let schema = self.read.output_schema().map_err(|e| e.to_string())?;
        self.windows.validate().map_err(|e| e.to_string())?;
        self.transform
            .check_columns(&schema, "`transform`")
            .map_err(|e| e.to_string())?;
        let sound =
            |f: &crate::FeatureStats| f.mean.is_finite() && f.std.is_finite() && f.std > 0.0;
        if !self.transform.features.iter().all(sound) {
            return Err(
                "statistics are not finite, or a standard deviation is not above zero".into(),
            );
        }
        let mut next = 0u64;
        for shard in &self.shards {
            if shard.first_row != next || shard.rows == 0 {
                return Err(format!(
                    "shard `{}` does not follow the one before",
                    shard.file
                ));
            }
            if shard.file.starts_with('/') || shard.file.split('/').any(|part| part == "..") {
                return Err(format!("shard `{}` lies outside of the folder", shard.file));
            }
            next = next.checked_add(shard.rows).ok_or("row counts overflow")?;
        }
        if next != self.rows {
            return Err(format!("shards hold {next} rows; expected {}", self.rows));
        }
        if !(1..=1 << 24).contains(&self.group_rows) {
            return Err(format!(
                "group_rows is {}; expected 1 to {}",
                self.group_rows,
                1 << 24
            ));
        }
        let all_but_last = &self.shards[..self.shards.len().saturating_sub(1)];
        if all_but_last
            .iter()
            .any(|s| !s.rows.is_multiple_of(self.group_rows))
        {
            return Err("a shard that is not the last one does not hold whole row groups".into());
        }
        self.check_windows()
    }

    fn check_windows(&self) -> std::result::Result<(), String> {
        let (length, stride) = (self.windows.length as u64, self.windows.stride as u64);
        for split in &self.splits {
            for range in &split.starts {
                let end = range
                    .count
                    .checked_sub(1)
                    .and_then(|n| n.checked_mul(stride))
                    .and_then(|n| n.checked_add(range.first)?.checked_add(length));
                if end.is_none_or(|end| end > self.rows) {
                    return Err(format!(
                        "a window of the {} split lies outside of the rows",
                        split.split
                    ));
                }
            }
        }
        Ok(())
    }

    /// The windows of a split, if the set has it.
    pub fn split(&self, split: Split) -> Option<&SplitWindows> {
        self.splits.iter().find(|s| s.split == split)
    }

    /// The rows of a split.
    pub fn split_rows(&self, split: Split) -> Range<usize> {
        self.split(split)
            .map_or(0..0, |s| s.rows.0 as usize..s.rows.1 as usize)
    }
}
