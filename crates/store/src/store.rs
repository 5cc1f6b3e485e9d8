//! The store itself: opening, recovery, heads and figures.

use crate::blob;
use crate::cache::Cache;
use crate::catalog::{Catalog, Location, Pack};
use crate::commit::in_parallel;
use crate::engine::local::OpenError;
use crate::engine::{Engine, Etag, Health, Local, S3};
use crate::error::Error;
use crate::frame::{Frame, FrameInfo, Kind};
use crate::group::Group;
use crate::head::{self, Manifest};
use crate::ledger::Ledger;
use crate::name::{FORMAT, FORMAT_OLDEST, Keys, Name, Version};
use crate::pack::{Index, PackId};
use crate::publish::Publication;
use crate::shared::{GRACE_DEFAULT, WatchLock, boot_time};
use crate::tree::{self, Node};
use base::ByteRange;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a process may do with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The one process that writes, publishes and collects.
    ReadWrite,
    /// One of many processes that write, publish and collect at once, none of them special. Only on engines that
    /// compare and swap by themselves, as object stores do.
    Shared,
    /// Any process beside it: sees what is published, without reopening.
    ReadOnly,
}

/// Bytes of decompressed frames kept.
const FRAME_CACHE_BYTES: usize = 32 << 20;
/// Bytes of tree nodes kept.
const NODE_CACHE_BYTES: usize = 16 << 20;
const KEY_MAGIC: &[u8; 8] = b"OFFSTORE";

/// Counters since the store was opened.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) duplicates: AtomicU64,
    pub(crate) nodes_loaded: AtomicU64,
    pub(crate) nodes_made: AtomicU64,
    pub(crate) frames_read: AtomicU64,
}

/// Figures of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// Heads.
    pub heads: u64,
    /// Sizes of all versions that heads name, added up.
    pub logical_bytes: u64,
    /// Bytes the packs take on the medium.
    pub stored_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Frames in them.
    pub frames: u64,
    /// Blocks kept.
    pub blocks: u64,
    /// Tree nodes kept.
    pub nodes: u64,
    /// Blocks that commits found to be stored already, since the store was opened.
    pub duplicate_blocks: u64,
    /// Tree nodes looked at since then.
    pub nodes_loaded: u64,
    /// Tree nodes made since then.
    pub nodes_made: u64,
    /// Frames read from packs since then.
    pub frames_read: u64,
}

/// A store of versioned blobs. All methods may be called from many threads at once.
pub struct Store {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) mode: Mode,
    pub(crate) keys: Keys,
    pub(crate) catalog: Catalog,
    pub(crate) frames: Cache<(u32, u32), Arc<Frame>>,
    pub(crate) nodes: Cache<Name, Arc<Node>>,
    /// Every change of reference counts happens under this lock.
    pub(crate) ledger: Mutex<Ledger>,
    pub(crate) collecting: Mutex<()>,
    pub(crate) publishing: Mutex<()>,
    /// Used by shared stores.
    pub(crate) watch: WatchLock,
    /// The grace period of a shared store that this process makes.
    pub(crate) new_grace: Duration,
    pub(crate) publications: Group<Vec<Publication>, Vec<Result<Etag, Error>>>,
    /// Those who write to one blob at the same time.
    pub(crate) blob_writers: Mutex<HashMap<String, Arc<blob::Writers>>>,
    refreshing: Mutex<()>,
    pub(crate) open_packs: Mutex<Vec<Arc<Pack>>>,
    /// Packs whose objects are open, oldest first.
    pub(crate) open_objects: Mutex<VecDeque<u32>>,
    next_sequence: AtomicU64,
    pub(crate) counters: Counters,
}

impl Store {
    /// Opens the store in `dir`. As [`Mode::ReadWrite`] it is created where absent, and recovered from
    /// whatever state a killed writer left.
    ///
    /// # Errors
    /// Another process writes to it (its pid is named); it is not there (read-only); its key is corrupt.
    pub fn open(dir: &Path, mode: Mode) -> Result<Self, Error> {
        let engine = match mode {
            Mode::ReadOnly => Local::open_reader(dir),
            Mode::Shared => {
                return Err(Error::Invalid(format!(
                    "the directory {} cannot be shared by many writers; use an object store (s3://…) for that",
                    dir.display()
                )));
            }
            Mode::ReadWrite => Local::open_writer(dir).map_err(|error| match error {
                OpenError::Locked(pid) => Error::Locked { dir: dir.to_owned(), pid },
                OpenError::Io(source) => Error::io("open", dir.display().to_string(), source),
            })?,
        };
        Self::open_engine(Arc::new(engine), mode)
    }

