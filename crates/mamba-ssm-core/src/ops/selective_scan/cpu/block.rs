//! Up to [`LANES`] channels side by side.

use super::Scan;
use crate::ops::native::LANES;
use crate::ops::native::lanes::{self, Lanes, softplus};
use crate::ops::native::rows::{Rows, RowsMut};

/// Some channels of one batch entry; lanes past the last are zeros.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) batch: usize,
    pub(super) first: usize,
    pub(super) width: usize,
}

impl Block {
    /// The blocks of a range of channels.
    #[inline(always)]
    pub(super) fn all(
        batch: usize,
        channels: &std::ops::Range<usize>,
    ) -> impl Iterator<Item = Self> {
        let end = channels.end;
        channels.clone().step_by(LANES).map(move |first| Self {
            batch,
            first,
            width: LANES.min(end - first),
        })
    }

    /// The block's part of a row of all channels.
    #[inline(always)]
    pub(super) fn load(&self, row: &[f32]) -> Lanes {
        let row = &row[self.first..];
        if self.width == LANES
            && let Some(row) = row.first_chunk()
        {
            return *row;
        }
        let mut out = [0.0; LANES];
        out[..self.width].copy_from_slice(&row[..self.width]);
        out
    }

    /// The block's part of a token's row.
    #[inline(always)]
    pub(super) fn at(&self, rows: Rows<'_>, token: usize) -> Lanes {
        self.load(rows.row(self.batch, token))
    }

    /// Writes the block's part of a row.
    ///
    /// # Safety
    ///
    /// Nothing else may touch these channels of the row.
    #[inline(always)]
    pub(super) unsafe fn store(&self, rows: &RowsMut<'_>, row: usize, values: &Lanes) {
        // SAFETY: the caller's promise.
        let to = unsafe { rows.row(self.batch, row, self.first, self.width) };
        match to.first_chunk_mut() {
            Some(to) => *to = *values,
            None => to.copy_from_slice(&values[..self.width]),
        }
    }

    /// What a token's delta is before the softplus, and the step it makes.
    #[inline(always)]
    pub(super) fn step(&self, scan: &Scan<'_>, token: usize) -> (Lanes, Lanes) {
        let mut raw = self.at(scan.delta, token);
        if let Some(bias) = scan.bias {
            let bias = self.load(bias);
            for l in 0..LANES {
                raw[l] += bias[l];
            }
        }
        match scan.softplus {
            true => (raw, lanes::map(raw, softplus)),
            false => (raw, raw),
        }
    }

    /// The block's part of `[batch, dim, state]`, as `[state]` lanes.
    pub(super) fn state(&self, scan: &Scan<'_>, tensor: Option<&[f32]>, to: &mut [Lanes]) {
        for (n, to) in to.iter_mut().enumerate() {
            *to = [0.0; LANES];
            if let Some(tensor) = tensor {
                for (l, to) in to[..self.width].iter_mut().enumerate() {
                    *to = tensor[(self.batch * scan.dim + self.first + l) * scan.state + n];
                }
            }
        }
    }
}
