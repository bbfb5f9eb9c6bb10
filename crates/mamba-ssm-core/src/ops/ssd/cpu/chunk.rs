//! What every pass over a chunk begins with: its rows in scratch memory, its steps and their sums.

use std::ops::Range;

use super::{CHUNK, Scan, Sizes};
use crate::ops::native::lanes::{self, exp, softplus};
use crate::ops::native::rows::{Rows, RowsMut};

/// One chunk of one batch entry.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) batch: usize,
    pub(super) tokens: Range<usize>,
}

/// Fills `[heads, CHUNK]` with what the steps are made from, zero past the end.
#[inline(always)]
pub(super) fn raw_steps(scan: &Scan<'_>, place: &Place, to: &mut [f32]) {
    let (heads, count) = (scan.sizes.heads, place.tokens.len());
    for to in to.chunks_exact_mut(CHUNK).take(heads) {
        to[count..].fill(0.0);
    }
    for (t, token) in place.tokens.clone().enumerate() {
        for (head, value) in scan.dt.row(place.batch, token).iter().enumerate() {
            to[head * CHUNK + t] = value + scan.bias.map_or(0.0, |bias| bias[head]);
        }
    }
}

/// Fills `dt` and `sums`, both `[heads, CHUNK]`: the steps, zero past the end, and their cumulated
/// products with the rates.
#[inline(always)]
pub(super) fn steps(scan: &Scan<'_>, place: &Place, dt: &mut [f32], sums: &mut [f32]) {
    let heads = scan.sizes.heads;
    raw_steps(scan, place, dt);
    let (low, high) = (scan.spec.limit.0 as f32, scan.spec.limit.1 as f32);
    for head in 0..heads {
        let dt = &mut dt[head * CHUNK..][..CHUNK];
        if scan.spec.softplus {
            dt.as_chunks_mut()
                .0
                .iter_mut()
                .for_each(|dt| *dt = lanes::map(*dt, softplus));
        }
        for dt in dt.iter_mut() {
            *dt = dt.max(low).min(high);
        }
        dt[place.tokens.len()..].fill(0.0);
        // In f64: the sum may be large where its next steps are small.
        let (mut sum, rate) = (0.0, f64::from(scan.a[head]));
        for (sum_here, dt) in sums[head * CHUNK..][..CHUNK].iter_mut().zip(dt) {
            sum += f64::from(*dt) * rate;
            *sum_here = sum as f32;
        }
    }
}

/// The decay of the chunk as a logarithm, from a head's sums.
#[inline(always)]
pub(super) fn total(sums: &[f32]) -> f32 {
    // Steps past the end are zero, so the last sum is that of the last token.
    sums[CHUNK - 1]
}

/// `e^sums`: what is left, at each token, of the state before the chunk.
#[inline(always)]
pub(super) fn from_start(sums: &[f32], out: &mut [f32]) {
    for (out, sums) in out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0) {
        *out = lanes::map(*sums, exp);
    }
}

/// `e^(total - sums)`: what is left, at the chunk's end, of each token's addition.
#[inline(always)]
pub(super) fn to_end(sums: &[f32], out: &mut [f32]) {
    for (sums, out) in sums.chunks_exact(CHUNK).zip(out.chunks_exact_mut(CHUNK)) {
        let total = total(sums);
        for (out, sums) in out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0) {
            *out = lanes::map(
                *sums,
                #[inline(always)]
                |sum| exp(total - sum),
            );
        }
    }
}

/// A group's heads of x (or of its like), padded: `[tokens, row]`.
#[inline(always)]
pub(super) fn load_heads(
    sizes: &Sizes,
    rows: Rows<'_>,
    place: &Place,
    group: usize,
    to: &mut [f32],
) {
    let (headdim, head) = (sizes.headdim, sizes.head());
    let width = sizes.per_group() * headdim;
    let to = to.chunks_exact_mut(sizes.row());
    for (token, to) in place.tokens.clone().zip(to) {
        let from = &rows.row(place.batch, token)[group * width..][..width];
        if headdim == head {
            to.copy_from_slice(from);
            continue;
        }
        for (from, to) in from.chunks_exact(headdim).zip(to.chunks_exact_mut(head)) {
            to[..headdim].copy_from_slice(from);
            to[headdim..].fill(0.0);
        }
    }
}

/// The reverse of [`load_heads`].
///
/// # Safety
///
/// Nothing else may touch these tokens' elements of the group.
#[inline(always)]
pub(super) unsafe fn store_heads(
    sizes: &Sizes,
    from: &[f32],
    place: &Place,
    group: usize,
    rows: &RowsMut<'_>,
) {
    let (headdim, head) = (sizes.headdim, sizes.head());
    let width = sizes.per_group() * headdim;
    for (token, from) in place.tokens.clone().zip(from.chunks_exact(sizes.row())) {
        // SAFETY: the caller's promise.
        let to = unsafe { rows.row(place.batch, token, group * width, width) };
        for (from, to) in from.chunks_exact(head).zip(to.chunks_exact_mut(headdim)) {
            to.copy_from_slice(&from[..headdim]);
        }
    }
}

/// A group's rows of B or C, padded: `[tokens, stride]`.
#[inline(always)]
pub(super) fn load_states(
    sizes: &Sizes,
    rows: Rows<'_>,
    place: &Place,
    group: usize,
    (to, stride): (&mut [f32], usize),
) {
    let state = sizes.state;
    for (token, to) in place.tokens.clone().zip(to.chunks_exact_mut(stride)) {
        let from = &rows.row(place.batch, token)[group * state..][..state];
        to[..state].copy_from_slice(from);
        to[state..].fill(0.0);
    }
}

/// Scales the rows of a group's heads, `[tokens, row]`, by numbers `[per_group, CHUNK]`.
#[inline(always)]
pub(super) fn scale_heads(sizes: &Sizes, from: &[f32], by: &[f32], to: &mut [f32]) {
    let (row, head) = (sizes.row(), sizes.head());
    for (t, (from, to)) in from
        .chunks_exact(row)
        .zip(to.chunks_exact_mut(row))
        .enumerate()
    {
        for (h, (from, to)) in from
            .chunks_exact(head)
            .zip(to.chunks_exact_mut(head))
            .enumerate()
        {
            lanes::scale_into(to, from, by[h * CHUNK + t]);
        }
    }
}
