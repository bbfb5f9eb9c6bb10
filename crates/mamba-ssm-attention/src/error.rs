/// Why a configuration cannot work.
///
/// `try_init` returns it; `init` panics with the same words.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// A size that must be at least one is zero.
    #[error("{field} is 0; it must be at least 1")]
    Zero {
        /// Name of the configuration field.
        field: &'static str,
    },
    /// The model width cannot be shared out evenly.
    #[error(
        "d_model = {d_model} is not a multiple of n_heads = {n_heads}; \
         change one of them or set head_dim"
    )]
    HeadsDoNotDivide {
        /// Width of a token.
        d_model: usize,
        /// Number of query heads.
        n_heads: usize,
    },
    /// Query heads cannot be grouped evenly over key/value heads.
    #[error("n_heads = {n_heads} is not a multiple of n_kv_heads = {n_kv_heads}")]
    KvHeadsDoNotDivide {
        /// Number of query heads.
        n_heads: usize,
        /// Number of key/value heads.
        n_kv_heads: usize,
    },
    /// A head is wider than the attention operator allows.
    #[error("a head of {head_dim} features is too wide; at most {max} are supported")]
    HeadTooWide {
        /// Features per head.
        head_dim: usize,
        /// Largest width supported.
        max: usize,
    },
    /// Rotary positions turn pairs of features, so their number must be even.
    #[error(
        "rotary positions need an even number of features per head, at most {head_dim}; got {dim}"
    )]
    RotaryDim {
        /// Features turned.
        dim: usize,
        /// Features per head.
        head_dim: usize,
    },
    /// A real number outside its range.
    #[error("{field} = {value} is out of range; expected {expected}")]
    OutOfRange {
        /// Name of the configuration field.
        field: &'static str,
        /// The value given.
        value: f64,
        /// The range allowed, in words.
        expected: &'static str,
    },
    /// Decoding from a cache needs queries that see the past only.
    #[error("step and forward_from need causal attention; this layer has causal = false")]
    NotCausal,
}

/// Refuses a zero size.
pub(crate) fn at_least_one(field: &'static str, value: usize) -> Result<(), AttentionError> {
    if value == 0 {
        return Err(AttentionError::Zero { field });
    }
    Ok(())
}

/// Refuses a probability outside `[0, 1)`.
pub(crate) fn probability(field: &'static str, value: f64) -> Result<(), AttentionError> {
    if !(0.0..1.0).contains(&value) {
        return Err(AttentionError::OutOfRange {
            field,
            value,
            expected: "0 <= p < 1",
        });
    }
    Ok(())
}

/// Refuses a value that is not a positive, finite number.
pub(crate) fn positive(field: &'static str, value: f64) -> Result<(), AttentionError> {
    if !(value.is_finite() && value > 0.0) {
        return Err(AttentionError::OutOfRange {
            field,
            value,
            expected: "a positive, finite number",
        });
    }
    Ok(())
}
