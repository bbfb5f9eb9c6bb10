//! Shard sets: Parquet files and a manifest, published as one.

mod cache;
mod files;
mod manifest;
mod open;
mod publish;
mod read;
mod write;

pub(crate) use cache::PageCache;
pub(crate) use files::{Files, Folder};
pub use manifest::{MANIFEST, Manifest, Shard};
#[cfg(feature = "remote")]
pub(crate) use open::check_content;
pub(crate) use publish::Staging;
pub(crate) use read::ShardReader;
pub(crate) use write::{RowGroup, ShardWriter};

/// Rows of one Parquet row group: the unit of reading.
pub(crate) const GROUP_ROWS: usize = 1 << 16;
/// Name of the column of time.
pub(crate) const TIMESTAMP: &str = "timestamp";
/// Name of the column of validity.
pub(crate) const VALID: &str = "valid";

/// Bytes of a row in memory: time, features, validity.
pub(crate) fn row_bytes(width: usize) -> usize {
    8 + 4 * width + 1
}
