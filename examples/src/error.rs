use std::path::{Path, PathBuf};

use thiserror::Error;

/// What a command can answer instead of a result.
#[derive(Debug, Error)]
pub enum Error {
    /// From the data pipeline.
    #[error(transparent)]
    Data(#[from] mamba_ssm_data::Error),
    /// From the trainer.
    #[error(transparent)]
    Train(#[from] mamba_ssm_train::TrainError),
    /// From the evaluation.
    #[error(transparent)]
    Eval(#[from] mamba_ssm_eval::EvalError),
    /// A Mamba model that cannot be built.
    #[error("model: {0}")]
    Mamba(#[from] mamba_ssm_core::ConfigError),
    /// A Transformer that cannot be built.
    #[error("model: {0}")]
    Transformer(#[from] mamba_ssm_attention::AttentionError),
    /// A file or folder that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A settings file that cannot be used.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what was expected.
        message: String,
    },
    /// A run folder that is none.
    #[error("{}: not a run folder ({missing} is missing); `train --out` makes one", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that should be there.
        missing: String,
    },
    /// Candles that are not a minute apart.
    #[error(
        "{origin}: rows are {step} s apart; the forecaster takes candles of one minute (60 s): fetch or \
         export them with an interval of 1m"
    )]
    Step {
        /// The file or the folder.
        origin: String,
        /// Seconds between most of its rows.
        step: i64,
    },
    /// Stopped by Ctrl-C, with everything saved.
    #[error("interrupted; {hint}")]
    Interrupted {
        /// How to go on.
        hint: String,
    },
    /// Arguments that do not go together.
    #[error("{0}")]
    Usage(String),
}

/// What a command returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the file in an I/O error.
pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io {
        path: path.to_owned(),
        source,
    }
}

/// Reads a text file, naming it in the error.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(io(path))
}
