//! Snapshots of several blobs: one head that names a version of each.
//!
//! *At one instant*: in this process heads are swapped under a lock, which is held while they are read. Other processes
//! may publish to a shared medium meanwhile, so the heads are read once more: if none changed, all stood as they were
//! read at the moment between the two readings. If one did, the second reading is the first of the next pair. Heads are
//! read side by side, so that a reading takes one round trip and not one for each blob, and writers that publish many
//! times a second leave room between two of their swaps.

use super::At;
use super::history::State;
use crate::commit::in_parallel;
use crate::engine::{Etag, Expect};
use crate::error::Error;
use crate::name::Version;
use crate::store::Store;
use crate::{Manifest, Transaction};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

const PREFIX: &str = "blobsnap/";
const FORMAT: u32 = 1;
/// Readings before giving up on heads that never stand still.
const READINGS_MAX: usize = 200;
/// Readings without a pause; then writers of this process, which wait while heads are read, get their turn.
const READINGS_AT_ONCE: usize = 20;
const PAUSE: Duration = Duration::from_millis(1);
/// Heads read at once where each takes a round trip.
const HEADS_AT_ONCE: usize = 16;

/// Number and version by the name of the blob.
type Versions = BTreeMap<String, (u64, Version)>;

/// Versions of several blobs at one instant. They stay readable until the snapshot is deleted, whatever becomes of the
/// blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobSnapshot {
    /// Its name.
    pub name: String,
    /// Number and version by the name of the blob.
    pub versions: BTreeMap<String, (u64, Version)>,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    format: u32,
    numbers: BTreeMap<String, u64>,
}

impl BlobSnapshot {
    /// Reads the manifest of the snapshot `name`.
    pub(crate) fn decode(name: &str, manifest: Manifest) -> Result<Self, Error> {
        let corrupt =
            |what: String| Error::Corrupt { object: crate::head::object(&format!("{PREFIX}{name}")), offset: 0, what };
        let meta: Meta = serde_json::from_str(&manifest.meta)
            .map_err(|error| corrupt(format!("its description is not that of a snapshot of blobs: {error}")))?;
        if meta.format != FORMAT || meta.numbers.keys().ne(manifest.versions.keys()) {
            return Err(corrupt("its description is not that of a snapshot of blobs of format 1".to_owned()));
        }
        let numbers = meta.numbers.into_values();
        let versions = manifest.versions.into_iter().zip(numbers).map(|((blob, v), number)| (blob, (number, v)));
        Ok(Self { name: name.to_owned(), versions: versions.collect() })
    }
}

impl Store {
    /// Makes a snapshot of these blobs.
    ///
    /// # Errors
    /// There is one of that name ([`Error::HeadChanged`]); a blob or version is not there, or named twice; the medium
    /// fails. Nothing was made then.
    pub fn snapshot_blobs(&self, name: &str, blobs: &[(&str, At)]) -> Result<BlobSnapshot, Error> {
        self.writable("snapshot blobs")?;
        let tx = self.begin();
        let mut readings = 0;
        let versions = loop {
            match self.read_together(&tx, blobs) {
                Ok(Some(versions)) => break versions,
                // Moved, or deleted and collected, meanwhile.
                Ok(None) | Err(Error::Unknown { .. }) if readings < READINGS_MAX / READINGS_AT_ONCE => {
                    readings += 1;
                    std::thread::sleep(PAUSE);
                }
                Ok(None) => {
                    return Err(Error::Invalid(format!(
                        "the blobs of snapshot `{name}` change too fast to be read at one instant; repeat it"
                    )));
                }
                Err(error) => return Err(error),
            }
        };
        let numbers = versions.iter().map(|(blob, (number, _))| (blob.clone(), *number)).collect();
        let meta = serde_json::to_string(&Meta { format: FORMAT, numbers }).expect("numbers always serialize");
        let manifest =
            Manifest { versions: versions.iter().map(|(blob, (_, version))| (blob.clone(), *version)).collect(), meta };
        tx.publish_so_far(&format!("{PREFIX}{name}"), Expect::Absent, &manifest)?;
        Ok(BlobSnapshot { name: name.to_owned(), versions })
    }

    /// The versions of the blobs as they stand together, held; `None` when that changed while they were read.
    fn read_together(&self, tx: &Transaction<'_>, blobs: &[(&str, At)]) -> Result<Option<Versions>, Error> {
        let Some(states) = self.states_together(blobs)? else { return Ok(None) };
        let mut versions = Versions::new();
        for ((blob, at), state) in blobs.iter().zip(&states) {
            let (number, version) = state.version(self, *at)?;
            if versions.insert((*blob).to_owned(), (number, tx.held(version)?)).is_some() {
                return Err(Error::Invalid(format!("a snapshot has one version of blob `{blob}`, not two")));
            }
        }
        Ok(Some(versions))
    }

    fn states_together(&self, blobs: &[(&str, At)]) -> Result<Option<Vec<State>>, Error> {
        let _one = self.publishing.lock().expect("no panic while publishing");
        let threads = if self.engine.is_remote() { HEADS_AT_ONCE } else { 1 };
        let read = || in_parallel(threads, blobs.to_vec(), |(blob, _)| self.blob_state(blob));
        let etags = |read: &[(State, Etag)]| read.iter().map(|(_, etag)| etag.clone()).collect::<Vec<_>>();
        let mut before = etags(&read()?);
        for _ in 0..READINGS_AT_ONCE {
            let now = read()?;
            let tags = etags(&now);
            if tags == before {
                return Ok(Some(now.into_iter().map(|(state, _)| state).collect()));
            }
            before = tags;
        }
        Ok(None)
    }

    /// A snapshot of blobs by its name.
    ///
    /// # Errors
    /// There is none; its head cannot be read, or is corrupt.
    pub fn blob_snapshot(&self, name: &str) -> Result<BlobSnapshot, Error> {
        let head = format!("{PREFIX}{name}");
        let found = self.head(&head)?;
        let (manifest, _) = found.ok_or_else(|| Error::NotFound { what: format!("snapshot of blobs `{name}`") })?;
        BlobSnapshot::decode(name, manifest)
    }

    /// The names of all snapshots of blobs, sorted.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn blob_snapshots(&self) -> Result<Vec<String>, Error> {
        Ok(self.heads(PREFIX)?.into_iter().map(|head| head[PREFIX.len()..].to_owned()).collect())
    }

    /// Deletes a snapshot of blobs; whether it was there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn delete_blob_snapshot(&self, name: &str) -> Result<bool, Error> {
        self.delete_head(&format!("{PREFIX}{name}"))
    }
}
