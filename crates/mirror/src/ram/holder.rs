//! Memory of a holder: the stopped copy of a hypervisor that keeps a snapshot's pages until they are committed.
//!
//! It is read through `/proc/<pid>/mem`, opened once: the descriptor names this very process, so a pid that is
//! reused can never be read by mistake, and a dead holder reads as end of file.

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Names a holder and says where RAM lies in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// When it started: field 22 of `/proc/<pid>/stat`, in clock ticks.
    pub start: u64,
    /// Address of the RAM region's first byte in it.
    pub address: u64,
}

/// A holder's memory, open.
#[derive(Debug)]
pub(crate) struct HolderMemory {
    holder: Holder,
    memory: File,
}

impl HolderMemory {
    /// Opens the holder's memory, and makes sure that it is the process meant.
    pub(crate) fn open(holder: Holder) -> io::Result<Self> {
        // All is opened below one directory descriptor, which stays with the process it was opened for.
        let path = format!("/proc/{}", holder.pid);
        let dir = rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let open = |name| rustix::fs::openat(&dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let memory = File::from(open("mem")?);
        let mut stat = String::new();
        File::from(open("stat")?).read_to_string(&mut stat)?;
        match start_time(&stat) {
            Some(start) if start == holder.start => Ok(Self { holder, memory }),
            Some(start) => Err(io::Error::other(format!(
                "process {} started at {start}, not at {}: the holder is gone and its pid is another's",
                holder.pid, holder.start
            ))),
            None => Err(io::Error::other(format!("{path}/stat has no start time: `{stat}`"))),
        }
    }

    /// Reads RAM bytes from `offset`.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(buf, self.holder.address + offset)
    }
}

/// Field 22 of a line of `/proc/<pid>/stat`; the name before it may hold anything, even spaces and brackets.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The start time of a running process, as [`Holder::start`] wants it.
///
/// # Errors
/// There is no such process.
pub fn process_start(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    start_time(&std::fs::read_to_string(&path)?).ok_or_else(|| io::Error::other(format!("{path} has no start time")))
}
