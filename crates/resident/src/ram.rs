//! Guest RAM: one private region, put together from zero memory and RAM files by the RAM map.
//!
//! Every page of it is `MADV_NOHUGEPAGE`: with transparent huge pages one touched byte would cost an offshoot
//! 2 MiB, count as 2 MiB written, and on a file make the kernel read 2 MiB around each fault.
//!
//! A **discarded** page must read as zeros at once and for ever, whatever it was. In anonymous memory
//! `MADV_DONTNEED` does that. A page of a RAM file is replaced by fresh anonymous memory: moved (`mremap`) out of a
//! pool that already has the RAM's advice, because a balloon discards page by page, and one move costs a third of
//! mapping and advising each page, and never shows a mapping without its advice. Where RAM is in too many
//! mappings already, the page is overwritten with zeros instead.

use crate::error::Error;
use crate::sys;
use crate::track::{Tracker, Written};
use base::resident::MAPPINGS_MAX;
use base::{Bitmap, ByteRange, PAGE, RamFileId, RamMap, Source};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Address space of a pool of fresh memory; it holds no pages.
const POOL_BYTES: usize = 64 << 20;
/// Discards between two counts of the mappings while at their limit.
const RECOUNT_EVERY: u32 = 1024;

/// The RAM of this hypervisor.
pub(crate) struct Ram {
    start: usize,
    size: u64,
    prot: libc::c_int,
    /// Where each page comes from now: discarded pages have become zero memory.
    map: RamMap,
    installed: bool,
    advice: Advice,
    pool: Pool,
    mappings: Mappings,
    tracker: Tracker,
    /// Whether the tracker counts from a freeze on, and not from [`Ram::prepare`] alone.
    frozen_before: bool,
    /// Pages that [`Ram::prepare`] found written since the last freeze.
    written: Option<Bitmap>,
    /// Pages discarded since the last freeze.
    zeroed: Bitmap,
    counters: Counters,
}

/// What `stat` reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) discards: u64,
    pub(crate) discarded_bytes: u64,
    pub(crate) refused_advice: u64,
}

/// What changed since the last freeze, each list ascending.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Whether `written` is known. If not, `zeroed` names all anonymous memory.
    pub(crate) tracked: bool,
    pub(crate) written: Vec<ByteRange>,
    pub(crate) zeroed: Vec<ByteRange>,
}

/// Advice that the hypervisor gave for the whole RAM, to be repeated for what is mapped later: mappings with
/// other flags would not merge, and a fork or core dump would take them along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Advice {
    mergeable: bool,
    dont_dump: bool,
}

#[derive(Default)]
struct Pool {
    start: usize,
    left: usize,
}

/// An upper bound of the kernel mappings that RAM is in; exact after a count.
#[derive(Default)]
struct Mappings {
    bound: usize,
    until_recount: u32,
}

