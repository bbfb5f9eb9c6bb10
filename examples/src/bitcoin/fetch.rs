use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Subcommand;
use mamba_ssm_data::{
    BinanceMonths, Credentials, FetchOptions, FetchProgress, KaggleSet, Month, fetch_binance,
    fetch_kaggle,
};

use super::progress::Progress;
use crate::Result;

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    source: Source,
    /// The folder of the files.
    #[arg(long, global = true, default_value = "data")]
    out: PathBuf,
    /// Ask this host instead of the source's own: a mirror, or a server of one's own.
    #[arg(long, global = true)]
    host: Option<String>,
    /// Failures in a row before a download is given up.
    #[arg(long, global = true, default_value_t = 8)]
    retries: usize,
}

#[derive(Debug, Clone, Subcommand)]
enum Source {
    /// A data set of Kaggle, as the user of KAGGLE_USERNAME and KAGGLE_KEY, or of ~/.kaggle/kaggle.json.
    Kaggle {
        /// Owner and name of the set.
        #[arg(long, default_value_t = KaggleSet::default().dataset)]
        dataset: String,
    },
    /// Binance's public monthly archives of candles, each checked against its published checksum.
    Binance {
        /// The pair.
        #[arg(long, default_value_t = BinanceMonths::default().symbol)]
        symbol: String,
        /// The length of a candle.
        #[arg(long, default_value_t = BinanceMonths::default().interval)]
        interval: String,
        /// The first month, for example 2017-08.
        #[arg(long, default_value_t = BinanceMonths::default().from)]
        from: Month,
        /// The last month; all that have been published if it is left out.
        #[arg(long)]
        to: Option<Month>,
    },
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut options = FetchOptions::new(&args.out);
    options.host.clone_from(&args.host);
    options.retries = args.retries;
    let mut progress: Option<(usize, Progress)> = None;
    let mut watch = |at: &FetchProgress| {
        if progress.as_ref().is_none_or(|(n, _)| *n != at.number) {
            let what = match at.files {
                1 => at.file.clone(),
                files => format!("{} ({} of {files})", at.file, at.number),
            };
            progress = Some((at.number, Progress::new(what)));
        }
        if let Some((_, progress)) = &mut progress {
            progress.show(at.done, at.total.unwrap_or(0));
        }
        ControlFlow::Continue(())
    };
    let (files, source) = match &args.source {
        Source::Kaggle { dataset } => {
            let set = KaggleSet {
                dataset: dataset.clone(),
                credentials: Credentials::find()?,
            };
            let file = fetch_kaggle(&set, &options, &mut watch)?;
            (1, file)
        }
        Source::Binance {
            symbol,
            interval,
            from,
            to,
        } => {
            let months = BinanceMonths {
                symbol: symbol.clone(),
                interval: interval.clone(),
                from: *from,
                to: *to,
            };
            let files = fetch_binance(&months, &options, &mut watch)?;
            (
                files.len(),
                args.out.join(format!("{symbol}-{interval}-*.zip")),
            )
        }
    };
    drop(progress);
    println!(
        "{files} file(s) in {}; next: bitcoin prepare --csv '{}' --out data/shards",
        args.out.display(),
        source.display()
    );
    Ok(())
}

#[cfg(test)]
#[expect(
    dead_code,
    reason = "the server fails in more ways than are of use here"
)]
#[path = "../../../crates/mamba-ssm-data/tests/main/server.rs"]
mod server;

#[cfg(test)]
mod tests {
    use super::server::{Answer, Server};
    use crate::bitcoin::run;

    /// SHA-256 of the word `candles`.
    const CHECKSUM: &str = "afc6d50c5e5bfa4e6907372311655461084074f2414b3d0aa08bad7f54bf8f46";

    #[test]
    fn a_month_comes_whole_and_checked() {
        let (site, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let months = site.path().join("data/spot/monthly/klines/ETHUSDT/1h");
        std::fs::create_dir_all(&months).unwrap();
        let name = "ETHUSDT-1h-2024-11.zip";
        std::fs::write(months.join(name), "candles").unwrap();
        let sums = months.join(format!("{name}.CHECKSUM"));
        std::fs::write(&sums, format!("{CHECKSUM}  {name}\n")).unwrap();
        let server = Server::start(site.path(), |request, before| {
            match (request.path.ends_with(".zip"), before) {
                (true, 0) => Answer::Cut(3),
                _ => Answer::Whole,
            }
        });
        let line = format!(
            "bitcoin fetch binance --symbol ETHUSDT --interval 1h --from 2024-11 --to 2024-11 --host {} --out {}",
            server.url,
            out.path().display()
        );
        run(line.split_whitespace()).unwrap();
        assert_eq!(std::fs::read(out.path().join(name)).unwrap(), b"candles");
        let ranges = server.requests();
        let ranges = ranges.iter().filter(|r| r.path.ends_with(".zip"));
        assert!(ranges.map(|r| r.from).eq([None, Some(3)]));

        std::fs::write(&sums, format!("{}  {name}\n", CHECKSUM.replace('a', "b"))).unwrap();
        let message = run(line.split_whitespace()).unwrap_err().to_string();
        assert!(
            message.contains(name) && message.contains("SHA-256"),
            "{message}"
        );
    }

    #[test]
    fn a_host_that_does_not_answer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().to_str().unwrap();
        let host = "http://127.0.0.1:9";
        let common = ["--out", out, "--host", host, "--retries", "0"];
        for source in ["kaggle", "binance"] {
            let words = ["bitcoin", "fetch", source].into_iter().chain(common);
            let message = run(words).unwrap_err().to_string();
            assert!(message.contains(host), "{message}");
        }
    }

    #[test]
    fn a_month_that_is_none_is_refused() {
        let words = ["bitcoin", "fetch", "binance", "--from", "2017-13"];
        let message = run(words).unwrap_err().to_string();
        assert!(
            message.contains("2017-13") && message.contains("--from"),
            "{message}"
        );
    }
}
