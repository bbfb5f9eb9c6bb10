//! Prepared rows and their windows, from a shard set or from memory.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::gaps::fill_gaps;
use crate::loader::{Loader, LoaderOptions, RowSource};
use crate::plan::{Plan, mapped};
use crate::series::RawSeries;
use crate::shards::{Files, Folder, Manifest, PageCache, ShardReader};
use crate::source::ReadOptions;
use crate::transform::{Normalised, Transform};
use crate::windows::{Split, SplitWindows, WindowOptions};
use crate::{Error, Result};

/// Normalised rows, their windows and splits. Cheap to clone; may be shared among threads.
///
/// ```
/// use mamba_ssm_data::{Dataset, LoaderOptions, RawSeries, Schema, Split, WindowOptions};
///
/// let rows = 200;
/// let price: Vec<f64> = (0..rows).map(|i| 100.0 + (i % 7) as f64).collect();
/// let series = RawSeries::from_columns(
///     Schema::ohlcv(),
///     (0..rows as i64).map(|i| i * 60).collect(),
///     vec![price.clone(), price.clone(), price.clone(), price.clone(), price],
/// )?;
/// let windows = WindowOptions { length: 8, stride: 2, ..WindowOptions::default() };
/// let data = Dataset::in_memory(series, &windows)?;
/// let options = LoaderOptions::new(4).shuffled(7);
/// for batch in data.loader(Split::Train, &options)? {
///     let batch = batch?;
///     assert_eq!(batch.values.len(), batch.batch * batch.length * batch.features);
/// }
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Dataset {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transform: Transform,
    windows: WindowOptions,
    splits: Vec<SplitWindows>,
    fitted: Range<usize>,
    rows: usize,
    source: Source,
    /// Where the rows come from, for messages.
    origin: String,
    resident: Mutex<Option<Arc<Normalised>>>,
}

#[derive(Debug)]
enum Source {
    Memory,
    Shards {
        reader: Arc<ShardReader>,
        cache: Arc<PageCache>,
    },
}

impl Dataset {
    /// Opens a shard set in a folder or, with the feature `remote`, behind a URL (`file`, `s3`, `gs`, `az`,
    /// `http`, `https`). Reads the manifest alone; rows are read when they are asked for.
    ///
    /// A set that is prepared anew in the same folder replaces this one and removes its files: rows that have not
    /// been read by then are answered by [`Error::Replaced`].
    ///
    /// # Errors
    ///
    /// No such folder, no manifest in it, a manifest of another version, a shard that is missing
    /// or cut short; a URL that cannot be reached.
    pub fn open(place: impl AsRef<Path>) -> Result<Self> {
        let place = place.as_ref();
        match place.to_str().filter(|text| is_url(text)) {
            Some(url) => Self::open_url(url),
            None => Self::of_files(Box::new(Folder(place.into()))),
        }
    }

    #[cfg(feature = "remote")]
    fn open_url(url: &str) -> Result<Self> {
        Self::open_remote(url, &crate::RemoteOptions::default())
    }

    #[cfg(not(feature = "remote"))]
    fn open_url(url: &str) -> Result<Self> {
        Err(Error::InvalidOption {
            option: "data",
            reason: format!(
                "`{}` is a URL; this build reads folders alone: build mamba-ssm-data with its feature `remote`",
                crate::error::shorten(url)
            ),
        })
    }

    /// Opens a shard set behind a URL (`file`, `s3`, `gs`, `az`, `http`, `https`). Shards are copied to a bounded
    /// cache on this machine when they are wanted, and a little before.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open); [`Error::Remote`] when a transfer has failed as often as
    /// the options allow.
    #[cfg(feature = "remote")]
    pub fn open_remote(url: &str, options: &crate::RemoteOptions) -> Result<Self> {
        Self::of_files(crate::remote::open(url, options)?)
    }

