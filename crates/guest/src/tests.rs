//! Guests made by hand, one for each way in which kernels write things down.

use crate::{Account, Basis, Color, Coloring, Cpu, Error, FreePages, Hint, Memory, Region, color};
use base::{ByteRange, PAGE};
use std::io;

/// RAM of a guest.
#[derive(Clone)]
pub(crate) struct Ram {
    pub(crate) bytes: Vec<u8>,
    pub(crate) regions: Vec<Region>,
    pub(crate) zeros: Vec<ByteRange>,
}

impl Memory for Ram {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let found = self.bytes.get(offset as usize..offset as usize + into.len());
        into.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn zeros(&self) -> &[ByteRange] {
        &self.zeros
    }
}

/// How one kernel writes things down.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    release: &'static str,
    five_levels: bool,
    /// Of free pages, tables, ballooned pages.
    buddy: u32,
    table: u32,
    offline: u32,
    /// Slab by a type, or by a flag; huge pages by a type, or by a destructor.
    slab: Result<u32, u64>,
    huge: Option<u32>,
    lru: u64,
    private: u64,
    head: u64,
}

const OLD: Style = Style {
    release: "5.10.0-34-cloud-amd64",
    five_levels: false,
    buddy: !0x80,
    // With the mark that a memory cgroup pays for it.
    table: !0x600,
    offline: !0x100,
    slab: Err(9),
    huge: None,
    lru: 4,
    private: 13,
    head: 16,
};
pub(crate) const STABLE: Style = Style { release: "6.1.0-40-cloud-amd64", table: !0x200, ..OLD };
const REORDERED: Style =
    Style { release: "6.10.3", slab: Ok(!0x1000), huge: Some(!0x800), lru: 5, private: 14, head: 6, ..STABLE };
const SHORT_LIVED: Style = Style {
    release: "6.11.2-amd64",
    buddy: !0x4000_0000,
    table: !0x1000_0000,
    offline: !0x2000_0000,
    slab: Ok(!0x0200_0000),
    huge: Some(!0x0400_0000),
    ..REORDERED
};
pub(crate) const TOP_BYTE: Style = Style {
    release: "6.12.30+deb12-cloud-amd64",
    buddy: 0xf000_0000,
    table: 0xf200_0000,
    offline: 0xf100_0000,
    slab: Ok(0xf500_0000),
    huge: Some(0xf400_0000),
    ..SHORT_LIVED
};
const FIVE_LEVELS: Style = Style { five_levels: true, ..STABLE };
pub(crate) const STYLES: [Style; 6] = [OLD, STABLE, REORDERED, SHORT_LIVED, TOP_BYTE, FIVE_LEVELS];

const LOW: u64 = 24 << 20;
const HIGH: u64 = 8 << 20;
const DIRECT: u64 = 0xffff_8a80_0000_0000;
const MEMMAP: u64 = 0xffff_f0c0_0000_0000;
const VMALLOC: u64 = 0xffff_b000_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8000_0000;
/// The image lies 2 MiB into memory; with address randomization it is linked to one place and loaded to another.
const TEXT: u64 = IMAGE + (32 << 20);
const TEXT_AT: u64 = 2 << 20;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// A Linux guest under construction.
pub(crate) struct Linux {
    pub(crate) ram: Ram,
    style: Style,
    pub(crate) root: u64,
    next: u64,
    pub(crate) note: u64,
}

const SIZE: u64 = 64;
const MAPCOUNT: u64 = 0x30;
const REFCOUNT: u64 = 0x34;
const MAPPING: u64 = 0x18;
const INDEX: u64 = 0x20;
const PRIVATE: u64 = 0x28;
const HEAD: u64 = 8;

