//! Colors of frozen RAM: found while it is brought into the store, kept with the snapshot, used by whoever starts from
//! it.
//!
//! They are read from the holder, behind the guest's back: the pause pays nothing for them. Pages that the freeze did
//! not change are read where they are kept, not through the holder, whose faults could not be given up when the store
//! is away.
//!
//! What they say at once: a page in the guest's allocator is nobody's, so it is neither stored nor, in what starts from
//! the snapshot, fetched: it is zero. Whoever read such a page before the commit may have seen what it held at the
//! freeze; a guest that looks into free pages keeps them (`guest::FreePages`).

use crate::error::{Error, Result};
use crate::node::Shared;
use crate::record::FreezeRecord;
use crate::sys::ProcessMemory;
use base::range::{joined, subtract};
use base::{ByteRange, PAGE, RamFileId, RamMap, Source};
use guest::{Basis, Coloring, Hint, Memory, Region};
use std::io;
use std::time::Instant;
use store::{BlockSource, Manifest, Store, Version};

/// The name of a snapshot's colors among its versions.
pub(crate) const COLORS: &str = "colors";
/// Coloring reads about so much of the RAM: a fork that changed less is stored faster without.
const PAYS_FROM: u64 = 32;
/// Pages have numbers of 32 bits in what is kept.
const PAGES_MAX: u64 = u32::MAX as u64;
/// A run of free pages from which on it is worth a mapping of its own in what starts from the snapshot.
const MAPPED_MIN: u64 = 64 << 10;

/// Frozen RAM, put together from the holder and from what it was before.
struct FrozenRam<'a> {
    regions: Vec<Region>,
    zeros: Vec<ByteRange>,
    holder: ProcessMemory,
    store: &'a Store,
    before: Option<Version>,
    /// Which of the two has a page.
    map: RamMap,
    /// Whether pages of `before` are at hand: those that are not are not searched.
    near: bool,
}

const HOLDER: Source = Source::File(RamFileId(1));
const BEFORE: Source = Source::File(RamFileId(0));

impl<'a> FrozenRam<'a> {
    fn new(shared: &'a Shared, record: &FreezeRecord, before: Option<Version>) -> Self {
        let mut map = RamMap::zero(record.shape.memory_bytes());
        if before.is_some() {
            map.set(ByteRange::new(0, map.size()), BEFORE);
        }
        record.zeroed().into_iter().for_each(|range| map.set(range, Source::Zero));
        record.written().into_iter().for_each(|range| map.set(range, HOLDER));
        Self {
            regions: Region::of_pc(map.size(), record.shape.ram_below_hole()),
            zeros: map.extents().filter(|&(_, source)| source == Source::Zero).map(|(range, _)| range).collect(),
            holder: ProcessMemory { pid: record.holder.pid, address: record.address },
            store: &shared.store,
            before,
            map,
            near: !shared.is_shared(),
        }
    }

    /// Calls `each` with the parts of a range, and where they come from.
    fn parts(&self, range: ByteRange, mut each: impl FnMut(ByteRange, Source) -> io::Result<()>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (source, end) = self.map.lookup(at);
            let part = ByteRange::new(at, end.min(range.end));
            each(part, source)?;
            at = part.end;
        }
        Ok(())
    }
}

