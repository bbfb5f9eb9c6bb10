//! From source files to a published shard set.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::gaps::{fill_gaps, is_usable};
use crate::series::RawSeries;
use crate::shards::{GROUP_ROWS, Manifest, RowGroup, ShardWriter, Staging};
use crate::source::{ReadOptions, read_with};
use crate::transform::{Transform, finite_or_zero};
use crate::windows::{RowMap, Split, SplitWindows, WindowOptions};
use crate::{Error, Result};

/// What to prepare, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareOptions {
    /// The source file.
    pub input: PathBuf,
    /// The folder of the shard set. Made if it is not there; a set in it is replaced as a whole.
    pub output: PathBuf,
    /// How to read the source.
    #[serde(default)]
    pub read: ReadOptions,
    /// Windows, splits and gaps.
    #[serde(default)]
    pub windows: WindowOptions,
    /// Size of a shard before compression, bytes.
    #[serde(default = "default_shard_bytes")]
    pub shard_bytes: usize,
}

fn default_shard_bytes() -> usize {
    64 << 20
}

impl PrepareOptions {
    /// The defaults of all options but the two paths.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            input: input.into(),
            output: output.into(),
            read: ReadOptions::default(),
            windows: WindowOptions::default(),
            shard_bytes: default_shard_bytes(),
        }
    }

    /// Sets how the source is read.
    pub fn with_read(mut self, read: ReadOptions) -> Self {
        self.read = read;
        self
    }

    /// Sets windows, splits and gaps.
    pub fn with_windows(mut self, windows: WindowOptions) -> Self {
        self.windows = windows;
        self
    }

    /// Sets the size of a shard before compression, in bytes.
    pub fn with_shard_bytes(mut self, bytes: usize) -> Self {
        self.shard_bytes = bytes;
        self
    }
}

/// Which part of [`prepare_with`] is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the source; the count is bytes.
    Read,
    /// Writing shards; the count is rows.
    Write,
}

/// How far [`prepare_with`] has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// How much of it is done.
    pub done: u64,
    /// How much there is to do; 0 when that is not known.
    pub total: u64,
}

/// What [`prepare`] has made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Rows of the series, filled ones included.
    pub rows: usize,
    /// Rows that are not true observations.
    pub invalid_rows: usize,
    /// Places where the clock jumps or an invalid row stands.
    pub breaks: usize,
    /// First and last timestamp, unix seconds.
    pub time: (i64, i64),
    /// Windows of training, validation and test.
    pub windows: [usize; 3],
    /// Number of shards.
    pub shards: usize,
    /// Bytes of all shards.
    pub bytes: u64,
    /// The fitted transform.
    pub transform: Transform,
}

/// Reads, fits, windows, normalises, and publishes a shard set.
///
/// The folder changes in one step: until the rename of its manifest it holds the old set (or
/// none), from then on the new one, whenever the process is killed. Memory: the source's rows
/// (9 + 8 bytes per column each) and a few row groups.
///
/// # Errors
///
/// All of [`read_series`](crate::read_series)'s; too few rows for a window or a split; a folder that cannot
/// be written, is full, or is being written by another process.
///
/// ```no_run
/// use mamba_ssm_data::{PrepareOptions, prepare};
/// let summary = prepare(&PrepareOptions::new("btcusd_1-min_data.csv", "data/btc"))?;
/// println!("{} rows, windows {:?}", summary.rows, summary.windows);
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn prepare(options: &PrepareOptions) -> Result<Summary> {
    prepare_with(options, &mut |_| ControlFlow::Continue(()))
}

