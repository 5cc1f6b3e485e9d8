//! Freezing a running VM: the pause itself, and the record of what was frozen.

use super::Frozen;
use super::owner::Owner;
use crate::error::{Error, Result};
use crate::lineage;
use crate::record::{self, FreezeRecord};
use crate::sys;
use base::{ByteRange, RamFileId, RamMap};
use std::collections::BTreeMap;
use vmm::process::ProcessId;
use vmm::qemu::Freeze;

/// Names of the parts of a pause, in order.
const PARTS: [&str; 5] = ["stop", "device", "ram", "disks", "continue"];

impl Owner {
    /// Freezes the guest and lets it go on; what was frozen is registered with the mirror and on record, so that
    /// copies may start and any later daemon can bring it into the store.
    pub(super) fn freeze(&mut self, id: u64, tag: Option<String>) -> Result<Frozen> {
        self.refuse_if_waiting()?;
        let shared = self.shared.clone();
        let overlays = self.record.overlays.clone();
        let views = overlays.iter().map(|_| shared.home.new_id()).collect::<Result<Vec<u64>>>()?;
        for &overlay in &overlays {
            shared.mirror.flush(overlay)?;
        }
        let mark = || -> Result<()> {
            overlays.iter().zip(&views).try_for_each(|(&overlay, &view)| shared.mirror.mark(overlay, view))
        };
        // A freeze forgets the events that came before it.
        self.events();
        let full = self.full;
        // Whatever happens from here, what the library tracked may be consumed: only success says otherwise.
        self.full = true;
        let taken = self.qemu()?.freeze::<Error>(full, mark)?;
        let holder = ProcessId { pid: taken.ram.holder, start: taken.ram.start };
        match self.keep_frozen(id, views, tag, &taken, holder) {
            Ok(frozen) => Ok(frozen),
            Err(error) => {
                // Nobody may take for held what is no longer so.
                shared.forget_pending(id);
                let _ = self.qemu()?.resident().release(holder.pid);
                Err(error)
            }
        }
    }

    fn keep_frozen(
        &mut self,
        id: u64,
        views: Vec<u64>,
        tag: Option<String>,
        taken: &Freeze,
        holder: ProcessId,
    ) -> Result<Frozen> {
        let shared = self.shared.clone();
        let size = self.record.shape.memory_bytes();
        let ram = &taken.ram;
        let (before, base_ram, written) = if ram.tracked {
            (self.folded_map(), self.equals, ram.written.clone())
        } else {
            let pages = sys::pages(holder.pid, ram.ram, size).map_err(Error::io("read the pages of", self.dir()))?;
            (self.start_map.clone(), self.record.start_ram.map(RamFileId), sys::ranges(&pages.private))
        };
        let exact = lineage::frozen(&before, &written, &ram.zeroed, RamFileId(id));
        let pair = |r: &ByteRange| (r.start, r.end);
        let record = FreezeRecord {
            id,
            vm: self.record.name.clone(),
            vm_id: self.record.id,
            created: record::now(),
            tag,
            shape: self.record.shape.clone(),
            origin: self.record.origin.clone(),
            generation: self.record.generation,
            publish: self.record.publish.clone(),
            pause_ms: taken.pause.as_secs_f64() * 1e3,
            map: exact.encode(),
            base_ram: base_ram.map(|r| r.0),
            written: written.iter().map(pair).collect(),
            zeroed: ram.zeroed.iter().map(pair).collect(),
            holder,
            address: ram.ram,
            views,
        };
        let device = shared.home.path(&format!("pending/{id:016x}.device"));
        std::fs::write(&device, &taken.device_state).map_err(Error::io("write", &device))?;
        record::save(&shared.home.path(&format!("pending/{id:016x}.json")), &record)?;
        shared.mirror.add_ram_pending(id, &exact, holder, ram.ram)?;
        let start_map = lineage::start(&exact, RamFileId(id), base::resident::MAPPINGS_MAX * 3 / 4);
        // Each file that the map names is kept, with its version in the store, for as long as the VM lives: what the
        // VM builds upon must stay as bounded over any number of freezes as what its copies start with.
        self.map = start_map.clone();
        self.equals = Some(RamFileId(id));
        self.full = false;
        self.freezes += 1;
        self.publish_view();
        let mut parts: BTreeMap<String, f64> =
            PARTS.iter().zip(taken.parts).map(|(name, part)| ((*name).to_owned(), part.as_secs_f64() * 1e3)).collect();
        parts.insert("ram_fork".into(), ram.fork_us as f64 / 1e3);
        parts.insert("ram_scan".into(), ram.scan_us as f64 / 1e3);
        Ok(Frozen { record, start_map, device, parts })
    }

    /// The map of the last freeze, with few files: once its own file is in the store it answers for every page, so
    /// the many small ones of a VM that is forked often need not be kept for ever.
    fn folded_map(&self) -> RamMap {
        match self.equals {
            Some(id) if self.shared.versions.lock().expect("no holder panics").contains_key(&id.0) => {
                lineage::start(&self.map, id, base::resident::MAPPINGS_MAX * 3 / 4)
            }
            _ => self.map.clone(),
        }
    }

    /// A vCPU that waits for a page cannot be stopped until the page arrives: a freeze now would hang the VM's
    /// owner with it.
    fn refuse_if_waiting(&self) -> Result<()> {
        match self.shared.mirror.waits(&self.record.name)? {
            Some(why) => {
                Err(Error::Conflict(format!("{} waits for a page ({why}); try again when it runs", self.record.name)))
            }
            None => Ok(()),
        }
    }
}