impl Memory for FrozenRam<'_> {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.parts(ByteRange::at(offset, into.len() as u64), |part, source| {
            let out = &mut into[(part.start - offset) as usize..(part.end - offset) as usize];
            match (source, &self.before) {
                (HOLDER, _) => self.holder.read(part.start, out),
                (BEFORE, Some(version)) => {
                    self.store.read_at(version, part.start, out).map(drop).map_err(io::Error::other)
                }
                _ => {
                    out.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn read_heads(&self, offset: u64, each: usize, into: &mut [u8]) -> io::Result<()> {
        let pages = (into.len() / each) as u64;
        self.parts(ByteRange::at(offset, pages * PAGE), |part, source| {
            let place = |at: u64| ((at - offset) / PAGE) as usize * each;
            let out = &mut into[place(part.start)..place(part.end)];
            match source {
                HOLDER => self.holder.read_heads(part.start, each, out),
                BEFORE if self.near => {
                    for (page, head) in out.chunks_mut(each).enumerate() {
                        self.read(part.start + page as u64 * PAGE, head)?;
                    }
                    Ok(())
                }
                _ => {
                    out.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn zeros(&self) -> &[ByteRange] {
        &self.zeros
    }
}

/// Colors what was frozen, where that pays; `before` is what the freeze changed. A failure costs the colors and nothing
/// else: the commit meets the same one, where it matters.
pub(crate) fn of_freeze(shared: &Shared, record: &FreezeRecord, before: Option<Version>) -> Option<Coloring> {
    let size = record.shape.memory_bytes();
    let pays = record.tag.is_some() || record.changed_bytes() >= size / PAYS_FROM;
    if !pays || size / PAGE >= PAGES_MAX || record.shape.ram.len() != 1 {
        return None;
    }
    let began = Instant::now();
    let ram = FrozenRam::new(shared, record, before);
    match guest::color(&ram, None, note_of(shared, record).map(|note| Hint { note })) {
        Ok(coloring) => {
            let account = &coloring.account;
            let (release, read) = (account.release.as_deref().unwrap_or("not understood"), account.bytes_read);
            log::debug!("{:016x}: {release}; {read} bytes read in {:?}", record.id, began.elapsed());
            Some(coloring)
        }
        Err(error) => {
            log::warn!("the memory of {} is not colored: {}", record.vm, with_source(&error));
            None
        }
    }
}

fn with_source(error: &guest::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Where the kernel's note was in what the VM started from, or in what was frozen of it before.
pub(crate) fn note_of(shared: &Shared, record: &FreezeRecord) -> Option<u64> {
    let base = record.base_ram?;
    shared.notes.lock().expect("no holder panics").get(&base).copied()
}

/// What of a freeze is to be stored: what it changed less what is free, and that as zero. Says how many bytes of what
/// was written are left out.
pub(crate) fn without_free(record: &FreezeRecord, coloring: Option<&Coloring>) -> Kept {
    let (written, mut zeroed) = (record.written(), record.zeroed());
    let free: Vec<ByteRange> = coloring.map_or_else(Vec::new, |c| {
        c.droppable().into_iter().map(|run| ByteRange::new(run.start * PAGE, run.end * PAGE)).collect()
    });
    if free.is_empty() {
        return Kept { written, zeroed, free, dropped_bytes: 0 };
    }
    let kept = subtract(&written, &free);
    let bytes = |ranges: &[ByteRange]| ranges.iter().map(ByteRange::len).sum::<u64>();
    let dropped_bytes = bytes(&written) - bytes(&kept);
    zeroed.extend(&free);
    Kept { written: kept, zeroed: joined(zeroed), free, dropped_bytes }
}

/// See [`without_free`]; each list ascends.
pub(crate) struct Kept {
    pub(crate) written: Vec<ByteRange>,
    pub(crate) zeroed: Vec<ByteRange>,
    pub(crate) free: Vec<ByteRange>,
    pub(crate) dropped_bytes: u64,
}

impl Kept {
    /// The map that VMs start with: what is free in large runs is memory of their own from the first.
    pub(crate) fn map(&self, frozen: &str) -> Result<String> {
        if self.free.is_empty() {
            return Ok(frozen.to_owned());
        }
        let mut map = RamMap::decode(frozen).map_err(Error::Invalid)?;
        self.free.iter().filter(|run| run.len() >= MAPPED_MIN).for_each(|&run| map.set(run, Source::Zero));
        Ok(map.encode())
    }
}

/// The colors that a manifest names; none where its RAM was not colored, or is of a guest that is not understood.
///
/// # Errors
/// Where the store cannot be read.
pub(crate) fn of_manifest(shared: &Shared, name: &str, manifest: &Manifest) -> Result<Option<Coloring>> {
    let Some(version) = manifest.versions.get(COLORS) else { return Ok(None) };
    let mut bytes = vec![0; version.size as usize];
    shared.store.read_at(version, 0, &mut bytes)?;
    match Coloring::decode(&bytes) {
        Ok(coloring) => Ok(Some(coloring)),
        Err(why) => {
            log::warn!("{name}: {why}; it is taken as not colored");
            Ok(None)
        }
    }
}

/// Whether colors say anything that is worth keeping.
pub(crate) fn tell(coloring: &Coloring) -> bool {
    coloring.account.basis != Basis::Nothing
}
