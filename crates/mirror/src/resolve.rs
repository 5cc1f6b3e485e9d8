//! Where bytes of versions come from: the narrow door to the store.

use crate::control::{StoreState, Warmth};
use base::{ByteRange, PAGE};
use std::collections::BTreeMap;
use thiserror::Error;

/// Pages side by side that are read at once.
pub(crate) const RUN_PAGES: usize = 16;

/// The store, as the mirror sees it.
///
/// Versions are immutable: the same range always reads the same bytes, so an answer may be kept for ever.
pub trait Versions: Send + Sync {
    /// Fills `buf` with the bytes of `version` from `offset` on; what lies past its end is zero. Returns how many
    /// compressed bytes were read for it from the store's packs.
    ///
    /// # Errors
    /// The bytes are not to be had now ([`VersionError::Unavailable`]) or are not what the version names
    /// ([`VersionError::Corrupt`]); `buf` then holds anything and must not be used.
    fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError>;

    /// Sorts pages, by their offsets, into groups that lie together and are best read at once, the most wanted first.
    ///
    /// # Errors
    /// As [`Versions::read_at`].
    fn together(&self, version: &str, pages: &[u64]) -> Result<Vec<Vec<u64>>, VersionError> {
        let _ = version;
        Ok(neighbours(pages))
    }

    /// As [`Versions::together`], without those that the node's cache holds.
    ///
    /// # Errors
    /// As [`Versions::read_at`].
    fn away(&self, version: &str, pages: &[u64]) -> Result<Vec<Vec<u64>>, VersionError> {
        self.together(version, pages)
    }

    /// Looks where versions lie by now: what was laid down anew since is read there from then on.
    fn look_again(&self) {}

    /// Reads whole pages, by their offsets, and tells `sink` of each; all of a group that [`Versions::together`] made with
    /// few requests. Returns what [`Versions::read_at`] does.
    ///
    /// # Errors
    /// As [`Versions::read_at`].
    fn read_pages(&self, version: &str, pages: &[u64], sink: &mut dyn FnMut(u64, &[u8])) -> Result<u64, VersionError> {
        read_each(self, version, pages, sink)
    }

    /// The ranges within `range` that may be other than zero, ascending and cut to it, without reading their bytes;
    /// and how far the answer reaches: the end of `range`, or less where it would have more than `most` ranges. What
    /// lies past the version's end is zero.
    ///
    /// # Errors
    /// As [`Versions::read_at`].
    fn data_ranges(&self, version: &str, range: ByteRange, most: usize) -> Result<(Vec<ByteRange>, u64), VersionError>;

    /// How the store and the cache before it do.
    fn state(&self) -> StoreState {
        StoreState { open: true, ..StoreState::default() }
    }

    /// Says how much of `versions` is in the node's cache. With `begin`, what is missing is fetched in the background;
    /// with `pin`, none of it is evicted until [`Versions::unpin`] of that name.
    ///
    /// # Errors
    /// There is no cache, the store cannot say where they lie, or there is no room to pin them.
    fn warm(&self, name: &str, versions: &[String], begin: bool, pin: bool) -> Result<Warmth, String> {
        let _ = (name, versions, begin, pin);
        Err("there is no cache".to_owned())
    }

