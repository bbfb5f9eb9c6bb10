//! The norm before a projection, whose weight is taken into the projection's.
//!
//! `(g * n(x)) W = n(x) (g W)` with `n(x) = x / sqrt(mean(x^2) + epsilon)`: the weight `g` scales rows of `W`
//! instead of tokens, so that no pass over the tokens is made for it, and its gradient is a sum over the
//! columns of `W`'s gradient instead of over the tokens (measured: 2 ms for each norm on 65,536 tokens).

use burn::nn::RmsNorm;
use burn::tensor::Tensor;
use mamba_ssm_linear::{Linear, project};

use crate::ops::normalise::normalise;

/// `n(x)`, in the type of `x`, computed in that of the weight or in f32: half precision has not the digits
/// for it.
fn normed(norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
    normalise(x, norm.epsilon, norm.gamma.val().dtype().into())
}

/// The norm of `x` through a projection.
pub(crate) fn project_normalised(linear: &Linear, norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
    let x = normed(norm, x);
    let weight = linear.weight.val() * norm.gamma.val().unsqueeze_dim(1);
    project(x, weight, linear.bias.as_ref().map(|bias| bias.val()))
}

/// The whole norm where no projection follows: one with the weight on its diagonal.
pub(crate) fn normalised(norm: &RmsNorm, x: Tensor<3>) -> Tensor<3> {
    let gamma = norm.gamma.val();
    let width = gamma.dims()[0];
    let ones = Tensor::<2>::eye(width, &gamma.device()).cast(gamma.dtype());
    project(normed(norm, x), ones * gamma.unsqueeze_dim(1), None)
}

#[cfg(test)]
mod tests {
    use burn::nn::RmsNormConfig;
    use burn::tensor::{Device, Tolerance};
    use mamba_ssm_linear::LinearConfig;

    use super::*;

    #[test]
    fn both_ways_equal_the_norm_with_gradients() {
        let device = Device::default().autodiff();
        let mut norm = RmsNormConfig::new(6).init(&device);
        norm.gamma = norm
            .gamma
            .map(|_| Tensor::from_floats([0.5, 2.0, 1.5, 0.7, 1.0, 1.2], &device).require_grad());
        let linear = LinearConfig::new(6, 4).init(&device);
        let waves: Vec<f32> = (0..60).map(|i| (1.7 * i as f32).sin()).collect();
        let x = Tensor::<1>::from_floats(waves.as_slice(), &device);
        let x = x.reshape([2, 5, 6]).detach().require_grad();
        let of = |y: Tensor<3>| {
            let gradients = y.clone().powi_scalar(3).sum().backward();
            let dx = x.grad(&gradients).expect("x is a leaf");
            let gamma = norm.gamma.val().grad(&gradients);
            let dgamma = gamma.expect("the weight is a leaf");
            // Read last: what was read on CubeCL's CPU runtime shares the memory that a later operation, here
            // the power, may write its result into.
            [y.into_data(), dx.into_data(), dgamma.into_data()]
        };
        let close = |found: Tensor<3>, expected: Tensor<3>| {
            for (found, expected) in of(found).into_iter().zip(of(expected)) {
                let tolerance = Tolerance::relative(1e-4).set_absolute(1e-4);
                found.assert_approx_eq::<f32>(&expected, tolerance);
            }
        };
        close(normalised(&norm, x.clone()), norm.forward(x.clone()));
        close(
            project_normalised(&linear, &norm, x.clone()),
            linear.forward(norm.forward(x.clone())),
        );
    }
}
