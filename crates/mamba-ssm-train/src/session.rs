//! The training loop.

use std::path::Path;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};

use crate::accumulate::{Accumulated, Accumulation};
use crate::batch::{BatchSource, Forecaster, TrainBatch};
use crate::checkpoint::{Best, CheckpointKind, PartialEpoch, TrainState, save_checkpoint};
use crate::clip::{clip_gradients, gradient_norm};
use crate::config::{Precision, TrainConfig};
use crate::error::{BoxError, TrainError};
use crate::history::{EpochRecord, write_history};
use crate::loss::{masked_huber, masked_huber_sum};
use crate::optimizer::{ModuleAdamW, initialise};
use crate::progress::{Reporter, StepReport};
use crate::schedule::ReduceOnPlateau;
use crate::stopping::EarlyStopping;
use crate::trainer::{Fit, Outcome, StopFlag};

/// One invocation of a run: everything but the model and the data.
pub(crate) struct Session<'a> {
    config: &'a TrainConfig,
    run: &'a Path,
    reporter: &'a mut dyn Reporter,
    stop: &'a StopFlag,
    device: Device,
    optimizer: ModuleAdamW,
    plateau: ReduceOnPlateau,
    stopping: EarlyStopping,
    state: TrainState,
    deadline: Option<Instant>,
    meter: Meter,
}

impl<'a> Session<'a> {
    pub(crate) fn new<M: Module>(
        config: &'a TrainConfig,
        run: &'a Path,
        reporter: &'a mut dyn Reporter,
        stop: &'a StopFlag,
        model: &M,
        state: TrainState,
    ) -> Self {
        // Burn draws initial values on first use; later they would depend on the run's seed.
        initialise(model);
        let limit = config.max_minutes.and_then(minutes);
        Self {
            config,
            run,
            reporter,
            stop,
            device: model.devices().first().cloned().unwrap_or_default(),
            optimizer: ModuleAdamW::new(config),
            plateau: ReduceOnPlateau::restore(config.plateau.clone(), state.plateau.clone()),
            stopping: EarlyStopping::restore(
                config.early_stopping_patience,
                config.early_stopping_min_delta,
                state.stopping.clone(),
            ),
            state,
            deadline: limit.and_then(|limit| Instant::now().checked_add(limit)),
            meter: Meter::default(),
        }
    }

    pub(crate) fn optimizer(&mut self) -> &mut ModuleAdamW {
        &mut self.optimizer
    }

    pub(crate) fn save<M: Module>(
        &self,
        kind: CheckpointKind,
        model: &M,
    ) -> Result<(), TrainError> {
        save_checkpoint(self.run, kind, model, &self.optimizer, &self.state)
    }

    /// Trains to the end, whichever it is.
    pub(crate) fn run<M: Forecaster, S: BatchSource + ?Sized>(
        mut self,
        model: M,
        source: &mut S,
    ) -> Result<Fit<M>, TrainError> {
        self.check_precision(&model)?;
        if self.state.batches_per_epoch == 0 {
            return Err(TrainError::NoBatches { stage: "training" });
        }
        write_history(self.run, &self.state.history)?;
        self.reporter.start(&self.state);
        let (model, outcome) = self.epochs(model, source)?;
        self.reporter.end(outcome);
        Ok(Fit {
            model,
            outcome,
            state: self.state,
        })
    }

    fn check_precision<M: Forecaster>(&self, model: &M) -> Result<(), TrainError> {
        let precision = self.config.precision;
        let lacks = if !model.supports(precision) {
            "this model"
        } else if !self.device.supports_dtype(precision.dtype()) {
            "this device"
        } else {
            return Ok(());
        };
        Err(TrainError::Config {
            field: "precision",
            problem: format!("is {precision:?}, which {lacks} does not support; use `f32`"),
        })
    }

