//! The thread that owns a VM.

use super::launch::{self, Shell, Source, Starting};
use super::{Message, RamPlace, Vm};
use crate::error::{Error, Result};
use crate::node::Shared;
use crate::record::{Life, VmRecord};
use base::{RamFileId, RamMap};
use mirror::control::OfDisk;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::time::{Duration, Instant};
use vmm::process::{self, ProcessId};
use vmm::qemu::{Files, Qemu};

/// What the thread owns.
pub(super) struct Owner {
    pub(super) shared: Arc<Shared>,
    pub(super) record: VmRecord,
    /// The map the hypervisor's process started with.
    pub(super) start_map: RamMap,
    /// The map at the last freeze that this daemon knows of, and the RAM file that equals it.
    pub(super) map: RamMap,
    pub(super) equals: Option<RamFileId>,
    /// Whether the next freeze must not rely on what the library tracked.
    pub(super) full: bool,
    pub(super) freezes: u32,
    vm: Arc<Vm>,
    qemu: Option<Qemu>,
    tx: Sender<Message>,
    /// What the guest or the hypervisor said about its end before it came.
    ending: Option<&'static str>,
    stopping: Vec<std::sync::mpsc::SyncSender<Result<()>>>,
    kill_at: Option<Instant>,
    halted: Option<Halted>,
}

/// A guest that a failing disk stopped in front of the request that failed, which is repeated when it goes on.
struct Halted {
    /// Whether it was space that lacked.
    full: bool,
    /// When it was last let go on, or stopped.
    tried: Instant,
}

/// How often the room of the file system is looked at while a guest needs it.
const LOOK: Duration = Duration::from_secs(1);
/// A halted guest is let try again when there is this much room, and after [`PATIENCE`] in any case.
const ROOM: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts a VM and returns when its guest runs, with the time that took.
///
/// # Errors
/// What kept it from starting; nothing of it is left but its directory, which the caller removes.
pub fn start(
    shared: &Arc<Shared>,
    record: VmRecord,
    starting: Starting,
    since: Instant,
) -> Result<(Arc<Vm>, Duration)> {
    let (tx, rx) = channel();
    let vm = Arc::new(Vm::new(record.clone(), tx.clone()));
    let (ready, started) = sync_channel(1);
    let (shared, made) = (shared.clone(), vm.clone());
    std::thread::Builder::new()
        .name(format!("vm-{}", record.name))
        .spawn(move || match Owner::launched(&shared, record, starting, vm, tx) {
            Ok(mut owner) => {
                let took = since.elapsed();
                owner.publish_view();
                let _ = ready.send(Ok(took));
                owner.run(&rx);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        })
        .map_err(Error::io("start a thread for", "a VM"))?;
    let took = started.recv().map_err(|_| Error::ShuttingDown)??;
    Ok((made, took))
}

/// Takes over a VM that an earlier daemon started and that still runs.
///
/// # Errors
/// Where its hypervisor does not answer.
pub fn adopt(shared: &Arc<Shared>, record: VmRecord, hypervisor: ProcessId) -> Result<Arc<Vm>> {
    let (tx, rx) = channel();
    let vm = Arc::new(Vm::new(record.clone(), tx.clone()));
    let dir = shared.home.vm_dir(record.id);
    let map_file = dir.join("ram.map");
    let text = std::fs::read_to_string(&map_file).map_err(Error::io("read", &map_file))?;
    let start_map = RamMap::decode(&text).map_err(|reason| Error::Damaged { path: map_file, reason })?;
    let equals = record.start_ram.map(RamFileId);
    let mut owner = Owner::new(shared.clone(), record, start_map, equals, vm.clone(), tx.clone());
    // What the earlier daemon had the library track is not known here.
    owner.full = true;
    shared.mirror.register_vm(&owner.record.name, hypervisor.pid)?;
    let mut qemu = Qemu::connect(hypervisor, &Files { dir }, waker(tx.clone()))?;
    let_go_on(&mut qemu)?;
    owner.qemu = Some(qemu);
    owner.watch_end(hypervisor)?;
    owner.release_strangers();
    owner.publish_view();
    std::thread::Builder::new()
        .name(format!("vm-{}", vm.name))
        .spawn(move || owner.run(&rx))
        .map_err(Error::io("start a thread for", "a VM"))?;
    Ok(vm)
}

/// Lets an adopted guest run: the earlier daemon may have died within a freeze, or its disk may have failed, of which
/// it then says so again.
fn let_go_on(qemu: &mut Qemu) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match qemu.status()?.as_str() {
            // Nobody reads the device state any more, so that its saving ends by itself; until then QEMU refuses.
            "finish-migrate" if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            "paused" | "postmigrate" | "finish-migrate" | "io-error" => return Ok(qemu.set_paused(false)?),
            _ => return Ok(()),
        }
    }
}

