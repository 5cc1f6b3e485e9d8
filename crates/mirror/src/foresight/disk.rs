//! Fetching ahead of those who read disks, and recording which blocks they read.
//!
//! A disk that shows a version of the store, by itself or below a layer, has [`Reads`]: while somebody wants to know,
//! the first read of each block that the disk still shows as that version is noted, in order. What was learnt so, the
//! daemon hands back as a plan: blocks in the order in which they are likely to be wanted. A [`Blocks`] stream brings
//! them into the node's cache and the store's memory, many at a time, a few threads for each version, and ends. Disks
//! of one version share it. Demand is answered by the fronts alone and never waits here; where it wants what is under
//! way, it gets that fetch's bytes.
//!
//! Nothing of this is kept: a mirror that takes over fetches on demand only, and has seen nothing.

use crate::control::{ForeseeDisk, OfDisk, Recording};
use crate::core::Core;
use crate::resolve::Versions;
use crate::stats::add;
use base::{Bitmap, ByteRange, PAGE};
use guest::plan::{Pace, settled};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Blocks that are recorded at most: 256 MiB. Who reads more copies the disk, and teaches nothing.
const RECORDED_MAX: usize = 1 << 16;
/// Threads of a stream.
const THREADS: usize = 4;
/// Streams at once; the disks of more are read on demand.
const STREAMS_MAX: usize = 8;
/// Blocks looked up at a time.
const BATCH: usize = 1024;
/// Blocks of a plan that are fetched before its readers read them: 16 MiB. A plan may go far beyond a boot, to what was
/// read a minute later; who reads as those before did is met by it on the way, and who does not never pays for it.
const AHEAD: usize = 4096;
/// A stream of which nobody has read anything for so long ends.
const UNUSED: Duration = Duration::from_secs(60);
/// Bytes of blocks that may be under way in any case: packed, the longest that two requests bring.
const FLYING_MIN: u64 = 4 << 20;
/// A batch of blocks that lies in more groups than one for so many bytes, and some, was perhaps laid down in its order
/// since the store was last looked at.
const GROUP_BYTES: u64 = 512 << 10;
const GROUPS_MORE: u64 = 4;

/// First reads of one disk's blocks.
#[derive(Default)]
pub(crate) struct Reads {
    /// Whether any of these is there, so that a disk of which nobody wants to know costs one load.
    on: AtomicBool,
    noted: Mutex<Option<Noted>>,
    /// What is fetched ahead of them.
    ahead: Mutex<Option<Arc<Blocks>>>,
}

struct Noted {
    began: Instant,
    seen: Bitmap,
    /// In order, in milliseconds.
    touches: Vec<(u32, u32)>,
}

impl Reads {
    /// Begins to record a disk of so many blocks; goes on where that was begun before.
    fn begin(&self, blocks: u64) {
        let mut noted = self.noted();
        if noted.is_none() {
            *noted = Some(Noted { began: Instant::now(), seen: Bitmap::new(blocks), touches: Vec::new() });
            self.on.store(true, Ordering::Release);
        }
    }

    /// Tells a stream what is read from now on.
    fn follow(&self, stream: &Arc<Blocks>) {
        *self.ahead() = Some(stream.clone());
        self.on.store(true, Ordering::Release);
    }

    /// Whether anybody wants to know.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// These blocks are read.
    pub(crate) fn note(&self, blocks: std::ops::Range<u64>) {
        let mut noted = self.noted();
        let mut ahead = self.ahead();
        if let Some(stream) = ahead.as_ref()
            && !stream.used(blocks.clone())
        {
            *ahead = None;
            self.on.store(noted.is_some(), Ordering::Release);
        }
        drop(ahead);
        let Some(noted) = noted.as_mut() else { return };
        let ms = u32::try_from(noted.began.elapsed().as_millis()).unwrap_or(u32::MAX);
        for block in blocks.start..blocks.end.min(noted.seen.len()) {
            if noted.touches.len() < RECORDED_MAX && noted.seen.set(block) {
                noted.touches.push((block as u32, ms));
            }
        }
    }

    /// Whether what is read has settled; with `end`, what was read, and nothing more is noted.
    pub(crate) fn recording(&self, end: bool) -> Result<Recording, String> {
        let mut kept = self.noted();
        let noted = kept.as_ref().ok_or("the disk is not recorded")?;
        let seen_ms = u32::try_from(noted.began.elapsed().as_millis()).unwrap_or(u32::MAX);
        let times: Vec<u32> = noted.touches.iter().map(|(_, ms)| *ms).collect();
        let full = noted.touches.len() >= RECORDED_MAX;
        let settled_ms = settled(&times, seen_ms).or(full.then_some(seen_ms));
        let touches = match end {
            false => Vec::new(),
            true => {
                self.on.store(self.ahead().is_some(), Ordering::Release);
                kept.take().filter(|_| !full).map_or_else(Vec::new, |noted| noted.touches)
            }
        };
        Ok(Recording { touches, settled_ms, seen_ms })
    }

