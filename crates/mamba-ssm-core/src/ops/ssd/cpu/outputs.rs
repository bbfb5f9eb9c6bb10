//! A chunk's output from the state before it.

use std::ops::Range;

use super::chunk::{self, Place};
use super::{CHUNK, Scan, Sizes};
use crate::ops::native::lanes::{self, Lanes, exp};
use crate::ops::native::product::{Left, Part, Product};
use crate::ops::native::rows::RowsMut;
use crate::ops::native::{LANES, padded, vectorized, with_scratch};

/// Writes the chunk's rows of `y`.
pub(super) fn outputs(
    scan: &Scan<'_>,
    batch: usize,
    tokens: Range<usize>,
    before: &[f32],
    y: &RowsMut<'_>,
) {
    let place = Place { batch, tokens };
    let s = &scan.sizes;
    let (heads, wide, square) = (s.heads * CHUNK, CHUNK * s.row(), CHUNK * CHUNK);
    let lengths = [
        heads,
        heads,
        heads,
        wide,
        wide,
        s.state * CHUNK,
        square,
        square,
    ];
    with_scratch(lengths, |[dt, sums, left, x, out, bt, scores, weights]| {
        vectorized(
            #[inline(always)]
            || {
                chunk::steps(scan, &place, dt, sums);
                chunk::from_start(sums, left);
            },
        );
        for group in 0..s.groups {
            let before = &before[group * s.state * s.row()..][..s.state * s.row()];
            similarities(scan, &place, group, bt, scores);
            vectorized(
                #[inline(always)]
                || chunk::load_heads(s, scan.x, &place, group, x),
            );
            carried(scan, &place, group, before, out);
            vectorized(
                #[inline(always)]
                || decay_and_skip(scan, group, place.tokens.len(), left, x, out),
            );
            for head in 0..s.per_group() {
                let at = (group * s.per_group() + head) * CHUNK;
                let (dt, sums) = (&dt[at..][..CHUNK], &sums[at..][..CHUNK]);
                vectorized(
                    #[inline(always)]
                    || weigh(place.tokens.len(), scores, dt, sums, weights),
                );
                inside(s, place.tokens.len(), head, weights, x, out);
            }
            // SAFETY: the chunk's tokens belong to this task.
            vectorized(
                #[inline(always)]
                || unsafe { chunk::store_heads(s, out, &place, group, y) },
            );
        }
    });
}

/// `scores[i, j] = C[i] B[j]`, rows of [`CHUNK`], up to the diagonal. `bt` holds B transposed.
pub(super) fn similarities(
    scan: &Scan<'_>,
    place: &Place,
    group: usize,
    bt: &mut [f32],
    scores: &mut [f32],
) {
    let s = &scan.sizes;
    let count = place.tokens.len();
    let columns = padded(count);
    let (b, stride) = scan.b.from(place.batch, place.tokens.start);
    let b = &b[group * s.state..];
    vectorized(
        #[inline(always)]
        || {
            lanes::transpose((b, stride), (bt, CHUNK), [count, s.state]);
            for bt in bt.chunks_exact_mut(CHUNK) {
                bt[count..columns].fill(0.0);
            }
        },
    );
    let (c, stride) = scan.c.from(place.batch, place.tokens.start);
    Product {
        size: [count, s.state, columns],
        left: Left::rows(&c[group * s.state..], stride),
        right: (bt, CHUNK),
        out: (scores, CHUNK),
        part: Part::OutputUpTo,
        add: false,
    }
    .run();
}

/// `C h`: what the state before the chunk gives each token, before its decay.
pub(super) fn carried(
    scan: &Scan<'_>,
    place: &Place,
    group: usize,
    before: &[f32],
    out: &mut [f32],
) {
    let s = &scan.sizes;
    let (c, stride) = scan.c.from(place.batch, place.tokens.start);
    Product {
        size: [place.tokens.len(), s.state, s.row()],
        left: Left::rows(&c[group * s.state..], stride),
        right: (before, s.row()),
        out: (out, s.row()),
        part: Part::Full,
        add: false,
    }
    .run();
}

/// `out = out * left + d * x`.
#[inline(always)]
fn decay_and_skip(
    scan: &Scan<'_>,
    group: usize,
    count: usize,
    left: &[f32],
    x: &[f32],
    out: &mut [f32],
) {
    let s = &scan.sizes;
    let (row, head, first) = (s.row(), s.head(), group * s.per_group());
    let rows = out
        .chunks_exact_mut(row)
        .zip(x.chunks_exact(row))
        .take(count);
    for (t, (out, x)) in rows.enumerate() {
        for (h, (out, x)) in out
            .chunks_exact_mut(head)
            .zip(x.chunks_exact(head))
            .enumerate()
        {
            let left = left[(first + h) * CHUNK + t];
            match scan.d {
                Some(d) => {
                    let d = &d[(first + h) * s.headdim..][..s.headdim];
                    for ((out, x), d) in out.iter_mut().zip(x).zip(d) {
                        *out = *out * left + d * x;
                    }
                }
                None => lanes::scale(out, left),
            }
        }
    }
}

/// `weights[i, j] = scores[i, j] exp(sums[i] - sums[j]) dt[j]` up to the diagonal, zeros above it.
#[inline(always)]
fn weigh(count: usize, scores: &[f32], dt: &[f32], sums: &[f32], weights: &mut [f32]) {
    let columns = padded(count);
    let (dt, _) = dt.as_chunks::<LANES>();
    let mut decay = [[0.0; LANES]; CHUNK / LANES];
    for i in 0..count {
        let (scores, _) = scores[i * CHUNK..][..columns].as_chunks::<LANES>();
        let (weights, _) = weights[i * CHUNK..][..columns].as_chunks_mut::<LANES>();
        let (used, rest) = weights.split_at_mut(i / LANES + 1);
        decays(sums, i, &mut decay);
        for (((weights, scores), decay), dt) in used.iter_mut().zip(scores).zip(&decay).zip(dt) {
            *weights = lanes::product(lanes::product(*scores, *decay), *dt);
        }
        rest.as_flattened_mut().fill(0.0);
    }
}

/// `exp(sums[row] - sums[j])` up to `row`, zeros behind it in its block; blocks behind that are left alone.
#[inline(always)]
pub(super) fn decays(sums: &[f32], row: usize, to: &mut [Lanes; CHUNK / LANES]) {
    let (sum, used) = (sums[row], row / LANES + 1);
    // Nothing but the exponential in this loop: with the cut at the row in it, or the products that follow,
    // the compiler computes half of the lanes one by one.
    for (to, sums) in to[..used].iter_mut().zip(sums.as_chunks().0) {
        *to = lanes::map(
            *sums,
            #[inline(always)]
            |other| exp(sum - other),
        );
    }
    to[..used].as_flattened_mut()[row + 1..].fill(0.0);
}

/// Adds `weights x` of one head to its columns.
fn inside(s: &Sizes, count: usize, head: usize, weights: &[f32], x: &[f32], out: &mut [f32]) {
    let column = head * s.head();
    Product {
        size: [count, count, s.head()],
        left: Left::rows(weights, CHUNK),
        right: (&x[column..], s.row()),
        out: (&mut out[column..], s.row()),
        part: Part::InnerUpTo,
        add: true,
    }
    .run();
}
