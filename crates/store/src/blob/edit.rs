//! Making versions out of versions: sweeps of whole subtrees, writes of any alignment, other sizes, and the rebase of
//! what a writer made onto what others published meanwhile.
//!
//! A rebase moves names, not bytes. Where a writer's range covers whole subtrees these are grafted as they are; where
//! it covers whole blocks, their names. Only a block that is covered in part, and that somebody else changed as well,
//! is merged anew, and an append that no longer starts where it was cut into blocks is cut anew; the writer's bytes are
//! then read from what it stored.

use crate::commit::{BlockSource, Changes, CommitStat};
use crate::error::Error;
use crate::name::{Name, Version};
use crate::nodes::NodeSink;
use crate::read::tree_of;
use crate::store::Store;
use crate::transaction::Transaction;
use crate::tree::{self, Tree, Update, Updated, span};
use base::ByteRange;
use std::io;
use std::ops::Range;

/// What a writer made of the version it found.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// The version it found.
    pub(crate) base: Version,
    /// What that became by its changes.
    pub(crate) ours: Version,
    /// The bytes it changed: ascending, disjoint, of any alignment.
    pub(crate) ranges: Vec<ByteRange>,
    /// Whether these were put at the end, wherever that may be.
    pub(crate) append: bool,
}

/// An ascending sweep of subtrees over a tree, with its references.
pub(crate) struct Sweep<'a> {
    store: &'a Store,
    height: u8,
    update: Update<'a, Store>,
    sink: NodeSink<'a>,
}

