//! The node: what the daemon can do, as functions.
//!
//! Names are reserved under one lock before anything is made under them, so of two commands that race on a name
//! exactly one goes on. Everything else about a VM belongs to its owner thread ([`crate::vm`]).

use crate::commit::Committer;
use crate::error::{Error, Result};
use crate::exports::ExportRecord;
use crate::foresight::disk;
use crate::home::Home;
use crate::look::Looks;
use crate::mirror_link::MirrorLink;
use crate::mirrored::Files;
use crate::place::Place;
use crate::record::{self, FreezeRecord, Life, Origin, VmRecord};
use crate::vm::{self, DisksAhead, Source, Starting, Vm};
use crate::{image, mirrored, names, sweep};
use api::{ForkReply, ForkRequest, From, Offshoot, RunRequest};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};
use store::Store;
use vmm::MachineShape;
use vmm::accelerator::{Accelerator, Host};
use vmm::passt::Publish;
use vmm::shape::DiskShape;

/// The most offshoots of one fork, so that a slip of the finger does not take the host.
pub const FORK_MAX: u32 = 256;

/// The memory a guest may have: room for a kernel, and what 40 bits of the machine's physical addresses hold.
const MEMORY: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 40;

/// What every part of the node uses.
pub struct Shared {
    /// The directory of everything.
    pub home: Home,
    /// The store; of an embedded one this process is the only writer.
    pub store: Arc<Store>,
    /// Which store it is, where other nodes share it.
    pub place: Option<Place>,
    /// The daemon's cache of it.
    pub(crate) cache: Option<Arc<store::engine::Cached>>,
    /// What begins the names of this node's own heads.
    own: String,
    /// Whether `versions` has what the store knows.
    pub(crate) recalled: Mutex<bool>,
    /// Whether a sweep is owed that found the store away.
    pub(crate) owed: AtomicBool,
    /// The mirror.
    pub mirror: Arc<MirrorLink>,
    /// The resident library on disk.
    pub library: PathBuf,
    /// Frozen machines that are not yet in the store, by id.
    pub(crate) pending: Mutex<BTreeMap<u64, FreezeRecord>>,
    /// Where the content of RAM files and disk views is in the store.
    pub(crate) versions: Mutex<HashMap<u64, store::Version>>,
    /// Where the kernel's note is in RAM files ([`SnapshotMeta::note`](crate::record::SnapshotMeta)).
    pub(crate) notes: Mutex<HashMap<u64, u64>>,
    blanks: Mutex<HashMap<u64, u64>>,
    /// Whether a sweep left something for the sake of a freeze that was not yet in the store.
    pub(crate) sweep_again: AtomicBool,
    /// Held for reading while objects are made that no root names yet, for writing by [`sweep`].
    pub(crate) making: RwLock<()>,
    pub(crate) slots: Mutex<BTreeMap<String, Slot>>,
    /// Heads of snapshots that are just being taken.
    pub(crate) tagging: Mutex<BTreeSet<String>>,
    /// Disks served over NBD, and scratch disks that are kept, by name.
    pub(crate) exports: Mutex<BTreeMap<String, ExportRecord>>,
    /// Held by whoever changes those, over all that belongs to the change.
    pub(crate) exporting: Mutex<()>,
    /// Held while a snapshot is laid down in order: one at a time.
    pub(crate) arranging: Mutex<()>,
    /// Versions of blobs with local changes.
    pub(crate) files: Files,
    /// The colors of VMs that were looked at.
    pub(crate) looks: Looks,
    /// VMs that are recorded, by name, until somebody takes the recording in.
    pub(crate) learning: Mutex<HashMap<String, crate::foresight::Ahead>>,
    /// Disks whose reads are being recorded for a profile.
    pub(crate) lessons: Mutex<HashMap<mirror::control::OfDisk, crate::foresight::disk::Lesson>>,
}

/// What a name stands for.
#[derive(Clone)]
pub(crate) enum Slot {
    /// A VM is being made under it.
    Reserved,
    /// A VM.
    Vm(Arc<Vm>),
    /// A VM that is being removed.
    Removing,
}

