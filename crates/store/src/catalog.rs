//! What this process knows of the packs: where each name lies, and how many references it has.
//!
//! An entry takes 44 bytes, its place in the hash table 4 to 9 more; the frame records of the packs add about
//! 2 bytes a block. References are changed only by whoever holds the ledger (see `ledger`); locations may be
//! looked up by any thread at any time.

use crate::engine::{Object, Upload};
use crate::error::Error;
use crate::frame::{Encoded, FrameInfo};
use crate::name::Name;
use crate::pack::{Index, PACK_BYTES_MAX, PACK_FRAMES_MAX, PackId, frame_info};
use hashbrown::HashTable;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

const SHARDS: usize = 64;
const SLOT_BITS: u32 = 5;

/// Where an item lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    /// The pack's handle in this process; never used twice.
    pub(crate) pack: u32,
    pub(crate) frame: u32,
    pub(crate) slot: u8,
}

struct Entry {
    name: Name,
    pack: u32,
    /// Frame and slot.
    at: u32,
    refs: AtomicU32,
}

impl Entry {
    fn new(name: Name, location: Location, refs: u32) -> Self {
        let at = location.frame << SLOT_BITS | u32::from(location.slot);
        Self { name, pack: location.pack, at, refs: AtomicU32::new(refs) }
    }

    fn location(&self) -> Location {
        Location { pack: self.pack, frame: self.at >> SLOT_BITS, slot: (self.at & ((1 << SLOT_BITS) - 1)) as u8 }
    }
}

const _: () = assert!(size_of::<Entry>() == 44);

#[derive(Default)]
struct Shard {
    table: HashTable<u32>,
    entries: Vec<Entry>,
}

/// Names are uniform hashes already.
fn hash(name: &Name) -> u64 {
    u64::from_le_bytes(name.0[8..16].try_into().expect("eight bytes"))
}

impl Shard {
    fn find(&self, name: &Name) -> Option<&Entry> {
        let index = self.table.find(hash(name), |&i| self.entries[i as usize].name == *name)?;
        Some(&self.entries[*index as usize])
    }

    fn insert(&mut self, entry: Entry) {
        if self.entries.len() == self.entries.capacity() {
            // Doubling would waste as much as half of the largest structure there is.
            self.entries.reserve_exact((self.entries.len() / 8).max(64));
        }
        let Self { table, entries } = self;
        let key = hash(&entry.name);
        entries.push(entry);
        table.insert_unique(key, entries.len() as u32 - 1, |&i| hash(&entries[i as usize].name));
    }

    fn remove(&mut self, name: &Name) {
        let Self { table, entries } = self;
        let Ok(found) = table.find_entry(hash(name), |&i| entries[i as usize].name == *name) else { return };
        let (index, _) = found.remove();
        entries.swap_remove(index as usize);
        if let Some(moved) = entries.get(index as usize) {
            let old = entries.len() as u32;
            let place = table.find_mut(hash(&moved.name), |&i| i == old).expect("every entry is in the table");
            *place = index;
        }
    }
}

/// The part of a pack that exists while frames are still added.
pub(crate) struct Writer {
    upload: Box<dyn Upload>,
    index: Index,
    at: u64,
    /// The pack object may be visible, and its index; that was not confirmed.
    uploaded: bool,
}

/// One pack.
pub(crate) struct Pack {
    pub(crate) handle: u32,
    pub(crate) id: PackId,
    frames: RwLock<Vec<FrameInfo>>,
    /// Items that have references and lie here.
    live: AtomicU32,
    /// Open for reading; given back when too many are.
    object: Mutex<Option<Arc<dyn Object>>>,
    /// `None` once sealed.
    writer: Mutex<Option<Writer>>,
    sealed: AtomicBool,
    /// Frames appended whose items the catalog does not have yet: they only look dead.
    unentered: AtomicU32,
    /// The transaction that wrote it is gone.
    pub(crate) orphan: AtomicBool,
    /// In a shared store: the record condemns it, so nothing new may rely on it.
    pub(crate) condemned: AtomicBool,
    /// As [`Index::laid_for`].
    laid_for: AtomicU32,
    /// Frames were given up in memory that the index on the medium still lists, or that still take space.
    pub(crate) stale: AtomicBool,
}

