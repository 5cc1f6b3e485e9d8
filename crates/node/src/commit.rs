//! Bringing what was frozen into the store, behind the guests' backs.
//!
//! One thread, oldest first: a snapshot's blocks are stored relative to those of the one before, which must be
//! there. A commit that fails (the disk is full, most often) is tried again for ever; until it succeeds the holder
//! keeps the RAM and the mirror the disk, so that nothing is lost and offshoots run on.
//!
//! What a freeze kept from being swept is swept when its commit is done, by a thread of its own: sweeping keeps
//! forks waiting, and so must not be done at the low priority of commits.

use crate::colors::{self, Kept};
use crate::error::{Error, Result};
use crate::node::Shared;
use crate::record::{FreezeRecord, SnapshotMeta};
use crate::snapshots::{self, snapshot_head};
use crate::sys::{self, ProcessMemory};
use base::ByteRange;
use mirror::control::Below;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use store::{BlockSource, Changes, Manifest, Version};

/// How long a commit that failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// How long after a sweep that found the store away the next one is tried.
const OWED: Duration = Duration::from_secs(5);

/// Commits by others behind which the store is tidied up.
const TIDY: u64 = 64;

/// How long after a fork its commit begins.
const GRACE: Duration = Duration::from_millis(300);

/// The committing thread's desk.
pub(crate) struct Committer {
    desk: Arc<Desk>,
    noted: AtomicU64,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: BTreeSet<u64>,
    trouble: HashMap<u64, String>,
    /// The last that failed: one that cannot be stored must not keep those behind it waiting.
    failed: Option<u64>,
    done_bytes: (u64, u64),
    sweep: bool,
    closing: bool,
}

impl Committer {
    /// Starts the threads.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub(crate) fn start(shared: &Arc<Shared>) -> Result<Self> {
        let desk = Arc::new(Desk::default());
        let spawn = |name: &str, work: fn(&Arc<Shared>, &Desk)| {
            let (shared, desk) = (shared.clone(), desk.clone());
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(&shared, &desk));
            thread.map_err(Error::io("start a thread for", "commits"))
        };
        let threads = vec![spawn("commit", work_off)?, spawn("sweep", sweep_up)?];
        Ok(Self { desk, noted: AtomicU64::new(0), threads: Mutex::new(threads) })
    }

    /// Queues a freeze that is in `shared.pending`.
    pub(crate) fn submit(&self, id: u64) {
        self.desk.state.lock().expect("no holder panics").queue.insert(id);
        self.desk.changed.notify_all();
    }

    /// Counts a small commit that somebody else made: behind so many the store is tidied up, so that a long history
    /// does not become as many files.
    pub(crate) fn note_commit(&self) {
        if self.noted.fetch_add(1, Ordering::Relaxed) % TIDY == TIDY - 1 {
            self.desk.state.lock().expect("no holder panics").sweep = true;
            self.desk.changed.notify_all();
        }
    }

    /// Why a commit is stuck, where it is.
    #[must_use]
    pub(crate) fn trouble(&self, id: u64) -> Option<String> {
        self.desk.state.lock().expect("no holder panics").trouble.get(&id).cloned()
    }

    /// Waits until `id` is in the store.
    ///
    /// # Errors
    /// What its first attempt met; it is tried again, but no longer waited for.
    pub(crate) fn await_done(&self, id: u64, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<()> {
        let mut state = self.desk.state.lock().expect("no holder panics");
        while state.queue.contains(&id) {
            if let Some(why) = state.trouble.get(&id) {
                return Err(Error::Host(format!(
                    "the snapshot is not in the store yet: {why}; it is tried again by itself"
                )));
            }
            if state.closing {
                return Err(Error::ShuttingDown);
            }
            let (done, total) = state.done_bytes;
            progress("storing", done, total);
            state = self.desk.changed.wait_timeout(state, Duration::from_millis(200)).expect("no holder panics").0;
        }
        Ok(())
    }

    /// Ends the threads after what is under way.
    pub(crate) fn close(&self) {
        self.desk.state.lock().expect("no holder panics").closing = true;
        self.desk.changed.notify_all();
        for thread in self.threads.lock().expect("no holder panics").drain(..) {
            let _ = thread.join();
        }
    }
}

impl State {
    /// The oldest behind the one that failed last; all over again behind the newest.
    fn next(&self) -> Option<u64> {
        let behind = self.failed.and_then(|failed| self.queue.range(failed + 1..).next());
        behind.or_else(|| self.queue.first()).copied()
    }
}

fn sweep_up(shared: &Arc<Shared>, desk: &Desk) {
    loop {
        {
            let mut state = desk.state.lock().expect("no holder panics");
            while !state.sweep && !state.closing && !shared.owed.load(Ordering::Acquire) {
                state = desk.changed.wait(state).expect("no holder panics");
            }
            if shared.owed.load(Ordering::Acquire) && !state.closing {
                state = desk.changed.wait_timeout(state, OWED).expect("no holder panics").0;
            }
            if state.closing {
                return;
            }
            state.sweep = false;
        }
        if let Err(error) = crate::sweep::sweep(shared) {
            log::warn!("what nothing names is not given back yet: {}", error.whole());
        }
    }
}

