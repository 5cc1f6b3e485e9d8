//! Committing changes of one blob: read, hash, deduplicate, frame, pack, and make the new nodes of its tree.
//!
//! Changes stream through in ascending order, a batch of a few MiB at a time, so memory does not follow their
//! amount. Blocks for which an order is given are stored before that, in that order, and wait by name (48 bytes each)
//! for their turn in the tree. Within a batch reading, hashing and compressing run on as many threads as were asked for; the
//! decisions between them (what is new?) are made by one, under the ledger.

use crate::error::Error;
use crate::frame::{self, Encoded, Kind};
use crate::name::{Name, Version};
use crate::nodes::NodeSink;
use crate::read::tree_of;
use crate::store::Store;
use crate::transaction::Transaction;
use crate::tree::{Update, Updated};
use base::ByteRange;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of changed blocks handled at a time.
const BATCH_BYTES: usize = 4 << 20;
/// Bytes that one thread takes at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Where a commit reads changed bytes from: a file, a process's memory, a buffer.
pub trait BlockSource: Sync {
    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// Whatever the source says; the commit fails with it and stores nothing.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What changed in a blob since its base version.
pub struct Changes<'a> {
    /// Ranges to read from the source: whole blocks (the blob's end may cut the last), ascending, disjoint.
    pub written: &'a [ByteRange],
    /// Ranges that became zero: the same. Where both say so, `written` wins.
    pub zeroed: &'a [ByteRange],
    /// Where the bytes are.
    pub source: &'a dyn BlockSource,
    /// How many threads may work on it.
    pub threads: usize,
    /// Told after each batch: bytes of `written` done, and in all.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    /// Looked at before each batch: stops the commit.
    pub cancel: Option<&'a AtomicBool>,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitStat {
    /// Blocks in `written`.
    pub blocks: u64,
    /// Of these: zero.
    pub zero: u64,
    /// The same as in the base version.
    pub unchanged: u64,
    /// Stored already, or met before in this commit.
    pub duplicate: u64,
    /// Stored now.
    pub stored: u64,
    /// Bytes that this commit's frames take in packs, those of tree nodes included.
    pub stored_bytes: u64,
}

/// More blocks than this are not laid down in an order that is given, so that what waits takes 48 MiB at most.
const ORDERED_MAX: usize = 1 << 20;

/// A run of blocks to change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    blocks: Range<u64>,
    written: bool,
}

impl Transaction<'_> {
    /// Makes the version that `base` becomes by `changes`. It can be read at once by this process, and is safe
    /// from the collector while the transaction lives; it lasts only when published.
    ///
    /// # Errors
    /// The base is unknown; the ranges are no whole ascending blocks; the source fails; the medium is full or
    /// fails; the caller cancelled. Nothing is kept then.
    pub fn commit(&self, base: &Version, changes: &Changes<'_>) -> Result<(Version, CommitStat), Error> {
        self.commit_in_order(base, changes, &[])
    }

    /// As [`Transaction::commit`], with new blocks laid down in `order`: numbers of blocks, those first that are likely to
    /// be read first; up to a million of them count. Written blocks that it does not name follow, ascending. Numbers
    /// that are not written, or come twice, mean nothing.
    ///
    /// # Errors
    /// As [`Transaction::commit`].
    pub fn commit_in_order(
        &self,
        base: &Version,
        changes: &Changes<'_>,
        order: &[u64],
    ) -> Result<(Version, CommitStat), Error> {
        let store = self.store;
        store.writable("commit")?;
        self.enrol()?;
        let steps = plan(base, changes)?;
        // Holds the base while its unchanged subtrees are taken over.
        store.acquire(&mut store.ledger(), base.root, base.height())?;
        let done = Job::new(self, base, changes).and_then(|mut job| match job.run(&steps, order) {
            Ok(updated) => Ok((updated, job.stat)),
            Err(error) => {
                job.abandon();
                Err(error)
            }
        });
        if !matches!(done, Ok((Updated { changed: false, root: Some(_) }, _))) {
            store.release(&mut store.ledger(), base.root, base.height());
        }
        let (updated, stat) = done?;
        let version = Version { root: updated.root.unwrap_or(Name::zero(base.height())), ..*base };
        // A reference on the new root came with it; that on an unchanged one was taken above.
        self.hold(version.root, version.height());
        self.note_made(base.root, version.root);
        store.counters.duplicates.fetch_add(stat.duplicate, Ordering::Relaxed);
        Ok((version, stat))
    }
}

