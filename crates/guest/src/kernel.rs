//! The numbers of one Linux kernel: where its page tables and descriptors are, and how it writes down what a page is.
//!
//! Releases differ; what a kernel says of itself in its note is taken first, and a table by release fills in the rest.

use crate::memory::{Cpu, Hint};
use crate::note::{self, Note};
use crate::paging::Space;
use crate::reader::{Reader, Stop};

/// Where x86-64 kernels are linked to; what is mapped there is their image.
const IMAGE: u64 = 0xffff_ffff_8000_0000;
/// Physical address bits of a root.
const ROOT: u64 = 0x000f_ffff_ffff_f000;

/// The row from 6.12 on.
const TOP_BYTE: &str = "6.12";

/// How a kernel writes a page's type into the word that else counts its mappings (Linux, `page-flags.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Types {
    /// A type is a bit that is *clear* below a base of set ones; up to 6.11.
    Cleared(&'static Bits),
    /// A type is the value of the top byte; from 6.12 on.
    TopByte,
}

/// One release's bits; 0 where it has no such type.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    name: &'static str,
    base: u32,
    buddy: u32,
    offline: u32,
    table: u32,
    hugetlb: u32,
    slab: u32,
}

/// Oldest first, with the release before which each ends.
const CLEARED: [((u32, u32), Bits); 4] = [
    // Types can be added up here: a table may also be marked as paid for by a memory cgroup (0x200).
    ((5, 11), Bits { name: "5.0", base: 0xf000_0000, buddy: 0x80, offline: 0x100, table: 0x400, hugetlb: 0, slab: 0 }),
    ((6, 9), Bits { name: "5.11", base: 0xf000_0000, buddy: 0x80, offline: 0x100, table: 0x200, hugetlb: 0, slab: 0 }),
    (
        (6, 11),
        Bits {
            name: "6.9",
            base: 0xf000_0000,
            buddy: 0x80,
            offline: 0x100,
            table: 0x200,
            hugetlb: 0x800,
            slab: 0x1000,
        },
    ),
    (
        (6, 12),
        Bits {
            name: "6.11",
            base: 0x8000_0000,
            buddy: 0x4000_0000,
            offline: 0x2000_0000,
            table: 0x1000_0000,
            hugetlb: 0x0400_0000,
            slab: 0x0200_0000,
        },
    ),
];

/// What a typed page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    None,
    Buddy,
    Offline,
    Table,
    HugeTlb,
    Slab,
    /// Any other: somebody's in the kernel.
    Other,
}

impl Types {
    /// By the value that free pages have, as the note gives it, checked against the release.
    fn of(buddy: u32, release: (u32, u32)) -> Result<Self, Stop> {
        if buddy == 0xf000_0000 && release >= (6, 12) {
            return Ok(Self::TopByte);
        }
        let bits = CLEARED.iter().find(|(end, _)| release < *end).map(|(_, bits)| bits);
        match bits {
            Some(bits) if buddy == !bits.buddy => Ok(Self::Cleared(bits)),
            _ => Err(Stop::Unfit(format!(
                "its release {}.{} marks free pages by {buddy:#x}, which no known encoding does",
                release.0, release.1
            ))),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cleared(bits) => bits.name,
            Self::TopByte => TOP_BYTE,
        }
    }

    /// The row of that name, as it is kept.
    pub(crate) fn named(name: &str) -> Option<&'static str> {
        CLEARED.iter().map(|(_, bits)| bits.name).chain([TOP_BYTE]).find(|row| *row == name)
    }

    /// What the word says. Slab and huge pages are told by it in later releases only.
    #[inline]
    pub(crate) fn read(self, word: u32) -> Type {
        match self {
            Self::Cleared(bits) => {
                // A count of mappings is small, or −1; every type leaves the base set.
                if word == u32::MAX || word & bits.base != bits.base {
                    return Type::None;
                }
                let is = |bit: u32| bit != 0 && word & bit == 0;
                match () {
                    () if is(bits.buddy) => Type::Buddy,
                    () if is(bits.table) => Type::Table,
                    () if is(bits.slab) => Type::Slab,
                    () if is(bits.hugetlb) => Type::HugeTlb,
                    () if is(bits.offline) => Type::Offline,
                    () => Type::Other,
                }
            }
            Self::TopByte => match word >> 24 {
                0xf0 => Type::Buddy,
                0xf1 => Type::Offline,
                0xf2 => Type::Table,
                0xf4 => Type::HugeTlb,
                0xf5 => Type::Slab,
                0xf3 | 0xf6..=0xfe => Type::Other,
                _ => Type::None,
            },
        }
    }
}

