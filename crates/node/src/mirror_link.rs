//! The daemon's side of the mirror process: starts it, keeps a copy of its FUSE descriptor, replaces it when it
//! dies.
//!
//! The FUSE session lives as long as anyone holds the descriptor: the mirror, this daemon, or the resident
//! library inside any hypervisor. A mirror that dies is therefore replaced by one that takes the session over;
//! faulting guests see a stall and nothing else.

use crate::error::{Error, Result};
use crate::home::Home;
use base::RamMap;
use mirror::Holder;
use mirror::client::Client;
use mirror::control::{
    Below, ExportSpec, Foresee, ForeseeDisk, Listing, OfDisk, OverlaySpec, RamPages, RamSource, RamSpec, Recording,
    Stats, StoreState, ViewChanges, Warmth,
};
use mirror::{Ask, AskAnswer, FilePlace, Opens};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm::process::{self, ProcessId};

/// How long a mirror of which it is not known whether it lives may take for an answer.
const TRY: Duration = Duration::from_millis(200);

/// The mirror, as the daemon sees it.
pub struct MirrorLink {
    socket: PathBuf,
    home: PathBuf,
    log: PathBuf,
    state: Mutex<State>,
    closing: AtomicBool,
}

struct State {
    fuse: OwnedFd,
    process: ProcessId,
}

impl MirrorLink {
    /// Finds the living mirror, or starts one: over `kept`, a FUSE descriptor that some hypervisor kept, where
    /// there is one, else over a new mount.
    ///
    /// # Errors
    /// Where it cannot be started, with its last words.
    pub fn open(home: &Home, kept: impl FnOnce() -> Option<OwnedFd>) -> Result<Arc<Self>> {
        let (socket, log) = (home.path("run/mirror.sock"), home.path("run/mirror.log"));
        let root = home.root().to_owned();
        let process = match living(&socket) {
            Some(process) => process,
            None => start(&root, &log, kept())?,
        };
        let process = await_answer(&socket, process, &log)?;
        let fuse = mirror::client::fuse_fd_of(&socket).map_err(|e| Error::Mirror(e.to_string()))?;
        let link = Arc::new(Self {
            socket,
            home: root,
            log,
            state: Mutex::new(State { fuse, process }),
            closing: AtomicBool::new(false),
        });
        let watched = Arc::downgrade(&link);
        std::thread::Builder::new()
            .name("mirror-watch".into())
            .spawn(move || {
                while let Some(link) = watched.upgrade() {
                    link.watch();
                }
            })
            .map_err(Error::io("start a thread for", &link.socket))?;
        Ok(link)
    }

    /// Waits a while for the mirror's end; replaces it.
    fn watch(&self) {
        let process = self.state.lock().expect("no holder panics").process;
        let ended = process.pidfd().is_none_or(|fd| {
            let ended = process::wait_readable(&fd, Duration::from_millis(500));
            if ended {
                process::reap(&fd);
            }
            ended
        });
        if !ended || self.closing.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.state.lock().expect("no holder panics");
        log::error!("the mirror (process {}) died: {}; replacing it", process.pid, process::last_words(&self.log));
        let replaced = state
            .fuse
            .try_clone()
            .map_err(Error::io("copy the descriptor of", &self.socket))
            .and_then(|fuse| start(&self.home, &self.log, Some(fuse)))
            .and_then(|process| await_answer(&self.socket, process, &self.log));
        match replaced {
            Ok(process) => state.process = process,
            Err(error) => {
                log::error!("the mirror could not be replaced, trying again: {error}");
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    }

    /// A copy of the FUSE descriptor, for a hypervisor to keep.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn fuse(&self) -> Result<OwnedFd> {
        self.state
            .lock()
            .expect("no holder panics")
            .fuse
            .try_clone()
            .map_err(Error::io("copy the descriptor of", &self.socket))
    }

    /// Pid of the mirror.
    pub fn pid(&self) -> u32 {
        self.state.lock().expect("no holder panics").process.pid
    }

    /// Ends the mirror and unmounts; only when no VM is left.
    pub fn close(&self, unmount: bool) {
        self.closing.store(true, Ordering::Release);
        let process = self.state.lock().expect("no holder panics").process;
        if let Err(error) = self.client().shutdown(unmount) {
            log::warn!("the mirror did not shut down by itself: {error}");
        }
        if let Some(fd) = process.pidfd() {
            process::wait_readable(&fd, Duration::from_secs(30));
        }
        process.end(Duration::ZERO);
        if unmount {
            let _ = std::fs::remove_file(&self.socket);
        }
    }

    /// A RAM file of zeros.
    ///
    /// # Errors
    /// As the mirror says; so with all that follow.
    pub fn add_ram_blank(&self, id: u64, bytes: u64) -> Result<()> {
        self.add_ram(id, &RamMap::zero(bytes), RamSource::Blank)
    }

    /// A RAM file whose own pages a process holds.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn add_ram_pending(&self, id: u64, map: &RamMap, holder: ProcessId, address: u64) -> Result<()> {
        self.add_ram(id, map, RamSource::Pending(Holder { pid: holder.pid, start: holder.start, address }))
    }

