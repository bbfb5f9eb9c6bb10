//! The folder where one training run lives.
//!
//! `config.toml` (all settings), `run.json` (where the data are, the transform, the encoder), the trainer's
//! `checkpoints/` and `history.jsonl`, and after an evaluation `metrics.json`, `report.md` and pictures.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use mamba_ssm_data::{Dataset, Transform, WindowOptions};
use mamba_ssm_train::{CheckpointKind, EpochRecord, load_model, read_history};
use serde::{Deserialize, Serialize};

use crate::encoding::{Encoder, check_minutes};
use crate::error::{io, read_text};
use crate::forecaster::Forecaster;
use crate::preset::RunConfig;
use crate::{Error, Result};

const CONFIG: &str = "config.toml";
const FACTS: &str = "run.json";

/// What a run needs besides its settings and its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The data set that was trained on: a whole path, or a URL.
    pub data: PathBuf,
    /// Its windows and protocol.
    pub windows: WindowOptions,
    /// From levels to z-scores and back.
    pub transform: Transform,
    /// From z-scores to what the network sees and answers.
    pub encoder: Encoder,
}

/// A run: its folder, its settings, its facts.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// The folder.
    pub folder: PathBuf,
    /// The settings.
    pub config: RunConfig,
    /// The facts.
    pub facts: Facts,
}

impl Run {
    /// Makes the folder of a new run and writes settings and facts.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written, holds a run already, or the data cannot be read or are no
    /// candles of one minute.
    pub fn create(
        folder: &Path,
        config: RunConfig,
        data_path: &Path,
        data: &Dataset,
    ) -> Result<Self> {
        if folder.join(CONFIG).exists() {
            return Err(Error::Usage(format!(
                "{}: there is a run in this folder; `--resume` continues it, another `--out` starts anew",
                folder.display()
            )));
        }
        let place = resolved(data_path)?;
        check_minutes(&data_path.to_string_lossy(), &data.rows()?.timestamps)?;
        let encoder = Encoder::fit(config.target, data)?;
        let run = Self {
            folder: folder.to_owned(),
            config,
            facts: Facts {
                data: place,
                windows: data.window_options().clone(),
                transform: data.transform().clone(),
                encoder,
            },
        };
        fs::create_dir_all(folder).map_err(io(folder))?;
        let facts = serde_json::to_string_pretty(&run.facts).map_err(|e| Error::Config {
            path: folder.join(FACTS),
            message: e.to_string(),
        })?;
        write_beside(&folder.join(FACTS), &facts)?;
        // Last: a folder with settings is a whole run.
        write_beside(&folder.join(CONFIG), &run.config.to_toml())?;
        Ok(run)
    }

    /// Opens the folder of a run.
    ///
    /// # Errors
    ///
    /// When the folder is no run, or its files cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        for name in [CONFIG, FACTS] {
            if !folder.join(name).is_file() {
                return Err(Error::NotARun {
                    path: folder.to_owned(),
                    missing: name.to_owned(),
                });
            }
        }
        let config = RunConfig::read(&folder.join(CONFIG))?;
        let path = folder.join(FACTS);
        let facts = serde_json::from_str(&read_text(&path)?).map_err(|e| Error::Config {
            path,
            message: e.to_string(),
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            config,
            facts,
        })
    }

    /// A name for tables: the kind of network and the target.
    pub fn name(&self) -> String {
        let kind = format!("{:?}", self.config.model.kind).to_lowercase();
        let target = format!("{:?}", self.config.target).to_lowercase();
        format!("{kind} ({target})")
    }

    /// The network with fresh parameters.
    ///
    /// # Errors
    ///
    /// When its settings cannot work.
    pub fn fresh_model(&self, device: &Device) -> Result<Forecaster> {
        let encoder = &self.facts.encoder;
        device.seed(self.config.train.seed);
        self.config
            .model
            .init(encoder.inputs(), encoder.width(), device)
    }

    /// The network with the best parameters so far (the last, if nothing was validated yet), ready to
    /// forecast, and the name of the checkpoint they come from.
    ///
    /// # Errors
    ///
    /// When there is no checkpoint, or it is of another architecture.
    pub fn trained_model(&self, device: &Device) -> Result<(Forecaster, &'static str)> {
        let (kind, name) = match CheckpointKind::Best.folder(&self.folder).exists() {
            true => (CheckpointKind::Best, "best"),
            false => (CheckpointKind::Last, "last"),
        };
        let model = load_model(&self.folder, kind, self.fresh_model(device)?)?;
        Ok((model.valid(), name))
    }

    /// One record per epoch; none for a run that has not finished one.
    ///
    /// # Errors
    ///
    /// When the history is there but cannot be read.
    pub fn history(&self) -> Result<Vec<EpochRecord>> {
        Ok(read_history(&self.folder)?)
    }
}

/// Where a data set is, in words that hold in any folder: a URL as it is, a path from the root.
fn resolved(place: &Path) -> Result<PathBuf> {
    match place.to_str().is_some_and(is_url) {
        true => Ok(place.to_owned()),
        false => fs::canonicalize(place).map_err(io(place)),
    }
}

/// Whether a text begins with a scheme of at least two letters: one letter is a drive.
fn is_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        scheme.len() > 1 && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

/// Writes beside and renames, so that a reader sees the old file or the new one.
fn write_beside(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    File::create(&beside)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
        })
        .and_then(|()| fs::rename(&beside, path))
        .map_err(io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_stay_as_they_are_and_paths_become_whole() {
        for url in [
            "s3://bucket/btc",
            "https://host:8080/a/../b",
            "file:///data/btc",
        ] {
            assert_eq!(resolved(Path::new(url)).unwrap(), Path::new(url));
        }
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir(whole.join("a")).unwrap();
        assert_eq!(resolved(&folder.path().join("a/..")).unwrap(), whole);
        let missing = folder.path().join("none");
        let message = resolved(&missing).unwrap_err().to_string();
        assert!(message.contains("none"), "{message}");
    }
}
