//! The gradients of a chunk's operands, from the state before the chunk and the gradients of its output
//! and of the state behind it.
//!
//! With `s` the sums of a head, `w[j] = exp(s[last] - s[j])` and `G[i, j] = C[i] B[j] exp(s[i] - s[j])`:
//!
//! ```text
//! y[i] = sum_j G[i, j] dt[j] x[j] + exp(s[i]) h C[i] + D x[i]
//! after = exp(s[last]) h + sum_j w[j] dt[j] x[j] B[j]^T
//! ```

use std::ops::Range;

use super::chunk::{self, Place};
use super::outputs::{carried, decays, similarities};
use super::{CHUNK, Destinations, Scan, Sizes};
use crate::ops::native::lanes::{self, sigmoid};
use crate::ops::native::product::{Left, Part, Product};
use crate::ops::native::rows::{Rows, RowsMut};
use crate::ops::native::{LANES, padded, vectorized, with_scratch};

/// A chunk of one batch entry.
pub(super) struct Chunk<'a> {
    pub(super) batch: usize,
    pub(super) tokens: Range<usize>,
    /// The state before it, `[groups, state, row]`.
    pub(super) before: &'a [f32],
    /// The gradient of the state behind it.
    pub(super) after: &'a [f32],
    pub(super) dy: Rows<'a>,
}

/// Gradients of what has no length; every chunk has its share.
pub(super) struct Parts {
    /// `[heads]`.
    pub(super) a: Vec<f32>,
    /// `[heads]`.
    pub(super) bias: Vec<f32>,
    /// `[heads, headdim]`.
    pub(super) d: Vec<f32>,
}

impl Parts {
    pub(super) fn new(s: &Sizes) -> Self {
        Self {
            a: vec![0.0; s.heads],
            bias: vec![0.0; s.heads],
            d: vec![0.0; s.heads * s.headdim],
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        lanes::add_scaled(&mut self.a, &other.a, 1.0);
        lanes::add_scaled(&mut self.bias, &other.bias, 1.0);
        lanes::add_scaled(&mut self.d, &other.d, 1.0);
    }
}

/// Per head and token, `[heads, CHUNK]`.
struct Steps<'a> {
    dt: &'a mut [f32],
    sums: &'a mut [f32],
    /// `exp(s)`.
    from_start: &'a mut [f32],
    /// `w`.
    to_end: &'a mut [f32],
    /// Gradients of `dt`, the ways through `s` left out.
    ddt: &'a mut [f32],
    /// Gradients of `s`.
    dsums: &'a mut [f32],
}

/// A group's rows, `[CHUNK, row]` but for the last.
struct Wide<'a> {
    x: &'a mut [f32],
    dy: &'a mut [f32],
    dx: &'a mut [f32],
    /// Whatever has to be scaled or compared.
    work: &'a mut [f32],
    /// A state transposed, `[row, padded(state)]`, or x transposed, `[row, CHUNK]`.
    turned: &'a mut [f32],
}

/// A group's rows of B and C and their gradients, `[CHUNK, padded(state)]`.
struct Narrow<'a> {
    b: &'a mut [f32],
    c: &'a mut [f32],
    db: &'a mut [f32],
    dc: &'a mut [f32],
}

/// `[CHUNK, CHUNK]` each.
struct Squares<'a> {
    scores: &'a mut [f32],
    dscores: &'a mut [f32],
    weights: &'a mut [f32],
    dweights: &'a mut [f32],
}

