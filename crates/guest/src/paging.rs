//! Page tables of x86-64: four or five levels of 512 entries (Intel SDM volume 3, chapter 4; AMD64 volume 2, chapter 5).

use crate::reader::{Reader, Stop};
use base::{Bitmap, PAGE};

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of an entry: 12 to 51. A mask of what a memory-encrypting host sets there is not needed
/// where its guests cannot be read anyway.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(crate) type Table = Box<[u64; 512]>;

/// Reads a whole table.
pub(crate) fn table(reader: &mut Reader, physical: u64) -> Result<Table, Stop> {
    let mut bytes = [0; PAGE as usize];
    reader.read(physical & ADDRESS, &mut bytes)?;
    let mut entries = Box::new([0; 512]);
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    Ok(entries)
}

/// Address bits below the index of a level; level 1 is the last.
fn shift(level: u8) -> u32 {
    3 + 9 * u32::from(level)
}

/// Which half of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    User,
    Kernel,
}

/// One run of memory that is mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    pub(crate) address: u64,
    pub(crate) physical: u64,
    pub(crate) bytes: u64,
    pub(crate) user: bool,
    pub(crate) execute: bool,
    pub(crate) write: bool,
}

/// What a walk meets.
pub(crate) enum Met {
    /// A page that is a table, by its physical address.
    Table(u64),
    Leaf(Leaf),
}

/// An address space, for single addresses. Remembers the last table of each level.
pub(crate) struct Space {
    root: u64,
    levels: u8,
    recent: [Option<(u64, Table)>; 5],
}

impl Space {
    pub(crate) fn new(root: u64, levels: u8) -> Self {
        Self { root, levels, recent: [const { None }; 5] }
    }

    /// Index of an address in the root.
    pub(crate) fn root_index(&self, address: u64) -> usize {
        (address >> shift(self.levels) & 511) as usize
    }

    /// The physical address behind a virtual one, and how many bytes from there on the same entry maps.
    pub(crate) fn translate(&mut self, reader: &mut Reader, address: u64) -> Result<(u64, u64), Stop> {
        self.entry(reader, address).map(|(physical, run, _)| (physical, run))
    }

    /// The same, and whether the last entry allows writing.
    pub(crate) fn entry(&mut self, reader: &mut Reader, address: u64) -> Result<(u64, u64, bool), Stop> {
        let mut at = self.root & ADDRESS;
        for level in (1..=self.levels).rev() {
            let recent = &mut self.recent[usize::from(level) - 1];
            if recent.as_ref().is_none_or(|(of, _)| *of != at) {
                *recent = Some((at, table(reader, at)?));
            }
            let (_, entries) = recent.as_ref().expect("set above");
            let entry = entries[(address >> shift(level) & 511) as usize];
            if entry & PRESENT == 0 {
                return Err(Stop::Unfit(format!("its kernel does not map {address:#x}")));
            }
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let inside = (1 << shift(level)) - 1;
                let physical = (entry & ADDRESS & !inside) | (address & inside);
                return Ok((physical, inside + 1 - (address & inside), entry & WRITE != 0));
            }
            at = entry & ADDRESS;
        }
        unreachable!("level 1 returns")
    }

    /// Reads virtual memory.
    pub(crate) fn read(&mut self, reader: &mut Reader, mut address: u64, mut into: &mut [u8]) -> Result<(), Stop> {
        while !into.is_empty() {
            let (physical, run) = self.translate(reader, address)?;
            let length = into.len().min(usize::try_from(run).unwrap_or(usize::MAX));
            let (now, rest) = into.split_at_mut(length);
            reader.read(physical, now)?;
            address = address.wrapping_add(length as u64);
            into = rest;
        }
        Ok(())
    }

    pub(crate) fn word(&mut self, reader: &mut Reader, address: u64) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.read(reader, address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Walks page tables, each table once for each level however many point to it, so that no arrangement of tables makes
/// a walk longer than the memory is large.
pub(crate) struct Walker {
    seen: Vec<Bitmap>,
}

impl Walker {
    pub(crate) fn new(pages: u64) -> Self {
        Self { seen: (0..5).map(|_| Bitmap::new(pages)).collect() }
    }

    /// Visits what one half of a root maps. Tables outside of RAM are passed over.
    pub(crate) fn walk(
        &mut self,
        reader: &mut Reader,
        root: u64,
        levels: u8,
        half: Half,
        on: &mut dyn FnMut(&mut Reader, Met) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        if reader.page(root & ADDRESS).is_none() {
            return Err(Stop::Absent(root & ADDRESS));
        }
        let entries = table(reader, root)?;
        on(reader, Met::Table(root & ADDRESS))?;
        let (indices, base) = match half {
            Half::User => (0..256, 0),
            Half::Kernel => (256..512, u64::MAX << (shift(levels) + 9)),
        };
        for index in indices {
            let entry = entries[index];
            let address = base | (index as u64) << shift(levels);
            if entry & PRESENT != 0 {
                // A kernel that hides from processes (page-table isolation) marks their half not executable at this
                // level of its own root: that says nothing about the pages.
                self.descend(reader, entry & ADDRESS, levels - 1, address, entry & !NO_EXECUTE, on)?;
            }
        }
        Ok(())
    }

    fn descend(
        &mut self,
        reader: &mut Reader,
        at: u64,
        level: u8,
        address: u64,
        inherited: u64,
        on: &mut dyn FnMut(&mut Reader, Met) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let Some(page) = reader.page(at) else { return Ok(()) };
        if !self.seen[usize::from(level) - 1].set(page) {
            return Ok(());
        }
        let entries = table(reader, at)?;
        on(reader, Met::Table(at))?;
        for (index, &entry) in entries.iter().enumerate().filter(|(_, entry)| *entry & PRESENT != 0) {
            let address = address | (index as u64) << shift(level);
            // Rights add up the other way round: what is granted must be at every level, what is denied at one.
            let rights = (inherited & entry & (USER | WRITE)) | ((inherited | entry) & NO_EXECUTE);
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let bytes = 1 << shift(level);
                let leaf = Leaf {
                    address,
                    physical: entry & ADDRESS & !(bytes - 1),
                    bytes,
                    user: rights & USER != 0,
                    execute: rights & NO_EXECUTE == 0,
                    write: rights & WRITE != 0,
                };
                on(reader, Met::Leaf(leaf))?;
            } else {
                self.descend(reader, entry & ADDRESS, level - 1, address, rights, on)?;
            }
        }
        Ok(())
    }
}
