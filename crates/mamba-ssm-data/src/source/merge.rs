//! Many files as one series.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::{Block, BlockSource, ReadOptions, open_file};
use crate::Result;

/// Rows of a block that is merged row by row.
const ROWS: usize = 1 << 14;

/// Where a part of the series comes from. Of rows with the same timestamp the later place wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Number of the file in the list of sources.
    pub(super) file: usize,
    /// Number of the part within the file.
    pub(super) run: usize,
}

/// Rows that have not been reached yet.
pub(super) struct Waiting<'a> {
    pub(super) first: i64,
    pub(super) place: Place,
    pub(super) rows: Rows<'a>,
}

/// What there is to read when the time comes.
pub(super) enum Rows<'a> {
    File(PathBuf),
    Run(Box<dyn BlockSource + 'a>),
}

/// A source that is being read.
struct Lane<'a> {
    source: Box<dyn BlockSource + 'a>,
    block: Block,
    at: usize,
    place: Place,
}

/// Files one after another in order of time; overlaps are merged row by row.
///
/// Of rows with the same timestamp in several files a valid one goes before an invalid one; after that the
/// file that comes later in the list of sources wins. Within one file the last row stays. Files are opened when
/// their time comes, so memory grows with the number of files that overlap, not with the number of files.
pub(super) struct Merge<'a> {
    options: &'a ReadOptions,
    waiting: VecDeque<Waiting<'a>>,
    lanes: Vec<Lane<'a>>,
    finished: u64,
}

impl<'a> Merge<'a> {
    /// Looks at the first row of each file. Files without rows in the range asked for are passed over.
    pub(super) fn open(paths: Vec<PathBuf>, options: &'a ReadOptions) -> Result<Self> {
        let mut waiting = Vec::with_capacity(paths.len());
        for (file, path) in paths.into_iter().enumerate() {
            if let Some(block) = open_file(&path, options)?.next_block()? {
                waiting.push(Waiting {
                    first: block.timestamps[0],
                    place: Place { file, run: 0 },
                    rows: Rows::File(path),
                });
            }
        }
        Ok(Self::of(waiting, options))
    }

    /// Merges sources whose first timestamps are known, each in order of time.
    pub(super) fn of(mut waiting: Vec<Waiting<'a>>, options: &'a ReadOptions) -> Self {
        waiting.sort_by_key(|w| (w.first, w.place));
        Self {
            options,
            waiting: waiting.into(),
            lanes: Vec::new(),
            finished: 0,
        }
    }

    /// Begins to read a source, if there is anything in it.
    fn add_lane(&mut self, mut source: Box<dyn BlockSource + 'a>, place: Place) -> Result<()> {
        if let Some(block) = source.next_block()? {
            self.lanes.push(Lane {
                source,
                block,
                at: 0,
                place,
            });
        }
        Ok(())
    }

    /// Opens everything that starts at or before `time`, or the next one if none is open.
    fn open_up_to(&mut self, time: Option<i64>) -> Result<()> {
        while let Some(next) = self.waiting.front() {
            if !self.lanes.is_empty() && time.is_none_or(|t| next.first > t) {
                break;
            }
            let Some(next) = self.waiting.pop_front() else {
                break;
            };
            let source = match next.rows {
                Rows::File(path) => open_file(&path, self.options)?,
                Rows::Run(run) => run,
            };
            self.add_lane(source, next.place)?;
        }
        Ok(())
    }

    /// The smallest timestamp at the head of a lane.
    fn head(&self) -> Option<i64> {
        self.lanes.iter().map(Lane::time).min()
    }

    /// Takes the winner among the rows of this time into `out`, and moves all their lanes on.
    fn take_row(&mut self, time: i64, out: &mut Block) -> Result<()> {
        let here = || self.lanes.iter().filter(move |lane| lane.time() == time);
        let is_last_of_file = |place: Place| {
            !here().any(|other| other.place.file == place.file && other.place.run > place.run)
        };
        let winner = here()
            .filter(|lane| is_last_of_file(lane.place))
            .max_by_key(|lane| (lane.block.valid[lane.at], lane.place));
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
