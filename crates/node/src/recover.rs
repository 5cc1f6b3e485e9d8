//! Taking over from a daemon that died: what runs is adopted, what was frozen is brought into the store, what is
//! neither is cleared away.

use crate::commit::Committer;
use crate::error::{Error, Result};
use crate::home::Home;
use crate::node::{Shared, Slot};
use crate::record::{FreezeRecord, Life, SnapshotMeta, VmRecord};
use crate::snapshots::meta;
use crate::vm;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmm::process::ProcessId;
use vmm::qemu::Files;
use vmm::resident::Resident;

/// The FUSE descriptor that some hypervisor's resident library kept, when no mirror is alive. Those that were being
/// started are asked as well: while their session has no mirror, not even SIGKILL ends one that waits for a page.
pub(crate) fn kept_descriptor(home: &Home) -> Option<OwnedFd> {
    for (dir, record) in records(home) {
        match record.life {
            Life::Running { hypervisor, .. } if hypervisor.alive() => {}
            Life::Starting => {}
            Life::Running { .. } | Life::Stopped { .. } => continue,
        }
        match Resident::connect(&Files { dir }.resident()).and_then(|mut r| r.fuse()) {
            Ok(fd) => return Some(fd),
            Err(error) if record.life == Life::Starting => {
                log::debug!("{} gives no FUSE descriptor: {error}", record.name)
            }
            Err(error) => log::warn!("{} gives no FUSE descriptor: {error}", record.name),
        }
    }
    None
}

/// Brings the node's tables to what is there.
pub(crate) fn recover(shared: &Arc<Shared>, committer: &Committer) -> Result<()> {
    // Of a store that is away nothing is known yet: it is recalled when it is needed and there.
    shared.recall().or_else(|error| if error.is_away() { Ok(()) } else { Err(error) })?;
    for (id, size) in shared.mirror.blanks()? {
        shared.set_blank(size, id);
    }
    let pending = pending(shared)?;
    shared.pending.lock().expect("no holder panics").extend(pending.iter().map(|r| (r.id, r.clone())));
    for (dir, record) in records(&shared.home) {
        let name = record.name.clone();
        let slot = match record.life {
            Life::Running { hypervisor, .. } if hypervisor.alive() => {
                match vm::adopt(shared, record.clone(), hypervisor) {
                    Ok(vm) => Some(vm),
                    Err(error) => {
                        log::error!("{name} runs but cannot be adopted, ending it: {error}");
                        hypervisor.end(Duration::ZERO);
                        clear(shared, &record);
                        None
                    }
                }
            }
            Life::Running { passt, .. } => {
                passt.end(Duration::ZERO);
                let words = vmm::process::last_words(&Files { dir }.hypervisor_log());
                Some(vm::keep_stopped(shared, record, format!("ended while no daemon ran: {words}"))?)
            }
            Life::Stopped { ref detail } => {
                let detail = detail.clone();
                Some(vm::keep_stopped(shared, record, detail)?)
            }
            Life::Starting => {
                log::warn!("{name} was being started when the daemon died: clearing it away");
                clear(shared, &record);
                None
            }
        };
        if let Some(vm) = slot {
            shared.slots.lock().expect("no holder panics").insert(name, Slot::Vm(vm));
        }
    }
    clear_strays(shared);
    for record in pending {
        committer.submit(record.id);
    }
    Ok(())
}

impl Shared {
    /// Learns where RAM files and views are in the store, unless that is known.
    pub(crate) fn recall(&self) -> Result<()> {
        let mut recalled = self.recalled.lock().expect("no holder panics");
        if *recalled {
            return Ok(());
        }
        for prefix in [self.own_heads("freeze"), "snap/".to_owned()] {
            for head in self.store.heads(&prefix)? {
                if let Some((manifest, _)) = self.store.head(&head)? {
                    self.learn(&manifest, &meta(&head, &manifest)?);
                }
            }
        }
        *recalled = true;
        Ok(())
    }

