//! How long to wait before a transfer is taken up again, and when it counts as one that gets on.

use std::time::Duration;

/// Bytes after which a transfer counts as one that gets on.
pub(crate) const PROGRESS: u64 = 1 << 20;
/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The wait after this many failures in a row: doubles with each, from `first` on.
pub(crate) fn wait_after(failures: usize, first: Duration) -> Duration {
    let doubled = 1u32 << failures.saturating_sub(1).min(16);
    first.saturating_mul(doubled).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_ten_seconds() {
        let waits =
            [1, 2, 3, 5, usize::MAX].map(|n| wait_after(n, Duration::from_secs(1)).as_secs());
        assert_eq!(waits, [1, 2, 4, 10, 10]);
    }
}
