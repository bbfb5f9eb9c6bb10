//! Batches of windows: shuffled by seed, made by worker threads, resumable at any batch.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::shards::PageCache;
use crate::transform::Normalised;
use crate::{Error, Result};

/// How a split is cut into batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Windows of a batch.
    pub batch: usize,
    /// Seed of the order; `None` keeps the order of time.
    pub shuffle: Option<u64>,
    /// Counts the passes over the data; each has an order of its own.
    pub epoch: u64,
    /// Batches of this rank to leave out at the start: the place to resume at.
    pub skip: usize,
    /// Greatest number of batches (of this rank), skipped ones included.
    pub limit: Option<usize>,
    /// Leave out a last batch that is not full.
    pub drop_last: bool,
    /// Which share of the windows this process takes, 0 to `world` - 1.
    pub rank: usize,
    /// Processes that share the windows.
    pub world: usize,
    /// Threads that gather batches; 0 gathers in the calling thread.
    pub workers: usize,
    /// Batches each worker makes ahead.
    pub prefetch: usize,
    /// Bytes of rows to hold in memory. A series that fits is shuffled as a whole; of a larger one,
    /// as many pages as fit are drawn at random and their windows shuffled together.
    pub memory_bytes: usize,
    /// Shards that a shuffled epoch needs at one time. A set of more shards is taken in random turns of so many
    /// (less one, for windows that reach into the next), so that a bounded cache of a remote set fetches
    /// each about once: choose no more than the cache holds, and the same number on every rank.
    pub shards_at_once: usize,
}

impl LoaderOptions {
    /// Batches of this many windows, in the order of time, gathered in the calling thread.
    pub fn new(batch: usize) -> Self {
        Self {
            batch,
            shuffle: None,
            epoch: 0,
            skip: 0,
            limit: None,
            drop_last: false,
            rank: 0,
            world: 1,
            workers: 0,
            prefetch: 2,
            memory_bytes: 256 << 20,
            shards_at_once: 64,
        }
    }

    /// Shuffles by this seed.
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// Sets the pass over the data.
    pub fn with_epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// Starts after this many batches.
    pub fn skipping(mut self, batches: usize) -> Self {
        self.skip = batches;
        self
    }

    /// Stops after this many batches, skipped ones included.
    pub fn limited(mut self, batches: usize) -> Self {
        self.limit = Some(batches);
        self
    }

    /// Leaves out a last batch that is not full.
    pub fn dropping_last(mut self) -> Self {
        self.drop_last = true;
        self
    }

    /// Takes the share of one process among several. All shares have the same number of batches.
    pub fn sharded(mut self, rank: usize, world: usize) -> Self {
        self.rank = rank;
        self.world = world;
        self
    }

    /// Gathers batches on this many threads, each some batches ahead.
    pub fn with_workers(mut self, workers: usize, prefetch: usize) -> Self {
        self.workers = workers;
        self.prefetch = prefetch;
        self
    }

    /// Sets the bytes of rows to hold in memory.
    pub fn with_memory_bytes(mut self, bytes: usize) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// Sets how many shards a shuffled epoch needs at one time.
    pub fn with_shards_at_once(mut self, shards: usize) -> Self {
        self.shards_at_once = shards;
        self
    }

    /// Checks the numbers.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        let bad = |option, reason| Err(Error::InvalidOption { option, reason });
        if self.batch == 0 {
            return bad("batch", "0; expected at least 1 window".into());
        }
        if self.world == 0 || self.rank >= self.world {
            return bad(
                "rank",
                format!(
                    "{} of {}; expected a rank below the world size",
                    self.rank, self.world
                ),
            );
        }
        if self.shards_at_once == 0 {
            return bad("shards_at_once", "0; expected at least 1 shard".into());
        }
        if self.workers > 256 {
            return bad("workers", format!("{}; expected at most 256", self.workers));
        }
        Ok(())
    }
}

