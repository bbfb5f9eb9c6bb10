//! Checkpoints: model, optimizer and the place in the run, replaced as one folder.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::{ModuleSnapshot, ModuleStore, SafetensorsStore};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::files::{recover, replace_folder};
use crate::history::EpochRecord;
use crate::optimizer::ModuleAdamW;
use crate::schedule::PlateauState;
use crate::stopping::StoppingState;

/// The model's parameters within a checkpoint folder.
pub const MODEL_FILE: &str = "model.safetensors";
/// The optimizer's moments within a checkpoint folder.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The [`TrainState`] within a checkpoint folder.
pub const STATE_FILE: &str = "state.json";

const VERSION: u32 = 1;

/// Which of a run's two checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointKind {
    /// The one with the lowest validation loss.
    Best,
    /// The most recent one, from which a run is resumed.
    Last,
}

impl CheckpointKind {
    /// `RUN/checkpoints/best` or `RUN/checkpoints/last`.
    pub fn folder(self, run: &Path) -> PathBuf {
        let name = match self {
            Self::Best => "best",
            Self::Last => "last",
        };
        run.join("checkpoints").join(name)
    }
}

/// The lowest validation loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The validation loss.
    pub val_loss: f64,
    /// The epoch it was measured in, counted from one.
    pub epoch: usize,
    /// Optimizer steps taken by then.
    pub step: usize,
}

/// The sums of an unfinished epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PartialEpoch {
    /// Sum of the losses of the micro-batches that count.
    pub loss_sum: f64,
    /// Their number.
    pub loss_count: usize,
    /// Positions trained on.
    pub tokens: usize,
    /// Seconds spent training.
    pub seconds: f64,
    /// Steps skipped.
    pub skipped_steps: usize,
}

/// The place of a run, as saved in `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// The version of this layout.
    pub version: u32,
    /// Finished epochs.
    pub epoch: usize,
    /// Micro-batches done in the epoch under way.
    pub micro_batch: usize,
    /// Optimizer steps taken.
    pub step: usize,
    /// Steps skipped in a row, up to now, for a gradient that was NaN or infinite.
    pub skipped_in_a_row: usize,
    /// The schedule, learning rate included.
    pub plateau: PlateauState,
    /// Early stopping.
    pub stopping: StoppingState,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
    /// The sums of the epoch under way.
    pub partial: PartialEpoch,
    /// The run's seed.
    pub seed: u64,
    /// Micro-batches per step.
    pub accumulation: usize,
    /// Micro-batches per epoch.
    pub batches_per_epoch: usize,
    /// The finished epochs.
    pub history: Vec<EpochRecord>,
}

impl TrainState {
    /// The state before the first step.
    pub(crate) fn new(
        plateau: PlateauState,
        seed: u64,
        accumulation: usize,
        batches_per_epoch: usize,
    ) -> Self {
        Self {
            version: VERSION,
            epoch: 0,
            micro_batch: 0,
            step: 0,
            skipped_in_a_row: 0,
            plateau,
            stopping: StoppingState::default(),
            best: None,
            partial: PartialEpoch::default(),
            seed,
            accumulation,
            batches_per_epoch,
            history: Vec::new(),
        }
    }
}

/// Writes a checkpoint beside the present one and puts it in its place.
pub(crate) fn save_checkpoint<M: Module>(
    run: &Path,
    kind: CheckpointKind,
    model: &M,
    optimizer: &ModuleAdamW,
    state: &TrainState,
) -> Result<(), TrainError> {
    let fill = |folder: &Path| {
        save_parameters(model, folder.join(MODEL_FILE))?;
        optimizer.save(&folder.join(OPTIMIZER_FILE))?;
        let path = folder.join(STATE_FILE);
        let text = serde_json::to_vec_pretty(state)
            .map_err(|error| TrainError::damaged(&path, error.to_string()))?;
        std::fs::write(&path, text).map_err(TrainError::io("write", &path))
    };
    replace_folder(&kind.folder(run), fill, &mut |_| Ok(()))
}

/// The folder of a checkpoint that exists, after undoing an interrupted replacement.
fn open(run: &Path, kind: CheckpointKind) -> Result<PathBuf, TrainError> {
    let folder = kind.folder(run);
    recover(&folder)?;
    if folder.is_dir() {
        Ok(folder)
    } else {
        Err(TrainError::NoCheckpoint { path: folder })
    }
}

/// Reads the place a run was in when a checkpoint was written.
///
/// # Errors
///
/// [`TrainError::NoCheckpoint`], or [`TrainError::Io`] or [`TrainError::Damaged`] naming the file.
pub fn load_state(run: impl AsRef<Path>, kind: CheckpointKind) -> Result<TrainState, TrainError> {
    let path = open(run.as_ref(), kind)?.join(STATE_FILE);
    let text = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
    let state: TrainState = serde_json::from_slice(&text)
        .map_err(|error| TrainError::damaged(&path, error.to_string()))?;
    if state.version != VERSION {
        let problem = format!("version {} is not {VERSION}", state.version);
        return Err(TrainError::damaged(&path, problem));
    }
    Ok(state)
}

