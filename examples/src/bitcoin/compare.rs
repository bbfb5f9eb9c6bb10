use std::path::{Path, PathBuf};

use mamba_ssm_eval::{Comparison, Evaluation};

use crate::run::Run;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// An evaluated run's folder; once per run.
    #[arg(long, required = true)]
    run: Vec<PathBuf>,
    /// Where table and chart go.
    #[arg(long, default_value = "runs/comparison")]
    out: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let evaluations = args
        .run
        .iter()
        .map(|folder| read(folder))
        .collect::<Result<Vec<_>>>()?;
    let comparison = Comparison::new(evaluations)?;
    let files = comparison.write(&args.out)?;
    println!("{}", comparison.to_markdown());
    println!("table: {}", files.table.display());
    println!("chart: {}", files.chart.display());
    Ok(())
}

fn read(folder: &Path) -> Result<Evaluation> {
    let run = Run::open(folder)?;
    let metrics = run.folder.join("metrics.json");
    if !metrics.is_file() {
        return Err(Error::Usage(format!(
            "{}: not evaluated yet; run `evaluate --run` on it first",
            folder.display()
        )));
    }
    Ok(Evaluation::read(&metrics)?)
}