/// Windows of a split, one after another.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// `[batch, length, features]`, z-scores, always finite.
    pub values: Vec<f32>,
    /// `[batch, length]`: 1 where the row is a true observation, 0 where it was missing or filled.
    pub mask: Vec<f32>,
    /// First row of each window.
    pub starts: Vec<u64>,
    /// Number of windows.
    pub batch: usize,
    /// Rows of a window.
    pub length: usize,
    /// Features of a row.
    pub features: usize,
}

/// An iterator over the batches of a split.
///
/// The order depends on the set, on seed and epoch, and, where the series is larger than they are, on `memory_bytes`
/// and `shards_at_once`; not on workers or prefetch, nor on what happens to be in memory or in a cache. With the same
/// options, ranks share the windows without overlap, on whatever machine each of them runs, and a loader
/// that is made with `skip` set to the number of batches already taken goes on exactly where the first one stopped.
#[derive(Debug)]
pub struct Loader {
    plan: Arc<BatchPlan>,
    next: usize,
    /// One channel per worker; worker `w` makes the batches `skip + w`, `skip + w + workers`, ...
    workers: Vec<Receiver<Result<Batch>>>,
    first: usize,
}

#[derive(Debug)]
struct BatchPlan {
    rows: RowSource,
    /// Start rows of all windows of this rank, in the order of the epoch.
    order: Vec<u64>,
    batch: usize,
    batches: usize,
    length: usize,
}

impl Loader {
    /// `pages` are those of a shard set, whether or not its rows are in memory.
    pub(crate) fn new(
        rows: RowSource,
        pages: Option<&PageCache>,
        starts: Vec<u64>,
        series_rows: usize,
        length: usize,
        options: &LoaderOptions,
    ) -> Result<Self> {
        let order = epoch_order(starts, pages, series_rows, length, options);
        let full = order.len() / options.batch;
        let all = if options.drop_last {
            full
        } else {
            order.len().div_ceil(options.batch)
        };
        let plan = Arc::new(BatchPlan {
            rows,
            order,
            batch: options.batch,
            batches: options.limit.map_or(all, |limit| limit.min(all)),
            length,
        });
        let first = options.skip.min(plan.batches);
        let workers = (0..options.workers)
            .map(|w| spawn_worker(plan.clone(), first + w, options))
            .collect::<Result<_>>()?;
        Ok(Self {
            plan,
            next: first,
            workers,
            first,
        })
    }

    /// Batches of the whole epoch (of this rank), whether or not they have been taken.
    pub fn batches(&self) -> usize {
        self.plan.batches
    }

    /// Batches taken or skipped so far: the `skip` to resume with.
    pub fn position(&self) -> usize {
        self.next
    }

    /// Start rows of all windows of this rank, in the order of the epoch.
    pub fn order(&self) -> &[u64] {
        &self.plan.order
    }
}

