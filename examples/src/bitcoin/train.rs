use std::path::{Path, PathBuf};

use mamba_ssm_data::Dataset;
use mamba_ssm_train::{Fit, Outcome, Precision, StopFlag, Trainer, default_reporter};

use super::INTERRUPTED;
use crate::batches::Windows;
use crate::device::device;
use crate::forecaster::{Forecaster, Kind};
use crate::preset::{Preset, RunConfig};
use crate::run::Run;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Prepared shards: a folder, or a URL such as s3://bucket/set in a build with the feature `remote`.
    #[arg(long)]
    data: PathBuf,
    /// The run's folder, made new.
    #[arg(long)]
    out: PathBuf,
    /// The network.
    #[arg(long, value_enum, default_value_t = ModelName::Mamba2)]
    model: ModelName,
    /// Settings by name; `note` is the published note "Forecasting Bitcoin with Mamba State Space Models".
    #[arg(long, value_enum, default_value_t = Preset::Note)]
    preset: Preset,
    /// A TOML file with the settings that differ from the preset's.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Epochs at most.
    #[arg(long)]
    epochs: Option<usize>,
    /// What the layers compute in; parameters and optimizer are f32 either way. The preset's and the
    /// file's, where it is not given.
    #[arg(long, value_enum)]
    precision: Option<PrecisionName>,
    /// Where to compute: cpu, cuda:0, rocm:0, vulkan, metal, wgpu (as far as built in).
    #[arg(long, default_value = "default")]
    device: String,
    /// Continue the run in the folder where it stopped, with its own settings: of those, only --epochs
    /// can be given anew.
    #[arg(long, conflicts_with_all = ["model", "preset", "config", "precision"])]
    resume: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ModelName {
    /// A stack of Mamba-2 layers.
    Mamba2,
    /// The Transformer baseline.
    Transformer,
    /// Mamba-2 and windowed attention layers in turn.
    Hybrid,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PrecisionName {
    /// 32-bit floats.
    F32,
    /// Mixed precision: bf16 between the projections.
    Bf16,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let data = Dataset::open(&args.data)?;
    let run = if args.resume {
        resumed(args, &data)?
    } else {
        Run::create(&args.out, settings(args)?, &args.data, &data)?
    };
    let stop = stop_on_interrupt();
    let fit = fit(&run, &data, (&args.device, args.resume), stop)?;
    conclude(&run.folder, &args.data, &fit)
}

/// The preset, the file's changes, the flags' changes.
fn settings(args: &Args) -> Result<RunConfig> {
    let kind = match args.model {
        ModelName::Mamba2 => Kind::Mamba2,
        ModelName::Transformer => Kind::Transformer,
        ModelName::Hybrid => Kind::Hybrid,
    };
    let mut config = args.preset.config(kind);
    if let Some(path) = &args.config {
        config = config.overlaid(path)?;
    }
    if let Some(epochs) = args.epochs {
        config.train.epochs = epochs;
    }
    if let Some(precision) = args.precision {
        config.train.precision = match precision {
            PrecisionName::F32 => Precision::F32,
            PrecisionName::Bf16 => Precision::Bf16,
        };
    }
    Ok(config)
}

fn resumed(args: &Args, data: &Dataset) -> Result<Run> {
    let mut run = Run::open(&args.out)?;
    if run.facts.transform != *data.transform() {
        return Err(Error::Usage(format!(
            "{}: prepared with other statistics than the run in {} was trained on; resume on {}",
            args.data.display(),
            args.out.display(),
            run.facts.data.display()
        )));
    }
    if let Some(epochs) = args.epochs {
        run.config.train.epochs = epochs;
    }
    Ok(run)
}

/// Trains a run on its data, from the start or from its last checkpoint.
pub(super) fn fit(
    run: &Run,
    data: &Dataset,
    (device_name, resume): (&str, bool),
    stop: StopFlag,
) -> Result<Fit<Forecaster>> {
    let device = device(device_name)?;
    let config = &run.config;
    let mut windows = Windows::new(
        data,
        &run.facts.encoder,
        (config.batch, config.windows_per_epoch),
        config.train.seed,
        &device,
    )?;
    let model = run.fresh_model(&device)?;
    let mut trainer = Trainer::new(config.train.clone(), &run.folder)?
        .with_reporter(default_reporter())
        .with_stop_flag(stop);
    Ok(match resume {
        true => trainer.resume(model, &mut windows)?,
        false => trainer.fit(model, &mut windows)?,
    })
}

/// Ctrl-C asks for a stop after the step in hand; a second one ends the program at once.
pub(super) fn stop_on_interrupt() -> StopFlag {
    let flag = StopFlag::new();
    let asked = flag.clone();
    let handler = move || {
        if asked.is_requested() {
            std::process::exit(INTERRUPTED.into());
        }
        eprintln!("\nstopping after this step; again to stop at once");
        asked.request();
    };
    // Without a handler, Ctrl-C ends the program and the last checkpoint stands: nothing is lost.
    let _ = ctrlc::set_handler(handler);
    flag
}

/// Prints what came out.
///
/// # Errors
///
/// [`Error::Interrupted`] if Ctrl-C ended the training: it is saved, but not what was asked for.
pub(super) fn conclude(folder: &Path, data: &Path, fit: &Fit<Forecaster>) -> Result<()> {
    if let Some(best) = &fit.state.best {
        println!(
            "best validation loss {:.6} in epoch {}",
            best.val_loss, best.epoch
        );
    }
    let folder = folder.display();
    let resume = format!("train --data {} --out {folder} --resume", data.display());
    match fit.outcome {
        Outcome::Interrupted => {
            return Err(Error::Interrupted {
                hint: format!("the run is saved, `{resume}` continues it"),
            });
        }
        Outcome::Finished | Outcome::EarlyStopped => {
            println!("{}; evaluate --run {folder}", fit.outcome);
        }
        _ => println!("{}: {resume}, or evaluate --run {folder}", fit.outcome),
    }
    Ok(())
}
