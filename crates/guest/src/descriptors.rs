//! Page descriptors: one `struct page` for each page frame, in sections that exist where there is memory.

use crate::color::{Color, Coloring, ROOT, SHARED, WEAK};
use crate::kernel::{Kernel, Type};
use crate::paging::Space;
use crate::plan::Key;
use crate::reader::{Reader, Stop};
use base::{ByteRange, PAGE};

/// Descriptors read at once: as much as one large page of them holds.
const CHUNK: usize = 2 << 20;
/// Larger blocks of free pages than any configuration has are no blocks.
const ORDER_MAX: u64 = 18;
/// Page frames of the window between 640 KiB and 1 MiB: screens and firmware, whatever the descriptors say.
const LEGACY: std::ops::Range<u64> = 0xa0..0x100;
/// What a descriptor holds that was never written.
const UNWRITTEN: u64 = u64::MAX;

/// What the descriptors taught besides colors.
pub(crate) struct Survey {
    /// Where the kernel maps all physical memory, by virtual address; what is mapped there says nothing.
    pub(crate) direct: ByteRange,
    /// Descriptors in blocks of free pages that are not those of free pages.
    pub(crate) inconsistent: u64,
}

/// Colors every page that has a descriptor by it.
pub(crate) fn survey(reader: &mut Reader, kernel: &Kernel, coloring: &mut Coloring) -> Result<Survey, Stop> {
    let mut space = Space::new(kernel.root, kernel.levels);
    let top = reader.regions().last().map_or(0, |r| r.physical.end);
    // The sections' array lies in the direct map, which thereby says where it begins.
    let (sections, _) = space.translate(reader, kernel.sections)?;
    let start = kernel.sections.wrapping_sub(sections);
    let direct = ByteRange::new(start, start.saturating_add(top));
    let mut scan = Scan { kernel, direct, free_until: 0, head: Head::NONE, inconsistent: 0, base: None };
    let mut buffer = vec![0; CHUNK / kernel.layout.size * kernel.layout.size];
    let frames = 1u64 << kernel.section_order;
    let mut found = 0;
    let keys = coloring.keys_mut();
    keys.clear();
    keys.resize(reader.pages() as usize, (0, 0));
    for region in reader.regions().to_vec() {
        let (first, end) = (region.physical.start / PAGE, region.physical.end / PAGE);
        let mut section = first >> kernel.section_order;
        while section << kernel.section_order < end {
            if let Some(map) = section_map(reader, &mut space, kernel, section)? {
                found += 1;
                let start = first.max(section * frames);
                let frames = start..end.min((section + 1) * frames);
                // The map's address is such that frame 0's descriptor would be at its start.
                scan.base = Some(map);
                let page = (start * PAGE - region.physical.start + region.offset) / PAGE;
                scan.run(reader, &mut space, frames, page, &mut buffer, coloring)?;
            }
            section += 1;
        }
    }
    if found == 0 {
        return Err(Stop::Unfit("it has no page descriptors for its memory".into()));
    }
    Ok(Survey { direct, inconsistent: scan.inconsistent })
}

/// The virtual address of a section's descriptors, less those of the frames before it; `None` where it has none.
fn section_map(reader: &mut Reader, space: &mut Space, kernel: &Kernel, section: u64) -> Result<Option<u64>, Stop> {
    /// Says that a section has descriptors; below the twelfth bit there are only such marks.
    const HAS_MAP: u64 = 2;
    let each = PAGE / kernel.section_size;
    if section / each >= kernel.section_roots {
        return Ok(None);
    }
    let root = space.word(reader, kernel.sections.wrapping_add(section / each * 8))?;
    if root == 0 {
        return Ok(None);
    }
    let at = root.wrapping_add(section % each * kernel.section_size).wrapping_add(kernel.section_map);
    let map = space.word(reader, at)?;
    Ok((map & HAS_MAP != 0).then_some(map & !(PAGE - 1)))
}

/// The first page of a compound page.
#[derive(Clone, Copy)]
struct Head {
    frame: u64,
    color: u8,
    key: Key,
}

impl Head {
    const NONE: Self = Self { frame: UNWRITTEN, color: 0, key: (0, 0) };
}

struct Scan<'a> {
    kernel: &'a Kernel,
    direct: ByteRange,
    /// The frame behind the block of free pages that the scan is in.
    free_until: u64,
    /// The head of the compound page that was met last, and its color.
    head: Head,
    inconsistent: u64,
    base: Option<u64>,
}