/// What is to become of a block.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Unchanged,
    Zero,
    /// Stored before: a reference was taken.
    Known(Name),
    /// Stored by this batch, as the new block of this number.
    New(usize),
}

/// A block to store.
struct New {
    name: Name,
    /// Where it is in the batch.
    at: usize,
    /// How often the batch has it.
    uses: u32,
    /// It is in a pack, and has its references.
    entered: bool,
}

/// What goes into the tree between the blocks of a batch.
enum Between {
    /// These become zero.
    Zero(Range<u64>),
    /// This one was stored before its turn.
    Ahead(u64, Laid),
}

/// What became of a block that was handled before its turn.
#[derive(Clone, Copy)]
enum Laid {
    Unchanged,
    Zero,
    /// It is in a pack, and a reference on it waits to be passed on.
    Stored(Name),
}

/// One batch of written blocks.
#[derive(Default)]
struct Batch {
    numbers: Vec<u64>,
    data: Vec<u8>,
    fates: Vec<Fate>,
    new: Vec<New>,
    /// Each before the block at this place in the batch.
    between: VecDeque<(usize, Between)>,
    /// Blocks whose references passed on to the tree.
    passed: usize,
}

struct Job<'a> {
    tx: &'a Transaction<'a>,
    store: &'a Store,
    base: &'a Version,
    changes: &'a Changes<'a>,
    update: Update<'a, Store>,
    sink: NodeSink<'a>,
    batch: Batch,
    /// Blocks stored before their turn, ascending, from the next one on.
    ahead: VecDeque<(u64, Laid)>,
    done: u64,
    total: u64,
    stat: CommitStat,
}

impl<'a> Job<'a> {
    fn new(tx: &'a Transaction<'a>, base: &'a Version, changes: &'a Changes<'a>) -> Result<Self, Error> {
        Ok(Self {
            tx,
            store: tx.store,
            base,
            changes,
            update: Update::new(tx.store, tree_of(base))?,
            sink: NodeSink::new(tx),
            batch: Batch::default(),
            ahead: VecDeque::new(),
            done: 0,
            total: changes.written.iter().map(ByteRange::len).sum(),
            stat: CommitStat::default(),
        })
    }

    fn block_size(&self) -> usize {
        self.base.block_size as usize
    }

    /// Applies the steps. On failure the caller abandons the job.
    fn run(&mut self, steps: &[Step], order: &[u64]) -> Result<Updated, Error> {
        let batch_blocks = (BATCH_BYTES * self.changes.threads.clamp(1, 4) / self.block_size()).max(1);
        self.store_ahead(steps, order, batch_blocks)?;
        for step in steps {
            if !step.written {
                self.batch.between.push_back((self.batch.numbers.len(), Between::Zero(step.blocks.clone())));
                continue;
            }
            let mut at = step.blocks.start;
            while at < step.blocks.end {
                if self.ahead.front().is_some_and(|(number, _)| *number == at)
                    && let Some((number, laid)) = self.ahead.pop_front()
                {
                    self.batch.between.push_back((self.batch.numbers.len(), Between::Ahead(number, laid)));
                    at += 1;
                    continue;
                }
                let room = (batch_blocks - self.batch.numbers.len()) as u64;
                let next = self.ahead.front().map_or(u64::MAX, |(number, _)| *number);
                let end = step.blocks.end.min(at + room).min(next);
                self.batch.numbers.extend(at..end);
                at = end;
                if self.batch.numbers.len() == batch_blocks {
                    self.flush_batch()?;
                }
            }
        }
        self.flush_batch()?;
        let updated = self.update.finish(&mut self.sink)?;
        if let Err(error) = self.sink.flush() {
            // The path is closed, so the reference on the root is no longer the update's to give back.
            let held = updated.root.filter(|_| updated.changed).map(|root| (root, self.base.height()));
            self.sink.abandon(held.into_iter().collect());
            return Err(error);
        }
        self.stat.stored_bytes += self.sink.stored_bytes;
        Ok(updated)
    }

