//! Where ticks stand and what they say.

use crate::text;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// One axis of a panel, in plotting coordinates (logarithms, on a logarithmic axis).
#[derive(Debug, Clone)]
pub(crate) struct Axis {
    pub range: Range<f64>,
    pub ticks: Vec<Tick>,
    pub title: String,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tick {
    pub at: f64,
    pub label: String,
}

impl Axis {
    /// A linear axis with about `count` round ticks, a little wider than `low..high`.
    pub fn linear(low: f64, high: f64, count: usize, title: impl Into<String>) -> Self {
        let room = if high > low {
            0.06 * (high - low)
        } else {
            (0.05 * high.abs()).max(1e-9)
        };
        let range = low - room..high + room;
        Self {
            ticks: linear_ticks(&range, count),
            range,
            title: title.into(),
        }
    }

    /// A logarithmic axis for values above zero: plot `log10` of them.
    pub fn logarithmic(low: f64, high: f64, title: impl Into<String>) -> Self {
        let (low, high) = (low.log10(), high.log10());
        let room = (0.08 * (high - low)).max(0.05);
        let range = low - room..high + room;
        Self {
            ticks: log_ticks(&range),
            range,
            title: title.into(),
        }
    }

    /// A time axis over unix seconds, ticks on round UTC times.
    pub fn time(low: i64, high: i64, count: usize) -> Self {
        let high = high.max(low + 60);
        let (step, format) = time_step((high - low) / count.max(1) as i64);
        let first = low + (step - low.rem_euclid(step)) % step;
        let ticks = (0..)
            .map(|index| first + index * step)
            .take_while(|&at| at <= high)
            .map(|at| Tick {
                at: at as f64,
                label: text::format_utc(at, format),
            })
            .collect();
        Self {
            range: low as f64..high as f64,
            ticks,
            title: "time (UTC)".to_owned(),
        }
    }

    /// Whole numbers from `low` to `high`.
    pub fn whole(low: usize, high: usize, count: usize, title: impl Into<String>) -> Self {
        let (low, high) = (low as f64, high as f64);
        let step = round_step((high - low) / count as f64).max(1.0);
        let room = (0.02 * (high - low)).max(0.25);
        let first = (low / step).ceil() as i64;
        let last = (high / step).floor() as i64;
        let mut at: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
        if at.first().is_some_and(|&first| first - low >= 0.6 * step) {
            at.insert(0, low);
        }
        let ticks = at.into_iter().map(|at| Tick {
            at,
            label: format!("{at:.0}"),
        });
        Self {
            range: low - room..high + room,
            ticks: ticks.collect(),
            title: title.into(),
        }
    }

    /// The same axis with ticks that say nothing, for a panel above another.
    pub fn unlabelled(&self) -> Self {
        let mut axis = self.clone();
        axis.ticks.iter_mut().for_each(|tick| tick.label.clear());
        axis.title.clear();
        axis
    }

    /// The label of the tick at `at`; empty if there is none.
    pub fn label(&self, at: f64) -> String {
        let slack = 1e-9 * (self.range.end - self.range.start);
        let found = self.ticks.iter().find(|tick| (tick.at - at).abs() <= slack);
        found.map_or(String::new(), |tick| tick.label.clone())
    }

    /// The nearest value on the axis, so that a runaway line stays inside its panel.
    pub fn clamp(&self, value: f64) -> f64 {
        value.clamp(self.range.start, self.range.end)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (f64::from(to - from) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|tick| tick.at).collect()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.label(*value)
    }
}

/// The smallest of 1, 2, 2.5 and 5 times a power of ten that is no less than `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(1e-300).log10().floor());
    let fits = |factor: &f64| factor * power >= step * (1.0 - 1e-9);
    [1.0, 2.0, 2.5, 5.0].into_iter().find(fits).unwrap_or(10.0) * power
}

fn linear_ticks(range: &Range<f64>, count: usize) -> Vec<Tick> {
    let step = round_step((range.end - range.start) / count as f64);
    let mut decimals = (-step.log10().floor()).max(0.0) as usize;
    if (step * 10f64.powi(decimals as i32)).fract() > 1e-6 {
        decimals += 1;
    }
    let first = (range.start / step).ceil() as i64;
    let last = (range.end / step).floor() as i64;
    (first..=last)
        .map(|index| {
            let at = index as f64 * step;
            Tick {
                at,
                label: linear_label(at, step, decimals),
            }
        })
        .collect()
}

