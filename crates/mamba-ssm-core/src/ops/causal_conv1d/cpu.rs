//! The convolution for Burn's Flex backend: blocks of tokens in parallel, channels in vector registers.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::backend::{ConvBackend, Gradients, Operands};
use crate::ops::native::lanes::{add_scaled, silu, silu_slope};
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::{vectorized, with_scratch, zeros};

/// Tokens that one task convolves.
const BLOCK: usize = 64;

/// The operands of a call, read where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Conv<'a> {
    /// `[batch, length, channels]`.
    pub(crate) x: Rows<'a>,
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) channels: usize,
    /// `[width, channels]`: see [`taps`].
    pub(crate) taps: &'a [f32],
    /// `[channels]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[batch, width - 1, channels]`.
    pub(crate) initial: Option<Rows<'a>>,
    pub(crate) activation: bool,
}

/// The gradients of what has no length.
pub(crate) struct Found {
    /// `[channels, width]`.
    pub(crate) weight: Vec<f32>,
    /// `[channels]`.
    pub(crate) bias: Vec<f32>,
}

/// A weight `[channels, width]` as `[width, channels]`.
pub(crate) fn taps(weight: &[f32], channels: usize) -> Vec<f32> {
    turned(weight, channels, weight.len() / channels.max(1))
}

/// The transpose of `[rows, columns]`.
fn turned(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| from[row * columns + column]))
        .collect()
}