/// A VM that has ended, kept until it is removed.
///
/// # Errors
/// Where its record cannot be written.
pub fn keep_stopped(shared: &Arc<Shared>, mut record: VmRecord, detail: String) -> Result<Arc<Vm>> {
    record.life = Life::Stopped { detail };
    record.save(&shared.home.vm_dir(record.id))?;
    // Nobody owns it: whatever is asked of it finds the channel closed and says that it is not running.
    Ok(Arc::new(Vm::new(record, channel().0)))
}

fn waker(tx: Sender<Message>) -> impl Fn() + Send + 'static {
    move || {
        let _ = tx.send(Message::Wake);
    }
}

impl Owner {
    fn new(
        shared: Arc<Shared>,
        record: VmRecord,
        start_map: RamMap,
        equals: Option<RamFileId>,
        vm: Arc<Vm>,
        tx: Sender<Message>,
    ) -> Self {
        Self {
            shared,
            record,
            map: start_map.clone(),
            start_map,
            equals,
            full: false,
            freezes: 0,
            vm,
            qemu: None,
            tx,
            ending: None,
            stopping: Vec::new(),
            kill_at: None,
            halted: None,
        }
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.shared.home.vm_dir(self.record.id)
    }

    pub(super) fn qemu(&mut self) -> Result<&mut Qemu> {
        let name = &self.record.name;
        self.qemu.as_mut().ok_or_else(|| Error::Conflict(format!("{name} is not running")))
    }

    fn launched(
        shared: &Arc<Shared>,
        record: VmRecord,
        starting: Starting,
        vm: Arc<Vm>,
        tx: Sender<Message>,
    ) -> Result<Self> {
        let (source, shell) = match starting {
            Starting::From(source) => (source, None),
            Starting::Meanwhile(coming) => {
                let shell = launch::spawn(shared, &record, vmm::qemu::Start::Incoming, true)?;
                let source = coming.recv().map_err(|_| Error::Conflict("what it starts from did not come".into()))?;
                (source, Some(shell))
            }
        };
        let (start_map, equals) = source.ram(&record);
        let mut owner = Self::new(shared.clone(), record, start_map, equals, vm, tx);
        owner.launch(&source, shell)?;
        Ok(owner)
    }

    fn launch(&mut self, source: &Source, shell: Option<Shell<'_>>) -> Result<()> {
        let qemu = launch::launch(&self.shared, &mut self.record, source, shell, waker(self.tx.clone()))?;
        let process = qemu.process;
        self.qemu = Some(qemu);
        self.watch_end(process)
    }

    fn watch_end(&self, process: ProcessId) -> Result<()> {
        let tx = self.tx.clone();
        std::thread::Builder::new()
            .name("vm-watch".into())
            .spawn(move || {
                if let Some(fd) = process.pidfd() {
                    while !process::wait_readable(&fd, Duration::from_secs(3600)) {}
                    process::reap(&fd);
                }
                let _ = tx.send(Message::Ended);
            })
            .map(|_| ())
            .map_err(Error::io("start a thread for", self.dir()))
    }

    /// Shows the others what changed.
    pub(super) fn publish_view(&self) {
        let mut files: Vec<u64> =
            self.map.files().into_keys().chain(self.start_map.files().into_keys()).map(|f| f.0).collect();
        files.extend(self.equals.map(|f| f.0));
        files.extend(self.record.start_ram);
        files.sort_unstable();
        files.dedup();
        self.vm.update(|view| {
            view.record = self.record.clone();
            view.ram_extents = self.start_map.len();
            view.ram_files = files;
            view.freezes = self.freezes;
        });
    }

