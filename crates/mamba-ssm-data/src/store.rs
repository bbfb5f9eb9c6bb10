//! All rows between reading and writing: in memory up to a bound, the rest in an unnamed file.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::Result;
use crate::schema::Scale;
use crate::shards::GROUP_ROWS;
use crate::source::Block;
use crate::spill::{Scratch, Spill, row_bytes};
use crate::transform::Moments;

/// Scaled rows (logarithms taken, nothing standardised yet), a row group at a time.
pub(crate) struct Store {
    scales: Vec<Scale>,
    /// Bytes that may be held in memory.
    budget: usize,
    /// The first groups, then the groups in the file, then the one that is being filled.
    held: Vec<Block>,
    in_file: Spill,
    filling: Block,
    /// Moments of the valid cells, per group and column.
    moments: Vec<Vec<Moments>>,
    rows: usize,
    time: Option<(i64, i64)>,
}

impl Store {
    /// An empty store. The folder of `scratch` is best on the device that the shards go to.
    pub(crate) fn new(scales: Vec<Scale>, scratch: &Scratch) -> Self {
        let filling = Block::with_width(scales.len(), GROUP_ROWS);
        Self {
            budget: scratch.memory,
            held: Vec::new(),
            in_file: Spill::new(&scratch.beside, scales.len()),
            scales,
            filling,
            moments: Vec::new(),
            rows: 0,
            time: None,
        }
    }

    /// Rows in the store.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// First and last timestamp; zeros without rows.
    pub(crate) fn time(&self) -> (i64, i64) {
        self.time.unwrap_or_default()
    }

    /// Number of groups, all of [`GROUP_ROWS`] rows but the last.
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }

    /// Whether some rows had to go to the file.
    #[cfg(test)]
    pub(crate) fn spilled(&self) -> bool {
        self.in_file.len() > 0
    }

    /// Adds rows at the end.
    pub(crate) fn push(&mut self, block: &Block) -> Result<()> {
        let Some((&first, &last)) = block.timestamps.first().zip(block.timestamps.last()) else {
            return Ok(());
        };
        self.time = Some((self.time.map_or(first, |t| t.0), last));
        let mut from = 0;
        while from < block.len() {
            let room = GROUP_ROWS - self.filling.len();
            let to = (from + room).min(block.len());
            self.filling.extend(block, from..to);
            if self.filling.len() == GROUP_ROWS {
                self.close_group()?;
            }
            from = to;
        }
        self.rows += block.len();
        Ok(())
    }

    /// Closes the last group.
    pub(crate) fn finish(&mut self) -> Result<()> {
        if self.filling.len() > 0 {
            self.close_group()?;
        }
        Ok(())
    }

    fn close_group(&mut self) -> Result<()> {
        let empty = Block::with_width(self.scales.len(), GROUP_ROWS);
        let mut group = std::mem::replace(&mut self.filling, empty);
        let valid = &group.valid;
        let moments = group
            .columns
            .par_iter_mut()
            .zip(&self.scales)
            .map(|(column, scale)| {
                column.iter_mut().for_each(|x| *x = scale.forward(*x));
                Moments::of_valid(column, valid)
            })
            .collect();
        self.moments.push(moments);
        let bytes = GROUP_ROWS * row_bytes(self.scales.len());
        if self.in_file.len() == 0 && (self.held.len() + 1) * bytes <= self.budget {
            self.held.push(group);
            return Ok(());
        }
        self.in_file.push(&group)
    }

    /// The rows of one group.
    pub(crate) fn group(&self, index: usize) -> Result<Cow<'_, Block>> {
        match self.held.get(index) {
            Some(group) => Ok(Cow::Borrowed(group)),
            None => self.in_file.get(index - self.held.len()).map(Cow::Owned),
        }
    }

    /// Moments of the valid cells of the first `rows` rows, per column.
    pub(crate) fn moments(&self, rows: usize) -> Result<Vec<Moments>> {
        let whole = rows / GROUP_ROWS;
        let mut total = vec![Moments::default(); self.scales.len()];
        for group in &self.moments[..whole] {
            for (sum, part) in total.iter_mut().zip(group) {
                *sum = sum.merge(*part);
            }
        }
        let rest = rows % GROUP_ROWS;
        if rest > 0 {
            let group = self.group(whole)?;
            for (sum, column) in total.iter_mut().zip(&group.columns) {
                *sum = sum.merge(Moments::of_valid(&column[..rest], &group.valid[..rest]));
            }
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(from: usize, rows: usize) -> Block {
        Block {
            timestamps: (from..from + rows).map(|i| i as i64 * 60).collect(),
            columns: vec![(from..from + rows).map(|i| 1.0 + (i % 97) as f64).collect(); 2],
            valid: (from..from + rows).map(|i| i % 13 != 0).collect(),
        }
    }

    #[test]
    fn rows_in_a_file_come_back_as_rows_in_memory_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = |budget| {
            let scratch = Scratch {
                memory: budget,
                beside: dir.path().into(),
            };
            let mut store = Store::new(vec![Scale::Log, Scale::Identity], &scratch);
            let mut at = 0;
            while at < 300_000 {
                store.push(&block(at, 10_007)).unwrap();
                at += 10_007;
            }
            store.finish().unwrap();
            store
        };
        let (memory, file) = (store(usize::MAX), store(2 << 20));
        assert!(!memory.spilled() && file.spilled());
        assert_eq!(memory.groups(), file.groups());
        for index in 0..memory.groups() {
            assert_eq!(*memory.group(index).unwrap(), *file.group(index).unwrap());
        }
        for rows in [0, 5, GROUP_ROWS, 200_000] {
            assert_eq!(memory.moments(rows).unwrap(), file.moments(rows).unwrap());
        }
        // Several threads at once, each at a place of its own.
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (memory, file) = (&memory, &file);
                scope.spawn(move || {
                    for index in (thread..thread + 200).map(|i| i % file.groups()) {
                        assert!(*memory.group(index).unwrap() == *file.group(index).unwrap());
                    }
                });
            }
        });
        assert_eq!(memory.time(), (0, (memory.rows() as i64 - 1) * 60));
        // A file without a name leaves nothing behind.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
