//! The files of a set behind a URL.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use url::Url;

use super::RemoteOptions;
use super::cache::Cache;
use super::store::{Carrier, Place};
use super::transfer::{Patience, Sink, download};
use crate::shards::{Files, Folder, MANIFEST, Shard};
use crate::{Error, Result};

/// The largest manifest that is read.
const LARGEST_MANIFEST: usize = 256 << 20;
/// Downloads ahead of need that go on at once.
const AHEAD: usize = 2;

/// The set that a URL leads to; a folder of this machine where it says `file`.
pub(crate) fn open(url: &str, options: &RemoteOptions) -> Result<Box<dyn Files>> {
    let parsed = parse(url)?;
    if parsed.scheme() == "file" {
        return Ok(Box::new(Folder(local(&parsed)?)));
    }
    let inner = Inner {
        place: Place::new(&parsed, options)?,
        cache: Cache::new(&options.cache, options.cache_bytes)?,
        patience: options.into(),
        coming: Mutex::default(),
    };
    Ok(Box::new(Remote {
        inner: Arc::new(inner),
        carrier: Arc::new(Carrier::new()?),
        ahead: Arc::default(),
    }))
}

pub(super) fn parse(url: &str) -> Result<Url> {
    Url::parse(url).map_err(|e| Error::Remote {
        url: crate::error::shorten(url),
        reason: format!("not a URL: {e}"),
    })
}

/// The path of a `file` URL.
pub(super) fn local(url: &Url) -> Result<PathBuf> {
    url.to_file_path().map_err(|()| Error::Remote {
        url: url.to_string(),
        reason: "not a path of this machine; expected file:///path".into(),
    })
}

#[derive(Debug)]
struct Remote {
    inner: Arc<Inner>,
    carrier: Arc<Carrier>,
    /// Checksums of the shards that are fetched ahead of need.
    ahead: Arc<Mutex<Vec<String>>>,
}

#[derive(Debug)]
struct Inner {
    place: Place,
    cache: Cache,
    patience: Patience,
    /// One lock per shard, so that it is fetched once however many threads want it.
    coming: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl Inner {
    /// The local copy of a shard, fetched if it is not there.
    fn fetch(self: &Arc<Self>, carrier: &Carrier, shard: &Shard) -> Result<File> {
        let turn = lock(&self.coming)
            .entry(shard.xxh3.clone())
            .or_default()
            .clone();
        let _turn = lock(&turn);
        if let Some(file) = self.cache.find(shard)? {
            return Ok(file);
        }
        let _room = self.cache.make_room(shard)?;
        let mut found = String::new();
        // A second time from the start, should the first have pieced together what does not belong together.
        for _ in 0..2 {
            let part = self.cache.part()?;
            let (inner, entry) = (self.clone(), shard.clone());
            let part = carrier.wait(async move {
                let size = Some(entry.bytes);
                download(&inner.place, &entry.file, size, inner.patience, part).await
            })?;
            let Some(part) = part else {
                return Err(self.place.error(&shard.file, "there is no such file"));
            };
            found = part.checksum();
            if found == shard.xxh3 {
                return self.cache.keep(part, shard);
            }
        }
        Err(self.place.error(
            &shard.file,
            format!("its checksum is {found}; expected {}", shard.xxh3),
        ))
    }
}

impl Files for Remote {
    fn manifest(&self) -> Result<Vec<u8>> {
        let inner = self.inner.clone();
        let text = self.carrier.wait(async move {
            let sink = Text {
                bytes: Vec::new(),
                place: inner.place.clone(),
            };
            download(&inner.place, MANIFEST, None, inner.patience, sink).await
        })?;
        match text {
            Some(text) => Ok(text.bytes),
            None => Err(Error::NotAShardSet {
                path: self.inner.place.url.clone().into(),
            }),
        }
    }

    /// Shards are looked for when they are wanted: asking for each would take a journey each.
    fn check(&self, _shard: &Shard) -> Result<()> {
        Ok(())
    }

    fn open(&self, shard: &Shard) -> Result<File> {
        self.inner.fetch(&self.carrier, shard)
    }

    fn place(&self, file: &str) -> PathBuf {
        format!("{}/{file}", self.inner.place.url).into()
    }

    fn holds_at_once(&self, largest: u64) -> usize {
        self.inner.cache.holds(largest).max(1)
    }

    fn prefetch(&self, shard: &Shard) {
        // What is fetched ahead must not push out what is in use.
        let at_once = AHEAD.min(self.inner.cache.holds(shard.bytes).saturating_sub(1));
        let mut ahead = lock(&self.ahead);
        if ahead.len() >= at_once || ahead.contains(&shard.xxh3) {
            return;
        }
        ahead.push(shard.xxh3.clone());
        let (inner, shard) = (self.inner.clone(), shard.clone());
        let (carrier, ahead) = (self.carrier.clone(), self.ahead.clone());
        self.carrier.beside(move || {
            // Whoever needs the shard sees the error.
            let _ = inner.fetch(&carrier, &shard);
            lock(&ahead).retain(|x| *x != shard.xxh3);
        });
    }
}

/// A manifest on its way.
struct Text {
    bytes: Vec<u8>,
    place: Place,
}

impl Sink for Text {
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        if self.bytes.len() + bytes.len() > LARGEST_MANIFEST {
            let reason = format!("it is longer than {LARGEST_MANIFEST} bytes; is this a manifest?");
            return Err(self.place.error(MANIFEST, reason));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.bytes.clear();
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
