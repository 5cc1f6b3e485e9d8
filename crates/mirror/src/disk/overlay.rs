//! Overlays and views: how a disk is put together from layers, and what reads, writes and marks do to it.
//!
//! A write holds the stack for as long as it touches the top layer, so a mark falls before it or behind it, never
//! into it. A read takes a reference to the stack and lets go: what it finds in a layer sealed meanwhile is what
//! the new stack shows as well.

use super::layer::{Hold, Layer, is_direct};
use super::states::State;
use crate::foresight::disk::{Reads, blocks_of};
use crate::resolve::{VersionError, Versions};
use base::ByteRange;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use thiserror::Error;

/// Blocks are zeroed in steps of this many bytes, so that a discard of a whole disk lets others in.
const ZERO_STEP: u64 = 64 << 20;

/// What lies below a layer.
#[derive(Clone)]
pub(crate) enum Lower {
    /// Zeros.
    Zero,
    /// A version of the store.
    Version(Arc<str>),
    /// A frozen state of this or another disk.
    View(Arc<View>),
}

/// A frozen state of a disk.
pub(crate) struct View {
    pub(crate) id: u64,
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    pub(crate) layer: Arc<Layer>,
    /// What the layer lacks: what lay below when it was frozen, or its own version once committed.
    lower: RwLock<Lower>,
    pub(crate) committed: AtomicBool,
    /// Counts changes of the description; see `Overlay::changed`.
    pub(crate) changed: AtomicU64,
    pub(crate) durable: Mutex<u64>,
}

/// What an overlay shows.
pub(crate) struct Stack {
    pub(crate) top: Arc<Layer>,
    pub(crate) lower: Lower,
}

/// A writable disk.
pub(crate) struct Overlay {
    pub(crate) id: u64,
    pub(crate) vm: String,
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    stack: RwLock<Arc<Stack>>,
    /// One flush at a time, so that an older description never replaces a newer one. Holds the change that the
    /// durable description shows.
    pub(crate) flushing: Mutex<u64>,
    /// Counts changes of the description.
    pub(crate) changed: AtomicU64,
    /// Which blocks of what it stands on were read.
    pub(crate) reads: Reads,
}

/// What a read cost.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Bytes read from the store's versions.
    pub(crate) fetched_bytes: u64,
    /// Compressed bytes the store read for them.
    pub(crate) store_bytes: u64,
}