impl Linux {
    /// A kernel with text, page tables, descriptors; all pages that it does not use itself are unmarked and unused.
    pub(crate) fn new(style: Style) -> Self {
        let regions = Region::of_pc(LOW + HIGH, LOW);
        let ram = Ram { bytes: vec![0; (LOW + HIGH) as usize], regions, zeros: Vec::new() };
        let mut it = Self { ram, style, root: 4 << 20, next: (4 << 20) + PAGE, note: 0 };
        for at in 0..8 {
            it.map(TEXT + at * PAGE, TEXT_AT + at * PAGE, if at < 4 { 0 } else { WRITE | NO_EXECUTE });
        }
        // The direct map, as kernels make it: by 4 KiB pages here, by large ones mostly.
        for at in (0..LOW).step_by(PAGE as usize) {
            it.map(DIRECT + at, at, WRITE | NO_EXECUTE);
        }
        let memmap = |frame: u64| MEMMAP + frame * SIZE;
        for (first, bytes) in [(0, LOW), ((4 << 30) / PAGE, HIGH)] {
            for at in (0..bytes / PAGE * SIZE).step_by(PAGE as usize) {
                let page = it.page();
                it.map(memmap(first) + at, page, WRITE | NO_EXECUTE);
            }
        }
        for (start, end) in [(0, LOW), (4 << 30, (4 << 30) + HIGH)] {
            for frame in start / PAGE..end / PAGE {
                it.describe(frame, 0, u32::MAX, 0);
            }
        }
        // Sections of 128 MiB: the first, and that at 4 GiB.
        let (roots, sections) = (it.page(), it.page());
        it.put(roots, &(DIRECT + sections).to_le_bytes());
        for section in [0, 32] {
            it.put(sections + section * 16, &(MEMMAP | 0x1f).to_le_bytes());
        }
        // The release, in the name space.
        let names = if style.release.starts_with("5.10") { 4 } else { 8 };
        it.put(TEXT_AT + 4 * PAGE + names + 130, style.release.as_bytes());
        it.note = it.page();
        it.write_note(roots);
        for frame in (4 << 20) / PAGE..it.next / PAGE {
            it.describe(frame, 1 << (style.private - 1), u32::MAX, 1);
        }
        for frame in 0..8 {
            it.describe(TEXT_AT / PAGE + frame, 1 << (style.private - 1), u32::MAX, 1);
        }
        it
    }

