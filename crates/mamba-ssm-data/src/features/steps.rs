//! One small machine per kind of feature.

use std::collections::VecDeque;

use super::Feature;
use super::rolling::{RollingQuantile, RollingStd, RollingSum, Smoothed};

const DAY: i64 = 86_400;
const WEEK: i64 = 7 * DAY;
/// 1970-01-01 was a Thursday; the first Monday after it came four days later.
const FIRST_MONDAY: i64 = 4 * DAY;

/// Takes rows in order and writes what can be known at each.
pub(super) trait Step: Send {
    /// `cells` are the input columns, all finite; `out` holds NaN where nothing is known yet.
    fn push(&mut self, time: i64, cells: &[f64], out: &mut [f64]);
}

/// The step of a feature, at the start of a series.
pub(super) fn step_for(feature: &Feature) -> Box<dyn Step> {
    match *feature {
        Feature::Return { steps, .. } => Box::new(Return {
            past: VecDeque::new(),
            steps,
        }),
        Feature::Volatility { window, .. } => Box::new(Volatility::new(window)),
        Feature::Rsi { window, .. } => Box::new(Rsi {
            last: None,
            up: Smoothed::wilder(window),
            down: Smoothed::wilder(window),
        }),
        Feature::Macd {
            fast, slow, signal, ..
        } => Box::new(Macd {
            fast: Smoothed::exponential(fast),
            slow: Smoothed::exponential(slow),
            signal: Smoothed::exponential(signal),
        }),
        Feature::Atr { window } => Box::new(Atr {
            last_close: None,
            range: Smoothed::wilder(window),
        }),
        Feature::VwapDistance { window } => Box::new(VwapDistance {
            money: RollingSum::new(window),
            volume: RollingSum::new(window),
        }),
        Feature::TimeOfDay => Box::new(Clock {
            period: DAY,
            origin: 0,
        }),
        Feature::TimeOfWeek => Box::new(Clock {
            period: WEEK,
            origin: FIRST_MONDAY,
        }),
        Feature::Regime {
            window,
            lookback,
            quantile,
            ..
        } => Box::new(Regime {
            volatility: Volatility::new(window),
            past: RollingQuantile::new(lookback, quantile),
        }),
    }
}

struct Return {
    past: VecDeque<f64>,
    steps: usize,
}

impl Step for Return {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        let level = cells[0];
        self.past.push_back(level);
        if self.past.len() > self.steps
            && let Some(before) = self.past.pop_front()
        {
            out[0] = (level / before).ln();
        }
    }
}

struct Volatility {
    last: Option<f64>,
    spread: RollingStd,
}

impl Volatility {
    fn new(window: usize) -> Self {
        Self {
            last: None,
            spread: RollingStd::new(window),
        }
    }

    fn next(&mut self, level: f64) -> Option<f64> {
        let step = (level / self.last.replace(level)?).ln();
        // A zero (a volume, say) has no logarithm: it counts as no move rather than stay for a window.
        self.spread.push(if step.is_finite() { step } else { 0.0 })
    }
}

impl Step for Volatility {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        if let Some(spread) = self.next(cells[0]) {
            out[0] = spread;
        }
    }
}

struct Rsi {
    last: Option<f64>,
    up: Smoothed,
    down: Smoothed,
}

impl Step for Rsi {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        let Some(last) = self.last.replace(cells[0]) else {
            return;
        };
        let change = cells[0] - last;
        let up = self.up.push(change.max(0.0));
        let down = self.down.push((-change).max(0.0));
        if let Some((up, down)) = up.zip(down) {
            let both = up + down;
            out[0] = if both > 0.0 { 100.0 * up / both } else { 50.0 };
        }
    }
}

struct Macd {
    fast: Smoothed,
    slow: Smoothed,
    signal: Smoothed,
}