/// Writes the gradients of what has a length to `to` and returns the others.
pub(super) fn gradients(scan: &Scan<'_>, chunk: &Chunk<'_>, to: &Destinations<'_>) -> Parts {
    let s = &scan.sizes;
    let (heads, wide, square) = (s.heads * CHUNK, CHUNK * s.row(), CHUNK * CHUNK);
    let narrow = CHUNK * padded(s.state);
    let turned = s.row() * padded(s.state).max(CHUNK);
    let lengths = [
        heads, heads, heads, heads, heads, heads, wide, wide, wide, wide, turned, narrow, narrow,
        narrow, narrow, square, square, square, square,
    ];
    with_scratch(lengths, |slices| {
        let [dt, sums, from_start, to_end, ddt, dsums, rest @ ..] = slices;
        let [
            x,
            dy,
            dx,
            work,
            turned,
            b,
            c,
            db,
            dc,
            scores,
            dscores,
            weights,
            dweights,
        ] = rest;
        let task = Task {
            scan,
            chunk,
            place: Place {
                batch: chunk.batch,
                tokens: chunk.tokens.clone(),
            },
            parts: Parts::new(s),
            steps: Steps {
                dt,
                sums,
                from_start,
                to_end,
                ddt,
                dsums,
            },
            wide: Wide {
                x,
                dy,
                dx,
                work,
                turned,
            },
            narrow: Narrow { b, c, db, dc },
            squares: Squares {
                scores,
                dscores,
                weights,
                dweights,
            },
        };
        task.run(to)
    })
}

struct Task<'a> {
    scan: &'a Scan<'a>,
    chunk: &'a Chunk<'a>,
    place: Place,
    parts: Parts,
    steps: Steps<'a>,
    wide: Wide<'a>,
    narrow: Narrow<'a>,
    squares: Squares<'a>,
}

