//! What can go wrong with a hypervisor, grouped by what the caller does next.

use std::path::PathBuf;
use std::time::Duration;

/// An error of a hypervisor or of its helpers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that is needed is not installed or cannot be started.
    #[error("cannot start {program}; `offshoot doctor` says what is missing")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// The process ended, by itself or by a signal.
    #[error("{what} (process {pid}) ended: {last_words}")]
    Died {
        /// Which process.
        what: &'static str,
        /// Its id.
        pid: u32,
        /// The end of its log.
        last_words: String,
    },
    /// The hypervisor refused a command.
    #[error("the hypervisor refused `{command}`: {reason}")]
    Refused {
        /// QMP command.
        command: String,
        /// Its `desc`.
        reason: String,
    },
    /// The hypervisor or the resident library did not answer in time.
    #[error("no answer to `{what}` within {limit:?}")]
    Timeout {
        /// What was asked.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// The resident library refused or is not there.
    #[error("resident library: {0}")]
    Resident(String),
    /// An operation on a file or socket failed.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
