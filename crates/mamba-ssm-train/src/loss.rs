//! Masked, weighted Smooth L1 (Huber) loss over sequences.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// Settings of [`masked_huber`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HuberConfig {
    /// Width of the quadratic zone, in the unit of the target. Default 0.01.
    pub beta: f64,
    /// One weight per feature; empty (the default) means 1 for each.
    pub feature_weights: Vec<f32>,
}

impl Default for HuberConfig {
    fn default() -> Self {
        Self {
            beta: 0.01,
            feature_weights: Vec::new(),
        }
    }
}

impl HuberConfig {
    /// Checks that `beta` is positive and the weights are finite, not negative and not all zero.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] naming the setting.
    pub fn validate(&self) -> Result<(), TrainError> {
        if !(self.beta.is_finite() && self.beta > 0.0) {
            return Err(TrainError::Config {
                field: "loss.beta",
                problem: format!("is {}, but must be above zero", self.beta),
            });
        }
        let weights = &self.feature_weights;
        if weights.iter().any(|w| !w.is_finite() || *w < 0.0) {
            return Err(TrainError::Config {
                field: "loss.feature_weights",
                problem: format!("is {weights:?}, but weights must be finite and not negative"),
            });
        }
        if !weights.is_empty() && weights.iter().all(|w| *w == 0.0) {
            return Err(TrainError::Config {
                field: "loss.feature_weights",
                problem: "is all zeros, which leaves nothing to learn".into(),
            });
        }
        Ok(())
    }
}

/// Masked, feature-weighted Smooth L1 loss, a scalar in a tensor of one element.
///
/// With `d = prediction - target`, each element costs `d^2 / (2 beta)` where `|d| < beta` and
/// `|d| - beta / 2` elsewhere (PyTorch's `smooth_l1_loss`), times its feature's weight. Costs are
/// summed over features and valid positions and divided by the number of valid positions (at
/// least 1; not times the feature count).
///
/// `prediction` and `target` are `[batch, length, features]`; `mask` is `[batch, length]`, valid
/// where it is above zero. Whatever stands at a masked-out position, NaN and infinity included,
/// reaches neither the loss nor the gradient with respect to `prediction`.
///
/// # Panics
///
/// If the shapes do not fit together, or `feature_weights` is neither empty nor one per feature.
///
/// # Example
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_train::{HuberConfig, masked_huber};
///
/// let device = Device::default();
/// let prediction = Tensor::<3>::from_floats([[[0.0], [9.0]]], &device);
/// let target = Tensor::<3>::from_floats([[[1.0], [f32::NAN]]], &device);
/// let mask = Tensor::<2>::from_floats([[1.0, 0.0]], &device);
/// let config = HuberConfig { beta: 0.5, ..HuberConfig::default() };
/// let loss: f32 = masked_huber(prediction, target, mask, &config).into_scalar();
/// assert_eq!(loss, 0.75); // |-1| - 0.5 / 2, over one valid position
/// ```
pub fn masked_huber(
    prediction: Tensor<3>,
    target: Tensor<3>,
    mask: Tensor<2>,
    config: &HuberConfig,
) -> Tensor<1> {
    let (sum, count) = masked_huber_sum(prediction, target, mask, config);
    sum / count.clamp_min(1.0)
}

/// The two halves of [`masked_huber`]: the weighted sum of costs and the number of valid
/// positions, each of one element, so that a mean can be taken over several batches.
///
/// # Panics
///
/// As [`masked_huber`].
pub fn masked_huber_sum(
    prediction: Tensor<3>,
    target: Tensor<3>,
    mask: Tensor<2>,
    config: &HuberConfig,
) -> (Tensor<1>, Tensor<1>) {
    let [batch, length, features] = prediction.dims();
    assert_eq!(
        target.dims(),
        [batch, length, features],
        "masked_huber: target must have the prediction's shape"
    );
    assert_eq!(
        mask.dims(),
        [batch, length],
        "masked_huber: mask must be [batch, length] of the prediction"
    );
    let weights = &config.feature_weights;
    assert!(
        weights.is_empty() || weights.len() == features,
        "masked_huber: {} feature weights for {features} features",
        weights.len()
    );

    let valid = mask.greater_scalar(0.0);
    let count = valid.clone().float().sum();
    let invalid = valid
        .bool_not()
        .unsqueeze_dim::<3>(2)
        .expand([batch, length, features]);

    // Filling before the nonlinearity keeps NaN out of the gradient as well: afterwards it
    // would be multiplied by zero, which is NaN.
    let difference = (prediction - target).mask_fill(invalid, 0.0);
    // With c = clamp(d, -beta, beta), c (d - c / 2) / beta is d^2 / (2 beta) inside the zone and
    // |d| - beta / 2 outside, without a branch.
    let clamped = difference.clone().clamp(-config.beta, config.beta);
    let cost = clamped.clone() * (difference - clamped.mul_scalar(0.5));
    let cost = if weights.is_empty() {
        cost
    } else {
        let data = TensorData::new(weights.clone(), [1, 1, features]);
        let weights = Tensor::<3>::from_data(data, &cost.device());
        cost * weights
    };
    (cost.sum().div_scalar(config.beta), count)
}

