use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};

use crate::ops::project::project;

/// Configuration of a [`Linear`] projection.
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// Features of a token coming in.
    pub d_input: usize,
    /// Features of a token going out.
    pub d_output: usize,
    /// Whether to add a bias.
    #[config(default = true)]
    pub bias: bool,
}

impl LinearConfig {
    /// Creates the module, weights and bias drawn from `U(-k, k)` with `k = 1 / sqrt(d_input)`
    /// (`torch.nn.Linear`'s initialisation).
    pub fn init(&self, device: &Device) -> Linear {
        let k = 1.0 / (self.d_input.max(1) as f64).sqrt();
        let draw = Distribution::Uniform(-k, k);
        Linear {
            weight: Param::from_tensor(Tensor::random([self.d_input, self.d_output], draw, device)),
            bias: self
                .bias
                .then(|| Param::from_tensor(Tensor::random([self.d_output], draw, device))),
        }
    }
}

/// A projection of tokens, `y = x W + b`, with the parameter names and layout of Burn's own `Linear`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_input, d_output]`.
    pub weight: Param<Tensor<2>>,
    /// `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Projects the last axis: `[.., d_input]` to `[.., d_output]`, in the type of `x`, which may be half
    /// precision where the parameters are f32. See [`project`].
    ///
    /// # Panics
    ///
    /// When the last axis of `x` is not `d_input`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        project(
            x,
            self.weight.val(),
            self.bias.as_ref().map(|bias| bias.val()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Tolerance;

    #[test]
    fn forward_projects_every_token_of_any_rank() {
        let device = Device::default();
        let linear = Linear {
            weight: Param::from_tensor(Tensor::from_floats([[1.0, 2.0], [3.0, 4.0]], &device)),
            bias: Some(Param::from_tensor(Tensor::from_floats(
                [0.5, -0.5],
                &device,
            ))),
        };
        let x = Tensor::<3>::from_floats([[[1.0, 0.0]], [[0.0, 1.0]]], &device);
        let y = linear.forward(x);
        assert_eq!(y.dims(), [2, 1, 2]);
        assert_eq!(
            y.into_data().try_to_vec::<f32>().unwrap(),
            vec![1.5, 1.5, 3.5, 3.5]
        );
    }

    #[test]
    fn gradients_are_the_products_of_the_definition() {
        let device = Device::default().autodiff();
        let linear = LinearConfig::new(3, 2).init(&device);
        let x = Tensor::<3>::random([2, 5, 3], Distribution::Default, &device).require_grad();
        let dy = Tensor::<3>::random([2, 5, 2], Distribution::Default, &device);
        let grads = (linear.forward(x.clone()) * dy.clone()).sum().backward();

        let (x2, dy2) = (
            x.clone().inner().reshape([10, 3]),
            dy.inner().reshape([10, 2]),
        );
        // Sums of products, not `matmul`: on tensor cores that rounds its operands to TF32.
        let close = |a: burn::tensor::TensorData, b: burn::tensor::TensorData| {
            a.assert_approx_eq::<f32>(&b, Tolerance::relative(1e-5).set_absolute(1e-6));
        };
        let dw = linear.weight.val().grad(&grads).unwrap();
        close(
            dw.into_data(),
            (x2.unsqueeze_dim::<3>(2) * dy2.clone().unsqueeze_dim(1))
                .sum_dim(0)
                .reshape([3, 2])
                .into_data(),
        );
        let db = linear.bias.as_ref().unwrap().val().grad(&grads).unwrap();
        close(
            db.into_data(),
            dy2.clone().sum_dim(0).reshape([2]).into_data(),
        );
        let dx = x.grad(&grads).unwrap().reshape([10, 3]);
        close(
            dx.into_data(),
            (dy2.unsqueeze_dim::<3>(1) * linear.weight.val().inner().unsqueeze_dim(0))
                .sum_dim(2)
                .reshape([10, 3])
                .into_data(),
        );
    }

    #[test]
    #[should_panic(expected = "d_input = 3")]
    fn a_wrong_width_is_refused_with_the_shapes() {
        let device = Device::default();
        LinearConfig::new(3, 2)
            .init(&device)
            .forward(Tensor::<2>::zeros([4, 5], &device));
    }
}
