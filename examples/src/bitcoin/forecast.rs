use std::io::Write;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use mamba_ssm_data::{
    Dataset, Normalised, ReadOptions, Split, Transform, WindowOptions, read_series,
};

use crate::device::device;
use crate::encoding::{Encoder, MINUTE, check_minutes};
use crate::forecaster::{Forecaster, ForecasterState};
use crate::run::Run;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// The run's folder.
    #[arg(long)]
    run: PathBuf,
    /// Candles up to now.
    #[arg(long)]
    csv: PathBuf,
    /// Minutes to forecast.
    #[arg(long)]
    horizon: usize,
    /// Where to compute.
    #[arg(long, default_value = "default")]
    device: String,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let run = Run::open(&args.run)?;
    let device = device(&args.device)?;
    let series = read_series(&args.csv, &ReadOptions::default())?;
    check_minutes(&series.origin, &series.timestamps)?;
    let windows = WindowOptions {
        stride: 1,
        ..run.facts.windows.clone()
    };
    let transform = run.facts.transform.clone();
    let data = Dataset::with_transform(series, transform, &windows, Split::Test)?;
    let rows = data.rows()?;
    let length = windows.length;
    let first = last_window(&data, rows.len(), length)?;

    let (model, _) = run.trained_model(&device)?;
    let mut roll = Roll::start(&model, &run.facts.encoder, &rows, first, &device)?;
    let mut text = String::from("Timestamp");
    for name in data.names() {
        text.push(',');
        text.push_str(&name);
    }
    text.push('\n');
    for _ in 0..args.horizon {
        let (time, z) = roll.next()?;
        text.push_str(&line(time, &z, &run.facts.transform));
    }
    // A reader that closes the pipe has had enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

/// The start of the window that ends with the file: a forecast goes on from there.
fn last_window(data: &Dataset, rows: usize, length: usize) -> Result<usize> {
    match data.starts(Split::Test).last() {
        Some(start) if *start as usize + length == rows => Ok(*start as usize),
        _ => Err(Error::Usage(format!(
            "the last {length} rows of the file have a gap or a missing value: a forecast needs them whole"
        ))),
    }
}

/// Forecasts row after row, each from the ones before and those forecast already.
struct Roll<'a> {
    model: &'a Forecaster,
    encoder: &'a Encoder,
    device: &'a Device,
    state: Option<ForecasterState>,
    last: Vec<f32>,
    time: i64,
    answer: Vec<f32>,
}

impl<'a> Roll<'a> {
    fn start(
        model: &'a Forecaster,
        encoder: &'a Encoder,
        rows: &Normalised,
        first: usize,
        device: &'a Device,
    ) -> Result<Self> {
        let mut roll = Self {
            model,
            encoder,
            device,
            state: None,
            last: rows.row(rows.len() - 1).to_vec(),
            time: rows.timestamps[rows.len() - 1],
            answer: Vec::new(),
        };
        let values = &rows.values[first * rows.width..];
        roll.feed(encoder.encode(None, values, &rows.timestamps[first..]))?;
        Ok(roll)
    }

    /// Shows the network encoded rows and keeps its answer to the last.
    fn feed(&mut self, inputs: Vec<f32>) -> Result<()> {
        let width = self.encoder.inputs();
        let shape = [1, inputs.len() / width, width];
        let x = Tensor::<3>::from_data(TensorData::new(inputs, shape), self.device);
        let state = self
            .state
            .take()
            .unwrap_or_else(|| self.model.empty_state(1, self.device));
        let (y, state) = self.model.forward_from(x, state);
        self.state = Some(state);
        let answers = y.into_data().convert::<f32>();
        let answers = answers
            .as_slice::<f32>()
            .map_err(|e| Error::Usage(e.to_string()))?;
        self.answer = answers[answers.len() - self.encoder.width()..].to_vec();
        Ok(())
    }

    fn next(&mut self) -> Result<(i64, Vec<f32>)> {
        let z = self.encoder.decode(&self.last, &self.answer);
        self.time += MINUTE;
        let inputs = self.encoder.encode(Some(&self.last), &z, &[self.time]);
        self.feed(inputs)?;
        self.last.clone_from(&z);
        Ok((self.time, z))
    }
}

/// A row in dollars and coins. Each price is forecast by itself, so a high may come out below a close by a
/// hair: the candle is made whole.
fn line(time: i64, z: &[f32], transform: &Transform) -> String {
    let mut levels: Vec<f64> = z
        .iter()
        .enumerate()
        .map(|(feature, z)| transform.invert(feature, *z))
        .collect();
    let names = transform.names();
    let at = |name: &str| names.iter().position(|n| n == name);
    if let (Some(o), Some(h), Some(l), Some(c)) = (at("Open"), at("High"), at("Low"), at("Close")) {
        levels[h] = levels[h].max(levels[o]).max(levels[c]);
        levels[l] = levels[l].min(levels[o]).min(levels[c]);
    }
    if let Some(v) = at("Volume") {
        levels[v] = levels[v].max(0.0);
    }
    let cells: Vec<String> = levels.iter().map(|level| format!("{level:.6}")).collect();
    format!("{time},{}\n", cells.join(","))
}
