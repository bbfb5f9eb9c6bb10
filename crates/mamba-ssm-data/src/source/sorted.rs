//! Files whose rows come in any order.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::merge::{Merge, Place, Rows, Waiting};
use super::{Block, BlockSource, ReadOptions, bytes, open_file};
use crate::Result;
use crate::spill::{Scratch, Spill, row_bytes};

/// Rows of a run that are read back at once.
const PIECE: usize = 1 << 12;

/// The rows of some files in order of time; within a file the last row of each timestamp stays, among files the rule
/// of [`Merge`] holds.
///
/// Each file is read once. As many rows as fit into memory are sorted at a time; the sorted runs of all files wait in
/// one file and are merged.
pub(super) struct Sorted<'a> {
    files: Vec<PathBuf>,
    options: &'a ReadOptions,
    scratch: Scratch,
    /// The sorted runs, once all rows have been read.
    merged: Option<Merge<'a>>,
    read: u64,
}

impl<'a> Sorted<'a> {
    /// Files that can be opened; they are read when the first row is asked for.
    pub(super) fn open(
        files: Vec<PathBuf>,
        options: &'a ReadOptions,
        scratch: &Scratch,
    ) -> Result<Self> {
        // A file that is missing is better named now than when those before it have been sorted.
        for file in &files {
            bytes::detect(file)?;
        }
        Ok(Self {
            files,
            options,
            scratch: scratch.clone(),
            merged: None,
            read: 0,
        })
    }

    /// Reads all rows and sorts them, a run at a time.
    fn sort(&mut self) -> Result<Merge<'a>> {
        let mut runs = Runs::new(self.options.schema.columns.len(), &self.scratch);
        for (number, file) in self.files.iter().enumerate() {
            let mut source = open_file(file, self.options)?;
            runs.add(number, &mut source)?;
            self.read += source.bytes_read();
        }
        Ok(Merge::of(runs.finish(), self.options))
    }
}

impl BlockSource for Sorted<'_> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        let merged = match self.merged.take() {
            Some(merged) => merged,
            None => self.sort()?,
        };
        self.merged.insert(merged).next_block()
    }

    fn bytes_read(&self) -> u64 {
        self.read
    }
}

/// Sorted runs: in memory as long as all of them fit, in a file from then on.
struct Runs {
    /// Rows that may be in memory at once.
    most: usize,
    spill: Spill,
    width: usize,
    done: Vec<(Place, i64, Held)>,
    /// Rows of the runs that are in memory.
    held: usize,
}

/// Where the rows of a run are.
enum Held {
    Memory(Block),
    /// Pieces in the file.
    File(Range<usize>),
}

impl Runs {
    fn new(width: usize, scratch: &Scratch) -> Self {
        Self {
            // The order of the rows and the column that is being put in order take about as much again.
            most: (scratch.memory / (2 * row_bytes(width))).max(PIECE),
            spill: Spill::new(&scratch.beside, width),
            width,
            done: Vec::new(),
            held: 0,
        }
    }

    /// Takes all rows of a file.
    fn add(&mut self, file: usize, source: &mut dyn BlockSource) -> Result<()> {
        let mut run = 0;
        let mut rest = Block::with_width(self.width, 0);
        while let Some(block) = source.next_block()? {
            rest.extend(&block, 0..block.len());
            if self.held + rest.len() >= self.most {
                self.move_to_file()?;
            }
            if rest.len() >= self.most {
                let rows = std::mem::replace(&mut rest, Block::with_width(self.width, 0));
                self.close(Place { file, run }, rows);
                self.move_to_file()?;
                run += 1;
            }
        }
        self.close(Place { file, run }, rest);
        Ok(())
    }

    /// Sorts the rows of a run, which stay in memory for now.
    fn close(&mut self, place: Place, mut rows: Block) {
        rows.sort_keeping_last();
        if let Some(&first) = rows.timestamps.first() {
            self.held += rows.len();
            self.done.push((place, first, Held::Memory(rows)));
        }
    }

    /// Writes away what is in memory.
    fn move_to_file(&mut self) -> Result<()> {
        for (_, _, held) in &mut self.done {
            if let Held::Memory(rows) = held {
                *held = Held::File(spill_run(rows, &mut self.spill)?);
            }
        }
        self.held = 0;
        Ok(())
    }

    /// All runs, to be merged.
    fn finish<'a>(self) -> Vec<Waiting<'a>> {
        let spill = Arc::new(self.spill);
        let source = |held| -> Box<dyn BlockSource + 'a> {
            match held {
                Held::Memory(rows) => Box::new(Rest(Some(rows))),
                Held::File(pieces) => Box::new(Run {
                    spill: spill.clone(),
                    pieces,
                }),
            }
        };
        let waiting = self.done.into_iter().map(|(place, first, held)| Waiting {
            first,
            place,
            rows: Rows::Run(source(held)),
        });
        waiting.collect()
    }
}

