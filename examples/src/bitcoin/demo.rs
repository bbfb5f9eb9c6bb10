use std::path::Path;

use mamba_ssm_data::synthetic::{MarketConfig, generate, write_csv};
use mamba_ssm_data::{Dataset, PrepareOptions, WindowOptions};

use super::evaluate::{evaluate_run, print_files};
use super::prepare::{prepare_shown, print_summary};
use super::train::{conclude, fit, stop_on_interrupt};
use crate::Result;
use crate::error::io;
use crate::forecaster::Kind;
use crate::preset::Preset;
use crate::run::Run;

/// Fifty days: enough that the test rows hold five days the model has never seen.
const MINUTES: usize = 72_000;
const SEED: u64 = 7;

/// The whole way on a generated market, below `./runs/`.
pub(super) fn run(minutes: f64) -> Result<()> {
    let runs = Path::new("runs");
    std::fs::create_dir_all(runs).map_err(io(runs))?;

    let csv = runs.join("generated_market.csv");
    let candles = generate(&MarketConfig::new(MINUTES).with_seed(SEED));
    write_csv(&csv, &candles).map_err(io(&csv))?;
    println!(
        "generated market (seed {SEED}): {} candles in {}",
        candles.len(),
        csv.display()
    );

    let shards = runs.join("generated_shards");
    let windows = WindowOptions {
        length: 256,
        stride: 128,
        ..WindowOptions::default()
    };
    let options = PrepareOptions::new(&csv, &shards).with_windows(windows);
    print_summary(&prepare_shown(&options)?);

    let data = Dataset::open(&shards)?;
    let mut config = Preset::Small.config(Kind::Mamba2);
    config.train.max_minutes = Some(minutes);
    let run = Run::create(&fresh_folder(runs), config, &shards, &data)?;
    println!("training {} in {}", run.name(), run.folder.display());
    let fit = fit(&run, &data, ("default", false), stop_on_interrupt())?;
    conclude(&run.folder, &shards, &fit)?;

    let protocol = "generated market, chronological 80/10/10, embargo of 256 rows";
    let files = evaluate_run(&run, &data, protocol, (&run.folder, "default"))?;
    print_files(&files);
    Ok(())
}

/// `small`, or `small-2`, `small-3`, ..: an earlier run is never touched.
fn fresh_folder(runs: &Path) -> std::path::PathBuf {
    (1..)
        .map(|n| match n {
            1 => runs.join("small"),
            n => runs.join(format!("small-{n}")),
        })
        .find(|folder| !folder.exists())
        .expect("there is no end of numbers")
}
