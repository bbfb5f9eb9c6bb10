use std::path::{Path, PathBuf};

use mamba_ssm_data::{
    Dataset, Protocol, ReadOptions, Split, WindowOptions, parse_time, read_series,
};
use mamba_ssm_eval::{EpochRecord, ReportFiles, ReportOptions, evaluate, write_report};

use super::progress::Progress;
use crate::device::device;
use crate::encoding::check_minutes;
use crate::run::Run;
use crate::scoring::score;
use crate::{Error, Result};

/// The source of the protocol `note`.
const NOTE: &str = "the published note \"Forecasting Bitcoin with Mamba State Space Models\"";

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// The run's folder.
    #[arg(long)]
    run: PathBuf,
    /// Prepared shards, of which the test split is scored; by default those the run was trained on.
    #[arg(long, conflicts_with = "csv")]
    data: Option<PathBuf>,
    /// Candles the run has never seen, scored with the run's own transform.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// With --csv: first day, time, or unix second to score.
    #[arg(long, requires = "csv")]
    from: Option<String>,
    /// With --csv: first day, time, or unix second not to score.
    #[arg(long, requires = "csv")]
    to: Option<String>,
    /// Where metrics, report and plots go; by default the run's folder.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where to compute.
    #[arg(long, default_value = "default")]
    device: String,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let run = Run::open(&args.run)?;
    let (data, protocol) = match &args.csv {
        Some(csv) => unseen(&run, csv, args)?,
        None => test_split(&run, args.data.as_deref())?,
    };
    let out = args.out.as_deref().unwrap_or(&run.folder);
    let files = evaluate_run(&run, &data, &protocol, (out, &args.device))?;
    print_files(&files);
    Ok(())
}

/// A file's rows, all of them, under the run's transform.
fn unseen(run: &Run, csv: &Path, args: &Args) -> Result<(Dataset, String)> {
    let read = ReadOptions {
        from: args.from.as_deref().map(parse_time).transpose()?,
        to: args.to.as_deref().map(parse_time).transpose()?,
        ..ReadOptions::default()
    };
    let windows = WindowOptions {
        // Every place a window can stand at; the scoring takes as few as it needs.
        stride: 1,
        ..run.facts.windows.clone()
    };
    let series = read_series(csv, &read)?;
    check_minutes(&series.origin, &series.timestamps)?;
    let transform = run.facts.transform.clone();
    let data = Dataset::with_transform(series, transform, &windows, Split::Test)?;
    Ok((data, format!("unseen rows of {}", csv.display())))
}

fn test_split(run: &Run, data: Option<&Path>) -> Result<(Dataset, String)> {
    let path = data.unwrap_or(&run.facts.data);
    let data = Dataset::open(path)?;
    if *data.transform() != run.facts.transform {
        return Err(Error::Usage(format!(
            "{}: prepared with other statistics than the run's; score its candles with --csv instead",
            path.display()
        )));
    }
    let windows = data.window_options();
    let [train, validation, test] = windows.fractions.map(|share| (100.0 * share).round());
    let protocol = match windows.protocol {
        Protocol::Chronological => format!(
            "chronological {train}/{validation}/{test}, embargo of {} rows",
            windows.length
        ),
        Protocol::Note => {
            format!("{NOTE}: overlapping windows at random {train}/{validation}/{test}")
        }
    };
    Ok((data, protocol))
}

/// Scores the test split of `data`, writes metrics, report and plots, and prints the table of skills.
pub(super) fn evaluate_run(
    run: &Run,
    data: &Dataset,
    protocol: &str,
    (out, device_name): (&Path, &str),
) -> Result<ReportFiles> {
    let device = device(device_name)?;
    let (model, checkpoint) = run.trained_model(&device)?;
    let mut progress = Progress::new("scoring");
    let scored = score(
        &model,
        &run.facts.encoder,
        data,
        Split::Test,
        (run.config.batch, &device),
        &mut |done, total| progress.show(done as u64, total as u64),
    )?;
    drop(progress);
    let name = run.name();
    let forecasts = scored.forecasts(&name, protocol);
    let evaluation = evaluate(&forecasts)?;
    let options = ReportOptions::default();
    let files = write_report(out, &forecasts, &evaluation, &history(run)?, &options)?;
    println!(
        "{checkpoint} checkpoint, {} rows scored, {protocol}",
        scored.target_rows.len()
    );
    println!("{}", evaluation.skill_table());
    Ok(files)
}

fn history(run: &Run) -> Result<Vec<EpochRecord>> {
    let records = run.history()?;
    Ok(records
        .iter()
        .map(|r| EpochRecord {
            epoch: r.epoch,
            train_loss: r.train_loss,
            validation_loss: Some(r.val_loss),
            learning_rate: r.lr,
        })
        .collect())
}

pub(super) fn print_files(files: &ReportFiles) {
    println!("metrics: {}", files.metrics.display());
    println!("report:  {}", files.report.display());
    for plot in files.plots.iter().chain(&files.loss) {
        println!("plot:    {}", plot.display());
    }
}