impl Task<'_> {
    fn run(mut self, to: &Destinations<'_>) -> Parts {
        let s = self.scan.sizes;
        let steps = &mut self.steps;
        vectorized(
            #[inline(always)]
            || {
                chunk::steps(self.scan, &self.place, steps.dt, steps.sums);
                chunk::from_start(steps.sums, steps.from_start);
                chunk::to_end(&steps.sums[..s.heads * CHUNK], steps.to_end);
                steps.ddt.fill(0.0);
                steps.dsums.fill(0.0);
            },
        );
        for group in 0..s.groups {
            // `db` is free until the state behind has its turn.
            similarities(
                self.scan,
                &self.place,
                group,
                self.narrow.db,
                self.squares.scores,
            );
            vectorized(
                #[inline(always)]
                || self.load(group),
            );
            self.through_the_state_before(group);
            self.through_the_state_behind(group);
            vectorized(
                #[inline(always)]
                || {
                    let x = (&*self.wide.x, s.row());
                    let turned = (&mut *self.wide.turned, CHUNK);
                    let count = self.place.tokens.len();
                    lanes::transpose(x, turned, [count, s.row()]);
                    for row in self.wide.turned[..s.row() * CHUNK].chunks_exact_mut(CHUNK) {
                        row[count..].fill(0.0);
                    }
                    self.squares.dscores.fill(0.0);
                },
            );
            for head in 0..s.per_group() {
                self.inside(group, head);
            }
            self.through_the_scores();
            self.store(group, to);
        }
        vectorized(
            #[inline(always)]
            || self.finish(&to.dt),
        );
        self.parts
    }

    /// The group's operands into scratch memory.
    #[inline(always)]
    fn load(&mut self, group: usize) {
        let (scan, place) = (self.scan, &self.place);
        let stride = padded(scan.sizes.state);
        chunk::load_heads(&scan.sizes, scan.x, place, group, self.wide.x);
        chunk::load_heads(&scan.sizes, self.chunk.dy, place, group, self.wide.dy);
        chunk::load_states(&scan.sizes, scan.b, place, group, (self.narrow.b, stride));
        chunk::load_states(&scan.sizes, scan.c, place, group, (self.narrow.c, stride));
    }

    /// `exp(s[i]) h C[i]`: gradients of C and `s`.
    fn through_the_state_before(&mut self, group: usize) {
        let s = self.scan.sizes;
        let (count, row, state) = (self.place.tokens.len(), s.row(), padded(s.state));
        let before = &self.chunk.before[group * s.state * row..][..s.state * row];
        let at = group * s.per_group() * CHUNK;
        // Into dx, which is free until the other state's turn.
        carried(self.scan, &self.place, group, before, self.wide.dx);
        let Wide {
            dy,
            dx,
            work,
            turned,
            ..
        } = &mut self.wide;
        vectorized(
            #[inline(always)]
            || {
                let rows = count * row;
                chunk::scale_heads(
                    &s,
                    &dy[..rows],
                    &self.steps.from_start[at..],
                    &mut work[..rows],
                );
                add_dots(&s, &work[..rows], &dx[..rows], &mut self.steps.dsums[at..]);
                turn(&s, before, turned);
            },
        );
        Product {
            size: [count, row, state],
            left: Left::rows(work, row),
            right: (turned, state),
            out: (self.narrow.dc, state),
            part: Part::Full,
            add: false,
        }
        .run();
    }

    /// `after`: gradients of B, x, `dt` and `s`; of the skip beside them.
    fn through_the_state_behind(&mut self, group: usize) {
        let s = self.scan.sizes;
        let (count, row, state) = (self.place.tokens.len(), s.row(), padded(s.state));
        let states = group * s.state * row..(group + 1) * s.state * row;
        let (before, after) = (
            &self.chunk.before[states.clone()],
            &self.chunk.after[states],
        );
        Product {
            size: [count, s.state, row],
            left: Left::rows(self.narrow.b, state),
            right: (after, row),
            out: (self.wide.dx, row),
            part: Part::Full,
            add: false,
        }
        .run();
        vectorized(
            #[inline(always)]
            || {
                self.steps_behind(group, before, after);
                turn(&s, after, self.wide.turned);
            },
        );
        Product {
            size: [count, row, state],
            left: Left::rows(self.wide.work, row),
            right: (self.wide.turned, state),
            out: (self.narrow.db, state),
            part: Part::Full,
            add: false,
        }
        .run();
    }

    /// From `dx = B after`: its gradients of `dt` and `s`; then `dx` itself and, in `work`, x as it went
    /// into the state.
    #[inline(always)]
    fn steps_behind(&mut self, group: usize, before: &[f32], after: &[f32]) {
        let s = self.scan.sizes;
        let (row, head, count) = (s.row(), s.head(), self.place.tokens.len());
        for h in 0..s.per_group() {
            let number = group * s.per_group() + h;
            let at = number * CHUNK;
            let mut left = 0.0;
            for n in 0..s.state {
                let columns = n * row + h * head..n * row + (h + 1) * head;
                left += lanes::dot(&before[columns.clone()], &after[columns]);
            }
            let mut last = left * self.steps.from_start[at + CHUNK - 1];
            let d = self.scan.d.map(|d| &d[number * s.headdim..][..s.headdim]);
            let dd = &mut self.parts.d[number * s.headdim..][..s.headdim];
            for t in 0..count {
                let columns = t * row + h * head..t * row + (h + 1) * head;
                let (x, dy) = (
                    &self.wide.x[columns.clone()],
                    &self.wide.dy[columns.clone()],
                );
                let dx = &mut self.wide.dx[columns.clone()];
                let (to_end, dt) = (self.steps.to_end[at + t], self.steps.dt[at + t]);
                let through = lanes::dot(dx, x) * to_end;
                self.steps.ddt[at + t] += through;
                if t + 1 < count {
                    self.steps.dsums[at + t] -= through * dt;
                    last += through * dt;
                }
                lanes::scale_into(&mut self.wide.work[columns], x, to_end * dt);
                lanes::scale(dx, to_end * dt);
                if let Some(d) = d {
                    for ((dx, dy), d) in dx.iter_mut().zip(dy).zip(d) {
                        *dx += dy * d;
                    }
                }
                for ((dd, dy), x) in dd.iter_mut().zip(dy).zip(x) {
                    *dd += dy * x;
                }
            }
            self.steps.dsums[at + count - 1] += last;
        }
    }

    /// `G dt x` of one head.
    fn inside(&mut self, group: usize, h: usize) {
        let s = self.scan.sizes;
        let (row, head, count) = (s.row(), s.head(), self.place.tokens.len());
        let column = h * head;
        let squares = &mut self.squares;
        Product {
            size: [count, s.headdim, padded(count)],
            left: Left::rows(&self.wide.dy[column..], row),
            right: (&self.wide.turned[column * CHUNK..], CHUNK),
            out: (squares.dweights, CHUNK),
            part: Part::OutputUpTo,
            add: false,
        }
        .run();
        let at = (group * s.per_group() + h) * CHUNK;
        vectorized(
            #[inline(always)]
            || {
                unweigh(
                    count,
                    squares,
                    [
                        &self.steps.dt[at..][..CHUNK],
                        &self.steps.sums[at..][..CHUNK],
                    ],
                    &mut self.steps.ddt[at..][..CHUNK],
                    &mut self.steps.dsums[at..][..CHUNK],
                );
            },
        );
        Product {
            size: [count, count, head],
            left: Left::transposed(squares.weights, CHUNK),
            right: (&self.wide.dy[column..], row),
            out: (&mut self.wide.dx[column..], row),
            part: Part::InnerFrom,
            add: true,
        }
        .run();
    }

    /// `C B^T`: what all heads together ask of it.
    fn through_the_scores(&mut self) {
        let state = padded(self.scan.sizes.state);
        let count = self.place.tokens.len();
        Product {
            size: [count, count, state],
            left: Left::rows(self.squares.dscores, CHUNK),
            right: (self.narrow.b, state),
            out: (self.narrow.dc, state),
            part: Part::InnerUpTo,
            add: true,
        }
        .run();
        Product {
            size: [count, count, state],
            left: Left::transposed(self.squares.dscores, CHUNK),
            right: (self.narrow.c, state),
            out: (self.narrow.db, state),
            part: Part::InnerFrom,
            add: true,
        }
        .run();
    }

    fn store(&self, group: usize, to: &Destinations<'_>) {
        let s = &self.scan.sizes;
        let state = padded(s.state);
        // SAFETY: the chunk's tokens belong to this task.
        vectorized(
            #[inline(always)]
            || unsafe { chunk::store_heads(s, self.wide.dx, &self.place, group, &to.x) },
        );
        for (from, to) in [(&*self.narrow.db, &to.b), (&*self.narrow.dc, &to.c)] {
            let tokens = self.place.tokens.clone();
            for (token, from) in tokens.zip(from.chunks_exact(state)) {
                // SAFETY: as above.
                let to = unsafe { to.row(self.place.batch, token, group * s.state, s.state) };
                to.copy_from_slice(&from[..s.state]);
            }
        }
    }

    /// From the gradients of the sums to those of the steps, the rates and the biases.
    #[inline(always)]
    fn finish(&mut self, to: &RowsMut<'_>) {
        let (scan, count) = (self.scan, self.place.tokens.len());
        for head in 0..scan.sizes.heads {
            let at = head * CHUNK;
            // In f64: what one token gains another may lose.
            let (mut sum, mut da) = (0.0, 0.0);
            for t in (at..at + count).rev() {
                sum += f64::from(self.steps.dsums[t]);
                da += sum * f64::from(self.steps.dt[t]);
                self.steps.ddt[t] += sum as f32 * scan.a[head];
            }
            self.parts.a[head] += da as f32;
        }
        self.through_the_softplus();
        for (t, token) in self.place.tokens.clone().enumerate() {
            // SAFETY: the chunk's tokens belong to this task.
            let to = unsafe { to.row(self.place.batch, token, 0, scan.sizes.heads) };
            for (head, to) in to.iter_mut().enumerate() {
                *to = self.steps.ddt[head * CHUNK + t];
                self.parts.bias[head] += *to;
            }
        }
    }

    /// From the gradients of the steps to those of what they are made from.
    #[inline(always)]
    fn through_the_softplus(&mut self) {
        let (scan, s) = (self.scan, self.scan.sizes);
        let (low, high) = (scan.spec.limit.0 as f32, scan.spec.limit.1 as f32);
        // In the place of what no one reads any more.
        let raw = &mut self.steps.from_start[..s.heads * CHUNK];
        chunk::raw_steps(scan, &self.place, raw);
        let ddt = self.steps.ddt.as_chunks_mut::<LANES>().0;
        for (ddt, raw) in ddt.iter_mut().zip(raw.as_chunks().0) {
            let slopes = lanes::map(
                *raw,
                #[inline(always)]
                |raw| {
                    let (value, slope) = match scan.spec.softplus {
                        true => (lanes::softplus(raw), sigmoid(raw)),
                        false => (raw, 1.0),
                    };
                    let inside = value >= low && value <= high;
                    if inside { slope } else { 0.0 }
                },
            );
            *ddt = lanes::product(*ddt, slopes);
        }
    }
}

