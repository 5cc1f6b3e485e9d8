//! Versions of the store itself.

use crate::resolve::{VersionError, Versions};
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
        match self.store.read_at(&parsed, offset, inside) {
            Ok(stat) => Ok(stat.stored_bytes),
            Err(e @ Error::Corrupt { .. }) => {
                Err(VersionError::Corrupt { version: version.to_owned(), offset, why: with_sources(&e) })
            }
            Err(e) => Err(unavailable(with_sources(&e))),
        }
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