    /// A RAM file whose own pages are in the store.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn add_ram_committed(&self, id: u64, map: &RamMap, version: &str) -> Result<()> {
        self.add_ram(id, map, RamSource::Committed(version.to_owned()))
    }

    fn add_ram(&self, id: u64, map: &RamMap, source: RamSource) -> Result<()> {
        self.client().add_ram(RamSpec { id, map: map.encode(), source }).map_err(refused)
    }

    /// The file's own pages are in the store now.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn set_ram_committed(&self, id: u64, version: &str) -> Result<()> {
        self.client().set_ram_committed(id, version).map_err(refused)
    }

    /// A writable disk.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn add_overlay(&self, id: u64, vm: &str, size: u64, block_size: u32, below: Below) -> Result<()> {
        let spec = OverlaySpec { id, vm: vm.to_owned(), size, block_size: block_size.into(), below };
        self.client().add_overlay(spec).map_err(refused)
    }

    /// Freezes what a disk shows into a view.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn mark(&self, overlay: u64, view: u64) -> Result<()> {
        self.client().mark(overlay, view).map_err(refused)
    }

    /// What a view changed.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn view(&self, view: u64) -> Result<ViewChanges> {
        self.client().view(view).map_err(refused)
    }

    /// The view is in the store now.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn set_view_committed(&self, view: u64, version: &str) -> Result<()> {
        self.client().set_view_committed(view, version).map_err(refused)
    }

    /// Makes durable what a disk was given.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn flush(&self, overlay: u64) -> Result<()> {
        self.client().flush(overlay).map_err(refused)
    }

    /// Removes objects.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn remove(&self, ids: &[u64]) -> Result<()> {
        self.client().remove(ids).map(|_| ()).map_err(refused)
    }

    /// Serves a disk over NBD.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn add_export(&self, spec: ExportSpec) -> Result<()> {
        self.client().add_export(spec).map_err(refused)
    }

    /// Ends an export; whether it was there.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn remove_export(&self, name: &str) -> Result<bool> {
        self.client().remove_export(name).map_err(refused)
    }

    /// Every object.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn list(&self) -> Result<Listing> {
        self.client().list().map_err(refused)
    }

    /// The next thing that the kernel asks for and only the daemon can do, none of `known`.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn next_ask(&self, known: &[String], wait: Duration) -> Result<Option<Ask>> {
        self.client().next_ask(known, wait).map_err(refused)
    }

    /// What became of that.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn answer_ask(&self, token: &str, answer: AskAnswer) -> Result<bool> {
        self.client().answer_ask(token, answer).map_err(refused)
    }

    /// Sets which mirrored files there are.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn set_files(&self, files: Vec<FilePlace>) -> Result<()> {
        self.client().set_files(files).map_err(refused)
    }

    /// What is open in the tree of blobs.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn opens(&self) -> Result<Opens> {
        self.client().opens().map_err(refused)
    }

    /// Lets nobody open a version of a blob, or any of it; what is open in the tree.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn bar(&self, blob: &str, number: Option<u64>) -> Result<Opens> {
        self.client().bar(blob, number).map_err(refused)
    }

    /// Takes one bar back, or all.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn lift(&self, bar: Option<(String, Option<u64>)>) -> Result<()> {
        self.client().lift(bar).map_err(refused)
    }

    /// Withdraws a mirrored file that nobody has open and that has no changes, or of no use ones; whether it was so.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn retire(&self, overlay: u64, changed: bool) -> Result<bool> {
        self.client().retire(overlay, changed).map_err(refused)
    }

    /// Bytes of a mirrored file's local changes.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn changed_bytes(&self, overlay: u64) -> Result<u64> {
        self.client().changed_bytes(overlay).map_err(refused)
    }

    /// Whether there is a RAM file `id`.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn has_ram(&self, id: u64) -> Result<bool> {
        Ok(self.list()?.ram.iter().any(|r| r.id == id))
    }

    /// The blank RAM files: id and bytes.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn blanks(&self) -> Result<Vec<(u64, u64)>> {
        Ok(self.list()?.ram.iter().filter(|r| r.source == RamSource::Blank).map(|r| (r.id, r.size)).collect())
    }

    /// Counts a process's faults for a VM.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn register_vm(&self, vm: &str, pid: u32) -> Result<()> {
        self.client().register_vm(vm, pid).map_err(refused)
    }

    /// Has what a VM of this RAM and these disks needs first read before it runs; where that fails, it is read then.
    pub fn approach<'a>(&self, ram: &store::Version, disks: impl Iterator<Item = &'a store::Version>) {
        if let Err(error) = self.client().approach(&ram.to_string(), disks.map(ToString::to_string).collect()) {
            log::debug!("what a VM starts from is read when it is needed: {error}");
        }
    }

    /// Fetches RAM ahead of a VM that is registered, records what it touches, or both.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn foresee(&self, spec: Foresee) -> Result<()> {
        self.client().foresee(spec).map_err(refused)
    }

    /// What a VM has touched so far: the touches themselves with `end`, and nothing more is recorded then.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn recording(&self, vm: &str, end: bool) -> Result<Recording> {
        self.client().recording(vm, end).map_err(refused)
    }

    /// Fetches blocks ahead of a disk's readers, records what they read, or both.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn foresee_disk(&self, spec: ForeseeDisk) -> Result<()> {
        self.client().foresee_disk(spec).map_err(refused)
    }

    /// What was read of a disk so far: as [`MirrorLink::recording`].
    ///
    /// # Errors
    /// As the mirror says.
    pub fn disk_recording(&self, disk: &OfDisk, end: bool) -> Result<Recording> {
        self.client().disk_recording(disk, end).map_err(refused)
    }

    /// Which pages of a VM's RAM were brought.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn ram_pages(&self, vm: &str) -> Result<RamPages> {
        self.client().ram_pages(vm).map_err(refused)
    }

    /// Forgets a VM's counters.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn unregister_vm(&self, vm: &str) -> Result<()> {
        self.client().unregister_vm(vm).map_err(refused)
    }

    /// Counters of one VM or of all.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn stats(&self, vm: Option<&str>) -> Result<Stats> {
        self.client().stats(vm).map_err(refused)
    }

    /// How the store does.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn store(&self) -> Result<StoreState> {
        self.client().store().map_err(refused)
    }

    /// How much of some versions is in the cache.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn warm(&self, name: &str, versions: &[String], begin: bool, pin: bool) -> Result<Warmth> {
        self.client().warm(name, versions, begin, pin).map_err(refused)
    }

    /// Lets the cache evict what was pinned; whether something was.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn unpin(&self, name: &str) -> Result<bool> {
        self.client().unpin(name).map_err(refused)
    }

    /// Why a VM waits for a page, where it does.
    ///
    /// # Errors
    /// As the mirror says.
    pub fn waits(&self, vm: &str) -> Result<Option<String>> {
        let stats = self.stats(Some(vm))?;
        Ok(stats.waiting.into_iter().find(|w| w.vm.as_deref() == Some(vm) && w.waited_ms > 1000).map(|w| w.why))
    }

    fn client(&self) -> Client {
        Client::new(&self.socket)
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Mirror(error.to_string())
}

