//! A slow engine with the node's disk in front of it.
//!
//! Packs are fetched in aligned chunks, neighbours together up to [`RUN_BYTES`], and kept in a directory within a
//! bound (`chunks`). Whatever is read from there is checked; what does not match is fetched again. Many readers of one
//! chunk share one fetch. The disk never causes an error: what it does not take is served without it.
//!
//! **Demand first.** Readers fetch in their own threads, at once. What is prefetched waits in a queue for a few
//! workers, which start a fetch only while no reader's fetch is under way; a reader that needs what a worker is
//! fetching waits for the rest of that one run and no more.
//!
//! **While the engine below is away**, chunks that are here are served in any case. Small objects (the key, indexes,
//! heads, listings) are asked for below each time, since they change, and a copy is kept. Only a cache opened with
//! [`CacheOptions::stale_reads`] answers with these copies while nothing else answers, and such a cache refuses
//! every write, so that nobody collects or publishes on what may be old. Tags of such heads match nothing.
//!
//! What does not belong here: retries, time limits and circuit breakers. They are the engine's below.

mod fetch;
mod forward;
mod prefetch;
#[cfg(test)]
mod tests;
mod upload;

use super::Engine;
use crate::chunks::Key;
use crate::chunks::disk::{Disk, PIECES, SLOT_OVERHEAD};
use crate::chunks::index::Index;
use crate::chunks::small::Small;
use crate::pack::{self, PackId};
use base::ByteRange;
use fetch::{Flight, OpenPack};
use prefetch::Queue;
use rustix::fs::{FlockOperation, flock};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes fetched at once at most.
pub const RUN_BYTES: usize = 1 << 20;
/// The size of a chunk where the options leave it open (measured by `examples/cache_chunks`).
pub const CHUNK_BYTES: u32 = 64 << 10;
const CHUNK_BYTES_MIN: u32 = 64 << 10;
const CHUNK_BYTES_MAX: u32 = 1 << 20;
/// How long a directory may be in use before that is an error: its last owner may just be ending, and what a process
/// starts holds its files for the moment until it is another program.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// More chunks than this get twice the size, so that the index of 1 TiB takes less than 100 MB.
const SLOTS_MAX: u64 = 1 << 21;
/// Small objects take an eighth of the bound, and no more than this.
const SMALL_BYTES_MAX: u64 = 16 << 30;

/// How a cache is to be.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Bytes on the disk, all files together.
    pub bytes: u64,
    /// Bytes of a chunk: a power of two from 64 KiB to 1 MiB. `None` takes what suits the bound. Another size than
    /// before empties the cache.
    pub chunk_bytes: Option<u32>,
    /// Fetches for prefetch at a time.
    pub prefetchers: usize,
    /// Serve kept copies of small objects while the engine below is away; refuses all writes.
    pub stale_reads: bool,
}

impl CacheOptions {
    /// Within `bytes`, with two prefetchers, for reading and writing.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self { bytes, chunk_bytes: None, prefetchers: 2, stale_reads: false }
    }

    fn small_budget(bytes: u64) -> u64 {
        (bytes / 8).min(SMALL_BYTES_MAX)
    }

    fn slots(bytes: u64, chunk: u64) -> u64 {
        (bytes - Self::small_budget(bytes)) / (chunk + SLOT_OVERHEAD)
    }

    fn chunk(&self) -> io::Result<u32> {
        let invalid = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let mut chunk = self.chunk_bytes.unwrap_or(CHUNK_BYTES);
        if !chunk.is_power_of_two() || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk) {
            return invalid(format!("a chunk of {chunk} bytes: use a power of two from 64 KiB to 1 MiB"));
        }
        while self.chunk_bytes.is_none() && chunk < CHUNK_BYTES_MAX && Self::slots(self.bytes, chunk.into()) > SLOTS_MAX
        {
            chunk *= 2;
        }
        if Self::slots(self.bytes, chunk.into()) > u64::from(u32::MAX) - 1 {
            return invalid(format!("{} bytes are more than a cache can have", self.bytes));
        }
        Ok(chunk)
    }
}

