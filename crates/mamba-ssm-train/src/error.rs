//! The crate's error type.

use std::path::PathBuf;

/// An error of any kind, as a [`BatchSource`](crate::BatchSource) may return it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong while configuring, running, saving or resuming a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting has a value that cannot work.
    #[error("training setting `{field}` {problem}")]
    Config {
        /// The setting, as it is written in a configuration file.
        field: &'static str,
        /// What is wrong with it and what is accepted.
        problem: String,
    },

    /// The batch source reported an error.
    #[error("reading a {stage} batch failed: {source}")]
    Source {
        /// `training` or `validation`.
        stage: &'static str,
        /// The source's own error.
        source: BoxError,
    },

    /// The batch source has nothing to give.
    #[error(
        "there are no {stage} batches: the split holds fewer rows than one window needs; \
         use more rows, shorter windows or another split"
    )]
    NoBatches {
        /// `training` or `validation`.
        stage: &'static str,
    },

    /// The tensors of a batch, or the prediction made from it, do not fit together.
    #[error("{stage} batch: `{tensor}` has shape {found:?}, expected {expected:?}")]
    BatchShape {
        /// `training` or `validation`.
        stage: &'static str,
        /// The tensor that does not fit.
        tensor: &'static str,
        /// The shape the other tensors ask for.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },

    /// Gradients were NaN or infinite several steps in a row.
    #[error(
        "the gradient was NaN or infinite in {count} steps in a row (last: epoch {epoch}, step {step}); \
         lower `lr` or `clip_norm`, or look for non-finite inputs"
    )]
    NonFiniteGradient {
        /// Steps skipped in a row.
        count: usize,
        /// The epoch, counted from one.
        epoch: usize,
        /// Optimizer steps taken before.
        step: usize,
    },

    /// The device failed while a result was read back.
    #[error("the device failed: {problem}")]
    Device {
        /// The device's own words.
        problem: String,
    },

    /// A file or folder could not be read or written.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried, such as `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },

    /// There is no checkpoint where one was asked for.
    #[error(
        "there is no checkpoint at {path}: check the run folder, or start the run without resuming",
        path = .path.display()
    )]
    NoCheckpoint {
        /// The checkpoint folder.
        path: PathBuf,
    },

    /// A new run would overwrite an existing one.
    #[error(
        "{path} already holds a training run: resume it, or choose another folder",
        path = .path.display()
    )]
    RunExists {
        /// The run folder.
        path: PathBuf,
    },

    /// A file of a run or checkpoint cannot be understood.
    #[error("{path} is damaged or of another kind: {problem}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// A checkpoint was written by another architecture.
    #[error(
        "{path} holds another architecture: parameter `{parameter}`: expected {expected}, found {found}",
        path = .path.display()
    )]
    Architecture {
        /// The checkpoint file.
        path: PathBuf,
        /// The first parameter that does not fit, in the model's order.
        parameter: String,
        /// The shape the model has, or `nothing`.
        expected: String,
        /// The shape the file has, or `nothing`.
        found: String,
    },

    /// A run cannot be continued with these settings or these data.
    #[error(
        "cannot resume: `{field}` was {saved} when the checkpoint was written and is {given} now; \
         set it back, or start a new run"
    )]
    ResumeMismatch {
        /// What differs.
        field: &'static str,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value now.
        given: String,
    },
}

impl TrainError {
    /// For `map_err` on file operations.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn damaged(path: impl Into<PathBuf>, problem: impl ToString) -> Self {
        Self::Damaged {
            path: path.into(),
            problem: problem.to_string(),
        }
    }
}
