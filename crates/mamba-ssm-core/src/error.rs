use thiserror::Error;

/// A layer configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A size that must be at least one is zero.
    #[error("{field} is 0: expected at least 1")]
    Zero {
        /// The configuration field.
        field: &'static str,
    },
    /// A size that must divide another does not.
    #[error("{whole} = {whole_value} is not a multiple of {part} = {part_value}")]
    NotDivisible {
        /// The size to be divided.
        whole: &'static str,
        /// Its value.
        whole_value: usize,
        /// The size it must be a multiple of.
        part: &'static str,
        /// Its value.
        part_value: usize,
    },
    /// A range whose ends are out of order, not finite, or not positive where they must be.
    #[error("{field} = {low}..{high} is not a range of {expected}")]
    Range {
        /// The configuration field.
        field: &'static str,
        /// Lower end.
        low: f64,
        /// Upper end.
        high: f64,
        /// What the ends must be.
        expected: &'static str,
    },
}

/// `Err` when a size is zero.
pub(crate) fn at_least_one(field: &'static str, value: usize) -> Result<(), ConfigError> {
    match value {
        0 => Err(ConfigError::Zero { field }),
        _ => Ok(()),
    }
}

/// `Err` when `whole` is not a multiple of `part`.
pub(crate) fn divisible(
    (whole, whole_value): (&'static str, usize),
    (part, part_value): (&'static str, usize),
) -> Result<(), ConfigError> {
    if whole_value.is_multiple_of(part_value) {
        return Ok(());
    }
    Err(ConfigError::NotDivisible {
        whole,
        whole_value,
        part,
        part_value,
    })
}

/// `Err` unless `0 < low <= high < infinity`.
pub(crate) fn positive_range(
    field: &'static str,
    (low, high): (f64, f64),
) -> Result<(), ConfigError> {
    if low > 0.0 && low <= high && high.is_finite() {
        return Ok(());
    }
    Err(ConfigError::Range {
        field,
        low,
        high,
        expected: "positive numbers, the lower first",
    })
}