/// The mirror that serves at a socket. One that was killed a moment ago may still have it open, and answers no more.
fn living(socket: &Path) -> Option<ProcessId> {
    let stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
    let listener = rustix::net::sockopt::socket_peercred(&stream).ok()?.pid;
    let listener = ProcessId::of(u32::try_from(listener.as_raw_nonzero().get()).ok()?)?;
    let end = Instant::now() + mirror::client::TIME_LIMIT;
    while listener.alive() && Instant::now() < end {
        if let Ok(hello) = Client::new(socket).with_time_limit(TRY).hello() {
            return ProcessId::of(hello.pid);
        }
    }
    None
}

fn start(home: &Path, log: &Path, fuse: Option<OwnedFd>) -> Result<ProcessId> {
    // Not by its path: an upgrade may have put another file there while this daemon ran.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("offshoot").arg("mirror").arg("--home").arg(home);
    if fuse.is_some() {
        command.arg("--take-over");
    }
    Ok(process::spawn(&command, &[], fuse, log)?)
}

/// Waits until the mirror answers. It may be another than `process`: one that an earlier daemon had just started when
/// it died. That one has the home's lock, and ours gives way.
fn await_answer(socket: &Path, process: ProcessId, log: &Path) -> Result<ProcessId> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match Client::new(socket).with_time_limit(TRY).hello().map(|h| h.pid) {
            Ok(pid) if pid == process.pid => return Ok(process),
            Ok(pid) => {
                if let Some(other) = ProcessId::of(pid) {
                    process.end(Duration::ZERO);
                    return Ok(other);
                }
            }
            Err(_) => {}
        }
        if !process.alive() {
            return Err(Error::Host(format!("the mirror ended at start: {}", process::last_words(log))));
        }
        if Instant::now() > end {
            return Err(Error::Mirror("does not answer 20 s after its start".into()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