impl Ram {
    /// Maps the placeholder: zero memory where the hypervisor wanted the shared file.
    pub(crate) fn place(address: usize, len: usize, prot: libc::c_int, flags: libc::c_int) -> Result<Self, Error> {
        let kept = flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE | libc::MAP_32BIT);
        let size = (len as u64).next_multiple_of(PAGE);
        // SAFETY: the hypervisor asked for a mapping at this very address with these very constraints.
        let start = unsafe { sys::mmap(address, size as usize, prot, kept | ANONYMOUS, -1, 0) }
            .map_err(|source| Error::Os { doing: format!("mapping {size} bytes of RAM"), source })?;
        let ram = Self {
            start,
            size,
            prot,
            map: RamMap::zero(size),
            installed: false,
            advice: Advice::default(),
            pool: Pool::default(),
            mappings: Mappings { bound: 1, until_recount: 0 },
            tracker: Tracker::open(),
            frozen_before: false,
            written: None,
            zeroed: Bitmap::new(size / PAGE),
            counters: Counters::default(),
        };
        ram.advise(start, size as usize)?;
        Ok(ram)
    }

    /// Address of the first byte.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether a RAM map was installed.
    pub(crate) fn installed(&self) -> bool {
        self.installed
    }

    /// How many extents it is put together from, now.
    pub(crate) fn extents(&self) -> usize {
        self.map.len()
    }

    /// What was counted since the start.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Puts the RAM map in the file `path` over the placeholder. All or nothing.
    pub(crate) fn install(&mut self, path: &Path, ram_dir: Option<&Path>) -> Result<usize, Error> {
        if self.installed {
            return Err(Error::AlreadyMapped);
        }
        let shown = path.display().to_string();
        let text = sys::read_text(path)
            .map_err(|source| Error::Os { doing: format!("reading the RAM map {shown}"), source })?;
        let map = RamMap::decode(&text).map_err(|why| Error::BadMap { path: shown.clone(), why })?;
        if map.size() != self.size {
            return Err(Error::MapSize { path: shown, map: map.size(), ram: self.size });
        }
        let files = open_files(&map, ram_dir)?;
        if let Err(error) = self.map_files(&map, &files) {
            self.replace_placeholder()?;
            return Err(error);
        }
        self.mappings.bound = map.len();
        self.map = map;
        self.installed = true;
        Ok(self.map.len())
    }

    /// Maps every extent of a file, then advises many at once: a map of a thousand small ones is no rarity, and an
    /// offshoot waits for each call.
    fn map_files(&self, map: &RamMap, files: &BTreeMap<RamFileId, OwnedFd>) -> Result<(), Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let mut runs: Vec<ByteRange> = Vec::new();
        for (range, source) in map.extents() {
            let Source::File(id) = source else { continue };
            let (at, len) = (self.address(range), range.len() as usize);
            // SAFETY: the range lies in guest RAM, which this library owns and the guest has not used yet.
            unsafe { sys::mmap(at, len, self.prot, flags, files[&id].as_raw_fd(), range.start) }
                .map_err(|source| Error::Os { doing: format!("mapping RAM at {:#x}", range.start), source })?;
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        self.advise(self.start, self.size as usize)?;
        for run in runs {
            // A fault fetches the page it is for: the mirror prefetches by plan and knows better than readahead.
            // SAFETY: this advice changes no contents.
            unsafe { sys::madvise(self.address(run), run.len() as usize, libc::MADV_RANDOM) }
                .map_err(|source| Error::Os { doing: "advising random access to RAM".to_owned(), source })?;
        }
        Ok(())
    }

    fn replace_placeholder(&self) -> Result<(), Error> {
        // SAFETY: the range is guest RAM, not in use before its map is installed.
        unsafe { sys::mmap(self.start, self.size as usize, self.prot, libc::MAP_FIXED | ANONYMOUS, -1, 0) }
            .map_err(|source| Error::Os { doing: "taking back a RAM map".to_owned(), source })?;
        self.advise(self.start, self.size as usize)
    }

    fn address(&self, range: ByteRange) -> usize {
        self.start + range.start as usize
    }

    /// Gives a mapping of RAM, or one that will become RAM, all the advice that RAM has.
    fn advise(&self, at: usize, len: usize) -> Result<(), Error> {
        let Advice { mergeable, dont_dump } = self.advice;
        let all = [
            (true, libc::MADV_NOHUGEPAGE),
            (true, libc::MADV_DONTFORK),
            (dont_dump, libc::MADV_DONTDUMP),
            (mergeable, libc::MADV_MERGEABLE),
        ];
        for (wanted, advice) in all {
            // SAFETY: none of this advice changes contents.
            match if wanted { unsafe { sys::madvise(at, len, advice) } } else { Ok(()) } {
                // A kernel built without huge pages or page merging has no such advice and needs none.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && advice != libc::MADV_DONTFORK => {}
                Err(source) => return Err(Error::Os { doing: format!("advising RAM ({advice})"), source }),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// The hypervisor's `madvise` on a part of RAM. Returns an errno where it is refused.
    pub(crate) fn advised(&mut self, range: ByteRange, advice: libc::c_int) -> Result<(), i32> {
        match advice {
            libc::MADV_HUGEPAGE | sys::MADV_COLLAPSE => {
                self.counters.refused_advice += 1;
                return Err(libc::EINVAL);
            }
            libc::MADV_DONTNEED | libc::MADV_REMOVE | libc::MADV_FREE | sys::MADV_DONTNEED_LOCKED => {
                return self.discard(range).map_err(|e| e.errno());
            }
            _ => {}
        }
        // SAFETY: advice that drops contents was handled above; the rest is the hypervisor's own wish.
        unsafe { sys::madvise(self.address(range), range.len() as usize, advice) }
            .map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL))?;
        if range.len() == self.size {
            let before = self.advice;
            match advice {
                libc::MADV_MERGEABLE => self.advice.mergeable = true,
                libc::MADV_UNMERGEABLE => self.advice.mergeable = false,
                libc::MADV_DONTDUMP => self.advice.dont_dump = true,
                libc::MADV_DODUMP => self.advice.dont_dump = false,
                _ => {}
            }
            if self.advice != before {
                self.drop_pool();
            }
        }
        Ok(())
    }

    /// Makes `range` read as zeros from now on. Bytes short of a page at its ends are overwritten.
    pub(crate) fn discard(&mut self, range: ByteRange) -> Result<(), Error> {
        let Some(range) = range.intersect(&ByteRange::new(0, self.size)) else { return Ok(()) };
        self.counters.discards += 1;
        self.counters.discarded_bytes += range.len();
        let (first, last) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if first >= last {
            self.overwrite(range);
            return Ok(());
        }
        self.overwrite(ByteRange::new(range.start, first));
        self.overwrite(ByteRange::new(last, range.end));
        let mut at = first;
        while at < last {
            let (source, end) = self.map.lookup(at);
            let piece = ByteRange::new(at, end.min(last));
            match source {
                Source::Zero => {
                    // SAFETY: the range is private anonymous memory of the guest's, which asked for its contents
                    // to be dropped.
                    unsafe { sys::madvise(self.address(piece), piece.len() as usize, libc::MADV_DONTNEED) }
                        .map_err(|source| Error::Os { doing: "dropping RAM".to_owned(), source })?;
                    self.log_zeroed(piece);
                }
                Source::File(_) if self.mappings_left() => {
                    self.freshen(piece)?;
                    self.log_zeroed(piece);
                }
                // No zero log: the page is a written one from here on, and its mark says so.
                Source::File(_) => self.overwrite(piece),
            }
            at = piece.end;
        }
        Ok(())
    }

    fn log_zeroed(&mut self, range: ByteRange) {
        self.zeroed.set_range(range.start / PAGE, range.end / PAGE);
        if let Some(written) = &mut self.written {
            clear_range(written, &range);
        }
    }

    fn overwrite(&self, range: ByteRange) {
        // SAFETY: the range lies in guest RAM, mapped writable; the guest has given up its contents, so whatever
        // it writes at the same time is lost by its own choice.
        unsafe { std::ptr::write_bytes(self.address(range) as *mut u8, 0, range.len() as usize) };
    }

    /// Replaces file pages by fresh zero memory.
    fn freshen(&mut self, range: ByteRange) -> Result<(), Error> {
        let (at, len) = (self.address(range), range.len() as usize);
        let from = self.take_from_pool(len)?;
        // SAFETY: `from` was just taken from the pool, and the target is guest RAM whose contents are given up.
        unsafe { sys::mremap_over(from, len, at) }
            .map_err(|source| Error::Os { doing: format!("discarding RAM at {:#x}", range.start), source })?;
        self.map.set(range, Source::Zero);
        self.mappings.bound += 2;
        self.tracker.cover(at, len);
        Ok(())
    }

    fn take_from_pool(&mut self, len: usize) -> Result<usize, Error> {
        if self.pool.left < len {
            self.drop_pool();
            let size = len.max(POOL_BYTES);
            // SAFETY: an address of the kernel's choice.
            let start = unsafe { sys::mmap(0, size, self.prot, ANONYMOUS, -1, 0) }
                .map_err(|source| Error::Os { doing: "reserving memory for discards".to_owned(), source })?;
            self.pool = Pool { start, left: size };
            self.advise(start, size)?;
        }
        self.pool.left -= len;
        Ok(self.pool.start + self.pool.left)
    }

    fn drop_pool(&mut self) {
        let Pool { start, left } = std::mem::take(&mut self.pool);
        if left > 0 {
            // SAFETY: what is left of the pool was never handed out. A failure leaves unused address space.
            let _ = unsafe { sys::munmap(start, left) };
        }
    }

    fn mappings_left(&mut self) -> bool {
        if self.mappings.bound + 2 <= MAPPINGS_MAX {
            return true;
        }
        if self.mappings.until_recount > 0 {
            self.mappings.until_recount -= 1;
            return false;
        }
        self.mappings.until_recount = RECOUNT_EVERY;
        if let Ok(maps) = sys::read_text(Path::new("/proc/self/maps")) {
            self.mappings.bound = count_mappings(&maps, self.start, self.start + self.size as usize);
        }
        self.mappings.bound + 2 <= MAPPINGS_MAX
    }

    /// Lets the next fork take RAM along, or no fork of the hypervisor's own.
    pub(crate) fn set_forkable(&self, forkable: bool) -> Result<(), Error> {
        let advice = if forkable { libc::MADV_DOFORK } else { libc::MADV_DONTFORK };
        // SAFETY: this advice changes no contents.
        unsafe { sys::madvise(self.start, self.size as usize, advice) }
            .map_err(|source| Error::Os { doing: "preparing RAM for the holder".to_owned(), source })
    }

    /// Takes work out of the next freeze while the guest runs: marks what was not marked, and collects what was
    /// written so far.
    pub(crate) fn prepare(&mut self) {
        if let Some(found) = self.scan() {
            let mut written = self.written.take().unwrap_or_else(|| Bitmap::new(self.size / PAGE));
            for range in &found.written {
                written.set_range(range.start / PAGE, range.end / PAGE);
                clear_range(&mut self.zeroed, range);
            }
            self.written = Some(written);
            found.zero.into_iter().for_each(|range| self.log_zeroed(range));
        } else {
            self.arm();
        }
    }

    /// What changed since the last call, and starts counting anew. `all` asks for everything since the start.
    pub(crate) fn take_changes(&mut self, all: bool) -> Changes {
        let scanned = self.scan();
        if scanned.is_none() {
            self.arm();
        }
        let tracked = self.frozen_before && !all;
        self.frozen_before = self.tracker.armed();
        let zeroed = std::mem::replace(&mut self.zeroed, Bitmap::new(self.size / PAGE));
        let written = self.written.take();
        match scanned {
            Some(found) if tracked => tracked_changes(found, written, zeroed),
            _ => Changes { tracked: false, written: Vec::new(), zeroed: self.anonymous() },
        }
    }

    /// What the tracker knows, where it knows all.
    fn scan(&mut self) -> Option<Written> {
        if !self.tracker.armed() {
            return None;
        }
        let map = &self.map;
        self.tracker.scan(self.start, self.size, |range| in_files(map, range)).ok()
    }

    /// From now on only what is touched is mapped.
    pub(crate) fn watch(&mut self) -> Result<(), Error> {
        let watched = self.tracker.register(self.start, self.size as usize);
        watched.map_err(|source| Error::Os { doing: "watching what is touched".to_owned(), source })
    }

    fn arm(&mut self) {
        self.frozen_before = false;
        self.written = None;
        self.tracker.arm(self.start, self.size);
    }

    fn anonymous(&self) -> Vec<ByteRange> {
        self.map.extents().filter(|&(_, source)| source == Source::Zero).map(|(range, _)| range).collect()
    }
}

