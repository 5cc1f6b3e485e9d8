//! What a guest's kernel says of its own pages, and how colors agree with it.
//!
//! `/proc/kpageflags` (Linux, `Documentation/admin-guide/mm/pagemap.rst`) says of each page frame what it is; it is the
//! kernel's own reading of the same memory, made within. It does not tell executed pages, which come from each
//! process' `maps` and `pagemap`, nor the kernel's text, which comes from `/proc/iomem`. Of pages that have no mark at
//! all it says only that they are not free.

use crate::{Failure, Outcome};
use guest::{Color, Coloring, Region};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const MMAP: u64 = 1 << 11;
const ANON: u64 = 1 << 12;
const SWAPBACKED: u64 = 1 << 14;
const TAIL: u64 = 1 << 16;
const HUGE: u64 = 1 << 17;
const NOPAGE: u64 = 1 << 20;
const OFFLINE: u64 = 1 << 23;
const PGTABLE: u64 = 1 << 26;
const RESERVED: u64 = 1 << 32;
/// What says where a page is on its way, and may change while nobody looks: locked, referenced, up to date, dirty,
/// active, written back, reclaimed, idle.
const PASSING: u64 = 0b0111_1111 & !LRU | 1 << 8 | 1 << 9 | 1 << 25;

/// What the kernel says of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Truth {
    /// It is of this color.
    Is(Color),
    /// It has no mark: in use, as far as anybody can tell, and not in the allocator.
    Unmarked,
}

/// A guest's own account, for each page frame.
pub struct Oracle {
    flags: Vec<u64>,
    count: Vec<u64>,
    flags_after: Vec<u64>,
    count_after: Vec<u64>,
    executed: HashSet<u64>,
    executed_after: HashSet<u64>,
    kernel_text: Vec<RangeInclusive<u64>>,
}

impl Oracle {
    /// Reads what `oracle.pl` left on the exchange disk.
    ///
    /// # Errors
    /// Where that is not whole.
    pub fn read(exchange: &Path) -> Outcome<Self> {
        let file = File::open(exchange)?;
        let mut index = vec![0; 4096];
        file.read_exact_at(&mut index, 1 << 20)?;
        let index = String::from_utf8_lossy(&index).into_owned();
        let mut parts = BTreeMap::new();
        for line in index.lines().take_while(|line| *line != "end") {
            let mut words = line.split(' ');
            let (Some(name), Some(offset), Some(length)) = (words.next(), words.next(), words.next()) else {
                return Err(format!("the guest's account has an odd line: {line}").into());
            };
            let mut bytes = vec![0; length.parse()?];
            file.read_exact_at(&mut bytes, offset.parse()?)?;
            parts.insert(name.to_owned(), bytes);
        }
        let mut part = |name: &str| {
            parts.remove(name).ok_or_else(|| Failure::from(format!("the guest's account lacks {name}: {index}")))
        };
        let words = |bytes: Vec<u8>| -> Vec<u64> {
            bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
        };
        let iomem = String::from_utf8_lossy(&part("iomem")?).into_owned();
        Ok(Self {
            flags: words(part("flags")?),
            count: words(part("count")?),
            flags_after: words(part("flags_after")?),
            count_after: words(part("count_after")?),
            executed: words(part("executed")?).into_iter().collect(),
            executed_after: words(part("executed_after")?).into_iter().collect(),
            kernel_text: iomem.lines().filter(|l| l.ends_with(": Kernel code")).filter_map(frames).collect(),
        })
    }

    /// How much of the memory is in use, percent.
    #[must_use]
    pub fn used_percent(&self) -> f64 {
        let there = self.flags.iter().filter(|&&f| f & NOPAGE == 0).count();
        let free = self.flags.iter().filter(|&&f| f & BUDDY != 0).count();
        100.0 * (there - free) as f64 / there.max(1) as f64
    }

    /// What a page frame was while the machine stood still; `None` where it changed around that, or is not there.
    #[must_use]
    pub fn truth(&self, frame: u64) -> Option<Truth> {
        let at = usize::try_from(frame).ok()?;
        let mut flags = *self.flags.get(at)?;
        let kept = |at: usize| {
            let same = |a: &[u64], b: &[u64]| a.get(at).zip(b.get(at)).is_some_and(|(a, b)| (a ^ b) & !PASSING == 0);
            same(&self.flags, &self.flags_after) && self.count.get(at) == self.count_after.get(at)
        };
        if flags & NOPAGE != 0 || (0xa0..0x100).contains(&frame) || !kept(at) {
            return None;
        }
        // What is behind the first page of a compound one is what the first is.
        if flags & TAIL != 0 {
            let head = (0..at).rev().find(|&before| self.flags[before] & TAIL == 0)?;
            if !kept(head) {
                return None;
            }
            flags |= self.flags[head] & (LRU | SLAB | SWAPBACKED | HUGE);
        }
        let executed = self.executed.contains(&frame);
        if executed != self.executed_after.contains(&frame) {
            return None;
        }
        let color = match flags {
            f if f & BUDDY != 0 => Color::Free,
            f if f & SLAB != 0 => Color::Slab,
            f if f & PGTABLE != 0 => Color::PageTable,
            f if f & HUGE != 0 => Color::UserData,
            f if f & OFFLINE != 0 => Color::Device,
            f if f & (ANON | LRU) != 0 && executed => Color::UserText,
            f if f & ANON != 0 => Color::UserData,
            f if f & LRU != 0 && f & SWAPBACKED != 0 && f & MMAP != 0 => Color::UserData,
            f if f & LRU != 0 => Color::PageCache,
            f if f & RESERVED != 0 && self.kernel_text.iter().any(|r| r.contains(&frame)) => Color::KernelText,
            f if f & RESERVED != 0 => Color::KernelData,
            _ => return Some(Truth::Unmarked),
        };
        Some(Truth::Is(color))
    }
}