fn work_off(shared: &Arc<Shared>, desk: &Desk) {
    sys::lowest_priority();
    loop {
        let id = {
            let mut state = desk.state.lock().expect("no holder panics");
            loop {
                if state.closing {
                    return;
                }
                if let Some(id) = state.next() {
                    break id;
                }
                state = desk.changed.wait(state).expect("no holder panics");
            }
        };
        // The offshoots' first moments count most: what is frozen can wait, and the processors cannot.
        std::thread::sleep(GRACE);
        let record = shared.pending.lock().expect("no holder panics").get(&id).cloned();
        let outcome = match record {
            Some(record) => commit(shared, &record, desk),
            None => Ok(()),
        };
        let mut state = desk.state.lock().expect("no holder panics");
        match outcome {
            Ok(()) => {
                state.queue.remove(&id);
                state.trouble.remove(&id);
                state.sweep |= state.queue.is_empty() && shared.sweep_again.load(Ordering::Acquire);
                desk.changed.notify_all();
            }
            Err(error) => {
                if state.trouble.insert(id, error.whole()).is_none() {
                    log::error!("snapshot {id:016x} cannot be stored, trying again: {}", error.whole());
                }
                state.failed = Some(id);
                desk.changed.notify_all();
                if state.next().is_none_or(|next| next <= id) {
                    drop(desk.changed.wait_timeout(state, RETRY).expect("no holder panics"));
                }
            }
        }
    }
}

fn commit(shared: &Arc<Shared>, record: &FreezeRecord, desk: &Desk) -> Result<()> {
    let device_file = shared.home.path(&format!("pending/{:016x}.device", record.id));
    let device = std::fs::read(&device_file).map_err(Error::io("read", &device_file))?;
    if !record.holder.alive() {
        return Err(Error::Host(format!("the process {} that held the RAM is gone", record.holder.pid)));
    }
    shared.recall()?;
    let transaction = shared.store.begin();
    let mut versions = BTreeMap::new();
    let report = |done: u64, total: u64| {
        desk.state.lock().expect("no holder panics").done_bytes = (done, total);
    };
    let before = record.base_ram.map(|id| known(shared, id)).transpose()?;
    let coloring = colors::of_freeze(shared, record, before);
    let kept = colors::without_free(record, coloring.as_ref());
    let ram = {
        let base = before.unwrap_or_else(|| shared.store.empty(record.shape.memory_bytes(), 4096));
        let source = ProcessMemory { pid: record.holder.pid, address: record.address };
        // Nothing is known yet of what offshoots will touch; pages of a color are touched together more than neighbours.
        let order = coloring.as_ref().filter(|_| record.tag.is_some()).map(|c| c.space());
        let order: Vec<u64> = order.iter().flat_map(|space| space.order()).map(|&page| page.into()).collect();
        let changes = Changes {
            written: &kept.written,
            zeroed: &kept.zeroed,
            source: &source,
            threads: 1,
            progress: Some(&report),
            cancel: None,
        };
        transaction.commit_in_order(&base, &changes, &order)?.0
    };
    versions.insert(record.shape.ram[0].id.clone(), ram);
    if let Some(coloring) = coloring.as_ref().filter(|c| colors::tell(c)) {
        versions.insert(colors::COLORS.into(), transaction.put_bytes(&coloring.encode())?);
    }
    let mut views = Vec::new();
    for (disk, &view) in record.shape.disks.iter().zip(&record.views) {
        let version = disk_version(shared, &transaction, disk, view, &report)?;
        versions.insert(disk.id.clone(), version);
        views.push((view, version));
    }
    versions.insert("device".into(), transaction.put_bytes(&device)?);
    if record.tag.is_some() {
        // What its machines boot again from, wherever they run by then. The image has the same blocks.
        let kernel = &record.origin.kernel;
        for (name, path) in [("kernel", Some(kernel)), ("initrd", record.origin.initrd.as_ref())] {
            if let Some(path) = path {
                crate::image::ensure_file(&shared.store, path)?;
                let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
                versions.insert(name.into(), transaction.put_bytes(&bytes)?);
            }
        }
    }
    let note = coloring.and_then(|c| c.account.hint).map(|hint| hint.note).or_else(|| colors::note_of(shared, record));
    publish(shared, record, transaction, versions, (&kept, note))?;
    if let Some(note) = note {
        shared.notes.lock().expect("no holder panics").insert(record.id, note);
    }
    let mut table = shared.versions.lock().expect("no holder panics");
    table.insert(record.id, ram);
    table.extend(views.iter().copied());
    drop(table);
    shared.mirror.set_ram_committed(record.id, &ram.to_string())?;
    for (view, version) in views {
        shared.mirror.set_view_committed(view, &version.to_string())?;
    }
    settled(shared, record);
    if record.tag.is_some() {
        // No copy stands on its disks' views: they are in the way from now on.
        shared.sweep_again.store(true, Ordering::Release);
    }
    Ok(())
}