impl Pack {
    /// A pack that is on the medium.
    pub(crate) fn sealed(handle: u32, id: PackId, index: &Index) -> Self {
        let pack = Self::new(handle, id, index.frames.clone(), None);
        pack.laid_for.store(index.laid_for, Ordering::Relaxed);
        pack
    }

    /// A pack to be written, whose header `upload` holds already.
    pub(crate) fn open(handle: u32, id: PackId, upload: Box<dyn Upload>, at: u64) -> Self {
        Self::new(handle, id, Vec::new(), Some(Writer { upload, index: Index::default(), at, uploaded: false }))
    }

    fn new(handle: u32, id: PackId, frames: Vec<FrameInfo>, writer: Option<Writer>) -> Self {
        Self {
            handle,
            id,
            frames: RwLock::new(frames),
            live: AtomicU32::new(0),
            object: Mutex::new(writer.as_ref().map(|w| w.upload.object())),
            sealed: AtomicBool::new(writer.is_none()),
            writer: Mutex::new(writer),
            unentered: AtomicU32::new(0),
            orphan: AtomicBool::new(false),
            condemned: AtomicBool::new(false),
            laid_for: AtomicU32::new(0),
            stale: AtomicBool::new(false),
        }
    }

    pub(crate) fn live(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn frame(&self, number: u32) -> Option<FrameInfo> {
        self.frames.read().expect("no panic while frames are locked").get(number as usize).copied()
    }

    /// The frame behind which the pack ends.
    pub(crate) fn last_frame(&self) -> Option<FrameInfo> {
        self.frames.read().expect("no panic while frames are locked").last().copied()
    }

    pub(crate) fn frames(&self) -> Vec<FrameInfo> {
        self.frames.read().expect("no panic while frames are locked").clone()
    }

    pub(crate) fn set_frames(&self, frames: Vec<FrameInfo>) {
        *self.frames.write().expect("no panic while frames are locked") = frames;
    }

    /// Marks frames as given up; they keep their numbers.
    pub(crate) fn give_up(&self, dead: impl Fn(u32) -> bool) {
        let mut frames = self.frames.write().expect("no panic while frames are locked");
        for (number, frame) in frames.iter_mut().enumerate() {
            if dead(number as u32) {
                frame.items = 0;
            }
        }
    }

    pub(crate) fn object(&self) -> MutexGuard<'_, Option<Arc<dyn Object>>> {
        self.object.lock().expect("no panic while an object is locked")
    }

