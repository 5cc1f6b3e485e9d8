//! Colors, and what is known of how they were found.

use crate::free::FreePages;
use crate::kernel::Kernel;
use crate::memory::Hint;
use crate::plan::{Key, Page, Space};
use std::ops::Range;

/// What a page of a guest's RAM is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Color {
    /// Nobody can tell. Pages on their way between the allocator and a user are here too.
    Unknown,
    /// In the guest's page allocator: its content is nobody's.
    Free,
    /// In use, and known without reading to be all zero.
    Zero,
    /// Executed by the kernel: its own text, its modules', what it compiled.
    KernelText,
    /// The kernel's other memory: its image, stacks, page descriptors, what drivers asked for by the page.
    KernelData,
    /// The kernel's objects.
    Slab,
    /// Page tables, of the kernel and of processes.
    PageTable,
    /// Content of files that no process executes, read or mapped; `tmpfs` too.
    PageCache,
    /// Executed by processes: mapped executable by at least one.
    UserText,
    /// Processes' own: anonymous memory, huge pages, shared memory that is mapped.
    UserData,
    /// Not the guest's to use: windows of devices, pages given back to the host.
    Device,
}

/// How a color is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hue {
    /// Degrees on the color wheel.
    pub degrees: u16,
    /// Percent; 0 is grey.
    pub saturation: u8,
}

impl Color {
    /// All of them, as they are numbered.
    pub const ALL: [Self; 11] = [
        Self::Unknown,
        Self::Free,
        Self::Zero,
        Self::KernelText,
        Self::KernelData,
        Self::Slab,
        Self::PageTable,
        Self::PageCache,
        Self::UserText,
        Self::UserData,
        Self::Device,
    ];

    /// Its name, as commands and documents write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        [
            "unknown",
            "free",
            "zero",
            "kernel text",
            "kernel data",
            "slab",
            "page table",
            "page cache",
            "user text",
            "user data",
            "device",
        ][self as usize]
    }

    /// The palette. Text is red to orange, data blue to cyan, files green; the kernel's is the purer of each pair, and
    /// what nobody needs is grey. Brightness stays free for whether a page is here, dirty or absent.
    #[must_use]
    pub fn hue(self) -> Hue {
        const PALETTE: [(u16, u8); 11] = [
            (0, 0),
            (220, 8),
            (220, 18),
            (0, 78),
            (222, 72),
            (272, 62),
            (312, 64),
            (138, 52),
            (28, 88),
            (196, 76),
            (52, 82),
        ];
        let (degrees, saturation) = PALETTE[self as usize];
        Hue { degrees, saturation }
    }

    fn of(number: u8) -> Self {
        Self::ALL[usize::from(number)]
    }
}

impl std::fmt::Display for Color {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What the colors rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The kernel's page descriptors, and page tables.
    Descriptors,
    /// One processor's page tables alone: pages that it does not map are unknown, none is called free.
    PageTables,
    /// Nothing: all is unknown.
    Nothing,
}

/// How colors were found.
#[derive(Clone, Debug)]
pub struct Account {
    /// What they rest on.
    pub basis: Basis,
    /// The kernel's release, where it is Linux.
    pub release: Option<String>,
    /// How this kernel writes down what a page is: the name of a row of the table of encodings.
    pub encoding: Option<&'static str>,
    /// Levels of its page tables; 0 where they were not found.
    pub levels: u8,
    /// How many roots of page tables were found, the kernel's own aside.
    pub roots: u32,
    /// Whether pages that are free may be zero in an offshoot.
    pub free: FreePages,
    /// What makes the next coloring of the same guest faster.
    pub hint: Option<Hint>,
    /// What did not go as hoped, each with its reason.
    pub notes: Vec<String>,
    /// Bytes of the guest's memory that were read for it.
    pub bytes_read: u64,
}

impl Account {
    pub(crate) fn new() -> Self {
        Self {
            basis: Basis::Nothing,
            release: None,
            encoding: None,
            levels: 0,
            roots: 0,
            free: FreePages::Kept { why: "free pages were not found".into() },
            hint: None,
            notes: Vec::new(),
            bytes_read: 0,
        }
    }

    pub(crate) fn adopt(&mut self, kernel: &Kernel, note: u64) {
        self.release = Some(kernel.release.clone());
        self.encoding = Some(kernel.types.name());
        self.levels = kernel.levels;
        self.hint = Some(Hint { note });
    }
}

/// The color of each page of a blob.
#[derive(Clone, Debug)]
pub struct Coloring {
    /// A color's number for each page; above it, while coloring, what later steps need to know.
    pages: Vec<u8>,
    places: Places,
    /// How they were found.
    pub account: Account,
}