    /// Notes where the content of a snapshot is.
    pub(crate) fn learn(&self, manifest: &store::Manifest, meta: &SnapshotMeta) {
        if let Some(note) = meta.note {
            self.notes.lock().expect("no holder panics").insert(meta.id, note);
        }
        let mut table = self.versions.lock().expect("no holder panics");
        if let Some(&ram) = manifest.versions.get(&meta.shape.ram[0].id) {
            table.insert(meta.id, ram);
        }
        for (disk, &view) in meta.shape.disks.iter().zip(&meta.views) {
            if let Some(&version) = manifest.versions.get(&disk.id) {
                table.insert(view, version);
            }
        }
    }
}

/// The freezes on record whose RAM is still held; the others are forgotten by name.
fn pending(shared: &Arc<Shared>) -> Result<Vec<FreezeRecord>> {
    let dir = shared.home.path("pending");
    let mut out = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
        let path = entry.map_err(Error::io("list", &dir))?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let record = FreezeRecord::load(&path)?;
        if record.holder.alive() {
            out.push(record);
            continue;
        }
        log::error!("the RAM frozen of {} at {} is lost: the process that held it is gone", record.vm, record.created);
        let _ = std::fs::remove_file(path.with_extension("device"));
        let _ = std::fs::remove_file(path);
    }
    for entry in std::fs::read_dir(&dir).map_err(Error::io("list", &dir))?.flatten() {
        // Device states whose record was never written, and records that were never renamed into place.
        if !entry.path().with_extension("json").exists() || entry.path().extension().is_some_and(|e| e == "new") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    out.sort_by_key(|r| r.id);
    Ok(out)
}

/// Records of VMs, with their directories. A directory without a record never got far: it goes.
fn records(home: &Home) -> Vec<(PathBuf, VmRecord)> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(home.path("vms")).into_iter().flatten().flatten() {
        let dir = entry.path();
        match VmRecord::load(&dir) {
            Ok(record) => out.push((dir, record)),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let _ = std::fs::remove_dir_all(dir);
            }
            Err(error) => log::error!("{error}"),
        }
    }
    out.sort_by_key(|(_, record)| record.id);
    out
}

/// Removes what a VM leaves behind: its processes, its pins, its place in the mirror, its directory.
pub(crate) fn clear(shared: &Arc<Shared>, record: &VmRecord) {
    let dir = shared.home.vm_dir(record.id);
    if let Life::Running { passt, .. } = record.life {
        passt.end(Duration::ZERO);
    }
    // A daemon that died while starting it recorded no process; its path is in the command line.
    end_processes(&dir.to_string_lossy());
    let _ = shared.mirror.unregister_vm(&record.name);
    if let Err(error) = shared.mirror.remove(&record.overlays) {
        log::warn!("the disks of {}: {error}", record.name);
    }
    if let Err(error) = shared.store.delete_head(&shared.pin_head(record.id)) {
        log::warn!("the pins of {}: {error}", record.name);
    }
    if let Err(error) = std::fs::remove_dir_all(&dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("remove {}: {error}", dir.display());
    }
}

/// Ends every hypervisor whose command line names `path`, holders excepted: those are ended by record.
fn end_processes(path: &str) {
    for pid in pids() {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
        if !line.starts_with(vmm::qemu::PROGRAM) || !line.contains(path) || is_holder(pid) {
            continue;
        }
        if let Some(process) = ProcessId::of(pid) {
            process.end(Duration::ZERO);
        }
    }
}

/// Ends holders of this home that no record names and whose parent is gone.
fn clear_strays(shared: &Arc<Shared>) {
    let known = shared.pending_holders();
    let home = shared.home.root().to_string_lossy().into_owned();
    for pid in pids().filter(|pid| !known.contains(pid) && is_holder(*pid)) {
        // A holder maps what its hypervisor mapped, our library included.
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        if maps.contains(&home)
            && let Some(process) = ProcessId::of(pid)
        {
            process.end(Duration::ZERO);
        }
    }
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn is_holder(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == base::resident::HOLDER_COMM)
}