impl Shared {
    /// The RAM file of `bytes` zeros that hypervisors are pointed at.
    ///
    /// # Errors
    /// Where the mirror refuses.
    pub fn blank_ram(&self, bytes: u64) -> Result<u64> {
        let mut blanks = self.blanks.lock().expect("no holder panics");
        if let Some(&id) = blanks.get(&bytes) {
            return Ok(id);
        }
        let id = self.home.new_id()?;
        self.mirror.add_ram_blank(id, bytes)?;
        blanks.insert(bytes, id);
        Ok(id)
    }

    pub(crate) fn blank_ids(&self) -> Vec<u64> {
        self.blanks.lock().expect("no holder panics").values().copied().collect()
    }

    pub(crate) fn set_blank(&self, bytes: u64, id: u64) {
        self.blanks.lock().expect("no holder panics").insert(bytes, id);
    }

    /// Pids of the holders that some record names.
    pub(crate) fn pending_holders(&self) -> Vec<u32> {
        self.pending.lock().expect("no holder panics").values().map(|r| r.holder.pid).collect()
    }

    /// Removes the files of a freeze.
    pub(crate) fn forget_pending(&self, id: u64) {
        for kind in ["json", "device"] {
            let _ = std::fs::remove_file(self.home.path(&format!("pending/{id:016x}.{kind}")));
        }
    }

    /// The VMs there are, by name.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        let slots = self.slots.lock().expect("no holder panics");
        slots.values().filter_map(|s| if let Slot::Vm(vm) = s { Some(vm.clone()) } else { None }).collect()
    }

    /// The name of a head that is this node's own.
    pub(crate) fn own_head(&self, kind: &str, id: u64) -> String {
        format!("{}{kind}/{id:016x}", self.own)
    }

    /// What begins the names of this node's own heads of a kind.
    pub(crate) fn own_heads(&self, kind: &str) -> String {
        format!("{}{kind}/", self.own)
    }

    /// The head that keeps versions for a VM or an export.
    pub(crate) fn pin_head(&self, id: u64) -> String {
        self.own_head("pin", id)
    }

    /// Whether other nodes use the store as well.
    pub(crate) fn is_shared(&self) -> bool {
        self.place.is_some()
    }

    pub(crate) fn vm_by_id(&self, id: u64) -> Option<Arc<Vm>> {
        self.vms().into_iter().find(|vm| vm.id == id)
    }
}

/// The node.
pub struct Node {
    /// What its parts use.
    pub shared: Arc<Shared>,
    pub(crate) committer: Committer,
}

impl Node {
    /// Opens the node at `home`: takes over the mirror and the VMs that run, clears away what does not, and brings
    /// into the store what was frozen.
    ///
    /// # Errors
    /// Where another daemon has it, or a record is damaged.
    pub fn open(home: &Path, library: PathBuf) -> Result<Self> {
        let mut place = Place::of(home)?;
        // It gives the home its first id.
        let opened = place.as_mut().map(|place| place.open(home)).transpose()?;
        let home = Home::open(home)?;
        let (store, cache) = match opened {
            Some(opened) => (opened.store, opened.cache),
            None => (Arc::new(Store::open(&home.path("store"), store::Mode::ReadWrite)?), None),
        };
        let mirror = MirrorLink::open(&home, || crate::recover::kept_descriptor(&home))?;
        let shared = Arc::new(Shared {
            home,
            store,
            cache,
            own: place.as_ref().map(Place::prefix).unwrap_or_default(),
            place,
            recalled: Mutex::default(),
            owed: AtomicBool::default(),
            mirror,
            library,
            pending: Mutex::default(),
            versions: Mutex::default(),
            notes: Mutex::default(),
            blanks: Mutex::default(),
            sweep_again: AtomicBool::default(),
            making: RwLock::default(),
            slots: Mutex::default(),
            tagging: Mutex::default(),
            exports: Mutex::default(),
            exporting: Mutex::default(),
            arranging: Mutex::default(),
            files: Files::default(),
            looks: Looks::default(),
            learning: Mutex::default(),
            lessons: Mutex::default(),
        });
        let committer = Committer::start(&shared)?;
        crate::recover::recover(&shared, &committer)?;
        crate::exports::recover(&shared)?;
        mirrored::recover(&shared)?;
        sweep::sweep(&shared)?;
        mirrored::start(&shared)?;
        Ok(Self { shared, committer })
    }