    fn noted(&self) -> MutexGuard<'_, Option<Noted>> {
        self.noted.lock().expect("no holder panics")
    }

    /// Locked behind `noted`, where both are.
    fn ahead(&self) -> MutexGuard<'_, Option<Arc<Blocks>>> {
        self.ahead.lock().expect("no holder panics")
    }
}

/// The streams that run, by version.
#[derive(Default)]
pub(crate) struct Disks {
    streams: Mutex<HashMap<String, Arc<Blocks>>>,
}

impl Disks {
    /// Begins to fetch for a disk, to record it, or both.
    pub(crate) fn begin(&self, core: &Arc<Core>, spec: &ForeseeDisk) -> Result<(), String> {
        if spec.record {
            reads_of(core, &spec.disk, |reads, blocks| {
                reads.begin(blocks);
                Ok(())
            })?;
        }
        if spec.blocks.is_empty() {
            return Ok(());
        }
        let (stream, is_new) = {
            let mut streams = self.streams.lock().expect("no holder panics");
            match streams.get(&spec.version) {
                Some(stream) => (stream.clone(), false),
                None if streams.len() >= STREAMS_MAX => return Ok(()),
                None => {
                    let stream = Arc::new(Blocks::new(&spec.version, &spec.blocks));
                    streams.insert(spec.version.clone(), stream.clone());
                    (stream, true)
                }
            }
        };
        reads_of(core, &spec.disk, |reads, _| {
            reads.follow(&stream);
            Ok(())
        })?;
        if !is_new {
            return Ok(());
        }
        for _ in 0..THREADS {
            let (core, mine) = (core.clone(), stream.clone());
            let worker = std::thread::Builder::new().name("mirror-blocks".to_owned());
            let spawned = worker.spawn(move || {
                mine.work(core.objects.versions(), &|bytes| add(&core.vms.others.store_read_bytes, bytes));
                core.foresight.disks.over(&mine);
            });
            if let Err(e) = spawned {
                stream.stop();
                self.over(&stream);
                return Err(format!("no thread to fetch ahead: {e}"));
            }
        }
        Ok(())
    }

    /// Whether what a disk's readers want has settled; with `end`, what they read.
    pub(crate) fn recording(&self, core: &Core, disk: &OfDisk, end: bool) -> Result<Recording, String> {
        reads_of(core, disk, |reads, _| reads.recording(end))
    }

    /// The versions that are being fetched.
    pub(crate) fn running(&self) -> u64 {
        self.streams.lock().expect("no holder panics").len() as u64
    }

    fn over(&self, stream: &Arc<Blocks>) {
        let mut streams = self.streams.lock().expect("no holder panics");
        if streams.get(&stream.version).is_some_and(|known| Arc::ptr_eq(known, stream) && known.is_over()) {
            streams.remove(&stream.version);
        }
    }
}

fn reads_of<T>(core: &Core, disk: &OfDisk, see: impl FnOnce(&Reads, u64) -> Result<T, String>) -> Result<T, String> {
    match disk {
        OfDisk::Overlay(id) => {
            let overlay = core.objects.overlay(*id).ok_or_else(|| format!("there is no overlay {id:016x}"))?;
            see(&overlay.reads, overlay.size.div_ceil(overlay.block_size))
        }
        OfDisk::Export(name) => core.exports.reads_of(name, see),
    }
}

/// The blocks of one version, on their way.
pub(crate) struct Blocks {
    version: String,
    state: Mutex<State>,
    changed: Condvar,
    began: Instant,
}

struct State {
    /// Offsets, in the order of the plan, and how many of them have been looked up.
    plan: Vec<u64>,
    looked_up: usize,
    /// The blocks of the plan that nobody has read yet; the others, and when the last of them was read.
    unread: HashSet<u64>,
    read: usize,
    last_read: Instant,
    /// Somebody looks some up.
    looking: bool,
    /// Whether the store was looked at again.
    looked_again: bool,
    /// Groups that lie together.
    ready: VecDeque<Vec<u64>>,
    flying_bytes: u64,
    pace: Pace,
    over: bool,
}

impl State {
    /// The part of the plan that is to be fetched now: nothing while it is less than a batch, which would come in many
    /// small requests.
    fn due(&self) -> std::ops::Range<usize> {
        let end = self.plan.len().min(self.read + AHEAD);
        let whole = end == self.plan.len() || end >= self.looked_up + BATCH;
        self.looked_up..if whole { end } else { self.looked_up }
    }
}

/// What a thread is to do.
#[derive(Debug, PartialEq, Eq)]
enum Work {
    LookUp(std::ops::Range<usize>),
    Fetch(Vec<u64>),
}

