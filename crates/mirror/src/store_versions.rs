//! Versions of the store itself.

use crate::resolve::{VersionError, Versions};
use base::ByteRange;
use std::error::Error as _;
use std::path::Path;
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
