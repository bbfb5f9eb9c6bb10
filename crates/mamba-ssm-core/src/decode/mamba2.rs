//! One token through a Mamba-2 layer.

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_linear::LinearDecoder;
use mamba_ssm_linear::simd::{LANES, vectorized};

use super::blocks::{Layout, each, gate, inverse_rms};
use super::conv::ConvDecoder;
use super::{first_entry, host};
use crate::layers::{Mamba2, Mamba2State, NORM_EPS};
use crate::ops::native::lanes::{self, Lanes, exp, softplus};

#[derive(Debug, Clone)]
pub(super) struct Mamba2Decoder {
    in_proj: LinearDecoder,
    conv: ConvDecoder,
    block: Block,
    out_proj: LinearDecoder,
    /// z, x, B, C and dt of the token.
    zxbcdt: Vec<f32>,
    /// What the convolution made: x, B and C.
    xbc: Vec<f32>,
    y: Vec<f32>,
}

/// What stands behind the convolution.
#[derive(Debug, Clone)]
struct Block {
    /// `[nheads]` each.
    dt_bias: Vec<f32>,
    rates: Vec<f32>,
    limit: (f32, f32),
    /// `[d_inner]`.
    skip: Vec<f32>,
    norm: Option<Norm>,
    headdim: usize,
    layout: Layout,
    state: Vec<Lanes>,
    /// Of the token, by padded channel: the decay, and x times the step.
    decays: Vec<f32>,
    added: Vec<f32>,
    /// `[nheads]`: steps.
    dt: Vec<f32>,
}

#[derive(Debug, Clone)]
struct Norm {
    weight: Vec<f32>,
    eps: f32,
    before_gate: bool,
}

impl Mamba2Decoder {
    pub(super) fn new(layer: &Mamba2) -> Self {
        let c = &layer.config;
        let (d_inner, heads) = (c.d_inner(), c.nheads());
        let layout = Layout {
            rows: c.ngroups,
            channels: d_inner / c.ngroups,
            state: c.d_state,
        };
        let rates = host(&layer.a_log.val().exp().neg());
        let mut skip = host(&layer.d.val());
        if !c.d_has_hdim {
            let per_head = |d: &f32| std::iter::repeat_n(*d, c.headdim);
            skip = skip.iter().flat_map(per_head).collect();
        }
        let (low, high) = layer.dt_limit();
        Self {
            in_proj: layer.in_proj.decoder(),
            conv: ConvDecoder::new(&layer.conv_weight, layer.conv_bias.as_ref()),
            block: Block {
                dt_bias: host(&layer.dt_bias.val()),
                rates,
                limit: (low as f32, high as f32),
                skip,
                norm: layer.norm_weight.as_ref().map(|weight| Norm {
                    weight: host(&weight.val()),
                    eps: NORM_EPS as f32,
                    before_gate: c.norm_before_gate,
                }),
                headdim: c.headdim,
                layout,
                state: layout.zeros(),
                decays: vec![0.0; layout.padded()],
                added: vec![0.0; layout.padded()],
                dt: vec![0.0; heads],
            },
            out_proj: layer.out_proj.decoder(),
            zxbcdt: vec![0.0; d_inner + c.conv_dim() + heads],
            xbc: vec![0.0; c.conv_dim()],
            y: vec![0.0; d_inner],
        }
    }

    pub(super) fn d_model(&self) -> usize {
        self.in_proj.d_input()
    }

    pub(super) fn step(&mut self, x: &[f32], y: &mut [f32]) {
        self.in_proj.step(x, &mut self.zxbcdt);
        let (z, rest) = self.zxbcdt.split_at(self.y.len());
        let (xbc, dt) = rest.split_at(self.xbc.len());
        vectorized(
            #[inline(always)]
            || {
                self.conv.step(xbc, &mut self.xbc);
                self.block.step(z, &self.xbc, dt, &mut self.y);
            },
        );
        self.out_proj.step(&self.y, y);
    }

    pub(super) fn reset(&mut self) {
        self.conv.reset();
        self.block.state.fill([0.0; LANES]);
    }

    pub(super) fn set_state(&mut self, state: &Mamba2State) {
        self.conv.set_state(&state.conv);
        let block = &mut self.block;
        let shape = [block.dt.len(), block.headdim, block.layout.state];
        let values = first_entry(&state.ssm, &shape);
        block.layout.pack(&values, &mut block.state);
    }

    pub(super) fn state(&self, device: &Device) -> Mamba2State {
        let block = &self.block;
        let values = block.layout.unpack(&block.state);
        let shape = [1, block.dt.len(), block.headdim, block.layout.state];
        Mamba2State {
            conv: self.conv.state(device),
            ssm: Tensor::from_data(TensorData::new(values, shape), device),
        }
    }
}

