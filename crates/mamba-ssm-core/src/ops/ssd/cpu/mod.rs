//! The scan for Burn's Flex backend: chunks in parallel, their products in vector registers.
//!
//! Forward, in segments of chunks: `states` computes what every chunk adds to the state and carries the
//! state over the chunks; `outputs` computes every chunk from the state before it. Backward the same, in
//! reverse: `states` carries the gradient of the state, `gradients` computes those of the operands.
//!
//! Inside, the channels of a group's heads lie side by side (each head padded to whole lanes) and a state
//! is stored `[state, channels]`: the products with B and C then run over all heads of a group at once.
//! The split of the work depends on shapes alone, so results do not vary from run to run.

mod chunk;
mod gradients;
mod outputs;
mod states;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::backend::{Forward, Gradients, Operands, Spec, SsdBackend};
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::{padded, working, zeros};

/// Tokens of a chunk.
const CHUNK: usize = 64;

/// Chunks whose states are in memory together when none has to be kept.
const SEGMENT: usize = 64;

/// The shape of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) heads: usize,
    pub(crate) headdim: usize,
    pub(crate) groups: usize,
    pub(crate) state: usize,
}

impl Sizes {
    fn per_group(&self) -> usize {
        self.heads / self.groups
    }

    /// Columns of a head in scratch rows.
    fn head(&self) -> usize {
        padded(self.headdim)
    }

    /// Columns of a group's heads in scratch rows.
    fn row(&self) -> usize {
        self.per_group() * self.head()
    }

    fn chunks(&self) -> usize {
        self.length.div_ceil(CHUNK)
    }

    fn tokens(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..((chunk + 1) * CHUNK).min(self.length)
    }

    /// Chunks of a segment.
    fn segment(&self) -> usize {
        SEGMENT.min(self.chunks())
    }

    /// Numbers in the states of one batch entry: `[groups, state, row]`.
    fn states(&self) -> usize {
        self.groups * self.state * self.row()
    }

    /// Numbers in the states of all chunks.
    pub(crate) fn all_states(&self) -> usize {
        self.chunks() * self.batch * self.states()
    }

    /// Numbers in the states of a segment's chunks.
    pub(crate) fn segment_states(&self) -> usize {
        self.segment() * self.batch * self.states()
    }
}

/// The operands of a call, read where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Scan<'a> {
    /// `[batch, length, heads * headdim]`.
    pub(crate) x: Rows<'a>,
    /// `[batch, length, groups * state]`.
    pub(crate) b: Rows<'a>,
    /// `[batch, length, groups * state]`.
    pub(crate) c: Rows<'a>,
    /// `[batch, length, heads]`.
    pub(crate) dt: Rows<'a>,
    /// `[heads]`.
    pub(crate) a: &'a [f32],
    /// `[heads, headdim]`.
    pub(crate) d: Option<&'a [f32]>,
    /// `[heads]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[batch, heads, headdim, state]`.
    pub(crate) initial: Option<&'a [f32]>,
    pub(crate) sizes: Sizes,
    pub(crate) spec: Spec,
}

/// Where the gradients of what has a length go; rows as those of the operands.
pub(crate) struct Destinations<'a> {
    pub(crate) x: RowsMut<'a>,
    pub(crate) b: RowsMut<'a>,
    pub(crate) c: RowsMut<'a>,
    pub(crate) dt: RowsMut<'a>,
}

/// The other gradients.
pub(crate) struct Found {
    pub(crate) a: Vec<f32>,
    pub(crate) d: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) initial: Vec<f32>,
}

