//! Bringing a hypervisor up: from a kernel, or from a frozen machine.

use super::Frozen;
use crate::error::{Error, Result};
use crate::foresight::{self, Ahead};
use crate::node::Shared;
use crate::record::{Life, VmRecord};
use crate::sys;
use base::{RamFileId, RamMap};
use mirror::control::{Below, OfDisk};
use rustix::pipe::PipeFlags;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use vmm::passt;
use vmm::process::ProcessId;
use vmm::qemu::{self, Files, Launch, Qemu, Start};

/// What a VM starts from.
#[derive(Clone)]
pub enum Source {
    /// Its kernel, on disks that stand on these versions.
    Boot {
        /// Versions of its disks.
        disks: Vec<String>,
        /// What is fetched ahead of them.
        ahead: Option<DisksAhead>,
    },
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
        /// What is fetched ahead.
        ahead: Option<Ahead>,
        /// What is fetched ahead of its disks.
        disks_ahead: Option<DisksAhead>,
    },
}

/// What is fetched ahead of a VM's disks, and learnt of them.
#[derive(Clone, Debug)]
pub struct DisksAhead {
    /// The head of the image or snapshot that they are of.
    pub(crate) of: String,
    pub(crate) wanted: foresight::disk::Wanted,
}

/// What is to become a [`Source`], or none where the freeze failed, or what is needed of a snapshot cannot be had.
pub type Coming = Receiver<Source>;

/// How a VM comes to what it starts from.
pub enum Starting {
    /// It is there.
    From(Source),
    /// The machine is being frozen, or fetched: the hypervisor is started meanwhile, and waits.
    Meanwhile(Coming),
}

impl Source {
    /// The RAM the VM starts with: its map, and the file that equals it.
    pub(super) fn ram(&self, record: &VmRecord) -> (RamMap, Option<RamFileId>) {
        match self {
            Self::Boot { .. } | Self::Reboot => (RamMap::zero(record.shape.memory_bytes()), None),
            Self::Frozen(frozen) => (frozen.start_map.clone(), Some(RamFileId(frozen.record.id))),
            Self::Snapshot { ram, map, .. } => (map.clone(), Some(RamFileId(*ram))),
        }
    }
}

/// A hypervisor under way that has not got to its RAM and disks; ends when it is dropped.
pub(super) struct Shell<'a> {
    undo: Undo<'a>,
    hypervisor: ProcessId,
    helper: ProcessId,
    /// The end of its gate that lets it in, where it stands before one.
    gate: Option<OwnedFd>,
}

/// Starts the hypervisor and the network helper of `record`. Where `gated`, what it starts from need not be there
/// yet: that comes with [`launch`].
pub(super) fn spawn<'a>(
    shared: &'a Arc<Shared>,
    record: &VmRecord,
    start: Start<'_>,
    gated: bool,
) -> Result<Shell<'a>> {
    let dir = shared.home.vm_dir(record.id);
    let mut undo = Undo { shared, record: record.clone(), processes: Vec::new(), keep: false };
    let files = Files { dir: dir.clone() };
    let (net, helper_end) = passt::pair(&record.shape.nic.mac, passt::peer(record.generation))
        .map_err(Error::io("make the network of", &dir))?;
    let blank = shared.home.ram_file(shared.blank_ram(record.shape.memory_bytes())?);
    let disks: Vec<PathBuf> = record.overlays.iter().map(|&id| shared.home.disk_file(id)).collect();
    let disks: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let fuse = shared.mirror.fuse()?;
    let (wait, gate) = match gated {
        true => rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map(|(wait, gate)| (Some(wait), Some(gate)))
            .map_err(|e| Error::io("make a pipe for", &dir)(e.into()))?,
        false => (None, None),
    };
    let hypervisor = qemu::spawn(
        &record.shape,
        &Launch {
            name: &record.name,
            files: &files,
            library: &shared.library,
            ram_dir: &shared.home.path("mnt/ram"),
            ram_path: &blank,
            ram_map: Some(&map_file(&dir)),
            disks: &disks,
            net: net.as_fd(),
            fuse: fuse.as_fd(),
            generation_id: &record.generation_id,
            start,
            gate: wait.as_ref().map(AsFd::as_fd),
        },
    )?;
    undo.processes.push(hypervisor);
    if gated {
        // The freeze that it waits for must not be slower for it.
        sys::give_way(hypervisor.pid, true);
    }
    // In the shadow of the hypervisor's own start.
    let helper = passt::start(&helper_end, passt::peer(record.generation), &record.publish, &files.passt_log())?;
    undo.processes.push(helper);
    // The ends live in the two processes alone: either learns of the other's death.
    drop((net, helper_end));
    Ok(Shell { undo, hypervisor, helper, gate })
}

fn map_file(dir: &Path) -> PathBuf {
    dir.join("ram.map")
}

