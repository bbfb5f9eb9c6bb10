//! From source files to a published shard set.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::dataset::is_url;
use crate::plan::Plan;
use crate::shards::{GROUP_ROWS, Manifest, ShardWriter, Staging};
use crate::source::{OrderPolicy, ReadOptions, Stream};
use crate::spill::Scratch;
use crate::transform::Transform;
use crate::windows::{Split, SplitWindows, WindowOptions};
use crate::{Error, Result};

/// What to prepare, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareOptions {
    /// The source files, or patterns that match them (`data/*.zip`). Where they overlap the later one wins, see
    /// [`read_series`](crate::read_series).
    pub inputs: Vec<PathBuf>,
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
    /// Bytes of rows to hold in memory; the rest waits in an unnamed file beside the output.
    #[serde(default = "default_memory_bytes")]
    pub memory_bytes: usize,
}

fn default_shard_bytes() -> usize {
    64 << 20
}

fn default_memory_bytes() -> usize {
    384 << 20
}

impl PrepareOptions {
    /// The defaults of all options but the two paths.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            inputs: vec![input.into()],
            output: output.into(),
            read: ReadOptions::default(),
            windows: WindowOptions::default(),
            shard_bytes: default_shard_bytes(),
            memory_bytes: default_memory_bytes(),
        }
    }

    /// Adds a source file or pattern.
    pub fn with_input(mut self, input: impl Into<PathBuf>) -> Self {
        self.inputs.push(input.into());
        self
    }

    /// Sets the bytes of rows to hold in memory.
    pub fn with_memory_bytes(mut self, bytes: usize) -> Self {
        self.memory_bytes = bytes;
        self
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

    /// The memory for rows. Where files are sorted, sorting (all of them) and storing have a half each.
    fn scratch(&self) -> Scratch {
        let shares = match self.read.order {
            OrderPolicy::Refuse => 1,
            OrderPolicy::Sort => 2,
        };
        Scratch {
            memory: self.memory_bytes / shares,
            beside: existing_ancestor(&self.output),
        }
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
/// none), from then on the new one, whenever the process is killed. The files of the old set are removed then: a
/// [`Dataset`](crate::Dataset) that was opened before and has not read all it needs answers
/// [`Error::Replaced`]. Memory: `memory_bytes` of rows, about
/// 12 MB of text on its way and 4 MB more for each thread, and two row groups per thread, however large the sources.
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
    if options.output.to_str().is_some_and(is_url) {
        return Err(Error::InvalidOption {
            option: "output",
            reason: format!(
                "{} is a URL; expected a folder of this machine, which `upload` (feature `remote`) copies there",
                options.output.display()
            ),
        });
    }
    let mut tell = |stage, done, total| match progress(Progress { stage, done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    };
    let scratch = options.scratch();
    let stream = Stream::open(&options.inputs, &options.read, &scratch)?;
    let sources = stream
        .files
        .iter()
        .map(|f| f.display().to_string())
        .collect();
    let plan = Plan::of_stream(stream, &options.windows, &scratch, &mut |done, total| {
        tell(Stage::Read, done, total)
    })?;
    let staging = Staging::create(&options.output)?;
    let manifest = write(&plan, &staging, options, sources, &mut |done, total| {
        tell(Stage::Write, done, total)
    })?;
    let summary = summary(&plan, &manifest);
    staging.publish(&manifest)?;
    Ok(summary)
}

/// Writes the shards; returns the manifest that makes them a set.
fn write(
    plan: &Plan,
    staging: &Staging,
    options: &PrepareOptions,
    sources: Vec<String>,
    tell: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Manifest> {
    let about = vec![(
        "mamba-ssm-data.transform".into(),
        to_json(&plan.transform, &options.output)?,
    )];
    let mut writer = ShardWriter::new(staging, plan.transform.names(), options.shard_bytes, about)?;
    let rows = plan.store.rows();
    let groups: Vec<usize> = (0..plan.store.groups()).collect();
    for some in groups.chunks(rayon::current_num_threads()) {
        let ready = some
            .par_iter()
            .map(|&g| plan.row_group(g))
            .collect::<Result<_>>()?;
        writer.write(ready)?;
        let done = some.last().map_or(0, |g| (g + 1) * GROUP_ROWS).min(rows);
        tell(done as u64, rows as u64)?;
    }
    let shards = writer.finish()?;
    let (format, version) = Manifest::signature();
    Ok(Manifest {
        format,
        version,
        generation: staging.generation(),
        sources,
        rows: rows as u64,
        valid_rows: (rows - plan.map.invalid_rows()) as u64,
        time: plan.store.time(),
        read: options.read.clone(),
        transform: plan.transform.clone(),
        fitted_rows: (plan.fitted.start as u64, plan.fitted.end as u64),
        windows: options.windows.clone(),
        splits: plan.splits.clone(),
        group_rows: GROUP_ROWS as u64,
        shards,
    })
}

fn summary(plan: &Plan, manifest: &Manifest) -> Summary {
    Summary {
        rows: plan.store.rows(),
        invalid_rows: plan.map.invalid_rows(),
        breaks: plan.map.runs().saturating_sub(1),
        time: plan.store.time(),
        windows: Split::ALL.map(|s| manifest.split(s).map_or(0, SplitWindows::len)),
        shards: manifest.shards.len(),
        bytes: manifest.shards.iter().map(|s| s.bytes).sum(),
        transform: plan.transform.clone(),
    }
}

/// The folder itself, or the nearest one above it that is there.
fn existing_ancestor(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|p| p.is_dir());
    match found {
        Some(folder) => folder.into(),
        None => PathBuf::from("."),
    }
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Manifest {
        path: path.into(),
        reason: e.to_string(),
    })
}
