use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_linear::{Linear, LinearConfig};

use super::init;
use crate::checkpoint::{Checkpoint, Parameters};
use crate::error::{ConfigError, at_least_one, divisible, positive_range};
use crate::ops::causal_conv1d::{ConvInput, causal_conv1d};
use crate::ops::gated_rms_norm::{GatedNormInput, GatedNormOptions, gated_rms_norm};
use crate::ops::mamba2_inner::{self, InnerInput, InnerSpec, mamba2_inner};
use crate::ops::ssd::{SkipWeight, SsdInput, SsdOptions, ssd};

/// Of the gated norm, as in the official layer.
pub(crate) const NORM_EPS: f64 = 1e-5;

/// Configuration of a [`Mamba2`] layer; names and defaults are those of `mamba_ssm.Mamba2`.
///
/// Any head count and any length work: nothing has to be a multiple of eight.
#[derive(Config, Debug, PartialEq)]
pub struct Mamba2Config {
    /// Features of a token.
    pub d_model: usize,
    /// Size of the state per channel, `N`.
    #[config(default = 128)]
    pub d_state: usize,
    /// Width of the causal convolution.
    #[config(default = 4)]
    pub d_conv: usize,
    /// Inner features per feature: `d_inner = expand * d_model`.
    #[config(default = 2)]
    pub expand: usize,
    /// Channels of a head, `P`; must divide `d_inner`.
    #[config(default = 64)]
    pub headdim: usize,
    /// Groups of heads that share `B` and `C`; must divide the number of heads.
    #[config(default = 1)]
    pub ngroups: usize,
    /// Decay rates are drawn uniformly from this range.
    #[config(default = "(1.0, 16.0)")]
    pub a_init_range: (f64, f64),
    /// Whether the skip `D` has one weight per channel instead of one per head.
    #[config(default = false)]
    pub d_has_hdim: bool,
    /// Whether a gated RMS norm closes the inner block (else the gate alone).
    #[config(default = true)]
    pub rmsnorm: bool,
    /// Whether that norm comes before the gate.
    #[config(default = false)]
    pub norm_before_gate: bool,
    /// Smallest step size drawn at the start.
    #[config(default = 0.001)]
    pub dt_min: f64,
    /// Largest step size drawn at the start.
    #[config(default = 0.1)]
    pub dt_max: f64,
    /// Step sizes drawn are at least this.
    #[config(default = 1e-4)]
    pub dt_init_floor: f64,
    /// Step sizes are clamped to this range in every pass; none: no limit.
    pub dt_limit: Option<(f64, f64)>,
    /// Whether the projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the convolution has a bias.
    #[config(default = true)]
    pub conv_bias: bool,
    /// Tokens computed together; changes speed, not results.
    #[config(default = 64)]
    pub chunk_size: usize,
}

impl Mamba2Config {
    /// Inner features, `expand * d_model`.
    pub fn d_inner(&self) -> usize {
        self.expand * self.d_model
    }

    /// Heads, `d_inner / headdim`.
    pub fn nheads(&self) -> usize {
        self.d_inner() / self.headdim
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.d_inner() + 2 * self.ngroups * self.d_state
    }

    /// Checks the configuration.
    ///
    /// # Errors
    ///
    /// When a size is zero, `headdim` does not divide `d_inner`, `ngroups` does not divide the number of
    /// heads, or a range is not one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("d_model", self.d_model),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("expand", self.expand),
            ("headdim", self.headdim),
            ("ngroups", self.ngroups),
            ("chunk_size", self.chunk_size),
        ];
        for (field, value) in sizes {
            at_least_one(field, value)?;
        }
        divisible(("d_inner", self.d_inner()), ("headdim", self.headdim))?;
        divisible(("nheads", self.nheads()), ("ngroups", self.ngroups))?;
        positive_range("a_init_range", self.a_init_range)?;
        positive_range("dt_min..dt_max", (self.dt_min, self.dt_max))
    }

    /// Creates the layer with the official initialisation.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate).
    pub fn try_init(&self, device: &Device) -> Result<Mamba2, ConfigError> {
        self.validate()?;
        let (d_inner, nheads) = (self.d_inner(), self.nheads());
        let d_in_proj = d_inner + self.conv_dim() + nheads;
        let (low, high) = self.a_init_range;
        let (conv_weight, conv_bias) =
            init::conv1d(self.conv_dim(), self.d_conv, self.conv_bias, device);
        let skips = if self.d_has_hdim { d_inner } else { nheads };
        let a = Tensor::<1>::random([nheads], Distribution::Uniform(low, high), device);
        Ok(Mamba2 {
            in_proj: LinearConfig::new(self.d_model, d_in_proj)
                .with_bias(self.bias)
                .init(device),
            conv_weight,
            conv_bias,
            dt_bias: init::dt_bias(
                nheads,
                (self.dt_min, self.dt_max),
                self.dt_init_floor,
                device,
            ),
            a_log: Param::from_tensor(a.log()),
            d: Param::from_tensor(Tensor::ones([skips], device)),
            norm_weight: self
                .rmsnorm
                .then(|| Param::from_tensor(Tensor::ones([d_inner], device))),
            out_proj: LinearConfig::new(d_inner, self.d_model)
                .with_bias(self.bias)
                .init(device),
            config: self.clone(),
        })
    }

    /// [`try_init`](Self::try_init).
    ///
    /// # Panics
    ///
    /// With the same words, where `try_init` returns an error.
    pub fn init(&self, device: &Device) -> Mamba2 {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("Mamba2Config: {error}"))
    }
}

