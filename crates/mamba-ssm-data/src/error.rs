//! The one error type of the crate.

use std::path::{Path, PathBuf};

use crate::time::format_time;
use crate::windows::Split;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a source file and a batch.
///
/// Every variant names the place (file, row, column or option), what was found and what was
/// expected. Rows are line numbers of the file, counted from 1 with the header as line 1; for
/// Parquet sources and series built in memory they are record numbers, counted from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path leads nowhere.
    #[error("{}: no such file or folder", path.display())]
    NotFound {
        /// The path as it was given.
        path: PathBuf,
    },

    /// The operating system refused a read or a write.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// The answer of the operating system.
        source: std::io::Error,
    },

    /// There is no room left on the device that was written to.
    #[error(
        "{}: the disk is full while trying to {action}; nothing that was published before has been touched: \
         free some space, or write to another folder",
        path.display()
    )]
    DiskFull {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, as a verb phrase.
        action: &'static str,
    },

    /// The file has no bytes.
    #[error("{path}: the file is empty; expected a header line and rows of numbers")]
    EmptyFile {
        /// The source.
        path: String,
    },

    /// The source has no rows (in the asked range of time).
    #[error("{path}: no rows{range}; expected at least one row of numbers below the header")]
    NoRows {
        /// The source.
        path: String,
        /// The range of time that was asked for, in words, or nothing.
        range: String,
    },

    /// Columns that the schema asks for are not there.
    #[error(
        "{path}: missing column(s) {}; the file has {}",
        list(missing),
        list(found)
    )]
    MissingColumns {
        /// The source.
        path: String,
        /// The names that are missing.
        missing: Vec<String>,
        /// The names the file has.
        found: Vec<String>,
    },

    /// A row with too few or too many cells.
    #[error("{path}, row {row}: {found} cells where {expected} are expected")]
    WrongCellCount {
        /// The source.
        path: String,
        /// Line number.
        row: u64,
        /// Cells in the row.
        found: usize,
        /// Cells in the header.
        expected: usize,
    },

    /// A line longer than any row of numbers can be.
    #[error(
        "{path}, row {row}: the line is longer than {limit} bytes; is this a text file of rows?"
    )]
    LineTooLong {
        /// The source.
        path: String,
        /// Line number.
        row: u64,
        /// The longest line that is read, in bytes.
        limit: usize,
    },

    /// A word where a number belongs.
    #[error("{path}, row {row}, column `{column}`: `{value}` is not {expected}")]
    NotANumber {
        /// The source.
        path: String,
        /// Line number.
        row: u64,
        /// Column name.
        column: String,
        /// What stands in the cell (shortened).
        value: String,
        /// What belongs there.
        expected: &'static str,
    },

    /// A number outside of the domain of the column's transform.
    #[error("{path}, row {row}, column `{column}`: {value} is out of range: {expected}")]
    OutOfDomain {
        /// The source.
        path: String,
        /// Line number.
        row: u64,
        /// Column name.
        column: String,
        /// The number.
        value: f64,
        /// What the transform needs.
        expected: &'static str,
    },

    /// A timestamp smaller than or equal to the one before it.
    #[error(
        "{path}, row {row}: timestamp {current} ({}) {} {previous} ({}); expected rising timestamps \
         (the order policy `sort` sorts the rows and keeps the last of each timestamp)",
        format_time(*current),
        if current == previous { "repeats" } else { "comes after" },
        format_time(*previous)
    )]
    OutOfOrder {
        /// The source.
        path: String,
        /// Line number.
        row: u64,
        /// The timestamp before, unix seconds.
        previous: i64,
        /// The timestamp of this row, unix seconds.
        current: i64,
    },

    /// A compressed or binary source that cannot be read.
    #[error("{path}: cannot read it as {format}: {reason}")]
    Damaged {
        /// The source.
        path: String,
        /// The format that was expected.
        format: &'static str,
        /// What the reader said.
        reason: String,
    },

    /// Sources that do not fit together.
    #[error("{path}: {reason}")]
    Source {
        /// The source or pattern.
        path: String,
        /// What is wrong and what to do.
        reason: String,
    },

    /// Too few rows for a single window.
    #[error(
        "{path}: {rows} rows are too few: a window needs {needed} rows in one piece \
         (longest piece without a gap or an invalid row: {longest}); give more rows or a shorter length"
    )]
    TooFewRows {
        /// The source or the set.
        path: String,
        /// Rows there are.
        rows: usize,
        /// Rows of one window.
        needed: usize,
        /// The longest run of rows that a window may lie in.
        longest: usize,
    },

    /// A split that would hold no window.
    #[error(
        "{path}: the {split} split has no window: {rows} rows are left to it after the embargo, a window needs {needed} in one piece; \
         give more rows, a shorter length, or set this split's fraction to 0"
    )]
    EmptySplit {
        /// The source or the set.
        path: String,
        /// The split.
        split: Split,
        /// Rows in the split's range.
        rows: usize,
        /// Rows of one window.
        needed: usize,
    },

    /// Two descriptions of the columns that disagree.
    #[error(
        "{path}: features do not match: expected {}, found {}",
        list(expected),
        list(found)
    )]
    FeatureMismatch {
        /// The source or the set.
        path: String,
        /// Names expected.
        expected: Vec<String>,
        /// Names found.
        found: Vec<String>,
    },

    /// An option that cannot work.
    #[error("option `{option}`: {reason}")]
    InvalidOption {
        /// Name of the option.
        option: &'static str,
        /// What is wrong and what is expected.
        reason: String,
    },

    /// The folder holds no shard set.
    #[error(
        "{}: not a folder of prepared shards (no manifest.json); run `prepare` with this folder as output",
        path.display()
    )]
    NotAShardSet {
        /// The folder.
        path: PathBuf,
    },

    /// The manifest cannot be used.
    #[error("{}: unusable manifest: {reason}", path.display())]
    Manifest {
        /// The manifest file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A shard that is missing, cut short or altered.
    #[error("{}: damaged shard: {reason}; run `prepare` again", path.display())]
    Shard {
        /// The shard file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A set that has been prepared anew since it was opened.
    #[error(
        "{}: this file is gone, since the set has been prepared anew after it was opened; open the set again \
         (and prepare into another folder what others are still reading)",
        path.display()
    )]
    Replaced {
        /// The file that was asked for.
        path: PathBuf,
    },

    /// Another process is writing the same set or file.
    #[error("{}: another process is writing here; wait for it to end", path.display())]
    Busy {
        /// The folder or file.
        path: PathBuf,
    },

    /// A transfer that failed after all retries.
    #[error("{url}: {reason}")]
    Remote {
        /// The address, without credentials.
        url: String,
        /// What failed, after how many attempts, and what to do.
        reason: String,
    },

    /// The caller asked to stop.
    #[error("stopped on request; what was published before has not been touched")]
    Cancelled,
}

impl Error {
    /// Wraps an I/O error, telling a missing path and a full disk from the rest.
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound { path },
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::DiskFull { path, action }
            }
            _ => Error::Io {
                path,
                action,
                source,
            },
        }
    }
}

/// Names in back quotes, separated by commas; at most sixteen of them.
fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "none".into();
    }
    let mut text = names
        .iter()
        .take(16)
        .map(|n| format!("`{}`", shorten(n)))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > 16 {
        text.push_str(", ...");
    }
    text
}

/// At most 40 characters of a cell, so that a message stays one line.
pub(crate) fn shorten(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    if clean.chars().count() <= 40 {
        clean
    } else {
        let head: String = clean.chars().take(37).collect();
        format!("{head}...")
    }
}
