//! What page tables add to descriptors: who executes a page, and which pages are tables.

use crate::color::{Color, Coloring, ROOT, SHARED, WEAK};
use crate::descriptors::Survey;
use crate::kernel::Kernel;
use crate::memory::Cpu;
use crate::paging::{Half, Leaf, Met, Space, Walker, table};
use crate::reader::{Reader, Stop};
use base::PAGE;

/// What hardware writes into entries by itself: accessed, dirty.
const HARDWARE: u64 = 1 << 5 | 1 << 6;
/// Physical address bits of a root.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Walks all page tables, each once.
pub(crate) struct Mappings {
    walker: Walker,
}

impl Mappings {
    pub(crate) fn new(pages: u64) -> Self {
        Self { walker: Walker::new(pages) }
    }

    /// The kernel's half, once for all: every process shares it.
    pub(crate) fn kernel(
        &mut self,
        reader: &mut Reader,
        kernel: &Kernel,
        survey: &Survey,
        coloring: &mut Coloring,
    ) -> Result<(), Stop> {
        let direct = survey.direct;
        self.walker.walk(reader, kernel.root, kernel.levels, Half::Kernel, &mut |reader, met| match met {
            Met::Table(at) => {
                mark_table(reader, coloring, at);
                Ok(())
            }
            // All memory is mapped there, whatever it is for.
            Met::Leaf(leaf) if direct.start <= leaf.address && leaf.address < direct.end => Ok(()),
            Met::Leaf(leaf) => each_page(reader, leaf, |page| {
                let number = &mut coloring.raw_mut()[page as usize];
                let plain = *number & !(WEAK | ROOT);
                if plain == Color::KernelData as u8 || plain == Color::Unknown as u8 {
                    // Known from now on: no root of page tables is mapped anywhere else.
                    *number = if leaf.execute { Color::KernelText } else { Color::KernelData } as u8;
                }
            }),
        })
    }

    /// The processes' halves: finds the roots, and returns how many there are.
    ///
    /// A root is a page that somebody in the kernel has and of which nothing else is known, and whose entries for the
    /// kernel's image and for all of memory are those of the kernel's own root.
    pub(crate) fn roots(
        &mut self,
        reader: &mut Reader,
        kernel: &Kernel,
        survey: &Survey,
        cpu: Option<Cpu>,
        coloring: &mut Coloring,
    ) -> Result<u32, Stop> {
        const DATA: u8 = Color::KernelData as u8;
        let own = table(reader, kernel.root)?;
        let indices = [511, Space::new(kernel.root, kernel.levels).root_index(survey.direct.start)];
        let mut roots = Vec::new();
        // Descriptors that name an owner first: where releases to come put it elsewhere, all that nothing is known of.
        for looks in [DATA | WEAK | ROOT, DATA | WEAK] {
            for region in reader.regions().to_vec() {
                let first = (region.offset / PAGE) as usize;
                for i in 0..(region.physical.len() / PAGE) as usize {
                    let number = coloring.raw()[first + i];
                    // From 6.13 on a root has a table's type.
                    let typed = kernel.version >= (6, 13) && number == Color::PageTable as u8;
                    let physical = region.physical.start + i as u64 * PAGE;
                    if (number == looks || typed) && physical != kernel.root && alike(reader, physical, &own, indices)?
                    {
                        roots.push(physical);
                    }
                }
            }
            if !roots.is_empty() {
                break;
            }
        }
        // Between processes a processor may stand on the kernel's own.
        roots.extend(cpu.map(|cpu| cpu.cr3 & ADDRESS).filter(|at| *at != kernel.root && !roots.contains(at)));
        for &root in &roots {
            self.user(reader, root, kernel.levels, coloring)?;
        }
        Ok(roots.len() as u32)
    }