/// Writes sorted rows away; returns their pieces.
fn spill_run(rows: &Block, spill: &mut Spill) -> Result<Range<usize>> {
    let first = spill.len();
    for start in (0..rows.len()).step_by(PIECE) {
        let mut piece = Block::with_width(rows.columns.len(), PIECE);
        piece.extend(rows, start..(start + PIECE).min(rows.len()));
        spill.push(&piece)?;
    }
    Ok(first..spill.len())
}

/// A sorted run in a file.
struct Run {
    spill: Arc<Spill>,
    pieces: Range<usize>,
}

impl BlockSource for Run {
    fn next_block(&mut self) -> Result<Option<Block>> {
        self.pieces
            .next()
            .map(|piece| self.spill.get(piece))
            .transpose()
    }

    fn bytes_read(&self) -> u64 {
        0
    }
}

/// A run in memory.
struct Rest(Option<Block>);

impl BlockSource for Rest {
    fn next_block(&mut self) -> Result<Option<Block>> {
        Ok(self.0.take().filter(|block| block.len() > 0))
    }

    fn bytes_read(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ColumnSpec, Scale, Schema};
    use proptest::prelude::*;

    /// Blocks of some rows each.
    struct Blocks(Vec<Block>);

    impl BlockSource for Blocks {
        fn next_block(&mut self) -> Result<Option<Block>> {
            Ok(match self.0.is_empty() {
                true => None,
                false => Some(self.0.remove(0)),
            })
        }

        fn bytes_read(&self) -> u64 {
            0
        }
    }

    fn options() -> ReadOptions {
        ReadOptions::default().with_schema(Schema {
            columns: vec![ColumnSpec::new("x", Scale::Identity)],
            ..Schema::ohlcv()
        })
    }

    /// The rows of some files, given in blocks of this size.
    fn sorted(files: &[Block], block: usize, memory: usize) -> Block {
        let (dir, options) = (tempfile::tempdir().unwrap(), options());
        let scratch = Scratch {
            memory,
            beside: dir.path().into(),
        };
        let mut runs = Runs::new(1, &scratch);
        for (file, rows) in files.iter().enumerate() {
            let blocks = (0..rows.len()).step_by(block).map(|start| {
                let mut part = Block::with_width(1, block);
                part.extend(rows, start..(start + block).min(rows.len()));
                part
            });
            runs.add(file, &mut Blocks(blocks.collect())).unwrap();
        }
        let mut merged = Merge::of(runs.finish(), &options);
        let mut all = Block::with_width(1, 0);
        while let Some(block) = merged.next_block().unwrap() {
            all.extend(&block, 0..block.len());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        all
    }

    /// What the rule says of some files: the last row of each file, then a valid one, then the last file's.
    fn by_rule(files: &[Block]) -> Block {
        let mut best: std::collections::BTreeMap<i64, (bool, f64)> = Default::default();
        for rows in files {
            let mut rows = rows.clone();
            rows.sort_keeping_last();
            for (i, &time) in rows.timestamps.iter().enumerate() {
                let row = (rows.valid[i], rows.columns[0][i]);
                let held = best.entry(time).or_insert(row);
                if row.0 || !held.0 {
                    *held = row;
                }
            }
        }
        Block {
            timestamps: best.keys().copied().collect(),
            valid: best.values().map(|(valid, _)| *valid).collect(),
            columns: vec![best.values().map(|(_, x)| *x).collect()],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn runs_in_a_file_give_what_memory_gives(
            times in prop::collection::vec(0i64..30_000, 1..40_000),
            block in 1usize..9000,
        ) {
            let rows = Block {
                columns: vec![(0..times.len()).map(|i| i as f64).collect()],
                valid: (0..times.len()).map(|i| i % 3 != 0).collect(),
                timestamps: times,
            };
            let mut expected = rows.clone();
            expected.sort_keeping_last();
            let file = std::slice::from_ref(&rows);
            prop_assert!(sorted(file, block, usize::MAX) == expected);
            prop_assert!(sorted(file, block, 0) == expected);
            // Parts of it as files that overlap.
            let files: Vec<Block> = (0..rows.len()).step_by(1 + rows.len() / 3).map(|start| {
                let mut part = Block::with_width(1, 0);
                part.extend(&rows, start..(start + 1 + rows.len() / 3).min(rows.len()));
                part
            }).collect();
            let expected = by_rule(&files);
            for memory in [usize::MAX, 17 * 2 * 20_000, 0] {
                prop_assert!(sorted(&files, block, memory) == expected);
            }
        }
    }
}