/// Brings a view of a disk into the store. What it stands on is there already, or is a view that belongs to no
/// snapshot: the freeze failed after the disks were marked. Changes of those are this snapshot's own.
fn disk_version(
    shared: &Shared,
    transaction: &store::Transaction<'_>,
    disk: &vmm::shape::DiskShape,
    view: u64,
    report: &(dyn Fn(u64, u64) + Sync),
) -> Result<Version> {
    let mut layers = vec![shared.mirror.view(view)?];
    let mut version = loop {
        match &layers.last().expect("one at least").below {
            Below::Version(version) => {
                break version.parse().map_err(|_| {
                    Error::Mirror(format!("view {view:016x} stands on `{version}`, which is no version"))
                })?;
            }
            Below::Zero => break shared.store.empty(disk.bytes, disk.block_bytes),
            Below::View(id) => match known(shared, *id) {
                Ok(version) => break version,
                Err(error) if awaited(shared, *id) => return Err(error),
                Err(_) => layers.push(shared.mirror.view(*id)?),
            },
        }
    };
    for layer in layers.iter().rev() {
        let source = FileSource(File::open(&layer.data_path).map_err(Error::io("open", &layer.data_path))?);
        let ranges = |list: &[(u64, u64)]| list.iter().map(|&(s, e)| ByteRange::new(s, e)).collect::<Vec<_>>();
        version = changed(transaction, &version, &ranges(&layer.dirty), &ranges(&layer.zeroed), &source, report)?;
    }
    Ok(version)
}

/// Whether a snapshot that is still to be stored brings this view.
fn awaited(shared: &Shared, view: u64) -> bool {
    shared.pending.lock().expect("no holder panics").values().any(|record| record.views.contains(&view))
}

/// The snapshot is in the store and the mirror knows: what held it until now may go.
pub(crate) fn settled(shared: &Arc<Shared>, record: &FreezeRecord) {
    match shared.vm_by_id(record.vm_id) {
        Some(vm) => vm.committed(record.id, record.holder),
        None => record.holder.end(Duration::ZERO),
    }
    shared.pending.lock().expect("no holder panics").remove(&record.id);
    shared.forget_pending(record.id);
}

fn publish(
    shared: &Arc<Shared>,
    record: &FreezeRecord,
    transaction: store::Transaction<'_>,
    versions: BTreeMap<String, Version>,
    (kept, note): (&Kept, Option<u64>),
) -> Result<()> {
    let meta = SnapshotMeta {
        id: record.id,
        vm: record.vm.clone(),
        tag: record.tag.clone(),
        created: record.created.clone(),
        shape: record.shape.clone(),
        origin: record.origin.clone(),
        generation: record.generation,
        pause_ms: record.pause_ms,
        map: kept.map(&record.map)?,
        views: record.views.clone(),
        stored_bytes: transaction.stored_bytes(),
        dropped_bytes: kept.dropped_bytes,
        note,
    };
    let meta = serde_json::to_string(&meta).expect("records serialise");
    let manifest = Manifest { versions, meta };
    transaction.publish(&shared.own_head("freeze", record.id), store::Expect::Any, &manifest)?;
    if let Some(tag) = &record.tag {
        let head = snapshot_head(&record.vm, tag);
        // A crash between the two heads repeats this commit, and meets its own snapshot.
        match shared.store.begin().publish(&head, store::Expect::Absent, &manifest) {
            Ok(_) => {}
            Err(store::Error::HeadChanged { .. }) if is_ours(shared, &head, record.id)? => {}
            // Tags are reserved, so this is a record of other times. It must not be tried for ever.
            Err(store::Error::HeadChanged { .. }) => {
                log::error!("{head} is taken: a later snapshot keeps its RAM without a tag")
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_ours(shared: &Arc<Shared>, head: &str, id: u64) -> Result<bool> {
    Ok(match shared.store.head(head)? {
        Some((manifest, _)) => snapshots::meta(head, &manifest)?.id == id,
        None => false,
    })
}

fn known(shared: &Shared, id: u64) -> Result<Version> {
    let version = shared.versions.lock().expect("no holder panics").get(&id).copied();
    version.ok_or_else(|| Error::NotFound(format!("{id:016x}, on which this snapshot builds, is not in the store")))
}

fn changed(
    transaction: &store::Transaction<'_>,
    base: &Version,
    written: &[ByteRange],
    zeroed: &[ByteRange],
    source: &dyn BlockSource,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Version> {
    let changes = Changes { written, zeroed, source, threads: 1, progress: Some(progress), cancel: None };
    Ok(transaction.commit(base, &changes)?.0)
}

struct FileSource(File);

impl BlockSource for FileSource {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}
