//! Windowed time series: CSV to normalised Parquet shards to masked batches.
//!
//! The way of one number: a source file is read into a [`RawSeries`] ([`read_series`]); a [`Transform`] is fitted
//! on the training rows (log, log1p, z-score; invertible); [`prepare`] writes the normalised rows, each
//! once, to Parquet shards with a manifest; a [`Dataset`] opens them and hands out [`Batch`]es of windows
//! through a [`Loader`]. Each step is a public function, and a program can enter or leave at any of them.
//!
//! Nothing of this depends on a tensor library: batches are plain `Vec<f32>`. What is not needed everywhere is
//! behind a feature:
//!
//! - `remote`: shard sets behind URLs, with a bounded local cache, and uploads of them;
//! - `fetch`: downloads of public candles from Kaggle and Binance;
//! - `burn`: the whole series on a device, batches gathered there (`flex`, `cuda`, `rocm`, `metal`, `vulkan`,
//!   `wgpu` and `cpu` choose Burn's backend).
//!
//! ```
//! use mamba_ssm_data::{Dataset, LoaderOptions, PrepareOptions, Split, WindowOptions, prepare};
//!
//! # let dir = tempfile::tempdir().unwrap();
//! let csv = dir.path().join("candles.csv");
//! let mut text = String::from("Timestamp,Open,High,Low,Close,Volume\n");
//! for minute in 0..500 {
//!     let price = 100 + minute % 10;
//!     text += &format!("{},{price},{price},{price},{price},{}\n", minute * 60, minute % 3);
//! }
//! std::fs::write(&csv, text)?;
//!
//! let windows = WindowOptions { length: 16, stride: 4, ..WindowOptions::default() };
//! let options = PrepareOptions::new(&csv, dir.path().join("shards")).with_windows(windows);
//! let summary = prepare(&options)?;
//! assert_eq!(summary.rows, 500);
//!
//! let data = Dataset::open(dir.path().join("shards"))?;
//! let batch = data.loader(Split::Train, &LoaderOptions::new(8).shuffled(1))?.next().unwrap()?;
//! assert_eq!((batch.batch, batch.length, batch.features), (8, 16, 5));
//! let dollars = data.transform().invert(3, batch.values[3]);
//! assert!((100.0..=110.0).contains(&dollars));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(any(feature = "remote", feature = "fetch"))]
mod backoff;
mod dataset;
#[cfg(feature = "burn")]
mod device;
mod error;
mod features;
#[cfg(feature = "fetch")]
mod fetch;
mod gaps;
mod loader;
mod parquet_file;
mod plan;
mod prepare;
mod read_at;
#[cfg(feature = "remote")]
mod remote;
mod schema;
mod series;
mod shards;
mod source;
mod spill;
mod store;
pub mod synthetic;
mod thrift;
mod time;
mod transform;
mod windows;

pub use dataset::Dataset;
#[cfg(feature = "burn")]
pub use device::{DeviceBatch, DeviceLoader, Resident};
pub use error::{Error, Result};
pub use features::{Feature, add_features};
#[cfg(feature = "fetch")]
pub use fetch::{
    BinanceMonths, Credentials, FetchOptions, FetchProgress, FetchWatcher, KaggleSet, Month,
    fetch_binance, fetch_kaggle,
};
pub use gaps::fill_gaps;
pub use loader::{Batch, Loader, LoaderOptions};
pub use prepare::{PrepareOptions, Progress, Stage, Summary, prepare, prepare_with};
#[cfg(feature = "remote")]
pub use remote::{RemoteOptions, upload};
pub use schema::{ColumnSpec, Role, Scale, Schema};
pub use series::RawSeries;
pub use shards::{MANIFEST, Manifest, Shard};
pub use source::{OrderPolicy, ReadOptions, read_many, read_series};
pub use time::{format_time, parse_time};
pub use transform::{FeatureStats, Normalised, Transform};
pub use windows::{GapPolicy, Protocol, Split, SplitWindows, StartRange, WindowOptions};