/// [`prepare`] that tells how far it has come; `Break` stops it and leaves the old set in place.
///
/// # Errors
///
/// Those of [`prepare`], and [`Error::Cancelled`].
pub fn prepare_with(
    options: &PrepareOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Summary> {
    options.windows.validate()?;
    let total = std::fs::metadata(&options.input).map_or(0, |m| m.len());
    let mut tell = |stage, done, total| match progress(Progress { stage, done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    };
    let series = read_with(&options.input, &options.read, &mut |done| {
        tell(Stage::Read, done, total)
    })?;
    let plan = Plan::of(series, &options.windows)?;
    let staging = Staging::create(&options.output)?;
    let manifest = plan.write(&staging, options, &mut |done, total| {
        tell(Stage::Write, done, total)
    })?;
    let summary = plan.summary(&manifest);
    staging.publish(&manifest)?;
    Ok(summary)
}

/// A series with everything decided: gaps filled, windows shared out, transform fitted.
pub(crate) struct Plan {
    pub(crate) series: RawSeries,
    pub(crate) map: RowMap,
    pub(crate) splits: Vec<SplitWindows>,
    pub(crate) transform: Transform,
    pub(crate) fitted: std::ops::Range<usize>,
}

impl Plan {
    pub(crate) fn of(series: RawSeries, windows: &WindowOptions) -> Result<Self> {
        let (series, map) = mapped(series, windows)?;
        let (fitted, splits) = map.share_out(windows)?;
        let transform = Transform::fit(&series, fitted.clone())?;
        Ok(Self {
            series,
            map,
            splits,
            transform,
            fitted,
        })
    }

    fn write(
        &self,
        staging: &Staging,
        options: &PrepareOptions,
        tell: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Manifest> {
        let mut writer = ShardWriter::new(
            staging,
            self.transform.names(),
            options.shard_bytes,
            vec![(
                "mamba-ssm-data.transform".into(),
                to_json(&self.transform, &options.output)?,
            )],
        )?;
        let rows = self.series.len();
        let at_once = GROUP_ROWS * rayon::current_num_threads();
        for start in (0..rows).step_by(at_once) {
            let end = (start + at_once).min(rows);
            writer.write(self.groups(start..end))?;
            tell(end as u64, rows as u64)?;
        }
        let shards = writer.finish()?;
        let (format, version) = Manifest::signature();
        Ok(Manifest {
            format,
            version,
            generation: staging.generation(),
            sources: vec![options.input.display().to_string()],
            rows: rows as u64,
            valid_rows: (rows - self.map.invalid_rows()) as u64,
            time: self.time(),
            schema: self.series.schema.clone(),
            transform: self.transform.clone(),
            fitted_rows: (self.fitted.start as u64, self.fitted.end as u64),
            windows: options.windows.clone(),
            splits: self.splits.clone(),
            group_rows: GROUP_ROWS as u64,
            shards,
        })
    }

    /// Normalises some rows, one row group per task.
    fn groups(&self, rows: std::ops::Range<usize>) -> Vec<RowGroup> {
        let starts: Vec<usize> = rows.clone().step_by(GROUP_ROWS).collect();
        starts
            .into_par_iter()
            .map(|start| {
                let range = start..(start + GROUP_ROWS).min(rows.end);
                RowGroup {
                    timestamps: self.series.timestamps[range.clone()].to_vec(),
                    valid: self.series.valid[range.clone()].to_vec(),
                    columns: self
                        .transform
                        .features
                        .iter()
                        .zip(&self.series.columns)
                        .map(|(stats, column)| {
                            column[range.clone()]
                                .iter()
                                .map(|&level| finite_or_zero(stats.apply(level)))
                                .collect()
                        })
                        .collect(),
                }
            })
            .collect()
    }

    fn time(&self) -> (i64, i64) {
        let times = &self.series.timestamps;
        (times[0], times[times.len() - 1])
    }

    fn summary(&self, manifest: &Manifest) -> Summary {
        Summary {
            rows: self.series.len(),
            invalid_rows: self.map.invalid_rows(),
            breaks: self.map.runs().saturating_sub(1),
            time: self.time(),
            windows: Split::ALL.map(|s| manifest.split(s).map_or(0, SplitWindows::len)),
            shards: manifest.shards.len(),
            bytes: manifest.shards.iter().map(|s| s.bytes).sum(),
            transform: self.transform.clone(),
        }
    }
}

/// Fills gaps as the policy asks and notes where windows may lie.
pub(crate) fn mapped(series: RawSeries, windows: &WindowOptions) -> Result<(RawSeries, RowMap)> {
    let series = fill_gaps(series, &windows.gaps)?;
    let mut map = RowMap::default();
    map.extend(
        series.schema.step,
        &series.timestamps,
        &series.valid,
        |row| is_usable(&series.columns, &series.valid, row),
    );
    Ok((series, map))
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Manifest {
        path: path.into(),
        reason: e.to_string(),
    })
}
