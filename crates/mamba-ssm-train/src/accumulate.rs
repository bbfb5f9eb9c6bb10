//! Gradient accumulation over micro-batches.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

/// Adds up the gradients of micro-batches until an optimizer step is due.
///
/// Each loss is divided by the number of micro-batches per step before it is differentiated, so
/// that a full group yields the gradient of the mean loss. As in PyTorch Lightning, a group cut
/// short by the end of an epoch is divided by the same number, so that every micro-batch has the
/// same weight. Losses stay on the device until [`take`](Self::take) hands them out.
pub struct Accumulation<M> {
    per_step: usize,
    count: usize,
    gradients: GradientsAccumulator<M>,
    loss_sum: Option<Tensor<1>>,
}

/// What [`Accumulation::take`] returns.
pub struct Accumulated {
    /// The summed gradients.
    pub gradients: GradientsParams,
    /// The sum of the (undivided) losses, one element, without autodiff.
    pub loss_sum: Tensor<1>,
    /// The number of micro-batches.
    pub count: usize,
}

impl<M: Module> Accumulation<M> {
    /// `per_step` micro-batches, at least 1, make one step.
    pub fn new(per_step: usize) -> Self {
        Self {
            per_step: per_step.max(1),
            count: 0,
            gradients: GradientsAccumulator::new(),
            loss_sum: None,
        }
    }

    /// Differentiates `loss` (one element) with respect to the parameters of `model`.
    ///
    /// # Panics
    ///
    /// If `loss` does not depend on a parameter that requires gradients.
    pub fn add(&mut self, model: &M, loss: Tensor<1>) {
        let value = loss.clone().inner();
        let gradients = loss.div_scalar(self.per_step as f64).backward();
        let gradients = GradientsParams::from_grads(gradients, model);
        self.gradients.accumulate(model, gradients);
        self.loss_sum = Some(match self.loss_sum.take() {
            Some(sum) => sum + value,
            None => value,
        });
        self.count += 1;
    }

    /// Whether a step is due.
    pub fn is_full(&self) -> bool {
        self.count >= self.per_step
    }

    /// Whether nothing has been added since the last step.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Hands out what was added and starts anew; `None` if there is nothing.
    pub fn take(&mut self) -> Option<Accumulated> {
        let loss_sum = self.loss_sum.take()?;
        Some(Accumulated {
            gradients: self.gradients.grads(),
            loss_sum,
            count: std::mem::take(&mut self.count),
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    fn loss(model: &Linear, x: &[[f32; 2]]) -> Tensor<1> {
        let device = Device::default();
        let rows: Vec<f32> = x.iter().flatten().copied().collect();
        let x = Tensor::<1>::from_floats(rows.as_slice(), &device).reshape([x.len(), 2]);
        model.forward(x).square().mean()
    }

    fn gradient(model: &Linear, gradients: &GradientsParams) -> Vec<f32> {
        let gradient = gradients.get::<2>(model.weight.id).unwrap();
        gradient.into_data().iter().collect()
    }

    #[test]
    fn micro_batches_add_up_to_the_whole_batch() {
        let device = Device::default().autodiff();
        let model = LinearConfig::new(2, 3).init(&device);
        let rows = [[1.0, 2.0], [-1.0, 0.5], [3.0, 0.1], [0.2, -2.0]];

        let mut whole = Accumulation::new(1);
        whole.add(&model, loss(&model, &rows));
        let mut parts = Accumulation::new(2);
        parts.add(&model, loss(&model, &rows[..2]));
        assert!(!parts.is_full());
        parts.add(&model, loss(&model, &rows[2..]));
        assert!(parts.is_full());

        let (whole, parts) = (whole.take().unwrap(), parts.take().unwrap());
        assert_eq!((whole.count, parts.count), (1, 2));
        let pairs = gradient(&model, &whole.gradients)
            .into_iter()
            .zip(gradient(&model, &parts.gradients));
        for (a, b) in pairs {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        let (a, b): (f32, f32) = (whole.loss_sum.into_scalar(), parts.loss_sum.into_scalar());
        assert!((a - b / 2.0).abs() < 1e-5);
    }

    #[test]
    fn a_short_group_is_divided_by_the_full_number_and_taking_empties() {
        let device = Device::default().autodiff();
        let model = LinearConfig::new(2, 3).init(&device);
        let rows = [[1.0, 2.0]];
        let mut full = Accumulation::new(1);
        full.add(&model, loss(&model, &rows));
        let mut short = Accumulation::new(4);
        short.add(&model, loss(&model, &rows));
        let full = gradient(&model, &full.take().unwrap().gradients);
        let quarter = gradient(&model, &short.take().unwrap().gradients);
        for (a, b) in full.iter().zip(quarter) {
            assert!((a / 4.0 - b).abs() < 1e-6);
        }
        assert!(short.is_empty() && short.take().is_none());
    }
}