/// Loads the parameters of a run's checkpoint into `model`, for evaluation or forecasting.
///
/// # Errors
///
/// [`TrainError::NoCheckpoint`]; [`TrainError::Architecture`] naming the first parameter that
/// does not fit; [`TrainError::Io`] or [`TrainError::Damaged`] naming the file.
pub fn load_model<M: Module>(
    run: impl AsRef<Path>,
    kind: CheckpointKind,
    model: M,
) -> Result<M, TrainError> {
    load_parameters(open(run.as_ref(), kind)?.join(MODEL_FILE), model)
}

pub(crate) fn load_optimizer<M: Module>(
    run: &Path,
    kind: CheckpointKind,
    optimizer: &mut ModuleAdamW,
    model: &M,
) -> Result<(), TrainError> {
    optimizer.load(&open(run, kind)?.join(OPTIMIZER_FILE), model)
}

/// Writes the parameters of `model` to a safetensors file, under Burn's names and layouts. The
/// file is replaced as a whole.
///
/// # Errors
///
/// [`TrainError::Damaged`] naming the file.
pub fn save_parameters<M: Module>(model: &M, path: impl AsRef<Path>) -> Result<(), TrainError> {
    let path = path.as_ref();
    let mut store = SafetensorsStore::from_file(path).overwrite(true);
    model
        .save_into(&mut store)
        .map_err(|error| TrainError::damaged(path, error.to_string()))
}

/// Reads the parameters of `model` from a safetensors file written by [`save_parameters`].
///
/// # Errors
///
/// [`TrainError::Architecture`] naming the first parameter, in the model's order, that the file
/// lacks or has in another shape, or one that the model lacks; [`TrainError::Io`] or
/// [`TrainError::Damaged`] if the file cannot be read.
pub fn load_parameters<M: Module>(path: impl AsRef<Path>, mut model: M) -> Result<M, TrainError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes));
    check_architecture(path, &model, &mut store)?;
    model
        .load_from(&mut store)
        .map_err(|error| TrainError::damaged(path, error.to_string()))?;
    Ok(model)
}

fn check_architecture<M: Module>(
    path: &Path,
    model: &M,
    store: &mut SafetensorsStore,
) -> Result<(), TrainError> {
    let mismatch = |parameter: &str, expected: String, found: String| TrainError::Architecture {
        path: path.into(),
        parameter: parameter.into(),
        expected,
        found,
    };
    let file = store
        .get_all_tensors()
        .map_err(|error| TrainError::damaged(path, error.to_string()))?;
    let expected = model.collect(None, None, false);
    for tensor in &expected {
        let shape = format!("{:?}", tensor.shape.as_slice());
        match file.get(&tensor.name) {
            None => return Err(mismatch(&tensor.name, shape, "nothing".into())),
            Some(found) if found.shape != tensor.shape => {
                let found = format!("{:?}", found.shape.as_slice());
                return Err(mismatch(&tensor.name, shape, found));
            }
            Some(_) => {}
        }
    }
    let known = |name: &String| expected.iter().any(|tensor| tensor.name == *name);
    match file.iter().find(|(name, _)| !known(name)) {
        Some((name, tensor)) => {
            let found = format!("{:?}", tensor.shape.as_slice());
            Err(mismatch(name, "nothing".into(), found))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    fn linear(input: usize, output: usize, bias: bool) -> Linear {
        LinearConfig::new(input, output)
            .with_bias(bias)
            .init(&Device::default())
    }

    #[test]
    fn parameters_come_back_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let model = linear(3, 2, true);
        save_parameters(&model, &path).unwrap();
        let copy = load_parameters(&path, linear(3, 2, true)).unwrap();
        assert_eq!(copy.weight.to_data(), model.weight.to_data());
        let bias = |model: &Linear| model.bias.as_ref().unwrap().to_data();
        assert_eq!(bias(&copy), bias(&model));
    }

    #[test]
    fn another_architecture_is_named_with_both_shapes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        for (saved, wanted, message) in [
            (
                (3, 2, true),
                (4, 2, true),
                "`weight`: expected [4, 2], found [3, 2]",
            ),
            (
                (3, 2, false),
                (3, 2, true),
                "`bias`: expected [2], found nothing",
            ),
            (
                (3, 2, true),
                (3, 2, false),
                "`bias`: expected nothing, found [2]",
            ),
        ] {
            save_parameters(&linear(saved.0, saved.1, saved.2), &path).unwrap();
            let error = load_parameters(&path, linear(wanted.0, wanted.1, wanted.2)).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn missing_and_damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let error = load_model(run, CheckpointKind::Best, linear(3, 2, true)).unwrap_err();
        assert!(matches!(error, TrainError::NoCheckpoint { .. }), "{error}");

        let path = run.join("model.safetensors");
        save_parameters(&linear(3, 2, true), &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for damaged in [&bytes[..bytes.len() - 5], &bytes[..6], b"not a model"] {
            std::fs::write(&path, damaged).unwrap();
            let error = load_parameters(&path, linear(3, 2, true)).unwrap_err();
            assert!(matches!(error, TrainError::Damaged { .. }), "{error}");
        }

        let state = CheckpointKind::Last.folder(run);
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join(STATE_FILE), "{\"version\": 1}").unwrap();
        let error = load_state(run, CheckpointKind::Last)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("state.json") && error.contains("missing field"),
            "{error}"
        );
    }
}
