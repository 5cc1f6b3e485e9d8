//! The only way to a guest's bytes: checked against its RAM, and counted.

use crate::memory::{Error, Memory, Region};
use base::PAGE;
use std::fmt;

/// Most pages a guest may have: 64 TiB, what four levels of page tables reach.
const PAGES_MAX: u64 = 1 << 34;
/// What may be read whatever the guest's size.
const ALLOWANCE: u64 = 64 << 20;

/// Why a part of the work ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The host failed to read: the work ends.
    Host(Error),
    /// The guest points outside of its RAM.
    Absent(u64),
    /// The guest led to more work than its size explains.
    Spent,
    /// The guest's own description is missing something or makes no sense.
    Unfit(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(error) => error.fmt(f),
            Self::Absent(address) => write!(f, "it points to {address:#x}, where it has no RAM"),
            Self::Spent => f.write_str("it leads to more work than its size explains"),
            Self::Unfit(what) => f.write_str(what),
        }
    }
}

/// Reads guest-physical memory within a budget.
///
/// The budget counts bytes: what is read, and eight for each page that a large mapping covers. It is a third of the
/// guest's RAM and 64 MiB: descriptors take a sixty-fourth, page tables seldom a tenth.
pub(crate) struct Reader<'a> {
    memory: &'a dyn Memory,
    /// By physical address.
    regions: Vec<Region>,
    pages: u64,
    left: u64,
    read: u64,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(memory: &'a dyn Memory) -> Result<Self, Error> {
        let mut regions = memory.regions().to_vec();
        regions.retain(|r| !r.physical.is_empty());
        regions.sort_by_key(|r| r.physical.start);
        let refuse = |what: String| Err(Error::Regions(what));
        let mut pages = 0;
        for (i, region) in regions.iter().enumerate() {
            let (physical, offset) = (region.physical, region.offset);
            if physical.start % PAGE != 0 || physical.end % PAGE != 0 || offset % PAGE != 0 {
                return refuse(format!("{:#x}..{:#x} is not whole pages", physical.start, physical.end));
            }
            if i > 0 && regions[i - 1].physical.end > physical.start {
                return refuse(format!("two of them hold {:#x}", physical.start));
            }
            let end = offset.checked_add(physical.len()).filter(|end| end / PAGE <= PAGES_MAX);
            match end {
                Some(end) if physical.end / PAGE <= PAGES_MAX => pages = pages.max(end / PAGE),
                _ => return refuse(format!("{:#x}..{:#x} is beyond 64 TiB", physical.start, physical.end)),
            }
        }
        let mut reader = Self { memory, regions, pages, left: 0, read: 0 };
        reader.refill();
        Ok(reader)
    }

    /// A fresh budget, for another attempt.
    pub(crate) fn refill(&mut self) {
        self.left = ALLOWANCE + self.pages * PAGE / 3;
    }

    /// Pages of the blob.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes read so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read
    }

    /// Counts work that takes no reading.
    pub(crate) fn charge(&mut self, bytes: u64) -> Result<(), Stop> {
        self.left = self.left.checked_sub(bytes).ok_or(Stop::Spent)?;
        Ok(())
    }

    /// The blob's page at a physical address, where there is RAM.
    pub(crate) fn page(&self, physical: u64) -> Option<u64> {
        let region = self.region(physical)?;
        Some((physical - region.physical.start + region.offset) / PAGE)
    }

    fn region(&self, physical: u64) -> Option<&Region> {
        // Two or three regions: looking through them beats anything cleverer.
        self.regions.iter().find(|r| r.physical.start <= physical && physical < r.physical.end)
    }

    /// Reads what lies within one region.
    pub(crate) fn read(&mut self, physical: u64, into: &mut [u8]) -> Result<(), Stop> {
        let region = *self.region(physical).ok_or(Stop::Absent(physical))?;
        let length = into.len() as u64;
        if length > region.physical.end - physical {
            return Err(Stop::Absent(region.physical.end));
        }
        // A short read costs about as much as a cache line.
        self.charge(length.max(64))?;
        self.read += length;
        let offset = physical - region.physical.start + region.offset;
        self.memory.read(offset, into).map_err(|source| Stop::Host(Error::Read { offset, length: into.len(), source }))
    }

    pub(crate) fn word(&mut self, physical: u64) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.read(physical, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The first `each` bytes of pages of the blob. Not counted: it is done at most once over the whole memory.
    pub(crate) fn heads(&mut self, page: u64, each: usize, into: &mut [u8]) -> Result<(), Stop> {
        let offset = page * PAGE;
        self.read += into.len() as u64;
        self.memory
            .read_heads(offset, each, into)
            .map_err(|source| Stop::Host(Error::Read { offset, length: into.len(), source }))
    }
}