    fn write_note(&mut self, roots: u64) {
        let style = self.style;
        let slab = style.slab.err().map_or(String::new(), |bit| format!("NUMBER(PG_slab)={bit}\n"));
        let huge = match style.huge {
            None => "OFFSET(page.compound_dtor)=16\nNUMBER(HUGETLB_PAGE_DTOR)=2\n",
            Some(_) => "",
        };
        let names = if style.release.starts_with("5.10") { "" } else { "OFFSET(uts_namespace.name)=8\n" };
        let text = format!(
            "OSRELEASE={}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={:x}\n{names}SYMBOL(_stext)={TEXT:x}\n\
             SYMBOL(mem_section)={:x}\nLENGTH(mem_section)=2048\nSIZE(mem_section)=16\n\
             OFFSET(mem_section.section_mem_map)=0\nNUMBER(SECTION_SIZE_BITS)=27\nSIZE(page)=64\nOFFSET(page.flags)=0\n\
             OFFSET(page._refcount)=52\nOFFSET(page.mapping)=24\nOFFSET(page.lru)=8\nOFFSET(page._mapcount)=48\n\
             OFFSET(page.private)=40\nOFFSET(page.compound_head)=8\n{huge}{slab}NUMBER(PG_lru)={}\nNUMBER(PG_private)={}\n\
             NUMBER(PG_swapbacked)=19\nNUMBER(PG_hwpoison)=23\nNUMBER(PG_head_mask)={}\n\
             NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)={}\nNUMBER(phys_base)={}\nSYMBOL(init_top_pgt)={:x}\n\
             NUMBER(pgtable_l5_enabled)={}\nKERNELOFFSET=1000000\n",
            style.release,
            TEXT + 4 * PAGE,
            DIRECT + roots,
            style.lru,
            style.private,
            1 << style.head,
            style.buddy.cast_signed(),
            (TEXT_AT + IMAGE).wrapping_sub(TEXT).cast_signed(),
            self.root.wrapping_add(TEXT).wrapping_sub(TEXT_AT),
            u8::from(style.five_levels),
        );
        let mut note = Vec::new();
        for word in [11, text.len() as u32, 0] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"VMCOREINFO\0\0");
        note.extend_from_slice(text.as_bytes());
        self.put(self.note, &note);
    }

    fn levels(&self) -> u32 {
        if self.style.five_levels { 5 } else { 4 }
    }

    fn page(&mut self) -> u64 {
        self.next += PAGE;
        assert!(self.next < LOW, "the guest is too small for its own tables");
        self.next - PAGE
    }

    fn offset(physical: u64) -> usize {
        (if physical < LOW { physical } else { physical - (4 << 30) + LOW }) as usize
    }

    pub(crate) fn put(&mut self, physical: u64, bytes: &[u8]) {
        let at = Self::offset(physical);
        self.ram.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, physical: u64) -> u64 {
        let at = Self::offset(physical);
        u64::from_le_bytes(self.ram.bytes[at..at + 8].try_into().unwrap())
    }

    /// Maps one page in the kernel's tables.
    fn map(&mut self, address: u64, physical: u64, rights: u64) {
        let root = self.root;
        self.map_in(root, address, physical, rights);
    }

    fn map_in(&mut self, root: u64, address: u64, physical: u64, rights: u64) {
        let mut table = root;
        for level in (1..=self.levels()).rev() {
            let slot = table + (address >> (3 + 9 * level) & 511) * 8;
            if level == 1 {
                self.put(slot, &(physical | PRESENT | rights).to_le_bytes());
                return;
            }
            if self.word(slot) & PRESENT == 0 {
                let page = self.page();
                self.put(slot, &(page | PRESENT | WRITE | USER).to_le_bytes());
            }
            table = self.word(slot) & 0x000f_ffff_ffff_f000;
        }
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&mut self, frame: u64, flags: u64, kind: u32, refcount: u32) {
        let at = self.descriptor(frame);
        self.put(at, &flags.to_le_bytes());
        self.put(at + MAPCOUNT, &kind.to_le_bytes());
        self.put(at + REFCOUNT, &refcount.to_le_bytes());
    }

    pub(crate) fn descriptor(&self, frame: u64) -> u64 {
        let address = MEMMAP + frame * SIZE;
        let mut at = self.root;
        for level in (1..=self.levels()).rev() {
            at = self.word(at + (address >> (3 + 9 * level) & 511) * 8) & 0x000f_ffff_ffff_f000;
        }
        at + address % PAGE
    }

    fn field(&mut self, frame: u64, field: u64, value: u64) {
        let at = self.descriptor(frame) + field;
        self.put(at, &value.to_le_bytes());
    }

    /// A block of free pages.
    pub(crate) fn free(&mut self, frame: u64, order: u64) {
        self.describe(frame, 0, self.style.buddy, 0);
        self.field(frame, PRIVATE, order);
    }

    /// A compound page of four; its head is described already.
    fn compound(&mut self, frame: u64) {
        for tail in 1..4 {
            self.field(frame + tail, HEAD, MEMMAP + frame * SIZE + 1);
        }
    }

    fn lru(&mut self, frame: u64, mapping: u64, more: u64) {
        self.describe(frame, 1 << self.style.lru | more, u32::MAX, 1);
        self.field(frame, MAPPING, mapping);
    }

    /// A process: a root with the kernel's half, and pages of its own. Returns the root's frame and a last table's.
    pub(crate) fn process(&mut self, pages: &[(u64, u64)]) -> (u64, u64) {
        let root = self.page();
        self.process_at(root, pages)
    }

    fn process_at(&mut self, root: u64, pages: &[(u64, u64)]) -> (u64, u64) {
        let kernel = Self::offset(self.root);
        let half = self.ram.bytes[kernel + 2048..kernel + 4096].to_vec();
        self.put(root + 2048, &half);
        let first = self.next / PAGE;
        for (i, &(frame, rights)) in pages.iter().enumerate() {
            self.map_in(root, 0x5555_0000_0000 + i as u64 * PAGE, frame * PAGE, USER | rights);
        }
        self.describe(root / PAGE, 0, u32::MAX, 1);
        for frame in first..self.next / PAGE {
            self.describe(frame, 0, self.style.table, 1);
        }
        (root / PAGE, self.next / PAGE - 1)
    }

    pub(crate) fn cpu(&self) -> Cpu {
        Cpu { cr3: self.root, cr4: u64::from(self.style.five_levels) << 12 }
    }

    pub(crate) fn color(&self) -> Coloring {
        color(&self.ram, None, None).expect("memory reads")
    }
}

const FRAME: u64 = 0x1400;
const FAR: u64 = (4 << 30) / PAGE;
const SWAPBACKED: u64 = 1 << 19;

