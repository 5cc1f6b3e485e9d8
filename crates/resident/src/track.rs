//! Which pages were written since the last freeze.
//!
//! A userfaultfd registered for asynchronous write protection gives every page of RAM a mark that the kernel
//! clears at its next write; one `PAGEMAP_SCAN` reports the pages without a mark and marks them again, as one
//! step for each page, so that a write is either in this report or in the next, never in none.
//!
//! The scan selects pages that are written, and present or swapped:
//! - an unpopulated page counts as written in the kernel's eyes (it has no mark) but is neither present nor
//!   swapped, and is left alone: marking it would fill a page table for every 2 MiB of untouched RAM. When it is
//!   populated it starts without a mark: a write makes it a written page, a read a file page or the zero page;
//! - a file page that was read for the first time is selected and marked too; a second look at what was selected
//!   leaves it out. (Were the scan itself to select on `PAGE_IS_FILE`, it would read the descriptor of every page
//!   of RAM: 4.1 ms instead of 0.4 ms for 512 MiB.) Its first write clears the mark and copies it;
//! - the zero page is reported, apart from the others: either an untouched page was read, or a written page was
//!   merged into it (KSM); its contents are zero in both cases, so it counts as zeroed. It is marked, and its
//!   first write clears the mark.
//!
//! A page written between the two looks has become anonymous, so it is reported, and again by the next scan.

use crate::sys::{self, Categories, PageRegion};
use base::range::subtract;
use base::{ByteRange, PAGE};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

const WRITTEN: Categories = Categories {
    mask: sys::PAGE_IS_WRITTEN,
    any: sys::PAGE_IS_PRESENT | sys::PAGE_IS_SWAPPED,
    returned: sys::PAGE_IS_WRITTEN | sys::PAGE_IS_PFNZERO,
};

const FILE: Categories = Categories { mask: sys::PAGE_IS_FILE, any: 0, returned: sys::PAGE_IS_FILE };

/// Gap between selected ranges up to which one second look takes in both: a call (2 us) costs as much as so many
/// pages (30 ns each), so that the looks together never cost more than twice one over all of RAM.
const LOOK_GAP: u64 = 64 * PAGE;

/// Ranges one call of the kernel may report; more take more calls.
const REGIONS_PER_CALL: usize = 16_384;
/// The same for a second look: the kernel allocates a buffer by this number in each call.
const REGIONS_PER_LOOK: usize = 32;

/// Tracks one region of RAM.
pub(crate) struct Tracker {
    /// The userfaultfd and `/proc/self/pagemap`; none where the kernel or a sandbox refuses them.
    kernel: Option<(OwnedFd, OwnedFd)>,
    armed: bool,
    regions: Vec<PageRegion>,
}

/// What a scan found, as offsets in RAM, each list ascending.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) written: Vec<ByteRange>,
    /// Pages that hold the kernel's zero page.
    pub(crate) zero: Vec<ByteRange>,
}

impl Tracker {
    /// Opens what tracking needs, now, because `/proc` may be out of reach once the hypervisor has changed its
    /// root. Nothing is registered yet: an offshoot that is never frozen pays nothing.
    pub(crate) fn open() -> Self {
        let kernel = sys::userfaultfd().and_then(|uffd| {
            let pagemap = sys::open_read(Path::new("/proc/self/pagemap"))?;
            Ok((uffd, pagemap))
        });
        Self { kernel: kernel.ok(), armed: false, regions: Vec::new() }
    }

    /// Whether the next scan knows about every write since the last one.
    pub(crate) fn armed(&self) -> bool {
        self.armed
    }

    /// Registers a range without marking anything. The kernel maps the cached neighbours of a page that is read along
    /// with it (*fault-around*), except in ranges that are registered.
    pub(crate) fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let Some((uffd, _)) = &self.kernel else { return Err(io::Error::from_raw_os_error(libc::ENOSYS)) };
        sys::uffd_register(uffd, start, len)
    }

    /// Registers the whole RAM and marks every page. Where that fails, RAM stays untracked: slower, never wrong.
    pub(crate) fn arm(&mut self, start: usize, size: u64) {
        let Some((uffd, _)) = &self.kernel else { return };
        self.armed = sys::uffd_register(uffd, start, size as usize).is_ok();
        let _ = self.walk(start, ByteRange::new(0, size), WRITTEN, true, |_, _| {});
    }

    /// Registers a range that was mapped anew. Where that fails, RAM is untracked until the next [`Tracker::arm`].
    pub(crate) fn cover(&mut self, start: usize, len: usize) {
        if let Some((uffd, _)) = self.kernel.as_ref().filter(|_| self.armed) {
            self.armed = sys::uffd_register(uffd, start, len).is_ok();
        }
    }

    /// Reports what was written since the last scan and marks it again. `in_file` cuts a range down to its parts
    /// that were mapped from files.
    pub(crate) fn scan(
        &mut self,
        start: usize,
        size: u64,
        in_file: impl Fn(ByteRange) -> Vec<ByteRange>,
    ) -> io::Result<Written> {
        let mut found = Written::default();
        self.walk(start, ByteRange::new(0, size), WRITTEN, true, |range, categories| {
            let zero = categories & sys::PAGE_IS_PFNZERO != 0;
            push(if zero { &mut found.zero } else { &mut found.written }, range, 0);
        })?;
        let mut looks = Vec::new();
        for range in found.written.iter().flat_map(|&range| in_file(range)) {
            push(&mut looks, range, LOOK_GAP);
        }
        let mut clean = Vec::new();
        for look in looks {
            self.walk(start, look, FILE, false, |range, _| push(&mut clean, range, 0))?;
        }
        found.written = subtract(&found.written, &clean);
        Ok(found)
    }

    /// Runs one scan over `range`, in as many calls as it takes. A failure leaves RAM untracked.
    fn walk(
        &mut self,
        start: usize,
        range: ByteRange,
        what: Categories,
        protect: bool,
        mut each: impl FnMut(ByteRange, u64),
    ) -> io::Result<()> {
        let Some((_, pagemap)) = &self.kernel else { return Err(io::Error::from_raw_os_error(libc::ENOSYS)) };
        self.regions.resize(REGIONS_PER_CALL, PageRegion::default());
        let base = start as u64;
        let (mut at, end) = (base + range.start, base + range.end);
        while at < end {
            let room = if protect { REGIONS_PER_CALL } else { REGIONS_PER_LOOK };
            let step = sys::pagemap_scan(pagemap, at..end, what, protect, &mut self.regions[..room])
                .and_then(|step| if step.1 > at { Ok(step) } else { Err(io::ErrorKind::UnexpectedEof.into()) });
            let (filled, stopped) = step.inspect_err(|_| self.armed = false)?;
            for region in &self.regions[..filled] {
                each(ByteRange::new(region.start - base, region.end - base), region.categories);
            }
            at = stopped;
        }
        Ok(())
    }
}

/// Appends `range`, joined to the last one where no more than `gap` lies between them. Never takes anything away.
fn push(list: &mut Vec<ByteRange>, range: ByteRange, gap: u64) {
    match list.last_mut() {
        Some(last) if last.end + gap >= range.start => last.end = last.end.max(range.end),
        _ => list.push(range),
    }
}

#[cfg(test)]
mod tests;
