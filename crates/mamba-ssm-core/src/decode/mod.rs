//! One token at a time on the CPU, without allocating: for live forecasts and generation, where a token's
//! work is so small that handling tensors would cost more than it.
//!
//! A [`Decoder`] holds a copy of a stack's parameters, laid out in the order in which one token needs
//! them, and the state of one sequence. A token costs the same whether it is the tenth or the millionth.

mod blocks;
mod conv;
mod mamba1;
mod mamba2;

use burn::tensor::{Device, Tensor};
use mamba_ssm_linear::memory::host;
use mamba_ssm_linear::simd::vectorized;

use crate::ops::native::lanes;
use crate::stack::{LayerState, MambaLayer, MambaStack, StackState};
use mamba1::Mamba1Decoder;
use mamba2::Mamba2Decoder;

/// A [`MambaStack`] that answers one token at a time, for one sequence, on the CPU.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_core::{Mamba2Config, MambaStackConfig};
///
/// let device = Device::default();
/// let layer = Mamba2Config::new(32).with_d_state(8).with_headdim(8);
/// let stack = MambaStackConfig::new(layer.into(), 2).init(&device);
///
/// // A prompt as a whole, then token by token from its state.
/// let prompt = Tensor::<3>::ones([1, 10, 32], &device);
/// let (_, state) = stack.forward_from(prompt, stack.empty_state(1, &device));
/// let mut decoder = stack.decoder();
/// decoder.set_state(&state);
/// let y: &[f32] = decoder.step(&[1.0; 32]);
/// assert_eq!(y.len(), 32);
/// ```
#[derive(Debug, Clone)]
pub struct Decoder {
    layers: Vec<Layer>,
    /// Before each layer, `[d_model]`; empty in a plain stack.
    norms: Vec<Vec<f32>>,
    norm_f: Option<Vec<f32>>,
    eps: f32,
    /// What goes into the next layer, and what came out of the last.
    x: Vec<f32>,
    y: Vec<f32>,
    normed: Vec<f32>,
}

#[derive(Debug, Clone)]
enum Layer {
    Mamba1(Mamba1Decoder),
    Mamba2(Mamba2Decoder),
}

impl Layer {
    fn new(layer: &MambaLayer) -> Self {
        match layer {
            MambaLayer::Mamba1(layer) => Self::Mamba1(Mamba1Decoder::new(layer)),
            MambaLayer::Mamba2(layer) => Self::Mamba2(Mamba2Decoder::new(layer)),
        }
    }

    fn d_model(&self) -> usize {
        match self {
            Self::Mamba1(layer) => layer.d_model(),
            Self::Mamba2(layer) => layer.d_model(),
        }
    }

    fn step(&mut self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Mamba1(layer) => layer.step(x, y),
            Self::Mamba2(layer) => layer.step(x, y),
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Mamba1(layer) => layer.reset(),
            Self::Mamba2(layer) => layer.reset(),
        }
    }

    fn set_state(&mut self, state: &LayerState) {
        match (self, state) {
            (Self::Mamba1(layer), LayerState::Mamba1(state)) => layer.set_state(state),
            (Self::Mamba2(layer), LayerState::Mamba2(state)) => layer.set_state(state),
            _ => panic!("Decoder: the state belongs to a stack of the other kind of layer"),
        }
    }

    fn state(&self, device: &Device) -> LayerState {
        match self {
            Self::Mamba1(layer) => LayerState::Mamba1(layer.state(device)),
            Self::Mamba2(layer) => LayerState::Mamba2(layer.state(device)),
        }
    }
}

impl MambaStack {
    /// The stack for one token at a time on the CPU, from the empty state. The parameters are copied:
    /// later changes do not reach the decoder.
    pub fn decoder(&self) -> Decoder {
        let layers: Vec<Layer> = self.layers.iter().map(Layer::new).collect();
        let d_model = layers.first().map_or(0, Layer::d_model);
        Decoder {
            layers,
            norms: self.norm_weights.iter().map(|w| host(&w.val())).collect(),
            norm_f: self.norm_f_weight.as_ref().map(|w| host(&w.val())),
            eps: self.norm_eps() as f32,
            x: vec![0.0; d_model],
            y: vec![0.0; d_model],
            normed: vec![0.0; d_model],
        }
    }
}

impl Decoder {
    /// Features of a token.
    pub fn d_model(&self) -> usize {
        self.x.len()
    }

    /// One token: `[d_model]` to the same. Nothing is allocated.
    ///
    /// # Panics
    ///
    /// When `x` has not `d_model` numbers.
    pub fn step(&mut self, x: &[f32]) -> &[f32] {
        assert_eq!(x.len(), self.x.len(), "Decoder: features of the token");
        self.x.copy_from_slice(x);
        for (index, layer) in self.layers.iter_mut().enumerate() {
            match self.norms.get(index) {
                Some(weight) => {
                    norm(&self.x, weight, self.eps, &mut self.normed);
                    layer.step(&self.normed, &mut self.y);
                    lanes::add_scaled(&mut self.x, &self.y, 1.0);
                }
                None => {
                    layer.step(&self.x, &mut self.y);
                    std::mem::swap(&mut self.x, &mut self.y);
                }
            }
        }
        if let Some(weight) = &self.norm_f {
            norm(&self.x, weight, self.eps, &mut self.y);
            std::mem::swap(&mut self.x, &mut self.y);
        }
        &self.x
    }

    /// Forgets the sequence: the state before the first token.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(Layer::reset);
    }

    /// Goes on from the state of a stack: of the first entry of its batch.
    ///
    /// # Panics
    ///
    /// When the state is of another stack.
    pub fn set_state(&mut self, state: &StackState) {
        assert_eq!(
            state.len(),
            self.layers.len(),
            "Decoder: the state has as many layers as on the left, the stack as on the right"
        );
        for (layer, state) in self.layers.iter_mut().zip(state) {
            layer.set_state(state);
        }
    }

    /// The state as that of a stack, a batch of one.
    pub fn state(&self, device: &Device) -> StackState {
        self.layers
            .iter()
            .map(|layer| layer.state(device))
            .collect()
    }
}

/// `x / rms(x) * weight`.
fn norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            let factor = blocks::inverse_rms(x, eps);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * factor * weight;
            }
        },
    );
}

/// The elements of the first entry of a batch.
///
/// # Panics
///
/// When its shape, without the batch, is not this.
fn first_entry<const D: usize>(tensor: &Tensor<D>, shape: &[usize]) -> Vec<f32> {
    let dims = tensor.dims();
    assert_eq!(
        &dims[1..],
        shape,
        "Decoder: the state's shape is on the left, the layer's on the right"
    );
    host(&tensor.clone().narrow(0, 0, 1))
}
