//! Laying blocks of a version down in the order in which they will be wanted.
//!
//! A template's offshoots touch pages that lie apart, in memory and so in packs: each brings its whole frame, and the
//! piece of the pack around it. [`Store::arrange`] writes the blocks that a plan names anew, in the order of the plan,
//! and before them the nodes on their paths: reading the plan is then a few large requests from one end to the other.
//!
//! It is what a compaction does, for another reason, and as safe. Copies are written into new packs, these are made
//! durable, and only then does this process look for the blocks there. Names are of content alone, so no version
//! notices; a crash in between leaves two good copies, of which the one in the newer pack counts for whoever opens
//! the store next. The old ones are garbage, given back as any other: by the next collection, in a shared store by those
//! that come when the grace period of their packs is over. The version is held by a reference meanwhile; nothing
//! else is locked, so commits, publications and collections go on. Where two nodes arrange the same, the copies of one
//! are garbage.
//!
//! **Whose order counts.** A block has one place, and may belong to many versions. An index says for which version its
//! pack was laid down (`laid_for`). Blocks that lie so for another version that some head still names are left where
//! they are: tearing them out would cost that one what this one gains, and templates with much in common have orders
//! with much in common. All others are moved, wherever they lie; also those that were laid down for this very version
//! before, so that its older packs have nothing of use any more and go as a whole.

use crate::catalog::Location;
use crate::engine::cached::{CHUNK_BYTES, RUN_BYTES};
use crate::error::Error;
use crate::frame::{self, FRAME_NODES, Kind};
use crate::name::{Name, Version};
use crate::pack::layout_tag;
use crate::store::Store;
use crate::transaction::{Appended, Transaction};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

/// Blocks looked up, read and written at a time: 4 MiB of pages.
const BATCH: usize = 1024;
/// A layout that fetches no more than this times the bytes asked for is good enough.
const GOOD_BYTES: f64 = 1.15;
/// And so many pieces beyond, and requests beyond what the bytes alone take.
const GOOD_PIECES: u64 = 2;
const GOOD_REQUESTS: u64 = 4;
/// Heads read at once.
const HEADS_AT_ONCE: usize = 8;

/// How to arrange.
#[derive(Default)]
pub struct ArrangeOptions<'a> {
    /// Also where the order in place is good.
    pub always: bool,
    /// Told after every few MiB: blocks done, and in all.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    /// Looked at all the time: stops it; everything is as it was then.
    pub cancel: Option<&'a AtomicBool>,
}

/// What reading some blocks takes for a reader that has nothing of them, through a cache of 64 KiB pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ReadCost {
    /// Compressed bytes of the blocks, and of the nodes on their paths, alone.
    pub bytes: u64,
    /// Bytes of the pieces of packs in which they lie.
    pub fetched_bytes: u64,
    /// Requests: neighbouring pieces come together, up to 1 MiB.
    pub requests: u64,
}

/// What came of an arrangement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Arranged {
    /// Blocks in the order, zero ones not counted.
    pub blocks: u64,
    /// Blocks moved.
    pub moved: u64,
    /// Blocks left where they lie in the order of another version.
    pub left: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// What reading them took before.
    pub before: ReadCost,
    /// What it takes now.
    pub after: ReadCost,
}

/// What an order asks for: names, each once, in the order in which they are to lie.
struct Wanted {
    /// From the root downward, each height in the order of first use.
    nodes: Vec<Name>,
    blocks: Vec<Name>,
}

/// An item in its new frame.
struct Move {
    name: Name,
    kind: Kind,
    from: Location,
    to: Location,
}

impl ReadCost {
    fn is_good(&self) -> bool {
        let piece = u64::from(CHUNK_BYTES);
        self.fetched_bytes as f64 <= self.bytes as f64 * GOOD_BYTES + (GOOD_PIECES * piece) as f64
            && self.requests <= self.bytes / RUN_BYTES as u64 * 2 + GOOD_REQUESTS
    }
}

impl Store {
    /// What reading `blocks` of `version` takes for a reader that has nothing of them.
    ///
    /// # Errors
    /// As [`Store::spans`].
    pub fn read_cost(&self, version: &Version, blocks: &[u64]) -> Result<ReadCost, Error> {
        let wanted = self.refreshed(|| self.wanted(version, blocks))?;
        Ok(self.cost_of(&wanted))
    }

