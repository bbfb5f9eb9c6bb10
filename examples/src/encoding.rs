//! What a network sees of a window, what it should answer, and what its answers mean.
//!
//! Rows come and go in z-score space, `[rows, features]`. `Close` anchors the prices; any other feature is
//! anchored on its own last value.
//!
//! Of a feature that its anchor settles, an anchored target asks nothing: its forecast is the anchor. The open
//! of a candle is the close before it but for a few cents, and those are noise: a network's answer, however
//! small, adds an error several times theirs. Which features are settled is measured on the training rows, the
//! newest tenth of them, because markets change: in the first months of BTC/USDT a gap between close and open
//! was nearly as large as a minute's move, later a fiftieth of it.

use std::collections::HashMap;

use mamba_ssm_data::{Dataset, FeatureStats, Scale, Transform};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Seconds from one row to the next.
pub const MINUTE: i64 = 60;

/// What the network is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The next row's z-scores, from z-scores, as in the published note "Forecasting Bitcoin with Mamba State
    /// Space Models".
    Level,
    /// The change from the last close (prices) and from the last value (others) in units of the training
    /// rows' own step sizes, from such changes, the range, and the clock.
    Anchored,
}

/// Encodes windows and decodes answers. Saved with every run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encoder {
    target: Target,
    /// Per feature, how to get from the anchor's z-score to this feature's: `scale * z + shift`.
    anchors: Vec<Anchor>,
    /// Root mean square of the changes in the training rows, z-score units.
    steps: Vec<f32>,
    /// Which features the anchor settles: forecast as the anchor, whatever the network answers.
    settled: Vec<bool>,
    /// Where high, low and close stand, if they are all there.
    candle: Option<Candle>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Anchor {
    feature: usize,
    scale: f32,
    shift: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Candle {
    high: usize,
    low: usize,
    close: usize,
}

/// Changes are cut to this many steps: one crash must not drown a day of quiet.
const LARGEST_CHANGE: f32 = 8.0;
/// Keeps the logarithm of a candle without range finite, in steps.
const SMALLEST_RANGE: f32 = 0.02;
/// A feature is settled if its anchor leaves at most this share of the variance of the feature's own moves.
const SETTLED: f64 = 0.01;
/// Sine and cosine of the time of day and of the week.
const CLOCK: usize = 4;
/// Logarithms of the range and of the size of the last change of the close.
const SIZES: usize = 2;

impl Encoder {
    /// The encoder of a target for a prepared data set; step sizes and settled features come from its
    /// training rows.
    ///
    /// # Errors
    ///
    /// When the rows cannot be read, or an anchored target finds fewer than two rows to measure steps on.
    pub fn fit(target: Target, data: &Dataset) -> Result<Self> {
        let mut encoder = Self::without_steps(target, data.transform());
        if target == Target::Anchored {
            encoder.measure_steps(data)?;
        }
        Ok(encoder)
    }

    fn without_steps(target: Target, transform: &Transform) -> Self {
        let features = &transform.features;
        let find = |name: &str| features.iter().position(|f| f.name == name);
        let candle = match (find("High"), find("Low"), find("Close")) {
            (Some(high), Some(low), Some(close)) => Some(Candle { high, low, close }),
            _ => None,
        };
        let anchors = features
            .iter()
            .enumerate()
            .map(|(index, feature)| match candle {
                Some(candle) => anchor(index, feature, candle.close, &features[candle.close]),
                None => Anchor::own(index),
            })
            .collect();
        Self {
            target,
            anchors,
            steps: vec![1.0; features.len()],
            settled: vec![false; features.len()],
            candle,
        }
    }

    fn measure_steps(&mut self, data: &Dataset) -> Result<()> {
        let rows = data.rows()?;
        let fitted = data.fitted_rows();
        let newest = fitted.end - fitted.len().div_ceil(10);
        let (mut all, mut recent) = (Moves::new(self.width()), Moves::new(self.width()));
        for t in fitted.skip(1) {
            let whole = rows.valid[t - 1] && rows.valid[t];
            if !whole || rows.timestamps[t] - rows.timestamps[t - 1] != MINUTE {
                continue;
            }
            all.add(self, rows.row(t - 1), rows.row(t));
            if t >= newest {
                recent.add(self, rows.row(t - 1), rows.row(t));
            }
        }
        if all.count == 0 {
            return Err(Error::Usage(
                "no two training rows follow each other by a minute: step sizes cannot be measured"
                    .to_owned(),
            ));
        }
        self.steps = all.steps();
        self.settled = recent.settled();
        Ok(())
    }

    /// What the network is asked for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Features of a row.
    pub fn width(&self) -> usize {
        self.anchors.len()
    }

    /// Features the network sees.
    pub fn inputs(&self) -> usize {
        match (self.target, self.candle) {
            (Target::Level, _) => self.width(),
            (Target::Anchored, Some(_)) => 2 * self.width() - 1 + SIZES + CLOCK,
            (Target::Anchored, None) => 2 * self.width() + CLOCK,
        }
    }

    /// What the network sees of some rows, `[rows, inputs]`; `before` is the row before the first, if
    /// known. Position `t` depends on rows up to `t` alone.
    pub fn encode(&self, before: Option<&[f32]>, rows: &[f32], times: &[i64]) -> Vec<f32> {
        if self.target == Target::Level {
            return rows.to_vec();
        }
        let width = self.width();
        let mut inputs = Vec::with_capacity(times.len() * self.inputs());
        let mut last = before;
        for (row, time) in rows.chunks_exact(width).zip(times) {
            // At the start nothing is known of the row before: as if the close had stood still.
            self.encode_row(last.unwrap_or(row), row, *time, &mut inputs);
            last = Some(row);
        }
        inputs
    }

    fn encode_row(&self, last: &[f32], row: &[f32], time: i64, inputs: &mut Vec<f32>) {
        let cut = |change: f32| change.clamp(-LARGEST_CHANGE, LARGEST_CHANGE);
        for (feature, z) in row.iter().enumerate() {
            inputs.push(cut((z - self.anchor(feature, last)) / self.steps[feature]));
        }
        for (feature, z) in row.iter().enumerate() {
            // The price level itself is left out: it drifts away from whatever was trained on.
            if self.candle.is_some_and(|candle| candle.close == feature) {
                continue;
            }
            // Where this row stands against its own close; features without an anchor show their level.
            let own = match self.anchors[feature].feature == feature {
                true => *z,
                false => cut((z - self.anchor(feature, row)) / self.steps[feature]),
            };
            inputs.push(own);
        }
        if let Some(Candle { high, low, close }) = self.candle {
            let range = (row[high] - self.anchor(high, row)) / self.steps[high]
                - (row[low] - self.anchor(low, row)) / self.steps[low];
            let change = (row[close] - last[close]) / self.steps[close];
            inputs.push((range.max(0.0) + SMALLEST_RANGE).ln());
            inputs.push((change.abs() + SMALLEST_RANGE).ln());
        }
        for period in [86_400, 604_800] {
            let angle = time.rem_euclid(period) as f32 / period as f32 * std::f32::consts::TAU;
            inputs.extend([angle.sin(), angle.cos()]);
        }
    }

    /// What the network should answer at each position of a window but the last: `[rows - 1, features]`.
    /// Nothing, that is zero, for a settled feature.
    pub fn targets(&self, rows: &[f32]) -> Vec<f32> {
        let width = self.width();
        let next = rows.chunks_exact(width).skip(1);
        rows.chunks_exact(width)
            .zip(next)
            .flat_map(|(row, next)| (0..width).map(move |f| (row, next, f)))
            .map(|(row, next, f)| match self.target {
                Target::Level => next[f],
                Target::Anchored if self.settled[f] => 0.0,
                Target::Anchored => (next[f] - self.anchor(f, row)) / self.steps[f],
            })
            .collect()
    }

    /// The next row's z-scores, from the network's answer at a row.
    pub fn decode(&self, row: &[f32], answer: &[f32]) -> Vec<f32> {
        match self.target {
            Target::Level => answer.to_vec(),
            Target::Anchored => answer
                .iter()
                .enumerate()
                .map(|(f, change)| match self.settled[f] {
                    true => self.anchor(f, row),
                    false => self.anchor(f, row) + change * self.steps[f],
                })
                .collect(),
        }
    }

    /// The z-score of a feature if nothing changed after `row`.
    fn anchor(&self, feature: usize, row: &[f32]) -> f32 {
        let anchor = self.anchors[feature];
        row[anchor.feature] * anchor.scale + anchor.shift
    }
}

impl Anchor {
    /// A feature that stands for itself.
    fn own(feature: usize) -> Self {
        Self {
            feature,
            scale: 1.0,
            shift: 0.0,
        }
    }
}

/// Asserts that most rows follow each other by a minute: steps, clock and the times of forecasts are made for
/// that. Gaps are welcome.
///
/// # Errors
///
/// When another distance is the most common one; the message names `origin` and the distance.
pub fn check_minutes(origin: &str, timestamps: &[i64]) -> Result<()> {
    let mut counts: HashMap<i64, usize> = HashMap::new();
    for pair in timestamps.windows(2) {
        *counts.entry(pair[1] - pair[0]).or_default() += 1;
    }
    // The shorter distance on a tie: a gap is longer than a step.
    let most = counts.into_iter().max_by_key(|(step, n)| (*n, -step));
    match most {
        Some((step, _)) if step != MINUTE => Err(Error::Step {
            origin: origin.to_owned(),
            step,
        }),
        _ => Ok(()),
    }
}

/// Sums over pairs of neighbouring rows, per feature.
struct Moves {
    count: u64,
    /// Squares of what the anchor missed.
    missed: Vec<f64>,
    /// Squares of the feature's own moves.
    moved: Vec<f64>,
}

impl Moves {
    fn new(width: usize) -> Self {
        Self {
            count: 0,
            missed: vec![0.0; width],
            moved: vec![0.0; width],
        }
    }

    fn add(&mut self, encoder: &Encoder, before: &[f32], row: &[f32]) {
        self.count += 1;
        for (feature, z) in row.iter().enumerate() {
            self.missed[feature] += f64::from(z - encoder.anchor(feature, before)).powi(2);
            self.moved[feature] += f64::from(z - before[feature]).powi(2);
        }
    }

    fn steps(&self) -> Vec<f32> {
        let step = |sum: &f64| (sum / self.count as f64).sqrt() as f32;
        // A feature that never moves keeps a step of its own: nothing is divided by zero.
        self.missed.iter().map(|sum| step(sum).max(1e-6)).collect()
    }

    /// Without a pair of rows nothing is known, so nothing is settled.
    fn settled(&self) -> Vec<bool> {
        let pairs = self.missed.iter().zip(&self.moved);
        pairs
            .map(|(missed, moved)| self.count > 0 && *missed <= SETTLED * moved)
            .collect()
    }
}

/// A price is anchored on the close, seen through both features' statistics.
fn anchor(index: usize, feature: &FeatureStats, close: usize, of: &FeatureStats) -> Anchor {
    let is_price = ["Open", "High", "Low", "Close"].contains(&feature.name.as_str());
    if !is_price || index == close || feature.scale != of.scale || of.scale != Scale::Log {
        return Anchor::own(index);
    }
    Anchor {
        feature: close,
        scale: (of.std / feature.std) as f32,
        shift: ((of.mean - feature.mean) / feature.std) as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mamba_ssm_data::{RawSeries, Schema, WindowOptions};

    fn dataset() -> Dataset {
        dataset_with(|close| close.iter().map(|c| c + 0.3).collect())
    }

    /// Opens are made from the closes.
    fn dataset_with(open: impl Fn(&[f64]) -> Vec<f64>) -> Dataset {
        let close: Vec<f64> = (0..400)
            .map(|i| 100.0 + f64::from((i * 37) % 11) + 0.1 * f64::from(i % 5))
            .collect();
        let shifted = |by: f64| close.iter().map(|c| c + by).collect::<Vec<_>>();
        let volume = (0..400).map(|i| f64::from((i * 13) % 7)).collect();
        let columns = vec![
            open(&close),
            shifted(2.0),
            shifted(-1.5),
            close.clone(),
            volume,
        ];
        let times = (0..400).map(|i| 1_600_000_000 + i * MINUTE).collect();
        let series = RawSeries::from_columns(Schema::ohlcv(), times, columns).unwrap();
        let windows = WindowOptions {
            length: 16,
            stride: 8,
            ..WindowOptions::default()
        };
        Dataset::in_memory(series, &windows).unwrap()
    }

    #[test]
    fn rows_must_be_a_minute_apart_but_for_gaps() {
        let every = |step: i64| -> Vec<i64> { (0..50).map(|i| 1_600_000_000 + i * step).collect() };
        for fine in [
            every(60),
            vec![0],
            Vec::new(),
            vec![0, 60, 600, 660, 720, 9000],
            vec![0, 600, 660],
        ] {
            check_minutes("x", &fine).unwrap();
        }
        for step in [1, 59, 300, 3600] {
            let message = check_minutes("candles.csv", &every(step))
                .unwrap_err()
                .to_string();
            assert!(message.contains(&format!("{step} s apart")), "{message}");
            assert!(
                message.contains("candles.csv") && message.contains("1m"),
                "{message}"
            );
        }
    }

    #[test]
    fn decoding_the_targets_gives_the_next_rows_back() {
        let data = dataset();
        let rows = data.rows().unwrap();
        for target in [Target::Level, Target::Anchored] {
            let encoder = Encoder::fit(target, &data).unwrap();
            let window = &rows.values[..16 * 5];
            let targets = encoder.targets(window);
            assert_eq!(targets.len(), 15 * 5);
            for t in 0..15 {
                let found = encoder.decode(rows.row(t), &targets[t * 5..(t + 1) * 5]);
                for (f, e) in found.iter().zip(rows.row(t + 1)) {
                    assert!((f - e).abs() < 1e-5, "{target:?}, row {t}: {f} for {e}");
                }
            }
        }
    }

    #[test]
    fn an_open_that_is_the_last_close_but_for_cents_is_settled_and_nothing_is_asked_of_it() {
        let cents = |i: usize| 0.02 * ((i * 7) % 5) as f64;
        let after_close = |close: &[f64]| -> Vec<f64> {
            let last = |i: usize| close[i.saturating_sub(1)];
            (0..close.len()).map(|i| last(i) + cents(i)).collect()
        };
        let data = dataset_with(after_close);
        let rows = data.rows().unwrap();
        let encoder = Encoder::fit(Target::Anchored, &data).unwrap();
        assert_eq!(encoder.settled, [true, false, false, false, false]);
        assert!(
            encoder
                .targets(&rows.values[..16 * 5])
                .iter()
                .step_by(5)
                .all(|open| *open == 0.0)
        );
        assert_eq!(
            encoder.decode(rows.row(7), &[9.0, 0.0, 0.0, 0.0, 0.0]),
            encoder.decode(rows.row(7), &[0.0; 5])
        );
        // The newest tenth decides (training rows are the first 304): noise of older days does not count.
        let noisy_once = |close: &[f64]| {
            let mut open = after_close(close);
            open[..200].iter_mut().step_by(2).for_each(|o| *o += 5.0);
            open
        };
        let old_noise = Encoder::fit(Target::Anchored, &dataset_with(noisy_once)).unwrap();
        assert!(old_noise.settled[0]);
        assert!(old_noise.steps[0] > 10.0 * encoder.steps[0]);
        // An open with a life of its own is asked for.
        let own = Encoder::fit(Target::Anchored, &dataset()).unwrap();
        assert_eq!(own.settled, [false; 5]);
    }

    #[test]
    fn a_zero_answer_to_the_anchored_target_is_the_last_close_in_dollars() {
        let data = dataset();
        let rows = data.rows().unwrap();
        let encoder = Encoder::fit(Target::Anchored, &data).unwrap();
        let levels = encoder.decode(rows.row(7), &[0.0; 5]);
        let close = data.transform().invert(3, rows.row(7)[3]);
        for (feature, z) in levels.iter().take(4).enumerate() {
            let dollars = data.transform().invert(feature, *z);
            assert!((dollars / close - 1.0).abs() < 1e-5, "feature {feature}");
        }
        assert_eq!(levels[4], rows.row(7)[4]);
    }

    #[test]
    fn inputs_never_look_ahead_and_agree_row_by_row() {
        let data = dataset();
        let rows = data.rows().unwrap();
        let encoder = Encoder::fit(Target::Anchored, &data).unwrap();
        let (n, width) = (16, encoder.inputs());
        let window = rows.values[..n * 5].to_vec();
        let whole = encoder.encode(None, &window, &rows.timestamps[..n]);
        assert_eq!(whole.len(), n * width);

        let mut changed = window.clone();
        changed[10 * 5..].iter_mut().for_each(|z| *z += 1.0);
        let other = encoder.encode(None, &changed, &rows.timestamps[..n]);
        assert_eq!(whole[..10 * width], other[..10 * width]);
        assert_ne!(whole[10 * width..], other[10 * width..]);

        for t in 1..n {
            let row = encoder.encode(Some(rows.row(t - 1)), rows.row(t), &rows.timestamps[t..=t]);
            assert_eq!(row, whole[t * width..(t + 1) * width], "row {t}");
        }
    }
}
