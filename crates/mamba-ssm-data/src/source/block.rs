//! Some rows on their way.

use crate::{Error, Result};

/// Some rows, in order of time, column by column.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Block {
    pub(crate) timestamps: Vec<i64>,
    pub(crate) columns: Vec<Vec<f64>>,
    pub(crate) valid: Vec<bool>,
}

impl Block {
    pub(crate) fn with_width(width: usize, rows: usize) -> Self {
        Self {
            timestamps: Vec::with_capacity(rows),
            columns: (0..width).map(|_| Vec::with_capacity(rows)).collect(),
            valid: Vec::with_capacity(rows),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.timestamps.len()
    }

    /// Copies rows of another block to the end.
    pub(crate) fn extend(&mut self, other: &Block, rows: std::ops::Range<usize>) {
        self.timestamps
            .extend_from_slice(&other.timestamps[rows.clone()]);
        self.valid.extend_from_slice(&other.valid[rows.clone()]);
        for (to, from) in self.columns.iter_mut().zip(&other.columns) {
            to.extend_from_slice(&from[rows.clone()]);
        }
    }

    /// Whether a row may stand in a window: true rows, and filled ones.
    pub(crate) fn is_usable(&self, row: usize) -> bool {
        self.valid[row] || self.columns.iter().all(|c| c[row].is_finite())
    }

    /// Sorts by time; of rows with the same timestamp the last one stays.
    pub(super) fn sort_keeping_last(&mut self) {
        if self.timestamps.windows(2).all(|w| w[0] < w[1]) {
            return;
        }
        let times = &self.timestamps;
        let mut order: Vec<usize> = (0..times.len()).collect();
        order.sort_by_key(|&i| times[i]);
        let mut kept: Vec<usize> = Vec::with_capacity(order.len());
        for row in order {
            match kept.last_mut() {
                Some(last) if times[*last] == times[row] => *last = row,
                _ => kept.push(row),
            }
        }
        for column in &mut self.columns {
            *column = kept.iter().map(|&i| column[i]).collect();
        }
        self.valid = kept.iter().map(|&i| self.valid[i]).collect();
        self.timestamps = kept.iter().map(|&i| self.timestamps[i]).collect();
    }
}

/// Anything that gives rows, a block at a time.
pub(crate) trait BlockSource {
    /// The next rows; `None` at the end. Blocks are never empty.
    fn next_block(&mut self) -> Result<Option<Block>>;

    /// Bytes of the source read so far.
    fn bytes_read(&self) -> u64;
}

impl<S: BlockSource + ?Sized> BlockSource for Box<S> {
    fn next_block(&mut self) -> Result<Option<Block>> {
        (**self).next_block()
    }

    fn bytes_read(&self) -> u64 {
        (**self).bytes_read()
    }
}

/// Refuses timestamps that do not rise. `first_row` is the number of the block's first row.
pub(super) fn check_order(
    path: &str,
    first_row: u64,
    last: Option<i64>,
    timestamps: &[i64],
) -> Result<()> {
    let mut previous = last;
    for (row, &current) in (first_row..).zip(timestamps) {
        if let Some(previous) = previous.filter(|&p| p >= current) {
            return Err(Error::OutOfOrder {
                path: path.into(),
                row,
                previous,
                current,
            });
        }
        previous = Some(current);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorting_keeps_the_last_of_each_timestamp() {
        let mut block = Block {
            timestamps: vec![120, 60, 120, 180],
            valid: vec![true, true, false, true],
            columns: vec![vec![1.0, 2.0, 3.0, 4.0]; 2],
        };
        block.sort_keeping_last();
        assert_eq!(block.timestamps, [60, 120, 180]);
        assert_eq!(block.columns[1], [2.0, 3.0, 4.0]);
        assert_eq!(block.valid, [true, false, true]);
    }
}