impl Step for Macd {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        let fast = self.fast.push(cells[0]);
        let slow = self.slow.push(cells[0]);
        let Some((fast, slow)) = fast.zip(slow).filter(|(_, slow)| *slow != 0.0) else {
            return;
        };
        let line = (fast - slow) / slow;
        if let Some(signal) = self.signal.push(line) {
            out.copy_from_slice(&[line, signal, line - signal]);
        }
    }
}

struct Atr {
    last_close: Option<f64>,
    range: Smoothed,
}

impl Step for Atr {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        let [high, low, close] = [cells[0], cells[1], cells[2]];
        let last = self.last_close.replace(close).unwrap_or(close);
        let range = high.max(last) - low.min(last);
        if let Some(range) = self.range.push(range) {
            out[0] = range / close;
        }
    }
}

struct VwapDistance {
    money: RollingSum,
    volume: RollingSum,
}

impl Step for VwapDistance {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        let [high, low, close, volume] = [cells[0], cells[1], cells[2], cells[3]];
        let money = self.money.push((high + low + close) / 3.0 * volume);
        let traded = self.volume.push(volume);
        if let Some((money, traded)) = money.zip(traded) {
            // Where nothing was traded both sums are zero, and their ratio no number.
            let distance = (close * traded / money).ln();
            out[0] = if distance.is_finite() { distance } else { 0.0 };
        }
    }
}

struct Clock {
    period: i64,
    origin: i64,
}

impl Step for Clock {
    fn push(&mut self, time: i64, _: &[f64], out: &mut [f64]) {
        let phase =
            (time.wrapping_sub(self.origin)).rem_euclid(self.period) as f64 / self.period as f64;
        let angle = std::f64::consts::TAU * phase;
        out.copy_from_slice(&[libm::sin(angle), libm::cos(angle)]);
    }
}

struct Regime {
    volatility: Volatility,
    past: RollingQuantile,
}

