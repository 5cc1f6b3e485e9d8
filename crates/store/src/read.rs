//! Reading: every byte that leaves here was checked against the root of its version.

use crate::cache::Found;
use crate::catalog::{Location, Pack};
use crate::engine::Object;
use crate::error::Error;
use crate::frame::{Frame, Kind};
use crate::name::{Name, Version};
use crate::store::{Mode, Store};
use crate::tree::{self, Node, Nodes, Tree};
use base::ByteRange;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Packs open for reading at a time.
const OPEN_OBJECTS_MAX: usize = 512;
/// Blocks looked up at a time, so that a read of a whole blob needs little memory.
const STEP_BLOCKS: u64 = 1024;

/// What a read cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStat {
    /// Compressed bytes read from packs for it.
    pub stored_bytes: u64,
    /// Blocks that came out of the frame cache.
    pub cached_blocks: u64,
    /// Blocks that came with a frame read for this read.
    pub fetched_blocks: u64,
    /// Zero blocks.
    pub zero_blocks: u64,
}

/// An item found, in its frame.
pub(crate) struct Item {
    frame: Arc<Frame>,
    slot: usize,
    /// Bytes read from the pack for it; 0 when the frame was cached.
    pub(crate) stored: u64,
}

impl Item {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.frame.item(self.slot).expect("checked when it was found")
    }
}

impl Nodes for Store {
    type Error = Error;

    fn load(&self, name: &Name, height: u8) -> Result<Arc<Node>, Error> {
        self.counters.nodes_loaded.fetch_add(1, Ordering::Relaxed);
        // A commit walks trees too, and in a shared store others move and remove what it walks.
        let read = || if self.is_shared() { self.refreshed(|| self.read_node(name)) } else { self.read_node(name) };
        let (node, _) = self.nodes.get(*name, node_hash(name), weigh_node, read)?;
        if node.height() == height { Ok(node) } else { Err(Error::Unknown { kind: "node", name: *name }) }
    }
}

impl Store {
    /// Fills `buf` with the bytes of `version` from `offset`.
    ///
    /// # Errors
    /// The range lies outside the blob; something is missing, corrupt or unreadable, and `buf` must not be used.
    pub fn read_at(&self, version: &Version, offset: u64, buf: &mut [u8]) -> Result<ReadStat, Error> {
        let len = buf.len() as u64;
        let end = offset.checked_add(len).filter(|end| *end <= version.size);
        let end = end.ok_or(Error::OutOfRange { offset, len, size: version.size })?;
        self.refreshed(|| self.try_read(version, offset..end, buf))
    }

