//! The public face of training: [`Trainer`], [`StopFlag`], [`Outcome`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::batch::{BatchSource, Forecaster};
use crate::checkpoint::{CheckpointKind, TrainState, load_model, load_optimizer, load_state};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::progress::{Reporter, Silent};
use crate::schedule::ReduceOnPlateau;
use crate::session::Session;

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are done.
    Finished,
    /// The validation loss did not improve for the patience of early stopping.
    EarlyStopped,
    /// `max_minutes` passed; the run was validated and saved and can be resumed.
    TimeLimit,
    /// The [`StopFlag`] was raised; the run was saved and can be resumed.
    Interrupted,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "finished: all epochs done",
            Self::EarlyStopped => "stopped early: no improvement within the patience",
            Self::TimeLimit => "stopped at the time limit; the run can be resumed",
            Self::Interrupted => "interrupted; the run can be resumed",
        })
    }
}

/// Asks a running [`Trainer`] to save and return at the next optimizer step, for example from a
/// Ctrl-C handler. Clones share one flag.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// A lowered flag.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the flag is raised.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a run returns.
#[derive(Debug)]
pub struct Fit<M> {
    /// The model after the last step (the best one is in the `best` checkpoint: see
    /// [`load_model`]).
    pub model: M,
    /// Why the run ended.
    pub outcome: Outcome,
    /// The place the run has come to, with best value and history.
    pub state: TrainState,
}

/// Trains a [`Forecaster`] on the batches of a [`BatchSource`].
///
/// A run lives in a folder: `checkpoints/best` and `checkpoints/last`, each with
/// `model.safetensors`, `optimizer.safetensors` and `state.json`, and `history.jsonl`. A kill at
/// any moment leaves a run that [`resume`](Self::resume) continues; from an intact checkpoint it
/// continues exactly as if it had never stopped, if the batch source repeats its batches.
///
/// Each optimizer step reads two numbers back from the device, the loss and the gradient norm;
/// nothing else waits for it. Before each step the device's random numbers are seeded from the
/// run's seed and the place in the run.
///
/// # Example
///
/// See the [crate's example](crate).
pub struct Trainer {
    config: TrainConfig,
    run: PathBuf,
    reporter: Box<dyn Reporter>,
    stop: StopFlag,
}

impl Trainer {
    /// A silent trainer whose run lives in folder `run`.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] if a setting cannot work.
    pub fn new(config: TrainConfig, run: impl Into<PathBuf>) -> Result<Self, TrainError> {
        config.validate()?;
        Ok(Self {
            config,
            run: run.into(),
            reporter: Box::new(Silent),
            stop: StopFlag::new(),
        })
    }

    /// Sends news to `reporter`; see [`default_reporter`](crate::default_reporter).
    pub fn with_reporter(mut self, reporter: Box<dyn Reporter>) -> Self {
        self.reporter = reporter;
        self
    }

    /// Stops when `stop` is raised.
    pub fn with_stop_flag(mut self, stop: StopFlag) -> Self {
        self.stop = stop;
        self
    }

    /// Starts a new run with the parameters `model` has.
    ///
    /// # Errors
    ///
    /// [`TrainError::RunExists`] if the folder holds a run that has taken a step; errors of the
    /// batch source; [`TrainError::NonFiniteGradient`]; [`TrainError::Io`].
    pub fn fit<M: Forecaster, S: BatchSource + ?Sized>(
        &mut self,
        model: M,
        source: &mut S,
    ) -> Result<Fit<M>, TrainError> {
        refuse_existing_run(&self.run)?;
        let folder = self.run.join("checkpoints");
        std::fs::create_dir_all(&folder).map_err(TrainError::io("create", &folder))?;
        let schedule = ReduceOnPlateau::new(self.config.lr, self.config.plateau.clone());
        let state = TrainState::new(
            schedule.state().clone(),
            self.config.seed,
            self.config.accumulation,
            source.train_len(),
        );
        let model = model.train();
        let session = self.session(&model, state);
        // Saving now finds an unwritable folder before hours of work, and makes a run that is
        // killed in its first epoch resumable.
        session.save(CheckpointKind::Last, &model)?;
        session.run(model, source)
    }

    /// Continues the run from its `last` checkpoint. `model` gives the architecture; its
    /// parameters are replaced.
    ///
    /// The learning rate, the schedule and early stopping continue where they were; all other
    /// settings are those of this trainer, so that `epochs`, for one, can be raised.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoCheckpoint`]; [`TrainError::Architecture`]; [`TrainError::ResumeMismatch`]
    /// if the run stopped within an epoch and `seed`, `accumulation` or the number of batches
    /// has changed since; and the errors of [`fit`](Self::fit).
    pub fn resume<M: Forecaster, S: BatchSource + ?Sized>(
        &mut self,
        model: M,
        source: &mut S,
    ) -> Result<Fit<M>, TrainError> {
        let mut state = load_state(&self.run, CheckpointKind::Last)?;
        self.match_settings(&mut state, source.train_len())?;
        let model = load_model(&self.run, CheckpointKind::Last, model.train())?;
        let run = self.run.clone();
        let mut session = self.session(&model, state);
        load_optimizer(&run, CheckpointKind::Last, session.optimizer(), &model)?;
        session.run(model, source)
    }

    fn session<M: Forecaster>(&mut self, model: &M, state: TrainState) -> Session<'_> {
        let reporter = self.reporter.as_mut();
        Session::new(&self.config, &self.run, reporter, &self.stop, model, state)
    }

    /// Within an epoch, what decides the order of batches must not change; between epochs it may.
    fn match_settings(&self, state: &mut TrainState, batches: usize) -> Result<(), TrainError> {
        if state.micro_batch > 0 {
            let pairs = [
                ("seed", state.seed, self.config.seed),
                (
                    "accumulation",
                    state.accumulation as u64,
                    self.config.accumulation as u64,
                ),
                (
                    "batches per epoch",
                    state.batches_per_epoch as u64,
                    batches as u64,
                ),
            ];
            for (field, saved, given) in pairs {
                if saved != given {
                    return Err(TrainError::ResumeMismatch {
                        field,
                        saved: saved.to_string(),
                        given: given.to_string(),
                    });
                }
            }
        }
        state.seed = self.config.seed;
        state.accumulation = self.config.accumulation;
        state.batches_per_epoch = batches;
        Ok(())
    }
}

/// A folder in which no step was taken yet may be used again.
fn refuse_existing_run(run: &Path) -> Result<(), TrainError> {
    match load_state(run, CheckpointKind::Last) {
        Err(TrainError::NoCheckpoint { .. }) => Ok(()),
        Ok(state) if state.step == 0 => Ok(()),
        _ => Err(TrainError::RunExists { path: run.into() }),
    }
}
