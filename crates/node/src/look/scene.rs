//! The RAM of a running VM at one moment.
//!
//! A page that the hypervisor has is read from it. One that it has not is read where its bytes come from, because to
//! read it from the hypervisor would bring it in: zeros where the mapping is anonymous, else the file's, by
//! [`Template`]. Between the look at the page table and the reading the host may take a clean page away; reading brings
//! such a page back, as the guest's own next touch would.

use super::template::Template;
use crate::error::{Error, Result};
use crate::node::Shared;
use crate::sys::{self, ProcessMemory};
use crate::vm::{RamPlace, Vm};
use base::{Bitmap, ByteRange, PAGE};
use guest::{Memory, Region};
use mirror::{PageKind, Pagemap};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use store::BlockSource;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nowhere near.
    Absent,
    /// In the host's page cache, and not mapped by this VM.
    Ready,
    /// The VM has read it, and it is the kernel's page of zeros.
    Zero,
    /// Mapped from a RAM file.
    Local,
    /// The VM's own.
    Dirty,
}

impl State {
    /// Whether the VM has it.
    pub(crate) fn is_resident(self) -> bool {
        matches!(self, Self::Zero | Self::Local | Self::Dirty)
    }
}

/// The pages of one VM, and how to read them.
pub(crate) struct Scene<'a> {
    pub(crate) place: RamPlace,
    /// Of each page.
    pub(crate) states: Vec<State>,
    /// The RAM files that are mapped, in order; between them lies anonymous memory.
    files: Vec<(ByteRange, u64)>,
    regions: Vec<Region>,
    zeros: Vec<ByteRange>,
    template: Template<'a>,
}

impl<'a> Scene<'a> {
    /// Looks at a VM; with `ready`, also at what of its files is in the host's page cache.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn of(shared: &'a Shared, vm: &Vm, place: RamPlace, ready: bool) -> Result<Self> {
        let path = format!("/proc/{}/maps", place.pid);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let files = mapped(&text, place);
        let mut states = vec![State::Absent; (place.size / PAGE) as usize];
        kinds(place, |range, kind| {
            let state = match kind {
                PageKind::Own => State::Dirty,
                PageKind::File => State::Local,
                PageKind::Zero => State::Zero,
            };
            states[(range.start / PAGE) as usize..(range.end / PAGE) as usize].fill(state);
        })
        .map_err(Error::io("read the pages of", &vm.name))?;
        if ready {
            find_ready(shared, &files, &mut states);
        }
        let zeros = zeros(&files, &states);
        let (regions, template) = (super::regions(&vm.view().record.shape), Template::new(shared));
        Ok(Self { place, states, files, regions, zeros, template })
    }

    /// So many pages that hold.
    pub(crate) fn count(&self, holds: impl Fn(State) -> bool) -> u64 {
        self.states.iter().filter(|&&state| holds(state)).count() as u64
    }

    /// The RAM file behind a page, and the end of what it is mapped for; none: anonymous memory.
    fn file(&self, offset: u64) -> (Option<u64>, u64) {
        let next = self.files.partition_point(|(range, _)| range.end <= offset);
        match self.files.get(next) {
            Some((range, id)) if range.start <= offset => (Some(*id), range.end),
            Some((range, _)) => (None, range.start),
            None => (None, self.place.size),
        }
    }
}

impl Memory for Scene<'_> {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let process = ProcessMemory { pid: self.place.pid, address: self.place.address };
        let (mut at, end) = (offset, offset + into.len() as u64);
        while at < end {
            // At first together what is here, or what is not; of that, what lies in one file.
            let here = |page: u64| self.states[page as usize].is_resident();
            let is_here = here(at / PAGE);
            let mut until = (at / PAGE + 1) * PAGE;
            while until < end && here(until / PAGE) == is_here {
                until += PAGE;
            }
            let (file, extent_end) = self.file(at);
            let until = if is_here { until } else { until.min(extent_end) }.min(end);
            let part = &mut into[(at - offset) as usize..(until - offset) as usize];
            match file {
                _ if is_here => process.read(at, part)?,
                Some(id) => self.template.read(id, at, part)?,
                None => part.fill(0),
            }
            at = until;
        }
        Ok(())
    }

    fn read_heads(&self, offset: u64, each: usize, into: &mut [u8]) -> io::Result<()> {
        let process = ProcessMemory { pid: self.place.pid, address: self.place.address };
        let (mut page, end) = ((offset / PAGE) as usize, (offset / PAGE) as usize + into.len() / each);
        let mut rest = into;
        while page < end {
            let is_here = self.states[page].is_resident();
            let run = (page..end).take_while(|&p| self.states[p].is_resident() == is_here).count();
            let (out, more) = rest.split_at_mut(run * each);
            if is_here {
                process.read_heads(page as u64 * PAGE, each, out)?;
            } else {
                for (at, head) in (page as u64..).zip(out.chunks_mut(each)) {
                    self.read(at * PAGE, head)?;
                }
            }
            (page, rest) = (page + run, more);
        }
        Ok(())
    }

    fn zeros(&self) -> &[ByteRange] {
        &self.zeros
    }
}