/// Writes the output to `y`; returns the final state, `[batch, heads, headdim, state]`. `states` has room for
/// [`Sizes::all_states`], which are then those before the chunks for [`backward`], or for
/// [`Sizes::segment_states`].
pub(crate) fn forward(scan: &Scan<'_>, y: &RowsMut<'_>, states: &mut [f32]) -> Vec<f32> {
    let sizes = scan.sizes;
    let per_chunk = sizes.batch * sizes.states();
    let (chunks, segment) = (sizes.chunks(), sizes.segment());
    let keep = states.len() == sizes.all_states();
    let mut carried = states::to_rows(scan.initial, &sizes);
    let mut totals = vec![0.0; segment * sizes.batch * sizes.heads];
    for first in (0..chunks).step_by(SEGMENT) {
        let count = segment.min(chunks - first);
        let at = if keep { first * per_chunk } else { 0 };
        let states = &mut states[at..][..count * per_chunk];
        let totals = &mut totals[..count * sizes.batch * sizes.heads];
        states
            .par_chunks_mut(sizes.states())
            .zip(totals.par_chunks_mut(sizes.heads))
            .enumerate()
            .for_each(|(task, (states, totals))| {
                let (chunk, batch) = (first + task / sizes.batch, task % sizes.batch);
                states::added(scan, batch, sizes.tokens(chunk), states, totals);
            });
        states::carry(&sizes, states, totals, &mut carried, false);
        states
            .par_chunks(sizes.states())
            .enumerate()
            .for_each(|(task, before)| {
                let (chunk, batch) = (first + task / sizes.batch, task % sizes.batch);
                outputs::outputs(scan, batch, sizes.tokens(chunk), before, y);
            });
    }
    states::from_rows(&carried, &sizes)
}

/// The gradients, from the states that [`forward`] kept and the gradients of output and final state.
pub(crate) fn backward(
    scan: &Scan<'_>,
    states: &[f32],
    dy: Rows<'_>,
    dfinal_state: Option<&[f32]>,
    to: &Destinations<'_>,
) -> Found {
    let sizes = scan.sizes;
    let per_chunk = sizes.batch * sizes.states();
    let (chunks, segment) = (sizes.chunks(), sizes.segment());
    let mut after = working(sizes.segment_states());
    let mut carried = states::to_rows(dfinal_state, &sizes);
    let mut totals = vec![0.0; segment * sizes.batch * sizes.heads];
    let mut parts = gradients::Parts::new(&sizes);
    for first in (0..chunks).step_by(SEGMENT).rev() {
        let count = segment.min(chunks - first);
        let after = &mut after[..count * per_chunk];
        let totals = &mut totals[..count * sizes.batch * sizes.heads];
        after
            .par_chunks_mut(sizes.states())
            .zip(totals.par_chunks_mut(sizes.heads))
            .enumerate()
            .for_each(|(task, (after, totals))| {
                let (chunk, batch) = (first + task / sizes.batch, task % sizes.batch);
                states::read(scan, batch, sizes.tokens(chunk), dy, after, totals);
            });
        states::carry(&sizes, after, totals, &mut carried, true);
        let before = &states[first * per_chunk..][..count * per_chunk];
        let found: Vec<gradients::Parts> = after
            .par_chunks(sizes.states())
            .zip(before.par_chunks(sizes.states()))
            .enumerate()
            .map(|(task, (after, before))| {
                let (chunk, batch) = (first + task / sizes.batch, task % sizes.batch);
                let chunk = gradients::Chunk {
                    batch,
                    tokens: sizes.tokens(chunk),
                    before,
                    after,
                    dy,
                };
                gradients::gradients(scan, &chunk, to)
            })
            .collect();
        // In order, so that the last bits do not depend on which thread was first.
        for part in found {
            parts.add(&part);
        }
    }
    Found {
        a: parts.a,
        d: parts.d,
        bias: parts.bias,
        initial: states::from_rows(&carried, &sizes),
    }
}

/// Operands whose storage can be read in place.
struct Prepared {
    x: FlexTensor,
    b: FlexTensor,
    c: FlexTensor,
    dt: FlexTensor,
    a: FlexTensor,
    d: Option<FlexTensor>,
    bias: Option<FlexTensor>,
    initial: Option<FlexTensor>,
}