    /// A VM by name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn vm(&self, name: &str) -> Result<Arc<Vm>> {
        match self.shared.slots.lock().expect("no holder panics").get(name) {
            Some(Slot::Vm(vm)) => Ok(vm.clone()),
            Some(Slot::Reserved) => Err(Error::Conflict(format!("{name} is still being started"))),
            Some(Slot::Removing) => Err(Error::Conflict(format!("{name} is being removed"))),
            None => Err(Error::NotFound(format!("no VM is named {name}; `offshoot ps` lists them"))),
        }
    }

    /// The VMs, by name.
    #[must_use]
    pub fn vms(&self) -> Vec<Arc<Vm>> {
        self.shared.vms()
    }

    /// Starts a VM from an image or a snapshot.
    ///
    /// # Errors
    /// What kept it from starting; nothing of it is left.
    pub fn run(&self, request: &RunRequest) -> Result<Arc<Vm>> {
        let since = Instant::now();
        let name = match &request.name {
            Some(name) => name.clone(),
            None => format!("vm-{:x}", self.shared.home.new_id()?),
        };
        names::check("VM", &name)?;
        let publish = parse_publish(&request.publish)?;
        let reserved = self.reserve(vec![name.clone()])?;
        let _making = self.shared.making.read().expect("no holder panics");
        let vm = match &request.from {
            From::Image(image) => {
                let (record, source) = self.boot_record(&name, image, request, publish)?;
                self.launch(record, Starting::From(source), since)?.0
            }
            From::Snapshot(snapshot) => self.start_from(&name, snapshot, request, publish, since)?.0,
        };
        reserved.fill(&name, &vm);
        Ok(vm)
    }

    fn boot_record(
        &self,
        name: &str,
        image: &str,
        request: &RunRequest,
        publish: Vec<Publish>,
    ) -> Result<(VmRecord, Source)> {
        let wanted = disk::wanted(&self.shared, request.prefetch.as_deref(), request.eager, request.learn)?;
        let found = image::load(&self.shared.store, image)?;
        let (kernel, initrd) = image::kernel_files(&self.shared.store, &found, &self.shared.home.path("kernels"))?;
        let disk = found.disk();
        let memory = request.memory_bytes.unwrap_or(512 << 20);
        if !MEMORY.contains(&memory) || !memory.is_multiple_of(1 << 20) {
            return Err(Error::Invalid(format!(
                "--memory {}: give whole MiB, from 64M to 1T",
                base::units::human(memory)
            )));
        }
        let cpus = request.cpus.unwrap_or(1);
        if !(1..=64).contains(&cpus) {
            return Err(Error::Invalid(format!("--cpus {cpus}: give 1 to 64")));
        }
        let disks = vec![DiskShape { id: "disk0".into(), bytes: disk.size, block_bytes: disk.block_size }];
        let shape = MachineShape::new(accelerator(request.accelerator.as_deref())?, cpus, memory, disks);
        let cmdline = match &request.append {
            Some(more) => format!("{} {more}", found.cmdline()),
            None => found.cmdline().to_owned(),
        };
        let record = VmRecord {
            id: self.shared.home.new_id()?,
            name: name.to_owned(),
            created: record::now(),
            origin: Origin { image: image.to_owned(), kernel, initrd, cmdline },
            parent: None,
            generation: 0,
            shape,
            publish,
            overlays: vec![self.shared.home.new_id()?],
            start_ram: None,
            generation_id: new_uuid()?,
            life: Life::Starting,
        };
        self.pin(record.id, [("disk0".to_owned(), disk)].into())?;
        let ahead = wanted.map(|wanted| DisksAhead { of: image::head(image), wanted });
        Ok((record, Source::Boot { disks: vec![disk.to_string()], ahead }))
    }

    /// Keeps versions in the store for as long as the VM exists.
    pub(crate) fn pin(&self, vm: u64, versions: BTreeMap<String, store::Version>) -> Result<()> {
        let manifest = store::Manifest { versions, meta: String::new() };
        self.shared.store.begin().publish(&self.shared.pin_head(vm), store::Expect::Absent, &manifest)?;
        Ok(())
    }

    /// Starts a VM under a name that is reserved.
    pub(crate) fn launch(&self, record: VmRecord, starting: Starting, since: Instant) -> Result<Started> {
        let dir = self.shared.home.vm_dir(record.id);
        let started = std::fs::create_dir_all(&dir)
            .map_err(Error::io("make", &dir))
            .and_then(|()| record.save(&dir))
            .and_then(|()| vm::start(&self.shared, record.clone(), starting, since));
        if started.is_err() {
            self.clear(&record);
            log::warn!("{} did not start; what it left is removed", record.name);
        }
        started
    }

    /// Removes what a VM leaves behind when it is over.
    pub(crate) fn clear(&self, record: &VmRecord) {
        crate::recover::clear(&self.shared, record);
    }

    /// Forks a running VM.
    ///
    /// # Errors
    /// Where nothing was forked; offshoots that did not start are named in the reply.
    pub fn fork(
        &self,
        parent: &str,
        request: &ForkRequest,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<ForkReply> {
        let since = Instant::now();
        if !(1..=FORK_MAX).contains(&request.count) {
            return Err(Error::Invalid(format!("-n {}: fork 1 to {FORK_MAX} at once", request.count)));
        }
        let vm = self.vm(parent)?;
        let prefix = request.name_prefix.as_deref().unwrap_or(parent);
        let reserved = self.reserve_numbered(prefix, request.count)?;
        let names = reserved.names.clone();
        let published = vm.view().record.publish;
        let ports: Vec<Vec<Publish>> =
            (0..request.count).map(|i| offshoot_ports(&published, request.publish_base, i)).collect::<Result<_>>()?;
        let _making = self.shared.making.read().expect("no holder panics");
        let (frozen, started) = self.freeze_and_start(&vm, &names, &ports, since, progress)?;
        let mut reply = ForkReply {
            pause_ms: frozen.record.pause_ms,
            pause_parts_ms: frozen.parts.clone(),
            changed_bytes: frozen.record.changed_bytes(),
            offshoots: Vec::new(),
            failed: Vec::new(),
        };
        for ((name, ports), outcome) in names.iter().zip(&ports).zip(started) {
            match outcome {
                Ok((vm, took)) => {
                    reserved.fill(name, &vm);
                    let publish = ports.iter().map(ToString::to_string).collect();
                    reply.offshoots.push(Offshoot {
                        name: name.clone(),
                        running_ms: took.as_secs_f64() * 1e3,
                        publish,
                    });
                }
                Err(error) => reply.failed.push(api::FailedOffshoot { name: name.clone(), error: error.body() }),
            }
        }
        drop(reserved);
        self.committer.submit(frozen.record.id);
        Ok(reply)
    }

    /// Freezes `vm` and starts an offshoot under each name. As many as the host has processors to spare have their
    /// hypervisors started while the freeze is under way; more would only make the pause longer.
    fn freeze_and_start(
        &self,
        vm: &Vm,
        names: &[String],
        ports: &[Vec<Publish>],
        since: Instant,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<(Arc<vm::Frozen>, Vec<Result<Started>>)> {
        let total = names.len() as u64;
        progress("freezing", 0, total);
        let parent = vm.view().record;
        let spare = std::thread::available_parallelism().map_or(0, |n| n.get() - 1);
        let early = if matches!(parent.life, Life::Running { .. }) { spare } else { 0 };
        let id = self.shared.home.new_id()?;
        let records = names.iter().zip(ports).map(|(name, ports)| self.offshoot_record(&parent, id, name, ports));
        let records = records.collect::<Result<Vec<VmRecord>>>()?;
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let (mut waiting, mut threads) = (Vec::new(), Vec::new());
            for (i, record) in records.into_iter().enumerate() {
                let (frozen, coming) = std::sync::mpsc::sync_channel(1);
                waiting.push(frozen);
                let done = done.clone();
                threads.push(scope.spawn(move || {
                    let outcome = self.start_offshoot(record, coming, i < early, since);
                    let _ = done.send(());
                    outcome
                }));
            }
            drop(done);
            // Those that wait learn of a failure from the end of their channels.
            let frozen = Arc::new(vm.freeze(id, None)?);
            self.shared.pending.lock().expect("no holder panics").insert(id, frozen.record.clone());
            for offshoot in waiting {
                let _ = offshoot.send(Source::Frozen(frozen.clone()));
            }
            let mut count = 0;
            progress("starting", count, total);
            while finished.recv().is_ok() {
                count += 1;
                progress("starting", count, total);
            }
            let started = threads.into_iter().map(|t| t.join().unwrap_or(Err(Error::ShuttingDown))).collect();
            Ok((frozen, started))
        })
    }

    fn offshoot_record(&self, parent: &VmRecord, freeze: u64, name: &str, ports: &[Publish]) -> Result<VmRecord> {
        Ok(VmRecord {
            id: self.shared.home.new_id()?,
            name: name.to_owned(),
            created: record::now(),
            origin: parent.origin.clone(),
            parent: Some(parent.name.clone()),
            generation: parent.generation + 1,
            shape: parent.shape.clone(),
            publish: ports.to_vec(),
            overlays: parent.overlays.iter().map(|_| self.shared.home.new_id()).collect::<Result<_>>()?,
            start_ram: Some(freeze),
            generation_id: new_uuid()?,
            life: Life::Starting,
        })
    }

    fn start_offshoot(&self, record: VmRecord, coming: vm::Coming, early: bool, since: Instant) -> Result<Started> {
        let starting = if early {
            Starting::Meanwhile(coming)
        } else {
            Starting::From(coming.recv().map_err(|_| Error::Conflict("the freeze failed".into()))?)
        };
        self.launch(record, starting, since)
    }

    /// Removes a VM: ends it where it runs and `force` is given.
    ///
    /// # Errors
    /// Where it runs and `force` is not given.
    pub fn remove(&self, name: &str, force: bool) -> Result<()> {
        let vm = self.vm(name)?;
        if !force && !matches!(vm.view().record.life, Life::Stopped { .. }) {
            return Err(Error::Conflict(format!(
                "{name} is running; `offshoot stop {name}` first, or `offshoot rm -f {name}`"
            )));
        }
        {
            let mut slots = self.shared.slots.lock().expect("no holder panics");
            match slots.get_mut(name) {
                Some(slot @ Slot::Vm(_)) => *slot = Slot::Removing,
                _ => return Err(Error::Conflict(format!("{name} is being removed"))),
            }
        }
        let _ = vm.stop(Duration::ZERO);
        vm.wait(Duration::from_secs(20));
        self.clear(&vm.view().record);
        self.shared.slots.lock().expect("no holder panics").remove(name);
        sweep::sweep(&self.shared)
    }

    /// Ids of snapshots of `vm` that are not in the store yet, with the reason where one is stuck.
    #[must_use]
    pub fn pending_of(&self, vm: u64) -> Vec<String> {
        let pending = self.shared.pending.lock().expect("no holder panics");
        let of = pending.values().filter(|r| r.vm_id == vm);
        of.map(|r| match self.committer.trouble(r.id) {
            Some(why) => format!("{:016x}: {why}", r.id),
            None => format!("{:016x}", r.id),
        })
        .collect()
    }

    /// Waits until everything frozen is in the store, or `limit` has passed.
    pub fn settle(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while !self.shared.pending.lock().expect("no holder panics").is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the daemon's part: with `stop`, every VM and the mirror end; else guests go on.
    pub fn close(&self, stop: bool) {
        let vms = self.vms();
        if stop {
            std::thread::scope(|scope| {
                for vm in &vms {
                    scope.spawn(|| vm.stop(Duration::from_secs(0)));
                }
            });
            self.settle(Duration::from_secs(60));
        }
        self.committer.close();
        for vm in &vms {
            vm.leave();
        }
        if stop {
            self.end_exports();
            self.shared.mirror.close(true);
        }
    }

    /// Chosen and taken under one lock: forks at the same time get different names.
    fn reserve_numbered(&self, prefix: &str, count: u32) -> Result<Reservation<'_>> {
        names::check("name prefix", prefix)?;
        let mut slots = self.shared.slots.lock().expect("no holder panics");
        let free = (1..).map(|n: u32| format!("{prefix}-{n}")).filter(|name| !slots.contains_key(name));
        let names = free.take(count as usize).collect();
        self.reserve_in(&mut slots, names)
    }

    fn reserve(&self, names: Vec<String>) -> Result<Reservation<'_>> {
        self.reserve_in(&mut self.shared.slots.lock().expect("no holder panics"), names)
    }

    fn reserve_in(&self, slots: &mut BTreeMap<String, Slot>, names: Vec<String>) -> Result<Reservation<'_>> {
        names.iter().try_for_each(|name| names::check("VM", name))?;
        if let Some(taken) = names.iter().find(|n| slots.contains_key(*n)) {
            return Err(Error::Conflict(format!(
                "a VM named {taken} is there already; `offshoot rm {taken}` or choose another name"
            )));
        }
        for name in &names {
            slots.insert(name.clone(), Slot::Reserved);
        }
        Ok(Reservation { shared: &self.shared, names })
    }
}

