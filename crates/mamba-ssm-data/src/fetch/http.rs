//! One file over HTTP: taken up where it stopped, checked, and put in place by a rename.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use super::{FetchOptions, FetchProgress, FetchWatcher};
use crate::backoff::{PROGRESS, wait_after};
use crate::{Error, Result};

/// The longest text that is read into memory.
const LONGEST_TEXT: u64 = 1 << 16;

/// Asks a server for files.
pub(super) struct Client<'a> {
    agent: Agent,
    options: &'a FetchOptions,
    /// The value of the `authorization` header. It is not sent on to where the server redirects.
    pub(super) authorization: Option<String>,
    /// What to do when the server refuses.
    pub(super) when_refused: &'static str,
}

/// Why an attempt has ended.
enum Failure {
    /// Trying again would not help.
    Final(Error),
    /// There is no such file.
    Missing,
    /// It may go better next time.
    Passing(String),
    /// The same, after it has got on well.
    Advanced(String),
}

type Attempt<T> = std::result::Result<T, Failure>;

/// Says what is wrong with the file that was downloaded.
pub(super) type Check<'a> = &'a dyn Fn(&Path) -> std::result::Result<(), String>;

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a FetchOptions) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::Never)
            // A part of a compressed body is not a part of the file.
            .accept_encoding("identity")
            .user_agent(concat!("mamba-ssm-data/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(options.stall))
            .timeout_recv_response(Some(options.stall))
            .timeout_per_read(Some(options.stall))
            .timeout_per_write(Some(options.stall))
            .build()
            .new_agent();
        Self {
            agent,
            options,
            authorization: None,
            when_refused: "",
        }
    }

    /// A short text; `None` when there is no such file.
    pub(super) fn text(&self, url: &str) -> Result<Option<String>> {
        self.retried(url, || {
            let mut response = self.ask(self.agent.get(url), url, 0)?;
            let mut text = String::new();
            let body = response.body_mut().as_reader().take(LONGEST_TEXT);
            { body }
                .read_to_string(&mut text)
                .map_err(|e| Failure::Passing(e.to_string()))?;
            Ok(text)
        })
    }

    /// Whether there is such a file.
    pub(super) fn exists(&self, url: &str) -> Result<bool> {
        let found = self.retried(url, || self.ask(self.agent.head(url), url, 0).map(drop))?;
        Ok(found.is_some())
    }

    /// Downloads a file to `target`; false when there is no such file.
    ///
    /// What has come stays in `target` + `.part` until all of it is there and `check` finds it good.
    pub(super) fn download(
        &self,
        url: &str,
        target: &Path,
        check: Check<'_>,
        progress: &mut FetchProgress,
        watch: FetchWatcher<'_>,
    ) -> Result<bool> {
        let mut part = Part::open(target)?;
        // A second time from the start, should the first have pieced together two versions of the file.
        let mut second = false;
        loop {
            let mut resumed = false;
            let come = self.retried(url, || {
                let before = part.bytes;
                resumed |= before > 0;
                let outcome = self.attempt(url, &mut part, progress, watch);
                outcome.map_err(|failure| match failure {
                    Failure::Passing(reason) if part.bytes >= before + PROGRESS => {
                        Failure::Advanced(reason)
                    }
                    other => other,
                })
            })?;
            if come.is_none() {
                part.remove();
                return Ok(false);
            }
            match check(&part.path) {
                Ok(()) => return part.publish(target).map(|()| true),
                Err(_) if resumed && !second => {
                    part.truncate()?;
                    second = true;
                }
                Err(reason) => {
                    part.remove();
                    return Err(self.error(url, reason));
                }
            }
        }
    }

    /// Asks for what is missing and takes what comes.
    fn attempt(
        &self,
        url: &str,
        part: &mut Part,
        progress: &mut FetchProgress,
        watch: FetchWatcher<'_>,
    ) -> Attempt<()> {
        let mut response = self.ask(self.agent.get(url), url, part.bytes)?;
        let from = match response.status() {
            StatusCode::PARTIAL_CONTENT => content_range(&response).map_or(0, |(from, _)| from),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                // Complete already, or longer than the file there is now.
                let whole = content_range(&response).and_then(|(_, total)| total);
                if whole == Some(part.bytes) {
                    return Ok(());
                }
                part.truncate().map_err(Failure::Final)?;
                return Err(Failure::Passing("the part at hand does not fit".into()));
            }
            _ => 0,
        };
        if from != part.bytes {
            part.truncate().map_err(Failure::Final)?;
            if from != 0 {
                return Err(Failure::Passing("another part came than asked for".into()));
            }
        }
        progress.total = content_length(&response).map(|length| part.bytes + length);
        let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            progress.done = part.bytes;
            if let ControlFlow::Break(()) = watch(progress) {
                return Err(Failure::Final(Error::Cancelled));
            }
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => part.write(&buffer[..read]).map_err(Failure::Final)?,
                Err(e) => return Err(Failure::Passing(e.to_string())),
            }
        }
        match progress.total {
            Some(total) if part.bytes < total => Err(Failure::Passing(format!(
                "it ended after {} of {total} bytes",
                part.bytes
            ))),
            _ => Ok(()),
        }
    }

    /// Sends a request for what comes after `from`; refusals are failures.
    fn ask(
        &self,
        mut request: RequestBuilder<WithoutBody>,
        url: &str,
        from: u64,
    ) -> Attempt<Response<Body>> {
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Failure::Final(self.error(url, e.to_string()))
            }
            other => Failure::Passing(other.to_string()),
        })?;
        let status = response.status();
        match status.as_u16() {
            200 | 206 | 416 => Ok(response),
            404 | 410 => Err(Failure::Missing),
            408 | 425 | 429 | 500..=599 => {
                Err(Failure::Passing(format!("the server answers {status}")))
            }
            401 | 403 => Err(Failure::Final(self.error(
                url,
                format!("the server answers {status}{}", self.when_refused),
            ))),
            _ => Err(Failure::Final(
                self.error(url, format!("the server answers {status}")),
            )),
        }
    }

    /// Tries until it works, there is no such file, or it has failed too often in a row.
    fn retried<T>(&self, url: &str, mut attempt: impl FnMut() -> Attempt<T>) -> Result<Option<T>> {
        let mut failures: usize = 0;
        loop {
            let reason = match attempt() {
                Ok(value) => return Ok(Some(value)),
                Err(Failure::Missing) => return Ok(None),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason)) => reason,
                Err(Failure::Advanced(reason)) => {
                    failures = 0;
                    reason
                }
            };
            failures += 1;
            if failures > self.options.retries {
                let reason = format!("{reason} ({failures} failures in a row)");
                return Err(self.error(url, reason));
            }
            std::thread::sleep(wait_after(failures, self.options.backoff));
        }
    }

    pub(super) fn error(&self, url: &str, reason: String) -> Error {
        Error::Remote {
            url: url.into(),
            reason,
        }
    }
}

