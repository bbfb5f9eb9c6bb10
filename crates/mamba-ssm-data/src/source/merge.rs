//! Many files as one series.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::{Block, BlockSource, ReadOptions, open_file};
use crate::Result;
use crate::spill::Scratch;

/// Rows of a block that is merged row by row.
const ROWS: usize = 1 << 14;

/// A file that has not been reached yet.
struct Waiting {
    first: i64,
    path: PathBuf,
    /// Place in the order of names: of two equal timestamps the later name wins.
    rank: usize,
}

/// A file that is being read.
struct Lane<'a> {
    source: Box<dyn BlockSource + 'a>,
    block: Block,
    at: usize,
    rank: usize,
}

/// Files one after another in order of time; overlaps are merged row by row.
///
/// Of rows with the same timestamp a valid one goes before an invalid one; after that the file
/// whose name comes last wins. Files are opened when their time comes, so memory grows with the number
/// of files that overlap, not with the number of files.
pub(super) struct Merge<'a> {
    options: &'a ReadOptions,
    scratch: Scratch,
    waiting: VecDeque<Waiting>,
    lanes: Vec<Lane<'a>>,
    /// Of rows with the same timestamp a valid one goes first; otherwise the last one alone counts.
    valid_first: bool,
    finished: u64,
}

impl<'a> Merge<'a> {
    /// Looks at the first row of each file. Files without rows in the range asked for are passed over.
    pub(super) fn open(
        paths: Vec<PathBuf>,
        options: &'a ReadOptions,
        scratch: &Scratch,
    ) -> Result<Self> {
        let mut waiting = Vec::with_capacity(paths.len());
        for (rank, path) in paths.into_iter().enumerate() {
            if let Some(block) = open_file(&path, options, scratch)?.next_block()? {
                waiting.push(Waiting {
                    first: block.timestamps[0],
                    path,
                    rank,
                });
            }
        }
        waiting.sort_by_key(|w| (w.first, w.rank));
        Ok(Self {
            options,
            scratch: scratch.clone(),
            waiting: waiting.into(),
            lanes: Vec::new(),
            valid_first: true,
            finished: 0,
        })
    }

    /// Merges parts of one file, each in order of time; of rows with the same timestamp that of the last part stays.
    pub(super) fn of_runs(
        runs: Vec<Box<dyn BlockSource + 'a>>,
        options: &'a ReadOptions,
    ) -> Result<Self> {
        let mut merge = Self {
            options,
            scratch: Scratch::unlimited(),
            waiting: VecDeque::new(),
            lanes: Vec::with_capacity(runs.len()),
            valid_first: false,
            finished: 0,
        };
        for (rank, source) in runs.into_iter().enumerate() {
            merge.add_lane(source, rank)?;
        }
        Ok(merge)
    }

    /// Begins to read a source, if there is anything in it.
    fn add_lane(&mut self, mut source: Box<dyn BlockSource + 'a>, rank: usize) -> Result<()> {
        if let Some(block) = source.next_block()? {
            self.lanes.push(Lane {
                source,
                block,
                at: 0,
                rank,
            });
        }
        Ok(())
    }

    /// Opens every file that starts at or before `time`, or the next one if none is open.
    fn open_up_to(&mut self, time: Option<i64>) -> Result<()> {
        while let Some(next) = self.waiting.front() {
            if !self.lanes.is_empty() && time.is_none_or(|t| next.first > t) {
                break;
            }
            let Some(next) = self.waiting.pop_front() else {
                break;
            };
            let source = open_file(&next.path, self.options, &self.scratch)?;
            self.add_lane(source, next.rank)?;
        }
        Ok(())
    }

    /// The smallest timestamp at the head of a lane.
    fn head(&self) -> Option<i64> {
        self.lanes.iter().map(Lane::time).min()
    }

    /// Takes the winner among the rows of this time into `out`, and moves all their lanes on.
    fn take_row(&mut self, time: i64, out: &mut Block) -> Result<()> {
        let winner = self
            .lanes
            .iter()
            .filter(|lane| lane.time() == time)
            .max_by_key(|lane| (self.valid_first && lane.block.valid[lane.at], lane.rank));
        if let Some(lane) = winner {
            out.extend(&lane.block, lane.at..lane.at + 1);
        }
        for index in (0..self.lanes.len()).rev() {
            if self.lanes[index].time() == time {
                self.advance(index, 1)?;
            }
        }
        Ok(())
    }

    /// Moves a lane on; closes it at its end.
    fn advance(&mut self, index: usize, rows: usize) -> Result<()> {
        let lane = &mut self.lanes[index];
        lane.at += rows;
        if lane.at == lane.block.len() {
            match lane.source.next_block()? {
                Some(block) => {
                    lane.block = block;
                    lane.at = 0;
                }
                None => {
                    let lane = self.lanes.swap_remove(index);
                    self.finished += lane.source.bytes_read();
                }
            }
        }
        Ok(())
    }

    /// The rest of the only lane's block, if no other file reaches into it.
    fn whole_block(&mut self) -> Result<Option<Block>> {
        let [lane] = &mut self.lanes[..] else {
            return Ok(None);
        };
        let last = lane.block.timestamps[lane.block.len() - 1];
        if self.waiting.front().is_some_and(|next| next.first <= last) {
            return Ok(None);
        }
        let rest = lane.block.len() - lane.at;
        let block = if lane.at == 0 {
            let empty = Block {
                timestamps: lane.block.timestamps.clone(),
                ..Block::default()
            };
            std::mem::replace(&mut lane.block, empty)
        } else {
            let mut block = Block::with_width(lane.block.columns.len(), rest);
            block.extend(&lane.block, lane.at..lane.block.len());
            block
        };
        self.advance(0, rest)?;
        Ok(Some(block))
    }
}

impl Lane<'_> {
    fn time(&self) -> i64 {
        self.block.timestamps[self.at]
    }
}

impl BlockSource for Merge<'_> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        self.open_up_to(self.head())?;
        if let Some(block) = self.whole_block()? {
            return Ok(Some(block));
        }
        let mut out = Block::with_width(self.options.schema.columns.len(), ROWS);
        while out.len() < ROWS {
            self.open_up_to(self.head())?;
            let Some(time) = self.head() else { break };
            self.take_row(time, &mut out)?;
        }
        Ok((out.len() > 0).then_some(out))
    }

    fn bytes_read(&self) -> u64 {
        self.finished
            + self
                .lanes
                .iter()
                .map(|l| l.source.bytes_read())
                .sum::<u64>()
    }
}