    /// Stores the written blocks that `order` names, in this order; they go into the tree when their turn comes.
    fn store_ahead(&mut self, steps: &[Step], order: &[u64], batch_blocks: usize) -> Result<(), Error> {
        let is_written = |block: &u64| {
            let at = steps.partition_point(|step| step.blocks.end <= *block);
            steps.get(at).is_some_and(|step| step.written && step.blocks.contains(block))
        };
        let mut met: HashSet<u64> = HashSet::new();
        let order = order.iter().copied().filter(is_written).filter(|block| met.insert(*block));
        let order: Vec<u64> = order.take(ORDERED_MAX).collect();
        drop(met);
        for blocks in order.chunks(batch_blocks) {
            self.batch.numbers.extend_from_slice(blocks);
            self.store_batch()?;
            for (number, fate) in self.batch.numbers.iter().zip(&self.batch.fates) {
                let laid = match fate {
                    Fate::Unchanged => Laid::Unchanged,
                    Fate::Zero => Laid::Zero,
                    Fate::Known(name) => Laid::Stored(*name),
                    Fate::New(new) => Laid::Stored(self.batch.new[*new].name),
                };
                self.ahead.push_back((*number, laid));
            }
            self.batch.passed = blocks.len();
            self.next_batch();
        }
        self.ahead.make_contiguous().sort_unstable_by_key(|(number, _)| *number);
        Ok(())
    }

    fn flush_batch(&mut self) -> Result<(), Error> {
        self.store_batch()?;
        self.pass_on()?;
        self.next_batch();
        Ok(())
    }

    /// Brings the blocks of the batch into packs, each with its references.
    fn store_batch(&mut self) -> Result<(), Error> {
        if self.changes.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        let hashed = self.read_and_hash()?;
        self.decide(&hashed)?;
        self.store_new()
    }

    fn next_batch(&mut self) {
        let blocks = self.batch.numbers.len() as u64;
        self.stat.blocks += blocks;
        self.done = (self.done + blocks * self.block_size() as u64).min(self.total);
        self.batch = Batch { data: std::mem::take(&mut self.batch.data), ..Batch::default() };
        if let Some(progress) = self.changes.progress {
            progress(self.done, self.total);
        }
    }

    /// Fills the batch from the source. `None` for zero blocks.
    fn read_and_hash(&mut self) -> Result<Vec<Option<Name>>, Error> {
        let size = self.block_size();
        let (blob_size, source, keys) = (self.base.size, self.changes.source, &self.store.keys);
        self.batch.data.resize(self.batch.numbers.len() * size, 0);
        let chunk = (CHUNK_BYTES / size).max(1);
        let chunks: Vec<_> = self.batch.numbers.chunks(chunk).zip(self.batch.data.chunks_mut(chunk * size)).collect();
        let hashed = in_parallel(self.changes.threads, chunks, |(numbers, data)| {
            read_runs(source, blob_size, size, numbers, data)?;
            let name = |block: &[u8]| (!is_zero(block)).then(|| keys.block(block));
            Ok(data.chunks_exact(size).map(name).collect::<Vec<_>>())
        })?;
        Ok(hashed.into_iter().flatten().collect())
    }

    /// Decides what becomes of each block, and takes a reference on those that are stored already.
    fn decide(&mut self, hashed: &[Option<Name>]) -> Result<(), Error> {
        let base_names = self.base_names()?;
        let mut seen: HashMap<Name, usize> = HashMap::new();
        let _ledger = self.store.ledger();
        let Batch { fates, new, .. } = &mut self.batch;
        for (at, (name, base)) in hashed.iter().zip(&base_names).enumerate() {
            fates.push(match name {
                None => {
                    self.stat.zero += 1;
                    Fate::Zero
                }
                Some(_) if name == base => {
                    self.stat.unchanged += 1;
                    Fate::Unchanged
                }
                Some(name) => match seen.get(name) {
                    Some(&number) => {
                        self.stat.duplicate += 1;
                        new[number].uses += 1;
                        Fate::New(number)
                    }
                    None if self.store.take_known(name).is_some() => {
                        self.stat.duplicate += 1;
                        Fate::Known(*name)
                    }
                    None => {
                        self.stat.stored += 1;
                        seen.insert(*name, new.len());
                        new.push(New { name: *name, at, uses: 1, entered: false });
                        Fate::New(new.len() - 1)
                    }
                },
            });
        }
        Ok(())
    }