/// Ranges of one object, as [`crate::Store::places`] gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The object's name.
    pub object: String,
    /// Ranges of bytes in it.
    pub ranges: Vec<ByteRange>,
}

/// Counters since the cache was opened, and its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CacheStats {
    /// Chunks that a read found here, or being fetched for somebody else.
    pub hits: u64,
    /// Chunks that a read had to fetch.
    pub misses: u64,
    /// Fetches from below, of one or more chunks.
    pub fetches: u64,
    /// Bytes these brought.
    pub fetched_bytes: u64,
    /// Of these, for prefetch.
    pub prefetched_bytes: u64,
    /// Requests for prefetch that found the queue full.
    pub prefetch_refused: u64,
    /// Chunks that went to make room.
    pub evicted: u64,
    /// Chunks that did not match what was fetched, and were dropped to be fetched again.
    pub healed: u64,
    /// Chunks that were fetched and could not be kept: the disk is full or failing, or all room is pinned.
    pub uncached: u64,
    /// Answers that may be old, given while the engine below was away.
    pub stale_answers: u64,
    /// Bytes of one chunk.
    pub chunk_bytes: u64,
    /// Chunks here.
    pub chunks: u64,
    /// Chunks there is room for.
    pub chunks_max: u64,
    /// Chunks pinned, here or not yet.
    pub pinned: u64,
    /// Bytes that small objects take.
    pub small_bytes: u64,
    /// Bytes of memory that the index takes.
    pub memory_bytes: u64,
    /// Whether the disk is read and written past the page cache.
    pub direct: bool,
}

/// What keeps a cache from doing all that it should.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CacheHealth {
    /// The last call of the engine below failed: with what.
    pub away: Option<String>,
    /// For how many milliseconds no call succeeded, where one failed.
    pub away_ms: Option<u64>,
    /// Why the disk does not take what it should.
    pub disk: Option<String>,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    fetches: AtomicU64,
    fetched_bytes: AtomicU64,
    prefetched_bytes: AtomicU64,
    prefetch_refused: AtomicU64,
    healed: AtomicU64,
    uncached: AtomicU64,
    stale_answers: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

struct State {
    index: Index,
    /// Who fetches which chunk.
    flights: HashMap<Key, Arc<Flight>>,
    /// Slots the bound allows; fewer are used while the disk is full.
    wanted: usize,
    /// Chunks kept since the disk was full.
    since_full: u64,
}

#[derive(Default)]
struct Condition {
    away: Option<(Instant, String)>,
    disk: Option<String>,
}

struct Shared {
    origin: Arc<dyn Engine>,
    disk: Disk,
    small: Small,
    chunk: usize,
    stale_reads: bool,
    state: Mutex<State>,
    condition: Mutex<Condition>,
    /// Whether `condition` has anything, so that a healthy cache does not lock it.
    troubled: AtomicBool,
    counters: Counters,
    queue: Queue,
    _lock: File,
}

/// The engine. Dropping it ends the prefetch; what was opened through it stays good.
pub struct Cached {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Keeps chunks from being evicted for as long as it lives.
pub struct Pin {
    shared: Arc<Shared>,
    keys: Vec<Key>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.state().index.unpin(&self.keys);
    }
}