const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Joins what was scanned with what was found before and what was discarded: a page written after its discard is a
/// written one.
fn tracked_changes(mut found: Written, before: Option<Bitmap>, mut zeroed: Bitmap) -> Changes {
    if zeroed.iter().next().is_some() {
        found.written.iter().for_each(|range| clear_range(&mut zeroed, range));
    }
    for range in &found.zero {
        zeroed.set_range(range.start / PAGE, range.end / PAGE);
    }
    if let Some(mut all) = before {
        found.zero.iter().for_each(|range| clear_range(&mut all, range));
        found.written.iter().for_each(|range| all.set_range(range.start / PAGE, range.end / PAGE));
        found.written = all.ranges(PAGE);
    }
    Changes { tracked: true, written: found.written, zeroed: zeroed.ranges(PAGE) }
}

fn clear_range(pages: &mut Bitmap, range: &ByteRange) {
    (range.start / PAGE..range.end / PAGE).for_each(|page| pages.clear(page));
}

/// The parts of `range` that come from files.
fn in_files(map: &RamMap, range: ByteRange) -> Vec<ByteRange> {
    let mut parts = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let (source, end) = map.lookup(at);
        let part = ByteRange::new(at, end.min(range.end));
        if source != Source::Zero {
            parts.push(part);
        }
        at = part.end;
    }
    parts
}