    /// Opens the store at `place`: an address that starts with `s3://` (see [`crate::engine::S3::open`]), where
    /// [`Mode::ReadWrite`] is taken as [`Mode::Shared`], or else a directory.
    ///
    /// # Errors
    /// As [`Store::open`]; the address makes no sense, there are no credentials, or the server is refused.
    pub fn open_place(place: &str, mode: Mode) -> Result<Self, Error> {
        if !place.starts_with("s3://") {
            return Self::open(Path::new(place), mode);
        }
        let engine = S3::open(place).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Error::Invalid(error.to_string()),
            // Nothing of the address is repeated that could not be read.
            _ => Error::io("use", "the object store", error),
        })?;
        Self::open_engine(Arc::new(engine), if mode == Mode::ReadWrite { Mode::Shared } else { mode })
    }

    /// Opens the store on an engine.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_engine(engine: Arc<dyn Engine>, mode: Mode) -> Result<Self, Error> {
        Self::open_with_grace(engine, mode, GRACE_DEFAULT)
    }

    /// Opens a shared store on an engine. `grace` is how long what nothing reaches is kept at least, and twice how
    /// long a writer may work between two looks at the server. It counts for a store that is made now; one that
    /// exists keeps its own, so that all its writers agree.
    ///
    /// # Errors
    /// As [`Store::open`]; the engine cannot serve several writers.
    pub fn open_shared(engine: Arc<dyn Engine>, grace: Duration) -> Result<Self, Error> {
        Self::open_with_grace(engine, Mode::Shared, grace)
    }

    /// Opens a shared store whose medium may be away just now, as long as its key can be had (from a cache's copy).
    /// What needs the medium fails until it is back ([`Error::is_away`]); proof and first look come with the first
    /// need. Without an answer and a key it is an error as ever.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_shared_patiently(engine: Arc<dyn Engine>) -> Result<Self, Error> {
        let store = Self::open_with(engine, Mode::Shared, GRACE_DEFAULT)?;
        match store.look(|_| Duration::ZERO) {
            Err(error) if error.is_away() => log::warn!("{error}; going on with what is cached"),
            looked => looked?,
        }
        Ok(store)
    }

    fn open_with_grace(engine: Arc<dyn Engine>, mode: Mode, new_grace: Duration) -> Result<Self, Error> {
        let store = Self::open_with(engine, mode, new_grace)?;
        if mode == Mode::Shared {
            store.look(|_| Duration::ZERO)?;
            return Ok(store);
        }
        let found = store.load_packs(&BTreeMap::new())?;
        if mode == Mode::ReadWrite {
            let mut ledger = store.ledger();
            store.recount(&mut ledger)?;
            let damaged = !ledger.faults.is_empty();
            drop(ledger);
            if !damaged {
                store.clear_remains(&found)?;
            }
        }
        Ok(store)
    }

    /// The store without anything that is known of its packs.
    fn open_with(engine: Arc<dyn Engine>, mode: Mode, new_grace: Duration) -> Result<Self, Error> {
        if mode == Mode::Shared && !engine.can_share() {
            let place = engine.describe();
            return Err(Error::Invalid(format!(
                "{place} cannot be shared by many writers; use an object store (s3://…)"
            )));
        }
        if mode == Mode::ReadWrite && engine.is_remote() {
            let place = engine.describe();
            return Err(Error::Invalid(format!("nobody keeps other writers away from {place}; open it as shared")));
        }
        if mode == Mode::ReadWrite {
            prove(&*engine)?;
        }
        let (key, format) = load_key(&*engine, mode)?;
        let keys = Keys::derive(&key, format);
        Ok(Self {
            engine,
            mode,
            keys,
            catalog: Catalog::new(),
            frames: Cache::new(FRAME_CACHE_BYTES),
            nodes: Cache::new(NODE_CACHE_BYTES),
            ledger: Mutex::default(),
            collecting: Mutex::default(),
            publishing: Mutex::default(),
            watch: WatchLock::default(),
            new_grace,
            publications: Group::default(),
            blob_writers: Mutex::default(),
            refreshing: Mutex::default(),
            open_packs: Mutex::default(),
            open_objects: Mutex::default(),
            next_sequence: AtomicU64::new(1),
            counters: Counters::default(),
        })
    }

    pub(crate) fn writable(&self, action: &'static str) -> Result<(), Error> {
        if self.mode == Mode::ReadOnly { Err(Error::ReadOnly { action }) } else { Ok(()) }
    }

    /// Which store this is: the same in every process, another for every store, and no secret.
    #[must_use]
    pub fn id(&self) -> String {
        self.keys.id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// How the engine's medium has been answering.
    #[must_use]
    pub fn health(&self) -> Health {
        self.engine.health()
    }

    /// A blob of zeros. Costs nothing and needs no IO: its root is a well-known name.
    ///
    /// # Panics
    /// When `block_size` is not a power of two from 512 bytes to 1 MiB.
    #[must_use]
    pub fn empty(&self, size: u64, block_size: u32) -> Version {
        assert!(Version::block_size_is_valid(block_size), "block size {block_size}");
        let height = tree::height_of(size.div_ceil(u64::from(block_size)));
        Version { root: Name::zero(height), size, block_size }
    }

    /// The head of that name, where there is one.
    ///
    /// # Errors
    /// It cannot be read, or is corrupt.
    pub fn head(&self, name: &str) -> Result<Option<(Manifest, Etag)>, Error> {
        head::check_name(name)?;
        let asked = boot_time();
        let found = self.engine.head(name).map_err(|error| Error::io("read", head::object(name), error))?;
        let Some((bytes, etag)) = found else { return Ok(None) };
        let manifest = Manifest::decode(&bytes, name, &self.keys)?;
        self.note_seen(&manifest, asked);
        Ok(Some((manifest, etag)))
    }

    /// The names of all heads that start with `prefix`, sorted.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn heads(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let mut names = self.engine.heads().map_err(|error| Error::io("list", "heads", error))?;
        // What starts with a dot is the store's own.
        names.retain(|name| name.starts_with(prefix) && !name.starts_with('.'));
        names.sort_unstable();
        Ok(names)
    }

    /// Removes a head; whether it was there. What only it reached goes with the next [`Store::collect`].
    ///
    /// # Errors
    /// It cannot be removed. A corrupt head can.
    pub fn delete_head(&self, name: &str) -> Result<bool, Error> {
        self.writable("remove a head")?;
        head::check_name(name)?;
        if self.is_shared() {
            return self.engine.remove_head(name).map_err(|error| Error::io("remove", head::object(name), error));
        }
        // Nobody may count references anew between the removal and the release, nor publish over the head
        // between the reading and the removal: something would be subtracted twice.
        let _counts = self.hold_counts();
        let one = self.publishing.lock().expect("no panic while publishing");
        let manifest = match self.head(name) {
            Ok(None) => return Ok(false),
            Ok(Some((manifest, _))) => Some(manifest),
            Err(Error::Corrupt { .. }) => None,
            Err(error) => return Err(error),
        };
        let removed = self.engine.remove_head(name).map_err(|error| Error::io("remove", head::object(name), error))?;
        drop(one);
        if let Some(manifest) = manifest.filter(|_| removed) {
            let mut ledger = self.ledger();
            for version in manifest.versions.values() {
                self.release(&mut ledger, version.root, version.height());
            }
        }
        Ok(removed)
    }

    /// Figures. What cannot be read counts as nothing.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            duplicate_blocks: self.counters.duplicates.load(Ordering::Relaxed),
            nodes_loaded: self.counters.nodes_loaded.load(Ordering::Relaxed),
            nodes_made: self.counters.nodes_made.load(Ordering::Relaxed),
            frames_read: self.counters.frames_read.load(Ordering::Relaxed),
            ..Stats::default()
        };
        for name in self.heads("").unwrap_or_default() {
            stats.heads += 1;
            if let Ok(Some((manifest, _))) = self.head(&name) {
                stats.logical_bytes += crate::blob::logical_bytes(&name, &manifest);
            }
        }
        for pack in self.catalog.packs() {
            stats.packs += 1;
            stats.stored_bytes += match self.engine.is_remote() {
                // A request for each would take as long as there are packs.
                true => pack.frames().iter().map(|frame| u64::from(frame.stored)).sum(),
                false => self.engine.footprint(&pack.id.pack_object()).unwrap_or(0),
            };
            for frame in pack.frames().iter().filter(|frame| frame.items > 0) {
                stats.frames += 1;
                if frame.kind == Kind::Nodes {
                    stats.nodes += u64::from(frame.items);
                }
            }
        }
        stats.blocks = self.catalog.len().saturating_sub(stats.nodes);
        stats
    }

    /// Loads the indexes of packs that are not in `known`; returns everything found in the folder.
    fn load_packs(&self, known: &BTreeMap<PackId, Arc<Pack>>) -> Result<Found, Error> {
        let files = self.engine.list("packs").map_err(|error| Error::io("list", "packs", error))?;
        let mut found = Found::default();
        for (id, is_index) in files.iter().filter_map(|file| PackId::parse(file)) {
            if is_index { found.indexes.push(id) } else { found.packs.push(id) }
        }
        found.indexes.sort_unstable();
        found.packs.sort_unstable();
        let newest = found.packs.iter().chain(&found.indexes).map(|id| id.sequence).max().unwrap_or(0);
        self.next_sequence.fetch_max(newest + 1, Ordering::Relaxed);
        let new: Vec<PackId> = found.indexes.iter().filter(|id| !known.contains_key(id)).copied().collect();
        // Over a network one after another would take as long as there are packs.
        let threads = if self.engine.is_remote() { 16 } else { 1 };
        let read = crate::commit::in_parallel(threads, new, |id| Ok((id, self.read_index(id))))?;
        for (id, index) in read {
            match index {
                Ok(Some(index)) if found.packs.binary_search(&id).is_ok() => self.place_pack(id, &index)?,
                Ok(Some(_)) => log::warn!("{} is missing beside its index", id.pack_object()),
                // Removed since it was listed.
                Ok(None) => {}
                Err(error @ Error::Corrupt { .. }) => log::warn!("{error}"),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Reads and checks an index.
    pub(crate) fn read_index(&self, id: PackId) -> Result<Option<Index>, Error> {
        let object = id.index_object();
        let bytes = self.engine.get(&object).map_err(|error| Error::io("read", object.clone(), error))?;
        let Some(bytes) = bytes else { return Ok(None) };
        match Index::decode(&bytes, id, &self.keys) {
            Ok(index) => Ok(Some(index)),
            Err((offset, what)) => Err(Error::Corrupt { object, offset, what }),
        }
    }

    fn place_pack(&self, id: PackId, index: &Index) -> Result<(), Error> {
        let pack = self.catalog.add_pack(|handle| Pack::sealed(handle, id, index));
        let Err(error) = self.place_items(&pack, index) else { return Ok(()) };
        self.catalog.remove_pack(pack.handle);
        // The writer may have removed the pack since its index was read.
        if self.read_index(id)?.is_none() { Ok(()) } else { Err(error) }
    }

    /// Enters what an index lists, less what a pack cut short no longer has.
    fn place_items(&self, pack: &Pack, index: &Index) -> Result<(), Error> {
        let object = pack.id.pack_object();
        let len = if self.engine.is_remote() {
            u64::MAX // visible as a whole or not at all; asking costs a request for each pack
        } else {
            self.with_object(pack, |object| object.size()).map_err(|error| Error::io("open", object, error))?
        };
        for (frame, info, names) in index.items() {
            if u64::from(info.offset) + u64::from(info.stored) <= len {
                for (slot, name) in names.iter().enumerate() {
                    self.catalog.place(*name, Location { pack: pack.handle, frame, slot: slot as u8 });
                }
            }
        }
        Ok(())
    }

    /// Brings a reader up to date. With `all`, packs known already are read again as well: their frames may
    /// have been given up and their blocks stored elsewhere.
    /// Tells whether packs are gone.
    pub(crate) fn refresh(&self, all: bool) -> Result<bool, Error> {
        let _guard = self.refreshing.lock().expect("no panic while refreshing");
        let mut known: BTreeMap<PackId, Arc<Pack>> =
            self.catalog.packs().into_iter().map(|pack| (pack.id, pack)).collect();
        // Packs that this process is writing are not there yet, or appear while the folder is read.
        let written: Vec<PackId> = known.values().filter(|pack| !pack.is_sealed()).map(|pack| pack.id).collect();
        let found = self.load_packs(&known)?;
        written.iter().for_each(|id| drop(known.remove(id)));
        let mut lost = false;
        for (id, pack) in &known {
            if found.indexes.binary_search(id).is_err() {
                lost = true;
                self.catalog.remove_pack(pack.handle);
                self.catalog.forget_where(|location| location.pack == pack.handle);
            } else if all && let Some(index) = self.read_index(*id)? {
                pack.set_frames(index.frames.clone());
                self.catalog.forget_where(|location| location.pack == pack.handle);
                if let Err(error) = self.place_items(pack, &index)
                    && self.read_index(*id)?.is_some()
                {
                    return Err(error);
                }
            }
        }
        Ok(lost)
    }

    /// Removes what a killed writer left: packs without index, indexes without pack, frames given up whose
    /// space was not given back yet. Called only when everything that heads reach is known to be there.
    fn clear_remains(&self, found: &Found) -> Result<(), Error> {
        let without = |these: &[PackId], those: &[PackId]| -> Vec<PackId> {
            these.iter().filter(|id| those.binary_search(id).is_err()).copied().collect()
        };
        let mut remains: Vec<String> =
            without(&found.packs, &found.indexes).into_iter().map(PackId::pack_object).collect();
        remains.extend(without(&found.indexes, &found.packs).into_iter().map(PackId::index_object));
        if !remains.is_empty() {
            self.engine.remove(&remains).map_err(|error| Error::io("remove", remains[0].clone(), error))?;
        }
        for pack in self.catalog.packs() {
            let frames = pack.frames();
            let kept: u64 = frames.iter().filter(|f| f.items > 0).map(|f| u64::from(f.stored) + 8192).sum();
            let object = pack.id.pack_object();
            let given_up = frames.iter().any(|frame| frame.items == 0);
            if given_up && self.engine.footprint(&object).is_ok_and(|bytes| bytes > kept + 8192) {
                let ranges = given_up_ranges(&frames);
                self.engine.punch(&object, &ranges).map_err(|error| Error::io("punch holes in", object, error))?;
            }
        }
        Ok(())
    }

    /// Starts a pack.
    pub(crate) fn start_pack(&self) -> Result<Arc<Pack>, Error> {
        let random = random_bytes().map_err(|error| Error::io("read", "/dev/urandom", error))?;
        let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        let id = PackId { sequence, random: u64::from_le_bytes(random) };
        let object = id.pack_object();
        let start = || {
            let mut upload = self.engine.upload(&object)?;
            upload.append(&id.header())?;
            Ok(upload)
        };
        let upload = start().map_err(|error| Error::io("write", object.clone(), error))?;
        let pack = self.catalog.add_pack(|handle| Pack::open(handle, id, upload, id.header().len() as u64));
        self.open_packs.lock().expect("no panic while open packs are locked").push(Arc::clone(&pack));
        Ok(pack)
    }

    /// Makes every pack durable that something refers to. A block that one transaction stored may be one that
    /// another found there, so all of them, not only those of the caller.
    pub(crate) fn seal_open_packs(&self) -> Result<(), Error> {
        let open = self.open_packs.lock().expect("no panic while open packs are locked").clone();
        self.seal_packs(open.iter().filter(|pack| pack.live() > 0))
    }

    /// Makes packs durable and visible, as many at once as the medium takes well.
    pub(crate) fn seal_packs<'a>(&self, packs: impl Iterator<Item = &'a Arc<Pack>>) -> Result<(), Error> {
        let sealed = in_parallel(self.engine.concurrency(), packs.collect(), |pack| self.seal_pack(pack));
        self.open_packs.lock().expect("no panic while open packs are locked").retain(|pack| !pack.is_sealed());
        sealed.map(|_| ())
    }

    fn seal_pack(&self, pack: &Pack) -> Result<(), Error> {
        let sealed = pack.is_sealed();
        pack.seal(|upload, id, index| {
            let finished = self.engine.finish_with(upload, &id.index_object(), &index.encode(id, &self.keys));
            finished.map_err(|error| Error::io("make durable", id.pack_object(), error))
        })?;
        if !sealed {
            // It is open for reading from now on, and one of those that may be closed.
            self.note_open(pack.handle);
        }
        Ok(())
    }
}

/// What the packs folder holds, sorted.
#[derive(Default)]
struct Found {
    packs: Vec<PackId>,
    indexes: Vec<PackId>,
}

/// The runs of frames given up, as ranges of the pack.
pub(crate) fn given_up_ranges(frames: &[FrameInfo]) -> Vec<ByteRange> {
    let mut out: Vec<ByteRange> = Vec::new();
    for frame in frames.iter().filter(|frame| frame.items == 0) {
        let range = ByteRange::at(u64::from(frame.offset), u64::from(frame.stored));
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    out
}

pub(crate) fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut out = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut out)?;
    Ok(out)
}