impl Cached {
    /// Puts the directory `dir` in front of `origin`. What earlier lives left there is used, unless it belongs to
    /// another store.
    ///
    /// # Errors
    /// Another process uses the directory, the file system refuses, or the options make no sense.
    pub fn open(origin: Arc<dyn Engine>, dir: &Path, options: &CacheOptions) -> io::Result<Self> {
        let chunk = options.chunk()?;
        fs::create_dir_all(dir)?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(dir.join("lock"))?;
        let began = Instant::now();
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if began.elapsed() < LOCK_WAIT {
                std::thread::sleep(LOCK_PAUSE);
                continue;
            }
            let what = format!("the cache directory {} is in use by another process; choose another", dir.display());
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        let small = Small::open(&dir.join("small"), CacheOptions::small_budget(options.bytes))?;
        // The key tells stores apart. While nobody answers, the copies are all there is.
        let found = origin.get("key");
        let of_this_store = match &found {
            Ok(key) => small.get("key") == *key,
            Err(_) => true,
        };
        let disk = Disk::open(dir, chunk as usize)?;
        if !of_this_store {
            small.clear()?;
        }
        let limit = CacheOptions::slots(options.bytes, chunk.into()) as usize;
        let mut index = Index::new(limit);
        disk.load(|kept| of_this_store && index.restore(kept.slot, kept.key, kept.pack_size))?;
        let state = State { index, flights: HashMap::new(), wanted: limit, since_full: 0 };
        let shared = Arc::new(Shared {
            origin,
            disk,
            small,
            chunk: chunk as usize,
            stale_reads: options.stale_reads,
            state: Mutex::new(state),
            condition: Mutex::default(),
            troubled: AtomicBool::new(false),
            counters: Counters::default(),
            queue: Queue::default(),
            _lock: lock,
        });
        if let Ok(Some(key)) = shared.observe(found) {
            shared.keep_small("key", &key);
        }
        let workers = (0..options.prefetchers)
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name("prefetch".to_owned()).spawn(move || shared.prefetch_for_ever())
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, workers })
    }

    /// From now on takes no more than `bytes`. What is too much has gone when this returns, but for what is being
    /// written at this moment.
    ///
    /// # Errors
    /// More is pinned than that; nothing was changed. The file system refuses to give space back.
    pub fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        let slots = CacheOptions::slots(bytes, self.shared.chunk as u64) as usize;
        {
            let mut state = self.shared.state();
            state.index.set_limit(slots).map_err(|pinned| {
                let pinned = pinned as u64 * self.shared.chunk as u64;
                let what = format!("{pinned} bytes of the cache are pinned; it cannot shrink to {bytes} bytes");
                io::Error::new(io::ErrorKind::InvalidInput, what)
            })?;
            state.wanted = slots;
        }
        self.shared.small.set_budget(CacheOptions::small_budget(bytes))?;
        self.shared.trim()
    }

    /// Keeps what lies there from being evicted until the pin is dropped, and fetches what is not here yet in the
    /// background. Pins do not survive the process.
    ///
    /// # Errors
    /// There is no room for all of it; nothing was pinned. An object is not a pack.
    pub fn pin(&self, places: &[Place]) -> io::Result<Pin> {
        let mut keys = Vec::new();
        for place in places {
            let pack = pack_of(&place.object).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a pack", place.object))
            })?;
            let numbers = place.ranges.iter().filter_map(|range| self.shared.numbers(range)).flatten();
            keys.extend(numbers.map(|number| Key { pack, number }));
        }
        keys.sort_unstable();
        keys.dedup();
        self.shared.state().index.pin(&keys).map_err(|beyond| {
            let what = format!("{beyond} chunks of {} bytes more than the cache has room for", self.shared.chunk);
            io::Error::new(io::ErrorKind::QuotaExceeded, what)
        })?;
        self.prefetch(places);
        Ok(Pin { shared: Arc::clone(&self.shared), keys })
    }

    /// How many bytes the chunks have that hold what lies there, and how many of these are not here.
    #[must_use]
    pub fn holds(&self, places: &[Place]) -> (u64, u64) {
        let mut keys: Vec<Key> = Vec::new();
        for place in places {
            let Some(pack) = pack_of(&place.object) else { continue };
            let numbers = place.ranges.iter().filter_map(|range| self.shared.numbers(range)).flatten();
            keys.extend(numbers.map(|number| Key { pack, number }));
        }
        keys.sort_unstable();
        keys.dedup();
        let state = self.shared.state();
        let missing = keys.iter().filter(|key| state.index.find(key).is_none()).count();
        (keys.len() as u64 * self.shared.chunk as u64, missing as u64 * self.shared.chunk as u64)
    }

    /// Fetches what lies there in the background, in this order, whenever no reader is fetching. What is here
    /// already costs nothing. Beyond 65,536 ranges waiting, more are refused and counted.
    pub fn prefetch(&self, places: &[Place]) {
        for place in places {
            let Some(pack) = pack_of(&place.object) else { continue };
            for range in &place.ranges {
                if !self.shared.queue.push(pack, *range) {
                    count(&self.shared.counters.prefetch_refused, 1);
                }
            }
        }
    }

    /// Waits until nothing is queued for prefetch and no prefetch is under way, at most this long; whether it is so.
    #[must_use]
    pub fn wait_for_prefetch(&self, at_most: Duration) -> bool {
        self.shared.queue.wait_until_idle(at_most)
    }

    /// Counters and state.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let shared = &*self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &shared.counters;
        let state = shared.state();
        let (used, limit) = state.index.room();
        CacheStats {
            hits: get(&counters.hits),
            misses: get(&counters.misses),
            fetches: get(&counters.fetches),
            fetched_bytes: get(&counters.fetched_bytes),
            prefetched_bytes: get(&counters.prefetched_bytes),
            prefetch_refused: get(&counters.prefetch_refused),
            evicted: state.index.evicted,
            healed: get(&counters.healed),
            uncached: get(&counters.uncached),
            stale_answers: get(&counters.stale_answers),
            chunk_bytes: shared.chunk as u64,
            chunks: used as u64,
            chunks_max: limit as u64,
            pinned: state.index.pinned() as u64,
            small_bytes: shared.small.taken(),
            memory_bytes: state.index.memory() as u64,
            direct: shared.disk.is_direct(),
        }
    }

    /// What is wrong, if anything.
    #[must_use]
    pub fn condition(&self) -> CacheHealth {
        let condition = self.shared.condition();
        let away = condition.away.as_ref();
        CacheHealth {
            away: away.map(|(_, what)| what.clone()),
            away_ms: away.map(|(since, _)| since.elapsed().as_millis() as u64),
            disk: condition.disk.clone(),
        }
    }

    fn open_pack(&self, name: &str, pack: PackId) -> OpenPack {
        OpenPack::new(Arc::clone(&self.shared), name, pack)
    }
}