    fn of_files(files: Box<dyn Files>) -> Result<Self> {
        let reader = Arc::new(ShardReader::open(files)?);
        let manifest = &reader.manifest;
        let (start, end) = manifest.fitted_rows;
        Ok(Self::with(Inner {
            transform: manifest.transform.clone(),
            windows: manifest.windows.clone(),
            splits: manifest.splits.clone(),
            fitted: start as usize..end as usize,
            rows: manifest.rows as usize,
            origin: reader.place(),
            source: Source::Shards {
                cache: Arc::new(PageCache::new(reader.clone(), 0)),
                reader: reader.clone(),
            },
            resident: Mutex::default(),
        }))
    }

    /// Does in memory what [`prepare`](crate::prepare) does by way of shards.
    ///
    /// # Errors
    ///
    /// Too few rows for a window or a split; options that cannot work.
    pub fn in_memory(series: RawSeries, windows: &WindowOptions) -> Result<Self> {
        let origin = series.origin.clone();
        let plan = Plan::of_series(series, windows)?;
        let rows = plan.normalised()?;
        Ok(Self::of_rows(
            rows,
            plan.transform,
            windows,
            plan.splits,
            plan.fitted,
            origin,
        ))
    }

    /// Rows that a finished run has never seen, under the run's own transform, all windows in one
    /// split. The protocol and fractions of `windows` are not used.
    ///
    /// # Errors
    ///
    /// Other columns than the transform's; too few rows for a window.
    pub fn with_transform(
        series: RawSeries,
        transform: Transform,
        windows: &WindowOptions,
        split: Split,
    ) -> Result<Self> {
        windows.validate()?;
        transform.check_columns(&series.schema, &series.origin)?;
        let series = fill_gaps(series, &windows.gaps)?;
        let map = mapped(&series);
        let windows_of_split = map.all_in(split, windows)?;
        let rows = transform.apply(&series)?;
        Ok(Self::of_rows(
            rows,
            transform,
            windows,
            vec![windows_of_split],
            0..0,
            series.origin,
        ))
    }

    fn of_rows(
        rows: Normalised,
        transform: Transform,
        windows: &WindowOptions,
        splits: Vec<SplitWindows>,
        fitted: Range<usize>,
        origin: String,
    ) -> Self {
        Self::with(Inner {
            transform,
            windows: windows.clone(),
            splits,
            fitted,
            rows: rows.len(),
            source: Source::Memory,
            origin,
            resident: Mutex::new(Some(Arc::new(rows))),
        })
    }

