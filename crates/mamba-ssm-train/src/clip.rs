//! The gradient norm over all parameters, and clipping by it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

/// The Euclidean norm of all gradients of `model` taken together, in one element on the device;
/// `None` if no parameter has a gradient. Nothing is read back, so the device is not awaited.
///
/// It is NaN or infinite if any gradient is.
pub fn gradient_norm<M: Module>(model: &M, gradients: &GradientsParams) -> Option<Tensor<1>> {
    let mut visitor = SquareSums {
        gradients,
        sums: Vec::new(),
    };
    model.visit(&mut visitor);
    if visitor.sums.is_empty() {
        return None;
    }
    Some(Tensor::cat(visitor.sums, 0).sum().sqrt())
}

/// Multiplies every gradient of `model` by `factor`.
pub fn scale_gradients<M: Module>(
    model: &M,
    mut gradients: GradientsParams,
    factor: f64,
) -> GradientsParams {
    model.visit(&mut Scale {
        gradients: &mut gradients,
        factor,
    });
    gradients
}

/// Scales all gradients of `model` down by the same factor so that their global norm is at most
/// `max_norm`, as `torch.nn.utils.clip_grad_norm_` (Burn's own clipping works parameter by
/// parameter). `norm` is the value of [`gradient_norm`], read back by the caller.
///
/// # Example
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_train::{clip_gradients, gradient_norm};
///
/// let device = Device::default().autodiff();
/// let model = LinearConfig::new(2, 2).init(&device);
/// let loss = model.forward(Tensor::<2>::ones([4, 2], &device)).sum();
/// let gradients = GradientsParams::from_grads(loss.backward(), &model);
///
/// let norm: f32 = gradient_norm(&model, &gradients).unwrap().into_scalar();
/// let clipped = clip_gradients(&model, gradients, norm.into(), 0.5);
/// let norm: f32 = gradient_norm(&model, &clipped).unwrap().into_scalar();
/// assert!((norm - 0.5).abs() < 1e-5);
/// ```
pub fn clip_gradients<M: Module>(
    model: &M,
    gradients: GradientsParams,
    norm: f64,
    max_norm: f64,
) -> GradientsParams {
    // PyTorch's own term against division by zero.
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        scale_gradients(model, gradients, factor)
    } else {
        gradients
    }
}

struct SquareSums<'a> {
    gradients: &'a GradientsParams,
    sums: Vec<Tensor<1>>,
}

impl ModuleVisitor for SquareSums<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.sums.push(gradient.square().sum());
        }
    }
}

struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients
                .register(param.id, gradient.mul_scalar(self.factor));
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    /// A model with gradient (3, 0) for the weight and 4 for the bias: norm 5.
    fn three_four(scale: f32) -> (Linear, GradientsParams) {
        let device = Device::default();
        let model = LinearConfig::new(2, 1).init(&device.clone().autodiff());
        let mut gradients = GradientsParams::new();
        let weight = Tensor::<2>::from_floats([[3.0 * scale], [0.0]], &device);
        let bias = Tensor::<1>::from_floats([4.0 * scale], &device);
        gradients.register(model.weight.id, weight);
        gradients.register(model.bias.as_ref().unwrap().id, bias);
        (model, gradients)
    }

    fn values(model: &Linear, gradients: &GradientsParams) -> Vec<f32> {
        let weight = gradients.get::<2>(model.weight.id).unwrap().into_data();
        let bias = model.bias.as_ref().unwrap().id;
        let bias = gradients.get::<1>(bias).unwrap().into_data();
        weight.iter::<f32>().chain(bias.iter()).collect()
    }

    fn norm(model: &Linear, gradients: &GradientsParams) -> f64 {
        let norm: f32 = gradient_norm(model, gradients).unwrap().into_scalar();
        norm.into()
    }

    #[test]
    fn the_norm_spans_all_parameters() {
        let (model, gradients) = three_four(1.0);
        assert_eq!(norm(&model, &gradients), 5.0);
        assert!(gradient_norm(&model, &GradientsParams::new()).is_none());
    }

    #[test]
    fn large_gradients_keep_their_direction() {
        let (model, gradients) = three_four(1.0);
        let clipped = clip_gradients(&model, gradients, 5.0, 0.5);
        // max_norm / (norm + 1e-6) of each, as clip_grad_norm_ has it.
        let expected = [0.3 * (5.0 / 5.000001), 0.0, 0.4 * (5.0 / 5.000001)];
        for (a, b) in values(&model, &clipped).iter().zip(expected) {
            assert!((f64::from(*a) - b).abs() < 1e-7);
        }
    }

    #[test]
    fn small_gradients_stay_as_they_are() {
        let (model, gradients) = three_four(0.01);
        let before = values(&model, &gradients);
        let after = clip_gradients(&model, gradients, 0.05, 0.5);
        assert_eq!(values(&model, &after), before);
    }

    #[test]
    fn one_bad_element_makes_the_norm_bad() {
        let (model, gradients) = three_four(f32::NAN);
        assert!(norm(&model, &gradients).is_nan());
        let (model, gradients) = three_four(f32::INFINITY);
        assert!(!norm(&model, &gradients).is_finite());
    }
}
