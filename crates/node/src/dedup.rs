//! What snapshots share, by color: told from the names of their blocks, which are equal where content is. No block is
//! read.

use crate::error::{Error, Result};
use crate::look;
use crate::node::{Node, Shared};
use crate::snapshots;
use api::{DedupPart, DedupReport, DedupRequest};
use base::PAGE;
use guest::{Basis, Color, Coloring};
use std::collections::BTreeSet;

/// Snapshots that are compared at a time: each costs 24 bytes of memory for each of its pages.
const SNAPSHOTS_MAX: usize = 256;
/// Blocks whose names are asked for at a time.
const STEP: u64 = 1 << 16;

/// A page that is not zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Page {
    /// Half of its content's name, which no two contents share by chance.
    name: u128,
    /// Number of its snapshot.
    snapshot: u16,
    color: u8,
}

impl Node {
    /// What snapshots share.
    ///
    /// # Errors
    /// None or too many are named, one twice, or one is not there.
    pub fn dedup(&self, request: &DedupRequest) -> Result<DedupReport> {
        let names = &request.snapshots;
        if names.is_empty() || names.len() > SNAPSHOTS_MAX {
            return Err(Error::Invalid(format!("name 1 to {SNAPSHOTS_MAX} snapshots, not {}", names.len())));
        }
        if let Some(twice) = names.iter().enumerate().find_map(|(i, name)| names[..i].contains(name).then_some(name)) {
            return Err(Error::Invalid(format!("{twice} is named twice; it shares everything with itself")));
        }
        let mut tally = Tally::new(names);
        for (number, name) in (0..).zip(names) {
            tally.add(&self.shared, number, name)?;
        }
        Ok(tally.report())
    }
}

/// Counts while snapshots are added.
struct Tally {
    names: Vec<String>,
    /// By snapshot, then by color: pages, and of these zero ones.
    counts: Vec<[(u64, u64); Color::ALL.len()]>,
    pages: Vec<Page>,
    notes: Vec<String>,
}

impl Tally {
    fn new(names: &[String]) -> Self {
        let counts = vec![[(0, 0); Color::ALL.len()]; names.len()];
        Self { names: names.to_vec(), counts, pages: Vec::new(), notes: Vec::new() }
    }

    fn add(&mut self, shared: &Shared, number: u16, name: &str) -> Result<()> {
        let (manifest, meta) = snapshots::snapshot_named(shared, name)?;
        let ram = snapshots::ram_of(name, &manifest, &meta)?;
        let coloring = look::of_snapshot(shared, name, &manifest, &meta)?;
        if coloring.account.basis != Basis::Descriptors {
            self.notes.push(format!("{name}: {}", coloring.account.notes.join("; ")));
        }
        let mut first = 0;
        while first < ram.blocks() {
            let end = ram.blocks().min(first + STEP);
            let names = shared.store.names(&ram, first..end)?;
            self.count(number, &coloring, first, names.iter().map(|name| name.map(|n| half(n.as_bytes()))));
            first = end;
        }
        Ok(())
    }

    fn count(&mut self, snapshot: u16, coloring: &Coloring, first: u64, names: impl Iterator<Item = Option<u128>>) {
        for (page, name) in (first..).zip(names) {
            let color = if page < coloring.len() { coloring.get(page) } else { Color::Unknown };
            let (pages, zero) = &mut self.counts[usize::from(snapshot)][color as usize];
            *pages += 1;
            match name {
                Some(name) => self.pages.push(Page { name, snapshot, color: color as u8 }),
                None => *zero += 1,
            }
        }
    }

    fn report(mut self) -> DedupReport {
        self.pages.sort_unstable();
        let part = |name: &str| DedupPart { name: name.to_owned(), ..DedupPart::default() };
        let mut snapshots: Vec<DedupPart> = self.names.iter().map(|name| part(name)).collect();
        let mut colors: Vec<DedupPart> = Color::ALL.iter().map(|color| part(color.name())).collect();
        let mut all = part("all");
        for (snapshot, by_color) in snapshots.iter_mut().zip(&self.counts) {
            for (color, (pages, zero)) in colors.iter_mut().zip(by_color) {
                for row in [&mut *snapshot, color, &mut all] {
                    row.pages += pages;
                    row.zero += zero;
                }
            }
        }
        let mut distinct = 0;
        for same in self.pages.chunk_by(|a, b| a.name == b.name) {
            distinct += 1;
            let others = same.iter().map(|page| page.snapshot).collect::<BTreeSet<_>>().len() > 1;
            for own in same.chunk_by(|a, b| a.snapshot == b.snapshot) {
                let repeated = own.len() > 1;
                for page in own {
                    let (snapshot, color) = (usize::from(page.snapshot), usize::from(page.color));
                    for row in [&mut snapshots[snapshot], &mut colors[color], &mut all] {
                        row.shared += u64::from(others);
                        row.repeated += u64::from(repeated);
                        row.either += u64::from(others || repeated);
                    }
                }
            }
        }
        colors.retain(|color| color.pages > 0);
        colors.sort_by(|a, b| b.likelihood().total_cmp(&a.likelihood()));
        DedupReport { page_bytes: PAGE, snapshots, all, colors, distinct, notes: self.notes }
    }
}

fn half(name: &[u8; 32]) -> u128 {
    u128::from_le_bytes(name[..16].try_into().expect("16 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::ByteRange;
    use guest::{Memory, Region};

    struct Nothing(Vec<Region>, Vec<ByteRange>);

    impl Memory for Nothing {
        fn regions(&self) -> &[Region] {
            &self.0
        }

        fn read(&self, _: u64, into: &mut [u8]) -> std::io::Result<()> {
            into.fill(0);
            Ok(())
        }

        fn zeros(&self) -> &[ByteRange] {
            &self.1
        }
    }

    /// The first `zero` pages are zero, the others unknown.
    fn coloring(pages: u64, zero: u64) -> Coloring {
        let bytes = pages * PAGE;
        guest::color(&Nothing(Region::of_pc(bytes, bytes), vec![ByteRange::new(0, zero * PAGE)]), None, None).unwrap()
    }

    #[test]
    fn pages_are_counted_where_their_content_stands_again() {
        let mut tally = Tally::new(&["a@1".into(), "b@1".into()]);
        let colors = coloring(8, 3);
        // Content 9 stands in both, 5 twice in the first, 7 in both and twice in the second.
        let (a, b) = ([0, 5, 5, 9, 7, 1, 2, 0], [0, 0, 0, 9, 7, 7, 3, 4]);
        for (number, names) in [(0, a), (1, b)] {
            tally.count(number, &colors, 0, names.iter().map(|&n| (n > 0).then_some(n)));
        }
        let report = tally.report();
        let part = |name: &str, pages, zero, shared, repeated, either| DedupPart {
            name: name.into(),
            pages,
            zero,
            shared,
            repeated,
            either,
        };
        assert_eq!(report.snapshots, [part("a@1", 8, 2, 2, 2, 4), part("b@1", 8, 3, 3, 2, 3)]);
        assert_eq!(report.all, part("all", 16, 5, 5, 4, 7));
        assert_eq!(report.distinct, 7);
        assert_eq!(report.colors, [part("zero", 6, 4, 0, 2, 2), part("unknown", 10, 1, 5, 2, 5)]);
    }
}
