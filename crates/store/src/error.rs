//! What can go wrong, grouped by what the caller must do next.

use crate::name::Name;
use std::io;
use std::path::PathBuf;

/// A failure of the store. The source, where there is one, is reached by `source()` and not printed again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The medium is full: free space, then repeat. Nothing was published.
    #[error("no space left while writing {object}; free some (remove snapshots or images), then repeat the operation")]
    NoSpace {
        /// What was being written.
        object: String,
        /// What the system said.
        source: io::Error,
    },
    /// The medium failed.
    #[error("cannot {action} {object}")]
    Io {
        /// The verb: read, write, list …
        action: &'static str,
        /// The object, or its path.
        object: String,
        /// What the system said.
        source: io::Error,
    },
    /// Another process writes to this store.
    #[error("the store {dir} is in use by process {pid}; stop that process, or open the store read-only")]
    Locked {
        /// The store's directory.
        dir: PathBuf,
        /// Who holds it, as it wrote itself down ("unknown" when it did not).
        pid: String,
    },
    /// There is no store here, or not one that this release can read.
    #[error("{dir} is not a store that this release can open: {why}")]
    NotAStore {
        /// The directory (or engine) asked for.
        dir: String,
        /// What is missing or strange.
        why: String,
    },
    /// Bytes that were read are not those that were written. Nothing of them was served.
    #[error("{object} is corrupt at byte {offset}: {what}; run a verification to learn what is affected")]
    Corrupt {
        /// The pack, index, head or key file.
        object: String,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A name that no pack of this store holds: never written here, collected, or its pack is lost.
    #[error("no pack holds {kind} {name}: its version was removed, was never written here, or a pack is lost")]
    Unknown {
        /// "block" or "node".
        kind: &'static str,
        /// Its content name.
        name: Name,
    },
    /// A write through a store that was opened read-only.
    #[error("cannot {action}: the store is open read-only in this process")]
    ReadOnly {
        /// What was asked.
        action: &'static str,
    },
    /// A request outside a blob.
    #[error("bytes {offset}+{len} lie outside the blob of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// How many.
        len: u64,
        /// The size of the blob.
        size: u64,
    },
    /// A request that makes no sense; the caller has to change it.
    #[error("bad request: {0}")]
    Invalid(String),
    /// There is no such blob, version, tag or snapshot of blobs (any more).
    #[error("there is no {what}; list what there is and repeat with one of these")]
    NotFound {
        /// Kind and name, and why where that is known.
        what: String,
    },
    /// Another writer published under this head first: read it again and decide.
    #[error("head `{head}` is not in the state expected: {found}")]
    HeadChanged {
        /// The head.
        head: String,
        /// What it is instead.
        found: &'static str,
    },
    /// The caller's cancel flag was raised; nothing was published.
    #[error("the commit was cancelled")]
    Cancelled,
    /// The source of a commit could not be read.
    #[error("cannot read the changed bytes at {offset:#x} from their source")]
    Source {
        /// Offset in the blob.
        offset: u64,
        /// What the source said.
        source: io::Error,
    },
    /// Reference counts cannot be trusted, so nothing may be removed.
    #[error(
        "the store is damaged ({faults} faults, the first: {first}); verify it and remove the heads it names, then repeat"
    )]
    Damaged {
        /// How many faults are known.
        faults: usize,
        /// The first of them.
        first: String,
    },
}

impl Error {
    /// Wraps an IO error; a full medium has a variant of its own.
    pub(crate) fn io(action: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        let object = object.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { object, source },
            _ => Self::Io { action, object, source },
        }
    }

    /// The same again, for each of several callers whose work failed together.
    pub(crate) fn copy(&self) -> Self {
        let again = |source: &io::Error| io::Error::new(source.kind(), source.to_string());
        match self {
            Self::NoSpace { object, source } => Self::NoSpace { object: object.clone(), source: again(source) },
            Self::Io { action, object, source } => Self::Io { action, object: object.clone(), source: again(source) },
            Self::Locked { dir, pid } => Self::Locked { dir: dir.clone(), pid: pid.clone() },
            Self::NotAStore { dir, why } => Self::NotAStore { dir: dir.clone(), why: why.clone() },
            Self::Corrupt { object, offset, what } => {
                Self::Corrupt { object: object.clone(), offset: *offset, what: what.clone() }
            }
            Self::Unknown { kind, name } => Self::Unknown { kind, name: *name },
            Self::ReadOnly { action } => Self::ReadOnly { action },
            Self::OutOfRange { offset, len, size } => Self::OutOfRange { offset: *offset, len: *len, size: *size },
            Self::Invalid(why) => Self::Invalid(why.clone()),
            Self::NotFound { what } => Self::NotFound { what: what.clone() },
            Self::HeadChanged { head, found } => Self::HeadChanged { head: head.clone(), found },
            Self::Cancelled => Self::Cancelled,
            Self::Source { offset, source } => Self::Source { offset: *offset, source: again(source) },
            Self::Damaged { faults, first } => Self::Damaged { faults: *faults, first: first.clone() },
        }
    }

    /// Whether the medium did not answer: nothing is wrong with the request, and it may succeed later.
    #[must_use]
    pub fn is_away(&self) -> bool {
        use io::ErrorKind as Kind;
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            Kind::TimedOut
                | Kind::NotConnected
                | Kind::ConnectionRefused
                | Kind::ConnectionReset
                | Kind::HostUnreachable
                | Kind::NetworkUnreachable
                | Kind::StaleNetworkFileHandle
        ))
    }

    /// Whether a read-only process may see this only because what it knows of the packs is old.
    pub(crate) fn may_be_stale(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::Corrupt { .. } | Self::Io { action: "read" | "open", .. })
    }
}