/// Why a disk cannot serve.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    /// The store cannot.
    #[error("the store cannot serve it")]
    Version(#[from] VersionError),
    /// The layers cannot.
    #[error("the local layer failed")]
    Local(#[from] io::Error),
}

impl DiskError {
    /// What happened to disk `id`, for people.
    pub(crate) fn describe(&self, id: u64) -> String {
        match self {
            Self::Version(e) => format!("disk {id:016x}: {e}"),
            Self::Local(e) => format!("disk {id:016x}: its local layer failed: {e}"),
        }
    }
}

impl View {
    /// A view of `layer` above `lower`.
    pub(crate) fn new(id: u64, size: u64, block_size: u64, layer: Arc<Layer>, lower: Lower, committed: bool) -> Self {
        Self {
            id,
            size,
            block_size,
            layer,
            lower: RwLock::new(lower),
            committed: AtomicBool::new(committed),
            changed: AtomicU64::new(1),
            durable: Mutex::new(0),
        }
    }

    /// What its layer lacks is read from here.
    pub(crate) fn lower(&self) -> Lower {
        self.lower.read().expect("no writer panics").clone()
    }

    /// From now on what the layer lacks comes from its own committed version.
    pub(crate) fn commit(&self, version: Arc<str>) {
        *self.lower.write().expect("no writer panics") = Lower::Version(version);
        self.committed.store(true, Ordering::Release);
        self.changed.fetch_add(1, Ordering::AcqRel);
    }
}

impl Overlay {
    /// An overlay with `top` above `lower`.
    pub(crate) fn new(id: u64, vm: String, size: u64, block_size: u64, top: Arc<Layer>, lower: Lower) -> Self {
        Self {
            id,
            vm,
            size,
            block_size,
            stack: RwLock::new(Arc::new(Stack { top, lower })),
            flushing: Mutex::new(0),
            changed: AtomicU64::new(1),
            reads: Reads::default(),
        }
    }

    /// Notes what a read of these bytes finds below the top, while somebody wants to know.
    fn note(&self, stack: &Stack, bytes: ByteRange) {
        if !self.reads.is_on() {
            return;
        }
        let blocks = blocks_of(bytes, self.block_size);
        let mut at = blocks.start;
        while at < blocks.end {
            let (state, end) = stack.top.run(at, blocks.end);
            if state == State::Absent {
                self.reads.note(at..end);
            }
            at = end;
        }
    }

    /// What it shows now.
    pub(crate) fn stack(&self) -> Arc<Stack> {
        self.stack.read().expect("no writer panics").clone()
    }

    /// What it shows now, and the number of the change that made it so.
    pub(crate) fn stack_and_change(&self) -> (Arc<Stack>, u64) {
        let stack = self.stack.read().expect("no writer panics");
        (stack.clone(), self.changed.load(Ordering::Acquire))
    }

    /// Puts another stack in place, once no write is in flight. `settle` sees the old one and makes the new one; if
    /// it fails nothing has changed.
    pub(crate) fn replace_stack<E>(&self, settle: impl FnOnce(&Stack) -> Result<Stack, E>) -> Result<(), E> {
        let mut stack = self.stack.write().expect("no writer panics");
        *stack = Arc::new(settle(&stack)?);
        self.changed.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Reads `buf` from `offset`; the caller keeps within the size. Keeps in the top layer what came from the store.
    pub(crate) fn read(&self, versions: &dyn Versions, offset: u64, buf: &mut [u8]) -> Result<Tally, DiskError> {
        assert!(offset + buf.len() as u64 <= self.size, "read of {} at {offset} of {}", buf.len(), self.size);
        let mut tally = Tally::default();
        if buf.is_empty() {
            return Ok(tally);
        }
        let stack = self.stack();
        let (size, end) = (self.block_size, offset + buf.len() as u64);
        self.note(&stack, ByteRange::new(offset, end));
        let blocks = offset / size..end.div_ceil(size);
        if blocks.start * size == offset && blocks.end * size == end {
            read_stack(&stack, size, versions, blocks, buf, &mut tally)?;
            return Ok(tally);
        }
        let mut at = blocks.start;
        while at < blocks.end {
            let (state, run_end) = stack.top.run(at, blocks.end);
            let bytes = ByteRange::new((at * size).max(offset), (run_end * size).min(end));
            let out = &mut buf[(bytes.start - offset) as usize..(bytes.end - offset) as usize];
            match state {
                State::Clean | State::Dirty => stack.top.read_data(bytes.start, out)?,
                State::DirtyZero | State::CleanZero => out.fill(0),
                State::Absent => {
                    let mut whole = vec![0; ((run_end - at) * size) as usize];
                    read_stack(&stack, size, versions, at..run_end, &mut whole, &mut tally)?;
                    let skip = (bytes.start - at * size) as usize;
                    out.copy_from_slice(&whole[skip..skip + out.len()]);
                }
            }
            at = run_end;
        }
        Ok(tally)
    }

    /// Writes `data` at `offset`; the caller keeps within the size.
    pub(crate) fn write(&self, versions: &dyn Versions, offset: u64, data: &[u8]) -> Result<Tally, DiskError> {
        assert!(offset + data.len() as u64 <= self.size, "write of {} at {offset} of {}", data.len(), self.size);
        let mut tally = Tally::default();
        let size = self.block_size;
        let mut at = 0;
        while at < data.len() {
            let position = offset + at as u64;
            let (block, within) = (position / size, position % size);
            let left = data.len() - at;
            if within == 0 && left as u64 >= size {
                let whole = left - left % size as usize;
                let blocks = block..block + whole as u64 / size;
                self.with_top(blocks, |hold| hold.write_blocks(block, &data[at..at + whole]))?;
                at += whole;
            } else {
                let part = left.min((size - within) as usize);
                self.write_part(versions, block, within, &data[at..at + part], &mut tally)?;
                at += part;
            }
        }
        Ok(tally)
    }

    /// Reads `buf` from `offset` where nobody has to be waited for, neither a disk nor the store; false: somebody
    /// would have to be, and `buf` holds anything.
    pub(crate) fn read_now(&self, offset: u64, buf: &mut [u8]) -> bool {
        assert!(offset + buf.len() as u64 <= self.size, "read of {} at {offset} of {}", buf.len(), self.size);
        let stack = self.stack();
        // Where this does not do, it is read again, and noted already.
        self.note(&stack, ByteRange::at(offset, buf.len() as u64));
        read_now(&stack.top, &stack.lower, self.block_size, offset, buf)
    }

    /// The layer that holds all of these bytes as data, at the same offset, where that is the top and they can be read
    /// past the page cache.
    pub(crate) fn holds_directly(&self, offset: u64, len: u64) -> Option<Arc<Layer>> {
        if !is_direct(offset, len) {
            return None;
        }
        let stack = self.stack();
        stack.top.direct()?;
        let (mut at, end) = (offset / self.block_size, (offset + len).div_ceil(self.block_size));
        while at < end {
            let (state, run_end) = stack.top.run(at, end);
            if !matches!(state, State::Clean | State::Dirty) {
                return None;
            }
            at = run_end;
        }
        Some(stack.top.clone())
    }

    /// Whether a write of these bytes asks the store for nothing: its first and last block are whole or are here.
    pub(crate) fn writes_locally(&self, offset: u64, len: u64) -> bool {
        let (size, end) = (self.block_size, offset + len);
        let stack = self.stack();
        let here = |block: u64| stack.top.run(block, block + 1).0 != State::Absent;
        (offset.is_multiple_of(size) || here(offset / size)) && (end.is_multiple_of(size) || here(end / size))
    }

    /// Gives back the space of the whole blocks among `len` bytes from `offset`, which are zero from then on.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        assert!(offset + len <= self.size, "discarding {len} at {offset} of {}", self.size);
        let end = offset + len;
        let last = if end == self.size { end.div_ceil(self.block_size) } else { end / self.block_size };
        Ok(self.zero_whole(offset.div_ceil(self.block_size)..last, false)?)
    }

    /// Zeroes whole blocks, in steps.
    fn zero_whole(&self, blocks: Range<u64>, keep_space: bool) -> io::Result<()> {
        let mut at = blocks.start;
        while at < blocks.end {
            let step = at..blocks.end.min(at + (ZERO_STEP / self.block_size).max(1));
            at = step.end;
            self.with_top(step.clone(), |hold| hold.zero_blocks(step, keep_space))?;
        }
        Ok(())
    }

    /// Zeroes `len` bytes from `offset`. Whole blocks give their space back, or with `keep_space` keep it.
    pub(crate) fn zero(
        &self,
        versions: &dyn Versions,
        offset: u64,
        len: u64,
        keep_space: bool,
    ) -> Result<(), DiskError> {
        assert!(offset + len <= self.size, "zeroing {len} at {offset} of {}", self.size);
        let (size, end) = (self.block_size, offset + len);
        let first = offset.div_ceil(size);
        // A last block that the disk's end cuts short is whole.
        let last = if end == self.size { end.div_ceil(size) } else { end / size };
        if first > last {
            return self.write(versions, offset, &vec![0; len as usize]).map(drop);
        }
        let head = (first * size - offset).min(len);
        self.write(versions, offset, &vec![0; head as usize])?;
        self.zero_whole(first..last, keep_space)?;
        let tail = end.saturating_sub(last * size);
        self.write(versions, end - tail, &vec![0; tail as usize]).map(drop)
    }

    /// Runs `change` on the top layer with `blocks` held; no mark falls in between.
    fn with_top<T>(&self, blocks: Range<u64>, change: impl FnOnce(&Hold<'_>) -> io::Result<T>) -> io::Result<T> {
        let stack = self.stack.read().expect("no writer panics");
        change(&stack.top.hold(blocks))
    }

    /// Writes a part of one block; what surrounds it comes from below where the layer has nothing.
    fn write_part(
        &self,
        versions: &dyn Versions,
        block: u64,
        within: u64,
        data: &[u8],
        tally: &mut Tally,
    ) -> Result<(), DiskError> {
        let mut below: Option<(Arc<Layer>, Vec<u8>)> = None;
        loop {
            {
                let stack = self.stack.read().expect("no writer panics");
                let hold = stack.top.hold(block..block + 1);
                match (stack.top.run(block, block + 1).0, &mut below) {
                    (State::Clean | State::Dirty, _) => return Ok(hold.write_within(block, within, data)?),
                    (State::DirtyZero | State::CleanZero, _) => {
                        let mut whole = vec![0; self.block_size as usize];
                        whole[within as usize..within as usize + data.len()].copy_from_slice(data);
                        return Ok(hold.write_blocks(block, &whole)?);
                    }
                    (State::Absent, Some((layer, whole))) if Arc::ptr_eq(layer, &stack.top) => {
                        whole[within as usize..within as usize + data.len()].copy_from_slice(data);
                        return Ok(hold.write_blocks(block, whole)?);
                    }
                    (State::Absent, _) => {}
                }
            }
            // Nothing is held while the store is asked: it may take long.
            let stack = self.stack();
            let mut whole = vec![0; self.block_size as usize];
            if self.reads.is_on() {
                self.reads.note(block..block + 1);
            }
            read_lower(&stack.lower, self.block_size, versions, block..block + 1, &mut whole, tally, &mut Vec::new())?;
            below = Some((stack.top.clone(), whole));
        }
    }
}

/// See [`Overlay::read_now`].
fn read_now(layer: &Layer, lower: &Lower, size: u64, offset: u64, buf: &mut [u8]) -> bool {
    let end = offset + buf.len() as u64;
    let mut at = offset;
    while at < end {
        let (state, run_end) = layer.run(at / size, end.div_ceil(size));
        let run_end = (run_end * size).min(end);
        let out = &mut buf[(at - offset) as usize..(run_end - offset) as usize];
        let here = match (state, lower) {
            (State::Clean | State::Dirty, _) => layer.read_data_now(at, out),
            (State::DirtyZero | State::CleanZero, _) | (State::Absent, Lower::Zero) => {
                out.fill(0);
                true
            }
            (State::Absent, Lower::View(view)) => read_now(&view.layer, &view.lower(), size, at, out),
            (State::Absent, Lower::Version(_)) => false,
        };
        if !here {
            return false;
        }
        at = run_end;
    }
    true
}

/// Reads whole blocks as the stack shows them, and keeps in its top what came from the store.
fn read_stack(
    stack: &Stack,
    size: u64,
    versions: &dyn Versions,
    blocks: Range<u64>,
    buf: &mut [u8],
    tally: &mut Tally,
) -> Result<(), DiskError> {
    let mut fetched = Vec::new();
    read_layered(&stack.top, &stack.lower, size, versions, blocks.clone(), buf, tally, &mut fetched)?;
    for run in fetched {
        let bytes = &buf[((run.start - blocks.start) * size) as usize..((run.end - blocks.start) * size) as usize];
        // A full disk costs the copy, not the read.
        if let Err(e) = stack.top.hold(run.clone()).keep(run.start, bytes) {
            log::debug!("layer {:016x}: blocks {run:?} fetched but not kept: {e}", stack.top.id());
        }
    }
    Ok(())
}

/// Reads whole blocks from `layer`, and what it lacks from `lower`. Adds to `fetched` the runs of blocks that came
/// from the store.
#[expect(clippy::too_many_arguments, reason = "two functions that call each other and share all they know")]
fn read_layered(
    layer: &Layer,
    lower: &Lower,
    size: u64,
    versions: &dyn Versions,
    blocks: Range<u64>,
    buf: &mut [u8],
    tally: &mut Tally,
    fetched: &mut Vec<Range<u64>>,
) -> Result<(), DiskError> {
    let mut at = blocks.start;
    while at < blocks.end {
        let (state, end) = layer.run(at, blocks.end);
        let out = &mut buf[((at - blocks.start) * size) as usize..((end - blocks.start) * size) as usize];
        match state {
            State::Clean | State::Dirty => layer.read_data(at * size, out)?,
            State::DirtyZero | State::CleanZero => out.fill(0),
            State::Absent => read_lower(lower, size, versions, at..end, out, tally, fetched)?,
        }
        at = end;
    }
    Ok(())
}

fn read_lower(
    lower: &Lower,
    size: u64,
    versions: &dyn Versions,
    blocks: Range<u64>,
    buf: &mut [u8],
    tally: &mut Tally,
    fetched: &mut Vec<Range<u64>>,
) -> Result<(), DiskError> {
    match lower {
        Lower::Zero => buf.fill(0),
        Lower::Version(version) => {
            tally.store_bytes += versions.read_at(version, blocks.start * size, buf)?;
            tally.fetched_bytes += buf.len() as u64;
            fetched.push(blocks);
        }
        Lower::View(view) => {
            read_layered(&view.layer, &view.lower(), size, versions, blocks, buf, tally, fetched)?;
        }
    }
    Ok(())
}