#[cfg(feature = "burn")]
impl Loader {
    /// Where the windows of the next batch begin; the batch counts as taken. For loaders without workers.
    pub(crate) fn next_starts(&mut self) -> Option<Vec<u64>> {
        if self.next >= self.plan.batches {
            return None;
        }
        let starts = self.plan.starts_of(self.next).to_vec();
        self.next += 1;
        Some(starts)
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.plan.batches {
            return None;
        }
        let index = self.next;
        self.next += 1;
        if self.workers.is_empty() {
            return Some(self.plan.gather(index));
        }
        let worker = &self.workers[(index - self.first) % self.workers.len()];
        Some(worker.recv().unwrap_or_else(|_| {
            Err(Error::Source {
                path: "loader".into(),
                reason: "a worker thread ended before its last batch".into(),
            })
        }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.plan.batches - self.next.min(self.plan.batches);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Loader {}

impl BatchPlan {
    /// Where the windows of a batch begin.
    fn starts_of(&self, index: usize) -> &[u64] {
        let from = index * self.batch;
        &self.order[from..(from + self.batch).min(self.order.len())]
    }

    /// Copies the windows of one batch.
    fn gather(&self, index: usize) -> Result<Batch> {
        let starts = self.starts_of(index);
        let later = &self.order[index * self.batch + starts.len()..];
        self.rows
            .announce(&later[..later.len().min(self.batch)], self.length);
        let mut batch = Batch {
            batch: starts.len(),
            length: self.length,
            starts: starts.to_vec(),
            ..Batch::default()
        };
        match &self.rows {
            RowSource::Memory(rows) => self.copy_resident(rows, &mut batch),
            RowSource::Pages(pages) => self.copy_pages(pages, &mut batch)?,
        }
        Ok(batch)
    }

    fn copy_resident(&self, rows: &Normalised, batch: &mut Batch) {
        let width = rows.width;
        batch.features = width;
        batch
            .values
            .reserve_exact(batch.batch * self.length * width);
        batch.mask.reserve_exact(batch.batch * self.length);
        for &start in &batch.starts {
            let window = start as usize..start as usize + self.length;
            batch
                .values
                .extend_from_slice(&rows.values[window.start * width..window.end * width]);
            batch
                .mask
                .extend(rows.valid[window].iter().map(|&v| as_mask(v)));
        }
    }

    fn copy_pages(&self, pages: &PageCache, batch: &mut Batch) -> Result<()> {
        let page_rows = pages.page_rows();
        let wanted: BTreeSet<usize> = batch
            .starts
            .iter()
            .flat_map(|&s| s as usize / page_rows..=(s as usize + self.length - 1) / page_rows)
            .collect();
        let held = wanted
            .into_par_iter()
            .map(|index| Ok((index, pages.page(index)?)))
            .collect::<Result<HashMap<_, _>>>()?;
        for &start in &batch.starts {
            let mut row = start as usize;
            let end = row + self.length;
            while row < end {
                let page = &held[&(row / page_rows)];
                let width = page.values.len() / page.valid.len();
                let from = row % page_rows;
                let to = page_rows.min(from + end - row);
                batch.features = width;
                batch
                    .values
                    .extend_from_slice(&page.values[from * width..to * width]);
                batch
                    .mask
                    .extend(page.valid[from..to].iter().map(|&v| as_mask(v)));
                row += to - from;
            }
        }
        Ok(())
    }
}

fn as_mask(valid: bool) -> f32 {
    f32::from(u8::from(valid))
}

/// Where the rows of a batch come from.
#[derive(Debug, Clone)]
pub(crate) enum RowSource {
    /// All rows are in memory.
    Memory(Arc<Normalised>),
    /// Pages of shards, as many in memory as fit.
    Pages(Arc<PageCache>),
}

impl RowSource {
    /// Says which windows come next, so that their shards can be on their way.
    fn announce(&self, starts: &[u64], length: usize) {
        if let RowSource::Pages(pages) = self {
            for &start in starts {
                let start = start as usize;
                for row in [start, start + length - 1] {
                    pages.prefetch(row / pages.page_rows());
                }
            }
        }
    }
}

fn spawn_worker(
    plan: Arc<BatchPlan>,
    first: usize,
    options: &LoaderOptions,
) -> Result<Receiver<Result<Batch>>> {
    let (sender, receiver): (SyncSender<Result<Batch>>, _) = sync_channel(options.prefetch);
    let step = options.workers;
    std::thread::Builder::new()
        .name("load-batches".into())
        .spawn(move || {
            for index in (first..plan.batches).step_by(step) {
                if sender.send(plan.gather(index)).is_err() {
                    return;
                }
            }
        })
        .map_err(|e| Error::io(std::path::Path::new("loader"), "start a worker thread", e))?;
    Ok(receiver)
}

/// The windows of this rank in the order of the epoch.
fn epoch_order(
    mut starts: Vec<u64>,
    pages: Option<&PageCache>,
    series_rows: usize,
    length: usize,
    options: &LoaderOptions,
) -> Vec<u64> {
    if let Some(seed) = options.shuffle {
        // One generator per epoch: an order that can be found again without replaying the epochs before.
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        rng.set_stream(options.epoch);
        match pages {
            Some(pages) => {
                starts = shuffled(starts, pages, series_rows, length, options, &mut rng);
            }
            None => starts.shuffle(&mut rng),
        }
    }
    if options.world == 1 {
        return starts;
    }
    // Every rank takes as many windows, so that none waits for another at the end of an epoch.
    let share = starts.len() / options.world;
    starts
        .chunks_exact(options.world)
        .take(share)
        .map(|round| round[options.rank])
        .collect()
}

/// Shuffles as widely as the options allow. What is in memory or in a cache must not matter.
fn shuffled(
    starts: Vec<u64>,
    pages: &PageCache,
    series_rows: usize,
    length: usize,
    options: &LoaderOptions,
    rng: &mut ChaCha12Rng,
) -> Vec<u64> {
    let rounds = if options.shards_at_once < pages.shards() {
        let of_start = |start: u64| pages.shard_of(start as usize / pages.page_rows());
        rounds_of_shards(&starts, of_start, options.shards_at_once, rng)
    } else {
        vec![starts]
    };
    let fits = series_rows.div_ceil(pages.page_rows()) * pages.page_bytes() <= options.memory_bytes;
    let at_once = options.memory_bytes / pages.page_bytes();
    let within = |mut round: Vec<u64>| {
        if fits {
            round.shuffle(rng);
            return round;
        }
        shuffle_by_pages(&round, pages.page_rows(), length, at_once, rng)
    };
    rounds.into_iter().flat_map(within).collect()
}

/// Draws shards at random, as many at once as can be had; returns the windows of each such draw.
fn rounds_of_shards(
    starts: &[u64],
    shard_of: impl Fn(u64) -> usize,
    at_once: usize,
    rng: &mut ChaCha12Rng,
) -> Vec<Vec<u64>> {
    let mut by_shard: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    for &start in starts {
        by_shard.entry(shard_of(start)).or_default().push(start);
    }
    let mut shards: Vec<Vec<u64>> = by_shard.into_values().collect();
    shards.shuffle(rng);
    // One is left for what the last windows of a shard reach into, and for what is fetched ahead.
    let together = shards.chunks(at_once.saturating_sub(1).max(1));
    together.map(<[Vec<u64>]>::concat).collect()
}

/// Draws pages at random, some at once, and shuffles the windows that start in them together.
fn shuffle_by_pages(
    starts: &[u64],
    page_rows: usize,
    length: usize,
    at_once: usize,
    rng: &mut ChaCha12Rng,
) -> Vec<u64> {
    let mut by_page: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    for &start in starts {
        by_page
            .entry(start as usize / page_rows)
            .or_default()
            .push(start);
    }
    let mut pages: Vec<Vec<u64>> = by_page.into_values().collect();
    pages.shuffle(rng);
    // A window may reach into the pages behind its own; those must fit as well.
    let reach = 1 + (length - 1).div_ceil(page_rows);
    let mut order = Vec::with_capacity(starts.len());
    for some in pages.chunks((at_once / reach).max(1)) {
        let mut together = some.concat();
        together.shuffle(rng);
        order.extend(together);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_take_turns_when_few_can_be_had() {
        let starts: Vec<u64> = (0..1000).collect();
        let mut rng = ChaCha12Rng::seed_from_u64(1);
        let rounds = rounds_of_shards(&starts, |s| s as usize / 100, 4, &mut rng);
        assert_eq!(
            rounds.iter().map(Vec::len).collect::<Vec<_>>(),
            [300, 300, 300, 100]
        );
        let mut sorted = rounds.concat();
        assert_ne!(sorted, starts);
        sorted.sort_unstable();
        assert_eq!(sorted, starts);
    }

    #[test]
    fn pages_are_shuffled_without_loss() {
        let starts: Vec<u64> = (0..1000).map(|i| i * 5).collect();
        let mut rng = ChaCha12Rng::seed_from_u64(1);
        let order = shuffle_by_pages(&starts, 100, 20, 6, &mut rng);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, starts);
        assert_ne!(order, starts);
        // Six pages fit and a window reaches into two: three pages of twenty windows at once.
        for some in order.chunks(60) {
            let pages: BTreeSet<u64> = some.iter().map(|s| s / 100).collect();
            assert!(pages.len() <= 3, "{pages:?}");
        }
    }
}
