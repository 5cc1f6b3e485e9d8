//! The bytes of RAM files, read beside the mirror: nothing that is counted or cached for a guest changes.

use crate::node::Shared;
use crate::sys::ProcessMemory;
use base::{RamFileId, RamMap, Source};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use store::BlockSource;

/// Reads RAM files where their bytes are: in the store, or, of what is frozen and not yet stored, in a holder.
pub(super) struct Template<'a> {
    shared: &'a Shared,
    frozen: RefCell<HashMap<u64, Rc<Frozen>>>,
}

/// A freeze that is not in the store.
struct Frozen {
    map: RamMap,
    holder: ProcessMemory,
}

impl<'a> Template<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, frozen: RefCell::default() }
    }

    /// Fills `buf` from `offset` of RAM file `id`.
    ///
    /// # Errors
    /// `WouldBlock`: it is in a store far away. Else what the store or the holder met.
    pub(super) fn read(&self, id: u64, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let version = self.shared.versions.lock().expect("no holder panics").get(&id).copied();
        if let Some(version) = version {
            if self.shared.is_shared() {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "its snapshot is in a store far away"));
            }
            return self.shared.store.read_at(&version, offset, buf).map(drop).map_err(io::Error::other);
        }
        if self.shared.blank_ids().contains(&id) {
            buf.fill(0);
            return Ok(());
        }
        let frozen = self.frozen(id)?;
        let (mut at, end) = (offset, offset + buf.len() as u64);
        while at < end {
            let (source, until) = frozen.map.lookup(at);
            let until = until.min(end);
            let part = &mut buf[(at - offset) as usize..(until - offset) as usize];
            match source {
                Source::Zero => part.fill(0),
                // What the map names as the file's own the holder has written, so that reading brings nothing in.
                Source::File(RamFileId(file)) if file == id => frozen.holder.read(at, part)?,
                Source::File(RamFileId(file)) => self.read(file, at, part)?,
            }
            at = until;
        }
        Ok(())
    }

    fn frozen(&self, id: u64) -> io::Result<Rc<Frozen>> {
        if let Some(found) = self.frozen.borrow().get(&id) {
            return Ok(found.clone());
        }
        let pending = self.shared.pending.lock().expect("no holder panics");
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("RAM file {id:016x} is not known"));
        let record = pending.get(&id).ok_or_else(gone)?;
        let holder = ProcessMemory { pid: record.holder.pid, address: record.address };
        let map = RamMap::decode(&record.map).map_err(io::Error::other)?;
        drop(pending);
        let frozen = Rc::new(Frozen { map, holder });
        self.frozen.borrow_mut().insert(id, frozen.clone());
        Ok(frozen)
    }
}
