use std::ops::ControlFlow;
use std::path::PathBuf;

use mamba_ssm_data::{
    GapPolicy, PrepareOptions, Protocol, ReadOptions, Stage, Summary, WindowOptions, format_time,
    parse_time, prepare_with,
};

use super::progress::Progress;
use crate::Result;

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Candles: Timestamp (unix seconds), Open, High, Low, Close, Volume; plain or gzip.
    #[arg(long)]
    csv: PathBuf,
    /// The folder of the shards.
    #[arg(long)]
    out: PathBuf,
    /// First day (2023-01-31), time, or unix second to keep.
    #[arg(long)]
    from: Option<String>,
    /// First day, time, or unix second not to keep.
    #[arg(long)]
    to: Option<String>,
    /// How rows are shared out among training, validation and test.
    #[arg(long, value_enum, default_value_t)]
    protocol: ProtocolName,
    /// Rows of a window.
    #[arg(long, default_value_t = 2048)]
    length: usize,
    /// Rows from the start of one window to the start of the next.
    #[arg(long, default_value_t = 512)]
    stride: usize,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum ProtocolName {
    /// By time, with an embargo of one window; statistics of the training rows alone.
    #[default]
    Chronological,
    /// Overlapping windows at random, statistics of all rows: the published note's.
    Note,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let read = ReadOptions {
        from: args.from.as_deref().map(parse_time).transpose()?,
        to: args.to.as_deref().map(parse_time).transpose()?,
        ..ReadOptions::default()
    };
    let windows = WindowOptions {
        length: args.length,
        stride: args.stride,
        ..protocol_options(args.protocol)
    };
    let options = PrepareOptions::new(&args.csv, &args.out)
        .with_read(read)
        .with_windows(windows);
    print_summary(&prepare_shown(&options)?);
    println!("shards: {}", args.out.display());
    Ok(())
}

/// The published note takes rows as they come, gaps in time unseen; the honest protocol does not.
fn protocol_options(name: ProtocolName) -> WindowOptions {
    let (protocol, gaps) = match name {
        ProtocolName::Chronological => (Protocol::Chronological, GapPolicy::Split),
        ProtocolName::Note => (Protocol::Note, GapPolicy::Ignore),
    };
    WindowOptions {
        protocol,
        gaps,
        ..WindowOptions::default()
    }
}

/// Prepares, showing how far it has come.
pub(super) fn prepare_shown(options: &PrepareOptions) -> Result<Summary> {
    let mut progress: Option<(Stage, Progress)> = None;
    let summary = prepare_with(options, &mut |now| {
        if progress
            .as_ref()
            .is_none_or(|(stage, _)| *stage != now.stage)
        {
            let what = match now.stage {
                Stage::Read => "reading",
                Stage::Write => "writing shards",
            };
            progress = Some((now.stage, Progress::new(what)));
        }
        if let Some((_, progress)) = &mut progress {
            progress.show(now.done, now.total);
        }
        ControlFlow::Continue(())
    })?;
    Ok(summary)
}

pub(super) fn print_summary(summary: &Summary) {
    let [train, validation, test] = summary.windows;
    println!(
        "{} rows from {} to {} ({} gaps, {} rows not observed)",
        summary.rows,
        format_time(summary.time.0),
        format_time(summary.time.1),
        summary.breaks,
        summary.invalid_rows,
    );
    println!(
        "{train} training, {validation} validation, {test} test windows; {} shard(s), {:.1} MB",
        summary.shards,
        summary.bytes as f64 / 1e6
    );
}