/// A page descriptor's size and where in it its fields are, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) size: usize,
    pub(crate) flags: usize,
    pub(crate) refcount: usize,
    pub(crate) mapcount: usize,
    pub(crate) mapping: usize,
    /// Of a root of page tables: whose it is. Not in the note; in all releases from 5.10 on it follows the mapping.
    pub(crate) owner: usize,
    pub(crate) private: usize,
    pub(crate) compound_head: usize,
    /// In the second descriptor of a compound page, and the value that stands for a huge page; up to 6.5.
    pub(crate) destructor: Option<(usize, u8)>,
}

/// Masks of flags; 0 for a flag that the kernel does not have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    pub(crate) lru: u64,
    pub(crate) slab: u64,
    pub(crate) swapbacked: u64,
    pub(crate) reserved: u64,
    pub(crate) head: u64,
    pub(crate) poisoned: u64,
}

/// All that is known of a kernel before its descriptors are read.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) release: String,
    pub(crate) version: (u32, u32),
    pub(crate) types: Types,
    pub(crate) layout: Layout,
    pub(crate) flags: Flags,
    /// Physical address of the root of its page tables.
    pub(crate) root: u64,
    pub(crate) levels: u8,
    /// Virtual address of an array of pointers to arrays of sections.
    pub(crate) sections: u64,
    pub(crate) section_roots: u64,
    pub(crate) section_size: u64,
    pub(crate) section_map: u64,
    /// Pages in a section, as a power of two.
    pub(crate) section_order: u32,
    /// Whether it encrypts its memory.
    pub(crate) encrypted: bool,
}

/// A kernel and its note.
pub(crate) struct Found {
    pub(crate) kernel: Kernel,
    /// Physical address of the note.
    pub(crate) note: u64,
}

impl Kernel {
    /// Finds the kernel that runs in this memory: at the hint, else through a processor's tables, else by a search for
    /// its note.
    pub(crate) fn find(reader: &mut Reader, cpu: Option<Cpu>, hint: Option<Hint>) -> Result<Found, Stop> {
        if let Some(Hint { note }) = hint
            && let Ok(kernel) = Self::at(reader, note)
        {
            return Ok(Found { kernel, note });
        }
        let mut found = None;
        let mut refused = None;
        let mut attempt = |reader: &mut Reader, note| match Self::at(reader, note) {
            Ok(kernel) => {
                found = Some(Found { kernel, note });
                Ok(true)
            }
            Err(Stop::Host(error)) => Err(Stop::Host(error)),
            Err(stop) => {
                refused.get_or_insert(stop);
                Ok(false)
            }
        };
        let pointed = cpu.map_or(Ok(false), |cpu| note::pointed_to(reader, cpu, &mut attempt));
        if let Err(Stop::Host(error)) = pointed {
            return Err(Stop::Host(error));
        }
        // What a processor's tables lead to is no reason not to search.
        reader.refill();
        if !pointed.unwrap_or(false) {
            note::candidates(reader, &mut attempt)?;
        }
        found.ok_or_else(|| refused.unwrap_or_else(|| Stop::Unfit("no VMCOREINFO is in its memory".into())))
    }

    /// Reads a note and makes sure that the kernel that wrote it is the one that runs.
    fn at(reader: &mut Reader, at: u64) -> Result<Self, Stop> {
        let note = Note::read(reader, at)?.ok_or_else(|| Stop::Unfit("there is no VMCOREINFO".into()))?;
        let (kernel, image) = Self::of(&note)?;
        kernel.check(reader, &note, image)?;
        Ok(kernel)
    }