/// The Mamba-2 layer: projection, causal convolution, SSD, gated norm, projection.
///
/// Source: Dao and Gu, "Transformers are SSMs", section 7; `mamba_ssm.Mamba2`.
#[derive(Module, Debug)]
pub struct Mamba2 {
    /// To z, x, B, C and dt, in this order: `[d_model, 2 d_inner + 2 ngroups d_state + nheads]`.
    pub in_proj: Linear,
    /// `conv1d.weight`, `[conv_dim, d_conv]`.
    pub conv_weight: Param<Tensor<2>>,
    /// `conv1d.bias`, `[conv_dim]`.
    pub conv_bias: Option<Param<Tensor<1>>>,
    /// `[nheads]`.
    pub dt_bias: Param<Tensor<1>>,
    /// `A_log`: `A = -exp(A_log)`, `[nheads]`.
    pub a_log: Param<Tensor<1>>,
    /// `D`, `[nheads]`, or `[d_inner]` with `d_has_hdim`.
    pub d: Param<Tensor<1>>,
    /// `norm.weight`, `[d_inner]`.
    pub norm_weight: Option<Param<Tensor<1>>>,
    /// `[d_inner, d_model]`.
    pub out_proj: Linear,
    /// What the layer was made from.
    #[module(skip)]
    pub config: Mamba2Config,
}

/// What a [`Mamba2`] layer carries from token to token; its size does not depend on the length.
#[derive(Debug, Clone)]
pub struct Mamba2State {
    /// The last inputs of the convolution, `[batch, d_conv - 1, conv_dim]`.
    pub conv: Tensor<3>,
    /// `[batch, nheads, headdim, d_state]`, f32.
    pub ssm: Tensor<4>,
}

impl Mamba2 {
    /// The state before the first token: zeros.
    pub fn empty_state(&self, batch: usize, device: &Device) -> Mamba2State {
        let c = &self.config;
        Mamba2State {
            conv: Tensor::zeros([batch, c.d_conv - 1, c.conv_dim()], device),
            ssm: Tensor::zeros([batch, c.nheads(), c.headdim, c.d_state], device),
        }
    }

