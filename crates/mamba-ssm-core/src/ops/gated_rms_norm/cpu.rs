//! The norm for Burn's Flex backend: blocks of tokens in parallel, channels in vector registers.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::backend::{Gradients, NormBackend, Operands, Spec};
use crate::ops::native::lanes::{add_scaled, dot, sigmoid};
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::{vectorized, with_scratch, zeros};

/// Tokens that one task normalises.
const BLOCK: usize = 64;

/// The operands of a call, read where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// `[batch, length, dim]`.
    pub(crate) x: Rows<'a>,
    /// `[batch, length, dim]`.
    pub(crate) z: Option<Rows<'a>>,
    /// `[dim]`.
    pub(crate) weight: &'a [f32],
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) spec: Spec,
}

/// Working rows of a token, `[dim]` each.
struct Token<'a> {
    /// `silu(z)`.
    gate: &'a mut [f32],
    /// Its derivative.
    slope: &'a mut [f32],
    /// What is normalised.
    value: &'a mut [f32],
    /// The gradient of what is normalised.
    dvalue: &'a mut [f32],
}

impl Norm<'_> {
    fn dim(&self) -> usize {
        self.weight.len()
    }

    fn blocks(&self) -> usize {
        self.length.div_ceil(BLOCK)
    }

    fn block(&self, task: usize) -> (usize, Range<usize>) {
        let (batch, block) = (task / self.blocks(), task % self.blocks());
        (batch, block * BLOCK..((block + 1) * BLOCK).min(self.length))
    }

    /// `1 / sqrt(mean(value^2) + eps)`.
    #[inline(always)]
    fn inverse(&self, value: &[f32]) -> f32 {
        let mean_square = dot(value, value) / value.len() as f32;
        1.0 / (mean_square + self.spec.eps as f32).sqrt()
    }

    /// Writes the output.
    pub(crate) fn forward(&self, y: &RowsMut<'_>) {
        let dim = self.dim();
        (0..self.batch * self.blocks())
            .into_par_iter()
            .for_each(|task| {
                let (batch, tokens) = self.block(task);
                with_scratch([dim, dim], |[gate, value]| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for token in tokens {
                                // SAFETY: the token belongs to this task.
                                let y = unsafe { y.row(batch, token, 0, dim) };
                                self.token(batch, token, &mut gate[..dim], &mut value[..dim], y);
                            }
                        },
                    );
                });
            });
    }

    #[inline(always)]
    fn token(
        &self,
        batch: usize,
        token: usize,
        gate: &mut [f32],
        value: &mut [f32],
        y: &mut [f32],
    ) {
        let group = self.spec.group;
        self.values(batch, token, gate, None, value);
        let rows = y.chunks_exact_mut(group).zip(value.chunks_exact(group));
        for ((y, value), weight) in rows.zip(self.weight.chunks_exact(group)) {
            let inverse = self.inverse(value);
            for ((y, value), weight) in y.iter_mut().zip(value).zip(weight) {
                *y = value * inverse * weight;
            }
        }
        if self.z.is_some() && self.spec.norm_before_gate {
            y.iter_mut().zip(gate).for_each(|(y, gate)| *y *= *gate);
        }
    }

    /// The gate, its slope where it is asked for, and what is normalised.
    #[inline(always)]
    fn values(
        &self,
        batch: usize,
        token: usize,
        gate: &mut [f32],
        slope: Option<&mut [f32]>,
        value: &mut [f32],
    ) {
        let x = self.x.row(batch, token);
        let Some(z) = self.z else {
            value.copy_from_slice(x);
            return;
        };
        let z = z.row(batch, token);
        match slope {
            None => gate
                .iter_mut()
                .zip(z)
                .for_each(|(gate, z)| *gate = z * sigmoid(*z)),
            Some(slope) => {
                for ((gate, slope), z) in gate.iter_mut().zip(slope).zip(z) {
                    let s = sigmoid(*z);
                    *gate = z * s;
                    *slope = s * (1.0 + z * (1.0 - s));
                }
            }
        }
        if self.spec.norm_before_gate {
            value.copy_from_slice(x);
        } else {
            for ((value, x), gate) in value.iter_mut().zip(x).zip(gate) {
                *value = x * *gate;
            }
        }
    }

    /// Writes the gradients of `x` and of `z`, where there is one; returns that of the weight.
    pub(crate) fn backward(
        &self,
        dy: Rows<'_>,
        dx: &RowsMut<'_>,
        dz: Option<&RowsMut<'_>>,
    ) -> Vec<f32> {
        let dim = self.dim();
        let parts: Vec<Vec<f32>> = (0..self.batch * self.blocks())
            .into_par_iter()
            .map(|task| {
                let (batch, tokens) = self.block(task);
                let mut part = vec![0.0; dim];
                with_scratch([dim; 4], |[gate, slope, value, dvalue]| {
                    let mut work = Token {
                        gate: &mut gate[..dim],
                        slope: &mut slope[..dim],
                        value: &mut value[..dim],
                        dvalue: &mut dvalue[..dim],
                    };
                    vectorized(
                        #[inline(always)]
                        || {
                            for token in tokens {
                                let dy = dy.row(batch, token);
                                // SAFETY: the token belongs to this task.
                                let dx = unsafe { dx.row(batch, token, 0, dim) };
                                // SAFETY: as above.
                                let dz = dz.map(|dz| unsafe { dz.row(batch, token, 0, dim) });
                                self.values(batch, token, work.gate, Some(work.slope), work.value);
                                self.token_backward(
                                    self.x.row(batch, token),
                                    dy,
                                    &mut work,
                                    dx,
                                    dz,
                                    &mut part,
                                );
                            }
                        },
                    );
                });
                part
            })
            .collect();
        // In order, so that the last bits do not depend on which thread was first.
        let mut sum = vec![0.0; dim];
        parts
            .iter()
            .for_each(|part| add_scaled(&mut sum, part, 1.0));
        sum
    }

    #[inline(always)]
    fn token_backward(
        &self,
        x: &[f32],
        dy: &[f32],
        work: &mut Token<'_>,
        dx: &mut [f32],
        dz: Option<&mut [f32]>,
        dweight: &mut [f32],
    ) {
        let gate_last = self.z.is_some() && self.spec.norm_before_gate;
        // The gradient of the normalised, gated or not: dx holds it until its own turn.
        dx.copy_from_slice(dy);
        if gate_last {
            dx.iter_mut()
                .zip(&*work.gate)
                .for_each(|(dx, gate)| *dx *= gate);
        }
        let group = self.spec.group;
        for start in (0..self.dim()).step_by(group) {
            let columns = start..start + group;
            self.group_backward(
                &work.value[columns.clone()],
                &dx[columns.clone()],
                &self.weight[columns.clone()],
                &mut work.dvalue[columns.clone()],
                &mut dweight[columns],
            );
        }
        match dz {
            None => dx.copy_from_slice(work.dvalue),
            Some(dz) if gate_last => {
                for start in (0..self.dim()).step_by(group) {
                    let columns = start..start + group;
                    let inverse = self.inverse(&work.value[columns.clone()]);
                    for c in columns {
                        dz[c] = dy[c] * work.value[c] * inverse * self.weight[c] * work.slope[c];
                    }
                }
                dx.copy_from_slice(work.dvalue);
            }
            Some(dz) => {
                // One loop each: two results in one would keep the compiler from using vectors.
                for ((dx, dvalue), gate) in dx.iter_mut().zip(&*work.dvalue).zip(&*work.gate) {
                    *dx = dvalue * gate;
                }
                let slopes = work.dvalue.iter().zip(x).zip(&*work.slope);
                for (dz, ((dvalue, x), slope)) in dz.iter_mut().zip(slopes) {
                    *dz = dvalue * x * slope;
                }
            }
        }
    }

    /// With `n = value * inverse`: `dvalue = inverse (g - n mean(g n))` where `g = dnormed * weight`.
    #[inline(always)]
    fn group_backward(
        &self,
        value: &[f32],
        dnormed: &[f32],
        weight: &[f32],
        dvalue: &mut [f32],
        dweight: &mut [f32],
    ) {
        let inverse = self.inverse(value);
        for ((dvalue, dnormed), weight) in dvalue.iter_mut().zip(dnormed).zip(weight) {
            *dvalue = dnormed * weight;
        }
        for ((dweight, dnormed), value) in dweight.iter_mut().zip(dnormed).zip(value) {
            *dweight += dnormed * value * inverse;
        }
        let mean = dot(dvalue, value) * inverse / value.len() as f32;
        for (dvalue, value) in dvalue.iter_mut().zip(value) {
            *dvalue = inverse * (*dvalue - value * inverse * mean);
        }
    }
}

