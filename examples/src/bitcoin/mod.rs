//! The commands of the `bitcoin` example: one file each.

mod compare;
mod demo;
mod evaluate;
mod fetch;
mod forecast;
mod prepare;
mod progress;
mod train;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::Result;

/// Minute candles to a trained, evaluated forecaster.
///
/// Without a command: generates a market, prepares it, trains a small model, evaluates it, and writes
/// everything below ./runs/. Takes at most three minutes on two processor cores.
#[derive(Debug, Parser)]
#[command(name = "bitcoin", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Without a command: stop training after so many minutes.
    #[arg(long, default_value_t = 1.5)]
    minutes: f64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Downloads public candles, from Kaggle or from Binance.
    Fetch(fetch::Args),
    /// Candles to normalised Parquet shards.
    Prepare(prepare::Args),
    /// Trains a model on prepared shards.
    Train(train::Args),
    /// Scores a trained run: metrics, report, plots.
    Evaluate(evaluate::Args),
    /// Puts evaluated runs and the best naive forecaster into one table.
    Compare(compare::Args),
    /// The next minutes after the end of a file, in dollars, as CSV.
    Forecast(forecast::Args),
}

/// What a shell reports of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Parses the arguments (the program's name first), runs the command, and prints an error, if any, on one
/// line of standard error. Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted and saved.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is no reason to fail on `--help`.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(interrupted @ crate::Error::Interrupted { .. }) => {
            eprintln!("{interrupted}");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command line in this process (the program's name first).
///
/// # Errors
///
/// Whatever the command answers; wrong arguments too.
pub fn run<I: Into<OsString> + Clone>(args: impl IntoIterator<Item = I>) -> Result<()> {
    execute(Cli::try_parse_from(args).map_err(|e| crate::Error::Usage(e.to_string()))?)
}

fn execute(cli: Cli) -> Result<()> {
    match cli.command {
        None => demo::run(cli.minutes),
        Some(Command::Fetch(args)) => fetch::run(&args),
        Some(Command::Prepare(args)) => prepare::run(&args),
        Some(Command::Train(args)) => train::run(&args),
        Some(Command::Evaluate(args)) => evaluate::run(&args),
        Some(Command::Compare(args)) => compare::run(&args),
        Some(Command::Forecast(args)) => forecast::run(&args),
    }
}
