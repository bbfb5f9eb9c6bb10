//! Forecasts of every row of a split, once, and what they are worth.

use burn::tensor::Device;
use mamba_ssm_data::{Batch, Dataset, Scale, Split, Transform};
use mamba_ssm_eval::{FeatureScale, Forecasts, ScaleKind};

use crate::batches::inputs;
use crate::encoding::Encoder;
use crate::forecaster::Forecaster;
use crate::{Error, Result};

/// Forecasts of some rows, and the series they belong to, all in z-score space.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The statistics that lead from z-scores to levels, per feature.
    pub scales: Vec<FeatureScale>,
    /// Unix seconds, per row.
    pub timestamps: Vec<i64>,
    /// `[rows, features]`; NaN in rows that were not observed.
    pub series: Vec<f64>,
    /// The rows that were forecast, each from the rows before it.
    pub target_rows: Vec<usize>,
    /// `[targets, features]`.
    pub predictions: Vec<f64>,
}

impl Scored {
    /// What the evaluation asks for.
    pub fn forecasts<'a>(&'a self, model: &'a str, protocol: &'a str) -> Forecasts<'a> {
        Forecasts {
            model,
            protocol,
            scales: &self.scales,
            timestamps: &self.timestamps,
            series: &self.series,
            target_rows: &self.target_rows,
            predictions: &self.predictions,
        }
    }
}

/// Forecasts every row of a split that a window covers, once: in the first window that holds it, which is
/// where most rows stand before it. `progress` hears windows done and windows in all.
///
/// # Errors
///
/// When the split has no window or the rows cannot be read.
pub fn score(
    model: &Forecaster,
    encoder: &Encoder,
    data: &Dataset,
    split: Split,
    (batch, device): (usize, &Device),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Scored> {
    let rows = data.rows()?;
    let length = data.window_options().length;
    let starts = covering(&data.starts(split), length / 4);
    if starts.is_empty() {
        return Err(Error::Usage(format!(
            "the {split} split has no window to score"
        )));
    }
    let (mut target_rows, mut predictions) = (Vec::new(), Vec::new());
    let mut scored_to = 0;
    for (index, chunk) in starts.chunks(batch.max(1)).enumerate() {
        let windows = gather(&rows.values, chunk, length, rows.width);
        let answers = model.forward(inputs(&windows, &rows, encoder, device));
        let answers = answers.into_data().convert::<f32>();
        let answers = answers
            .as_slice::<f32>()
            .map_err(|e| Error::Usage(e.to_string()))?;
        for (start, answers) in chunk.iter().zip(answers.chunks_exact(length * rows.width)) {
            let start = *start as usize;
            for (t, answer) in answers
                .chunks_exact(rows.width)
                .take(length - 1)
                .enumerate()
            {
                let row = start + t;
                if row + 1 < scored_to || !(rows.valid[row] && rows.valid[row + 1]) {
                    continue;
                }
                target_rows.push(row + 1);
                let z = encoder.decode(rows.row(row), answer);
                predictions.extend(z.iter().map(|z| f64::from(*z)));
            }
            scored_to = scored_to.max(start + length);
        }
        progress(
            (index * batch.max(1) + chunk.len()).min(starts.len()),
            starts.len(),
        );
    }
    Ok(Scored {
        scales: scales(data.transform())?,
        timestamps: rows.timestamps.clone(),
        series: observed(&rows.values, &rows.valid, rows.width),
        target_rows,
        predictions,
    })
}

/// Of rising starts, as few as leave no row out and keep neighbours at most `distance` apart, if they can.
fn covering(starts: &[u64], distance: usize) -> Vec<u64> {
    let mut chosen: Vec<u64> = Vec::new();
    for (index, start) in starts.iter().enumerate() {
        let needed = match (chosen.last(), starts.get(index + 1)) {
            (Some(last), Some(next)) => next - last > distance as u64,
            _ => true,
        };
        if needed {
            chosen.push(*start);
        }
    }
    chosen
}

fn gather(values: &[f32], starts: &[u64], length: usize, width: usize) -> Batch {
    let window = |start: &u64| {
        let first = *start as usize * width;
        values[first..first + length * width].iter().copied()
    };
    Batch {
        values: starts.iter().flat_map(window).collect(),
        mask: vec![1.0; starts.len() * length],
        starts: starts.to_vec(),
        batch: starts.len(),
        length,
        features: width,
    }
}

fn observed(values: &[f32], valid: &[bool], width: usize) -> Vec<f64> {
    values
        .chunks_exact(width)
        .zip(valid)
        .flat_map(|(row, valid)| {
            row.iter()
                .map(move |z| if *valid { f64::from(*z) } else { f64::NAN })
        })
        .collect()
}

/// The data crate's statistics in the evaluation's words.
fn scales(transform: &Transform) -> Result<Vec<FeatureScale>> {
    let scale = |f: &mamba_ssm_data::FeatureStats| {
        let kind = match f.scale {
            Scale::Log => ScaleKind::Log,
            Scale::Log1p => ScaleKind::Log1p,
            Scale::Identity => ScaleKind::Identity,
        };
        FeatureScale::new(f.name.clone(), kind, f.mean, f.std)
    };
    Ok(transform
        .features
        .iter()
        .map(scale)
        .collect::<std::result::Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_thins_dense_starts_and_keeps_the_end_of_every_piece() {
        let dense: Vec<u64> = (0..=10).chain(100..=103).collect();
        assert_eq!(covering(&dense, 4), [0, 4, 8, 10, 100, 103]);
        assert_eq!(covering(&[0, 512, 1024], 512), [0, 512, 1024]);
        assert_eq!(covering(&[7], 4), [7]);
        assert_eq!(covering(&[], 4), [0_u64; 0]);
    }
}