    /// Lays the blocks of `version` that `order` names, by number and the most wanted first, down in new packs in this
    /// order, the nodes on their paths before them. Where the order in place is good nothing is written.
    ///
    /// # Errors
    /// A number lies outside the blob; the version is not there; something of it cannot be read; the medium is full or
    /// fails; the caller cancelled. Everything can be read then as before.
    pub fn arrange(&self, version: &Version, order: &[u64], options: &ArrangeOptions<'_>) -> Result<Arranged, Error> {
        self.writable("arrange a version")?;
        let tx = self.begin();
        tx.enrol()?;
        self.acquire(&mut self.ledger(), version.root, version.height())?;
        tx.hold(version.root, version.height());
        let wanted = self.refreshed(|| self.wanted(version, order))?;
        let before = self.cost_of(&wanted);
        let mut done = Arranged { blocks: wanted.blocks.len() as u64, before, after: before, ..Arranged::default() };
        if before.is_good() && !options.always {
            return Ok(done);
        }
        let tag = layout_tag(&version.root);
        let theirs = self.laid_for_others(&wanted, tag)?;
        let is_ours = |name: &&Name| self.catalog.find(name).is_some_and(|at| !theirs.contains(&at.pack));
        let nodes: Vec<Name> = wanted.nodes.iter().filter(is_ours).copied().collect();
        let blocks: Vec<Name> = wanted.blocks.iter().filter(is_ours).copied().collect();
        done.left = (wanted.blocks.len() - blocks.len()) as u64;
        let mut laying = Laying { tx: &tx, tag, moves: Vec::new(), appended: Vec::new() };
        let (mut so_far, all) = (0, (nodes.len() + blocks.len()) as u64);
        for (kind, names) in [(Kind::Nodes, &nodes), (Kind::Blocks, &blocks)] {
            for batch in names.chunks(BATCH) {
                if options.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
                    return Err(Error::Cancelled);
                }
                laying.lay(kind, batch)?;
                so_far += batch.len() as u64;
                if let Some(progress) = options.progress {
                    progress(so_far, all);
                }
            }
        }
        let Laying { moves, appended, .. } = laying;
        tx.seal()?;
        let ledger = self.ledger();
        let moved = moves.iter().filter(|m| self.catalog.relocate(&m.name, m.from, m.to));
        done.moved = moved.filter(|m| m.kind == Kind::Blocks).count() as u64;
        drop(appended);
        drop(ledger);
        done.written_bytes = tx.stored_bytes();
        done.after = self.cost_of(&wanted);
        Ok(done)
    }

    /// The names that an order asks for.
    fn wanted(&self, version: &Version, order: &[u64]) -> Result<Wanted, Error> {
        if let Some(block) = order.iter().find(|block| **block >= version.blocks()) {
            let size = u64::from(version.block_size);
            return Err(Error::OutOfRange { offset: block.saturating_mul(size), len: size, size: version.size });
        }
        let mut met: HashSet<Name> = HashSet::new();
        let mut nodes: BTreeMap<u8, Vec<Name>> = BTreeMap::new();
        let mut blocks = Vec::new();
        for batch in order.chunks(BATCH) {
            let names = self.scattered_names(version, batch, &mut |name, height| {
                if met.insert(name) {
                    nodes.entry(height).or_default().push(name);
                }
            })?;
            blocks.extend(names.into_iter().flatten().filter(|name| met.insert(*name)));
        }
        Ok(Wanted { nodes: nodes.into_values().rev().flatten().collect(), blocks })
    }

    fn cost_of(&self, wanted: &Wanted) -> ReadCost {
        let mut cost = ReadCost::default();
        let mut pieces: BTreeSet<(u32, u64)> = BTreeSet::new();
        let mut ends: HashMap<u32, u64> = HashMap::new();
        for name in wanted.nodes.iter().chain(&wanted.blocks) {
            let Some(at) = self.catalog.find(name) else { continue };
            let Some(pack) = self.catalog.pack(at.pack) else { continue };
            let Some(info) = pack.frame(at.frame).filter(|info| info.items > 0) else { continue };
            cost.bytes += u64::from(info.stored).div_ceil(u64::from(info.items));
            let (start, end) = (u64::from(info.offset), u64::from(info.offset) + u64::from(info.stored));
            let piece = u64::from(CHUNK_BYTES);
            pieces.extend((start / piece..=(end - 1) / piece).map(|number| (at.pack, number)));
            ends.entry(at.pack).or_insert_with(|| {
                pack.last_frame().map_or(end, |last| u64::from(last.offset) + u64::from(last.stored))
            });
        }
        let mut run: Option<((u32, u64), u64)> = None;
        for (pack, number) in pieces {
            let (start, piece) = (number * u64::from(CHUNK_BYTES), u64::from(CHUNK_BYTES));
            cost.fetched_bytes += piece.min(ends[&pack].saturating_sub(start));
            run = match run {
                Some((next, length)) if next == (pack, number) && length < RUN_BYTES as u64 / piece => {
                    Some(((pack, number + 1), length + 1))
                }
                _ => {
                    cost.requests += 1;
                    Some(((pack, number + 1), 1))
                }
            };
        }
        cost
    }

    /// The packs among those of `wanted` that are laid down for another version that some head names.
    fn laid_for_others(&self, wanted: &Wanted, own: u32) -> Result<HashSet<u32>, Error> {
        let at = wanted.nodes.iter().chain(&wanted.blocks).filter_map(|name| self.catalog.find(name));
        let packs: BTreeSet<u32> = at.map(|at| at.pack).collect();
        let tag = |pack: &u32| self.catalog.pack(*pack).map_or(0, |pack| pack.laid_for());
        let mut theirs: HashMap<u32, u32> = packs.iter().map(|pack| (*pack, tag(pack))).collect();
        theirs.retain(|_, tag| *tag != 0 && *tag != own);
        if theirs.is_empty() {
            return Ok(HashSet::new());
        }
        let threads = if self.engine.is_remote() { HEADS_AT_ONCE } else { 1 };
        let tags = crate::commit::in_parallel(threads, self.heads("")?, |head| {
            // What cannot be read has no say in an order.
            let found = self.head(&head).ok().flatten();
            Ok(found.map_or_else(Vec::new, |(manifest, _)| {
                manifest.versions.values().map(|version| layout_tag(&version.root)).collect()
            }))
        })?;
        let living: HashSet<u32> = tags.into_iter().flatten().collect();
        Ok(theirs.into_iter().filter(|(_, tag)| living.contains(tag)).map(|(pack, _)| pack).collect())
    }
}

