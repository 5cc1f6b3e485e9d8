//! Versions of the store itself.

use crate::resolve::{BlobEntry, BlobVersionEntry, VersionError, Versions};
use base::ByteRange;
use std::error::Error as _;
use std::path::Path;
use store::blob::BlobInfo;
use store::{Error, Mode, Store, Version};

/// A store, opened read-only beside the daemon that writes it.
pub struct StoreVersions {
    store: Store,
}

impl StoreVersions {
    /// Opens the store in `dir`.
    ///
    /// # Errors
    /// There is no store, or this release cannot read it.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Ok(Self { store: Store::open(dir, Mode::ReadOnly)? })
    }
}

impl Versions for StoreVersions {
    fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError> {
        let unavailable = |why: String| VersionError::Unavailable { version: version.to_owned(), offset, why };
        let parsed: Version = version.parse().map_err(|e| unavailable(format!("not a version: {e}")))?;
        let len = buf.len().min(usize::try_from(parsed.size.saturating_sub(offset)).unwrap_or(usize::MAX));
        let (inside, beyond) = buf.split_at_mut(len);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(0);
        }
        let read = self.store.read_at(&parsed, offset, inside);
        read.map(|stat| stat.stored_bytes).map_err(|e| failed(version, offset, &e))
    }

    fn data_ranges(&self, version: &str, range: ByteRange, most: usize) -> Result<(Vec<ByteRange>, u64), VersionError> {
        let offset = range.start;
        let unavailable = |why: String| VersionError::Unavailable { version: version.to_owned(), offset, why };
        let parsed: Version = version.parse().map_err(|e| unavailable(format!("not a version: {e}")))?;
        let inside = ByteRange::new(range.start.min(parsed.size), range.end.min(parsed.size));
        let found = self.store.data_ranges_in(&parsed, inside, most).map_err(|e| failed(version, offset, &e))?;
        Ok(if found.1 == inside.end { (found.0, range.end) } else { found })
    }

    fn blobs(&self) -> Result<Vec<String>, VersionError> {
        self.store.blobs().map_err(|e| failed("of any blob", 0, &e))
    }

    fn blob(&self, name: &str) -> Result<Option<BlobEntry>, VersionError> {
        let info = self.store.blob(name).and_then(|blob| blob.info());
        let entry = |info: BlobInfo| BlobEntry { latest: info.latest, tags: info.tags, created_ms: info.created_ms };
        there(name, info.map(entry))
    }

    fn blob_version(&self, name: &str, number: u64) -> Result<Option<BlobVersionEntry>, VersionError> {
        let found = self.store.blob(name).and_then(|blob| {
            let (_, version) = blob.version(number)?;
            let logged = blob.log(number..number + 1)?;
            let time_ms = logged.first().map_or(0, |entry| entry.time_ms);
            Ok(BlobVersionEntry { version: version.to_string(), size: version.size, time_ms })
        });
        there(name, found)
    }

    fn blob_versions(&self, name: &str, from: u64, most: usize) -> Result<Vec<u64>, VersionError> {
        let mut found = Vec::new();
        let mut at = from;
        while found.len() < most {
            let entries = self.store.blob(name).and_then(|blob| blob.log(at..at.saturating_add(most as u64)));
            let Some(entries) = there(name, entries)? else { break };
            let Some(last) = entries.last() else { break };
            at = last.number + 1;
            found.extend(entries.iter().filter(|entry| !entry.deleted).map(|entry| entry.number));
        }
        found.truncate(most);
        Ok(found)
    }
}

/// What is not there is no error.
fn there<T>(name: &str, found: Result<T, Error>) -> Result<Option<T>, VersionError> {
    match found {
        Ok(found) => Ok(Some(found)),
        // A name that cannot be one names nothing.
        Err(Error::NotFound { .. } | Error::Invalid(_)) => Ok(None),
        Err(e) => Err(failed(&format!("of blob {name}"), 0, &e)),
    }
}

fn failed(version: &str, offset: u64, error: &Error) -> VersionError {
    let (version, why) = (version.to_owned(), with_sources(error));
    match error {
        Error::Corrupt { .. } => VersionError::Corrupt { version, offset, why },
        _ => VersionError::Unavailable { version, offset, why },
    }
}

/// An error with what caused it, on one line.
fn with_sources(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