/// Operands whose storage can be read in place.
struct Prepared {
    x: FlexTensor,
    z: Option<FlexTensor>,
    weight: FlexTensor,
}

impl Prepared {
    fn new(operands: Operands<Flex>) -> Self {
        Self {
            x: with_whole_rows(operands.x),
            z: operands.z.into_option().map(with_whole_rows),
            weight: contiguous(operands.weight),
        }
    }

    fn norm(&self, spec: Spec) -> Norm<'_> {
        let [batch, length, _] = self.x.layout().shape().dims();
        Norm {
            x: Rows::new(&self.x),
            z: self.z.as_ref().map(Rows::new),
            weight: elements(&self.weight),
            batch,
            length,
            spec,
        }
    }
}

impl NormBackend for Flex {
    fn gated_rms_norm_forward(operands: Operands<Self>, spec: Spec) -> FlexTensor {
        let prepared = Prepared::new(operands);
        let norm = prepared.norm(spec);
        let shape = [norm.batch, norm.length, norm.dim()];
        let mut y = zeros(shape.iter().product());
        norm.forward(&RowsMut::new(&mut y, norm.length, norm.dim()));
        tensor(y, shape)
    }

    fn gated_rms_norm_backward(
        operands: Operands<Self>,
        dy: FlexTensor,
        spec: Spec,
    ) -> Gradients<Self> {
        let prepared = Prepared::new(operands);
        let norm = prepared.norm(spec);
        let shape = [norm.batch, norm.length, norm.dim()];
        let size = shape.iter().product();
        let (mut dx, mut dz) = (zeros(size), zeros(size));
        let dy = with_whole_rows(dy);
        let rows = |data| RowsMut::new(data, norm.length, norm.dim());
        let dz_rows = norm.z.is_some().then(|| rows(&mut dz));
        let weight = norm.backward(Rows::new(&dy), &rows(&mut dx), dz_rows.as_ref());
        Gradients {
            x: tensor(dx, shape),
            z: tensor(dz, shape),
            weight: tensor(weight, [norm.dim()]),
        }
    }
}
