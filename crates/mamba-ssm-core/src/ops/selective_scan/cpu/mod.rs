//! The scan for Burn's Flex backend: slabs of channels in parallel, sixteen channels to a vector.
//!
//! A slab walks its sequence in chunks of tokens and each chunk in blocks of [`LANES`] channels, the
//! states of a block in the nearest cache. Backward, the states of a chunk are computed again from the
//! one before it. The gradients of B and C are summed over channels: each slab has its share, and the
//! shares are added in order, so results do not vary from run to run.

mod backward;
mod block;
mod forward;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::backend::{Forward, Gradients, Operands, ScanBackend};
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::zeros;

/// Tokens between two states that are kept.
const CHUNK: usize = 32;

/// Channels that one task walks.
const SLAB: usize = 64;

/// The operands of a call, read where they lie.
#[derive(Clone, Copy)]
struct Scan<'a> {
    /// `[batch, length, dim]`.
    u: Rows<'a>,
    delta: Rows<'a>,
    z: Option<Rows<'a>>,
    /// `[batch, length, groups * state]`.
    b: Rows<'a>,
    c: Rows<'a>,
    /// `[state, dim]`.
    a: &'a [f32],
    d: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    /// `[batch, dim, state]`.
    initial: Option<&'a [f32]>,
    batch: usize,
    length: usize,
    dim: usize,
    groups: usize,
    state: usize,
    softplus: bool,
}

/// What one task works on: channels of one group and one batch entry.
#[derive(Clone)]
struct Slab {
    batch: usize,
    group: usize,
    /// Its number within the group.
    number: usize,
    channels: Range<usize>,
}

impl Scan<'_> {
    fn chunks(&self) -> usize {
        self.length.div_ceil(CHUNK)
    }

    fn tokens(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..((chunk + 1) * CHUNK).min(self.length)
    }

    fn slabs_per_group(&self) -> usize {
        (self.dim / self.groups).div_ceil(SLAB)
    }

    fn tasks(&self) -> usize {
        self.batch * self.groups * self.slabs_per_group()
    }

    fn slab(&self, task: usize) -> Slab {
        let (plane, number) = (task / self.slabs_per_group(), task % self.slabs_per_group());
        let (batch, group) = (plane / self.groups, plane % self.groups);
        let per_group = self.dim / self.groups;
        let start = group * per_group;
        Slab {
            batch,
            group,
            number,
            channels: start + number * SLAB..start + ((number + 1) * SLAB).min(per_group),
        }
    }

    /// A group's row of B or C.
    #[inline(always)]
    fn group_row<'a>(&self, rows: Rows<'a>, slab: &Slab, token: usize) -> &'a [f32] {
        &rows.row(slab.batch, token)[slab.group * self.state..][..self.state]
    }
}

/// Operands whose storage can be read in place.
struct Prepared {
    u: FlexTensor,
    delta: FlexTensor,
    z: Option<FlexTensor>,
    b: FlexTensor,
    c: FlexTensor,
    a: Vec<f32>,
    d: Option<FlexTensor>,
    bias: Option<FlexTensor>,
    initial: Option<FlexTensor>,
    softplus: bool,
}

impl Prepared {
    fn new(operands: Operands<Flex>, softplus: bool) -> Self {
        let [dim, state] = operands.a.layout().shape().dims();
        let a = contiguous(operands.a);
        Self {
            u: with_whole_rows(operands.u),
            delta: with_whole_rows(operands.delta),
            z: operands.z.into_option().map(with_whole_rows),
            b: with_whole_rows(operands.b),
            c: with_whole_rows(operands.c),
            a: turned(elements(&a), dim, state),
            d: operands.d.into_option().map(contiguous),
            bias: operands.delta_bias.into_option().map(contiguous),
            initial: operands.initial_state.into_option().map(contiguous),
            softplus,
        }
    }

    fn scan(&self) -> Scan<'_> {
        let [batch, length, dim] = self.u.layout().shape().dims();
        let [_, _, groups, state] = self.b.layout().shape().dims();
        Scan {
            u: Rows::new(&self.u),
            delta: Rows::new(&self.delta),
            z: self.z.as_ref().map(Rows::new),
            b: Rows::new(&self.b),
            c: Rows::new(&self.c),
            a: &self.a,
            d: self.d.as_ref().map(elements),
            bias: self.bias.as_ref().map(elements),
            initial: self.initial.as_ref().map(elements),
            batch,
            length,
            dim,
            groups,
            state,
            softplus: self.softplus,
        }
    }
}

/// The transpose of `[rows, columns]`.
fn turned(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| from[row * columns + column]))
        .collect()
}

/// The sum of `parts` vectors that lie one behind the other, in order.
fn sum_parts(parts: &[f32], size: usize) -> Vec<f32> {
    let mut sum = vec![0.0; size];
    for part in parts.chunks_exact(size.max(1)) {
        sum.iter_mut()
            .zip(part)
            .for_each(|(sum, part)| *sum += part);
    }
    sum
}

impl ScanBackend for Flex {
    fn selective_scan_forward(
        operands: Operands<Self>,
        softplus: bool,
        keep: bool,
    ) -> Forward<Self> {
        let prepared = Prepared::new(operands, softplus);
        let scan = prepared.scan();
        let shape = [scan.batch, scan.length, scan.dim];
        let rows = scan.chunks() * scan.state;
        let mut y = zeros(shape.iter().product());
        let mut last = vec![0.0; scan.batch * scan.state * scan.dim];
        let mut states = vec![
            0.0;
            if keep {
                scan.batch * rows * scan.dim
            } else {
                0
            }
        ];
        {
            let y = RowsMut::new(&mut y, scan.length, scan.dim);
            let last = RowsMut::new(&mut last, scan.state, scan.dim);
            let states = keep.then(|| RowsMut::new(&mut states, rows, scan.dim));
            (0..scan.tasks()).into_par_iter().for_each(|task| {
                forward::walk(&scan, &scan.slab(task), &y, &last, states.as_ref());
            });
        }
        let final_state = last
            .chunks_exact(scan.state * scan.dim)
            .flat_map(|state| turned(state, scan.state, scan.dim))
            .collect();
        let kept = states.len();
        Forward {
            y: tensor(y, shape),
            final_state: tensor(final_state, [scan.batch, scan.dim, scan.state]),
            states: tensor(states, [kept]),
        }
    }

    fn selective_scan_backward(
        operands: Operands<Self>,
        states: FlexTensor,
        dy: FlexTensor,
        dfinal_state: FlexTensor,
        softplus: bool,
    ) -> Gradients<Self> {
        let prepared = Prepared::new(operands, softplus);
        let scan = prepared.scan();
        let (dy, dfinal_state) = (with_whole_rows(dy), contiguous(dfinal_state));
        let found = backward::backward(
            &scan,
            elements(&states),
            Rows::new(&dy),
            elements(&dfinal_state),
        );
        let wide = [scan.batch, scan.length, scan.dim];
        let narrow = [scan.batch, scan.length, scan.groups, scan.state];
        Gradients {
            u: tensor(found.u, wide),
            delta: tensor(found.delta, wide),
            a: tensor(found.a, [scan.dim, scan.state]),
            b: tensor(found.b, narrow),
            c: tensor(found.c, narrow),
            d: tensor(found.d, [scan.dim]),
            z: tensor(found.z, wide),
            delta_bias: tensor(found.bias, [scan.dim]),
            initial_state: tensor(found.initial, [scan.batch, scan.dim, scan.state]),
        }
    }
}