/// Opens every file a map names, and refuses files that end before an extent of theirs: the guest would be
/// killed by SIGBUS there, much later.
fn open_files(map: &RamMap, ram_dir: Option<&Path>) -> Result<BTreeMap<RamFileId, OwnedFd>, Error> {
    let mut files: BTreeMap<RamFileId, (OwnedFd, u64)> = BTreeMap::new();
    for (range, source) in map.extents() {
        let Source::File(id) = source else { continue };
        let path = ram_dir.ok_or(Error::NoRamDir)?.join(format!("{:016x}", id.0));
        let size = match files.get(&id) {
            Some(&(_, size)) => size,
            None => {
                let file = sys::open_read(&path).map_err(|source| Error::Os {
                    doing: format!("opening the RAM file {}", path.display()),
                    source,
                })?;
                let size = sys::identity(file.as_raw_fd()).map_or(0, |(_, _, size)| size);
                files.insert(id, (file, size));
                size
            }
        };
        if size < range.end {
            return Err(Error::ShortFile { path: path.display().to_string(), size, needed: range.end });
        }
    }
    Ok(files.into_iter().map(|(id, (file, _))| (id, file)).collect())
}

/// How many mappings of `/proc/PID/maps` lie in `start..end`.
fn count_mappings(maps: &str, start: usize, end: usize) -> usize {
    maps.lines()
        .filter_map(|line| usize::from_str_radix(line.split_once('-')?.0, 16).ok())
        .filter(|at| (start..end).contains(at))
        .count()
}

#[cfg(test)]
mod tests;