/// A guest with a page of every kind, and what each is.
pub(crate) fn everything(style: Style) -> (Linux, Vec<(u64, Color)>) {
    let mut it = Linux::new(style);
    let (file, anonymous) = (0xffff_8a80_0123_4560, 0xffff_8a80_0123_4561);
    it.free(FRAME, 3);
    it.free(FAR + 1024, 10);
    it.lru(FRAME + 0x10, file, 0);
    it.lru(FRAME + 0x11, anonymous, SWAPBACKED);
    it.lru(FRAME + 0x12, file, 0);
    it.lru(FRAME + 0x13, file, SWAPBACKED);
    it.lru(FRAME + 0x14, file, SWAPBACKED);
    it.lru(FRAME + 0x15, anonymous, SWAPBACKED);
    // In a batch on its way to the lists; merged with equal ones; a driver's that it can move.
    it.describe(FRAME + 0x16, 0, u32::MAX, 2);
    it.field(FRAME + 0x16, MAPPING, file);
    it.lru(FRAME + 0x17, anonymous | 3, SWAPBACKED);
    it.describe(FRAME + 0x19, SWAPBACKED, u32::MAX, 0);
    it.field(FRAME + 0x19, MAPPING, anonymous);
    it.describe(FRAME + 0x18, 0, u32::MAX, 1);
    it.field(FRAME + 0x18, MAPPING, file | 2);
    let head = 1 << style.head;
    match style.slab {
        Ok(kind) => it.describe(FRAME + 0x20, head, kind, 1),
        Err(bit) => it.describe(FRAME + 0x20, head | 1 << bit, u32::MAX, 1),
    }
    it.compound(FRAME + 0x20);
    it.describe(FRAME + 0x24, head, style.huge.unwrap_or(u32::MAX), 1);
    it.compound(FRAME + 0x24);
    if style.huge.is_none() {
        let at = it.descriptor(FRAME + 0x25) + 16;
        it.put(at, &[2]);
    }
    it.lru(FRAME + 0x28, anonymous, SWAPBACKED | head);
    it.compound(FRAME + 0x28);
    it.describe(FRAME + 0x30, 0, style.offline, 1);
    it.describe(FRAME + 0x31, 0, u32::MAX, 1);
    it.describe(FRAME + 0x32, 0, u32::MAX, 1);
    it.describe(FRAME + 0x33, 0, u32::MAX, 1);
    it.map(VMALLOC, (FRAME + 0x32) * PAGE, WRITE | NO_EXECUTE);
    it.map(VMALLOC + PAGE, (FRAME + 0x33) * PAGE, 0);
    let (root, table) = it.process(&[
        (FRAME + 0x12, 0),
        (FRAME + 0x14, WRITE | NO_EXECUTE),
        (FRAME + 0x11, WRITE | NO_EXECUTE),
        (FRAME + 0x15, WRITE),
        (FRAME + 0x10, NO_EXECUTE),
    ]);
    let truth = vec![
        (FRAME, Color::Free),
        (FRAME + 7, Color::Free),
        (FRAME + 8, Color::Unknown),
        (FAR + 1024, Color::Free),
        (FAR + 2047, Color::Free),
        (FAR + 1, Color::Unknown),
        (FRAME + 0x10, Color::PageCache),
        (FRAME + 0x11, Color::UserData),
        (FRAME + 0x12, Color::UserText),
        (FRAME + 0x13, Color::PageCache),
        (FRAME + 0x14, Color::UserData),
        (FRAME + 0x15, Color::UserText),
        (FRAME + 0x16, Color::PageCache),
        (FRAME + 0x17, Color::UserData),
        (FRAME + 0x18, Color::KernelData),
        (FRAME + 0x19, Color::UserData),
        (FRAME + 0x20, Color::Slab),
        (FRAME + 0x23, Color::Slab),
        (FRAME + 0x24, Color::UserData),
        (FRAME + 0x27, Color::UserData),
        (FRAME + 0x28, Color::UserData),
        (FRAME + 0x2b, Color::UserData),
        (FRAME + 0x30, Color::Device),
        (FRAME + 0x31, Color::KernelData),
        (FRAME + 0x32, Color::KernelData),
        (FRAME + 0x33, Color::KernelText),
        (0xa0, Color::Device),
        (root, Color::PageTable),
        (table, Color::PageTable),
        (it.root / PAGE, Color::PageTable),
        (TEXT_AT / PAGE, Color::KernelText),
        (TEXT_AT / PAGE + 4, Color::KernelData),
        (it.note / PAGE, Color::KernelData),
    ];
    (it, truth)
}

fn page_of(frame: u64) -> u64 {
    Linux::offset(frame * PAGE) as u64 / PAGE
}

