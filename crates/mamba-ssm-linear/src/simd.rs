//! Code compiled for every instruction set, picked when it runs.

/// Numbers computed side by side: one or two registers of most machines.
pub const LANES: usize = 16;

/// Runs `work` compiled for the best instruction set the machine has. What it calls must be
/// `#[inline(always)]` to profit.
pub fn vectorized<F: FnOnce() -> R, R>(work: F) -> R {
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
