//! Forward pass of one tile of queries (FlashAttention-2, algorithm 1).

use std::ops::Range;

use super::simd::{Isa, Left, Real, dispatch};
use super::tile::{COLUMNS, Plane, ROWS, Sight, wide};

/// Memory of one worker.
pub(super) struct Scratch<T> {
    q: Vec<T>,
    keys: Vec<T>,
    values: Vec<T>,
    scores: Vec<T>,
    out: Vec<T>,
}

impl<T: Real> Scratch<T> {
    pub(super) fn new(dim: usize) -> Self {
        let zeros = |n| vec![T::ZERO; n];
        Self {
            q: zeros(ROWS * wide(dim)),
            keys: zeros(wide(dim) * COLUMNS),
            values: zeros(COLUMNS * wide(dim)),
            scores: zeros(ROWS * COLUMNS),
            out: zeros(ROWS * wide(dim)),
        }
    }
}

/// Queries, keys and values of one plane.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a, T> {
    pub(super) q: Plane<'a, T>,
    pub(super) k: Plane<'a, T>,
    pub(super) v: Plane<'a, T>,
    pub(super) sight: Sight<'a>,
}

dispatch! {
    /// Writes the outputs, `[rows, dim]`, and natural log-sum-exps of the queries `rows`.
    pub(super) fn forward<T>(
        inputs: &Inputs<'_, T>,
        rows: Range<usize>,
        scratch: &mut Scratch<T>,
        out: &mut [T],
        lse: &mut [T],
    ) = body
}

#[inline(always)]
fn body<T: Real, S: Isa>(
    inputs: &Inputs<'_, T>,
    rows: Range<usize>,
    scratch: &mut Scratch<T>,
    out: &mut [T],
    lse: &mut [T],
) {
    let Inputs { q, k, v, sight } = inputs;
    let (dim, wide) = (q.dim, wide(q.dim));
    let used = rows.len().next_multiple_of(8);
    // Base two throughout: its powers are cheaper and the factor goes into the queries.
    let factor = T::from_f64(sight.spec.scale * std::f64::consts::LOG2_E);
    q.pack(rows.clone(), factor, &mut scratch.q);
    scratch.out.fill(T::ZERO);
    let mut tops = [T::NEG_INFINITY; ROWS];
    let mut sums = [T::ZERO; ROWS];

    for start in sight.key_tiles(&rows) {
        let columns = start..(start + COLUMNS).min(sight.lk);
        k.pack_transposed(columns.clone(), &mut scratch.keys);
        v.pack(columns.clone(), T::ONE, &mut scratch.values);
        scratch.scores.fill(T::ZERO);
        let queries = Left::Rows(&scratch.q, wide);
        S::product(
            [used, dim, COLUMNS],
            queries,
            &scratch.keys,
            &mut scratch.scores,
        );
        sight.hide(&rows, &columns, &mut scratch.scores);
        for r in 0..used {
            let row: &mut [T; COLUMNS] = scratch.scores[r * COLUMNS..]
                .first_chunk_mut()
                .expect("a row of the tile");
            let rescale = online_softmax(row, &mut tops[r], &mut sums[r]);
            for value in &mut scratch.out[r * wide..(r + 1) * wide] {
                *value *= rescale;
            }
        }
        if let Some(dropout) = &sight.spec.dropout {
            sight.drop(dropout, &rows, &columns, &mut scratch.scores);
        }
        let weights = Left::Rows(&scratch.scores, COLUMNS);
        S::product(
            [used, columns.len(), wide],
            weights,
            &scratch.values,
            &mut scratch.out,
        );
    }

    for (r, out) in out.chunks_exact_mut(dim).enumerate() {
        let empty = sums[r] == T::ZERO;
        let share = if empty { T::ZERO } else { T::ONE / sums[r] };
        for (to, from) in out.iter_mut().zip(&scratch.out[r * wide..]) {
            *to = *from * share;
        }
        // Infinite for a row without keys: its probabilities come out as zeros in the backward pass.
        lse[r] = if empty {
            T::INFINITY
        } else {
            (tops[r] + sums[r].log2()) * T::from_f64(std::f64::consts::LN_2)
        };
    }
}

/// Turns scores into weights `2^(score - top)`, with the greatest score and the sum of weights so far
/// brought up to date. Returns the factor for what was summed before.
#[inline(always)]
fn online_softmax<T: Real>(row: &mut [T; COLUMNS], top: &mut T, sum: &mut T) -> T {
    let new = fold(row, *top, |a, b| if b > a { b } else { a });
    if new == T::NEG_INFINITY {
        row.fill(T::ZERO);
        return T::ONE;
    }
    // A loop of its own: one that adds up as well is taken number by number.
    for score in row.iter_mut() {
        *score = (*score - new).exp2();
    }
    let rescale = (*top - new).exp2();
    *sum = *sum * rescale + fold(row, T::ZERO, |a, b| a + b);
    *top = new;
    rescale
}

/// All numbers of a row, and `from`, through `f`: halves of the row until one number is left, so that no step
/// waits for the one before.
#[inline(always)]
fn fold<T: Real>(row: &[T; COLUMNS], from: T, f: impl Fn(T, T) -> T) -> T {
    let mut values = *row;
    let mut length = COLUMNS / 2;
    while length > 0 {
        let (low, high) = values.split_at_mut(length);
        for (low, high) in low.iter_mut().zip(high) {
            *low = f(*low, *high);
        }
        length /= 2;
    }
    f(from, values[0])
}