impl Sweep<'_> {
    /// Puts a subtree in the place of number `number` of its height; without a name, zeros.
    pub(crate) fn graft(&mut self, tree: Tree, number: u64) -> Result<(), Error> {
        let Some(name) = tree.name else {
            let start = number * span(tree.height);
            return self.update.zero(start..start + span(tree.height), &mut self.sink);
        };
        self.store.acquire(&mut self.store.ledger(), name, tree.height)?;
        let taken = self.update.graft(tree.height, number, name, &mut self.sink);
        if !matches!(taken, Ok(true)) {
            self.store.release(&mut self.store.ledger(), name, tree.height);
        }
        taken.map(|_| ())
    }

    /// Makes blocks `blocks` those of `from`.
    fn overlay(&mut self, from: Tree, blocks: Range<u64>) -> Result<(), Error> {
        let mut at = blocks.start;
        let tallest = from.height.min(self.height - 1);
        while at < blocks.end {
            let fits = |height: &u8| at.is_multiple_of(span(*height)) && blocks.end - at >= span(*height);
            let height = (0..=tallest).rev().find(fits).expect("height 0 always fits");
            let number = at / span(height);
            self.graft(tree::subtree(self.store, from, height, number)?, number)?;
            at += span(height);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Updated, Error> {
        let updated = self.update.finish(&mut self.sink)?;
        if let Err(error) = self.sink.flush() {
            // The path is closed, so the reference on the root is no longer the update's to give back.
            let held = updated.root.filter(|_| updated.changed).map(|root| (root, self.height));
            self.sink.abandon(held.into_iter().collect());
            return Err(error);
        }
        Ok(updated)
    }
}

impl Transaction<'_> {
    /// The tree that `base` becomes by an ascending sweep. The transaction holds it. On failure nothing is kept.
    pub(crate) fn sweep(
        &self,
        base: Tree,
        work: impl FnOnce(&mut Sweep<'_>) -> Result<(), Error>,
    ) -> Result<Tree, Error> {
        let (store, height) = (self.store, base.height);
        let root = base.name.unwrap_or(Name::zero(height));
        store.acquire(&mut store.ledger(), root, height)?;
        let done = Update::new(store, base).and_then(|update| {
            let mut sweep = Sweep { store, height, update, sink: NodeSink::new(self) };
            work(&mut sweep).and_then(|()| sweep.finish()).inspect_err(|_| {
                let held = sweep.update.abandon();
                sweep.sink.abandon(held);
            })
        });
        if !matches!(done, Ok(Updated { changed: false, root: Some(_) })) {
            store.release(&mut store.ledger(), root, height);
        }
        let updated = done?;
        if let Some(name) = updated.root {
            self.hold(name, height);
        }
        Ok(Tree { name: updated.root, height })
    }

    /// The same blocks in a taller tree.
    pub(crate) fn lift(&self, tree: Tree, height: u8) -> Result<Tree, Error> {
        if tree.height == height || tree.name.is_none() {
            return Ok(Tree { height, ..tree });
        }
        self.sweep(Tree { name: None, height }, |sweep| sweep.graft(tree, 0))
    }

    /// `base` with `ranges`, which ascend and lie within it but may start and end anywhere, read from `source`.
    pub(crate) fn patch(
        &self,
        base: &Version,
        ranges: &[ByteRange],
        source: &dyn BlockSource,
        threads: usize,
    ) -> Result<(Version, CommitStat), Error> {
        let merged = Merged { store: self.store, base, ranges, source };
        let written = whole_blocks(base, ranges);
        let changes =
            Changes { written: &written, zeroed: &[], source: &merged, threads, progress: None, cancel: None };
        self.commit(base, &changes).map_err(|error| match error {
            // What the base could not give is the store's own error, not the source's.
            Error::Source { offset, source } => match source.downcast::<Error>() {
                Ok(own) => own,
                Err(source) => Error::Source { offset, source },
            },
            error => error,
        })
    }

    /// `base` cut or grown with zeros to `size`. The transaction holds it.
    pub(crate) fn resized(&self, base: &Version, size: u64) -> Result<Version, Error> {
        let blank = self.store.empty(size, base.block_size);
        let height = blank.height();
        if size >= base.size {
            let tree = self.lift(tree_of(base), height)?;
            return self.held(Version { root: tree.name.unwrap_or(blank.root), ..blank });
        }
        let cut = tree::subtree(self.store, tree_of(base), height, 0)?;
        let blocks = blank.blocks();
        let end = base.blocks().min(span(height)).max(blocks);
        let tree = self.sweep(cut, |sweep| sweep.update.zero(blocks..end, &mut sweep.sink))?;
        let root = tree.name.unwrap_or(blank.root);
        let whole = size.next_multiple_of(u64::from(base.block_size));
        if whole == size {
            return self.held(Version { root, ..blank });
        }
        // Beyond its end the last block is zero, or growing again would bring back what was cut off.
        let (tidy, _) =
            self.patch(&Version { root, size: whole, ..*base }, &[ByteRange::new(size, whole)], &Zeros, 1)?;
        self.held(Version { root: tidy.root, ..blank })
    }

    /// Holds a version that something else holds now, so that it stays when that goes.
    pub(crate) fn held(&self, version: Version) -> Result<Version, Error> {
        self.store.acquire(&mut self.store.ledger(), version.root, version.height())?;
        self.hold(version.root, version.height());
        Ok(version)
    }

    /// `work` on `onto` instead of the version its writer found.
    pub(crate) fn rebase(&self, onto: &Version, work: &Work) -> Result<Version, Error> {
        let Work { base, ours, ranges, append } = work;
        if onto == base {
            return Ok(*ours);
        }
        if !append {
            let outside = ranges.iter().find(|range| range.end > onto.size);
            return match outside {
                Some(range) => Err(Error::OutOfRange { offset: range.start, len: range.len(), size: onto.size }),
                None => self.overlay(onto, base, ours, ranges),
            };
        }
        let added = ByteRange::new(base.size, ours.size);
        let grown = self.resized(onto, onto.size + added.len())?;
        if onto.size == base.size {
            return self.overlay(&grown, base, ours, &[added]);
        }
        let unit = u64::from(base.block_size);
        if onto.size.is_multiple_of(unit) && base.size.is_multiple_of(unit) {
            return self.move_blocks(&grown, ours, base.size / unit..ours.blocks(), onto.size / unit);
        }
        let source = Shifted { store: self.store, version: ours, from: base.size, to: onto.size };
        Ok(self.patch(&grown, &[ByteRange::at(onto.size, added.len())], &source, 1)?.0)
    }

    /// `onto` with the blocks `blocks` of `ours` from block `to` on, where it has zeros.
    fn move_blocks(&self, onto: &Version, ours: &Version, blocks: Range<u64>, to: u64) -> Result<Version, Error> {
        let first = blocks.start;
        let tree = self.sweep(tree_of(onto), |sweep| {
            let mut at = first;
            while at < blocks.end {
                let step = at..(at + 1024).min(blocks.end);
                at = step.end;
                for (number, name) in step.clone().zip(self.store.block_names(ours, step)?) {
                    if name.is_some() {
                        sweep.graft(Tree { name, height: 0 }, number - first + to)?;
                    }
                }
            }
            Ok(())
        })?;
        Ok(Version { root: tree.name.unwrap_or(Name::zero(tree.height)), ..*onto })
    }

    /// `onto` with the bytes `ranges` of `ours`, which was made of `base`.
    fn overlay(&self, onto: &Version, base: &Version, ours: &Version, ranges: &[ByteRange]) -> Result<Version, Error> {
        let mut whole: Vec<Range<u64>> = Vec::new();
        let mut contended: Vec<ByteRange> = Vec::new();
        for block_run in whole_blocks(onto, ranges) {
            for blocks in self.split(onto, base, ours, block_run, ranges, &mut contended)? {
                match whole.last_mut() {
                    Some(last) if last.end == blocks.start => last.end = blocks.end,
                    _ => whole.push(blocks),
                }
            }
        }
        let tree = self.sweep(tree_of(onto), |sweep| {
            whole.into_iter().try_for_each(|blocks| sweep.overlay(tree_of(ours), blocks))
        })?;
        let swept = Version { root: tree.name.unwrap_or(Name::zero(tree.height)), ..*onto };
        if contended.is_empty() {
            return Ok(swept);
        }
        let source = Shifted { store: self.store, version: ours, from: 0, to: 0 };
        Ok(self.patch(&swept, &contended, &source, 1)?.0)
    }

    /// Of the blocks that `ranges` touch: those to be taken whole. The parts of blocks that others changed as well go to
    /// `contended`.
    fn split(
        &self,
        onto: &Version,
        base: &Version,
        ours: &Version,
        run: ByteRange,
        ranges: &[ByteRange],
        contended: &mut Vec<ByteRange>,
    ) -> Result<Vec<Range<u64>>, Error> {
        let unit = u64::from(onto.block_size);
        let all = run.start / unit..run.end.div_ceil(unit);
        let mut out = Vec::from([all]);
        let first = ranges.partition_point(|range| range.end <= run.start);
        let inside = || ranges[first..].iter().take_while(|range| range.start < run.end);
        // Blocks in which a range starts or ends.
        let edges = inside().flat_map(|range| [range.start, range.end]).filter(|at| !at.is_multiple_of(unit));
        let mut partial: Vec<u64> = edges.map(|at| at / unit).collect();
        partial.dedup();
        for block in partial {
            let bytes = ByteRange::new(block * unit, ((block + 1) * unit).min(onto.size));
            let parts: Vec<ByteRange> = inside().filter_map(|range| range.intersect(&bytes)).collect();
            // What ours has beyond the end of a blob that was cut meanwhile must not come back.
            let covered = parts.iter().map(ByteRange::len).sum::<u64>() == bytes.len()
                && (bytes.end.is_multiple_of(unit) || ours.size <= bytes.end);
            if covered || self.block_of(onto, block)? == self.block_of(base, block)? {
                continue;
            }
            contended.extend(parts);
            let last = out.pop().expect("never without its last part");
            out.extend([last.start..block, block + 1..last.end]);
        }
        out.retain(|blocks| blocks.start < blocks.end);
        Ok(out)
    }

    /// The name of a block; `None` for a zero one and beyond the end.
    fn block_of(&self, version: &Version, block: u64) -> Result<Option<Name>, Error> {
        if block >= version.blocks() {
            return Ok(None);
        }
        Ok(self.store.block_names(version, block..block + 1)?[0])
    }
}

/// The runs of whole blocks that `ranges` touch, the last one cut to the size.
fn whole_blocks(base: &Version, ranges: &[ByteRange]) -> Vec<ByteRange> {
    let unit = u64::from(base.block_size);
    let mut out: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let start = range.start / unit * unit;
        let end = range.end.div_ceil(unit).saturating_mul(unit).min(base.size);
        match out.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => out.push(ByteRange::new(start, end)),
        }
    }
    out
}