/// What is laid down, and where it lay.
struct Laying<'a> {
    tx: &'a Transaction<'a>,
    tag: u32,
    moves: Vec<Move>,
    /// Kept until the entries point to the new frames, so that nobody takes those for dead.
    appended: Vec<Appended>,
}

impl Laying<'_> {
    /// Reads items together, wherever they lie, and appends them in order.
    fn lay(&mut self, kind: Kind, names: &[Name]) -> Result<(), Error> {
        let store = self.tx.store;
        let (word, per_frame) = match kind {
            Kind::Nodes => ("node", FRAME_NODES),
            Kind::Blocks => ("block", 0),
        };
        let from: Vec<Option<Location>> = names.iter().map(|name| store.catalog.find(name)).collect();
        let asked: Vec<Option<Name>> = names.iter().copied().map(Some).collect();
        let (items, _) = store.refreshed(|| store.items_of(word, &asked))?;
        let items = names.iter().zip(from).zip(items).filter_map(|((name, from), item)| Some((*name, from?, item?)));
        let items: Vec<_> = items.collect();
        let Some((_, _, first)) = items.first() else { return Ok(()) };
        let per_frame = per_frame.max(frame::blocks_per_frame(first.bytes().len() as u32));
        for gathered in items.chunks(per_frame) {
            let raw: Vec<u8> = gathered.iter().flat_map(|(_, _, item)| item.bytes().iter().copied()).collect();
            let names: Vec<Name> = gathered.iter().map(|(name, ..)| *name).collect();
            let encoded = frame::encode_tight(kind, &raw).map_err(|error| Error::io("compress", "a frame", error))?;
            let appended = self.tx.append(&encoded, &names)?;
            appended.lay_for(self.tag);
            let moves = gathered.iter().enumerate();
            self.moves.extend(moves.map(|(slot, (name, from, _))| Move {
                name: *name,
                kind,
                from: *from,
                to: appended.location(slot),
            }));
            self.appended.push(appended);
        }
        Ok(())
    }
}
