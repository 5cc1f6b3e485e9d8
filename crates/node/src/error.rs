//! Errors of the node, grouped by what the caller does next.

use api::{ErrorBody, ErrorKind};
use std::path::PathBuf;

/// An error of the node.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// What it names is not there.
    #[error("{0}")]
    NotFound(String),
    /// It exists already, or is busy.
    #[error("{0}")]
    Conflict(String),
    /// The host lacks something.
    #[error("{0}")]
    Host(String),
    /// The hypervisor or a helper failed.
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The mirror refused or is away.
    #[error("mirror: {0}")]
    Mirror(String),
    /// A file operation failed.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A record of ours is not as we wrote it.
    #[error("{path} is damaged: {reason}; move it away to go on without it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The VM's owner is gone: the daemon is shutting down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl Error {
    /// For `map_err`: names the operation and the path.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether the store did not answer.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_away())
    }

    /// How it goes over the wire.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let full = matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
        let kind = match self {
            Self::Invalid(_) | Self::Store(store::Error::Invalid(_) | store::Error::OutOfRange { .. }) => {
                ErrorKind::Invalid
            }
            Self::NotFound(_) | Self::Store(store::Error::NotFound { .. }) => ErrorKind::NotFound,
            Self::Conflict(_) | Self::Store(store::Error::HeadChanged { .. }) => ErrorKind::Conflict,
            Self::Host(_) | Self::Vmm(vmm::Error::Spawn { .. } | vmm::Error::Died { .. }) => ErrorKind::Host,
            Self::Store(store::Error::NoSpace { .. }) => ErrorKind::Host,
            Self::Store(error) if error.is_away() => ErrorKind::Host,
            _ if full => ErrorKind::Host,
            _ => ErrorKind::Internal,
        };
        ErrorBody { kind, message: self.whole() }
    }

    /// What happened and why, down to the first cause.
    #[must_use]
    pub fn whole(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            let words = next.to_string();
            if !text.contains(&words) {
                text = format!("{text}: {words}");
            }
            cause = next.source();
        }
        text
    }
}

/// Result of the node.
pub type Result<T> = std::result::Result<T, Error>;