/// A VM and how long it took to run.
pub(crate) type Started = (Arc<Vm>, Duration);

/// Names kept for VMs under way; those not filled are free again when it is dropped.
struct Reservation<'a> {
    shared: &'a Shared,
    names: Vec<String>,
}

impl Reservation<'_> {
    fn fill(&self, name: &str, vm: &Arc<Vm>) {
        self.shared.slots.lock().expect("no holder panics").insert(name.to_owned(), Slot::Vm(vm.clone()));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut slots = self.shared.slots.lock().expect("no holder panics");
        for name in &self.names {
            if matches!(slots.get(name), Some(Slot::Reserved)) {
                slots.remove(name);
            }
        }
    }
}

fn parse_publish(texts: &[String]) -> Result<Vec<Publish>> {
    let ports: Vec<Publish> = texts.iter().map(|t| t.parse().map_err(Error::Invalid)).collect::<Result<_>>()?;
    for (i, port) in ports.iter().enumerate() {
        if ports[..i].iter().any(|p| (p.address, p.host) == (port.address, port.host)) {
            return Err(Error::Invalid(format!("port {} of {} is published twice", port.host, port.address)));
        }
    }
    ports.iter().try_for_each(check_free)?;
    Ok(ports)
}

fn offshoot_ports(parent: &[Publish], from: Option<u16>, index: u32) -> Result<Vec<Publish>> {
    let Some(from) = from else { return Ok(Vec::new()) };
    let each = parent.len() as u32;
    let port = |slot: u32| u16::try_from(u32::from(from) + index * each + slot).ok();
    parent
        .iter()
        .zip(0..)
        .map(|(p, slot)| {
            let host = port(slot)
                .ok_or_else(|| Error::Invalid(format!("--publish-base {from}: ports beyond 65535 are needed")))?;
            let publish = Publish { host, ..*p };
            check_free(&publish)?;
            Ok(publish)
        })
        .collect()
}

fn check_free(p: &Publish) -> Result<()> {
    let refuse = |why: String| {
        Error::Conflict(format!("port {} of {} cannot be published: {why}; choose another", p.host, p.address))
    };
    match vmm::passt::listens(p.address, p.host) {
        Ok(false) => Ok(()),
        Ok(true) => Err(refuse("somebody listens there already".into())),
        Err(error) => Err(refuse(error.to_string())),
    }
}

fn accelerator(asked: Option<&str>) -> Result<Accelerator> {
    match asked.unwrap_or("auto") {
        "auto" => Ok(Host::probe().choose().0),
        "tcg" => Ok(Accelerator::Tcg),
        "kvm" => match Host::probe().choose() {
            (Accelerator::Kvm, _) => Ok(Accelerator::Kvm),
            (_, why) => Err(Error::Host(format!("KVM cannot be used here: {why}"))),
        },
        other => Err(Error::Invalid(format!("--accelerator {other}: give auto, kvm or tcg"))),
    }
}

pub(crate) fn new_uuid() -> Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|text| text.trim().to_owned())
        .map_err(Error::io("read", "/proc/sys/kernel/random/uuid"))
}
