//! A small model with dropout and a batch source that repeats itself.

use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_train::{
    BatchIter, BatchSource, BoxError, EpochRecord, Forecaster, HuberConfig, Outcome, Precision,
    Reporter, StepReport, StopFlag, TrainBatch, TrainConfig,
};

/// Runs seed the device's random numbers, which all threads share: tests take turns.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[derive(Module, Debug)]
pub struct Tiny {
    first: Linear,
    dropout: Dropout,
    second: Linear,
    mixed: bool,
}

impl Tiny {
    pub fn new(width: usize) -> Self {
        let device = Device::default();
        Self {
            first: LinearConfig::new(2, width).init(&device),
            dropout: DropoutConfig::new(0.0).init(),
            second: LinearConfig::new(width, 2).init(&device),
            mixed: false,
        }
    }

    pub fn with_mixed_precision(mut self) -> Self {
        self.mixed = true;
        self
    }

    pub fn with_dropout(mut self, prob: f64) -> Self {
        self.dropout = DropoutConfig::new(prob).init();
        self
    }
}

impl Forecaster for Tiny {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let hidden = self.first.forward(input).tanh();
        self.second.forward(self.dropout.forward(hidden))
    }

    fn supports(&self, precision: Precision) -> bool {
        precision == Precision::F32 || self.mixed
    }

    fn forward_with(&self, input: Tensor<3>, precision: Precision) -> Tensor<3> {
        let dtype = precision.dtype();
        let project = |linear: &Linear, x: Tensor<3>| {
            let weight = linear.weight.val().cast(dtype).unsqueeze::<3>();
            let bias = linear.bias.as_ref().unwrap().val();
            x.cast(dtype).matmul(weight) + bias.cast(dtype).unsqueeze::<3>()
        };
        let hidden = project(&self.first, input).tanh();
        project(&self.second, self.dropout.forward(hidden))
    }
}

/// All parameters, one after another.
pub fn values<M: Module>(model: &M) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>());
        }
    }
    let mut visitor = Values(Vec::new());
    model.visit(&mut visitor);
    visitor.0
}

/// A deterministic series: sums of sines, the next value to be forecast.
pub struct Waves {
    pub batches: usize,
    pub val_batches: usize,
    /// Batches (epoch, index) whose input is NaN.
    pub poisoned: Vec<(usize, usize)>,
    /// A batch (epoch, index) that cannot be read.
    pub unreadable: Option<(usize, usize)>,
    /// Validation batches that were asked for.
    pub validated: usize,
    /// The training batches that were asked for.
    pub seen: Vec<(usize, usize)>,
}

impl Waves {
    pub fn new(batches: usize) -> Self {
        Self {
            batches,
            val_batches: 3,
            poisoned: Vec::new(),
            unreadable: None,
            validated: 0,
            seen: Vec::new(),
        }
    }

    fn batch(phase: f32) -> TrainBatch {
        let device = Device::default();
        let rows: Vec<f32> = (0..2 * 9)
            .flat_map(|i| {
                let t = phase + 0.3 * i as f32;
                [t.sin(), (0.7 * t).cos()]
            })
            .collect();
        let values = Tensor::<3>::from_data(TensorData::new(rows, [2, 9, 2]), &device);
        TrainBatch {
            input: values.clone().narrow(1, 0, 8),
            target: values.narrow(1, 1, 8),
            mask: Tensor::ones([2, 8], &device),
        }
    }
}

impl BatchSource for Waves {
    fn train_len(&self) -> usize {
        self.batches
    }

    fn train_epoch(&mut self, epoch: usize, start: usize) -> Result<BatchIter<'_>, BoxError> {
        Ok(Box::new((start..self.batches).map(move |index| {
            self.seen.push((epoch, index));
            if self.unreadable == Some((epoch, index)) {
                return Err("the shard is cut short".into());
            }
            let mut batch = Self::batch((epoch * 31 + index) as f32);
            if self.poisoned.contains(&(epoch, index)) {
                batch.input = batch.input.mul_scalar(f32::NAN);
            }
            Ok(batch)
        })))
    }

    fn validation(&mut self) -> Result<BatchIter<'_>, BoxError> {
        Ok(Box::new((0..self.val_batches).map(|index| {
            self.validated += 1;
            Ok(Self::batch(1000.5 + index as f32))
        })))
    }
}

pub fn config(epochs: usize) -> TrainConfig {
    TrainConfig {
        epochs,
        lr: 0.01,
        accumulation: 2,
        loss: HuberConfig {
            beta: 0.5,
            ..HuberConfig::default()
        },
        ..TrainConfig::default()
    }
}

/// What a reporter heard.
#[derive(Default)]
pub struct Heard {
    pub steps: Vec<StepReport>,
    pub epochs: Vec<(EpochRecord, bool)>,
    pub messages: Vec<String>,
    pub outcome: Option<Outcome>,
}

/// Writes everything down, and raises a flag at a step.
pub struct Listener {
    pub heard: Arc<Mutex<Heard>>,
    pub stop_at: Option<(usize, StopFlag)>,
}

impl Reporter for Listener {
    fn step(&mut self, report: &StepReport) {
        if let Some((step, flag)) = &self.stop_at
            && *step == report.step
        {
            flag.request();
        }
        self.heard.lock().unwrap().steps.push(report.clone());
    }

    fn epoch(&mut self, record: &EpochRecord, improved: bool) {
        let mut heard = self.heard.lock().unwrap();
        heard.epochs.push((record.clone(), improved));
    }

    fn message(&mut self, text: &str) {
        self.heard.lock().unwrap().messages.push(text.to_string());
    }

    fn end(&mut self, outcome: Outcome) {
        self.heard.lock().unwrap().outcome = Some(outcome);
    }
}
