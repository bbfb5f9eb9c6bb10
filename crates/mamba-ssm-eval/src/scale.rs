//! The way between z-score space, where models work, and level space (dollars, coins).

use crate::{EvalError, Result};
use serde::{Deserialize, Serialize};

/// What was done to a column before its mean was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleKind {
    /// Natural logarithm: prices.
    Log,
    /// Natural logarithm of one plus the value: volumes, which may be zero.
    Log1p,
    /// Nothing.
    Identity,
}

/// One feature's name, unit and z-score transform: `z = (kind(level) - mean) / std`.
///
/// ```
/// use mamba_ssm_eval::{FeatureScale, ScaleKind};
///
/// let close = FeatureScale::new("Close", ScaleKind::Log, 10.0, 0.5)?;
/// let z = close.to_z(40_000.0);
/// assert!((close.to_level(z) - 40_000.0).abs() < 1e-6);
/// assert_eq!(close.unit, "USD");
/// # Ok::<(), mamba_ssm_eval::EvalError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureScale {
    /// Name of the feature; `Open`, `High`, `Low` and `Close` are known to be prices.
    pub name: String,
    /// What was done before the z-score.
    pub kind: ScaleKind,
    /// Mean of the transformed column.
    pub mean: f64,
    /// Standard deviation of the transformed column, above zero.
    pub std: f64,
    /// Unit of the level, for axes and tables; may be empty.
    #[serde(default)]
    pub unit: String,
}

impl FeatureScale {
    /// A scale whose unit follows from the name: USD for the four prices, BTC for `Volume`,
    /// none otherwise ([`with_unit`](Self::with_unit) sets another).
    ///
    /// # Errors
    ///
    /// [`EvalError::BadScale`] when the mean is not finite or the deviation is not above zero.
    pub fn new(name: impl Into<String>, kind: ScaleKind, mean: f64, std: f64) -> Result<Self> {
        let name = name.into();
        let unit = match name.as_str() {
            "Volume" => "BTC",
            other if is_price(other) => "USD",
            _ => "",
        };
        let scale = Self {
            unit: unit.to_owned(),
            name,
            kind,
            mean,
            std,
        };
        scale.check()?;
        Ok(scale)
    }

    /// The same scale with another unit.
    pub fn with_unit(mut self, unit: impl Into<String>) -> Self {
        self.unit = unit.into();
        self
    }

    /// From z-score space to the level.
    pub fn to_level(&self, z: f64) -> f64 {
        let transformed = z * self.std + self.mean;
        match self.kind {
            ScaleKind::Log => transformed.exp(),
            ScaleKind::Log1p => transformed.exp_m1(),
            ScaleKind::Identity => transformed,
        }
    }

    /// From the level to z-score space. NaN for a level the logarithm does not take.
    pub fn to_z(&self, level: f64) -> f64 {
        let transformed = match self.kind {
            ScaleKind::Log => level.ln(),
            ScaleKind::Log1p => level.ln_1p(),
            ScaleKind::Identity => level,
        };
        (transformed - self.mean) / self.std
    }

    /// Whether this feature is one of the four prices of a candle.
    pub fn is_price(&self) -> bool {
        is_price(&self.name)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.mean.is_finite() && self.std.is_finite() && self.std > 0.0 {
            return Ok(());
        }
        Err(EvalError::BadScale {
            feature: self.name.clone(),
            mean: self.mean,
            std: self.std,
        })
    }
}

fn is_price(name: &str) -> bool {
    matches!(name, "Open" | "High" | "Low" | "Close")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_goes_there_and_back() {
        for kind in [ScaleKind::Log, ScaleKind::Log1p, ScaleKind::Identity] {
            let scale = FeatureScale::new("x", kind, 0.3, 2.0).unwrap();
            for level in [0.01, 1.0, 61_234.56] {
                let back = scale.to_level(scale.to_z(level));
                assert!(
                    (back - level).abs() < 1e-9 * level,
                    "{kind:?} {level} {back}"
                );
            }
        }
    }

    #[test]
    fn known_answers() {
        let log = FeatureScale::new("Open", ScaleKind::Log, 1.0, 2.0).unwrap();
        assert!((log.to_z(5f64.exp()) - 2.0).abs() < 1e-12);
        let log1p = FeatureScale::new("Volume", ScaleKind::Log1p, 1.0, 2.0).unwrap();
        assert!((log1p.to_z(0.0) + 0.5).abs() < 1e-12);
        assert_eq!(log1p.unit, "BTC");
        assert!(log.is_price() && !log1p.is_price());
    }

    #[test]
    fn a_scale_that_cannot_scale_is_refused() {
        for (mean, std) in [
            (0.0, 0.0),
            (f64::NAN, 1.0),
            (0.0, -1.0),
            (0.0, f64::INFINITY),
        ] {
            let error = FeatureScale::new("Low", ScaleKind::Log, mean, std).unwrap_err();
            assert!(error.to_string().contains("Low"), "{error}");
        }
    }

    #[test]
    fn serde_names_are_snake_case() {
        let scale = FeatureScale::new("Volume", ScaleKind::Log1p, 0.0, 1.0).unwrap();
        let text = serde_json::to_string(&scale).unwrap();
        assert!(text.contains(r#""kind":"log1p""#), "{text}");
    }
}
