//! Sums, spreads, averages and quantiles over the last rows.

use std::collections::VecDeque;

/// The sum of the last values, of sums alone: nothing is taken away again, so that a value that has left the window
/// leaves no rounding error behind (a window of zeros has the sum zero).
///
/// The window is two stacks. The older one keeps the sum from each of its values to its newest; when it is empty,
/// the newer one is turned over onto it.
#[derive(Debug)]
pub(super) struct RollingSum {
    newer: Vec<f64>,
    newer_sum: f64,
    older_sums: Vec<f64>,
    window: usize,
}

impl RollingSum {
    pub(super) fn new(window: usize) -> Self {
        Self {
            newer: Vec::new(),
            newer_sum: 0.0,
            older_sums: Vec::new(),
            window,
        }
    }

    /// Takes the next value; the sum once the window is full.
    pub(super) fn push(&mut self, value: f64) -> Option<f64> {
        self.newer.push(value);
        self.newer_sum += value;
        if self.len() > self.window {
            if self.older_sums.is_empty() {
                self.turn_over();
            }
            self.older_sums.pop();
        }
        let older = self.older_sums.last().copied().unwrap_or(0.0);
        (self.len() == self.window).then_some(older + self.newer_sum)
    }

    fn len(&self) -> usize {
        self.newer.len() + self.older_sums.len()
    }

    fn turn_over(&mut self) {
        let mut sum = 0.0;
        while let Some(value) = self.newer.pop() {
            sum += value;
            self.older_sums.push(sum);
        }
        self.newer_sum = 0.0;
    }
}

/// The sample standard deviation of the last values.
#[derive(Debug)]
pub(super) struct RollingStd {
    sum: RollingSum,
    squares: RollingSum,
    window: f64,
}

impl RollingStd {
    pub(super) fn new(window: usize) -> Self {
        Self {
            sum: RollingSum::new(window),
            squares: RollingSum::new(window),
            window: window as f64,
        }
    }

    pub(super) fn push(&mut self, value: f64) -> Option<f64> {
        let sum = self.sum.push(value);
        let squares = self.squares.push(value * value);
        let (sum, squares) = sum.zip(squares)?;
        let deviations = squares - sum * sum / self.window;
        Some((deviations.max(0.0) / (self.window - 1.0)).sqrt())
    }
}

/// An exponential average that starts as the plain mean of its first `window` values.
#[derive(Debug)]
pub(super) struct Smoothed {
    weight: f64,
    window: usize,
    seen: usize,
    mean: f64,
}

impl Smoothed {
    /// Weight `2 / (window + 1)` for the newest value.
    pub(super) fn exponential(window: usize) -> Self {
        Self::with_weight(window, 2.0 / (window as f64 + 1.0))
    }

    /// Wilder's weight `1 / window` for the newest value.
    pub(super) fn wilder(window: usize) -> Self {
        Self::with_weight(window, 1.0 / window as f64)
    }

    fn with_weight(window: usize, weight: f64) -> Self {
        Self {
            weight,
            window,
            seen: 0,
            mean: 0.0,
        }
    }

    pub(super) fn push(&mut self, value: f64) -> Option<f64> {
        self.seen = (self.seen + 1).min(self.window + 1);
        let weight = if self.seen <= self.window {
            1.0 / self.seen as f64
        } else {
            self.weight
        };
        self.mean += weight * (value - self.mean);
        (self.seen >= self.window).then_some(self.mean)
    }
}

/// The last values in order of size.
#[derive(Debug)]
pub(super) struct RollingQuantile {
    values: VecDeque<f64>,
    sorted: Vec<f64>,
    window: usize,
    quantile: f64,
}

impl RollingQuantile {
    pub(super) fn new(window: usize, quantile: f64) -> Self {
        Self {
            values: VecDeque::new(),
            sorted: Vec::new(),
            window,
            quantile,
        }
    }

    /// Takes the next value; the quantile (the nearest one from below) once the window is full.
    pub(super) fn push(&mut self, value: f64) -> Option<f64> {
        if self.values.len() == self.window
            && let Some(old) = self.values.pop_front()
        {
            let at = self.sorted.partition_point(|v| *v < old);
            self.sorted.remove(at);
        }
        self.values.push_back(value);
        self.sorted
            .insert(self.sorted.partition_point(|v| *v < value), value);
        let at = (self.quantile * (self.window - 1) as f64).floor() as usize;
        (self.values.len() == self.window).then(|| self.sorted[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rolling_std_is_that_of_the_last_values() {
        let values: Vec<f64> = (0..100).map(|i| ((i * 37) % 11) as f64).collect();
        let mut rolling = RollingStd::new(7);
        for (i, &value) in values.iter().enumerate() {
            let got = rolling.push(value);
            assert_eq!(got.is_some(), i >= 6);
            if let Some(got) = got {
                let window = &values[i - 6..=i];
                let mean = window.iter().sum::<f64>() / 7.0;
                let squares: f64 = window.iter().map(|v| (v - mean) * (v - mean)).sum();
                assert!((got - (squares / 6.0).sqrt()).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn a_large_value_leaves_no_trace_once_it_has_left() {
        let mut sum = RollingSum::new(4);
        sum.push(1e18);
        let last = (0..20).filter_map(|_| sum.push(0.1)).last().unwrap();
        assert!((last - 0.4).abs() < 1e-12, "{last}");
    }

    #[test]
    fn a_rolling_sum_is_that_of_its_window_and_zero_when_all_of_it_is() {
        let values: Vec<f64> = (0..90)
            .map(|i| {
                if i % 30 < 17 {
                    0.1 + f64::from(i) * 1e6
                } else {
                    0.0
                }
            })
            .collect();
        for window in [1, 2, 7, 12] {
            let mut sum = RollingSum::new(window);
            for (i, &value) in values.iter().enumerate() {
                let got = sum.push(value);
                assert_eq!(got.is_some(), i + 1 >= window);
                let Some(got) = got else { continue };
                let expected: f64 = values[i + 1 - window..=i].iter().sum();
                assert!(
                    (got - expected).abs() <= 1e-14 * expected,
                    "{got} {expected}"
                );
            }
        }
    }

    #[test]
    fn the_quantile_is_one_of_the_last_values() {
        let mut rolling = RollingQuantile::new(5, 0.5);
        let got: Vec<Option<f64>> = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 9.0]
            .into_iter()
            .map(|v| rolling.push(v))
            .collect();
        assert_eq!(
            got,
            [None, None, None, None, Some(3.0), Some(3.0), Some(4.0)]
        );
    }
}
