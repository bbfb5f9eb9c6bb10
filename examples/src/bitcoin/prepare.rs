use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mamba_ssm_data::{
    Feature, GapPolicy, OrderPolicy, PrepareOptions, Protocol, ReadOptions, Stage, Summary,
    WindowOptions, format_time, parse_time, prepare_with,
};

use super::progress::Progress;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Candles: files, or patterns in quotes ('data/*.zip'), that together are one series. CSV (plain, .gz, .zip)
    /// with the columns Timestamp, Open, High, Low, Close, Volume; Binance klines; .parquet. Where files
    /// overlap, the later one in the list wins.
    #[arg(long, required = true, num_args = 1..)]
    csv: Vec<PathBuf>,
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
    /// What to do at gaps: split, fill:N (rows), mask or mask:SHARE (least share of true rows in a window),
    /// ignore. Left out: split, or ignore under the protocol `note`.
    #[arg(long)]
    gaps: Option<GapPolicy>,
    /// Sort rows that are out of order within a file, rather than refuse them.
    #[arg(long)]
    sort: bool,
    /// Computed columns: a TOML file of [[features]] tables (kind = "rsi", window = 14), or a JSON list of the
    /// same. The file may hold a `schema` of other columns, too.
    #[arg(long, value_name = "FILE")]
    features: Option<PathBuf>,
    /// Megabytes (2^20 bytes) of rows to hold in memory; the rest waits in a file beside the shards.
    #[arg(long, value_name = "MB")]
    memory_mb: Option<usize>,
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
    let options = options(args)?;
    print_summary(&prepare_shown(&options)?);
    println!("shards: {}", args.out.display());
    Ok(())
}

fn options(args: &Args) -> Result<PrepareOptions> {
    let mut windows = WindowOptions {
        length: args.length,
        stride: args.stride,
        ..protocol_options(args.protocol)
    };
    if let Some(gaps) = args.gaps {
        windows.gaps = gaps;
    }
    let mut options = PrepareOptions::new("", &args.out)
        .with_read(read_options(args)?)
        .with_windows(windows);
    options.inputs.clone_from(&args.csv);
    if let Some(megabytes) = args.memory_mb {
        options.memory_bytes = megabytes.saturating_mul(1 << 20);
    }
    Ok(options)
}

/// What the file of features says, and the flags, which go before it.
fn read_options(args: &Args) -> Result<ReadOptions> {
    let mut read = match &args.features {
        Some(path) => read_file(path)?,
        None => ReadOptions::default(),
    };
    if let Some(from) = &args.from {
        read.from = Some(parse_time(from)?);
    }
    if let Some(to) = &args.to {
        read.to = Some(parse_time(to)?);
    }
    if args.sort {
        read.order = OrderPolicy::Sort;
    }
    Ok(read)
}

/// How to read a source, from TOML or JSON; a JSON list holds features alone.
fn read_file(path: &Path) -> Result<ReadOptions> {
    let wrong = |message: String| Error::Config {
        path: path.into(),
        message,
    };
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.into(),
        source,
    })?;
    if path.extension().is_none_or(|e| e != "json") {
        return toml::from_str(&text).map_err(|e| wrong(e.to_string().trim_end().into()));
    }
    if text.trim_start().starts_with('[') {
        let features: Vec<Feature> =
            serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        return Ok(ReadOptions::default().with_features(features));
    }
    serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))
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

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::Path;

    use mamba_ssm_data::{Dataset, Feature, GapPolicy};

    use crate::bitcoin::run;

    /// A file of candles, one a minute.
    fn candles(path: &Path, minutes: impl Iterator<Item = i64>) {
        let rows = minutes.map(|m| {
            let price = 100 + m * 7 % 31;
            format!("{},{price},{price},{price},{price},{}\n", m * 60, 1 + m % 5)
        });
        let header = "Timestamp,Open,High,Low,Close,Volume\n";
        std::fs::write(path, format!("{header}{}", rows.collect::<String>())).unwrap();
    }

    /// Two files with three minutes missing between them, the second one in the wrong order.
    fn market() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let (first, second): (Range<i64>, Range<i64>) = (0..600, 603..1200);
        candles(&dir.path().join("a.csv"), first);
        candles(&dir.path().join("b.csv"), second.rev());
        dir
    }

    /// Runs `prepare` in a folder, whose name stands for `@` in the words; opens the set.
    fn prepared(dir: &Path, words: &str) -> crate::Result<Dataset> {
        let line = format!("bitcoin prepare --out @/set --length 16 --stride 4 {words}");
        let line = line.replace('@', dir.to_str().unwrap());
        run(line.split_whitespace().map(String::from))?;
        Ok(Dataset::open(dir.join("set"))?)
    }

    #[test]
    fn several_files_gaps_order_and_memory() {
        let dir = market();
        for files in [
            "--csv @/a.csv --csv @/b.csv",
            "--csv @/a.csv @/b.csv",
            "--csv @/*.csv",
        ] {
            let words = format!("{files} --sort --gaps fill:5 --memory-mb 1");
            let data = prepared(dir.path(), &words).unwrap();
            assert_eq!(data.len(), 1200, "{files}");
            assert_eq!(data.manifest().unwrap().sources.len(), 2);
            assert_eq!(data.window_options().gaps, GapPolicy::Fill { limit: 5 });
        }
        let data = prepared(dir.path(), "--csv @/*.csv --sort --protocol note").unwrap();
        assert_eq!(
            (data.len(), data.window_options().gaps),
            (1197, GapPolicy::Ignore)
        );
        let data = prepared(
            dir.path(),
            "--csv @/*.csv --sort --protocol note --gaps mask:0.9",
        );
        let gaps = data.unwrap().window_options().gaps;
        assert_eq!(gaps, GapPolicy::Mask { min_valid: 0.9 });

        let message = |words: &str| prepared(dir.path(), words).unwrap_err().to_string();
        assert!(message("--csv @/*.csv").contains("b.csv, row 3"));
        assert!(message("--csv @/a.csv --gaps fill").contains("fill:N"));
        assert!(message("--sort").contains("--csv"));
    }

    #[test]
    fn features_come_from_a_file() {
        let dir = market();
        let toml =
            "[[features]]\nkind = \"rsi\"\nwindow = 14\n[[features]]\nkind = \"time_of_day\"\n";
        let json = r#"[{"kind": "rsi", "window": 14}, {"kind": "time_of_day"}]"#;
        std::fs::write(dir.path().join("f.toml"), toml).unwrap();
        std::fs::write(dir.path().join("f.json"), json).unwrap();
        std::fs::write(
            dir.path().join("bad.toml"),
            toml.replace("window", "windows"),
        )
        .unwrap();
        let expected = Feature::Rsi {
            of: None,
            window: 14,
        };
        for file in ["f.toml", "f.json"] {
            let words = format!("--csv @/a.csv --features @/{file} --from 1970-01-01T01:00");
            let data = prepared(dir.path(), &words).unwrap();
            assert_eq!(
                data.names()[5..],
                ["rsi_14", "day_sin", "day_cos"],
                "{file}"
            );
            let read = data.read_options().unwrap();
            assert_eq!((&read.features[0], read.from), (&expected, Some(3600)));
        }
        for (file, word) in [("bad.toml", "windows"), ("none.toml", "none.toml")] {
            let words = format!("--csv @/a.csv --features @/{file}");
            let message = prepared(dir.path(), &words).unwrap_err().to_string();
            assert!(
                message.contains(file) && message.contains(word),
                "{message}"
            );
        }
    }
}