impl Scan<'_> {
    /// Colors the pages of frames, the first of which is the blob's `page`.
    fn run(
        &mut self,
        reader: &mut Reader,
        space: &mut Space,
        frames: std::ops::Range<u64>,
        page: u64,
        buffer: &mut [u8],
        coloring: &mut Coloring,
    ) -> Result<(), Stop> {
        let size = self.kernel.layout.size;
        let base = self.base.expect("set with the section");
        let mut frame = frames.start;
        while frame < frames.end {
            let count = ((frames.end - frame) as usize).min(buffer.len() / size);
            let bytes = &mut buffer[..count * size];
            space.read(reader, base.wrapping_add(frame * size as u64), bytes)?;
            for (i, descriptor) in bytes.chunks_exact(size).enumerate() {
                let frame = frame + i as u64;
                let next = bytes.get((i + 1) * size..(i + 2) * size);
                let (color, key) = self.color(reader, frame, descriptor, next, coloring);
                let page = (page + frame - frames.start) as usize;
                coloring.raw_mut()[page] = color;
                if key != (0, 0) {
                    coloring.keys_mut()[page] = key;
                }
            }
            frame += count as u64;
        }
        Ok(())
    }

    #[inline]
    fn color(&mut self, reader: &Reader, frame: u64, it: &[u8], next: Option<&[u8]>, coloring: &Coloring) -> (u8, Key) {
        let kernel = self.kernel;
        let nobodys = |color: Color| (color as u8, (0, 0));
        let flags = word(it, kernel.layout.flags);
        if flags == UNWRITTEN {
            return nobodys(Color::Unknown);
        }
        if LEGACY.contains(&frame) {
            return nobodys(Color::Device);
        }
        let kind = kernel.types.read(half(it, kernel.layout.mapcount));
        let unused = half(it, kernel.layout.refcount) == 0
            && flags & (kernel.flags.lru | kernel.flags.slab | kernel.flags.reserved | kernel.flags.poisoned) == 0;
        if frame < self.free_until {
            // The rest of a block of free pages. No allocator leaves anything here, so a trace of use wins.
            if unused && kind == Type::None {
                return nobodys(Color::Free);
            }
            self.free_until = 0;
            self.inconsistent += 1;
        }
        let compound = word(it, kernel.layout.compound_head);
        if compound & 1 == 1 {
            return self.tail(reader, frame, compound - 1, coloring);
        }
        if kind == Type::Buddy {
            let order = word(it, kernel.layout.private);
            if unused && order <= ORDER_MAX && frame.is_multiple_of(1 << order) {
                self.free_until = frame + (1 << order);
                return nobodys(Color::Free);
            }
            self.inconsistent += 1;
            return nobodys(Color::Unknown);
        }
        let color = self.used(flags, kind, it, next);
        let key = match color & !SHARED {
            c if c == Color::PageCache as u8 || c == Color::UserData as u8 => {
                (word(it, kernel.layout.mapping), word(it, kernel.layout.index()))
            }
            _ => (0, 0),
        };
        self.head = Head { frame, color, key };
        (color, key)
    }

    /// A page in use, by its own descriptor.
    #[inline]
    fn used(&self, flags: u64, kind: Type, it: &[u8], next: Option<&[u8]>) -> u8 {
        let (kernel, masks) = (self.kernel, &self.kernel.flags);
        if flags & masks.slab != 0 {
            return Color::Slab as u8;
        }
        match kind {
            Type::Slab => return Color::Slab as u8,
            Type::Table => return Color::PageTable as u8,
            Type::HugeTlb => return Color::UserData as u8,
            Type::Offline => return Color::Device as u8,
            Type::Other => return Color::KernelData as u8,
            Type::None | Type::Buddy => {}
        }
        if flags & masks.reserved != 0 {
            return Color::KernelData as u8;
        }
        if flags & masks.head != 0
            && let (Some((at, huge)), Some(next)) = (kernel.layout.destructor, next)
            && next[at] == huge
        {
            return Color::UserData as u8;
        }
        let counted = half(it, kernel.layout.refcount) != 0;
        let mapping = word(it, kernel.layout.mapping);
        let file = if flags & masks.swapbacked != 0 { Color::PageCache as u8 | SHARED } else { Color::PageCache as u8 };
        // The low bits say what the rest points to: anonymous memory, a driver that can move its pages, or with both
        // memory merged with equal pages.
        match (mapping & 3, flags & masks.lru != 0) {
            // Off the lists, even with nobody counted, it is being moved or merged: freed pages have no mapping.
            (1 | 3, _) => Color::UserData as u8,
            (0, true) => file,
            (0, false) if counted && mapping != 0 => file,
            _ if counted => {
                // A process' root says whose it is, in the word behind: a pointer to an `mm_struct`.
                let owner = word(it, kernel.layout.owner);
                let root = self.direct.start <= owner && owner < self.direct.end;
                Color::KernelData as u8 | WEAK | if root { ROOT } else { 0 }
            }
            _ => Color::Unknown as u8,
        }
    }

    /// A page behind the first of a compound page is what the first is, and further on in what that belongs to.
    #[inline]
    fn tail(&mut self, reader: &Reader, tail: u64, head: u64, coloring: &Coloring) -> (u8, Key) {
        let base = self.base.expect("set with the section");
        let frame = head.wrapping_sub(base) / self.kernel.layout.size as u64;
        if frame != self.head.frame {
            let page = frame.checked_mul(PAGE).and_then(|at| reader.page(at));
            // A head lies before its tails, so it has its color; anything else is not one.
            let color = page.map_or(Color::Unknown as u8, |page| coloring.raw()[page as usize]);
            self.head = Head { frame, color, key: (0, 0) };
            if color == Color::Free as u8 {
                self.head.color = Color::Unknown as u8;
            }
        }
        let (mapping, index) = self.head.key;
        let key = if mapping == 0 { (0, 0) } else { (mapping, index.wrapping_add(tail.wrapping_sub(frame))) };
        (self.head.color, key)
    }
}

#[inline]
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[inline]
fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