/// A file that has not come whole.
struct Part {
    path: PathBuf,
    /// Locked, so that two processes do not write it at once.
    file: File,
    bytes: u64,
}

impl Part {
    const ACTION: &str = "write what is downloaded";

    fn open(target: &Path) -> Result<Self> {
        let mut path = target.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let failed = |e| Error::io(&path, Self::ACTION, e);
        let mut file = File::options()
            .create(true)
            .append(false)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path }),
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { path, file, bytes })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(|e| Error::io(&self.path, Self::ACTION, e))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn truncate(&mut self) -> Result<()> {
        self.bytes = 0;
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|e| Error::io(&self.path, Self::ACTION, e))
    }

    fn publish(&self, target: &Path) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, target))
            .map_err(|e| Error::io(target, Self::ACTION, e))
    }

    /// Removes it; at worst it is overwritten the next time.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn content_length(response: &Response<Body>) -> Option<u64> {
    let value = response.headers().get(header::CONTENT_LENGTH)?;
    value.to_str().ok()?.trim().parse().ok()
}

/// First byte and size of `bytes 5-9/10`; the size alone, behind a zero, of `bytes */10`.
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let value = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let from = range.split('-').next().and_then(|n| n.trim().parse().ok());
    Some((from.unwrap_or(0), total.trim().parse().ok()))
}