    fn epochs<M: Forecaster, S: BatchSource + ?Sized>(
        &mut self,
        mut model: M,
        source: &mut S,
    ) -> Result<(M, Outcome), TrainError> {
        while self.state.epoch < self.config.epochs {
            if self.stopping.exhausted() {
                return Ok((model, Outcome::EarlyStopped));
            }
            // Between epochs the last checkpoint is up to date.
            if let Some(outcome) = self.halt() {
                return Ok((model, outcome));
            }
            let halt;
            (model, halt) = self.train_epoch(model, source)?;
            if halt == Some(Outcome::Interrupted) {
                self.save(CheckpointKind::Last, &model)?;
                return Ok((model, Outcome::Interrupted));
            }
            let Some(val_loss) = self.validate(&model, source)? else {
                self.save(CheckpointKind::Last, &model)?;
                return Ok((model, Outcome::Interrupted));
            };
            if let Some(outcome) = halt {
                self.end_within_epoch(&model, val_loss)?;
                return Ok((model, outcome));
            }
            self.end_epoch(&model, val_loss)?;
        }
        Ok((model, Outcome::Finished))
    }

    /// Trains from the present micro-batch to the end of the epoch, or to the step at which the
    /// run has to halt.
    fn train_epoch<M: Forecaster, S: BatchSource + ?Sized>(
        &mut self,
        mut model: M,
        source: &mut S,
    ) -> Result<(M, Option<Outcome>), TrainError> {
        let mut batches = source
            .train_epoch(self.state.epoch, self.state.micro_batch)
            .map_err(failed("training"))?;
        let mut group = Accumulation::new(self.config.accumulation);
        self.meter.start();
        loop {
            let batch = batches.next().transpose().map_err(failed("training"))?;
            let ended = batch.is_none();
            if let Some(batch) = batch {
                self.micro_batch(&model, batch, &mut group)?;
            }
            if (group.is_full() || ended)
                && let Some(group) = group.take()
            {
                model = self.step(model, group)?;
                if let Some(outcome) = self.halt() {
                    return Ok((model, Some(outcome)));
                }
                let every = self.config.checkpoint_every;
                if every > 0 && self.state.step.is_multiple_of(every) {
                    self.save(CheckpointKind::Last, &model)?;
                }
            }
            if ended {
                return Ok((model, None));
            }
        }
    }

    fn halt(&self) -> Option<Outcome> {
        if self.stop.is_requested() {
            Some(Outcome::Interrupted)
        } else if self.meter.micro_batches > 0
            && self.deadline.is_some_and(|at| Instant::now() >= at)
        {
            // However short the limit, every invocation brings the run forward.
            Some(Outcome::TimeLimit)
        } else {
            None
        }
    }

    fn micro_batch<M: Forecaster>(
        &mut self,
        model: &M,
        batch: TrainBatch,
        group: &mut Accumulation<M>,
    ) -> Result<(), TrainError> {
        if group.is_empty() {
            // A resumed run starts at a step: seeding here repeats its dropout masks.
            self.device.seed(self.step_seed());
        }
        let tokens = batch.tokens();
        let prediction = self.forecast(model, &batch);
        batch.check(
            "training",
            &prediction,
            self.config.loss.feature_weights.len(),
        )?;
        let loss = masked_huber(prediction, batch.target, batch.mask, &self.config.loss);
        group.add(model, loss);
        self.state.micro_batch += 1;
        self.state.partial.tokens += tokens;
        self.meter.tokens += tokens;
        self.meter.micro_batches += 1;
        Ok(())
    }

    /// The forecasts of a batch, in f32 whatever the model computes in.
    fn forecast<M: Forecaster>(&self, model: &M, batch: &TrainBatch) -> Tensor<3> {
        let precision = self.config.precision;
        let prediction = model.forward_with(batch.input.clone(), precision);
        match precision {
            Precision::F32 => prediction,
            Precision::Bf16 => prediction.cast(FloatDType::F32),
        }
    }