impl Drop for Cached {
    fn drop(&mut self) {
        self.shared.queue.stop();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
    }
}

/// The pack that an object is, where it is one.
fn pack_of(object: &str) -> Option<PackId> {
    match PackId::parse(object.strip_prefix("packs/")?)? {
        (id, false) => Some(id),
        _ => None,
    }
}

/// Whether copies of this object are of use while the engine below is away.
fn is_small(name: &str) -> bool {
    name == "key" || name.starts_with("packs/") && name.ends_with(".idx")
}

/// Whether an error is no answer: the engine below could not be asked.
fn is_away(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    !matches!(
        error.kind(),
        Kind::NotFound | Kind::UnexpectedEof | Kind::InvalidInput | Kind::StorageFull | Kind::QuotaExceeded
    )
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while the cache's state is locked")
    }

    fn condition(&self) -> MutexGuard<'_, Condition> {
        self.condition.lock().expect("no panic while the condition is locked")
    }

    /// Notes how the engine below answered.
    fn observe<T>(&self, result: io::Result<T>) -> io::Result<T> {
        match &result {
            Err(error) if is_away(error) => {
                let mut condition = self.condition();
                let since = condition.away.take().map_or_else(Instant::now, |(since, _)| since);
                condition.away = Some((since, error.to_string()));
                self.troubled.store(true, Ordering::Relaxed);
            }
            _ if self.troubled.load(Ordering::Relaxed) => {
                let mut condition = self.condition();
                condition.away = None;
                self.troubled.store(condition.disk.is_some(), Ordering::Relaxed);
            }
            _ => {}
        }
        result
    }

    /// Notes how the disk answered; its errors go no further.
    fn observe_disk(&self, result: io::Result<()>) {
        match result {
            Err(error) => {
                self.condition().disk = Some(error.to_string());
                self.troubled.store(true, Ordering::Relaxed);
            }
            Ok(()) if self.troubled.load(Ordering::Relaxed) => {
                // As long as it does with less than the bound, the last refusal is the reason.
                let state = self.state();
                let all_used = state.index.room().1 >= state.wanted;
                drop(state);
                if all_used {
                    self.condition().disk = None;
                }
            }
            Ok(()) => {}
        }
    }

    fn keep_small(&self, name: &str, bytes: &[u8]) {
        self.observe_disk(self.small.put(name, bytes));
    }

    fn forget_small(&self, name: &str) {
        self.observe_disk(self.small.remove(name));
    }

    /// The copy of a small object, for an engine below that does not answer.
    fn stale(&self, name: &str, error: io::Error) -> io::Result<Vec<u8>> {
        // The key of a store never changes: its copy is as good as the key.
        if is_away(&error)
            && (self.stale_reads || name == "key")
            && let Some(bytes) = self.small.get(name)
        {
            count(&self.counters.stale_answers, 1);
            return Ok(bytes);
        }
        Err(error)
    }

    /// Asks below for names, one a line in the copy.
    fn listed(&self, copy: &str, ask: impl FnOnce() -> io::Result<Vec<String>>) -> io::Result<Vec<String>> {
        match self.observe(ask()) {
            Ok(mut names) => {
                names.sort_unstable();
                self.keep_small(copy, names.join("\n").as_bytes());
                Ok(names)
            }
            Err(error) => {
                let copy = self.stale(copy, error)?;
                Ok(String::from_utf8_lossy(&copy).lines().map(str::to_owned).collect())
            }
        }
    }

    fn writable(&self) -> io::Result<()> {
        if self.stale_reads {
            let what = "this cache may serve old heads, so it takes no writes; open it without stale reads";
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, what));
        }
        Ok(())
    }

    /// Drops the chunks of a range of a pack; how many.
    fn drop_chunks(&self, pack: PackId, range: &ByteRange) -> u64 {
        let mut dropped = 0;
        for number in self.numbers(range).into_iter().flatten() {
            let taken = self.state().index.take(&Key { pack, number });
            if let Some(slot) = taken {
                self.release(slot);
                dropped += 1;
            }
        }
        dropped
    }

    /// Gives back a slot that is listed no more.
    fn release(&self, slot: u32) {
        self.observe_disk(self.disk.clear(slot));
        self.state().index.give_back(slot);
    }

    /// Gives back what is beyond the limit.
    fn trim(&self) -> io::Result<()> {
        loop {
            let Some(slot) = self.state().index.evict_surplus() else { return Ok(()) };
            let cleared = self.disk.clear(slot);
            self.state().index.give_back(slot);
            cleared?;
        }
    }

    /// The chunks that a range touches; `None` for an empty one, or one beyond what a chunk's number can say.
    fn numbers(&self, range: &ByteRange) -> Option<std::ops::RangeInclusive<u16>> {
        let chunk = self.chunk as u64;
        if range.is_empty() {
            return None;
        }
        Some(u16::try_from(range.start / chunk).ok()?..=u16::try_from((range.end - 1) / chunk).unwrap_or(u16::MAX))
    }
}

/// The size of a pack by its index, where a copy of that is kept.
fn size_by_index(shared: &Shared, id: PackId) -> Option<u64> {
    pack::end_of_encoded(&shared.small.get(&id.index_object())?)
}

const _: () = assert!(CHUNK_BYTES_MIN as usize / PIECES >= crate::chunks::disk::ALIGN);