/// Where pages stand in color space.
#[derive(Clone, Debug)]
pub(crate) enum Places {
    /// What each page belongs to, by its descriptor; empty where descriptors were not read.
    Keys(Vec<Key>),
    /// As it was found before: each page once.
    Order(Vec<Page>),
}

/// The descriptor says only that somebody has the page.
pub(crate) const WEAK: u8 = 0x80;
/// And it looks like a root of page tables.
pub(crate) const ROOT: u8 = 0x20;
/// Content of a file that lives in memory alone.
pub(crate) const SHARED: u8 = 0x40;
const NUMBER: u8 = 0x0f;

impl Coloring {
    pub(crate) fn unknown(pages: u64, account: Account) -> Self {
        let pages = vec![Color::Unknown as u8; usize::try_from(pages).expect("pages fit into memory")];
        Self { pages, places: Places::Keys(Vec::new()), account }
    }

    /// As it was when it was kept: `order` names each of the pages once, or there is none.
    pub(crate) fn kept(pages: Vec<u8>, order: Vec<Page>, account: Account) -> Option<Self> {
        let known = pages.iter().all(|&number| usize::from(number) < Color::ALL.len());
        let space = Space::in_order(pages, order).filter(|_| known)?;
        Some(Self { pages: space.colors().to_vec(), places: Places::Order(space.order().to_vec()), account })
    }

    /// Color space: pages of one color side by side, in the order in which the guest thinks of them.
    ///
    /// # Panics
    /// For 2^32 pages (16 TiB) or more.
    #[must_use]
    pub fn space(&self) -> Space {
        let none = (0, 0);
        match &self.places {
            Places::Order(order) => Space::in_order(self.pages.clone(), order.clone()).expect("was checked"),
            Places::Keys(keys) => {
                Space::new(self.pages.clone(), |page| keys.get(page as usize).copied().unwrap_or(none))
            }
        }
    }

    /// Pages that are free where the guest would not notice that they have become zero; none where it would.
    #[must_use]
    pub fn droppable(&self) -> Vec<Range<u64>> {
        match self.account.free {
            FreePages::Kept { .. } => Vec::new(),
            FreePages::Droppable => self.runs().filter(|(_, c)| *c == Color::Free).map(|(run, _)| run).collect(),
        }
    }

    /// How many pages it colors.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Whether it colors none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The color of a page of the blob.
    #[must_use]
    pub fn get(&self, page: u64) -> Color {
        Color::of(self.pages[page as usize] & NUMBER)
    }

    /// All colors, in the order of the blob's pages.
    pub fn iter(&self) -> impl Iterator<Item = Color> + '_ {
        self.pages.iter().map(|&number| Color::of(number & NUMBER))
    }

    /// Runs of pages of one color, in order.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, Color)> + '_ {
        let mut at = 0;
        self.pages.chunk_by(|a, b| a == b).map(move |run| {
            let start = at;
            at += run.len() as u64;
            (start..at, Color::of(run[0] & NUMBER))
        })
    }

    /// How many pages there are of each color, as [`Color::ALL`] lists them.
    #[must_use]
    pub fn counts(&self) -> [u64; Color::ALL.len()] {
        let mut counts = [0; Color::ALL.len()];
        for &number in &self.pages {
            counts[usize::from(number & NUMBER)] += 1;
        }
        counts
    }

    /// Calls pages zero that were found to be so, those aside that are free: these are none's, whatever they hold.
    pub fn zero(&mut self, pages: Range<u64>) {
        let end = pages.end.min(self.len()) as usize;
        let start = (pages.start as usize).min(end);
        for number in &mut self.pages[start..end] {
            if *number != Color::Free as u8 {
                *number = Color::Zero as u8;
            }
        }
    }

    /// What each page belongs to, to be filled in.
    pub(crate) fn keys_mut(&mut self) -> &mut Vec<Key> {
        if let Places::Order(_) = self.places {
            self.places = Places::Keys(Vec::new());
        }
        let Places::Keys(keys) = &mut self.places else { unreachable!("made so above") };
        keys
    }

    pub(crate) fn raw(&self) -> &[u8] {
        &self.pages
    }

    pub(crate) fn raw_mut(&mut self) -> &mut [u8] {
        &mut self.pages
    }

    pub(crate) fn set(&mut self, page: u64, color: Color) {
        self.pages[page as usize] = color as u8;
    }

    /// Drops what only coloring needs.
    pub(crate) fn settle(&mut self) {
        for number in &mut self.pages {
            *number &= NUMBER;
        }
    }

    /// Starts over after an attempt that failed.
    pub(crate) fn forget(&mut self) {
        self.pages.fill(Color::Unknown as u8);
        self.places = Places::Keys(Vec::new());
        self.account = Account { notes: std::mem::take(&mut self.account.notes), ..Account::new() };
    }
}