/// Aligns one-step-ahead forecasts with what they forecast: position `t` of `prediction` with
/// position `t + 1` of `values` and `mask`.
///
/// Takes `prediction` and `values` `[batch, length, features]` and `mask` `[batch, length]`;
/// returns prediction, target and mask of length `length - 1`, ready for [`masked_huber`].
///
/// # Panics
///
/// If `length` is below 2 or the shapes do not fit together.
///
/// # Example
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_train::{HuberConfig, masked_huber, next_step};
///
/// let device = Device::default();
/// let values = Tensor::<3>::from_floats([[[1.0], [2.0], [3.0]]], &device);
/// let mask = Tensor::<2>::ones([1, 3], &device);
/// let perfect = Tensor::<3>::from_floats([[[2.0], [3.0], [99.0]]], &device);
/// let (prediction, target, mask) = next_step(perfect, values, mask);
/// let loss: f32 = masked_huber(prediction, target, mask, &HuberConfig::default()).into_scalar();
/// assert_eq!(loss, 0.0);
/// ```
pub fn next_step(
    prediction: Tensor<3>,
    values: Tensor<3>,
    mask: Tensor<2>,
) -> (Tensor<3>, Tensor<3>, Tensor<2>) {
    let [batch, length, features] = prediction.dims();
    assert!(length >= 2, "next_step: needs at least two positions");
    assert_eq!(
        values.dims(),
        [batch, length, features],
        "next_step: values must have the prediction's shape"
    );
    assert_eq!(
        mask.dims(),
        [batch, length],
        "next_step: mask must be [batch, length] of the prediction"
    );
    (
        prediction.narrow(1, 0, length - 1),
        values.narrow(1, 1, length - 1),
        mask.narrow(1, 1, length - 1),
    )
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn scalar(loss: Tensor<1>) -> f32 {
        loss.into_scalar()
    }

    fn config(beta: f64, weights: &[f32]) -> HuberConfig {
        HuberConfig {
            beta,
            feature_weights: weights.to_vec(),
        }
    }

    #[test]
    fn both_zones_weights_and_mask_by_hand() {
        let device = Device::default();
        // d = (0.25, -2) and (0.5, 3); the third position is masked out.
        let prediction =
            Tensor::<3>::from_floats([[[0.25, -2.0], [0.5, 3.0], [7.0, 7.0]]], &device);
        let target = Tensor::<3>::zeros([1, 3, 2], &device);
        let mask = Tensor::<2>::from_floats([[1.0, 1.0, 0.0]], &device);
        // beta 0.5: 0.0625, 1.75 | 0.25, 2.75; weights 1 and 0.1; two valid positions.
        let loss = masked_huber(prediction, target, mask, &config(0.5, &[1.0, 0.1]));
        let expected = (0.0625 + 0.175 + 0.25 + 0.275) / 2.0;
        assert!((scalar(loss) - expected).abs() < 1e-6);
    }

    #[test]
    fn gradient_is_the_clamped_difference() {
        let device = Device::default();
        let prediction =
            Tensor::<3>::from_floats([[[0.25], [-2.0]]], &device.clone().autodiff()).require_grad();
        let target = Tensor::<3>::zeros([1, 2, 1], &device);
        let mask = Tensor::<2>::ones([1, 2], &device);
        let loss = masked_huber(prediction.clone(), target, mask, &config(0.5, &[]));
        let grads = loss.backward();
        let grad: Vec<f32> = prediction
            .grad(&grads)
            .unwrap()
            .into_data()
            .iter()
            .collect();
        // d / beta inside, sign outside, over two positions.
        assert_eq!(grad, vec![0.25, -0.5]);
    }

    #[test]
    fn masked_out_nan_and_infinity_touch_neither_loss_nor_gradient() {
        let device = Device::default();
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let prediction =
                Tensor::<3>::from_floats([[[1.0], [2.0], [poison]]], &device.clone().autodiff())
                    .require_grad();
            let target = Tensor::<3>::from_floats([[[0.0], [poison], [3.0]]], &device);
            let mask = Tensor::<2>::from_floats([[1.0, 0.0, 0.0]], &device);
            let loss = masked_huber(prediction.clone(), target, mask, &config(0.01, &[]));
            let grads = loss.backward();
            let grad: Vec<f32> = prediction
                .grad(&grads)
                .unwrap()
                .into_data()
                .iter()
                .collect();
            assert_eq!(grad, vec![1.0, 0.0, 0.0], "poison {poison}");
            assert!((scalar(loss) - 0.995).abs() < 1e-6);
        }
    }

    #[test]
    fn nothing_valid_costs_nothing() {
        let device = Device::default();
        let prediction = Tensor::<3>::ones([2, 3, 1], &device);
        let target = Tensor::<3>::zeros([2, 3, 1], &device);
        let mask = Tensor::<2>::zeros([2, 3], &device);
        assert_eq!(
            scalar(masked_huber(prediction, target, mask, &config(1.0, &[]))),
            0.0
        );
    }

    #[test]
    #[should_panic(expected = "2 feature weights for 1 features")]
    fn wrong_number_of_weights_panics() {
        let device = Device::default();
        let x = Tensor::<3>::ones([1, 1, 1], &device);
        let mask = Tensor::<2>::ones([1, 1], &device);
        masked_huber(x.clone(), x, mask, &config(1.0, &[1.0, 1.0]));
    }

    #[test]
    fn bad_settings_are_refused() {
        for (bad, field) in [
            (config(0.0, &[]), "loss.beta"),
            (config(f64::NAN, &[]), "loss.beta"),
            (config(1.0, &[1.0, -1.0]), "loss.feature_weights"),
            (config(1.0, &[0.0, 0.0]), "loss.feature_weights"),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