    fn with(inner: Inner) -> Self {
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The fitted transform: statistics, names, and the way back to levels.
    pub fn transform(&self) -> &Transform {
        &self.inner.transform
    }

    /// Window length, stride, gap policy and protocol.
    pub fn window_options(&self) -> &WindowOptions {
        &self.inner.windows
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.inner.rows
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of features of a row.
    pub fn width(&self) -> usize {
        self.inner.transform.width()
    }

    /// Names of the features, in order.
    pub fn names(&self) -> Vec<String> {
        self.inner.transform.names()
    }

    /// How the sources were read, when the rows come from a shard set: what a new file has to be read with.
    pub fn read_options(&self) -> Option<&ReadOptions> {
        self.manifest().map(|m| &m.read)
    }

    /// The manifest, when the rows come from a shard set.
    pub fn manifest(&self) -> Option<&Manifest> {
        match &self.inner.source {
            Source::Memory => None,
            Source::Shards { reader, .. } => Some(&reader.manifest),
        }
    }

    /// Start rows of a split's windows, rising. Empty when the data has no such split.
    pub fn starts(&self, split: Split) -> Vec<u64> {
        self.split(split)
            .map_or_else(Vec::new, |s| s.expand(self.inner.windows.stride))
    }

    /// The rows of a split (under the chronological protocol; otherwise all rows).
    pub fn split_rows(&self, split: Split) -> Range<usize> {
        self.split(split)
            .map_or(0..0, |s| s.rows.0 as usize..s.rows.1 as usize)
    }

    /// The rows that the transform was fitted on; empty when it came from elsewhere.
    pub fn fitted_rows(&self) -> Range<usize> {
        self.inner.fitted.clone()
    }

    fn split(&self, split: Split) -> Option<&SplitWindows> {
        self.inner.splits.iter().find(|s| s.split == split)
    }

    /// All rows, normalised. Read from the shards at the first call, shared from then on.
    ///
    /// # Errors
    ///
    /// [`Error::Shard`] when a shard's checksum or content is wrong; [`Error::Replaced`] when the set has been
    /// prepared anew since it was opened.
    pub fn rows(&self) -> Result<Arc<Normalised>> {
        let mut resident = self
            .inner
            .resident
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(rows) = resident.as_ref() {
            return Ok(rows.clone());
        }
        let rows = match &self.inner.source {
            Source::Shards { reader, .. } => Arc::new(reader.read_all()?),
            // A dataset in memory is made with its rows in place.
            Source::Memory => Arc::default(),
        };
        *resident = Some(rows.clone());
        Ok(rows)
    }

    /// All rows, for somebody who takes them away: rows that are not in memory yet are read without being kept.
    #[cfg(feature = "burn")]
    pub(crate) fn rows_to_take(&self) -> Result<Normalised> {
        let resident = self
            .inner
            .resident
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match (resident, &self.inner.source) {
            (Some(rows), _) => Ok((*rows).clone()),
            (None, Source::Shards { reader, .. }) => reader.read_all(),
            (None, Source::Memory) => Ok(Normalised::default()),
        }
    }

    /// Batches of a split's windows.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] for options that cannot work, [`Error::EmptySplit`] when the split has no
    /// window, [`Error::Shard`] when the rows cannot be read.
    pub fn loader(&self, split: Split, options: &LoaderOptions) -> Result<Loader> {
        options.validate()?;
        let starts = self.starts(split);
        if starts.is_empty() {
            return Err(Error::EmptySplit {
                path: self.inner.origin.clone(),
                split,
                rows: self.split_rows(split).len(),
                needed: self.inner.windows.length,
            });
        }
        let rows = self.row_source(options.memory_bytes);
        let pages = match &self.inner.source {
            Source::Memory => None,
            Source::Shards { cache, .. } => Some(&**cache),
        };
        let length = self.inner.windows.length;
        Loader::new(rows, pages, starts, self.len(), length, options)
    }

    /// Rows in memory if they are there already; otherwise pages, read when they are wanted.
    fn row_source(&self, memory_bytes: usize) -> RowSource {
        let resident = self
            .inner
            .resident
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match (&*resident, &self.inner.source) {
            (Some(rows), _) => RowSource::Memory(rows.clone()),
            (None, Source::Memory) => RowSource::Memory(Arc::default()),
            (None, Source::Shards { cache, .. }) => {
                cache.set_capacity(memory_bytes);
                RowSource::Pages(cache.clone())
            }
        }
    }
}

/// Whether a text begins with a scheme of at least two letters: one letter is a drive.
pub(crate) fn is_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        scheme.len() > 1 && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

#[cfg(all(test, feature = "burn"))]
mod tests {
    use super::*;
    use crate::{PrepareOptions, prepare};

    #[test]
    fn rows_that_are_taken_away_are_not_kept_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let rows = (0..400).map(|m| format!("{},{p},{p},{p},{p},1\n", m * 60, p = 1 + m % 7));
        let text = format!(
            "Timestamp,Open,High,Low,Close,Volume\n{}",
            rows.collect::<String>()
        );
        let csv = dir.path().join("c.csv");
        std::fs::write(&csv, text).unwrap();
        let windows = WindowOptions {
            length: 8,
            stride: 4,
            ..WindowOptions::default()
        };
        let options = PrepareOptions::new(csv, dir.path().join("set")).with_windows(windows);
        prepare(&options).unwrap();
        let data = Dataset::open(dir.path().join("set")).unwrap();
        let taken = data.rows_to_take().unwrap();
        assert!(data.inner.resident.lock().unwrap().is_none());
        assert_eq!(taken, *data.rows().unwrap());
        assert_eq!(taken, data.rows_to_take().unwrap());
    }
}