    fn writer(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().expect("no panic while a pack is written")
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Whether it takes no more frames and all that it has are in the catalog.
    pub(crate) fn is_settled(&self) -> bool {
        self.is_sealed() && self.unentered.load(Ordering::Acquire) == 0
    }

    /// Says that the items of a frame that was appended are in the catalog now.
    pub(crate) fn entered(&self) {
        self.unentered.fetch_sub(1, Ordering::Release);
    }

    /// Adds a frame; `None` when the pack is sealed or full. The caller owes a call of [`Pack::entered`].
    pub(crate) fn append(&self, encoded: &Encoded, names: &[Name]) -> Result<Option<u32>, Error> {
        let mut guard = self.writer();
        let Some(writer) = guard.as_mut() else { return Ok(None) };
        let number = writer.index.frames.len();
        let full = writer.at + encoded.stored.len() as u64 > PACK_BYTES_MAX || number >= PACK_FRAMES_MAX;
        if full && number > 0 || writer.uploaded {
            return Ok(None);
        }
        let failed = |error| Error::io("write", self.id.pack_object(), error);
        writer.upload.append(&encoded.stored).map_err(failed)?;
        let offset = u32::try_from(writer.at).expect("packs are smaller than 4 GiB");
        writer.at += encoded.stored.len() as u64;
        writer.index.push(offset, encoded, names);
        let info = frame_info(offset, encoded, names.len());
        self.frames.write().expect("no panic while frames are locked").push(info);
        self.unentered.fetch_add(1, Ordering::Release);
        Ok(Some(number as u32))
    }

    /// Makes the pack durable and visible by `finish`: frames first, then the index.
    pub(crate) fn seal(
        &self,
        finish: impl FnOnce(&mut dyn Upload, PackId, &Index) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut guard = self.writer();
        let Some(writer) = guard.as_mut() else { return Ok(()) };
        // From the attempt on nobody can tell, and nothing may be added.
        writer.uploaded = true;
        finish(&mut *writer.upload, self.id, &writer.index)?;
        *self.object() = None;
        *guard = None;
        self.sealed.store(true, Ordering::Release);
        Ok(())
    }

    /// As [`Index::laid_for`].
    pub(crate) fn laid_for(&self) -> u32 {
        self.laid_for.load(Ordering::Relaxed)
    }

    /// Says for which version it is laid down; before it is sealed.
    pub(crate) fn lay_for(&self, tag: u32) {
        if let Some(writer) = self.writer().as_mut() {
            writer.index.laid_for = tag;
            self.laid_for.store(tag, Ordering::Relaxed);
        }
    }

    /// Ends an unsealed pack; returns the names in it, and whether its objects may be visible already. `None`
    /// when it was sealed meanwhile.
    pub(crate) fn abandon(&self) -> Option<(Vec<Name>, bool)> {
        self.writer().take().map(|writer| (writer.index.names, writer.uploaded))
    }
}

/// Every name and every pack.
pub(crate) struct Catalog {
    shards: Box<[RwLock<Shard>]>,
    /// By handle; `None` where a pack is gone.
    packs: RwLock<Vec<Option<Arc<Pack>>>>,
}

impl Catalog {
    pub(crate) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| RwLock::default()).collect(), packs: RwLock::default() }
    }

    fn shard(&self, name: &Name) -> &RwLock<Shard> {
        &self.shards[usize::from(name.0[0]) % SHARDS]
    }

    fn with<T>(&self, name: &Name, f: impl FnOnce(&Entry) -> T) -> Option<T> {
        self.shard(name).read().expect("no panic while a shard is locked").find(name).map(f)
    }

    /// Where `name` lies.
    pub(crate) fn find(&self, name: &Name) -> Option<Location> {
        self.with(name, Entry::location)
    }

    /// Adds `count` references; the number before, or `None` for an unknown name.
    pub(crate) fn add_refs(&self, name: &Name, count: u32) -> Option<u32> {
        let (before, pack) = self.with(name, |entry| (entry.refs.fetch_add(count, Ordering::Relaxed), entry.pack))?;
        if before == 0 && count > 0 {
            self.count_live(pack, true);
        }
        Some(before)
    }

    /// Drops one reference; the number after, or `None` for an unknown name or one without references.
    pub(crate) fn drop_ref(&self, name: &Name) -> Option<u32> {
        let (before, pack) = self.with(name, |entry| {
            let less = |refs: u32| refs.checked_sub(1);
            (entry.refs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less), entry.pack)
        })?;
        let after = before.ok()? - 1;
        if after == 0 {
            self.count_live(pack, false);
        }
        Some(after)
    }

    fn count_live(&self, pack: u32, more: bool) {
        if let Some(pack) = self.pack(pack) {
            if more {
                pack.live.fetch_add(1, Ordering::Relaxed)
            } else {
                pack.live.fetch_sub(1, Ordering::Relaxed)
            };
        }
    }

    /// Sets every count of references to zero.
    pub(crate) fn clear_refs(&self) {
        self.for_each(|_, _, refs| refs.store(0, Ordering::Relaxed));
        self.packs().iter().for_each(|pack| pack.live.store(0, Ordering::Relaxed));
    }

    /// Adds a name with `refs` references, unless it is there already; whether it was added.
    pub(crate) fn insert(&self, name: Name, location: Location, refs: u32) -> bool {
        let mut shard = self.shard(&name).write().expect("no panic while a shard is locked");
        if shard.find(&name).is_some() {
            return false;
        }
        shard.insert(Entry::new(name, location, refs));
        drop(shard);
        if refs > 0 {
            self.count_live(location.pack, true);
        }
        true
    }

    /// Adds a name, or says where it lies from now on. Only for names without references.
    pub(crate) fn place(&self, name: Name, location: Location) {
        let mut shard = self.shard(&name).write().expect("no panic while a shard is locked");
        shard.remove(&name);
        shard.insert(Entry::new(name, location, 0));
    }

    /// Says that `name` lies at `to` now, where it lay at `from`; whether it did.
    pub(crate) fn relocate(&self, name: &Name, from: Location, to: Location) -> bool {
        let mut shard = self.shard(name).write().expect("no panic while a shard is locked");
        let refs = match shard.find(name) {
            Some(entry) if entry.location() == from => entry.refs.load(Ordering::Relaxed),
            _ => return false,
        };
        shard.remove(name);
        shard.insert(Entry::new(*name, to, refs));
        drop(shard);
        if refs > 0 {
            self.count_live(from.pack, false);
            self.count_live(to.pack, true);
        }
        true
    }

    /// Forgets `name` where it lies in `pack`.
    pub(crate) fn forget(&self, name: &Name, pack: u32) {
        let mut shard = self.shard(name).write().expect("no panic while a shard is locked");
        if shard.find(name).is_some_and(|entry| entry.pack == pack) {
            shard.remove(name);
        }
    }

    /// Visits every entry: name, location, references.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(&Name, Location, &AtomicU32)) {
        for shard in &self.shards {
            let shard = shard.read().expect("no panic while a shard is locked");
            shard.entries.iter().for_each(|entry| visit(&entry.name, entry.location(), &entry.refs));
        }
    }

    /// Forgets the entries that `gone` picks.
    pub(crate) fn forget_where(&self, gone: impl Fn(Location) -> bool) {
        for shard in &self.shards {
            let mut shard = shard.write().expect("no panic while a shard is locked");
            let names: Vec<Name> = shard.entries.iter().filter(|e| gone(e.location())).map(|e| e.name).collect();
            names.iter().for_each(|name| shard.remove(name));
        }
    }

    /// How many names there are.
    pub(crate) fn len(&self) -> u64 {
        self.shards.iter().map(|s| s.read().expect("no panic while a shard is locked").entries.len() as u64).sum()
    }

    /// The pack of a handle.
    pub(crate) fn pack(&self, handle: u32) -> Option<Arc<Pack>> {
        self.packs.read().expect("no panic while packs are locked").get(handle as usize).cloned().flatten()
    }

    /// All packs, sealed and open.
    pub(crate) fn packs(&self) -> Vec<Arc<Pack>> {
        self.packs.read().expect("no panic while packs are locked").iter().flatten().cloned().collect()
    }

    /// Adds the pack that `make` makes for the handle it is given.
    pub(crate) fn add_pack(&self, make: impl FnOnce(u32) -> Pack) -> Arc<Pack> {
        let mut packs = self.packs.write().expect("no panic while packs are locked");
        let pack = Arc::new(make(packs.len() as u32));
        packs.push(Some(Arc::clone(&pack)));
        pack
    }

    /// Forgets a pack; its handle is not used again.
    pub(crate) fn remove_pack(&self, handle: u32) {
        self.packs.write().expect("no panic while packs are locked")[handle as usize] = None;
    }
}