/// Brings `record`'s hypervisor up to a running guest, that of `shell` where there is one already; its record says
/// `Running` then. On failure nothing of it is left but its directory.
pub(super) fn launch(
    shared: &Arc<Shared>,
    record: &mut VmRecord,
    source: &Source,
    shell: Option<Shell<'_>>,
    wake: impl Fn() + Send + 'static,
) -> Result<Qemu> {
    let dir = shared.home.vm_dir(record.id);
    let files = Files { dir: dir.clone() };
    let mut laps = Laps::new();
    add_overlays(shared, record, source)?;
    look_ahead_of_disks(shared, record, source);
    laps.lap("disks");
    let (map, _) = source.ram(record);
    crate::home::write_atomically(&map_file(&dir), map.encode().as_bytes(), false)?;
    let mut known = Vec::new();
    if let Source::Snapshot { ahead: Some(ahead), .. } = source
        && ahead.fetches()
    {
        // In the shadow of the hypervisor's start. Where it fails, it does so again below, and is told there. The kernel
        // takes no pages of files that it has not heard of: they are open until the hypervisor has them.
        known.extend(map.files().into_keys().filter_map(|id| File::open(shared.home.ram_file(id.0)).ok()));
        let _ = shared.mirror.foresee(ahead.spec(&record.name, &map, None));
    }
    if matches!(source, Source::Boot { .. } | Source::Reboot) {
        for file in [Some(&record.origin.kernel), record.origin.initrd.as_ref()].into_iter().flatten() {
            crate::image::ensure_file(&shared.store, file)?;
        }
    }
    let start = match source {
        Source::Boot { .. } | Source::Reboot => Start::Boot {
            kernel: &record.origin.kernel,
            initrd: record.origin.initrd.as_deref(),
            cmdline: &record.origin.cmdline,
        },
        Source::Frozen(_) | Source::Snapshot { .. } => Start::Incoming,
    };
    let Shell { mut undo, hypervisor, helper, gate } = match shell {
        Some(shell) => shell,
        None => spawn(shared, record, start, false)?,
    };
    if let Some(gate) = gate {
        sys::give_way(hypervisor.pid, false);
        // One that is gone already is found out by what follows, with its last words.
        let _ = rustix::io::write(gate, b"+");
    }
    laps.lap("spawn");
    shared.mirror.register_vm(&record.name, hypervisor.pid)?;
    let mut qemu = Qemu::connect(hypervisor, &files, wake)?;
    laps.lap("connect");
    let device = match source {
        Source::Frozen(frozen) => Some(&frozen.device),
        Source::Snapshot { device, .. } => Some(device),
        Source::Boot { .. } | Source::Reboot => None,
    };
    if let Some(device) = device {
        let state = File::open(device).map_err(Error::io("open", device))?;
        qemu.load(state.as_fd())?;
    }
    drop(known);
    laps.lap("load");
    if let Source::Snapshot { ahead: Some(ahead), .. } = source {
        look_ahead(shared, record, ahead, &map, &mut qemu);
        laps.lap("ahead");
    }
    passt::await_listening(&helper, &record.publish, &files.passt_log())?;
    laps.lap("listen");
    log::debug!("{}: {}", record.name, laps.0);
    undo.keep = true;
    drop(undo);
    record.life = Life::Running { hypervisor, passt: helper };
    record.save(&dir)?;
    Ok(qemu)
}

/// Has the mirror fetch ahead and record; where that fails, the guest runs all the same.
fn look_ahead(shared: &Arc<Shared>, record: &VmRecord, ahead: &Ahead, map: &RamMap, qemu: &mut Qemu) {
    if ahead.record
        && let Err(error) = qemu.resident().watch()
    {
        log::warn!("{}: recorded with the neighbours of what it touches: {error}", record.name);
    }
    let begun = qemu
        .resident()
        .hello()
        .map_err(Error::from)
        .and_then(|hello| shared.mirror.foresee(ahead.spec(&record.name, map, Some(hello.ram))));
    match begun {
        Ok(()) if ahead.record => ahead.learn(shared, &record.name),
        Ok(()) => {}
        Err(error) => log::warn!("{}: nothing is fetched ahead: {}", record.name, error.whole()),
    }
}

/// Has blocks fetched ahead, and what is read recorded, before anything reads.
fn look_ahead_of_disks(shared: &Arc<Shared>, record: &VmRecord, source: &Source) {
    let (Source::Boot { disks, ahead: Some(ahead) } | Source::Snapshot { disks, disks_ahead: Some(ahead), .. }) =
        source
    else {
        return;
    };
    let named = record.shape.disks.iter().zip(disks).zip(&record.overlays);
    let named =
        named.filter_map(|((disk, version), &id)| Some((disk.id.clone(), version.parse().ok()?, OfDisk::Overlay(id))));
    foresight::disk::begin(shared, &ahead.of, &named.collect::<Vec<_>>(), ahead.wanted.clone());
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
        Source::Boot { disks: versions, .. } | Source::Snapshot { disks: versions, .. } => {
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
    processes: Vec<ProcessId>,
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
