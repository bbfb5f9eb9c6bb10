//! The settings of a run, by name, and a file's changes to them.
//!
//! "The published note" is "Forecasting Bitcoin with Mamba State Space Models".

use std::path::Path;

use mamba_ssm_train::{HuberConfig, PlateauConfig, TrainConfig};
use serde::{Deserialize, Serialize};

use crate::encoding::Target;
use crate::error::read_text;
use crate::forecaster::{Kind, ModelConfig};
use crate::{Error, Result};

/// All settings of a run; `config.toml` of the run folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What the network is asked for.
    pub target: Target,
    /// Windows of a micro-batch.
    pub batch: usize,
    /// Windows of an epoch, drawn anew each time; 0 takes all of them.
    pub windows_per_epoch: usize,
    /// The network.
    pub model: ModelConfig,
    /// The training.
    pub train: TrainConfig,
}

/// Settings by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// As in the published note: levels from levels, plain stack, Smooth L1 with beta 0.01.
    Note,
    /// The same network with residual connections, asked for scaled changes.
    Anchored,
    /// A small anchored network for two processor cores.
    Small,
}

impl Preset {
    /// The settings of this name for a kind of network.
    pub fn config(self, kind: Kind) -> RunConfig {
        match self {
            Self::Note => note(kind),
            Self::Anchored => anchored(kind),
            Self::Small => small(kind),
        }
    }
}

/// Rows that the hybrid's attention layers look back on: what lies further is the other layers' part.
const HYBRID_WINDOW: usize = 256;
/// Open, High, Low, Close at full weight, Volume at a quarter.
const NOTE_WEIGHTS: [f32; 5] = [1.0, 1.0, 1.0, 1.0, 0.25];
/// Opens and closes are next to unpredictable; their noise must not drown the ranges.
const ANCHORED_WEIGHTS: [f32; 5] = [0.25, 1.0, 1.0, 0.25, 1.0];

fn note(kind: Kind) -> RunConfig {
    let (lr, weight_decay) = match kind {
        Kind::Mamba2 | Kind::Hybrid => (1e-4, 0.01),
        Kind::Transformer => (5e-5, 1e-3),
    };
    RunConfig {
        target: Target::Level,
        batch: 32,
        windows_per_epoch: 0,
        model: ModelConfig {
            kind,
            window: if kind == Kind::Hybrid {
                HYBRID_WINDOW
            } else {
                0
            },
            ..ModelConfig::default()
        },
        train: TrainConfig {
            lr,
            weight_decay,
            loss: HuberConfig {
                feature_weights: NOTE_WEIGHTS.to_vec(),
                ..HuberConfig::default()
            },
            ..TrainConfig::default()
        },
    }
}

fn anchored(kind: Kind) -> RunConfig {
    let note = note(kind);
    RunConfig {
        target: Target::Anchored,
        model: ModelConfig {
            residual: true,
            ..note.model
        },
        train: TrainConfig {
            lr: 1e-3,
            epochs: 30,
            accumulation: 1,
            // The skill is measured in squares, so the loss is quadratic but for the rarest jumps.
            loss: HuberConfig {
                beta: 8.0,
                feature_weights: ANCHORED_WEIGHTS.to_vec(),
            },
            ..note.train
        },
        ..note
    }
}

fn small(kind: Kind) -> RunConfig {
    let anchored = anchored(kind);
    RunConfig {
        batch: 8,
        model: ModelConfig {
            d_model: 32,
            n_layer: 2,
            d_state: 16,
            expand: 2,
            n_heads: 4,
            chunk_size: 32,
            ..anchored.model
        },
        train: TrainConfig {
            lr: 3e-3,
            epochs: 6,
            plateau: PlateauConfig {
                patience: 1,
                ..anchored.train.plateau
            },
            ..anchored.train
        },
        ..anchored
    }
}

impl RunConfig {
    /// The settings with those of a TOML file laid over them; the file names only what differs.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is no TOML, or has a key or a value that does not belong: the message
    /// names it.
    pub fn overlaid(self, path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let error = |message: String| Error::Config {
            path: path.to_owned(),
            message,
        };
        let changes: toml::Table = toml::from_str(&text).map_err(|e| error(e.to_string()))?;
        let mut table = toml::Table::try_from(self).map_err(|e| error(e.to_string()))?;
        overlay(&mut table, changes);
        table
            .try_into()
            .map_err(|e: toml::de::Error| error(e.to_string()))
    }

    /// Reads `config.toml` of a run.
    ///
    /// # Errors
    ///
    /// As [`overlaid`](Self::overlaid).
    pub fn read(path: &Path) -> Result<Self> {
        toml::from_str(&read_text(path)?).map_err(|e| Error::Config {
            path: path.to_owned(),
            message: e.to_string(),
        })
    }

    /// The settings as `config.toml` holds them.
    ///
    /// # Panics
    ///
    /// Never: every setting has a TOML form.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every setting has a TOML form")
    }
}