#[track_caller]
fn check(coloring: &Coloring, truth: &[(u64, Color)], what: &str) {
    for &(frame, color) in truth {
        assert_eq!(coloring.get(page_of(frame)), color, "{what}: frame {frame:#x}");
    }
}

#[test]
fn every_kind_of_page_gets_its_color_in_every_encoding() {
    for style in STYLES {
        let (guest, truth) = everything(style);
        let coloring = guest.color();
        check(&coloring, &truth, style.release);
        let account = &coloring.account;
        assert_eq!(account.basis, Basis::Descriptors, "{:?}", account.notes);
        assert_eq!(account.notes, Vec::<String>::new(), "{}", style.release);
        assert_eq!(account.release.as_deref(), Some(style.release));
        assert_eq!((account.levels, account.roots), (guest.levels() as u8, 1), "{}", style.release);
        assert_eq!(account.free, FreePages::Droppable);
        assert_eq!(coloring.counts()[Color::Free as usize], 8 + 1024, "{}", style.release);
        assert_eq!(coloring.counts().iter().sum::<u64>(), coloring.len());
    }
}

#[test]
fn runs_cover_all_pages_in_order() {
    let coloring = everything(STABLE).0.color();
    let mut next = 0;
    for (run, color) in coloring.runs() {
        assert_eq!(run.start, next);
        assert!(run.clone().all(|page| coloring.get(page) == color));
        next = run.end;
    }
    assert_eq!(next, coloring.len());
}

#[test]
fn pages_of_a_file_follow_each_other_in_color_space_wherever_they_lie() {
    let mut guest = everything(STABLE).0;
    let (one, other) = (0xffff_8a80_0a00_0000, 0xffff_8a80_0b00_0000);
    // Two files whose pages lie among each other, and out of order.
    let places = [(0x41, one, 7), (0x40, other, 2), (0x46, one, 9), (0x42, other, 1), (0x45, one, 8)];
    for (at, mapping, index) in places {
        guest.lru(FRAME + at, mapping, 0);
        guest.field(FRAME + at, INDEX, index);
    }
    let coloring = guest.color();
    for kept in [coloring.clone(), Coloring::decode(&coloring.encode()).unwrap()] {
        let space = kept.space();
        let after = |at: u64, count| -> Vec<u64> {
            space.after(page_of(FRAME + at) as u32).take(count).map(u64::from).collect()
        };
        assert_eq!(after(0x41, 4), [0x45, 0x46, 0x42, 0x40].map(|at| page_of(FRAME + at)));
        assert_eq!(space.order().len() as u64, kept.len());
    }
}

#[test]
fn colors_that_were_kept_read_back_and_damaged_ones_are_refused() {
    let mut coloring = everything(STABLE).0.color();
    coloring.account.notes = vec!["one".into(), "another".into()];
    let bytes = coloring.encode();
    let kept = Coloring::decode(&bytes).unwrap();
    assert!(kept.iter().eq(coloring.iter()));
    assert_eq!((kept.droppable(), kept.encode()), (coloring.droppable(), bytes.clone()));
    let account = |c: &Coloring| format!("{:?}", guest_account(c));
    assert_eq!(account(&kept), account(&coloring));
    assert!(!kept.droppable().is_empty());
    coloring.account.free = FreePages::Kept { why: "poisoned".into() };
    let kept = Coloring::decode(&coloring.encode()).unwrap();
    assert_eq!((kept.droppable(), kept.account.free), (Vec::new(), coloring.account.free));
    for cut in (0..bytes.len()).step_by(97) {
        assert!(Coloring::decode(&bytes[..cut]).is_err(), "{cut} bytes of it");
    }
    assert!(Coloring::decode(&[&bytes[..], b"x"].concat()).is_err());
}

fn guest_account(coloring: &Coloring) -> Account {
    Account { bytes_read: 0, ..coloring.account.clone() }
}

#[test]
fn a_hint_spares_the_search_and_a_wrong_one_costs_it() {
    let (guest, truth) = everything(STABLE);
    let whole = guest.color();
    let hint = whole.account.hint;
    assert_eq!(hint, Some(Hint { note: guest.note }));
    let quick = color(&guest.ram, None, hint).unwrap();
    check(&quick, &truth, "with a hint");
    assert!(quick.account.bytes_read < whole.account.bytes_read);
    let wrong = color(&guest.ram, None, Some(Hint { note: 0x1000 })).unwrap();
    check(&wrong, &truth, "with a wrong hint");
}

