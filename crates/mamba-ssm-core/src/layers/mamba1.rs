use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_linear::{Linear, LinearConfig};

use super::init;
use crate::checkpoint::{Checkpoint, Parameters};
use crate::error::{ConfigError, at_least_one, positive_range};
use crate::ops::causal_conv1d::{ConvInput, causal_conv1d};
use crate::ops::selective_scan::{ScanInput, ScanOptions, selective_scan};

/// Configuration of a [`Mamba1`] layer; names and defaults are those of `mamba_ssm.Mamba`.
#[derive(Config, Debug, PartialEq)]
pub struct Mamba1Config {
    /// Features of a token.
    pub d_model: usize,
    /// Size of the state per channel, `N`.
    #[config(default = 16)]
    pub d_state: usize,
    /// Width of the causal convolution.
    #[config(default = 4)]
    pub d_conv: usize,
    /// Inner features per feature: `d_inner = expand * d_model`.
    #[config(default = 2)]
    pub expand: usize,
    /// Rank of the step size's projection; none: `d_model / 16`, rounded up.
    pub dt_rank: Option<usize>,
    /// Smallest step size drawn at the start.
    #[config(default = 0.001)]
    pub dt_min: f64,
    /// Largest step size drawn at the start.
    #[config(default = 0.1)]
    pub dt_max: f64,
    /// Step sizes drawn are at least this.
    #[config(default = 1e-4)]
    pub dt_init_floor: f64,
    /// Whether the projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the convolution has a bias.
    #[config(default = true)]
    pub conv_bias: bool,
}

impl Mamba1Config {
    /// Inner features, `expand * d_model`.
    pub fn d_inner(&self) -> usize {
        self.expand * self.d_model
    }

    /// Rank of the step size's projection.
    pub fn rank(&self) -> usize {
        self.dt_rank.unwrap_or(self.d_model.div_ceil(16))
    }

    /// Checks the configuration.
    ///
    /// # Errors
    ///
    /// When a size is zero or the range of step sizes is not one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("d_model", self.d_model),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("expand", self.expand),
            ("dt_rank", self.rank()),
        ];
        for (field, value) in sizes {
            at_least_one(field, value)?;
        }
        positive_range("dt_min..dt_max", (self.dt_min, self.dt_max))
    }

    /// Creates the layer with the official initialisation.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate).
    pub fn try_init(&self, device: &Device) -> Result<Mamba1, ConfigError> {
        self.validate()?;
        let (d_inner, rank) = (self.d_inner(), self.rank());
        let linear = |d_input, d_output, bias| {
            LinearConfig::new(d_input, d_output)
                .with_bias(bias)
                .init(device)
        };
        let (conv_weight, conv_bias) = init::conv1d(d_inner, self.d_conv, self.conv_bias, device);
        let k = (rank as f64).powf(-0.5);
        let dt_weight = Tensor::random([rank, d_inner], Distribution::Uniform(-k, k), device);
        let rates: Vec<f32> = (1..=self.d_state).map(|n| (n as f32).ln()).collect();
        let a_log = Tensor::<1>::from_floats(rates.as_slice(), device)
            .reshape([1, self.d_state])
            .repeat_dim(0, d_inner);
        Ok(Mamba1 {
            in_proj: linear(self.d_model, 2 * d_inner, self.bias),
            conv_weight,
            conv_bias,
            x_proj: linear(d_inner, rank + 2 * self.d_state, false),
            dt_proj: Linear {
                weight: Param::from_tensor(dt_weight),
                bias: Some(init::dt_bias(
                    d_inner,
                    (self.dt_min, self.dt_max),
                    self.dt_init_floor,
                    device,
                )),
            },
            a_log: Param::from_tensor(a_log),
            d: Param::from_tensor(Tensor::ones([d_inner], device)),
            out_proj: linear(d_inner, self.d_model, self.bias),
            config: self.clone(),
        })
    }

    /// [`try_init`](Self::try_init).
    ///
    /// # Panics
    ///
    /// With the same words, where `try_init` returns an error.
    pub fn init(&self, device: &Device) -> Mamba1 {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("Mamba1Config: {error}"))
    }
}

/// The Mamba-1 layer: projection, causal convolution, selective scan with gate, projection.
///
/// Source: Gu and Dao, "Mamba", figure 3; `mamba_ssm.Mamba`.
#[derive(Module, Debug)]
pub struct Mamba1 {
    /// To x and z: `[d_model, 2 d_inner]`.
    pub in_proj: Linear,
    /// `conv1d.weight`, `[d_inner, d_conv]`.
    pub conv_weight: Param<Tensor<2>>,
    /// `conv1d.bias`, `[d_inner]`.
    pub conv_bias: Option<Param<Tensor<1>>>,
    /// To dt, B and C: `[d_inner, dt_rank + 2 d_state]`.
    pub x_proj: Linear,
    /// `[dt_rank, d_inner]`; its bias is the scan's `delta_bias`.
    pub dt_proj: Linear,
    /// `A_log`: `A = -exp(A_log)`, `[d_inner, d_state]`.
    pub a_log: Param<Tensor<2>>,
    /// `D`, `[d_inner]`.
    pub d: Param<Tensor<1>>,
    /// `[d_inner, d_model]`.
    pub out_proj: Linear,
    /// What the layer was made from.
    #[module(skip)]
    pub config: Mamba1Config,
}

