use burn::config::Config;
use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Tensor};
use mamba_ssm_linear::{Linear, LinearConfig};

use super::norm::project_normalised;
use crate::AttentionError;
use crate::error::at_least_one;
use crate::ops::gelu::gelu;

/// Configuration of [`Mlp`].
#[derive(Config, Debug)]
pub struct MlpConfig {
    /// Width of a token.
    pub d_model: usize,
    /// Width inside; four times `d_model` when `None`.
    pub d_hidden: Option<usize>,
    /// Whether the projections have a bias.
    #[config(default = true)]
    pub bias: bool,
}

impl MlpConfig {
    /// Creates the layer.
    ///
    /// # Errors
    ///
    /// A width of zero.
    pub fn try_init(&self, device: &Device) -> Result<Mlp, AttentionError> {
        let hidden = self.d_hidden.unwrap_or(4 * self.d_model);
        at_least_one("d_model", self.d_model)?;
        at_least_one("d_hidden", hidden)?;
        let linear = |from, to| {
            LinearConfig::new(from, to)
                .with_bias(self.bias)
                .init(device)
        };
        Ok(Mlp {
            up: linear(self.d_model, hidden),
            down: linear(hidden, self.d_model),
        })
    }

    /// Creates the layer.
    ///
    /// # Panics
    ///
    /// With the words of [`try_init`](Self::try_init)'s error.
    pub fn init(&self, device: &Device) -> Mlp {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

/// The feed-forward part of a Transformer block: `down(gelu(up(x)))`, with the exact GELU.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `d_model` to `d_hidden`.
    pub up: Linear,
    /// `d_hidden` to `d_model`.
    pub down: Linear,
}

impl Mlp {
    /// Maps each token by itself: `[.., d_model]` to the same shape.
    ///
    /// # Panics
    ///
    /// When the last axis is not `d_model`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.down.forward(gelu(self.up.forward(x)))
    }

    /// [`forward`](Self::forward) of the norm of `x`.
    pub(crate) fn forward_normalised(&self, norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
        let up = project_normalised(&self.up, norm, x);
        self.down.forward(gelu(up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    #[test]
    fn tokens_are_mapped_one_by_one() {
        let device = Device::default();
        let mlp = MlpConfig::new(6).init(&device);
        assert_eq!(mlp.num_params(), 6 * 24 + 24 + 24 * 6 + 6);
        let x = Tensor::<3>::random([2, 5, 6], Distribution::Default, &device);
        let whole = mlp.forward(x.clone()).slice([1..2, 3..4, 0..6]);
        let alone = mlp.forward(x.slice([1..2, 3..4, 0..6]));
        whole
            .into_data()
            .assert_approx_eq::<f32>(&alone.into_data(), burn::tensor::Tolerance::absolute(1e-6));
    }

    #[test]
    fn empty_widths_are_refused_by_name() {
        let device = Device::default();
        let refused = |config: MlpConfig| config.try_init(&device).unwrap_err();
        assert_eq!(
            refused(MlpConfig::new(0)),
            AttentionError::Zero { field: "d_model" }
        );
        assert_eq!(
            refused(MlpConfig::new(4).with_d_hidden(Some(0))),
            AttentionError::Zero { field: "d_hidden" }
        );
    }
}