    /// A whole sequence from the empty state: `[batch, length, d_model]` to the same shape.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`, or the length is zero.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let zxbcdt = self.in_proj.forward(x);
        match &self.norm_weight {
            Some(norm) if mamba2_inner::is_native(&zxbcdt) => {
                self.out_proj.forward(self.inner(zxbcdt, norm.val()))
            }
            _ => self.run(zxbcdt, None).0,
        }
    }

    /// What stands between the projections, as one operator.
    fn inner(&self, zxbcdt: Tensor<3>, norm_weight: Tensor<1>) -> Tensor<3> {
        let c = &self.config;
        let spec = InnerSpec {
            heads: c.nheads(),
            headdim: c.headdim,
            groups: c.ngroups,
            state: c.d_state,
            eps: NORM_EPS,
            norm_before_gate: c.norm_before_gate,
            dt_limit: self.dt_limit(),
        };
        let input = InnerInput {
            zxbcdt,
            conv_weight: self.conv_weight.val(),
            conv_bias: self.conv_bias.as_ref().map(Param::val),
            dt_bias: self.dt_bias.val(),
            a: self.a_log.val().exp().neg(),
            d: match self.skip() {
                SkipWeight::PerHead(d) => {
                    d.reshape([c.nheads(), 1]).expand([c.nheads(), c.headdim])
                }
                SkipWeight::PerChannel(d) => d,
            },
            norm_weight,
        };
        mamba2_inner(input, spec)
    }

    pub(crate) fn dt_limit(&self) -> (f64, f64) {
        self.config.dt_limit.unwrap_or((0.0, f64::INFINITY))
    }

    /// A sequence from a carried state: `[batch, length, d_model]` to the same shape, and the state
    /// after it. Splitting a sequence anywhere gives the output of [`forward`](Self::forward).
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and when the state has another batch size.
    pub fn forward_from(&self, x: Tensor<3>, state: Mamba2State) -> (Tensor<3>, Mamba2State) {
        self.run(self.in_proj.forward(x), Some(state))
    }

    /// One token: `[batch, d_model]` to the same shape, and the state after it.
    ///
    /// # Panics
    ///
    /// As [`forward_from`](Self::forward_from).
    pub fn step(&self, x: Tensor<2>, state: Mamba2State) -> (Tensor<2>, Mamba2State) {
        let (y, state) = self.forward_from(x.unsqueeze_dim(1), state);
        (y.squeeze_dim(1), state)
    }

    /// From the projection's output.
    fn run(&self, zxbcdt: Tensor<3>, state: Option<Mamba2State>) -> (Tensor<3>, Mamba2State) {
        let c = &self.config;
        let [batch, length, _] = zxbcdt.dims();
        let (d_inner, nheads, bc) = (c.d_inner(), c.nheads(), c.ngroups * c.d_state);
        let (conv, ssm) = state.map(|s| (s.conv, s.ssm)).unzip();

        let part = |start, size| zxbcdt.clone().narrow(2, start, size);
        let z = part(0, d_inner);
        let convolved = causal_conv1d(ConvInput {
            x: part(d_inner, c.conv_dim()),
            weight: self.conv_weight.val(),
            bias: self.conv_bias.as_ref().map(Param::val),
            initial_state: conv,
            activation: true,
        });
        let xbc = |start, size| convolved.y.clone().narrow(2, start, size);
        let per_head = [batch, length, nheads, c.headdim];
        let per_group = [batch, length, c.ngroups, c.d_state];
        let scanned = ssd(
            SsdInput {
                x: xbc(0, d_inner).reshape(per_head),
                dt: part(d_inner + c.conv_dim(), nheads),
                a: self.a_log.val().exp().neg(),
                b: xbc(d_inner, bc).reshape(per_group),
                c: xbc(d_inner + bc, bc).reshape(per_group),
                d: Some(self.skip()),
                z: (!c.rmsnorm).then(|| z.clone().reshape(per_head)),
                dt_bias: Some(self.dt_bias.val()),
                initial_state: ssm,
            },
            &SsdOptions {
                chunk_size: c.chunk_size,
                dt_softplus: true,
                dt_limit: self.dt_limit(),
            },
        );
        let y = self.close(scanned.y.reshape([batch, length, d_inner]), z);
        let state = Mamba2State {
            conv: convolved.final_state,
            ssm: scanned.final_state,
        };
        (self.out_proj.forward(y), state)
    }

    fn skip(&self) -> SkipWeight {
        let c = &self.config;
        if c.d_has_hdim {
            self.d.val().reshape([c.nheads(), c.headdim]).into()
        } else {
            self.d.val().into()
        }
    }

    /// The gated norm, where the layer has one.
    fn close(&self, y: Tensor<3>, z: Tensor<3>) -> Tensor<3> {
        let c = &self.config;
        let Some(weight) = &self.norm_weight else {
            return y;
        };
        gated_rms_norm(
            GatedNormInput {
                x: y,
                z: Some(z),
                weight: weight.val(),
            },
            &GatedNormOptions {
                eps: NORM_EPS,
                group_size: Some(c.d_inner() / c.ngroups),
                norm_before_gate: c.norm_before_gate,
            },
        )
    }
}

impl Checkpoint for Mamba2 {
    fn parameters(&mut self, visit: &mut Parameters<'_>) {
        visit.linear("in_proj", &mut self.in_proj);
        visit.depthwise("conv1d.weight", &mut self.conv_weight);
        if let Some(bias) = &mut self.conv_bias {
            visit.tensor("conv1d.bias", bias);
        }
        visit.tensor("dt_bias", &mut self.dt_bias);
        visit.tensor("A_log", &mut self.a_log);
        visit.tensor("D", &mut self.d);
        if let Some(weight) = &mut self.norm_weight {
            visit.tensor("norm.weight", weight);
        }
        visit.linear("out_proj", &mut self.out_proj);
    }
}