    /// SplitMix64 over seed, epoch and micro-batch.
    fn step_seed(&self) -> u64 {
        let place = ((self.state.epoch as u64) << 32) ^ self.state.micro_batch as u64;
        let mut z = self
            .state
            .seed
            .wrapping_add(place.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Takes one optimizer step, or skips it if the gradient is NaN or infinite.
    fn step<M: Forecaster>(&mut self, model: M, group: Accumulated) -> Result<M, TrainError> {
        let Accumulated {
            gradients,
            loss_sum,
            count,
        } = group;
        let norm = gradient_norm(&model, &gradients)
            .unwrap_or_else(|| Tensor::zeros([1], &loss_sum.device()));
        let read = read(Tensor::cat(vec![loss_sum, norm], 0))?;
        let (loss_sum, norm) = (read[0], read[1]);
        let seconds = self.meter.lap();
        self.state.partial.seconds += seconds;

        if !(norm.is_finite() && loss_sum.is_finite()) {
            self.skip(norm)?;
            return Ok(model);
        }
        let gradients = if self.config.clip_norm > 0.0 {
            clip_gradients(&model, gradients, norm, self.config.clip_norm)
        } else {
            gradients
        };
        let model = self.optimizer.step(self.plateau.lr(), model, gradients);
        self.state.skipped_in_a_row = 0;
        self.state.step += 1;
        self.state.partial.loss_sum += loss_sum;
        self.state.partial.loss_count += count;
        self.meter.loss_sum += loss_sum;
        self.meter.loss_count += count;
        if self.state.step.is_multiple_of(self.config.log_every) {
            self.report(norm);
        }
        Ok(model)
    }

    fn skip(&mut self, norm: f64) -> Result<(), TrainError> {
        self.state.partial.skipped_steps += 1;
        self.state.skipped_in_a_row += 1;
        let (epoch, step) = (self.state.epoch + 1, self.state.step);
        if self.state.skipped_in_a_row >= self.config.max_skipped_steps {
            return Err(TrainError::NonFiniteGradient {
                count: self.state.skipped_in_a_row,
                epoch,
                step,
            });
        }
        let text = format!("epoch {epoch}, step {step}: skipped, the gradient norm is {norm}");
        self.reporter.message(&text);
        Ok(())
    }

    fn report(&mut self, gradient_norm: f64) {
        let total = self.state.batches_per_epoch;
        let done = self.state.epoch * total + self.state.micro_batch;
        let left = (self.config.epochs * total).saturating_sub(done);
        let mut eta = self.meter.time_for(left);
        if let Some(deadline) = self.deadline {
            eta = eta.min(deadline.saturating_duration_since(Instant::now()));
        }
        let (loss, tokens_per_second) = self.meter.take_window();
        self.reporter.step(&StepReport {
            epoch: self.state.epoch + 1,
            epochs: self.config.epochs,
            micro_batch: self.state.micro_batch,
            micro_batches: total,
            step: self.state.step,
            loss,
            lr: self.plateau.lr(),
            gradient_norm,
            tokens_per_second,
            eta,
        });
    }

    /// The mean loss over the valid positions of the validation batches; `None` if the stop flag
    /// was raised meanwhile.
    fn validate<M: Forecaster, S: BatchSource + ?Sized>(
        &mut self,
        model: &M,
        source: &mut S,
    ) -> Result<Option<f64>, TrainError> {
        let model = model.valid();
        let most = match self.config.max_val_batches {
            0 => usize::MAX,
            most => most,
        };
        let weights = self.config.loss.feature_weights.len();
        let mut sums = Vec::new();
        let batches = source.validation().map_err(failed("validation"))?;
        for batch in batches.take(most) {
            if self.stop.is_requested() {
                return Ok(None);
            }
            let batch = batch.map_err(failed("validation"))?;
            let prediction = self.forecast(&model, &batch);
            batch.check("validation", &prediction, weights)?;
            let (sum, count) =
                masked_huber_sum(prediction, batch.target, batch.mask, &self.config.loss);
            sums.push(Tensor::cat(vec![sum, count], 0));
        }
        if sums.is_empty() {
            return Err(TrainError::NoBatches {
                stage: "validation",
            });
        }
        let sums = read(Tensor::cat(sums, 0))?;
        let sum: f64 = sums.iter().step_by(2).sum();
        let count: f64 = sums.iter().skip(1).step_by(2).sum();
        Ok(Some(sum / count))
    }

    fn record(&self, val_loss: f64, fraction: f64) -> EpochRecord {
        let partial = &self.state.partial;
        EpochRecord {
            epoch: self.state.epoch + 1,
            fraction,
            step: self.state.step,
            train_loss: partial.loss_sum / partial.loss_count as f64,
            val_loss,
            lr: self.plateau.lr(),
            tokens_per_second: partial.tokens as f64 / partial.seconds.max(1e-9),
            seconds: partial.seconds,
            skipped_steps: partial.skipped_steps,
        }
    }

    /// Remembers `val_loss` if it is the lowest so far.
    fn note_best(&mut self, val_loss: f64) -> bool {
        let best = self.state.best;
        let improved = val_loss.is_finite() && best.is_none_or(|best| val_loss < best.val_loss);
        if improved {
            self.state.best = Some(Best {
                val_loss,
                epoch: self.state.epoch + 1,
                step: self.state.step,
            });
        }
        improved
    }

    fn end_epoch<M: Module>(&mut self, model: &M, val_loss: f64) -> Result<(), TrainError> {
        let record = self.record(val_loss, 1.0);
        let improved = self.note_best(val_loss);
        self.reporter.epoch(&record, improved);
        let before = self.plateau.lr();
        let after = self.plateau.step(val_loss);
        if after < before {
            let text = format!("learning rate lowered from {before:.2e} to {after:.2e}");
            self.reporter.message(&text);
        }
        self.stopping.step(val_loss);

        self.state.plateau = self.plateau.state().clone();
        self.state.stopping = self.stopping.state().clone();
        self.state.history.push(record);
        self.state.epoch += 1;
        self.state.micro_batch = 0;
        self.state.partial = PartialEpoch::default();
        if improved {
            self.save(CheckpointKind::Best, model)?;
        }
        self.save(CheckpointKind::Last, model)?;
        write_history(self.run, &self.state.history)
    }

    /// Ends the run at a time limit. The schedule and early stopping do not see this value, so
    /// that a resumed run goes on as if it had not been cut.
    fn end_within_epoch<M: Module>(&mut self, model: &M, val_loss: f64) -> Result<(), TrainError> {
        let total = self.state.batches_per_epoch as f64;
        let record = self.record(val_loss, self.state.micro_batch as f64 / total);
        let improved = self.note_best(val_loss);
        self.reporter.epoch(&record, improved);
        if improved {
            self.save(CheckpointKind::Best, model)?;
        }
        self.save(CheckpointKind::Last, model)?;
        write_history(self.run, self.state.history.iter().chain([&record]))
    }
}

fn failed(stage: &'static str) -> impl Fn(BoxError) -> TrainError {
    move |source| TrainError::Source { stage, source }
}

/// Reads a few numbers back, waiting for the device.
fn read(tensor: Tensor<1>) -> Result<Vec<f64>, TrainError> {
    let data = tensor.try_into_data().map_err(|error| TrainError::Device {
        problem: format!("{error:?}"),
    })?;
    Ok(data.iter::<f64>().collect())
}

fn minutes(minutes: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(60.0 * minutes).ok()
}

/// Counts of this invocation, for reports.
#[derive(Default)]
struct Meter {
    lap: Option<Instant>,
    seconds: f64,
    micro_batches: usize,
    /// Since the last report.
    window_seconds: f64,
    tokens: usize,
    loss_sum: f64,
    loss_count: usize,
}

impl Meter {
    /// Starts the clock, leaving out what passed since the last lap.
    fn start(&mut self) {
        self.lap = Some(Instant::now());
    }

    /// Seconds since the last lap or start.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let seconds = self
            .lap
            .map_or(0.0, |lap| now.duration_since(lap).as_secs_f64());
        self.lap = Some(now);
        self.seconds += seconds;
        self.window_seconds += seconds;
        seconds
    }

    fn time_for(&self, micro_batches: usize) -> Duration {
        let each = self.seconds / self.micro_batches.max(1) as f64;
        Duration::try_from_secs_f64(each * micro_batches as f64).unwrap_or(Duration::MAX)
    }

    /// Mean loss and tokens per second since the last report.
    fn take_window(&mut self) -> (f64, f64) {
        let loss = self.loss_sum / self.loss_count as f64;
        let rate = self.tokens as f64 / self.window_seconds.max(1e-9);
        (self.loss_sum, self.loss_count) = (0.0, 0);
        (self.tokens, self.window_seconds) = (0, 0.0);
        (loss, rate)
    }
}