/// What a [`Mamba1`] layer carries from token to token; its size does not depend on the length.
#[derive(Debug, Clone)]
pub struct Mamba1State {
    /// The last inputs of the convolution, `[batch, d_conv - 1, d_inner]`.
    pub conv: Tensor<3>,
    /// `[batch, d_inner, d_state]`, f32.
    pub ssm: Tensor<3>,
}

impl Mamba1 {
    /// The state before the first token: zeros.
    pub fn empty_state(&self, batch: usize, device: &Device) -> Mamba1State {
        let c = &self.config;
        Mamba1State {
            conv: Tensor::zeros([batch, c.d_conv - 1, c.d_inner()], device),
            ssm: Tensor::zeros([batch, c.d_inner(), c.d_state], device),
        }
    }

    /// A whole sequence from the empty state: `[batch, length, d_model]` to the same shape.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`, or the length is zero.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.run(x, None).0
    }

    /// A sequence from a carried state: `[batch, length, d_model]` to the same shape, and the state
    /// after it. Splitting a sequence anywhere gives the output of [`forward`](Self::forward).
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and when the state has another batch size.
    pub fn forward_from(&self, x: Tensor<3>, state: Mamba1State) -> (Tensor<3>, Mamba1State) {
        self.run(x, Some(state))
    }

    /// One token: `[batch, d_model]` to the same shape, and the state after it.
    ///
    /// # Panics
    ///
    /// As [`forward_from`](Self::forward_from).
    pub fn step(&self, x: Tensor<2>, state: Mamba1State) -> (Tensor<2>, Mamba1State) {
        let (y, state) = self.run(x.unsqueeze_dim(1), Some(state));
        (y.squeeze_dim(1), state)
    }

    fn run(&self, x: Tensor<3>, state: Option<Mamba1State>) -> (Tensor<3>, Mamba1State) {
        let c = &self.config;
        let (d_inner, rank) = (c.d_inner(), c.rank());
        let (conv, ssm) = state.map(|s| (s.conv, s.ssm)).unzip();

        let xz = self.in_proj.forward(x);
        let convolved = causal_conv1d(ConvInput {
            x: xz.clone().narrow(2, 0, d_inner),
            weight: self.conv_weight.val(),
            bias: self.conv_bias.as_ref().map(Param::val),
            initial_state: conv,
            activation: true,
        });
        let dtbc = self.x_proj.forward(convolved.y.clone());
        let part = |start, size| dtbc.clone().narrow(2, start, size);
        let grouped = |tensor: Tensor<3>| tensor.swap_dims(1, 2).unsqueeze_dim::<4>(1);
        let dt = part(0, rank);
        // The bias belongs to the scan, behind which the softplus comes.
        let delta = mamba_ssm_linear::project(dt, self.dt_proj.weight.val(), None);
        let scanned = selective_scan(
            ScanInput {
                u: convolved.y.swap_dims(1, 2),
                delta: delta.swap_dims(1, 2),
                a: self.a_log.val().exp().neg(),
                b: grouped(part(rank, c.d_state)),
                c: grouped(part(rank + c.d_state, c.d_state)),
                d: Some(self.d.val()),
                z: Some(xz.narrow(2, d_inner, d_inner).swap_dims(1, 2)),
                delta_bias: self.dt_proj.bias.as_ref().map(Param::val),
                initial_state: ssm,
            },
            &ScanOptions {
                delta_softplus: true,
            },
        );
        let state = Mamba1State {
            conv: convolved.final_state,
            ssm: scanned.final_state,
        };
        (self.out_proj.forward(scanned.y.swap_dims(1, 2)), state)
    }
}

impl Checkpoint for Mamba1 {
    fn parameters(&mut self, visit: &mut Parameters<'_>) {
        visit.linear("in_proj", &mut self.in_proj);
        visit.depthwise("conv1d.weight", &mut self.conv_weight);
        if let Some(bias) = &mut self.conv_bias {
            visit.tensor("conv1d.bias", bias);
        }
        visit.linear("x_proj", &mut self.x_proj);
        visit.linear("dt_proj", &mut self.dt_proj);
        visit.tensor("A_log", &mut self.a_log);
        visit.tensor("D", &mut self.d);
        visit.linear("out_proj", &mut self.out_proj);
    }
}