    /// Whether all of `range` is zero, as the tree tells it.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn is_zero(&self, version: &Version, range: ByteRange) -> Result<bool, Error> {
        if range.end > version.size {
            return Err(Error::OutOfRange { offset: range.start, len: range.len(), size: version.size });
        }
        let block = u64::from(version.block_size);
        let blocks = range.start / block..range.end.div_ceil(block);
        self.refreshed(|| tree::walk(self, tree_of(version), blocks.clone(), &mut |run| run.name.is_none()))
    }

    /// The runs of blocks that are not zero, ascending.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn data_ranges(&self, version: &Version) -> Result<Vec<ByteRange>, Error> {
        self.refreshed(|| {
            let mut out = Runs::new(version.block_size, version.size);
            tree::walk(self, tree_of(version), 0..version.blocks(), &mut |run| {
                if run.name.is_some() {
                    out.push(run.start);
                }
                true
            })?;
            Ok(out.ranges)
        })
    }

    /// The runs of blocks within `range` that are not zero, ascending and cut to it; and how far the answer reaches:
    /// the end of `range`, or less where it would have more than `most` runs. Asks the tree alone and reads no data.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn data_ranges_in(
        &self,
        version: &Version,
        range: ByteRange,
        most: usize,
    ) -> Result<(Vec<ByteRange>, u64), Error> {
        if range.end > version.size {
            return Err(Error::OutOfRange { offset: range.start, len: range.len(), size: version.size });
        }
        let block = u64::from(version.block_size);
        let blocks = range.start / block..range.end.div_ceil(block);
        self.refreshed(|| {
            let mut out = Runs::new(version.block_size, version.size);
            let mut reached = range.end;
            tree::walk(self, tree_of(version), blocks.clone(), &mut |run| {
                if run.name.is_some() {
                    out.push(run.start);
                }
                if out.ranges.len() > most {
                    reached = run.start * block;
                    out.ranges.pop();
                    return false;
                }
                true
            })?;
            let cut = |found: &ByteRange| found.intersect(&range);
            Ok((out.ranges.iter().filter_map(cut).collect(), reached))
        })
    }

    /// The runs of blocks that differ, ascending. Bytes beyond the end of the shorter version count as zero.
    /// Visits only what differs.
    ///
    /// # Errors
    /// The block sizes differ; or as [`Store::read_at`].
    pub fn diff(&self, a: &Version, b: &Version) -> Result<Vec<ByteRange>, Error> {
        if a.block_size != b.block_size {
            return Err(Error::Invalid(format!(
                "versions with blocks of {} and {} bytes cannot be compared block by block",
                a.block_size, b.block_size
            )));
        }
        self.refreshed(|| {
            let mut out = Runs::new(a.block_size, a.size.max(b.size));
            tree::diff(self, tree_of(a), tree_of(b), &mut |block| out.push(block))?;
            Ok(out.ranges)
        })
    }

    /// The names of the blocks in `blocks`, in order; none for zero ones. Asks the tree alone and reads no data: equal
    /// names are equal content, in whatever version of this store they stand.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn names(&self, version: &Version, blocks: Range<u64>) -> Result<Vec<Option<Name>>, Error> {
        if blocks.start > blocks.end || blocks.end > version.blocks() {
            let offset = blocks.start.saturating_mul(version.block_size.into());
            let len = blocks.end.saturating_sub(blocks.start).saturating_mul(version.block_size.into());
            return Err(Error::OutOfRange { offset, len, size: version.size });
        }
        self.refreshed(|| self.block_names(version, blocks.clone()))
    }

    /// Runs `work`; a reader that fails for what may be stale knowledge looks again: at new packs first, where
    /// everything that moved is found, then at all.
    pub(crate) fn refreshed<T>(&self, mut work: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        for all in [false, true] {
            match work() {
                // Who does not answer knows nothing newer either.
                Err(error) if self.mode != Mode::ReadWrite && error.may_be_stale() && !error.is_away() => {
                    self.refresh(all)?;
                }
                done => return done,
            }
        }
        work()
    }

    /// The names of the blocks in `blocks`; `None` for zero ones.
    pub(crate) fn block_names(&self, version: &Version, blocks: Range<u64>) -> Result<Vec<Option<Name>>, Error> {
        let mut names = Vec::with_capacity((blocks.end - blocks.start) as usize);
        tree::walk(self, tree_of(version), blocks, &mut |run| {
            names.extend((0..run.blocks).map(|_| run.name));
            true
        })?;
        Ok(names)
    }

    fn try_read(&self, version: &Version, range: Range<u64>, buf: &mut [u8]) -> Result<ReadStat, Error> {
        let size = u64::from(version.block_size);
        let mut stat = ReadStat::default();
        let (first, end) = (range.start / size, range.end.div_ceil(size));
        let mut at = first;
        let mut last: Option<(Location, Arc<Frame>)> = None;
        while at < end {
            let step = at..(at + STEP_BLOCKS).min(end);
            for (block, name) in step.clone().zip(self.block_names(version, step)?) {
                let from = (block * size).max(range.start);
                let to = ((block + 1) * size).min(range.end);
                let into = &mut buf[(from - range.start) as usize..(to - range.start) as usize];
                match name {
                    None => {
                        into.fill(0);
                        stat.zero_blocks += 1;
                    }
                    Some(name) => {
                        let inside = (from - block * size) as usize..(to - block * size) as usize;
                        self.read_block(&name, version.block_size, inside, into, &mut last, &mut stat)?;
                    }
                }
            }
            at = (at + STEP_BLOCKS).min(end);
        }
        Ok(stat)
    }

    fn read_block(
        &self,
        name: &Name,
        size: u32,
        inside: Range<usize>,
        into: &mut [u8],
        last: &mut Option<(Location, Arc<Frame>)>,
        stat: &mut ReadStat,
    ) -> Result<(), Error> {
        let item = self.item("block", name, last)?;
        let bytes = item.bytes();
        if bytes.len() != size as usize {
            return Err(Error::Unknown { kind: "block", name: *name });
        }
        into.copy_from_slice(&bytes[inside]);
        stat.stored_bytes += item.stored;
        if item.stored > 0 {
            stat.fetched_blocks += 1
        } else {
            stat.cached_blocks += 1
        }
        Ok(())
    }

    fn read_node(&self, name: &Name) -> Result<Arc<Node>, Error> {
        let item = self.item("node", name, &mut None)?;
        Node::decode(item.bytes()).map(Arc::new).ok_or(Error::Unknown { kind: "node", name: *name })
    }

    /// The bytes of an item, checked against its name.
    pub(crate) fn item_bytes(&self, kind: Kind, name: &Name) -> Result<Vec<u8>, Error> {
        let kind = if kind == Kind::Nodes { "node" } else { "block" };
        self.refreshed(|| Ok(self.item(kind, name, &mut None)?.bytes().to_vec()))
    }

    /// Finds an item and checks it against its name. `last` is the frame used before: neighbours share it.
    pub(crate) fn item(
        &self,
        kind: &'static str,
        name: &Name,
        last: &mut Option<(Location, Arc<Frame>)>,
    ) -> Result<Item, Error> {
        let mut distrusted = false;
        loop {
            let location = self.catalog.find(name).ok_or(Error::Unknown { kind, name: *name })?;
            match self.item_at(location, kind, name, last) {
                // A collection moved it between the look-up and the reading.
                Err(_) if self.catalog.find(name).is_some_and(|now| now != location) => {}
                // A copy that the engine keeps may be bad where the original is good.
                Err(Error::Corrupt { .. }) if !distrusted && self.distrust(location) => {
                    *last = None;
                    distrusted = true;
                }
                done => return done,
            }
        }
    }

    /// Tells the engine that a frame is not what it should be; whether to read it once more.
    fn distrust(&self, location: Location) -> bool {
        let Some(pack) = self.catalog.pack(location.pack) else { return false };
        let Some(info) = pack.frame(location.frame) else { return false };
        let range = ByteRange::at(u64::from(info.offset), u64::from(info.stored));
        self.with_object(&pack, |object| Ok(object.distrust(range))).unwrap_or(false)
    }

    fn item_at(
        &self,
        location: Location,
        kind: &'static str,
        name: &Name,
        last: &mut Option<(Location, Arc<Frame>)>,
    ) -> Result<Item, Error> {
        let slot = usize::from(location.slot);
        let (frame, stored) = match last {
            Some((at, frame)) if (at.pack, at.frame) == (location.pack, location.frame) => (Arc::clone(frame), 0),
            _ => {
                let fetched = self.frame(location, name, kind)?;
                *last = Some((location, Arc::clone(&fetched.0)));
                fetched
            }
        };
        if !frame.is_verified(slot) {
            let fits = frame.item(slot).is_some_and(|bytes| match kind {
                "node" => self.keys.node(bytes) == *name,
                _ => self.keys.block(bytes) == *name,
            });
            if !fits {
                // Read anew the next time: the medium may have been mended by then.
                self.frames.forget(&(location.pack, location.frame), frame_hash(location));
                return Err(self.corrupt(location, &format!("{kind} {name} does not match its name")));
            }
            frame.set_verified(slot);
        }
        Ok(Item { frame, slot, stored })
    }

    fn corrupt(&self, location: Location, what: &str) -> Error {
        let pack = self.catalog.pack(location.pack);
        let offset = pack.as_ref().and_then(|pack| pack.frame(location.frame)).map_or(0, |f| u64::from(f.offset));
        let object = pack.map_or_else(|| "a pack that went".to_owned(), |pack| pack.id.pack_object());
        Error::Corrupt { object, offset, what: what.to_owned() }
    }

    fn frame(&self, location: Location, name: &Name, kind: &'static str) -> Result<(Arc<Frame>, u64), Error> {
        let key = (location.pack, location.frame);
        let mut stored = 0;
        let fetch = || {
            let pack = self.catalog.pack(location.pack).ok_or(Error::Unknown { kind, name: *name })?;
            let info = pack.frame(location.frame).filter(|f| f.items > 0);
            let info = info.ok_or(Error::Unknown { kind, name: *name })?;
            let mut bytes = vec![0; info.stored as usize];
            self.with_object(&pack, |object| object.read_at(u64::from(info.offset), &mut bytes)).map_err(|error| {
                match error.kind() {
                    io::ErrorKind::UnexpectedEof => self.corrupt(location, "the pack is cut short"),
                    _ => Error::io("read", pack.id.pack_object(), error),
                }
            })?;
            stored = u64::from(info.stored);
            self.counters.frames_read.fetch_add(1, Ordering::Relaxed);
            Frame::decode(&info, bytes).map(Arc::new).map_err(|what| self.corrupt(location, &what))
        };
        let (frame, found) = self.frames.get(key, frame_hash(location), |frame| frame.weight(), fetch)?;
        Ok((frame, if found == Found::Fetched { stored } else { 0 }))
    }

    /// Reads from a pack's object, opened where it is not; the oldest is closed when too many are open.
    pub(crate) fn with_object<T>(&self, pack: &Pack, read: impl FnOnce(&dyn Object) -> io::Result<T>) -> io::Result<T> {
        let object = {
            let mut slot = pack.object();
            match slot.as_ref() {
                Some(object) => Arc::clone(object),
                None => {
                    let object = self.engine.open(&pack.id.pack_object())?;
                    *slot = Some(Arc::clone(&object));
                    drop(slot);
                    self.note_open(pack.handle);
                    object
                }
            }
        };
        read(&*object)
    }

    /// Remembers that a pack's object is open, and closes the oldest where too many are.
    pub(crate) fn note_open(&self, handle: u32) {
        let mut open = self.open_objects.lock().expect("no panic while the list is locked");
        open.push_back(handle);
        while open.len() > OPEN_OBJECTS_MAX {
            let oldest = open.pop_front().expect("longer than its bound");
            if let Some(pack) = self.catalog.pack(oldest).filter(|pack| pack.is_sealed()) {
                *pack.object() = None;
            }
        }
    }
}

/// Picks the shard of a frame.
pub(crate) fn frame_hash(location: Location) -> u64 {
    u64::from(location.frame).wrapping_add(u64::from(location.pack) * 7)
}

/// Picks the shard of a node.
pub(crate) fn node_hash(name: &Name) -> u64 {
    u64::from(name.0[1])
}

/// Bytes that a node keeps in memory.
pub(crate) fn weigh_node(node: &Arc<Node>) -> usize {
    32 * node.names().len() + 160
}

/// The tree of a version.
pub(crate) fn tree_of(version: &Version) -> Tree {
    Tree::new(version.root, version.height())
}

/// Collects ascending blocks as byte ranges, the last one cut to the size.
struct Runs {
    block: u64,
    size: u64,
    ranges: Vec<ByteRange>,
}

impl Runs {
    fn new(block_size: u32, size: u64) -> Self {
        Self { block: u64::from(block_size), size, ranges: Vec::new() }
    }

    fn push(&mut self, block: u64) {
        let start = block * self.block;
        let end = (start + self.block).min(self.size);
        match self.ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.ranges.push(ByteRange::new(start, end)),
        }
    }
}