impl Prepared {
    fn new(operands: Operands<Flex>) -> Self {
        Self {
            x: with_whole_rows(operands.x),
            b: with_whole_rows(operands.b),
            c: with_whole_rows(operands.c),
            dt: with_whole_rows(operands.dt),
            a: contiguous(operands.a),
            d: operands.d.into_option().map(contiguous),
            bias: operands.dt_bias.into_option().map(contiguous),
            initial: operands.initial_state.into_option().map(contiguous),
        }
    }

    fn scan(&self, spec: Spec) -> Scan<'_> {
        let [batch, length, heads, headdim] = self.x.layout().shape().dims();
        let [_, _, groups, state] = self.b.layout().shape().dims();
        Scan {
            x: Rows::new(&self.x),
            b: Rows::new(&self.b),
            c: Rows::new(&self.c),
            dt: Rows::new(&self.dt),
            a: elements(&self.a),
            d: self.d.as_ref().map(elements),
            bias: self.bias.as_ref().map(elements),
            initial: self.initial.as_ref().map(elements),
            sizes: Sizes {
                batch,
                length,
                heads,
                headdim,
                groups,
                state,
            },
            spec,
        }
    }
}

impl SsdBackend for Flex {
    fn ssd_forward(operands: Operands<Self>, spec: Spec, keep: bool) -> Forward<Self> {
        let prepared = Prepared::new(operands);
        let scan = prepared.scan(spec);
        let s = scan.sizes;
        let width = s.heads * s.headdim;
        let mut y = zeros(s.batch * s.length * width);
        let rows = RowsMut::new(&mut y, s.length, width);
        let mut states = zeros(if keep { s.all_states() } else { 0 });
        let last = if keep {
            forward(&scan, &rows, &mut states)
        } else {
            forward(&scan, &rows, &mut working(s.segment_states()))
        };
        let kept = states.len();
        Forward {
            y: tensor(y, [s.batch, s.length, s.heads, s.headdim]),
            final_state: tensor(last, [s.batch, s.heads, s.headdim, s.state]),
            states: tensor(states, [kept]),
        }
    }

    fn ssd_backward(
        operands: Operands<Self>,
        states: FlexTensor,
        dy: FlexTensor,
        dfinal_state: FlexTensor,
        spec: Spec,
    ) -> Gradients<Self> {
        let prepared = Prepared::new(operands);
        let scan = prepared.scan(spec);
        let s = scan.sizes;
        let tokens = s.batch * s.length;
        let (wide, narrow) = (s.heads * s.headdim, s.groups * s.state);
        let mut dx = zeros(tokens * wide);
        let [mut db, mut dc] = [0, 1].map(|_| zeros(tokens * narrow));
        let mut ddt = zeros(tokens * s.heads);
        let to = Destinations {
            x: RowsMut::new(&mut dx, s.length, wide),
            b: RowsMut::new(&mut db, s.length, narrow),
            c: RowsMut::new(&mut dc, s.length, narrow),
            dt: RowsMut::new(&mut ddt, s.length, s.heads),
        };
        let dy = with_whole_rows(dy);
        let dfinal_state = contiguous(dfinal_state);
        let found = backward(
            &scan,
            elements(&states),
            Rows::new(&dy),
            Some(elements(&dfinal_state)),
            &to,
        );
        Gradients {
            x: tensor(dx, [s.batch, s.length, s.heads, s.headdim]),
            dt: tensor(ddt, [s.batch, s.length, s.heads]),
            a: tensor(found.a, [s.heads]),
            b: tensor(db, [s.batch, s.length, s.groups, s.state]),
            c: tensor(dc, [s.batch, s.length, s.groups, s.state]),
            d: tensor(found.d, [s.heads, s.headdim]),
            dt_bias: tensor(found.bias, [s.heads]),
            initial_state: tensor(found.initial, [s.batch, s.heads, s.headdim, s.state]),
        }
    }
}
