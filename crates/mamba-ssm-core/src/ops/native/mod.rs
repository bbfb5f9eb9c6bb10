//! What the native CPU implementations share: vectorised products and functions, views of Flex tensors.

pub(crate) mod lanes;
pub(crate) mod product;
pub(crate) mod rows;
mod scratch;

pub(crate) use mamba_ssm_linear::memory::zeros;
pub(crate) use scratch::with_scratch;

/// Widths of scratch rows are multiples of this, so that products need no edge cases in columns.
pub(crate) const LANES: usize = 16;

/// `n` rounded up to whole lanes.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// Runs `work` compiled for the best instruction set the machine has. What it calls must be
/// `#[inline(always)]` to profit.
pub(crate) fn vectorized<F: FnOnce() -> R, R>(work: F) -> R {
    struct Work<F>(F);
    impl<F: FnOnce() -> R, R> pulp::NullaryFnOnce for Work<F> {
        type Output = R;

        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}