fn linear_label(at: f64, step: f64, decimals: usize) -> String {
    if at == 0.0 {
        "0".to_owned()
    } else if !(1e-5..1e9).contains(&step) {
        format!("{at:.1e}")
    } else {
        text::grouped(&format!("{at:.decimals$}"))
    }
}

/// Powers of ten, and 2 and 5 times them when there are few.
fn log_ticks(range: &Range<f64>) -> Vec<Tick> {
    let decades = range.end - range.start;
    let factors: &[f64] = match decades {
        d if d < 0.7 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        d if d < 1.2 => &[1.0, 2.0, 3.0, 5.0, 7.0],
        d if d < 3.5 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let stride = (decades / 8.0).ceil().max(1.0) as usize;
    let exponents = range.start.floor() as i32..=range.end.floor() as i32;
    exponents
        .step_by(stride)
        .flat_map(|exponent| factors.iter().map(move |&factor| (factor, exponent)))
        .map(|(factor, exponent)| Tick {
            at: factor.log10() + f64::from(exponent),
            label: log_label(factor, exponent),
        })
        .filter(|tick| range.contains(&tick.at))
        .collect()
}

fn log_label(factor: f64, exponent: i32) -> String {
    if (-3..5).contains(&exponent) {
        let extra = usize::from(factor.fract() > 0.0);
        let decimals = (-exponent).max(0) as usize + extra;
        let value = factor * 10f64.powi(exponent);
        let label = format!("{value:.decimals$}");
        return text::grouped(&label);
    }
    format!("{factor}e{exponent}")
}

/// A round step no shorter than `least` seconds, and how to write times that far apart.
fn time_step(least: i64) -> (i64, &'static str) {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    let short = [1, 2, 5, 10, 15, 30].map(|n| n * MINUTE);
    let long = [1, 2, 3, 6, 12].map(|n| n * HOUR);
    let steps = short.into_iter().chain(long);
    match steps.into_iter().find(|&step| step >= least) {
        Some(step) if step < 6 * HOUR => (step, "%H:%M"),
        Some(step) => (step, "%m-%d %H:%M"),
        None => {
            let days = [1, 2, 5, 7, 14, 30, 60, 90, 180].map(|n| n * DAY);
            let fits = days.into_iter().find(|&step| step >= least);
            (fits.unwrap_or((least / DAY + 1) * DAY), "%Y-%m-%d")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn linear_ticks_are_round() {
        let axis = Axis::linear(61_012.0, 61_188.0, 5, "USD");
        assert_eq!(labels(&axis), ["61,050", "61,100", "61,150"]);
        let axis = Axis::linear(-0.004, 0.006, 5, "");
        assert_eq!(labels(&axis), ["-0.0025", "0", "0.0025", "0.0050"]);
        let flat = Axis::linear(5.0, 5.0, 4, "");
        assert!(flat.range.start < 5.0 && flat.range.end > 5.0 && !flat.ticks.is_empty());
    }

    #[test]
    fn log_ticks_fill_short_and_long_ranges() {
        assert_eq!(
            labels(&Axis::logarithmic(0.01, 1.0, "")),
            ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]
        );
        let long = Axis::logarithmic(1e-20, 1e20, "");
        assert!((4..=10).contains(&long.ticks.len()), "{:?}", labels(&long));
        let narrow = Axis::logarithmic(1e-4, 1e-4, "");
        assert!(labels(&narrow).contains(&"1e-4"), "{:?}", labels(&narrow));
    }

    #[test]
    fn times_are_round() {
        // 23:07 to 03:05
        let start = 1_719_788_820;
        let axis = Axis::time(start, start + 238 * 60, 8);
        assert_eq!(labels(&axis)[..2], ["23:30", "00:00"]);
        assert_eq!(axis.label(axis.ticks[1].at), "00:00");
        assert_eq!(axis.label(axis.ticks[1].at + 60.0), "");
        let days = Axis::time(0, 40 * 86_400, 8);
        assert_eq!(labels(&days)[..2], ["1970-01-01", "1970-01-06"]);
    }

    #[test]
    fn whole_ticks_start_at_the_first_epoch() {
        assert_eq!(labels(&Axis::whole(1, 3, 10, "epoch")), ["1", "2", "3"]);
        assert_eq!(
            labels(&Axis::whole(1, 50, 10, "epoch"))[..3],
            ["1", "5", "10"]
        );
        assert_eq!(labels(&Axis::whole(4, 4, 10, "epoch")), ["4"]);
    }
}