impl Conv<'_> {
    fn width(&self) -> usize {
        self.taps.len() / self.channels
    }

    fn blocks(&self) -> usize {
        self.length.div_ceil(BLOCK)
    }

    fn block(&self, task: usize) -> (usize, Range<usize>) {
        let (batch, block) = (task / self.blocks(), task % self.blocks());
        (batch, block * BLOCK..((block + 1) * BLOCK).min(self.length))
    }

    /// The row that tap `k` meets at a token; none where only zeros were before the first.
    #[inline(always)]
    fn seen(&self, batch: usize, token: usize, k: usize) -> Option<&[f32]> {
        let before = self.width() - 1;
        match (token + k).checked_sub(before) {
            Some(token) => Some(self.x.row(batch, token)),
            None => self.initial.map(|initial| initial.row(batch, token + k)),
        }
    }

    /// The sum before the activation.
    #[inline(always)]
    fn sum(&self, batch: usize, token: usize, out: &mut [f32]) {
        match self.bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(0.0),
        }
        for (k, tap) in self.taps.chunks_exact(self.channels).enumerate() {
            if let Some(row) = self.seen(batch, token, k) {
                for ((out, x), tap) in out.iter_mut().zip(row).zip(tap) {
                    *out += x * tap;
                }
            }
        }
    }

    /// Writes the output.
    pub(crate) fn forward(&self, y: &RowsMut<'_>) {
        (0..self.batch * self.blocks())
            .into_par_iter()
            .for_each(|task| {
                let (batch, tokens) = self.block(task);
                vectorized(
                    #[inline(always)]
                    || {
                        for token in tokens {
                            // SAFETY: the token belongs to this task.
                            let out = unsafe { y.row(batch, token, 0, self.channels) };
                            self.sum(batch, token, out);
                            if self.activation {
                                out.iter_mut().for_each(|out| *out = silu(*out));
                            }
                        }
                    },
                );
            });
    }

    /// Writes the gradients of `x` and, where it is asked for, of the initial state.
    pub(crate) fn backward(
        &self,
        dy: Rows<'_>,
        dx: &RowsMut<'_>,
        dinitial: Option<&RowsMut<'_>>,
    ) -> Found {
        let weights = self.taps.len();
        let mut parts: Vec<Vec<f32>> = (0..self.batch * self.blocks())
            .into_par_iter()
            .map(|task| {
                let (batch, tokens) = self.block(task);
                let mut part = vec![0.0; weights + self.channels];
                let rows = (BLOCK + self.width() - 1) * self.channels;
                with_scratch([rows], |[dsums]| {
                    vectorized(
                        #[inline(always)]
                        || {
                            self.dsums(batch, &tokens, dy, dsums);
                            self.parameters(batch, &tokens, dsums, &mut part);
                            self.inputs(batch, &tokens, dsums, dx);
                            if let (0, Some(dinitial)) = (tokens.start, dinitial) {
                                self.past(batch, dsums, dinitial);
                            }
                        },
                    );
                });
                part
            })
            .collect();
        // In order, so that the last bits do not depend on which thread was first.
        let mut sum = vec![0.0; weights + self.channels];
        parts
            .drain(..)
            .for_each(|part| add_scaled(&mut sum, &part, 1.0));
        let bias = sum.split_off(weights);
        Found {
            weight: turned(&sum, self.width(), self.channels),
            bias,
        }
    }

    /// The gradients of the sums of some tokens and of the `width - 1` behind them (zeros past the end).
    #[inline(always)]
    fn dsums(&self, batch: usize, tokens: &Range<usize>, dy: Rows<'_>, to: &mut [f32]) {
        let all = tokens.start..tokens.end + self.width() - 1;
        for (token, to) in all.zip(to.chunks_exact_mut(self.channels)) {
            if token >= self.length {
                to.fill(0.0);
                continue;
            }
            let dy = dy.row(batch, token);
            if self.activation {
                self.sum(batch, token, to);
                for (to, dy) in to.iter_mut().zip(dy) {
                    *to = dy * silu_slope(*to);
                }
            } else {
                to.copy_from_slice(dy);
            }
        }
    }

    /// The share of some tokens in the gradients of taps and bias.
    #[inline(always)]
    fn parameters(&self, batch: usize, tokens: &Range<usize>, dsums: &[f32], part: &mut [f32]) {
        let (taps, bias) = part.split_at_mut(self.taps.len());
        for (token, dsum) in tokens.clone().zip(dsums.chunks_exact(self.channels)) {
            add_scaled(bias, dsum, 1.0);
            for (k, tap) in taps.chunks_exact_mut(self.channels).enumerate() {
                if let Some(row) = self.seen(batch, token, k) {
                    for ((tap, x), dsum) in tap.iter_mut().zip(row).zip(dsum) {
                        *tap += x * dsum;
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn inputs(&self, batch: usize, tokens: &Range<usize>, dsums: &[f32], dx: &RowsMut<'_>) {
        for token in tokens.clone() {
            // SAFETY: the token belongs to this task.
            let dx = unsafe { dx.row(batch, token, 0, self.channels) };
            dx.fill(0.0);
            // Tap k met this token `width - 1 - k` tokens later.
            for (k, tap) in self.taps.chunks_exact(self.channels).enumerate() {
                let row = token - tokens.start + self.width() - 1 - k;
                let dsum = &dsums[row * self.channels..][..self.channels];
                for ((dx, dsum), tap) in dx.iter_mut().zip(dsum).zip(tap) {
                    *dx += dsum * tap;
                }
            }
        }
    }

    /// The gradient of the initial state, from those of the first tokens' sums.
    #[inline(always)]
    fn past(&self, batch: usize, dsums: &[f32], dinitial: &RowsMut<'_>) {
        for j in 0..self.width() - 1 {
            // SAFETY: the batch entry's past belongs to the task of its first block.
            let to = unsafe { dinitial.row(batch, j, 0, self.channels) };
            to.fill(0.0);
            // Tap k of token j - k.
            for (k, tap) in self
                .taps
                .chunks_exact(self.channels)
                .take(j + 1)
                .enumerate()
            {
                let dsum = &dsums[(j - k) * self.channels..][..self.channels];
                for ((to, dsum), tap) in to.iter_mut().zip(dsum).zip(tap) {
                    *to += dsum * tap;
                }
            }
        }
    }
}

/// Operands whose storage can be read in place.
struct Prepared {
    x: FlexTensor,
    taps: Vec<f32>,
    bias: Option<FlexTensor>,
    initial: Option<FlexTensor>,
}

impl Prepared {
    fn new(operands: Operands<Flex>) -> Self {
        let [channels, _] = operands.weight.layout().shape().dims();
        let weight = contiguous(operands.weight);
        Self {
            x: with_whole_rows(operands.x),
            taps: taps(elements(&weight), channels),
            bias: operands.bias.into_option().map(contiguous),
            initial: operands.initial_state.into_option().map(with_whole_rows),
        }
    }

    fn conv(&self, activation: bool) -> Conv<'_> {
        let [batch, length, channels] = self.x.layout().shape().dims();
        Conv {
            x: Rows::new(&self.x),
            batch,
            length,
            channels,
            taps: &self.taps,
            bias: self.bias.as_ref().map(elements),
            initial: self.initial.as_ref().map(Rows::new),
            activation,
        }
    }
}

impl ConvBackend for Flex {
    fn causal_conv1d_forward(operands: Operands<Self>, activation: bool) -> FlexTensor {
        let prepared = Prepared::new(operands);
        let conv = prepared.conv(activation);
        let shape = [conv.batch, conv.length, conv.channels];
        let mut y = zeros(shape.iter().product());
        conv.forward(&RowsMut::new(&mut y, conv.length, conv.channels));
        tensor(y, shape)
    }

    fn causal_conv1d_backward(
        operands: Operands<Self>,
        dy: FlexTensor,
        activation: bool,
    ) -> Gradients<Self> {
        let prepared = Prepared::new(operands);
        let conv = prepared.conv(activation);
        let (shape, width) = ([conv.batch, conv.length, conv.channels], conv.width());
        let mut dx = zeros(shape.iter().product());
        let past = [conv.batch, (width - 1).max(1), conv.channels];
        let mut dinitial = vec![0.0; past.iter().product()];
        let dy = with_whole_rows(dy);
        let found = conv.backward(
            Rows::new(&dy),
            &RowsMut::new(&mut dx, conv.length, conv.channels),
            Some(&RowsMut::new(&mut dinitial, past[1], conv.channels)),
        );
        Gradients {
            x: tensor(dx, shape),
            weight: tensor(found.weight, [conv.channels, width]),
            bias: tensor(found.bias, [conv.channels]),
            initial_state: tensor(dinitial, past),
        }
    }
}
