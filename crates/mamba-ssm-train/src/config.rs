//! Settings of a training run.

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::loss::HuberConfig;
use crate::schedule::PlateauConfig;

/// The number format of the forward and backward pass. Parameters, gradients, optimizer state and
/// loss are f32 either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats throughout.
    #[default]
    F32,
    /// Mixed precision: the model runs where it sees fit in bf16
    /// ([`Forecaster::forward_with`](crate::Forecaster::forward_with)).
    Bf16,
}

impl Precision {
    /// The element type of activations.
    pub fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}

/// Settings of a training run. Every one has a default, so a configuration file need only name
/// what differs; an unknown name is an error.
///
/// # Example
///
/// ```
/// use mamba_ssm_train::TrainConfig;
///
/// let config: TrainConfig = toml::from_str("epochs = 3\n[plateau]\npatience = 1")?;
/// assert_eq!((config.epochs, config.plateau.patience, config.accumulation), (3, 1, 8));
///
/// let error = toml::from_str::<TrainConfig>("epoch = 3").unwrap_err().to_string();
/// assert!(error.contains("unknown field `epoch`"));
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Epochs at most. Default 100.
    pub epochs: usize,
    /// Learning rate at the start. Default 1e-4.
    pub lr: f64,
    /// Decoupled weight decay of AdamW. Default 0.01.
    pub weight_decay: f64,
    /// Decay of AdamW's first and second moment. Default 0.9 and 0.999.
    pub betas: [f64; 2],
    /// AdamW's term against division by zero. Default 1e-8.
    pub eps: f64,
    /// Largest global gradient norm; larger gradients are scaled down. 0 turns it off. Default 0.5.
    pub clip_norm: f64,
    /// Micro-batches per optimizer step. Default 8.
    pub accumulation: usize,
    /// Epochs without improvement of the validation loss before the run stops. 0: never. Default 10.
    pub early_stopping_patience: usize,
    /// Smallest improvement that counts for early stopping. Default 0.
    pub early_stopping_min_delta: f64,
    /// Validation batches at most. 0: all. Default 100.
    pub max_val_batches: usize,
    /// Steps in a row with a NaN or infinite gradient that are skipped before the run fails.
    /// Default 20.
    pub max_skipped_steps: usize,
    /// Optimizer steps between two progress reports. Default 1.
    pub log_every: usize,
    /// Optimizer steps between two saves of the `last` checkpoint within an epoch. 0: only at the
    /// end of each epoch. Default 0.
    pub checkpoint_every: usize,
    /// Minutes after which this invocation stops at the next step (it takes at least one),
    /// validates and saves.
    /// Default: no limit.
    pub max_minutes: Option<f64>,
    /// Seeds the device's random numbers, dropout included. Default 42.
    pub seed: u64,
    /// Number format. Default `f32`.
    pub precision: Precision,
    /// The learning-rate schedule, stepped once per epoch on the validation loss.
    pub plateau: PlateauConfig,
    /// The loss.
    pub loss: HuberConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 100,
            lr: 1e-4,
            weight_decay: 0.01,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip_norm: 0.5,
            accumulation: 8,
            early_stopping_patience: 10,
            early_stopping_min_delta: 0.0,
            max_val_batches: 100,
            max_skipped_steps: 20,
            log_every: 1,
            checkpoint_every: 0,
            max_minutes: None,
            seed: 42,
            precision: Precision::F32,
            plateau: PlateauConfig::default(),
            loss: HuberConfig::default(),
        }
    }
}

impl TrainConfig {
    /// Checks every setting; [`Trainer`](crate::Trainer) does so before it starts.
    ///
    /// # Errors
    ///
    /// [`TrainError::Config`] naming the first setting that cannot work.
    pub fn validate(&self) -> Result<(), TrainError> {
        let config = |field, problem: String| Err(TrainError::Config { field, problem });
        for (field, value) in [
            ("epochs", self.epochs),
            ("accumulation", self.accumulation),
            ("log_every", self.log_every),
            ("max_skipped_steps", self.max_skipped_steps),
        ] {
            if value == 0 {
                return config(field, "is 0, but must be at least 1".into());
            }
        }
        for (field, value) in [("lr", self.lr), ("eps", self.eps)] {
            if !(value.is_finite() && value > 0.0) {
                return config(field, format!("is {value}, but must be above zero"));
            }
        }
        for (field, value) in [
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
            ("early_stopping_min_delta", self.early_stopping_min_delta),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return config(field, format!("is {value}, but must not be negative"));
            }
        }
        if self.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return config(
                "betas",
                format!("is {:?}, but both must lie in [0, 1)", self.betas),
            );
        }
        if let Some(minutes) = self.max_minutes
            && !(minutes.is_finite() && minutes > 0.0)
        {
            return config(
                "max_minutes",
                format!("is {minutes}, but must be above zero"),
            );
        }
        self.plateau.validate()?;
        self.loss.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_toml() {
        let config = TrainConfig::default();
        config.validate().unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<TrainConfig>(&text).unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_named() {
        for (text, key) in [
            ("learning_rate = 1.0", "learning_rate"),
            ("[plateau]\npatients = 3", "patients"),
            ("[loss]\ndelta = 3", "delta"),
        ] {
            let error = toml::from_str::<TrainConfig>(text).unwrap_err().to_string();
            assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
        }
    }

    #[test]
    fn values_that_cannot_work_are_named() {
        for (text, field) in [
            ("epochs = 0", "epochs"),
            ("accumulation = 0", "accumulation"),
            ("log_every = 0", "log_every"),
            ("max_skipped_steps = 0", "max_skipped_steps"),
            ("lr = 0.0", "lr"),
            ("lr = nan", "lr"),
            ("eps = -1.0", "eps"),
            ("weight_decay = -0.1", "weight_decay"),
            ("clip_norm = inf", "clip_norm"),
            ("betas = [0.9, 1.0]", "betas"),
            ("max_minutes = 0.0", "max_minutes"),
            ("[plateau]\nfactor = 2.0", "plateau.factor"),
            ("[loss]\nbeta = 0.0", "loss.beta"),
        ] {
            let config: TrainConfig = toml::from_str(text).unwrap();
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{text}: {error}");
        }
    }
}