    /// What a note says, and what to add to an address in the image for where it is.
    fn of(note: &Note) -> Result<(Self, u64), Stop> {
        let unfit = |what: &str| Stop::Unfit(what.to_owned());
        let release = note.text("OSRELEASE").ok_or_else(|| unfit("its VMCOREINFO names no release"))?.to_owned();
        let version = version(&release).ok_or_else(|| Stop::Unfit(format!("`{release}` is no release of Linux")))?;
        if version < (5, 10) {
            return Err(Stop::Unfit(format!("Linux {release} is older than 5.10")));
        }
        let image = note.required_number("phys_base")?.wrapping_sub(IMAGE);
        let root = note.symbol("init_top_pgt").or_else(|_| note.symbol("swapper_pg_dir"))?.wrapping_add(image);
        let flag = |name: &str| match note.number(name) {
            None => Ok(0),
            Some(bit @ 0..64) => Ok(1 << bit),
            Some(_) => Err(Stop::Unfit(format!("its {name} is no bit of a word"))),
        };
        let section_bits = note.required_number("SECTION_SIZE_BITS")?;
        if !(24..=36).contains(&section_bits) {
            return Err(Stop::Unfit(format!("its sections are of 2^{section_bits} bytes")));
        }
        let private = flag("PG_private")?;
        let kernel = Self {
            types: Types::of(note.required_number("PAGE_BUDDY_MAPCOUNT_VALUE")? as u32, version)?,
            layout: Layout::of(note)?,
            flags: Flags {
                lru: flag("PG_lru")?,
                slab: flag("PG_slab")?,
                swapbacked: flag("PG_swapbacked")?,
                // Not in the note; in all releases from 5.10 on its bit is the one below.
                reserved: private >> 1,
                head: note.required_number("PG_head_mask")?,
                poisoned: flag("PG_hwpoison")?,
            },
            root: root & ROOT,
            levels: if note.number("pgtable_l5_enabled") == Some(1) { 5 } else { 4 },
            sections: note.symbol("mem_section")?,
            section_roots: note.length("mem_section")?,
            section_size: note.size("mem_section")?,
            section_map: note.offset("mem_section.section_mem_map")? as u64,
            section_order: section_bits as u32 - 12,
            encrypted: note.number("sme_mask").is_some_and(|mask| mask != 0),
            release,
            version,
        };
        if kernel.flags.lru == 0 || kernel.section_size < 8 || kernel.section_size > 256 {
            return Err(unfit("its VMCOREINFO lacks flags or sections"));
        }
        Ok((kernel, image))
    }

    /// A note may be of a kernel that ran before, or forged. The one that runs has page tables that map its own text
    /// where it says it is, and its release in its name space.
    fn check(&self, reader: &mut Reader, note: &Note, image: u64) -> Result<(), Stop> {
        let mut space = Space::new(self.root, self.levels);
        let text = note.symbol("_stext")?;
        if space.translate(reader, text)?.0 != text.wrapping_add(image) {
            return Err(Stop::Unfit("its page tables do not map its text where its VMCOREINFO says".into()));
        }
        // The release is the third of the fields of 65 bytes of `struct new_utsname`.
        let names = note.symbol("init_uts_ns")?;
        // Up to 5.10 notes do not say where the fields begin: behind a count of references of four bytes.
        let begin = note.optional_offset("uts_namespace.name").map_or(4, |offset| offset as u64 & 0xffff);
        let mut release = vec![0; self.release.len().min(64)];
        space.read(reader, names.wrapping_add(begin + 130), &mut release)?;
        if release != self.release.as_bytes() {
            return Err(Stop::Unfit(format!("it is a leftover of Linux {}, which does not run here", self.release)));
        }
        Ok(())
    }
}

impl Layout {
    /// Of a page of a file or a heap: where in it it is. Not in the note; in all releases from 5.10 on it follows the
    /// mapping, where a root of page tables has its owner.
    pub(crate) fn index(&self) -> usize {
        self.owner
    }

    fn of(note: &Note) -> Result<Self, Stop> {
        let destructor = note.optional_offset("page.compound_dtor").zip(note.number("HUGETLB_PAGE_DTOR"));
        let layout = Self {
            size: note.size("page")? as usize,
            flags: note.offset("page.flags")?,
            refcount: note.offset("page._refcount")?,
            mapcount: note.offset("page._mapcount")?,
            mapping: note.offset("page.mapping")?,
            owner: note.offset("page.mapping")?.saturating_add(8),
            private: note.offset("page.private")?,
            compound_head: note.offset("page.compound_head")?,
            destructor: destructor.map(|(at, value)| (at, value as u8)),
        };
        let words = [layout.flags, layout.mapping, layout.owner, layout.private, layout.compound_head];
        let inside = |at: usize, bytes: usize| at.checked_add(bytes).is_some_and(|end| end <= layout.size);
        let fits = words.iter().all(|&at| inside(at, 8))
            && inside(layout.refcount, 4)
            && inside(layout.mapcount, 4)
            && layout.destructor.is_none_or(|(at, _)| inside(at, 1));
        if !(32..=256).contains(&layout.size) || !layout.size.is_multiple_of(8) || !fits {
            return Err(Stop::Unfit("its page descriptors are laid out impossibly".into()));
        }
        Ok(layout)
    }
}

/// `6.1.0-49-cloud-amd64` is 6.1.
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    Some((major.parse().ok()?, rest[..digits].parse().ok()?))
}
