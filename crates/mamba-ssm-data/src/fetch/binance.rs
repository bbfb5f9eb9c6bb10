//! Binance's public archives of klines, one file a month, each with its checksum.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use chrono::Datelike;
use sha2::{Digest, Sha256};

use super::http::Client;
use super::{FetchOptions, FetchProgress, FetchWatcher};
use crate::{Error, Result};

/// Where the archives are, unless the options name another host.
const HOST: &str = "https://data.binance.vision";

/// A month of a year.
///
/// ```
/// use mamba_ssm_data::Month;
/// let month: Month = "2017-08".parse()?;
/// assert_eq!(month.next().to_string(), "2017-09");
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month {
    /// The year.
    pub year: i32,
    /// 1 to 12.
    pub month: u32,
}

impl Month {
    /// The month after.
    pub fn next(self) -> Self {
        match self.month {
            12.. => Self {
                year: self.year + 1,
                month: 1,
            },
            month => Self {
                month: month + 1,
                ..self
            },
        }
    }

    /// The last month that has ended.
    fn last_whole() -> Self {
        let now = chrono::DateTime::from(std::time::SystemTime::now());
        let now: chrono::DateTime<chrono::Utc> = now;
        match now.month() {
            1 => Self {
                year: now.year() - 1,
                month: 12,
            },
            month => Self {
                year: now.year(),
                month: month - 1,
            },
        }
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl FromStr for Month {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.trim().split_once('-');
        let parsed = numbers.and_then(|(year, month)| {
            Some(Self {
                year: year.parse().ok().filter(|y| (2009..=9999).contains(y))?,
                month: month.parse().ok().filter(|m| (1..=12).contains(m))?,
            })
        });
        parsed.ok_or_else(|| Error::InvalidOption {
            option: "month",
            reason: format!(
                "`{}` is not a month; expected for example 2017-08",
                crate::error::shorten(text)
            ),
        })
    }
}

/// Which archives to download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BinanceMonths {
    /// The pair, for example `BTCUSDT`.
    pub symbol: String,
    /// The length of a candle, for example `1m`.
    pub interval: String,
    /// The first month.
    pub from: Month,
    /// The last month; `None` takes what has been published so far.
    pub to: Option<Month>,
}

impl Default for BinanceMonths {
    fn default() -> Self {
        Self {
            symbol: "BTCUSDT".into(),
            interval: "1m".into(),
            from: Month {
                year: 2017,
                month: 8,
            },
            to: None,
        }
    }
}

impl BinanceMonths {
    fn validate(&self) -> Result<()> {
        for (option, word) in [("symbol", &self.symbol), ("interval", &self.interval)] {
            if word.is_empty() || !word.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(Error::InvalidOption {
                    option,
                    reason: format!(
                        "`{}` cannot be one; expected letters and digits",
                        crate::error::shorten(word)
                    ),
                });
            }
        }
        if let Some(to) = self.to.filter(|&to| to < self.from) {
            return Err(Error::InvalidOption {
                option: "to",
                reason: format!("{to} comes before `from`, {}", self.from),
            });
        }
        Ok(())
    }
}

/// Downloads monthly archives and checks each against its published SHA-256. Returns the files, which
/// [`prepare`](crate::prepare) takes as they are (`folder/BTCUSDT-1m-*.zip`).
///
/// Files that are there and match their checksum are left alone; a download that was interrupted goes
/// on where it stopped; a file gets its name when it is whole and checked.
///
/// # Errors
///
/// [`Error::Remote`] when a month or its checksum is missing, a checksum does not match, or the connection fails
/// again and again; [`Error::Cancelled`] when the watcher says so.
///
/// ```no_run
/// use mamba_ssm_data::{BinanceMonths, FetchOptions, fetch_binance};
/// use std::ops::ControlFlow;
///
/// let months = BinanceMonths { from: "2024-01".parse()?, ..BinanceMonths::default() };
/// let files = fetch_binance(&months, &FetchOptions::new("data"), &mut |at| {
///     println!("{} {} of {:?}", at.file, at.done, at.total);
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn fetch_binance(
    which: &BinanceMonths,
    options: &FetchOptions,
    watch: FetchWatcher<'_>,
) -> Result<Vec<PathBuf>> {
    which.validate()?;
    let client = Client::new(options);
    std::fs::create_dir_all(&options.output)
        .map_err(|e| Error::io(&options.output, "create it", e))?;
    let last = which.to.unwrap_or_else(Month::last_whole);
    let months: Vec<Month> = std::iter::successors(Some(which.from), |m| Some(m.next()))
        .take_while(|&m| m <= last)
        .collect();
    let (symbol, interval) = (&which.symbol, &which.interval);
    let mut files = Vec::with_capacity(months.len());
    for (i, month) in months.iter().enumerate() {
        let name = format!("{symbol}-{interval}-{month}.zip");
        let url = format!(
            "{}/data/spot/monthly/klines/{symbol}/{interval}/{name}",
            options.host(HOST)
        );
        let target = options.output.join(&name);
        let mut progress = FetchProgress {
            file: name,
            number: i + 1,
            files: months.len(),
            done: 0,
            total: None,
        };
        if fetch_month(&client, &url, &target, &mut progress, watch)? {
            files.push(target);
            continue;
        }
        // The archive of the last month appears some days after its end.
        if which.to.is_none() && i > 0 && i + 1 == months.len() {
            break;
        }
        let reason = format!("there is no archive of {symbol} {interval} for {month}");
        return Err(client.error(&url, reason));
    }
    Ok(files)
}

/// One month; false when there is no such archive.
fn fetch_month(
    client: &Client<'_>,
    url: &str,
    target: &Path,
    progress: &mut FetchProgress,
    watch: FetchWatcher<'_>,
) -> Result<bool> {
    let sums = format!("{url}.CHECKSUM");
    let Some(text) = client.text(&sums)? else {
        if client.exists(url)? {
            let reason = "the archive is there, but not this checksum of it; try again later, or fetch the archive by \
                          other means if you trust it";
            return Err(client.error(&sums, reason.into()));
        }
        return Ok(false);
    };
    let expected = text.split_whitespace().next().unwrap_or_default();
    if expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(client.error(&sums, "it holds no SHA-256 checksum".into()));
    }
    let check = |path: &Path| {
        let found = sha256(path).map_err(|e| e.to_string())?;
        match found.eq_ignore_ascii_case(expected) {
            true => Ok(()),
            false => Err(format!("its SHA-256 is {found}; expected {expected}")),
        }
    };
    if target.exists() && check(target).is_ok() {
        return Ok(true);
    }
    client.download(url, target, &check, progress, watch)
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_follow_each_other() {
        let month: Month = "2023-12".parse().unwrap();
        assert_eq!(month.next().to_string(), "2024-01");
        for bad in ["2023-13", "2023-00", "2023", "x-01", "1999-01", ""] {
            let message = bad.parse::<Month>().unwrap_err().to_string();
            assert!(message.contains("2017-08"), "{message}");
        }
    }

    #[test]
    fn words_that_would_change_the_address_are_refused() {
        let wrong = BinanceMonths {
            symbol: "../BTC".into(),
            ..BinanceMonths::default()
        };
        assert!(wrong.validate().unwrap_err().to_string().contains("symbol"));
        let backwards = BinanceMonths {
            to: Some("2017-07".parse().unwrap()),
            ..BinanceMonths::default()
        };
        let message = backwards.validate().unwrap_err().to_string();
        assert!(
            message.contains("2017-07") && message.contains("2017-08"),
            "{message}"
        );
    }
}