    /// The names that the blocks of the batch have in the base.
    fn base_names(&self) -> Result<Vec<Option<Name>>, Error> {
        let mut names = Vec::with_capacity(self.batch.numbers.len());
        for run in self.batch.numbers.chunk_by(|a, b| a + 1 == *b) {
            names.extend(self.store.block_names(self.base, run[0]..run[0] + run.len() as u64)?);
        }
        Ok(names)
    }

    /// Compresses the new blocks into frames, appends these to the pack, and enters the blocks.
    fn store_new(&mut self) -> Result<(), Error> {
        let size = self.block_size();
        let per_frame = frame::blocks_per_frame(self.base.block_size);
        let Batch { data, new, .. } = &mut self.batch;
        let frames: Vec<&[New]> = new.chunks(per_frame).collect();
        let encoded: Vec<Encoded> = in_parallel(self.changes.threads, frames, |blocks| {
            let mut raw = Vec::with_capacity(blocks.len() * size);
            blocks.iter().for_each(|block| raw.extend_from_slice(&data[block.at * size..][..size]));
            frame::encode(Kind::Blocks, &raw).map_err(|error| Error::io("compress", "a frame of blocks", error))
        })?;
        for (blocks, encoded) in new.chunks_mut(per_frame).zip(encoded) {
            let names: Vec<Name> = blocks.iter().map(|block| block.name).collect();
            let appended = self.tx.append(&encoded, &names)?;
            self.stat.stored_bytes += encoded.stored.len() as u64;
            let mut ledger = self.store.ledger();
            for (slot, block) in blocks.iter_mut().enumerate() {
                self.store.enter(&mut ledger, block.name, appended.location(slot), block.uses);
                block.entered = true;
            }
        }
        Ok(())
    }

    /// Puts the blocks into the tree, with their references.
    fn pass_on(&mut self) -> Result<(), Error> {
        loop {
            let at = self.batch.passed;
            while self.batch.between.front().is_some_and(|(before, _)| *before <= at) {
                let (zeroed, stored) = match &self.batch.between[0].1 {
                    Between::Zero(range) => (Some(range.clone()), None),
                    Between::Ahead(number, Laid::Zero) => (Some(*number..number + 1), None),
                    Between::Ahead(_, Laid::Unchanged) => (None, None),
                    Between::Ahead(number, Laid::Stored(name)) => (None, Some((*number, *name))),
                };
                if let Some(range) = zeroed {
                    self.update.zero(range, &mut self.sink)?;
                }
                if let Some((number, name)) = stored {
                    self.put_in_tree(number, name)?;
                }
                self.batch.between.pop_front();
            }
            let Some(&fate) = self.batch.fates.get(at) else { return Ok(()) };
            let number = self.batch.numbers[at];
            let name = match fate {
                Fate::Unchanged => None,
                Fate::Zero => {
                    self.update.zero(number..number + 1, &mut self.sink)?;
                    None
                }
                Fate::Known(name) => Some(name),
                Fate::New(new) => Some(self.batch.new[new].name),
            };
            if let Some(name) = name {
                self.put_in_tree(number, name)?;
            }
            self.batch.passed += 1;
        }
    }

    /// The block's reference passes to the tree.
    fn put_in_tree(&mut self, number: u64, name: Name) -> Result<(), Error> {
        let taken = self.update.set(number, name, &mut self.sink)?;
        assert!(taken, "a block that has this name already was found unchanged before");
        Ok(())
    }

    /// Gives back every reference taken so far.
    fn abandon(&mut self) {
        self.sink.abandon(self.update.abandon());
        let mut ledger = self.store.ledger();
        let between = self.batch.between.drain(..).filter_map(|(_, between)| match between {
            Between::Ahead(_, laid) => Some(laid),
            Between::Zero(_) => None,
        });
        for laid in between.chain(self.ahead.drain(..).map(|(_, laid)| laid)) {
            if let Laid::Stored(name) = laid {
                self.store.release(&mut ledger, name, 0);
            }
        }
        for fate in &self.batch.fates[self.batch.passed..] {
            match fate {
                Fate::Known(name) => self.store.release(&mut ledger, *name, 0),
                Fate::New(new) if self.batch.new[*new].entered => {
                    self.store.release(&mut ledger, self.batch.new[*new].name, 0);
                }
                _ => {}
            }
        }
    }
}

