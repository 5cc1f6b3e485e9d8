//! What survives the daemon: records of VMs and of snapshots that are not yet in the store.

use crate::error::{Error, Result};
use crate::home::write_atomically;
use base::{ByteRange, RamMap};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use vmm::MachineShape;
use vmm::passt::Publish;
use vmm::process::ProcessId;

/// What a family of VMs was booted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Name of the image.
    pub image: String,
    /// Kernel on this host.
    pub kernel: PathBuf,
    /// Initial RAM disk on this host.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// Where a VM's RAM and disks came from when its hypervisor started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id, the name of its directory.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// When it was started, RFC 3339 in UTC.
    pub created: String,
    /// What its family was booted from.
    pub origin: Origin,
    /// Name of the VM or snapshot it was started from.
    pub parent: Option<String>,
    /// Forks between it and the cold boot.
    pub generation: u32,
    /// Its machine.
    pub shape: MachineShape,
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Its disk overlays in the mirror, one for each disk.
    pub overlays: Vec<u64>,
    /// RAM file that equals its RAM at the start; none for a boot.
    pub start_ram: Option<u64>,
    /// Generation id that its guest sees.
    pub generation_id: String,
    /// Its life.
    pub life: Life,
}

/// The life of a VM, as far as a later daemon must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Being started: a later daemon removes what there is of it.
    Starting,
    /// Running: a later daemon adopts it.
    Running {
        /// Its hypervisor.
        hypervisor: ProcessId,
        /// Its network helper.
        passt: ProcessId,
    },
    /// Ended.
    Stopped {
        /// What ended it.
        detail: String,
    },
}

impl VmRecord {
    /// Writes it to the VM's directory.
    ///
    /// # Errors
    /// Names the file.
    pub fn save(&self, dir: &Path) -> Result<()> {
        save(&dir.join("vm.json"), self)
    }

    /// Reads it.
    ///
    /// # Errors
    /// Names the file, and what is wrong in it.
    pub fn load(dir: &Path) -> Result<Self> {
        load(&dir.join("vm.json"))
    }
}

/// A frozen VM whose snapshot is not yet in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FreezeRecord {
    /// Its id, also of its RAM file.
    pub id: u64,
    /// The VM it was taken of.
    pub vm: String,
    /// Id of that VM.
    pub vm_id: u64,
    /// When, RFC 3339 in UTC.
    pub created: String,
    /// Tag it is to be published under; none for a fork.
    pub tag: Option<String>,
    /// The machine.
    pub shape: MachineShape,
    /// What its family was booted from.
    pub origin: Origin,
    /// Generation of the VM it was taken of.
    pub generation: u32,
    /// Published ports of that VM.
    pub publish: Vec<Publish>,
    /// How long the VM stood still, in milliseconds.
    pub pause_ms: f64,
    /// The RAM map: [`base::RamMap::encode`].
    pub map: String,
    /// RAM file whose content the changes below are relative to; none for zero RAM.
    pub base_ram: Option<u64>,
    /// Changed ranges of RAM, first byte and end.
    pub written: Vec<(u64, u64)>,
    /// Discarded ranges of RAM.
    pub zeroed: Vec<(u64, u64)>,
    /// The process that holds the frozen RAM.
    pub holder: ProcessId,
    /// Where RAM lies in it.
    pub address: u64,
    /// Frozen views of the disks in the mirror.
    pub views: Vec<u64>,
}

impl FreezeRecord {
    /// Reads it from `path`, and checks what everything behind relies on.
    ///
    /// # Errors
    /// Names the file, and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self> {
        let record: Self = load(path)?;
        match record.fault() {
            None => Ok(record),
            Some(reason) => Err(Error::Damaged { path: path.to_owned(), reason }),
        }
    }

    fn fault(&self) -> Option<String> {
        let [ram] = &self.shape.ram[..] else { return Some(format!("{} regions of RAM", self.shape.ram.len())) };
        let map = match RamMap::decode(&self.map) {
            Ok(map) => map,
            Err(error) => return Some(error.to_string()),
        };
        if map.size() != ram.bytes {
            return Some(format!("a map of {} bytes for RAM of {}", map.size(), ram.bytes));
        }
        let wrong = [&self.written, &self.zeroed].into_iter().find_map(|ranges| {
            let mut at = 0;
            ranges.iter().find(|&&(start, end)| {
                let fits = start >= at && start < end && end <= ram.bytes && (start | end).is_multiple_of(base::PAGE);
                at = end;
                !fits
            })
        });
        wrong.map(|(start, end)| format!("no range of RAM goes from {start:#x} to {end:#x} there"))
    }

    /// Bytes that changed.
    #[must_use]
    pub fn changed_bytes(&self) -> u64 {
        self.written.iter().map(|(start, end)| end - start).sum()
    }

    /// The changed ranges.
    #[must_use]
    pub fn written(&self) -> Vec<ByteRange> {
        self.written.iter().map(|&(start, end)| ByteRange::new(start, end)).collect()
    }

    /// The discarded ranges.
    #[must_use]
    pub fn zeroed(&self) -> Vec<ByteRange> {
        self.zeroed.iter().map(|&(start, end)| ByteRange::new(start, end)).collect()
    }
}

/// What a published snapshot's manifest says beside its versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// Its id, also of its RAM file.
    pub id: u64,
    /// The VM it was taken of.
    pub vm: String,
    /// Its tag.
    pub tag: Option<String>,
    /// When, RFC 3339 in UTC.
    pub created: String,
    /// The machine.
    pub shape: MachineShape,
    /// What its family was booted from.
    pub origin: Origin,
    /// Generation of the VM it was taken of.
    pub generation: u32,
    /// How long the VM stood still, in milliseconds.
    pub pause_ms: f64,
    /// The RAM map.
    pub map: String,
    /// Views of its disks in the mirror.
    pub views: Vec<u64>,
    /// Bytes the store grew by.
    pub stored_bytes: u64,
    /// Bytes that were written and not stored: free pages.
    #[serde(default)]
    pub dropped_bytes: u64,
    /// Where the guest's kernel keeps the note that colors begin with, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<u64>,
}

/// Writes a record; what it describes dies with the host, so a power cut need not keep it.
///
/// # Errors
/// Names the file.
pub fn save(path: &Path, record: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(record).expect("records serialise");
    write_atomically(path, &bytes, false)
}

/// Reads a record.
///
/// # Errors
/// Names the file, and what is wrong in it.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Damaged { path: path.to_owned(), reason: e.to_string() })
}

/// Now, as records and lists write it: RFC 3339 in UTC.
#[must_use]
pub fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

#[cfg(test)]
mod fuzz;