/// The whole frames of a line of `/proc/iomem`.
fn frames(line: &str) -> Option<RangeInclusive<u64>> {
    let (start, end) = line.split_once(" : ")?.0.trim().split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some(start.div_ceil(base::PAGE)..=(end + 1) / base::PAGE - 1)
}

/// How many pages of each truth were given each color.
#[derive(Clone, Debug, Default)]
pub struct Matrix {
    cells: BTreeMap<(Truth, Color), u64>,
    /// Pages that changed while the kernel was asked, or that it knows nothing of.
    pub unjudged: u64,
}

impl Matrix {
    /// Compares page by page.
    #[must_use]
    pub fn of(coloring: &Coloring, regions: &[Region], oracle: &Oracle) -> Self {
        let mut matrix = Self::default();
        for region in regions {
            for (i, frame) in (region.physical.start / base::PAGE..region.physical.end / base::PAGE).enumerate() {
                let color = coloring.get(region.offset / base::PAGE + i as u64);
                match oracle.truth(frame) {
                    Some(truth) => *matrix.cells.entry((truth, color)).or_default() += 1,
                    None => matrix.unjudged += 1,
                }
            }
        }
        matrix
    }

    /// Adds another guest's.
    pub fn add(&mut self, other: &Self) {
        for (&cell, pages) in &other.cells {
            *self.cells.entry(cell).or_default() += pages;
        }
        self.unjudged += other.unjudged;
    }

    /// Pages of a truth, and how many of them were given its color.
    #[must_use]
    pub fn agreement(&self, color: Color) -> (u64, u64) {
        let row = |c: &&(Truth, Color)| c.0 == Truth::Is(color);
        let all = self.cells.keys().filter(row).map(|c| self.cells[c]).sum();
        (all, self.cells.get(&(Truth::Is(color), color)).copied().unwrap_or(0))
    }

    /// The share that agrees, of a color with at least `least` pages.
    #[must_use]
    pub fn share(&self, color: Color, least: u64) -> Option<f64> {
        let (all, right) = self.agreement(color);
        (all >= least.max(1)).then(|| right as f64 / all as f64)
    }

    /// The worst share of any color but free, and whose it is.
    #[must_use]
    pub fn worst(&self, least: u64) -> Option<(Color, f64)> {
        let others = Color::ALL.into_iter().filter(|&color| color != Color::Free);
        others.filter_map(|color| Some((color, self.share(color, least)?))).min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Pages that are not free and were called so.
    #[must_use]
    pub fn used_called_free(&self) -> u64 {
        let wrong =
            self.cells.iter().filter(|((truth, color), _)| *color == Color::Free && *truth != Truth::Is(Color::Free));
        wrong.map(|(_, pages)| pages).sum()
    }

    /// A table for documents: a row for each truth, a column for each color that was given.
    #[must_use]
    pub fn markdown(&self) -> String {
        let called: Vec<Color> =
            Color::ALL.into_iter().filter(|color| self.cells.keys().any(|cell| cell.1 == *color)).collect();
        let mut truths: Vec<Truth> = self.cells.keys().map(|cell| cell.0).collect();
        truths.dedup();
        let names: Vec<&str> = called.iter().map(|color| color.name()).collect();
        let mut out =
            format!("| in truth | {} | agreement |\n|---|{}---:|\n", names.join(" | "), "---:|".repeat(called.len()));
        for truth in truths {
            let cells: Vec<String> = called
                .iter()
                .map(|color| self.cells.get(&(truth, *color)).map_or_else(|| "·".into(), u64::to_string))
                .collect();
            let (name, share) = match truth {
                Truth::Is(color) => (color.name(), format!("{:.3}%", 100.0 * self.share(color, 1).unwrap_or(0.0))),
                Truth::Unmarked => ("unmarked", "not told".into()),
            };
            out.push_str(&format!("| {name} | {} | {share} |\n", cells.join(" | ")));
        }
        out
    }
}
