//! RAM files: read-only images of guest memory, put together from zeros, ancestors' files and the file's own bytes.
//!
//! ```text
//! Pending (a holder has the bytes) --set_ram_committed--> Committed (the store has them)
//!    \-- the holder dies first: lost. Reads wait for ever, named in the counters; nothing wrong is served.
//! ```
//! A committed version holds the whole RAM, not the file's own pages alone: from then on the file stands on no
//! ancestor, however many it was forked through.
//!
//! A read that fails at the holder looks at the source again before it gives up, so the change needs no lock
//! around reads: the daemon ends the holder only after the mirror has acknowledged the commit.

mod holder;

pub use holder::{Holder, process_start};

use crate::control::RamSource;
use crate::resolve::{VersionError, Versions};
use base::{ByteRange, RamFileId, RamMap, Source};
use holder::HolderMemory;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, RwLock};
use thiserror::Error;

/// One RAM file.
pub(crate) struct RamObject {
    pub(crate) id: u64,
    pub(crate) map: RamMap,
    ancestors: BTreeSet<u64>,
    state: RwLock<Arc<State>>,
}

struct State {
    source: RamSource,
    /// Open while pending; or why it is not.
    memory: Option<Result<HolderMemory, String>>,
}

/// What a read cost.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct RamTally {
    pub(crate) from_holder_bytes: u64,
    pub(crate) from_store_bytes: u64,
    /// Compressed bytes the store read.
    pub(crate) store_bytes: u64,
}

/// Why a page cannot be served now. None is ever passed to the kernel: the reader waits.
#[derive(Debug, Error)]
pub(crate) enum RamError {
    /// The holder is gone and no version has taken its place.
    #[error(
        "RAM file {id:016x} is lost: its holder, process {pid}, is gone before the commit ({why}); remove the VMs that run on it"
    )]
    Lost { id: u64, pid: u32, why: String },
    /// The store cannot serve it.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The map names a file that is not there.
    #[error("RAM file {id:016x} stands on RAM file {ancestor:016x}, which is not there; add that first")]
    Ancestor { id: u64, ancestor: u64 },
}

impl RamObject {
    /// A RAM file with `source` for its own pages.
    pub(crate) fn new(id: u64, map: RamMap, source: RamSource) -> Self {
        let ancestors = map.files().into_keys().map(|f| f.0).filter(|&f| f != id).collect();
        Self { id, map, ancestors, state: RwLock::new(Arc::new(State::new(source))) }
    }

    /// The files that it needs to answer: those its map names, itself excepted, until it is committed.
    pub(crate) fn ancestors(&self) -> BTreeSet<u64> {
        match self.state().source {
            RamSource::Committed(_) => BTreeSet::new(),
            RamSource::Pending(_) | RamSource::Blank => self.ancestors.clone(),
        }
    }

    /// Where its own pages come from.
    pub(crate) fn source(&self) -> RamSource {
        self.state().source.clone()
    }

    /// The version that has the page at `offset`, where the store has it and it is not zero.
    pub(crate) fn stored(&self, offset: u64) -> Option<String> {
        match &self.state().source {
            RamSource::Committed(version) if self.map.lookup(offset).0 != Source::Zero => Some(version.clone()),
            _ => None,
        }
    }

    /// Why its holder cannot be read, where that is known.
    pub(crate) fn holder_error(&self) -> Option<String> {
        self.state().memory.as_ref().and_then(|m| m.as_ref().err().cloned())
    }

    /// Reads in flight keep the old source and, should it fail them, find the new one.
    pub(crate) fn set_source(&self, source: RamSource) {
        *self.state.write().expect("no writer panics") = Arc::new(State::new(source));
    }

    fn is_committed(&self) -> bool {
        matches!(self.state().source, RamSource::Committed(_))
    }

    fn state(&self) -> Arc<State> {
        self.state.read().expect("no writer panics").clone()
    }

    /// Fills `buf` from `offset`, wholly within the file.
    pub(crate) fn read(
        &self,
        files: &dyn Fn(u64) -> Option<Arc<RamObject>>,
        versions: &dyn Versions,
        offset: u64,
        buf: &mut [u8],
        tally: &mut RamTally,
    ) -> Result<(), RamError> {
        let mut at = offset;
        let end = offset + buf.len() as u64;
        while at < end {
            let (source, extent_end) = self.map.lookup(at);
            let piece = ByteRange::new(at, extent_end.min(end));
            let out = &mut buf[(piece.start - offset) as usize..(piece.end - offset) as usize];
            match source {
                Source::Zero => out.fill(0),
                Source::File(RamFileId(id)) if id == self.id || self.is_committed() => {
                    self.read_own(versions, at, out, tally)?;
                }
                Source::File(RamFileId(ancestor)) => files(ancestor)
                    .ok_or(RamError::Ancestor { id: self.id, ancestor })?
                    .read(files, versions, at, out, tally)?,
            }
            at = piece.end;
        }
        Ok(())
    }

    fn read_own(
        &self,
        versions: &dyn Versions,
        offset: u64,
        out: &mut [u8],
        tally: &mut RamTally,
    ) -> Result<(), RamError> {
        let mut state = self.state();
        loop {
            let failed = match (&state.source, &state.memory) {
                (RamSource::Blank, _) => {
                    out.fill(0);
                    return Ok(());
                }
                (RamSource::Committed(version), _) => {
                    tally.store_bytes += versions.read_at(version, offset, out)?;
                    tally.from_store_bytes += out.len() as u64;
                    return Ok(());
                }
                (RamSource::Pending(_), Some(Ok(memory))) => match memory.read_at(offset, out) {
                    Ok(()) => {
                        tally.from_holder_bytes += out.len() as u64;
                        return Ok(());
                    }
                    Err(e) => describe(&e),
                },
                (RamSource::Pending(_), Some(Err(why))) => why.clone(),
                (RamSource::Pending(_), None) => unreachable!("a pending source has opened its holder"),
            };
            let now = self.state();
            if Arc::ptr_eq(&now, &state) {
                let RamSource::Pending(holder) = state.source else { unreachable!("only a holder's read fails here") };
                return Err(RamError::Lost { id: self.id, pid: holder.pid, why: failed });
            }
            state = now;
        }
    }
}

impl State {
    fn new(source: RamSource) -> Self {
        let memory = match source {
            RamSource::Pending(holder) => Some(HolderMemory::open(holder).map_err(|e| describe(&e))),
            RamSource::Committed(_) | RamSource::Blank => None,
        };
        Self { source, memory }
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "its memory is no more".to_owned(),
        io::ErrorKind::NotFound => "no such process".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
