//! Downloads of public candles: the Kaggle data set, and Binance's monthly archives.

mod binance;
mod http;
mod kaggle;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

pub use binance::{BinanceMonths, Month, fetch_binance};
pub use kaggle::{Credentials, KaggleSet, fetch_kaggle};

/// Where downloads go, and how patient to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOptions {
    /// Folder of the files. Made if it is not there.
    pub output: PathBuf,
    /// Where to ask instead of the usual host: a mirror, or a server of one's own.
    pub host: Option<String>,
    /// Failures in a row, without a megabyte of progress between them, before a download is given up.
    pub retries: usize,
    /// Wait after the first failure; doubles with each further one, up to ten seconds.
    pub backoff: Duration,
    /// A connection from which nothing has come for so long has failed.
    pub stall: Duration,
}

impl FetchOptions {
    /// Into this folder, from the usual host.
    pub fn new(output: impl Into<PathBuf>) -> Self {
        Self {
            output: output.into(),
            host: None,
            retries: 8,
            backoff: Duration::from_millis(500),
            stall: Duration::from_secs(30),
        }
    }

    /// Asks another host.
    pub fn with_host(mut self, host: impl Into<String>) -> Self {
        self.host = Some(host.into());
        self
    }

    /// Sets how often a download is taken up again, and how long to wait before the first time.
    pub fn with_retries(mut self, retries: usize, backoff: Duration) -> Self {
        self.retries = retries;
        self.backoff = backoff;
        self
    }

    /// Sets after how long without a byte a connection has failed.
    pub fn with_stall(mut self, stall: Duration) -> Self {
        self.stall = stall;
        self
    }

    /// The host, without a slash at its end.
    fn host<'a>(&'a self, usual: &'a str) -> &'a str {
        self.host.as_deref().unwrap_or(usual).trim_end_matches('/')
    }
}

/// How far a download has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchProgress {
    /// The file that is being downloaded.
    pub file: String,
    /// Its number, from 1.
    pub number: usize,
    /// Files in all.
    pub files: usize,
    /// Bytes of it that are here, those of an earlier run included.
    pub done: u64,
    /// Its bytes in all, where the server says.
    pub total: Option<u64>,
}

/// Told how far a download has come; `Break` stops it, and what has come so far stays for the next time.
pub type FetchWatcher<'a> = &'a mut dyn FnMut(&FetchProgress) -> ControlFlow<()>;
