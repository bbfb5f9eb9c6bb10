//! An object store and a prefix in it, from a URL.

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use tokio::runtime::{Builder, Runtime};
use url::Url;

use super::RemoteOptions;
use crate::{Error, Result};

/// A place in an object store.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) store: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    /// The URL without credentials, for messages.
    pub(super) url: String,
    /// What must not show in a message: user and password of the URL.
    secret: Option<String>,
}

impl Place {
    pub(super) fn new(url: &Url, options: &RemoteOptions) -> Result<Self> {
        options.validate()?;
        let mut shown = url.clone();
        let _ = shown.set_username("");
        let _ = shown.set_password(None);
        shown.set_query(None);
        let wrong = |reason: String| Error::Remote {
            url: shown.to_string(),
            reason,
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong(
                "a set is a folder: expected a URL without `?` and `#`".into(),
            ));
        }
        let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|_| {
            wrong("expected a URL that begins with file, s3, gs, az, http or https".into())
        })?;
        let store = build(scheme, url, options).map_err(|e| wrong(e.to_string()))?;
        let user = &url[url::Position::BeforeUsername..url::Position::BeforeHost];
        Ok(Self {
            store,
            prefix,
            secret: (!user.is_empty()).then(|| user.to_string()),
            url: shown.as_str().trim_end_matches('/').into(),
        })
    }

    /// The object of a file of the set.
    pub(super) fn object(&self, file: &str) -> ObjectPath {
        file.split('/')
            .fold(self.prefix.clone(), |at, part| at.join(part))
    }

    /// An error about a file of the set.
    pub(super) fn error(&self, file: &str, reason: impl std::fmt::Display) -> Error {
        let mut reason = reason.to_string();
        if let Some(secret) = &self.secret {
            reason = reason.replace(secret.as_str(), "");
        }
        Error::Remote {
            url: format!("{}/{file}", self.url),
            reason,
        }
    }
}

/// The store of a scheme, with the environment's settings and then the given ones.
///
/// Retries of its own are off: [`transfer`](super::transfer) takes transfers up where they stopped,
/// whichever way they failed.
fn build(
    scheme: ObjectStoreScheme,
    url: &Url,
    options: &RemoteOptions,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let retry = RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    };
    // Plain HTTP is a matter of the endpoint that was configured.
    let client = ClientOptions::new()
        .with_allow_http(true)
        .with_timeout_disabled()
        .with_connect_timeout(options.stall.min(Duration::from_secs(10)));
    let settings = options
        .store
        .iter()
        .map(|(key, value)| (key.to_ascii_lowercase(), value));
    let unknown = |key: &str, store: &'static str| object_store::Error::Generic {
        store,
        source: format!("there is no setting `{key}`").into(),
    };
    macro_rules! cloud {
        ($builder:expr, $name:literal) => {{
            let mut builder = $builder.with_url(url.as_str()).with_retry(retry);
            for (key, value) in settings {
                let known = key.parse().map_err(|_| unknown(&key, $name))?;
                builder = builder.with_config(known, value);
            }
            Ok(Arc::new(builder.build()?))
        }};
    }
    match scheme {
        ObjectStoreScheme::AmazonS3 => {
            cloud!(
                AmazonS3Builder::from_env().with_client_options(client),
                "S3"
            )
        }
        ObjectStoreScheme::GoogleCloudStorage => cloud!(
            GoogleCloudStorageBuilder::from_env().with_client_options(client),
            "GCS"
        ),
        ObjectStoreScheme::MicrosoftAzure => cloud!(
            MicrosoftAzureBuilder::from_env().with_client_options(client),
            "Azure"
        ),
        ObjectStoreScheme::Http => {
            let mut builder = HttpBuilder::new()
                .with_url(&url[..url::Position::BeforePath])
                .with_client_options(client)
                .with_retry(retry);
            for (key, value) in settings {
                let known = key.parse().map_err(|_| unknown(&key, "HTTP"))?;
                builder = builder.with_config(known, value);
            }
            Ok(Arc::new(builder.build()?))
        }
        other => Err(object_store::Error::NotSupported {
            source: format!("{other:?} is no store of shard sets").into(),
        }),
    }
}

/// Threads that carry the transfers, whatever thread asks for them.
#[derive(Debug)]
pub(super) struct Carrier(Option<Runtime>);

impl Carrier {
    pub(super) fn new() -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("transfer")
            .enable_all()
            .build();
        runtime
            .map(|r| Self(Some(r)))
            .map_err(|e| Error::io(std::path::Path::new("transfer"), "start its threads", e))
    }

    /// Runs a future to its end. May be called from anywhere, from within another runtime too.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = sync_channel(1);
        if let Some(runtime) = &self.0 {
            runtime.spawn(async move {
                let _ = sender.send(future.await);
            });
        }
        receiver.recv().unwrap_or_else(|_| {
            Err(Error::Source {
                path: "transfer".into(),
                reason: "its thread ended before its work".into(),
            })
        })
    }

    /// Runs a function that waits, beside everything else.
    pub(super) fn beside(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(runtime) = &self.0 {
            runtime.spawn_blocking(work);
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // Without waiting: what a transfer leaves behind goes with its temporary file.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
