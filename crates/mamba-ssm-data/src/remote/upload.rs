//! A set of this machine to an object store.

use std::path::Path;
use std::time::Duration;

use object_store::{ObjectStoreExt, PutPayload};
use tokio::time::timeout;
use xxhash_rust::xxh3::xxh3_64;

use super::RemoteOptions;
use super::files::{local, parse};
use super::store::{Carrier, Place};
use super::transfer::{Patience, chain};
use crate::shards::{Files, Folder, MANIFEST, Manifest, Shard, check_content};
use crate::{Error, Result};

/// The slowest connection that is waited for, bytes a second.
const SLOWEST: u64 = 1 << 16;

/// Copies a prepared set to a URL (`s3`, `gs`, `az`, `http` with PUT).
///
/// Shards go first, under a name made of the set's content, the manifest last: readers of the URL see
/// the old set or the new one. Shards that are there already are not sent again, so an upload that was
/// interrupted is taken up by calling this again. Earlier sets of the URL are left in place for those
/// who still read them.
///
/// # Errors
///
/// No set in the folder, a damaged shard in it, a URL that cannot be written.
///
/// ```no_run
/// use mamba_ssm_data::{Dataset, RemoteOptions, upload};
///
/// upload("data/btc", "s3://bucket/btc", &RemoteOptions::default())?;
/// let data = Dataset::open("s3://bucket/btc")?;
/// # Ok::<(), mamba_ssm_data::Error>(())
/// ```
pub fn upload(folder: impl AsRef<Path>, url: &str, options: &RemoteOptions) -> Result<()> {
    let parsed = parse(url)?;
    if let Ok(path) = local(&parsed) {
        return Err(Error::InvalidOption {
            option: "url",
            reason: format!(
                "{} is a folder of this machine: give it to `prepare` as output",
                path.display()
            ),
        });
    }
    let files = Folder(folder.as_ref().into());
    let manifest_path = files.place(MANIFEST);
    let mut manifest = Manifest::parse(&manifest_path, &files.manifest()?)?;
    let target = Target {
        place: Place::new(&parsed, options)?,
        patience: options.into(),
        carrier: Carrier::new()?,
    };
    let name = content_name(&manifest);
    for shard in &mut manifest.shards {
        let file = shard.file.rsplit('/').next().unwrap_or(&shard.file);
        let there = format!("{name}/{file}");
        target.send_shard(&files, shard, &there)?;
        shard.file = there;
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Manifest {
        path: manifest_path,
        reason: e.to_string(),
    })?;
    target.send(MANIFEST, text)
}

/// The name of the folder of these shards.
fn content_name(manifest: &Manifest) -> String {
    let all: Vec<&str> = manifest.shards.iter().map(|s| s.xxh3.as_str()).collect();
    format!("set-{:016x}", xxh3_64(all.concat().as_bytes()))
}

struct Target {
    place: Place,
    patience: Patience,
    carrier: Carrier,
}

impl Target {
    fn send_shard(&self, files: &Folder, shard: &Shard, there: &str) -> Result<()> {
        if self.size_of(there) == Some(shard.bytes) {
            return Ok(());
        }
        let path = files.place(&shard.file);
        check_content(&path, shard, &mut files.open(shard)?)?;
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, "read it", e))?;
        self.send(there, bytes)
    }

    /// The size of an object; `None` when it is not there, or cannot be asked for.
    fn size_of(&self, file: &str) -> Option<u64> {
        let (place, object) = (self.place.clone(), self.place.object(file));
        let stall = self.patience.stall;
        let found = self.carrier.wait(async move {
            Ok(timeout(stall, place.store.head(&object))
                .await
                .ok()
                .and_then(|r| r.ok()))
        });
        found.ok().flatten().map(|meta| meta.size)
    }

    fn send(&self, file: &str, bytes: Vec<u8>) -> Result<()> {
        let (place, patience, file) = (self.place.clone(), self.patience, file.to_string());
        let object = place.object(&file);
        let longest = patience.stall + Duration::from_secs(bytes.len() as u64 / SLOWEST);
        let payload = PutPayload::from(bytes);
        self.carrier.wait(async move {
            let mut failures = 0;
            loop {
                use object_store::Error as E;
                let sent = timeout(longest, place.store.put(&object, payload.clone())).await;
                let reason = match sent {
                    Ok(Ok(_)) => return Ok(()),
                    Ok(Err(e @ (E::PermissionDenied { .. } | E::Unauthenticated { .. }))) => {
                        return Err(place.error(&file, chain(&e)));
                    }
                    Ok(Err(e)) => chain(&e),
                    Err(_) => format!("it was not taken within {longest:?}"),
                };
                failures += 1;
                if failures > patience.retries {
                    let reason = format!("{reason} ({failures} failures in a row)");
                    return Err(place.error(&file, reason));
                }
                patience.wait(failures).await;
            }
        })
    }
}
