//! A data set of Kaggle, as the archive that it is downloaded as.

use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use base64::Engine;
use serde::Deserialize;

use super::http::Client;
use super::{FetchOptions, FetchProgress, FetchWatcher};
use crate::{Error, Result};

/// Where the interface of Kaggle is, unless the options name another host.
const HOST: &str = "https://www.kaggle.com/api/v1";
const REFUSED: &str = ": set KAGGLE_USERNAME and KAGGLE_KEY, or put the file kaggle.json that your account \
                       page offers into ~/.kaggle; some sets ask for their rules to be accepted on their page first";

/// Name and key of an account.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Credentials {
    /// Name of the user.
    pub username: String,
    /// The key that the account page makes.
    pub key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Those of `KAGGLE_USERNAME` and `KAGGLE_KEY`, or of `kaggle.json` in `KAGGLE_CONFIG_DIR` or `~/.kaggle`;
    /// `None` when there are none.
    ///
    /// # Errors
    ///
    /// A `kaggle.json` that cannot be read.
    pub fn find() -> Result<Option<Self>> {
        let variable = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        if let (Some(username), Some(key)) = (variable("KAGGLE_USERNAME"), variable("KAGGLE_KEY")) {
            return Ok(Some(Self { username, key }));
        }
        let folder = variable("KAGGLE_CONFIG_DIR")
            .map(PathBuf::from)
            .or_else(|| {
                Some(Path::new(&variable("HOME").or(variable("USERPROFILE"))?).join(".kaggle"))
            });
        match folder.map(|f| f.join("kaggle.json")).filter(|p| p.exists()) {
            Some(path) => Self::read(&path).map(Some),
            None => Ok(None),
        }
    }

    /// Those of a `kaggle.json`.
    ///
    /// # Errors
    ///
    /// No such file, or one that does not hold `username` and `key`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|e| Error::io(path, "read it", e))?;
        serde_json::from_slice(&text).map_err(|e| Error::Source {
            path: path.display().to_string(),
            // The parser's own words may quote the key.
            reason: format!(
                "expected {{\"username\": ..., \"key\": ...}} (line {}, column {})",
                e.line(),
                e.column()
            ),
        })
    }

    fn header(&self) -> String {
        let pair = format!("{}:{}", self.username, self.key);
        format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(pair)
        )
    }
}

/// Which data set to download, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KaggleSet {
    /// Owner and name, for example `mczielinski/bitcoin-historical-data`.
    pub dataset: String,
    /// The account; without one the set is asked for without a name.
    pub credentials: Option<Credentials>,
}

impl Default for KaggleSet {
    fn default() -> Self {
        Self {
            dataset: "mczielinski/bitcoin-historical-data".into(),
            credentials: None,
        }
    }
}

/// Downloads a data set as its archive (`name.zip`), which [`prepare`](crate::prepare) takes as it is. The
/// archive's own checksums are verified before the file gets its name; a file of that name is replaced.
///
/// # Errors
///
/// [`Error::Remote`] when the server refuses, has no such set, or the connection fails again and again;
/// [`Error::Cancelled`] when the watcher says so.
///
/// ```no_run
/// use mamba_ssm_data::{Credentials, FetchOptions, KaggleSet, PrepareOptions, fetch_kaggle, prepare};
/// use std::ops::ControlFlow;
///
/// let set = KaggleSet { credentials: Credentials::find()?, ..KaggleSet::default() };
/// let file = fetch_kaggle(&set, &FetchOptions::new("data"), &mut |_| ControlFlow::Continue(()))?;
/// prepare(&PrepareOptions::new(file, "data/btc"))?;
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn fetch_kaggle(
    which: &KaggleSet,
    options: &FetchOptions,
    watch: FetchWatcher<'_>,
) -> Result<PathBuf> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let name = match which.dataset.split_once('/') {
        Some((owner, name)) if plain(owner) && plain(name) => name,
        _ => {
            return Err(Error::InvalidOption {
                option: "dataset",
                reason: format!(
                    "`{}` cannot be one; expected owner/name",
                    crate::error::shorten(&which.dataset)
                ),
            });
        }
    };
    std::fs::create_dir_all(&options.output)
        .map_err(|e| Error::io(&options.output, "create it", e))?;
    let mut client = Client::new(options);
    client.authorization = which.credentials.as_ref().map(Credentials::header);
    client.when_refused = REFUSED;
    let url = format!("{}/datasets/download/{}", options.host(HOST), which.dataset);
    let target = options.output.join(format!("{name}.zip"));
    let mut progress = FetchProgress {
        file: format!("{name}.zip"),
        number: 1,
        files: 1,
        done: 0,
        total: None,
    };
    match client.download(&url, &target, &check_archive, &mut progress, watch)? {
        true => Ok(target),
        false => Err(client.error(&url, "there is no such data set".into())),
    }
}

/// Reads an archive to its end, by which its checksums are verified.
fn check_archive(path: &Path) -> std::result::Result<(), String> {
    let damaged = |e: &dyn fmt::Display| format!("what came is not a whole zip archive: {e}");
    let file = File::open(path).map_err(|e| damaged(&e))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| damaged(&e))?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| damaged(&e))?;
        std::io::copy(&mut entry, &mut std::io::sink()).map_err(|e| damaged(&e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_does_not_show() {
        let credentials = Credentials {
            username: "me".into(),
            key: "hidden".into(),
        };
        assert!(!format!("{credentials:?}").contains("hidden"));
        assert_eq!(credentials.header(), "Basic bWU6aGlkZGVu");
    }

    #[test]
    fn a_kaggle_json_is_read_or_refused_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kaggle.json");
        std::fs::write(&path, r#"{"username":"me","key":"hidden"}"#).unwrap();
        assert_eq!(Credentials::read(&path).unwrap().username, "me");
        std::fs::write(&path, r#"{"username":"me","key":["hidden"]}"#).unwrap();
        let message = Credentials::read(&path).unwrap_err().to_string();
        assert!(
            message.contains("kaggle.json") && !message.contains("hidden"),
            "{message}"
        );
    }
}