/// Has the medium show that it does what the store's safety stands on.
pub(crate) fn prove(engine: &dyn Engine) -> Result<(), Error> {
    engine.prove().map_err(|error| Error::io("use", engine.describe(), error))
}

/// Reads the key and the store's format, or makes a store where a writer opens an empty place.
fn load_key(engine: &dyn Engine, mode: Mode) -> Result<([u8; 32], u32), Error> {
    let not_a_store = |why: &str| Error::NotAStore { dir: engine.describe(), why: why.to_owned() };
    let found = engine.get("key").map_err(|error| Error::io("read", "key", error))?;
    if let Some(bytes) = found {
        return decode_key(&bytes);
    }
    if mode == Mode::ReadOnly {
        return Err(not_a_store("it has no key file"));
    }
    // Nothing is written before that. It comes before the lists, too: some servers make a bucket with the first put.
    prove(engine)?;
    let packs = engine.list("packs").map_err(|error| Error::io("list", "packs", error))?;
    let heads = engine.heads().map_err(|error| Error::io("list", "heads", error))?;
    if !packs.is_empty() || !heads.is_empty() {
        return Err(not_a_store("its key file is missing, without which nothing in it can be checked; restore it"));
    }
    let key = random_bytes().map_err(|error| Error::io("read", "/dev/urandom", error))?;
    if engine.put_new("key", &encode_key(&key, FORMAT)).map_err(|error| Error::io("write", "key", error))? {
        return Ok((key, FORMAT));
    }
    // Another writer of a shared store was faster.
    let found = engine.get("key").map_err(|error| Error::io("read", "key", error))?;
    decode_key(&found.ok_or_else(|| not_a_store("its key file went while it was opened"))?)
}

pub(crate) fn encode_key(key: &[u8; 32], format: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    out.extend_from_slice(KEY_MAGIC);
    out.extend_from_slice(&format.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(key);
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    out
}

/// The key and the store's format.
pub(crate) fn decode_key(bytes: &[u8]) -> Result<([u8; 32], u32), Error> {
    let corrupt = |what: &str| Error::Corrupt { object: "key".to_owned(), offset: 0, what: what.to_owned() };
    let bytes: &[u8; 80] = bytes.try_into().map_err(|_| corrupt("the key file has not 80 bytes"))?;
    let key: [u8; 32] = bytes[16..48].try_into().expect("32 bytes");
    if bytes[48..] != *blake3::hash(&bytes[..48]).as_bytes() {
        return Err(corrupt("the key does not match its checksum"));
    }
    let format = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    if !(FORMAT_OLDEST..=FORMAT).contains(&format) || bytes[..48] != encode_key(&key, format)[..48] {
        return Err(corrupt("not a store of format 1 or 2; a newer release may have made it"));
    }
    Ok((key, format))
}
