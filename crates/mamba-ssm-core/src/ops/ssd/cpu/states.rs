//! The states between chunks, and the gradients of them.

use std::ops::Range;

use rayon::prelude::*;

use super::chunk::{self, Place};
use super::{CHUNK, Scan, Sizes};
use crate::ops::native::lanes::{self, exp};
use crate::ops::native::product::{Left, Part, Product};
use crate::ops::native::rows::{Rows, RowsMut};
use crate::ops::native::{vectorized, with_scratch};

/// Rows of a state that one task carries over the chunks.
const ROWS: usize = 16;

/// What a chunk adds to the state, `[groups, state, row]`, and the logarithms of its decays, `[heads]`.
pub(super) fn added(
    scan: &Scan<'_>,
    batch: usize,
    tokens: Range<usize>,
    to: &mut [f32],
    totals: &mut [f32],
) {
    let place = Place { batch, tokens };
    let s = &scan.sizes;
    let (count, row) = (place.tokens.len(), s.row());
    let heads = s.heads * CHUNK;
    with_scratch([heads, heads, heads, CHUNK * row], |[dt, sums, left, x]| {
        vectorized(
            #[inline(always)]
            || {
                chunk::steps(scan, &place, dt, sums);
                chunk::to_end(&sums[..heads], left);
                for (left, dt) in left.iter_mut().zip(&*dt) {
                    *left *= dt;
                }
            },
        );
        for (head, total) in totals.iter_mut().enumerate() {
            *total = chunk::total(&sums[head * CHUNK..][..CHUNK]);
        }
        let x = &mut x[..count * row];
        for (group, to) in to.chunks_exact_mut(s.state * row).enumerate() {
            vectorized(
                #[inline(always)]
                || scaled(s, scan.x, &place, group, left, x),
            );
            let (b, stride) = scan.b.from(batch, place.tokens.start);
            Product {
                size: [s.state, count, row],
                left: Left::transposed(&b[group * s.state..], stride),
                right: (x, row),
                out: (to, row),
                part: Part::Full,
                add: false,
            }
            .run();
        }
    });
}

/// The gradient that a chunk's output leaves at the state before it, and the logarithms of its decays.
pub(super) fn read(
    scan: &Scan<'_>,
    batch: usize,
    tokens: Range<usize>,
    dy: Rows<'_>,
    to: &mut [f32],
    totals: &mut [f32],
) {
    let place = Place { batch, tokens };
    let s = &scan.sizes;
    let (count, row) = (place.tokens.len(), s.row());
    let heads = s.heads * CHUNK;
    with_scratch([heads, heads, heads, CHUNK * row], |[dt, sums, left, x]| {
        vectorized(
            #[inline(always)]
            || {
                chunk::steps(scan, &place, dt, sums);
                chunk::from_start(sums, left);
            },
        );
        for (head, total) in totals.iter_mut().enumerate() {
            *total = chunk::total(&sums[head * CHUNK..][..CHUNK]);
        }
        let x = &mut x[..count * row];
        for (group, to) in to.chunks_exact_mut(s.state * row).enumerate() {
            vectorized(
                #[inline(always)]
                || scaled(s, dy, &place, group, left, x),
            );
            let (c, stride) = scan.c.from(batch, place.tokens.start);
            Product {
                size: [s.state, count, row],
                left: Left::transposed(&c[group * s.state..], stride),
                right: (x, row),
                out: (to, row),
                part: Part::Full,
                add: false,
            }
            .run();
        }
    });
}

/// A group's rows, scaled by `[heads, CHUNK]`.
#[inline(always)]
fn scaled(s: &Sizes, rows: Rows<'_>, place: &Place, group: usize, by: &[f32], x: &mut [f32]) {
    chunk::load_heads(s, rows, place, group, x);
    let by = &by[group * s.per_group() * CHUNK..];
    let (row, head) = (s.row(), s.head());
    for (t, x) in x.chunks_exact_mut(row).enumerate() {
        for (h, x) in x.chunks_exact_mut(head).enumerate() {
            lanes::scale(x, by[h * CHUNK + t]);
        }
    }
}

/// Carries a state over chunks: `states`, `[chunks, batch, groups, state, row]`, holds what each chunk
/// adds and then what the state is before it (behind it, if the chunks are walked in reverse).
/// `carried`, `[batch, groups, state, row]`, is the state at the start and then at the end.
pub(super) fn carry(
    s: &Sizes,
    states: &mut [f32],
    totals: &[f32],
    carried: &mut [f32],
    reverse: bool,
) {
    let row = s.row();
    let chunks = totals.len() / (s.batch * s.heads);
    let states = RowsMut::new(states, s.batch * s.groups * s.state, row);
    let blocks = s.state.div_ceil(ROWS);
    carried
        .par_chunks_mut(s.state * row)
        .enumerate()
        .flat_map(|(plane, carried)| {
            carried
                .par_chunks_mut(ROWS * row)
                .enumerate()
                .map(move |(block, carried)| (plane * blocks + block, carried))
        })
        .for_each(|(task, carried)| {
            let (plane, first) = (task / blocks, task % blocks * ROWS);
            let (batch, group) = (plane / s.groups, plane % s.groups);
            let heads = (batch * s.heads + group * s.per_group(), s.per_group());
            vectorized(
                #[inline(always)]
                || {
                    for step in 0..chunks {
                        let chunk = if reverse { chunks - 1 - step } else { step };
                        let totals = &totals[chunk * s.batch * s.heads + heads.0..][..heads.1];
                        for (n, carried) in carried.chunks_exact_mut(row).enumerate() {
                            let at = plane * s.state + first + n;
                            // SAFETY: the row `at` of every chunk belongs to this task alone.
                            let state = unsafe { states.row(chunk, at, 0, row) };
                            exchange(s.head(), totals, state, carried);
                        }
                    }
                },
            );
        });
}

/// One row of a state and of what a chunk adds to it change places.
#[inline(always)]
fn exchange(head: usize, totals: &[f32], added: &mut [f32], carried: &mut [f32]) {
    let heads = added
        .chunks_exact_mut(head)
        .zip(carried.chunks_exact_mut(head));
    for ((added, carried), total) in heads.zip(totals) {
        let decay = exp(*total);
        for (added, carried) in added.iter_mut().zip(carried) {
            let before = *carried;
            *carried = before * decay + *added;
            *added = before;
        }
    }
}

/// `[batch, heads, headdim, state]` (none: zeros) as `[batch, groups, state, row]`.
pub(super) fn to_rows(tensor: Option<&[f32]>, s: &Sizes) -> Vec<f32> {
    let mut rows = vec![0.0; s.batch * s.states()];
    if let Some(tensor) = tensor {
        walk(s, |at, row| rows[row] = tensor[at]);
    }
    rows
}

/// The reverse of [`to_rows`].
pub(super) fn from_rows(rows: &[f32], s: &Sizes) -> Vec<f32> {
    let mut tensor = vec![0.0; s.batch * s.heads * s.headdim * s.state];
    walk(s, |at, row| tensor[at] = rows[row]);
    tensor
}

/// Calls `visit` with the places of every number of a state in both layouts.
fn walk(s: &Sizes, mut visit: impl FnMut(usize, usize)) {
    let (row, head) = (s.row(), s.head());
    for plane in 0..s.batch * s.groups {
        for h in 0..s.per_group() {
            for p in 0..s.headdim {
                let at = ((plane * s.per_group() + h) * s.headdim + p) * s.state;
                let to = plane * s.state * row + h * head + p;
                for n in 0..s.state {
                    visit(at + n, to + n * row);
                }
            }
        }
    }
}
