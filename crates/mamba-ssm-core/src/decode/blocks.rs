//! States in blocks of neighbouring channels: `[blocks, state]` of [`LANES`] numbers, so that a token's
//! products with B and C run over whole registers and nothing has to be added up across one.

use mamba_ssm_linear::simd::LANES;

use crate::ops::native::lanes::{self, Lanes, silu};

/// States and channels: `rows` of channels (one per group), each padded to whole blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) rows: usize,
    pub(super) channels: usize,
    pub(super) state: usize,
}

impl Layout {
    /// Blocks of one row.
    pub(super) fn blocks(&self) -> usize {
        self.channels.div_ceil(LANES)
    }

    /// Numbers in rows of channels, with the padding.
    pub(super) fn padded(&self) -> usize {
        self.rows * self.blocks() * LANES
    }

    /// A state of zeros.
    pub(super) fn zeros(&self) -> Vec<Lanes> {
        vec![[0.0; LANES]; self.rows * self.blocks() * self.state]
    }

    /// From `[rows, channels, state]`.
    pub(super) fn pack(&self, from: &[f32], to: &mut [Lanes]) {
        for (at, values) in from.chunks_exact(self.state).enumerate() {
            let (block, lane) = self.place(at);
            for (n, value) in values.iter().enumerate() {
                to[block * self.state + n][lane] = *value;
            }
        }
    }

    /// To `[rows, channels, state]`.
    pub(super) fn unpack(&self, from: &[Lanes]) -> Vec<f32> {
        let mut to = vec![0.0; self.rows * self.channels * self.state];
        for (at, values) in to.chunks_exact_mut(self.state).enumerate() {
            let (block, lane) = self.place(at);
            for (n, value) in values.iter_mut().enumerate() {
                *value = from[block * self.state + n][lane];
            }
        }
        to
    }

    fn place(&self, channel: usize) -> (usize, usize) {
        let (row, inside) = (channel / self.channels, channel % self.channels);
        (row * self.blocks() + inside / LANES, inside % LANES)
    }
}

/// Applies `f` to every number, whole registers first.
#[inline(always)]
pub(super) fn each(values: &mut [f32], f: impl Fn(f32) -> f32 + Copy) {
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    for values in whole {
        *values = lanes::map(*values, f);
    }
    for value in rest {
        *value = f(*value);
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (lanes::dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `y <- y silu(z)`.
#[inline(always)]
pub(super) fn gate(z: &[f32], y: &mut [f32]) {
    let ((z, z_rest), (y, y_rest)) = (z.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
    for (y, z) in y.iter_mut().zip(z) {
        let z = lanes::map(*z, silu);
        for (y, z) in y.iter_mut().zip(z) {
            *y *= z;
        }
    }
    for (y, z) in y_rest.iter_mut().zip(z_rest) {
        *y *= silu(*z);
    }
}
