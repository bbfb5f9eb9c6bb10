//! One token through a Mamba-1 layer.

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_linear::LinearDecoder;
use mamba_ssm_linear::simd::{LANES, vectorized};

use super::blocks::{Layout, each, gate};
use super::conv::ConvDecoder;
use super::{first_entry, host};
use crate::layers::{Mamba1, Mamba1State};
use crate::ops::native::lanes::{Lanes, exp, softplus};

#[derive(Debug, Clone)]
pub(super) struct Mamba1Decoder {
    in_proj: LinearDecoder,
    conv: ConvDecoder,
    x_proj: LinearDecoder,
    dt_proj: LinearDecoder,
    out_proj: LinearDecoder,
    /// As the state.
    rates: Vec<Lanes>,
    /// `[d_inner]`.
    skip: Vec<f32>,
    layout: Layout,
    state: Vec<Lanes>,
    /// x and z, what the convolution made, dt with B and C, and the steps of the token.
    xz: Vec<f32>,
    x: Vec<f32>,
    dtbc: Vec<f32>,
    steps: Vec<f32>,
    y: Vec<f32>,
}

impl Mamba1Decoder {
    pub(super) fn new(layer: &Mamba1) -> Self {
        let c = &layer.config;
        let d_inner = c.d_inner();
        let layout = Layout {
            rows: 1,
            channels: d_inner,
            state: c.d_state,
        };
        let mut rates = layout.zeros();
        layout.pack(&host(&layer.a_log.val().exp().neg()), &mut rates);
        Self {
            in_proj: layer.in_proj.decoder(),
            conv: ConvDecoder::new(&layer.conv_weight, layer.conv_bias.as_ref()),
            x_proj: layer.x_proj.decoder(),
            dt_proj: layer.dt_proj.decoder(),
            out_proj: layer.out_proj.decoder(),
            rates,
            skip: host(&layer.d.val()),
            layout,
            state: layout.zeros(),
            xz: vec![0.0; 2 * d_inner],
            x: vec![0.0; d_inner],
            dtbc: vec![0.0; c.rank() + 2 * c.d_state],
            steps: vec![0.0; d_inner],
            y: vec![0.0; d_inner],
        }
    }

    pub(super) fn d_model(&self) -> usize {
        self.in_proj.d_input()
    }

    pub(super) fn step(&mut self, x: &[f32], y: &mut [f32]) {
        self.in_proj.step(x, &mut self.xz);
        let (x, z) = self.xz.split_at(self.x.len());
        vectorized(
            #[inline(always)]
            || self.conv.step(x, &mut self.x),
        );
        self.x_proj.step(&self.x, &mut self.dtbc);
        let (dt, bc) = self.dtbc.split_at(self.dt_proj.d_input());
        self.dt_proj.step(dt, &mut self.steps);
        let (b, c) = bc.split_at(self.layout.state);
        vectorized(
            #[inline(always)]
            || {
                each(&mut self.steps, softplus);
                let states = self.state.chunks_exact_mut(self.layout.state);
                let rates = self.rates.chunks_exact(self.layout.state);
                let blocks = states.zip(rates).zip(self.y.chunks_mut(LANES));
                for (block, ((h, rates), y)) in blocks.enumerate() {
                    let own = block * LANES..block * LANES + y.len();
                    let (step, x) = (lanes(&self.steps[own.clone()]), lanes(&self.x[own.clone()]));
                    let sum = advance(h, rates, &step, &x, b, c);
                    for (((y, sum), skip), x) in y.iter_mut().zip(sum).zip(&self.skip[own]).zip(x) {
                        *y = sum + skip * x;
                    }
                }
                gate(z, &mut self.y);
            },
        );
        self.out_proj.step(&self.y, y);
    }

    pub(super) fn reset(&mut self) {
        self.conv.reset();
        self.state.fill([0.0; LANES]);
    }

    pub(super) fn set_state(&mut self, state: &Mamba1State) {
        self.conv.set_state(&state.conv);
        let shape = [self.layout.channels, self.layout.state];
        let values = first_entry(&state.ssm, &shape);
        self.layout.pack(&values, &mut self.state);
    }

    pub(super) fn state(&self, device: &Device) -> Mamba1State {
        let shape = [1, self.layout.channels, self.layout.state];
        let values = self.layout.unpack(&self.state);
        Mamba1State {
            conv: self.conv.state(device),
            ssm: Tensor::from_data(TensorData::new(values, shape), device),
        }
    }
}

/// A block of channels, zeros behind the last.
#[inline(always)]
fn lanes(values: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
}

/// `h <- exp(dt A) h + dt x B`, `<h, C>`, for one block of channels.
#[inline(always)]
fn advance(
    h: &mut [Lanes],
    rates: &[Lanes],
    step: &Lanes,
    x: &Lanes,
    b: &[f32],
    c: &[f32],
) -> Lanes {
    let mut sum = [0.0; LANES];
    for (((h, rates), b), c) in h.iter_mut().zip(rates).zip(b).zip(c) {
        for l in 0..LANES {
            h[l] = exp(step[l] * rates[l]) * h[l] + step[l] * x[l] * b;
            sum[l] += h[l] * c;
        }
    }
    sum
}