/// Whole blocks of which `ranges` come from the source and the rest is as it was.
struct Merged<'a> {
    store: &'a Store,
    base: &'a Version,
    ranges: &'a [ByteRange],
    source: &'a dyn BlockSource,
}

impl BlockSource for Merged<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let keep = |from: u64, to: u64, buf: &mut [u8]| match from < to {
            true => {
                let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
                self.store.read_at(self.base, from, part).map(|_| ()).map_err(io::Error::other)
            }
            false => Ok(()),
        };
        let mut at = offset;
        let first = self.ranges.partition_point(|range| range.end <= offset);
        for range in self.ranges[first..].iter().take_while(|range| range.start < end) {
            let (from, to) = (range.start.max(offset), range.end.min(end));
            keep(at, from, buf)?;
            self.source.read(from, &mut buf[(from - offset) as usize..(to - offset) as usize])?;
            at = to;
        }
        keep(at, end, buf)
    }
}

/// The bytes of a version, which stand elsewhere now.
struct Shifted<'a> {
    store: &'a Store,
    version: &'a Version,
    from: u64,
    to: u64,
}

impl BlockSource for Shifted<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(self.version, offset - self.to + self.from, buf).map(|_| ()).map_err(io::Error::other)
    }
}

/// Zeros without end.
pub(crate) struct Zeros;

impl BlockSource for Zeros {
    fn read(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

/// Bytes in memory that stand at an offset.
pub(crate) struct Slice<'a> {
    pub(crate) at: u64,
    pub(crate) bytes: &'a [u8],
}

impl BlockSource for Slice<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = (offset - self.at) as usize;
        buf.copy_from_slice(self.bytes.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