/// Whether colors could not be read because the memory is in a store far away.
pub(super) fn is_far(error: &guest::Error) -> bool {
    matches!(error, guest::Error::Read { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
}

/// The RAM files that a process maps for its RAM, by offset, out of its `maps`.
fn mapped(text: &str, place: RamPlace) -> Vec<(ByteRange, u64)> {
    let ram = ByteRange::at(place.address, place.size);
    let mapping = |line: &str| -> Option<(ByteRange, u64)> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let range = ByteRange::new(address(start)?, address(end)?).intersect(&ram)?;
        // Permissions, offset and device.
        let id = words.nth(3)?.parse().ok()?;
        // A home's path may hold spaces.
        let is_ram = words.any(|word| word.contains("/ram/"));
        is_ram.then_some((ByteRange::new(range.start - ram.start, range.end - ram.start), id))
    };
    text.lines().filter_map(mapping).filter(|(range, _)| !range.is_empty()).collect()
}

/// Says the pages that a VM has, as offsets in its RAM.
fn kinds(place: RamPlace, mut each: impl FnMut(ByteRange, PageKind)) -> io::Result<()> {
    let scanned = Pagemap::open(place.pid)?.kinds(place.address, place.size, |range, kind| {
        each(ByteRange::new(range.start - place.address, range.end - place.address), kind);
    });
    match scanned {
        // A kernel before 6.7: page by page, and a page of zeros that was only read looks like one that was written.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            let pages = sys::pages(place.pid, place.address, place.size)?;
            pages.private.ranges(PAGE).into_iter().for_each(|range| each(range, PageKind::Own));
            pages.shared.ranges(PAGE).into_iter().for_each(|range| each(range, PageKind::File));
            Ok(())
        }
        done => done,
    }
}

/// Marks what the VM does not have and the host's page cache does.
fn find_ready(shared: &Shared, files: &[(ByteRange, u64)], states: &mut [State]) {
    let mut by_file: BTreeMap<u64, Vec<ByteRange>> = BTreeMap::new();
    files.iter().for_each(|(range, id)| by_file.entry(*id).or_default().push(*range));
    for (id, ranges) in by_file {
        let path = shared.home.path(&format!("mnt/ram/{id:016x}"));
        let cached: io::Result<Bitmap> =
            File::open(&path).and_then(|file| sys::cached(&file, (states.len() as u64) * PAGE));
        let cached = match cached {
            Ok(cached) => cached,
            Err(error) => {
                // Shown as absent, which a fault of it then is not: nothing else depends on it.
                log::debug!("what is cached of {}: {error}", path.display());
                continue;
            }
        };
        for page in ranges.iter().flat_map(|range| range.start / PAGE..range.end / PAGE) {
            let state = &mut states[page as usize];
            if *state == State::Absent && cached.get(page) {
                *state = State::Ready;
            }
        }
    }
}

/// The pages known to be zero: anonymous and never written.
fn zeros(files: &[(ByteRange, u64)], states: &[State]) -> Vec<ByteRange> {
    let mut pages = Bitmap::new(states.len() as u64);
    let mut anonymous = vec![true; states.len()];
    for (range, _) in files {
        anonymous[(range.start / PAGE) as usize..(range.end / PAGE) as usize].fill(false);
    }
    for (page, (state, anonymous)) in states.iter().zip(anonymous).enumerate() {
        if *state == State::Zero || (anonymous && *state == State::Absent) {
            pages.set(page as u64);
        }
    }
    pages.ranges(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_behind_ram_are_found_in_the_maps() {
        let text = "\
10000-14000 rw-p 00000000 00:00 0
14000-18000 rw-p 00004000 00:35 77 /home/x y/mnt/ram/000000000000004d
18000-19000 rw-p 00008000 00:00 0 [heap]
1a000-1f000 r--p 00000000 08:01 12345 /usr/lib/libc.so.6
1f000-30000 rw-p 0000f000 00:35 12345678901234567890 /mnt/ram/ab54a98ceb1f0ad2
";
        let place = RamPlace { pid: 1, address: 0x1_0000, size: 0x1_2000 };
        let found = mapped(text, place);
        assert_eq!(found[0], (ByteRange::new(0x4000, 0x8000), 77));
        assert_eq!(found[1], (ByteRange::new(0xf000, 0x1_2000), 12_345_678_901_234_567_890));
        assert_eq!(found.len(), 2);
    }
}
