//! A file whose rows come in any order.

use std::ops::Range;
use std::sync::Arc;

use super::merge::Merge;
use super::{Block, BlockSource, ReadOptions};
use crate::Result;
use crate::spill::{Scratch, Spill, row_bytes};

/// Rows of a run that are read back at once.
const PIECE: usize = 1 << 12;

/// The rows of a file in order of time; of rows with the same timestamp the last one in the file stays.
///
/// As many rows as fit into memory are sorted at a time; those runs wait in a file and are merged.
pub(super) struct Sorted<'a> {
    source: Box<dyn BlockSource + 'a>,
    options: &'a ReadOptions,
    scratch: Scratch,
    /// The sorted runs, once all rows have been read.
    runs: Option<Merge<'a>>,
}

impl<'a> Sorted<'a> {
    pub(super) fn new(
        source: Box<dyn BlockSource + 'a>,
        options: &'a ReadOptions,
        scratch: &Scratch,
    ) -> Self {
        Self {
            source,
            options,
            scratch: scratch.clone(),
            runs: None,
        }
    }

    /// Reads all rows and sorts them, a run at a time.
    fn sort(&mut self) -> Result<Merge<'a>> {
        let width = self.options.schema.columns.len();
        // The order of the rows and the column that is being put in order take about as much again.
        let most = (self.scratch.memory / (2 * row_bytes(width))).max(PIECE);
        let mut spill = Spill::new(&self.scratch.beside, width);
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut rest = Block::with_width(width, 0);
        while let Some(block) = self.source.next_block()? {
            rest.extend(&block, 0..block.len());
            if rest.len() >= most {
                runs.push(spill_run(&mut rest, &mut spill)?);
            }
        }
        rest.sort_keeping_last();
        let spill = Arc::new(spill);
        let mut sources: Vec<Box<dyn BlockSource + 'a>> = Vec::with_capacity(runs.len() + 1);
        for pieces in runs {
            let spill = spill.clone();
            sources.push(Box::new(Run { spill, pieces }));
        }
        sources.push(Box::new(Rest(Some(rest))));
        Merge::of_runs(sources, self.options)
    }
}

impl BlockSource for Sorted<'_> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        if self.runs.is_none() {
            self.runs = Some(self.sort()?);
        }
        match &mut self.runs {
            Some(runs) => runs.next_block(),
            None => Ok(None),
        }
    }

    fn bytes_read(&self) -> u64 {
        self.source.bytes_read()
    }
}

/// Sorts some rows and writes them away; returns their pieces.
fn spill_run(rows: &mut Block, spill: &mut Spill) -> Result<Range<usize>> {
    rows.sort_keeping_last();
    let first = spill.len();
    for start in (0..rows.len()).step_by(PIECE) {
        let mut piece = Block::with_width(rows.columns.len(), PIECE);
        piece.extend(rows, start..(start + PIECE).min(rows.len()));
        spill.push(&piece)?;
    }
    *rows = Block::with_width(rows.columns.len(), 0);
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

/// The run that was in memory when the file ended.
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

    fn sorted(rows: &Block, block: usize, memory: usize) -> Block {
        let (dir, options) = (tempfile::tempdir().unwrap(), options());
        let blocks = (0..rows.len()).step_by(block).map(|start| {
            let mut part = Block::with_width(1, block);
            part.extend(rows, start..(start + block).min(rows.len()));
            part
        });
        let scratch = Scratch {
            memory,
            beside: dir.path().into(),
        };
        let source = Box::new(Blocks(blocks.collect()));
        let mut sorted = Sorted::new(source, &options, &scratch);
        let mut all = Block::with_width(1, 0);
        while let Some(block) = sorted.next_block().unwrap() {
            all.extend(&block, 0..block.len());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        all
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
            prop_assert!(sorted(&rows, block, usize::MAX) == expected);
            prop_assert!(sorted(&rows, block, 0) == expected);
        }
    }
}