impl Blocks {
    fn new(version: &str, blocks: &[u32]) -> Self {
        let unread: HashSet<u64> = blocks.iter().map(|block| u64::from(*block)).collect();
        let state = State {
            plan: blocks.iter().map(|block| u64::from(*block) * PAGE).collect(),
            looked_up: 0,
            unread,
            read: 0,
            last_read: Instant::now(),
            looking: false,
            looked_again: false,
            ready: VecDeque::new(),
            flying_bytes: 0,
            pace: Pace::default(),
            over: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Self { version: version.to_owned(), state, changed, began: Instant::now() }
    }

    /// A thread's part: until all is fetched, or something fails. What is left then is left to demand, and to its error.
    fn work(&self, versions: &dyn Versions, count: &dyn Fn(u64)) {
        while let Some(work) = self.next() {
            let done = match work {
                Work::LookUp(part) => self.look_up(versions, part),
                Work::Fetch(group) => self.fetch(versions, &group, count),
            };
            if let Err(why) = done {
                log::debug!("fetching {} ahead: {why}", self.version);
                self.stop();
            }
        }
    }

    /// The next thing to do, as soon as the link has room for it; none when it is over.
    fn next(&self) -> Option<Work> {
        let mut state = self.state();
        loop {
            if state.over {
                return None;
            }
            let allowed = state.pace.allowed().max(FLYING_MIN);
            let ready: usize = state.ready.iter().map(Vec::len).sum();
            let due = state.due();
            if !state.looking && !due.is_empty() && ready < BATCH {
                let part = due.start..(due.start + BATCH).min(due.end);
                (state.looking, state.looked_up) = (true, part.end);
                return Some(Work::LookUp(part));
            }
            if state.flying_bytes == 0 || state.flying_bytes < allowed {
                if let Some(group) = state.ready.pop_front() {
                    if state.flying_bytes == 0 {
                        let now = self.began.elapsed();
                        state.pace.rested(now);
                    }
                    state.flying_bytes += group.len() as u64 * PAGE;
                    return Some(Work::Fetch(group));
                }
                if state.flying_bytes == 0 && !state.looking && state.looked_up == state.plan.len() {
                    state.over = true;
                    self.changed.notify_all();
                    return None;
                }
            } else {
                state.pace.held_back();
            }
            let unused = state.last_read.elapsed();
            if unused >= UNUSED {
                state.over = true;
                self.changed.notify_all();
                return None;
            }
            (state, _) = self.changed.wait_timeout(state, UNUSED - unused).expect("no holder panics");
        }
    }

    /// Somebody reads these blocks; whether that is of interest still.
    fn used(&self, blocks: std::ops::Range<u64>) -> bool {
        let mut state = self.state();
        let before = state.unread.len();
        for block in blocks {
            state.unread.remove(&block);
        }
        let read = before - state.unread.len();
        if read > 0 {
            state.read += read;
            state.last_read = Instant::now();
            if !state.due().is_empty() {
                self.changed.notify_all();
            }
        }
        !state.over
    }

    fn look_up(&self, versions: &dyn Versions, part: std::ops::Range<usize>) -> Result<(), String> {
        let (offsets, again) = {
            let mut state = self.state();
            let offsets = state.plan[part].to_vec();
            (offsets, !std::mem::replace(&mut state.looked_again, true))
        };
        let mut groups = versions.away(&self.version, &offsets).map_err(|e| e.to_string());
        let apart = |groups: &Vec<Vec<u64>>| {
            let bytes: u64 = groups.iter().map(|group| group.len() as u64 * PAGE).sum();
            groups.len() as u64 > bytes / GROUP_BYTES + GROUPS_MORE
        };
        if again && groups.as_ref().is_ok_and(apart) {
            versions.look_again();
            groups = versions.away(&self.version, &offsets).map_err(|e| e.to_string());
        }
        let mut state = self.state();
        state.looking = false;
        state.ready.extend(groups?);
        self.changed.notify_all();
        Ok(())
    }

    fn fetch(&self, versions: &dyn Versions, group: &[u64], count: &dyn Fn(u64)) -> Result<(), String> {
        let began = Instant::now();
        // Whole groups stay in the store's memory, decompressed and checked, for the reader who is about to come.
        let read = versions.read_pages(&self.version, group, &mut |_, _| {});
        let bytes = group.len() as u64 * PAGE;
        let mut state = self.state();
        state.flying_bytes -= bytes;
        if read.is_ok() {
            state.pace.arrived(self.began.elapsed(), began.elapsed(), bytes);
        }
        self.changed.notify_all();
        drop(state);
        count(read.map_err(|e| e.to_string())?);
        Ok(())
    }

    fn stop(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        self.state().over
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

/// The blocks that a range of bytes touches.
pub(crate) fn blocks_of(range: ByteRange, block_size: u64) -> std::ops::Range<u64> {
    range.start / block_size..range.end.div_ceil(block_size)
}

#[cfg(test)]
mod tests;