#[test]
fn a_processor_spares_the_search_too() {
    let (mut guest, truth) = everything(STABLE);
    let (note, cpu) = (guest.note, guest.cpu());
    guest.put(TEXT_AT + 5 * PAGE + 0x128, &(DIRECT + note).to_le_bytes());
    let whole = guest.color();
    // A forged one before it leads nowhere, and is passed over.
    guest.put(TEXT_AT + 5 * PAGE, &(DIRECT + FRAME * PAGE).to_le_bytes());
    let quick = color(&guest.ram, Some(cpu), None).unwrap();
    check(&quick, &truth, "with a processor");
    assert_eq!(quick.account.hint, whole.account.hint);
    assert!(quick.account.bytes_read < whole.account.bytes_read + 5 * PAGE, "{}", quick.account.bytes_read);
    assert!(quick.account.notes.is_empty(), "{:?}", quick.account.notes);
}

#[test]
fn the_note_of_a_kernel_that_ran_before_is_passed_over() {
    let (mut guest, truth) = everything(STABLE);
    let at = Linux::offset(guest.note);
    let stale = String::from_utf8_lossy(&guest.ram.bytes[at..at + 2048]).replace("6.1.0-40", "6.1.0-39");
    guest.put((4 << 30) + HIGH - PAGE, stale.as_bytes());
    let coloring = guest.color();
    check(&coloring, &truth, "beside a stale note");
    assert_eq!(coloring.account.hint, Some(Hint { note: guest.note }));
}

#[test]
fn without_a_kernel_the_processor_tells_what_it_maps() {
    let (mut guest, _) = everything(STABLE);
    guest.put(guest.note, &[0; 24]);
    let none = guest.color();
    assert_eq!(none.account.basis, Basis::Nothing);
    assert_eq!(none.counts()[Color::Unknown as usize], none.len());
    let told = color(&guest.ram, Some(guest.cpu()), None).unwrap();
    assert_eq!((told.account.basis, told.account.levels), (Basis::PageTables, 4));
    assert!(told.account.notes.iter().any(|note| note.contains("no VMCOREINFO")), "{:?}", told.account.notes);
    assert_eq!(told.account.free, FreePages::Kept { why: "free pages were not found".into() });
    let truth = [(guest.root / PAGE, Color::PageTable), (TEXT_AT / PAGE, Color::KernelText), (FAR, Color::Unknown)];
    check(&told, &truth, "by page tables");
    assert_eq!(told.counts()[Color::Free as usize], 0, "page tables do not say that a page is free");
}

#[test]
fn an_unknown_encoding_is_not_guessed() {
    let (mut guest, _) = everything(STABLE);
    let at = Linux::offset(guest.note);
    let text = String::from_utf8_lossy(&guest.ram.bytes[at..at + 2048]).replace("VALUE)=-129", "VALUE)=-229");
    guest.put(guest.note, text.as_bytes());
    // The replacement decodes the head's bytes too: write them again.
    guest.put(guest.note, &11u32.to_le_bytes());
    let coloring = guest.color();
    assert_eq!(coloring.account.basis, Basis::Nothing);
    assert!(coloring.account.notes[0].contains("marks free pages by"), "{:?}", coloring.account.notes);
}

#[test]
fn a_trace_of_use_in_a_free_block_wins() {
    let (mut guest, _) = everything(STABLE);
    guest.describe(FRAME + 3, 1 << 4, u32::MAX, 1);
    guest.free(FRAME + 0x41, 1);
    let coloring = guest.color();
    let truth = [
        (FRAME, Color::Free),
        (FRAME + 3, Color::PageCache),
        (FRAME + 4, Color::Unknown),
        (FRAME + 0x41, Color::Unknown),
    ];
    check(&coloring, &truth, "inconsistent");
    assert!(coloring.account.notes[0].contains("contradict"), "{:?}", coloring.account.notes);
}

#[test]
fn poisoned_free_pages_are_kept() {
    let (mut guest, _) = everything(STABLE);
    for frame in (FRAME..FRAME + 8).chain(FAR + 1024..FAR + 2048) {
        guest.put(frame * PAGE, &[0xaa; PAGE as usize]);
    }
    let FreePages::Kept { why } = guest.color().account.free else { panic!("poison was not seen") };
    assert!(why.contains("0xaa"), "{why}");
    // What processes left there is nobody's, and zeros are what dropping makes of it.
    for frame in FAR + 1024..FAR + 2048 {
        guest.put(frame * PAGE, &[0; PAGE as usize]);
        guest.put(frame * PAGE, b"left behind");
    }
    for frame in FRAME..FRAME + 8 {
        guest.put(frame * PAGE, &[0; PAGE as usize]);
    }
    assert_eq!(guest.color().account.free, FreePages::Droppable);
}