/// Tables are merged key by key, everything else is replaced.
fn overlay(table: &mut toml::Table, changes: toml::Table) {
    for (key, change) in changes {
        match (table.get_mut(&key), change) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(change)) => overlay(inner, change),
            (_, change) => {
                table.insert(key, change);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid_over(text: &str) -> Result<RunConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changes.toml");
        std::fs::write(&path, text).unwrap();
        Preset::Note.config(Kind::Mamba2).overlaid(&path)
    }

    #[test]
    fn a_file_changes_what_it_names_and_nothing_else() {
        let config =
            laid_over("batch = 4\n[model]\nd_state = 32\n[train.plateau]\npatience = 5\n").unwrap();
        let mut expected = Preset::Note.config(Kind::Mamba2);
        expected.batch = 4;
        expected.model.d_state = 32;
        expected.train.plateau.patience = 5;
        assert_eq!(config, expected);
    }

    #[test]
    fn an_unknown_key_or_a_wrong_type_is_named_with_the_file() {
        for (text, word) in [
            ("bach = 4", "bach"),
            ("[model]\nd_sate = 32", "d_sate"),
            ("[train]\nlearning_rate = 1.0", "learning_rate"),
            ("batch = \"many\"", "many"),
            ("batch = ", "batch"),
        ] {
            let error = laid_over(text).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("changes.toml"),
                "{error}"
            );
        }
    }

    /// Every number here is the published note's.
    #[test]
    fn the_note_preset_is_the_published_one() {
        let config = Preset::Note.config(Kind::Mamba2);
        let train = &config.train;
        assert_eq!(config.target, Target::Level);
        assert_eq!((config.batch, train.accumulation), (32, 8));
        assert_eq!((train.lr, train.weight_decay), (1e-4, 0.01));
        assert_eq!((train.betas, train.eps), ([0.9, 0.999], 1e-8));
        assert_eq!((train.clip_norm, train.epochs), (0.5, 100));
        assert_eq!((train.plateau.factor, train.plateau.patience), (0.5, 2));
        assert_eq!(train.loss.beta, 0.01);
        assert_eq!(train.loss.feature_weights, [1.0, 1.0, 1.0, 1.0, 0.25]);
        assert_eq!(train.early_stopping_patience, 10);
        assert_eq!((train.max_val_batches, config.windows_per_epoch), (100, 0));
        let model = &config.model;
        assert_eq!((model.d_model, model.n_layer, model.d_state), (64, 4, 64));
        assert_eq!((model.d_conv, model.expand, model.headdim), (4, 4, 16));
        assert_eq!((model.ngroups, model.residual), (1, false));
        assert_eq!(
            toml::from_str::<RunConfig>(&config.to_toml()).unwrap(),
            config
        );
    }

    #[test]
    fn the_note_presets_transformer_is_the_published_one() {
        let mamba = Preset::Note.config(Kind::Mamba2);
        let config = Preset::Note.config(Kind::Transformer);
        assert_eq!((config.train.lr, config.train.weight_decay), (5e-5, 1e-3));
        let model = &config.model;
        assert_eq!((model.d_model, model.n_layer, model.n_heads), (64, 4, 8));
        assert_eq!((model.mlp_ratio, model.dropout, model.window), (4, 0.05, 0));
        // The same data, loss and loop.
        let TrainConfig {
            lr, weight_decay, ..
        } = mamba.train;
        let loop_of_mamba = TrainConfig {
            lr,
            weight_decay,
            ..config.train
        };
        assert_eq!(loop_of_mamba, mamba.train);
    }

    /// Results in the documentation were measured with these settings.
    #[test]
    fn the_other_presets_are_pinned() {
        let note = Preset::Note.config(Kind::Mamba2);
        let anchored = Preset::Anchored.config(Kind::Mamba2);
        let mut expected = note.clone();
        expected.target = Target::Anchored;
        expected.model.residual = true;
        expected.train.lr = 1e-3;
        expected.train.epochs = 30;
        expected.train.accumulation = 1;
        expected.train.loss.beta = 8.0;
        expected.train.loss.feature_weights = vec![0.25, 1.0, 1.0, 0.25, 1.0];
        assert_eq!(anchored, expected);

        expected.batch = 8;
        expected.model.d_model = 32;
        expected.model.n_layer = 2;
        expected.model.d_state = 16;
        expected.model.expand = 2;
        expected.model.n_heads = 4;
        expected.model.chunk_size = 32;
        expected.train.lr = 3e-3;
        expected.train.epochs = 6;
        expected.train.plateau.patience = 1;
        assert_eq!(Preset::Small.config(Kind::Mamba2), expected);

        for preset in [Preset::Note, Preset::Anchored, Preset::Small] {
            let hybrid = preset.config(Kind::Hybrid).model;
            assert_eq!((hybrid.window, hybrid.attention_every), (256, 2));
            assert_eq!(preset.config(Kind::Transformer).model.window, 0);
        }
    }
}