    /// Lets go what was pinned under a name; whether something was.
    fn unpin(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// The names of the blobs, sorted.
    ///
    /// # Errors
    /// As [`Versions::read_at`]; so with all that follow.
    fn blobs(&self) -> Result<Vec<String>, VersionError> {
        Ok(Vec::new())
    }

    /// A blob by name; none: there is none.
    ///
    /// # Errors
    /// As [`Versions::blobs`].
    fn blob(&self, _name: &str) -> Result<Option<BlobEntry>, VersionError> {
        Ok(None)
    }

    /// A version of a blob by number; none: there is none, or it was deleted.
    ///
    /// # Errors
    /// As [`Versions::blobs`].
    fn blob_version(&self, _name: &str, _number: u64) -> Result<Option<BlobVersionEntry>, VersionError> {
        Ok(None)
    }

    /// Numbers of versions of a blob that are not deleted, ascending from `from` on, at most `most`.
    ///
    /// # Errors
    /// As [`Versions::blobs`].
    fn blob_versions(&self, _name: &str, _from: u64, _most: usize) -> Result<Vec<u64>, VersionError> {
        Ok(Vec::new())
    }
}

/// Pages side by side, up to sixteen, are a group.
pub(crate) fn neighbours(pages: &[u64]) -> Vec<Vec<u64>> {
    let mut out: Vec<Vec<u64>> = Vec::new();
    for &page in pages {
        match out.last_mut() {
            Some(group) if group.len() < RUN_PAGES && group.last().is_some_and(|last| last + PAGE == page) => {
                group.push(page);
            }
            _ => out.push(vec![page]),
        }
    }
    out
}

/// [`Versions::read_pages`], neighbours at once.
pub(crate) fn read_each<V: Versions + ?Sized>(
    versions: &V,
    version: &str,
    pages: &[u64],
    sink: &mut dyn FnMut(u64, &[u8]),
) -> Result<u64, VersionError> {
    let (mut read, mut buf) = (0, Vec::new());
    for run in neighbours(pages) {
        buf.resize(run.len() * PAGE as usize, 0);
        read += versions.read_at(version, run[0], &mut buf)?;
        for (page, bytes) in run.iter().zip(buf.chunks(PAGE as usize)) {
            sink(*page, bytes);
        }
    }
    Ok(read)
}

/// A blob, as the tree shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobEntry {
    /// Number of its latest version.
    pub latest: u64,
    /// Numbers of versions by tag.
    pub tags: BTreeMap<String, u64>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
}

/// A version of a blob, as the tree shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobVersionEntry {
    /// The version in text.
    pub version: String,
    /// Its bytes.
    pub size: u64,
    /// When it was published, in milliseconds since 1970.
    pub time_ms: u64,
}

/// Why a version's bytes cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VersionError {
    /// Trying again may help.
    #[error("version {version} at {offset:#x}: {why}; it is tried again")]
    Unavailable {
        /// The version in text.
        version: String,
        /// Where in it.
        offset: u64,
        /// What the store said.
        why: String,
    },
    /// The store's bytes do not verify; they are never served.
    #[error("version {version} at {offset:#x} is corrupt in the store: {why}; repair the store, it is tried again")]
    Corrupt {
        /// The version in text.
        version: String,
        /// Where in it.
        offset: u64,
        /// What the store said.
        why: String,
    },
}

#[cfg(test)]
pub(crate) mod double {
    //! Versions held in memory, for tests.

    use super::{VersionError, Versions};
    use base::ByteRange;
    use std::collections::HashMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Named byte arrays; a name that is not there is unavailable.
    #[derive(Default)]
    pub(crate) struct Memory {
        pub(crate) versions: Mutex<HashMap<String, Vec<u8>>>,
        pub(crate) reads: AtomicU64,
    }

    impl Memory {
        pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
            self.versions.lock().unwrap().insert(name.to_owned(), bytes);
        }
    }

    impl Versions for Memory {
        fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let versions = self.versions.lock().unwrap();
            let bytes = versions.get(version).ok_or_else(|| VersionError::Unavailable {
                version: version.to_owned(),
                offset,
                why: "no such version".to_owned(),
            })?;
            let from = (offset as usize).min(bytes.len());
            let len = (bytes.len() - from).min(buf.len());
            buf[..len].copy_from_slice(&bytes[from..from + len]);
            buf[len..].fill(0);
            Ok(len as u64 / 2)
        }

        fn data_ranges(
            &self,
            version: &str,
            range: ByteRange,
            most: usize,
        ) -> Result<(Vec<ByteRange>, u64), VersionError> {
            let mut bytes = vec![0; range.len() as usize];
            self.read_at(version, range.start, &mut bytes)?;
            let mut found: Vec<ByteRange> = Vec::new();
            for (at, _) in (range.start..).zip(bytes).filter(|(_, b)| *b != 0) {
                let full = found.len() == most;
                match found.last_mut() {
                    Some(last) if last.end == at => last.end = at + 1,
                    _ if full => return Ok((found, at)),
                    _ => found.push(ByteRange::new(at, at + 1)),
                }
            }
            Ok((found, range.end))
        }
    }
}
