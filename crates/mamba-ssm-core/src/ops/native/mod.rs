//! What the native CPU implementations share: vectorised products and functions, views of Flex tensors.

pub(crate) mod lanes;
pub(crate) mod product;
pub(crate) mod rows;
mod scratch;

pub(crate) use mamba_ssm_linear::memory::{working, zeros};
/// Widths of scratch rows are multiples of `LANES`, so that products need no edge cases in columns.
pub(crate) use mamba_ssm_linear::simd::{LANES, vectorized};
pub(crate) use scratch::with_scratch;

/// `n` rounded up to whole lanes.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}