impl Step for Regime {
    fn push(&mut self, _: i64, cells: &[f64], out: &mut [f64]) {
        if let Some(now) = self.volatility.next(cells[0])
            && let Some(threshold) = self.past.push(now)
        {
            out[0] = f64::from(u8::from(now > threshold));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(feature: Feature, rows: &[&[f64]]) -> Vec<Vec<f64>> {
        let mut step = step_for(&feature);
        rows.iter()
            .enumerate()
            .map(|(i, cells)| {
                let mut out = vec![f64::NAN; feature.names().len()];
                step.push(i as i64 * 60, cells, &mut out);
                out
            })
            .collect()
    }

    #[test]
    fn rsi_follows_wilders_recipe() {
        // Changes +1, +2, -1, +3 with a window of 3: means 1 and 1/3, then (2*1+3)/3 and (2/3+0)/3.
        let prices = [10.0, 11.0, 13.0, 12.0, 15.0];
        let rows: Vec<&[f64]> = prices.iter().map(std::slice::from_ref).collect();
        let got = run(
            Feature::Rsi {
                of: None,
                window: 3,
            },
            &rows,
        );
        assert!(got[2][0].is_nan());
        assert!((got[3][0] - 75.0).abs() < 1e-12);
        let (up, down) = (5.0 / 3.0, 2.0 / 9.0);
        assert!((got[4][0] - 100.0 * up / (up + down)).abs() < 1e-12);
    }

    #[test]
    fn atr_counts_the_jump_from_the_last_close() {
        let rows: [&[f64]; 3] = [&[11.0, 9.0, 10.0], &[21.0, 20.0, 20.0], &[22.0, 18.0, 20.0]];
        let got = run(Feature::Atr { window: 2 }, &rows);
        assert!(got[0][0].is_nan());
        assert!((got[1][0] - (2.0 + 11.0) / 2.0 / 20.0).abs() < 1e-12);
        assert!((got[2][0] - (6.5 + 4.0) / 2.0 / 20.0).abs() < 1e-12);
    }

    #[test]
    fn vwap_weighs_by_volume_and_is_quiet_where_nothing_trades() {
        let rows: [&[f64]; 3] = [
            &[10.0, 10.0, 10.0, 3.0],
            &[20.0, 20.0, 20.0, 1.0],
            &[20.0, 20.0, 20.0, 0.0],
        ];
        let got = run(Feature::VwapDistance { window: 2 }, &rows);
        assert!((got[1][0] - (20.0f64 / 12.5).ln()).abs() < 1e-12);
        assert!(got[2][0].abs() < 1e-12);
        let still: [&[f64]; 2] = [&[5.0, 5.0, 5.0, 0.0]; 2];
        assert_eq!(run(Feature::VwapDistance { window: 2 }, &still)[1][0], 0.0);
    }

    #[test]
    fn vwap_is_quiet_as_soon_as_trading_stops_and_hears_the_smallest_volume() {
        let feature = Feature::VwapDistance { window: 5 };
        let volumes = (0..40).map(|i| match i % 20 {
            k @ 0..11 => 0.1 + f64::from(k) * 1e7 / 3.0,
            _ => 0.0,
        });
        let rows: Vec<[f64; 4]> = volumes
            .enumerate()
            .map(|(i, volume)| {
                let price = 10.0 + (i % 3) as f64 / 7.0;
                [price, price, price, volume]
            })
            .collect();
        let cells: Vec<&[f64]> = rows.iter().map(<[f64; 4]>::as_slice).collect();
        let got = run(feature.clone(), &cells);
        for at in 4..40 {
            let window = &rows[at - 4..=at];
            let traded: f64 = window.iter().map(|r| r[3]).sum();
            let money: f64 = window.iter().map(|r| r[0] * r[3]).sum();
            let expected = if traded > 0.0 {
                (rows[at][2] * traded / money).ln()
            } else {
                0.0
            };
            assert!(
                (got[at][0] - expected).abs() < 1e-12,
                "{at}: {} {expected}",
                got[at][0]
            );
        }
        let rows: [&[f64]; 5] = [
            &[10.0, 10.0, 10.0, 1e-15],
            &[20.0, 20.0, 20.0, 0.0],
            &[20.0, 20.0, 20.0, 0.0],
            &[20.0, 20.0, 20.0, 0.0],
            &[20.0, 20.0, 20.0, 0.0],
        ];
        assert!((run(feature, &rows)[4][0] - 2f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn macd_of_a_steady_price_is_zero() {
        let rows: [&[f64]; 12] = [&[7.0]; 12];
        let got = run(
            Feature::Macd {
                of: None,
                fast: 2,
                slow: 4,
                signal: 3,
            },
            &rows,
        );
        assert!(got[4][0].is_nan());
        assert_eq!(got[5], [0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_week_begins_on_monday() {
        let mut out = [f64::NAN; 2];
        // 2024-01-01 was a Monday.
        step_for(&Feature::TimeOfWeek).push(1_704_067_200, &[], &mut out);
        assert!(
            (out[0]).abs() < 1e-12 && (out[1] - 1.0).abs() < 1e-12,
            "{out:?}"
        );
        step_for(&Feature::TimeOfDay).push(1_704_067_200 + 6 * 3600, &[], &mut out);
        assert!((out[0] - 1.0).abs() < 1e-12, "{out:?}");
    }

    #[test]
    fn the_regime_is_set_by_its_own_past() {
        let prices: Vec<f64> = (0..40)
            .map(|i| {
                if i < 30 {
                    100.0 + f64::from(i % 2) * 0.01
                } else {
                    100.0 + f64::from(i % 2) * 5.0
                }
            })
            .collect();
        let rows: Vec<&[f64]> = prices.iter().map(std::slice::from_ref).collect();
        let feature = Feature::Regime {
            of: None,
            window: 3,
            lookback: 10,
            quantile: 0.8,
        };
        let got = run(feature, &rows);
        assert!(got[11][0].is_nan());
        assert_eq!(got[31][0], 1.0);
    }
}
