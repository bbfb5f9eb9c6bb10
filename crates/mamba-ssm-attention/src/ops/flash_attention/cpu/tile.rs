//! Tiles of one plane (batch, head): packing, masking, dropout.

use std::ops::Range;

use super::simd::Real;
use crate::ops::flash_attention::{AttentionDropout, Spec, dropout};

/// Queries of a tile.
pub(super) const ROWS: usize = 64;
/// Keys of a tile.
pub(super) const COLUMNS: usize = 64;

/// One plane of a tensor, `[length, dim]`: any distance between tokens, features next to each other.
#[derive(Clone, Copy)]
pub(super) struct Plane<'a, T> {
    pub(super) values: &'a [T],
    pub(super) stride: usize,
    pub(super) dim: usize,
}

impl<'a, T: Real> Plane<'a, T> {
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> &'a [T] {
        &self.values[i * self.stride..][..self.dim]
    }

    /// Copies tokens into rows of `wide(dim)` features times `factor`; what lies beyond is zero.
    #[inline(always)]
    pub(super) fn pack(&self, tokens: Range<usize>, factor: T, into: &mut [T]) {
        let wide = wide(self.dim);
        into.fill(T::ZERO);
        for (row, i) in into.chunks_exact_mut(wide).zip(tokens) {
            for (to, from) in row.iter_mut().zip(self.row(i)) {
                *to = *from * factor;
            }
        }
    }

    /// Copies tokens into columns: row `c` holds feature `c` of [`COLUMNS`] tokens, zero beyond.
    #[inline(always)]
    pub(super) fn pack_transposed(&self, tokens: Range<usize>, into: &mut [T]) {
        into.fill(T::ZERO);
        for (n, i) in tokens.enumerate() {
            for (c, from) in self.row(i).iter().enumerate() {
                into[c * COLUMNS + n] = *from;
            }
        }
    }
}

/// Features of a packed row.
pub(super) fn wide(dim: usize) -> usize {
    dim.next_multiple_of(8)
}

/// Which positions of one plane are seen and kept.
#[derive(Clone, Copy)]
pub(super) struct Sight<'a> {
    pub(super) spec: &'a Spec,
    pub(super) lq: usize,
    pub(super) lk: usize,
    /// Index of the plane among all query planes, for dropout.
    pub(super) plane: usize,
    /// Padding of this plane's keys, nonzero at padding.
    pub(super) padding: Option<&'a [u8]>,
}

impl Sight<'_> {
    /// Starts of the key tiles that any of the queries `rows` sees.
    pub(super) fn key_tiles(&self, rows: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let keys = self.spec.visible_to_any(rows.clone(), self.lq, self.lk);
        (keys.start / COLUMNS * COLUMNS..keys.end).step_by(COLUMNS)
    }

    /// Whether any of the queries `rows` sees any of the keys `columns`, padding aside.
    pub(super) fn meet(&self, rows: &Range<usize>, columns: &Range<usize>) -> bool {
        let keys = self.spec.visible_to_any(rows.clone(), self.lq, self.lk);
        keys.start < columns.end && columns.start < keys.end
    }

    /// Sets what is not seen to minus infinity. `scores` is `[ROWS, COLUMNS]`; rows and columns past
    /// the ranges hold products with zeros and are hidden too.
    #[inline(always)]
    pub(super) fn hide<T: Real>(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
        scores: &mut [T],
    ) {
        let whole = columns.len() == COLUMNS;
        let first = self.spec.visible(rows.start, self.lq, self.lk);
        let last = self.spec.visible(rows.end - 1, self.lq, self.lk);
        // Both ends grow with the row, so the first row's end and the last one's start decide.
        let clear = whole && last.start <= columns.start && columns.end <= first.end;
        if !clear {
            for (i, row) in rows.clone().zip(scores.chunks_exact_mut(COLUMNS)) {
                let keys = self.spec.visible(i, self.lq, self.lk);
                let start = keys.start.clamp(columns.start, columns.end) - columns.start;
                let end = keys.end.clamp(columns.start, columns.end) - columns.start;
                row[..start].fill(T::NEG_INFINITY);
                row[end.max(start)..].fill(T::NEG_INFINITY);
            }
        }
        if let Some(padding) = self.padding {
            for row in scores.chunks_exact_mut(COLUMNS).take(rows.len()) {
                for (score, pad) in row.iter_mut().zip(&padding[columns.clone()]) {
                    if *pad != 0 {
                        *score = T::NEG_INFINITY;
                    }
                }
            }
        }
        for row in scores.chunks_exact_mut(COLUMNS).skip(rows.len()) {
            row.fill(T::NEG_INFINITY);
        }
    }

    /// Multiplies each value of a `[ROWS, COLUMNS]` tile by its dropout factor.
    #[inline(always)]
    pub(super) fn drop<T: Real>(
        &self,
        dropout: &AttentionDropout,
        rows: &Range<usize>,
        columns: &Range<usize>,
        tile: &mut [T],
    ) {
        let threshold = dropout::threshold(dropout);
        let factor = T::from_f64(1.0 / (1.0 - dropout.prob));
        let words = dropout::seed_words(dropout.seed);
        let mut keys = [0u32; COLUMNS];
        for (key, j) in keys.iter_mut().zip(columns.clone()) {
            *key = dropout::column_key(words, j);
        }
        for (i, row) in rows.clone().zip(tile.chunks_exact_mut(COLUMNS)) {
            let row_key = dropout::row_key(words, self.plane, i);
            for (value, key) in row.iter_mut().zip(&keys) {
                let kept = dropout::hash(row_key, *key) < threshold;
                *value *= if kept { factor } else { T::ZERO };
            }
        }
    }
}
