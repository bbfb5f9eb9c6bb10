//! A small made-up market for this crate's own tests.

use crate::{FeatureScale, Forecasts, ScaleKind};

pub(crate) struct Market {
    pub scales: Vec<FeatureScale>,
    pub timestamps: Vec<i64>,
    pub series: Vec<f64>,
    pub target_rows: Vec<usize>,
}

impl Market {
    /// The truth, `[targets, features]`.
    pub fn targets(&self) -> Vec<f64> {
        let rows = self.target_rows.iter();
        rows.flat_map(|&row| self.series[row * 5..][..5].to_vec())
            .collect()
    }

    pub fn forecasts<'a>(&'a self, model: &'a str, predictions: &'a [f64]) -> Forecasts<'a> {
        Forecasts {
            model,
            protocol: "a made-up market",
            scales: &self.scales,
            timestamps: &self.timestamps,
            series: &self.series,
            target_rows: &self.target_rows,
            predictions,
        }
    }

    /// Predictions that know a good part of every move.
    pub fn decent_predictions(&self) -> Vec<f64> {
        let mut noise = Noise(7);
        let mut out = Vec::new();
        for &row in &self.target_rows {
            for feature in 0..5 {
                let (now, before) = (row * 5 + feature, (row - 1) * 5 + feature);
                let (now, before) = (self.series[now], self.series[before]);
                out.push(before + (now - before) * (0.4 + 0.2 * noise.next()));
            }
        }
        out
    }
}

/// Uniform in [-1, 1): a linear congruential generator (Knuth's MMIX constants).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// `rows` candles from 2024-06-01 00:00 UTC on with an outage of half an hour in the middle; all
/// rows from the tenth on are targets. The open is
/// the last close within a hundredth of a per mille.
pub(crate) fn market(rows: usize) -> Market {
    let new = |name, kind, mean, std| FeatureScale::new(name, kind, mean, std).unwrap();
    let scales = vec![
        new("Open", ScaleKind::Log, 9.5, 1.1),
        new("High", ScaleKind::Log, 9.501, 1.1),
        new("Low", ScaleKind::Log, 9.499, 1.1),
        new("Close", ScaleKind::Log, 9.5, 1.1),
        new("Volume", ScaleKind::Log1p, 2.0, 1.3),
    ];
    let mut noise = Noise(1);
    let (mut close, mut activity) = (61_000.0f64, 0.0);
    let (mut timestamps, mut series) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let outage = if row > rows / 2 { 1_800 } else { 0 };
        timestamps.push(1_717_200_000 + row as i64 * 60 + outage);
        activity = 0.9 * activity + 0.5 * noise.next();
        let open = close * (1.0 + 1e-5 * noise.next());
        close *= 1.0 + 1e-3 * noise.next();
        let high = open.max(close) * (1.0 + 3e-4 * noise.next().abs());
        let low = open.min(close) * (1.0 - 3e-4 * noise.next().abs());
        let volume = (2.5 + activity + 0.4 * noise.next()).exp();
        let candle = [open, high, low, close, volume];
        series.extend(
            scales
                .iter()
                .zip(candle)
                .map(|(scale, level)| scale.to_z(level)),
        );
    }
    Market {
        scales,
        timestamps,
        series,
        target_rows: (10..rows).collect(),
    }
}