/// Merges what was written and what was zeroed into one ascending list of blocks, where written wins.
fn plan(base: &Version, changes: &Changes<'_>) -> Result<Vec<Step>, Error> {
    let written = to_blocks("written", base, changes.written)?;
    let zeroed = to_blocks("zeroed", base, changes.zeroed)?;
    let mut steps: Vec<Step> = Vec::with_capacity(written.len() + zeroed.len());
    let mut next_written = written.iter().peekable();
    for zero in zeroed {
        let mut at = zero.start;
        while at < zero.end {
            // Written ranges that end before this point were taken, or lie before the zeroed one.
            match next_written.next_if(|w| w.start < zero.end) {
                Some(w) => {
                    if at < w.start {
                        steps.push(Step { blocks: at..w.start, written: false });
                    }
                    steps.push(Step { blocks: w.clone(), written: true });
                    at = at.max(w.end);
                }
                None => {
                    steps.push(Step { blocks: at..zero.end, written: false });
                    at = zero.end;
                }
            }
        }
    }
    steps.extend(next_written.map(|w| Step { blocks: w.clone(), written: true }));
    // A written range may reach over the start of the next zeroed one.
    let mut end = 0;
    for step in &mut steps {
        step.blocks.start = step.blocks.start.max(end);
        end = end.max(step.blocks.end);
    }
    steps.retain(|step| step.blocks.start < step.blocks.end);
    Ok(steps)
}

fn to_blocks(what: &str, base: &Version, ranges: &[ByteRange]) -> Result<Vec<Range<u64>>, Error> {
    let size = u64::from(base.block_size);
    let mut next = 0;
    let mut out = Vec::with_capacity(ranges.len());
    for range in ranges {
        let whole = range.start.is_multiple_of(size) && (range.end.is_multiple_of(size) || range.end == base.size);
        if !whole || range.start < next || range.is_empty() || range.end > base.size {
            return Err(Error::Invalid(format!(
                "the {what} range {:#x}..{:#x} must be whole blocks of {size} bytes within {:#x}, after those before it",
                range.start, range.end, base.size
            )));
        }
        next = range.end;
        out.push(range.start / size..range.end.div_ceil(size));
    }
    Ok(out)
}

/// Reads the blocks `numbers` into `data`, neighbours at once; beyond the blob's end is zero.
fn read_runs(
    source: &dyn BlockSource,
    blob_size: u64,
    size: usize,
    numbers: &[u64],
    mut data: &mut [u8],
) -> Result<(), Error> {
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        let (into, rest) = std::mem::take(&mut data).split_at_mut(run.len() * size);
        data = rest;
        let offset = run[0] * size as u64;
        let (inside, beyond) = into.split_at_mut(into.len().min((blob_size - offset) as usize));
        source.read(offset, inside).map_err(|source| Error::Source { offset, source })?;
        beyond.fill(0);
    }
    Ok(())
}

/// Whether a block holds zeros only.
fn is_zero(block: &[u8]) -> bool {
    // Most blocks that are not zero show it at once; the rest is compared in steps that vectorize.
    block.first() == Some(&0) && block.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Runs `work` on every task with up to `threads` threads; the results in order, or the first error met.
pub(crate) fn in_parallel<T: Send, R: Send>(
    threads: usize,
    tasks: Vec<T>,
    work: impl Fn(T) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let threads = threads.min(tasks.len());
    if threads <= 1 {
        return tasks.into_iter().map(work).collect();
    }
    let count = tasks.len();
    let queue = Mutex::new(tasks.into_iter().enumerate());
    let results: Mutex<Vec<Option<Result<R, Error>>>> = Mutex::new((0..count).map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((at, task)) = queue.lock().expect("no panic while the queue is locked").next() else {
                        return;
                    };
                    let result = work(task);
                    results.lock().expect("no panic while results are locked")[at] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().expect("all threads ended");
    results.into_iter().map(|result| result.expect("every task was taken")).collect()
}

#[cfg(test)]
mod tests;