    fn run(&mut self, rx: &Receiver<Message>) {
        loop {
            let kill =
                self.kill_at.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
            let limit = if self.halted.is_some() { kill.min(LOOK) } else { kill };
            match rx.recv_timeout(limit) {
                Ok(Message::Freeze { id, tag, reply }) => drop(reply.send(self.freeze(id, tag))),
                Ok(Message::Stop { grace, reply }) => self.stop(grace, reply),
                Ok(Message::Balloon { bytes, reply }) => {
                    drop(reply.send(self.qemu().and_then(|q| Ok(q.balloon(bytes)?))));
                }
                Ok(Message::Resident { reply }) => drop(reply.send(self.resident())),
                Ok(Message::Committed { id, holder }) => self.committed(id, holder),
                Ok(Message::Wake) => self.events(),
                Ok(Message::Leave) => return,
                Ok(Message::Ended) => {
                    if self.ended() {
                        return;
                    }
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => self.look_after(),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// What is done at a certain time rather than on request.
    fn look_after(&mut self) {
        if self.kill_at.is_some_and(|at| at <= Instant::now()) {
            self.kill();
        }
        let Some(halted) = &mut self.halted else { return };
        let room = halted.full && self.shared.home.free_bytes().is_ok_and(|free| free >= ROOM);
        if !room && halted.tried.elapsed() < PATIENCE {
            return;
        }
        halted.tried = Instant::now();
        if let Err(error) = self.qemu().and_then(|qemu| Ok(qemu.set_paused(false)?)) {
            log::warn!("{}: cannot go on after its disk failed: {error}", self.record.name);
        }
    }

    fn stop(&mut self, grace: Duration, reply: std::sync::mpsc::SyncSender<Result<()>>) {
        self.stopping.push(reply);
        self.kill_at = Some(Instant::now() + grace);
        self.ending = Some("stopped");
        if grace.is_zero() {
            self.kill();
        } else if let Ok(qemu) = self.qemu()
            && let Err(error) = qemu.power_button()
        {
            log::warn!("{}: the power button does not work: {error}", self.record.name);
        }
    }

    fn kill(&mut self) {
        if self.kill_at.take().is_some()
            && let Some(qemu) = &self.qemu
        {
            qemu.process.end(Duration::ZERO);
        }
    }

    fn resident(&mut self) -> Result<(BTreeMap<String, u64>, RamPlace)> {
        let qemu = self.qemu()?;
        let pid = qemu.process.pid;
        let hello = qemu.resident().hello()?;
        let stat = qemu.resident().stat()?;
        Ok((stat.into_iter().collect(), RamPlace { pid, address: hello.ram, size: hello.size }))
    }

    fn committed(&mut self, id: u64, holder: ProcessId) {
        let released = match &mut self.qemu {
            Some(qemu) => qemu.resident().release(holder.pid).is_ok(),
            None => false,
        };
        if !released {
            holder.end(Duration::ZERO);
        }
        log::debug!("{}: snapshot {id:016x} is in the store", self.record.name);
    }

    /// Ends holders that no record names: an earlier daemon died between the freeze and its record.
    fn release_strangers(&mut self) {
        let known = self.shared.pending_holders();
        let Some(qemu) = &mut self.qemu else { return };
        let holders = qemu.resident().hello().map(|h| h.holders).unwrap_or_default();
        for pid in holders.into_iter().filter(|pid| !known.contains(pid)) {
            let _ = qemu.resident().release(pid);
        }
    }

    pub(super) fn events(&mut self) {
        let Some(qemu) = &mut self.qemu else { return };
        while let Some(event) = qemu.take_event() {
            match event.name.as_str() {
                "SHUTDOWN" => {
                    self.ending = match event.data["reason"].as_str() {
                        Some("guest-reset") => Some("rebooted"),
                        Some("guest-shutdown") => Some("the guest powered off"),
                        Some("guest-panic") => Some("the guest panicked"),
                        _ => self.ending.or(Some("stopped")),
                    };
                }
                // One is sent for each request that failed.
                "BLOCK_IO_ERROR" if event.data["action"] == "stop" => {
                    let why = event.data["reason"].as_str().unwrap_or("a disk error").to_owned();
                    let full = event.data["nospace"] == true;
                    let root = self.shared.home.root().display();
                    let text = if full {
                        format!("no space left on the host for its disk; free some at {root}: it goes on by itself")
                    } else {
                        format!(
                            "its disk failed: {why}; it is tried again by itself, the mirror's log in {root}/run says more"
                        )
                    };
                    if self.halted.is_none() {
                        log::error!("{} stands still: {text}", self.record.name);
                    }
                    self.halted = Some(Halted { full, tried: Instant::now() });
                    self.vm.update(|v| v.paused = Some(text));
                }
                "RESUME" => {
                    self.halted = None;
                    self.vm.update(|v| v.paused = None);
                }
                _ => {}
            }
        }
    }

    /// Deals with the hypervisor's end; true when the VM is over.
    fn ended(&mut self) -> bool {
        self.events();
        let dir = self.dir();
        let files = Files { dir: dir.clone() };
        (self.qemu, self.halted) = (None, None);
        self.vm.update(|v| v.paused = None);
        crate::foresight::ended(&self.shared, &self.record.name);
        crate::foresight::disk::ended(&self.shared, self.record.overlays.iter().map(|&id| OfDisk::Overlay(id)));
        let _ = self.shared.mirror.unregister_vm(&self.record.name);
        if let Life::Running { passt, .. } = self.record.life {
            passt.end(Duration::from_millis(200));
        }
        if self.ending == Some("rebooted") && self.stopping.is_empty() {
            self.ending = None;
            self.start_map = RamMap::zero(self.record.shape.memory_bytes());
            self.map = self.start_map.clone();
            (self.equals, self.record.start_ram, self.full) = (None, None, false);
            match self.launch(&Source::Reboot, None) {
                Ok(()) => {
                    self.publish_view();
                    return false;
                }
                Err(error) => log::error!("{}: cannot start again after a reboot: {error}", self.record.name),
            }
        }
        let detail = match self.ending {
            Some(why) => why.to_owned(),
            None => format!("its hypervisor died: {}", process::last_words(&files.hypervisor_log())),
        };
        self.record.life = Life::Stopped { detail };
        if let Err(error) = self.record.save(&dir) {
            log::error!("{}: {error}", self.record.name);
        }
        self.publish_view();
        for reply in self.stopping.drain(..) {
            let _ = reply.send(Ok(()));
        }
        true
    }
}
