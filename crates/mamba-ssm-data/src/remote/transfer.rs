//! Downloads that go on where they were cut.

use std::time::Duration;

use futures_util::StreamExt;
use object_store::{GetOptions, GetRange};
use tokio::time::{sleep, timeout};

use super::RemoteOptions;
use super::store::Place;
use crate::backoff::{PROGRESS, wait_after};
use crate::{Error, Result};

/// Where the bytes of a download go.
pub(super) trait Sink: Send + 'static {
    /// Takes the next bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<()>;
    /// Forgets all bytes taken so far.
    fn clear(&mut self) -> Result<()>;
}

/// How patient to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) retries: usize,
    pub(super) backoff: Duration,
    pub(super) stall: Duration,
}

impl From<&RemoteOptions> for Patience {
    fn from(options: &RemoteOptions) -> Self {
        Self {
            retries: options.retries,
            backoff: options.backoff,
            stall: options.stall,
        }
    }
}

impl Patience {
    /// Waits after this many failures.
    pub(super) async fn wait(&self, failures: usize) {
        sleep(wait_after(failures, self.backoff)).await;
    }
}

/// Why an attempt has ended.
pub(super) enum Failure {
    /// Trying again would not help.
    Final(Error),
    /// There is no such object.
    Missing,
    /// It may go better next time.
    Passing(String),
}

/// An object of which a part may have come already.
struct Download<'a, S> {
    place: &'a Place,
    file: &'a str,
    /// Its size, where that is known.
    expected: Option<u64>,
    sink: S,
    done: u64,
    /// The server has refused to send a part.
    without_ranges: bool,
    patience: Patience,
}

/// Fetches an object into a sink. `None` when there is no such object.
pub(super) async fn download<S: Sink>(
    place: &Place,
    file: &str,
    expected: Option<u64>,
    patience: Patience,
    sink: S,
) -> Result<Option<S>> {
    let mut download = Download {
        place,
        file,
        expected,
        sink,
        done: 0,
        without_ranges: false,
        patience,
    };
    let mut failures = 0;
    loop {
        let before = download.done;
        match download.attempt().await {
            Ok(()) => return Ok(Some(download.sink)),
            Err(Failure::Missing) => return Ok(None),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(reason)) => {
                if download.done >= before + PROGRESS {
                    failures = 0;
                }
                failures += 1;
                if failures > patience.retries {
                    let reason = format!("{reason} ({failures} failures in a row)");
                    return Err(place.error(file, reason));
                }
                patience.wait(failures).await;
            }
        }
    }
}

impl<S: Sink> Download<'_, S> {
    /// Asks for what is missing and takes what comes.
    async fn attempt(&mut self) -> std::result::Result<(), Failure> {
        if self.without_ranges && self.done > 0 {
            self.done = 0;
            self.sink.clear().map_err(Failure::Final)?;
        }
        if self.done > 0 && Some(self.done) == self.expected {
            return Ok(());
        }
        let stall = self.patience.stall;
        let options = GetOptions {
            range: (self.done > 0).then_some(GetRange::Offset(self.done)),
            ..GetOptions::default()
        };
        let object = self.place.object(self.file);
        let request = self.place.store.get_opts(&object, options);
        let answer = timeout(stall, request)
            .await
            .map_err(|_| stalled(stall))?
            .map_err(|e| self.judge(e))?;
        let mut bytes = answer.into_stream();
        loop {
            match timeout(stall, bytes.next()).await {
                Err(_) => return Err(stalled(stall)),
                Ok(None) => break,
                Ok(Some(Err(e))) => return Err(self.judge(e)),
                Ok(Some(Ok(bytes))) => {
                    self.done += bytes.len() as u64;
                    if self.expected.is_some_and(|size| self.done > size) {
                        let reason = "it is longer than the manifest says";
                        return Err(Failure::Final(self.place.error(self.file, reason)));
                    }
                    self.sink.take(&bytes).map_err(Failure::Final)?;
                }
            }
        }
        match self.expected {
            Some(size) if self.done < size => Err(Failure::Passing(format!(
                "it ended after {} of {size} bytes",
                self.done
            ))),
            _ => Ok(()),
        }
    }

    fn judge(&mut self, error: object_store::Error) -> Failure {
        use object_store::Error as E;
        match error {
            E::NotFound { .. } => Failure::Missing,
            E::PermissionDenied { .. }
            | E::Unauthenticated { .. }
            | E::InvalidPath { .. }
            | E::UnknownConfigurationKey { .. } => {
                Failure::Final(self.place.error(self.file, chain(&error)))
            }
            // The answer to a range of bytes by a server that knows none.
            E::NotSupported { .. } if self.done > 0 && !self.without_ranges => {
                self.without_ranges = true;
                Failure::Passing(chain(&error))
            }
            other => Failure::Passing(chain(&other)),
        }
    }
}

fn stalled(after: Duration) -> Failure {
    Failure::Passing(format!("nothing came for {after:?}"))
}

/// An error and its causes, each said once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}