#[test]
fn what_is_known_to_be_zero_needs_no_reading() {
    let (mut guest, _) = everything(STABLE);
    guest.ram.zeros.push(ByteRange::new((FRAME + 6) * PAGE + 1, (FRAME + 0x12) * PAGE));
    let coloring = guest.color();
    let truth = [
        (FRAME + 7, Color::Free),
        (FRAME + 8, Color::Zero),
        (FRAME + 0x11, Color::Zero),
        (FRAME + 0x12, Color::UserText),
    ];
    check(&coloring, &truth, "zeros");
}

#[test]
fn failing_to_read_is_an_error_and_impossible_regions_are() {
    let (mut guest, _) = everything(STABLE);
    guest.ram.bytes.truncate((LOW + HIGH - PAGE) as usize);
    let error = color(&guest.ram, None, None).unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error}");
    for (start, end, offset) in [(0, PAGE + 1, 0), (0, PAGE, 1), (0, LOW + PAGE, 0), (0, !(PAGE - 1), PAGE)] {
        guest.ram.regions[1] = Region { physical: ByteRange::new(start, end), offset };
        let error = color(&guest.ram, None, None).unwrap_err();
        assert!(matches!(error, Error::Regions(_)), "{start:#x}..{end:#x} at {offset:#x}: {error}");
    }
}

#[test]
fn tables_that_form_a_ring_end() {
    let (mut guest, truth) = everything(STABLE);
    // Every entry of a root leads back to the root, at every level.
    let (root, _) = guest.process(&[(FRAME, 0)]);
    for entry in 0..256u64 {
        guest.put(root * PAGE + entry * 8, &((root * PAGE) | PRESENT | WRITE | USER).to_le_bytes());
    }
    let before: Vec<_> = truth.into_iter().filter(|(_, color)| *color == Color::Free).collect();
    let coloring = guest.color();
    check(&coloring, &before, "a ring");
    assert_eq!(coloring.account.roots, 2);
}

#[test]
fn a_kernel_that_hides_from_processes_keeps_two_roots_for_each() {
    let (mut guest, _) = everything(STABLE);
    while !guest.next.is_multiple_of(2 * PAGE) {
        guest.page();
    }
    let (root, twin) = (guest.page(), guest.page());
    guest.process_at(root, &[(FRAME + 0x10, 0)]);
    let slot = root + (0x5555_0000_0000 >> 39) * 8;
    let entry = guest.word(slot) | NO_EXECUTE;
    guest.put(slot, &entry.to_le_bytes());
    guest.describe(twin / PAGE, 0, u32::MAX, 0);
    let truth = [(root / PAGE, Color::PageTable), (twin / PAGE, Color::PageTable), (FRAME + 0x10, Color::UserText)];
    check(&guest.color(), &truth, "isolated");
}

#[test]
fn a_large_page_is_as_many_small_ones() {
    let (mut guest, _) = everything(STABLE);
    // The last 2 MiB of low memory: a transparent huge page that is executed.
    let first = (LOW - (2 << 20)) / PAGE;
    guest.lru(first, 0xffff_8a80_0123_4561, SWAPBACKED | 1 << STABLE.head);
    for tail in 1..512 {
        guest.field(first + tail, HEAD, MEMMAP + first * SIZE + 1);
    }
    let root = guest.page();
    guest.process_at(root, &[(FRAME, 0)]);
    // The entry above the last table is made a page itself.
    let mut table = root;
    let slot = |table: u64, level: u32| table + (0x5555_0000_0000u64 >> (3 + 9 * level) & 511) * 8;
    for level in [4, 3] {
        table = guest.word(slot(table, level)) & 0x000f_ffff_ffff_f000;
    }
    guest.put(slot(table, 2), &((first * PAGE) | PRESENT | WRITE | USER | 1 << 7).to_le_bytes());
    let truth = [(first, Color::UserText), (first + 511, Color::UserText), (first - 1, Color::Unknown)];
    check(&guest.color(), &truth, "large");
}
