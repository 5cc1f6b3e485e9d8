//! Bringing a hypervisor up: from a kernel, or from a frozen machine.

use super::Frozen;
use crate::error::{Error, Result};
use crate::node::Shared;
use crate::record::{Life, VmRecord};
use base::{RamFileId, RamMap};
use mirror::control::Below;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmm::passt;
use vmm::qemu::{self, Files, Launch, Qemu, Start};

/// What a VM starts from.
#[derive(Clone)]
pub enum Source {
    /// Its kernel, on disks that stand on these versions.
    Boot(Vec<String>),
    /// Its kernel, on the disks it has already: a reboot.
    Reboot,
    /// A machine that was frozen on this node and is perhaps not yet in the store.
    Frozen(Arc<Frozen>),
    /// A snapshot out of the store: its device state and disks.
    Snapshot {
        /// The RAM file that equals its RAM.
        ram: u64,
        /// The map to start with.
        map: RamMap,
        /// Device state.
        device: PathBuf,
        /// Versions of its disks.
        disks: Vec<String>,
    },
}

impl Source {
    /// The RAM the VM starts with: its map, and the file that equals it.
    pub(super) fn ram(&self, record: &VmRecord) -> (RamMap, Option<RamFileId>) {
        match self {
            Self::Boot(_) | Self::Reboot => (RamMap::zero(record.shape.memory_bytes()), None),
            Self::Frozen(frozen) => (frozen.start_map.clone(), Some(RamFileId(frozen.record.id))),
            Self::Snapshot { ram, map, .. } => (map.clone(), Some(RamFileId(*ram))),
        }
    }
}

/// Brings `record`'s hypervisor up to a running guest; its record says `Running` then. On failure nothing of it is
/// left but its directory.
pub(super) fn launch(
    shared: &Arc<Shared>,
    record: &mut VmRecord,
    source: &Source,
    wake: impl Fn() + Send + 'static,
) -> Result<Qemu> {
    let dir = shared.home.vm_dir(record.id);
    let mut undo = Undo { shared, record: record.clone(), processes: Vec::new(), keep: false };
    let mut laps = Laps::new();
    add_overlays(shared, record, source)?;
    laps.lap("disks");
    let (map, _) = source.ram(record);
    let map_file = dir.join("ram.map");
    crate::home::write_atomically(&map_file, map.encode().as_bytes(), false)?;
    let files = Files { dir: dir.clone() };
    let (net, helper_end) = passt::pair(&record.shape.nic.mac).map_err(Error::io("make the network of", &dir))?;
    let blank = shared.home.ram_file(shared.blank_ram(record.shape.memory_bytes())?);
    let disks: Vec<PathBuf> = record.overlays.iter().map(|&id| shared.home.disk_file(id)).collect();
    let disks: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let fuse = shared.mirror.fuse()?;
    let start = match source {
        Source::Boot(_) | Source::Reboot => Start::Boot {
            kernel: &record.origin.kernel,
            initrd: record.origin.initrd.as_deref(),
            cmdline: &record.origin.cmdline,
        },
        Source::Frozen(_) | Source::Snapshot { .. } => Start::Incoming,
    };
    let hypervisor = qemu::spawn(
        &record.shape,
        &Launch {
            name: &record.name,
            files: &files,
            library: &shared.library,
            ram_dir: &shared.home.path("mnt/ram"),
            ram_path: &blank,
            ram_map: Some(&map_file),
            disks: &disks,
            net: net.as_fd(),
            fuse: fuse.as_fd(),
            generation_id: &record.generation_id,
            start,
        },
    )?;
    undo.processes.push(hypervisor);
    laps.lap("spawn");
    // In the shadow of the hypervisor's own start.
    let helper = passt::start(&helper_end, &record.publish, &files.passt_log())?;
    undo.processes.push(helper);
    // The ends live in the two processes alone: either learns of the other's death.
    drop((net, helper_end));
    laps.lap("network");
    shared.mirror.register_vm(&record.name, hypervisor.pid)?;
    let mut qemu = Qemu::connect(hypervisor, &files, wake)?;
    laps.lap("connect");
    let device = match source {
        Source::Frozen(frozen) => Some(&frozen.device),
        Source::Snapshot { device, .. } => Some(device),
        Source::Boot(_) | Source::Reboot => None,
    };
    if let Some(device) = device {
        let state = File::open(device).map_err(Error::io("open", device))?;
        qemu.load(state.as_fd())?;
    }
    laps.lap("load");
    passt::await_listening(&helper, &record.publish, &files.passt_log())?;
    laps.lap("listen");
    log::debug!("{}: {}", record.name, laps.0);
    undo.keep = true;
    drop(undo);
    record.life = Life::Running { hypervisor, passt: helper };
    record.save(&dir)?;
    Ok(qemu)
}

/// How long each part of a launch took, for the log.
struct Laps(String, std::time::Instant);

impl Laps {
    fn new() -> Self {
        Self(String::from("launched"), std::time::Instant::now())
    }

    fn lap(&mut self, what: &str) {
        use std::fmt::Write as _;
        let _ = write!(self.0, " {what} {:.1} ms", self.1.elapsed().as_secs_f64() * 1e3);
        self.1 = std::time::Instant::now();
    }
}

fn add_overlays(shared: &Arc<Shared>, record: &VmRecord, source: &Source) -> Result<()> {
    let below: Vec<Below> = match source {
        Source::Reboot => return Ok(()),
        Source::Boot(versions) | Source::Snapshot { disks: versions, .. } => {
            versions.iter().map(|v| Below::Version(v.clone())).collect()
        }
        Source::Frozen(frozen) => frozen.record.views.iter().map(|&view| Below::View(view)).collect(),
    };
    for ((disk, &id), below) in record.shape.disks.iter().zip(&record.overlays).zip(below) {
        shared.mirror.add_overlay(id, &record.name, disk.bytes, disk.block_bytes, below)?;
    }
    Ok(())
}

/// Takes back what a failed launch made.
struct Undo<'a> {
    shared: &'a Arc<Shared>,
    record: VmRecord,
    processes: Vec<vmm::process::ProcessId>,
    keep: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for process in self.processes.iter().rev() {
            process.end(std::time::Duration::ZERO);
        }
        let _ = self.shared.mirror.unregister_vm(&self.record.name);
    }
}