impl Block {
    #[inline(always)]
    fn step(&mut self, z: &[f32], xbc: &[f32], dt: &[f32], y: &mut [f32]) {
        let (x, bc) = xbc.split_at(y.len());
        let (b, c) = bc.split_at(self.layout.rows * self.layout.state);
        self.prepare(x, dt);
        self.scan(b, c, y);
        for ((y, x), skip) in y.iter_mut().zip(x).zip(&self.skip) {
            *y += skip * x;
        }
        self.close(z, y);
    }

    /// Steps by head; decays and what is added to the states by channel.
    #[inline(always)]
    fn prepare(&mut self, x: &[f32], dt: &[f32]) {
        for ((to, dt), bias) in self.dt.iter_mut().zip(dt).zip(&self.dt_bias) {
            *to = dt + bias;
        }
        let (low, high) = self.limit;
        each(
            &mut self.dt,
            #[inline(always)]
            |dt| softplus(dt).max(low).min(high),
        );
        let width = self.layout.channels;
        let padded = self.layout.blocks() * LANES;
        for (head, x) in x.chunks_exact(self.headdim).enumerate() {
            let channel = head * self.headdim;
            let at = channel / width * padded + channel % width;
            let dt = self.dt[head];
            self.decays[at..at + self.headdim].fill(exp(dt * self.rates[head]));
            lanes::scale_into(&mut self.added[at..at + self.headdim], x, dt);
        }
    }

    /// `h <- decay h + dt x B`, `y = <h, C>`.
    #[inline(always)]
    fn scan(&mut self, b: &[f32], c: &[f32], y: &mut [f32]) {
        let Layout {
            channels, state, ..
        } = self.layout;
        let blocks = self.layout.blocks();
        let (decays, _) = self.decays.as_chunks::<LANES>();
        let (added, _) = self.added.as_chunks::<LANES>();
        let mut states = self.state.chunks_exact_mut(state);
        for (group, y) in y.chunks_exact_mut(channels).enumerate() {
            let (b, c) = (&b[group * state..][..state], &c[group * state..][..state]);
            for (block, y) in y.chunks_mut(LANES).enumerate() {
                let at = group * blocks + block;
                let Some(h) = states.next() else { return };
                let sum = advance(h, &decays[at], &added[at], b, c);
                y.copy_from_slice(&sum[..y.len()]);
            }
        }
    }

    /// The gate, and the norm where there is one.
    #[inline(always)]
    fn close(&self, z: &[f32], y: &mut [f32]) {
        let before = self.norm.as_ref().is_some_and(|norm| norm.before_gate);
        if !before {
            gate(z, y);
        }
        if let Some(norm) = &self.norm {
            let groups = y.chunks_exact_mut(self.layout.channels);
            for (y, weight) in groups.zip(norm.weight.chunks_exact(self.layout.channels)) {
                let factor = inverse_rms(y, norm.eps);
                for (y, weight) in y.iter_mut().zip(weight) {
                    *y *= factor * weight;
                }
            }
        }
        if before {
            gate(z, y);
        }
    }
}

/// One block of channels through one token.
#[inline(always)]
fn advance(h: &mut [Lanes], decay: &Lanes, added: &Lanes, b: &[f32], c: &[f32]) -> Lanes {
    // Sums of their own names, so that they stay in registers, and several of them, so that an addition
    // need not wait for the one before.
    let [mut even, mut odd] = [[0.0; LANES]; 2];
    let (pairs, last) = h.as_chunks_mut::<2>();
    let ((bs, b_last), (cs, c_last)) = (b.as_chunks::<2>(), c.as_chunks::<2>());
    for (([h0, h1], [b0, b1]), [c0, c1]) in pairs.iter_mut().zip(bs).zip(cs) {
        advance_one(h0, decay, added, *b0, *c0, &mut even);
        advance_one(h1, decay, added, *b1, *c1, &mut odd);
    }
    for ((h, b), c) in last.iter_mut().zip(b_last).zip(c_last) {
        advance_one(h, decay, added, *b, *c, &mut even);
    }
    for (even, odd) in even.iter_mut().zip(odd) {
        *even += odd;
    }
    even
}

#[inline(always)]
fn advance_one(h: &mut Lanes, decay: &Lanes, added: &Lanes, b: f32, c: f32, sum: &mut Lanes) {
    for l in 0..LANES {
        h[l] = decay[l] * h[l] + added[l] * b;
        sum[l] += h[l] * c;
    }
}
