//! What can go wrong with an image, grouped by what the caller must do next.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// Why an image could not be built, imported, listed or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is refused as a whole.
    #[error("{}: {why}", path.display())]
    Refused {
        /// The file or directory given.
        path: PathBuf,
        /// What is wrong with it, and what would be accepted.
        why: String,
    },
    /// One entry of an archive is refused, and so the archive.
    #[error("{}: entry `{entry}`: {why}", archive.display())]
    Entry {
        /// The archive.
        archive: PathBuf,
        /// Name of the entry, as written there.
        entry: String,
        /// What is wrong with it.
        why: String,
    },
    /// A program that the work needs is not installed.
    #[error("`{tool}` is not installed; install the Debian package {package} (`make setup` does)")]
    NoTool {
        /// The program.
        tool: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// A program failed.
    #[error("`{tool}` failed while {doing} ({status}){}{words}", if words.is_empty() { "" } else { ": " })]
    Tool {
        /// The program.
        tool: &'static str,
        /// What it was run for.
        doing: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last words.
        words: String,
    },
    /// The operating system refused something.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// A verb: `read`, `create`.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
}

impl Error {
    pub(super) fn io(doing: &'static str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::Io { doing, path: path.to_owned(), source: source.into() }
    }

    pub(super) fn refused(path: &Path, why: impl Into<String>) -> Self {
        Self::Refused { path: path.to_owned(), why: why.into() }
    }
}

impl From<Error> for crate::Error {
    /// Groups by what the caller does next; nothing of the causes is lost.
    fn from(error: Error) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        match error {
            Error::Refused { .. } | Error::Entry { .. } => Self::Invalid(text),
            Error::NoTool { .. } | Error::Tool { .. } => Self::Host(text),
            Error::Io { doing, path, source } => Self::Io { doing, path, source },
        }
    }
}