/// Adds the dots of two groups' rows, head by head, to `[per_group, CHUNK]`.
#[inline(always)]
fn add_dots(s: &Sizes, a: &[f32], b: &[f32], to: &mut [f32]) {
    let (row, head) = (s.row(), s.head());
    for (t, (a, b)) in a.chunks_exact(row).zip(b.chunks_exact(row)).enumerate() {
        for (h, (a, b)) in a.chunks_exact(head).zip(b.chunks_exact(head)).enumerate() {
            to[h * CHUNK + t] += lanes::dot(a, b);
        }
    }
}

/// A state `[state, row]` as `[row, padded(state)]`, zeros behind each row.
#[inline(always)]
fn turn(s: &Sizes, state: &[f32], to: &mut [f32]) {
    let stride = padded(s.state);
    lanes::transpose((state, s.row()), (to, stride), [s.state, s.row()]);
    if stride > s.state {
        for row in to[..s.row() * stride].chunks_exact_mut(stride) {
            row[s.state..].fill(0.0);
        }
    }
}

/// From the gradients of one head's weights, `dweights`, to those of the scores (added), of the steps and
/// of the sums; the weights are computed again.
#[inline(always)]
fn unweigh(
    count: usize,
    squares: &mut Squares<'_>,
    [dt, sums]: [&[f32]; 2],
    ddt: &mut [f32],
    dsums: &mut [f32],
) {
    let columns = padded(count);
    let (dts, _) = dt.as_chunks::<LANES>();
    let [mut decay, mut by_column] = [[[0.0; LANES]; CHUNK / LANES]; 2];
    for i in 0..count {
        let row = i * CHUNK..i * CHUNK + columns;
        let (scores, _) = squares.scores[row.clone()].as_chunks::<LANES>();
        let (dweights, _) = squares.dweights[row.clone()].as_chunks::<LANES>();
        let (dscores, _) = squares.dscores[row.clone()].as_chunks_mut::<LANES>();
        let (weights, _) = squares.weights[row].as_chunks_mut::<LANES>();
        let (used, rest) = weights.split_at_mut(i / LANES + 1);
        let mut by_row = [0.0; LANES];
        decays(sums, i, &mut decay);
        for (block, weights) in used.iter_mut().enumerate() {
            let (scores, decay, dt) = (scores[block], decay[block], dts[block]);
            let ddecayed = lanes::product(dweights[block], decay);
            let mut both = lanes::product(ddecayed, scores);
            *weights = lanes::product(lanes::product(scores, decay), dt);
            dscores[block] = lanes::sum(dscores[block], lanes::product(ddecayed, dt));
            if block == i / LANES {
                // A token does not decay on its way to itself. Left in, the two parts would cancel in
                // `dsums` and take the digits of the others with them.
                ddt[i] += both[i % LANES];
                both[i % LANES] = 0.0;
            }
            by_row = lanes::sum(by_row, lanes::product(both, dt));
            by_column[block] = lanes::sum(by_column[block], both);
        }
        rest.as_flattened_mut().fill(0.0);
        dsums[i] += lanes::total(by_row);
    }
    for ((by_column, dt), (ddt, dsums)) in by_column
        .as_flattened()
        .iter()
        .zip(dt)
        .zip(ddt.iter_mut().zip(dsums))
    {
        *ddt += by_column;
        *dsums -= by_column * dt;
    }
}
