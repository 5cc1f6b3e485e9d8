//! What can go wrong, as the daemon reads it behind `error`.

use std::fmt;
use std::io;

/// A failed request. The text goes to the daemon, which adds the VM's name.
#[derive(Debug)]
pub(crate) enum Error {
    /// The kernel refused something.
    Os { doing: String, source: io::Error },
    /// The hypervisor has not mapped its RAM yet.
    NoRam,
    /// A RAM map is in place; a second one would swap memory under a running guest.
    AlreadyMapped,
    /// The text of a RAM map is not one.
    BadMap { path: String, why: String },
    /// The RAM map is for RAM of another size.
    MapSize { path: String, map: u64, ram: u64 },
    /// A RAM file ends before an extent taken from it.
    ShortFile { path: String, size: u64, needed: u64 },
    /// A RAM map names files, and the library was not told where they lie.
    NoRamDir,
    /// The hypervisor maps a part of the RAM file that does not begin at its start.
    Offset { offset: i64 },
    /// `release` of a process that is no holder of this hypervisor.
    NoHolder { pid: String },
    /// No descriptor of a FUSE session was handed over at the start.
    NoFuse,
    /// Not a request of this protocol.
    UnknownRequest { line: String },
}

impl Error {
    /// Wraps `errno` of the call that just failed.
    pub(crate) fn last_os(doing: impl Into<String>) -> Self {
        Self::Os { doing: doing.into(), source: io::Error::last_os_error() }
    }

    /// The number for a hypervisor that expects one.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Os { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EINVAL,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The reply is one line and there is no other place for the source, so it is printed here.
            Self::Os { doing, source } => write!(f, "{doing}: {source}"),
            Self::NoRam => write!(f, "the hypervisor has not mapped its RAM yet; try again"),
            Self::AlreadyMapped => write!(f, "a RAM map is installed already; start a new hypervisor for another"),
            Self::BadMap { path, why } => write!(f, "RAM map {path}: {why}"),
            Self::MapSize { path, map, ram } => {
                write!(f, "RAM map {path} covers {map} bytes, the RAM has {ram}; start with the snapshot's memory size")
            }
            Self::ShortFile { path, size, needed } => {
                write!(f, "RAM file {path} has {size} bytes, its extent ends at {needed}")
            }
            Self::NoRamDir => write!(f, "the RAM map names files, but {} is not set", base::resident::ENV_RAM_DIR),
            Self::Offset { offset } => write!(f, "the RAM file is mapped from byte {offset}, not from its start"),
            Self::NoHolder { pid } => write!(f, "process {pid} is no holder of this hypervisor"),
            Self::NoFuse => write!(f, "no FUSE descriptor was given in {}", base::resident::ENV_FUSE),
            Self::UnknownRequest { line } => write!(f, "unknown request `{line}`"),
        }
    }
}