    fn user(&mut self, reader: &mut Reader, root: u64, levels: u8, coloring: &mut Coloring) -> Result<(), Stop> {
        if isolated(reader, root)? {
            // The process' own view of the address space lies behind the kernel's.
            mark_table(reader, coloring, root | PAGE);
        }
        let walked = self.walker.walk(reader, root, levels, Half::User, &mut |reader, met| match met {
            Met::Table(at) => {
                mark_table(reader, coloring, at);
                Ok(())
            }
            Met::Leaf(leaf) if !leaf.user => Ok(()),
            Met::Leaf(leaf) => each_page(reader, leaf, |page| {
                let number = &mut coloring.raw_mut()[page as usize];
                let file = *number & !SHARED == Color::PageCache as u8;
                if leaf.execute && (file || *number == Color::UserData as u8) {
                    *number = Color::UserText as u8;
                } else if *number == Color::PageCache as u8 | SHARED {
                    *number = Color::UserData as u8;
                }
            }),
        });
        match walked {
            // A register's value that leads nowhere is no fault of the others.
            Err(Stop::Absent(_)) => Ok(()),
            other => other,
        }
    }

    /// One processor's tables without any knowledge of the system that made them.
    ///
    /// Systems map all of memory for themselves, mostly by large pages and not for execution: that says nothing. What
    /// they execute is mapped read-only; what they map page by page is theirs.
    pub(crate) fn processor(&mut self, reader: &mut Reader, cpu: Cpu, coloring: &mut Coloring) -> Result<(), Stop> {
        for half in [Half::Kernel, Half::User] {
            self.walker.walk(reader, cpu.cr3 & ADDRESS, cpu.levels(), half, &mut |reader, met| {
                let leaf = match met {
                    Met::Table(at) => {
                        mark_table(reader, coloring, at);
                        return Ok(());
                    }
                    Met::Leaf(leaf) => leaf,
                };
                let color = match (leaf.user, leaf.execute) {
                    (true, true) => Color::UserText,
                    (true, false) => Color::UserData,
                    (false, true) if !leaf.write && leaf.bytes < 1 << 30 => Color::KernelText,
                    (false, false) if leaf.bytes == PAGE => Color::KernelData,
                    (false, _) => return Ok(()),
                };
                each_page(reader, leaf, |page| {
                    let now = coloring.raw()[page as usize];
                    // Text over data, a process' over the system's, which maps everything.
                    let weaker = now == Color::Unknown as u8
                        || now == Color::KernelData as u8
                        || (now == Color::UserData as u8 && color == Color::UserText);
                    if weaker {
                        coloring.set(page, color);
                    }
                })
            })?;
        }
        Ok(())
    }
}

/// Whether a page's entries are those of the kernel's own root.
fn alike(reader: &mut Reader, physical: u64, own: &[u64; 512], indices: [usize; 2]) -> Result<bool, Stop> {
    for index in indices {
        if (reader.word(physical + index as u64 * 8)? ^ own[index]) & !HARDWARE != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a kernel hides itself from the process with this root (page-table isolation): it then keeps two roots side
/// by side, and in its own marks the process' half as not executable.
fn isolated(reader: &mut Reader, root: u64) -> Result<bool, Stop> {
    const PRESENT: u64 = 1;
    const NO_EXECUTE: u64 = 1 << 63;
    let entries = match table(reader, root) {
        Ok(entries) => entries,
        Err(Stop::Absent(_)) => return Ok(false),
        Err(stop) => return Err(stop),
    };
    Ok(root & PAGE == 0 && entries[..256].iter().any(|entry| entry & PRESENT != 0 && entry & NO_EXECUTE != 0))
}

/// A page that a walk used as a table is one, unless its descriptor says that it is something else: a stale or forged
/// entry makes nothing of a free page.
fn mark_table(reader: &Reader, coloring: &mut Coloring, physical: u64) {
    if let Some(page) = reader.page(physical) {
        let number = &mut coloring.raw_mut()[page as usize];
        let plain = *number & !(WEAK | ROOT);
        if plain == Color::KernelData as u8 || plain == Color::Unknown as u8 {
            *number = Color::PageTable as u8;
        }
    }
}

/// Visits the pages of RAM that an entry maps.
fn each_page(reader: &mut Reader, leaf: Leaf, mut visit: impl FnMut(u64)) -> Result<(), Stop> {
    if leaf.bytes > PAGE {
        reader.charge(leaf.bytes / PAGE * 8)?;
    }
    for physical in (leaf.physical..leaf.physical + leaf.bytes).step_by(PAGE as usize) {
        if let Some(page) = reader.page(physical) {
            visit(page);
        }
    }
    Ok(())
}
