//! Shard sets behind URLs: downloaded shard by shard into a bounded cache, checked before they are trusted.

mod cache;
mod files;
mod store;
mod transfer;
mod upload;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use files::open;
pub use upload::upload;

use crate::{Error, Result};

/// How to reach a shard set behind a URL, and where to keep copies of its shards.
///
/// Credentials come from the usual places of each store (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`,
/// `AZURE_STORAGE_ACCOUNT_NAME` and so on, or the machine's role), or from `store`.
///
/// ```no_run
/// use mamba_ssm_data::{Dataset, RemoteOptions};
///
/// let options = RemoteOptions::default()
///     .with_cache("/fast/disk/shards", 50 << 30)
///     .with_store_option("aws_region", "eu-central-1");
/// let data = Dataset::open_remote("s3://bucket/btc", &options)?;
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// Folder of the local copies. Several processes and several sets may share one. The default is
    /// `mamba-ssm/shards` in the user's cache folder.
    pub cache: PathBuf,
    /// Bytes of copies to keep; those used longest ago go first. At least one shard must fit.
    pub cache_bytes: u64,
    /// Failures in a row, without a megabyte of progress between them, before a transfer is given up.
    pub retries: usize,
    /// Wait after the first failure; doubles with each further one, up to ten seconds.
    pub backoff: Duration,
    /// A transfer from which nothing has come for so long has failed.
    pub stall: Duration,
    /// Settings of the store by the names that the `object_store` crate gives them (`aws_endpoint`,
    /// `aws_region`, `google_service_account`, `azure_storage_account_name`, ...).
    pub store: BTreeMap<String, String>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            cache: default_cache(),
            cache_bytes: 16 << 30,
            retries: 8,
            backoff: Duration::from_millis(200),
            stall: Duration::from_secs(30),
            store: BTreeMap::new(),
        }
    }
}

impl RemoteOptions {
    /// Sets where local copies are kept and how many bytes of them.
    pub fn with_cache(mut self, folder: impl Into<PathBuf>, bytes: u64) -> Self {
        self.cache = folder.into();
        self.cache_bytes = bytes;
        self
    }

    /// Sets how often a transfer is taken up again, and how long to wait before the first time.
    pub fn with_retries(mut self, retries: usize, backoff: Duration) -> Self {
        self.retries = retries;
        self.backoff = backoff;
        self
    }

    /// Sets after how long without a byte a transfer has failed.
    pub fn with_stall(mut self, stall: Duration) -> Self {
        self.stall = stall;
        self
    }

    /// Adds a setting of the store.
    pub fn with_store_option(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.store.insert(key.into(), value.into());
        self
    }

    fn validate(&self) -> Result<()> {
        if self.stall.is_zero() {
            return Err(Error::InvalidOption {
                option: "stall",
                reason: "it is zero; expected a time to wait for bytes".into(),
            });
        }
        Ok(())
    }
}

/// The user's cache folder, by the conventions of the system.
fn default_cache() -> PathBuf {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    from("XDG_CACHE_HOME")
        .or_else(|| from("LOCALAPPDATA"))
        .or_else(|| from("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("mamba-ssm/shards")
}
