//! The causal convolution with SiLU, one token at a time.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};

use super::blocks::each;
use super::{first_entry, host};
use crate::ops::native::lanes::silu;

#[derive(Debug, Clone)]
pub(super) struct ConvDecoder {
    /// `[d_conv, channels]`, the oldest token's first.
    taps: Vec<f32>,
    bias: Vec<f32>,
    /// The last inputs, `[d_conv, channels]`, a ring.
    window: Vec<f32>,
    /// Row of the ring that the next token takes.
    next: usize,
    channels: usize,
}

impl ConvDecoder {
    pub(super) fn new(weight: &Param<Tensor<2>>, bias: Option<&Param<Tensor<1>>>) -> Self {
        let [channels, width] = weight.dims();
        Self {
            taps: host(&weight.val().transpose()),
            bias: bias.map_or_else(|| vec![0.0; channels], |bias| host(&bias.val())),
            window: vec![0.0; width * channels],
            next: width - 1,
            channels,
        }
    }

    pub(super) fn reset(&mut self) {
        self.window.fill(0.0);
    }

    fn width(&self) -> usize {
        self.window.len() / self.channels
    }

    /// Writes what comes out to `y`.
    #[inline(always)]
    pub(super) fn step(&mut self, x: &[f32], y: &mut [f32]) {
        let (width, channels) = (self.width(), self.channels);
        self.window[self.next * channels..][..channels].copy_from_slice(x);
        self.next = (self.next + 1) % width;
        y.copy_from_slice(&self.bias);
        for tap in 0..width {
            let row = (self.next + tap) % width;
            let taps = &self.taps[tap * channels..][..channels];
            let window = &self.window[row * channels..][..channels];
            for ((y, tap), x) in y.iter_mut().zip(taps).zip(window) {
                *y += tap * x;
            }
        }
        each(y, silu);
    }

    /// From `[batch, d_conv - 1, channels]`.
    pub(super) fn set_state(&mut self, state: &Tensor<3>) {
        let values = first_entry(state, &[self.width() - 1, self.channels]);
        self.window[..values.len()].copy_from_slice(&values);
        self.next = self.width() - 1;
    }

    pub(super) fn state(&self, device: &Device) -> Tensor<3> {
        let (width, channels) = (self.width(), self.channels);
        let values: Vec<f32> = (1..width)
            .flat_map(|age| {
                let row = (self.next + age) % width;
                self.window[row * channels..][..channels].iter().copied()
            })
            .collect();
        Tensor::from_data(TensorData::new(values, [1, width - 1, channels]), device)
    }
}
