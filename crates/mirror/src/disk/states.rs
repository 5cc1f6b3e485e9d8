//! What a layer knows about each of its blocks: one byte a block, in memory.
//!
//! A byte and not bits, so that neighbours change at once without a lock, in memory and in the file behind.
//! Chunks are allocated when first touched: a fresh layer of a large disk costs nearly nothing.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Blocks in one chunk; also the bytes of one page of the file of states.
pub(crate) const CHUNK: u64 = 4096;

/// What a layer holds of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    /// Nothing: the block is what lies below.
    Absent = 0,
    /// A copy of what lies below, in the data file.
    Clean = 1,
    /// Written by the guest, in the data file.
    Dirty = 2,
    /// Zeroed or discarded by the guest; the data file's bytes mean nothing.
    DirtyZero = 3,
    /// What lies below is zero; the data file's bytes mean nothing.
    CleanZero = 4,
}

impl State {
    /// The state that byte `code` stands for.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Absent, Self::Clean, Self::Dirty, Self::DirtyZero, Self::CleanZero].get(usize::from(code)).copied()
    }

    /// Whether the guest changed the block.
    pub(crate) fn is_dirty(self) -> bool {
        matches!(self, Self::Dirty | Self::DirtyZero)
    }
}

struct Chunk {
    codes: [AtomicU8; CHUNK as usize],
    /// Changed since it was last taken for the durable copy.
    touched: AtomicBool,
}

/// The states of all blocks of one layer.
pub(crate) struct StateMap {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    blocks: u64,
}

impl StateMap {
    /// All absent.
    pub(crate) fn new(blocks: u64) -> Self {
        Self { chunks: (0..blocks.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(), blocks }
    }

    /// The state of one block.
    pub(crate) fn get(&self, block: u64) -> State {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let Some(chunk) = self.chunks[(block / CHUNK) as usize].get() else { return State::Absent };
        let code = chunk.codes[(block % CHUNK) as usize].load(Ordering::Acquire);
        State::from_code(code).expect("only codes of states are stored")
    }

    /// Sets a run of blocks.
    pub(crate) fn set(&self, run: Range<u64>, state: State) {
        assert!(run.end <= self.blocks, "blocks {run:?} of {}", self.blocks);
        for block in run {
            let chunk = self.chunks[(block / CHUNK) as usize].get_or_init(|| {
                Box::new(Chunk { codes: [const { AtomicU8::new(0) }; CHUNK as usize], touched: AtomicBool::new(false) })
            });
            chunk.codes[(block % CHUNK) as usize].store(state as u8, Ordering::Release);
            chunk.touched.store(true, Ordering::Release);
        }
    }

    /// The state of `block` and the end, at most `limit`, of the run of blocks that share it.
    pub(crate) fn run(&self, block: u64, limit: u64) -> (State, u64) {
        let state = self.get(block);
        let mut end = block + 1;
        while end < limit {
            if end.is_multiple_of(CHUNK) && self.chunks[(end / CHUNK) as usize].get().is_none() {
                if state != State::Absent {
                    break;
                }
                end = (end + CHUNK).min(limit);
            } else if self.get(end) == state {
                end += 1;
            } else {
                break;
            }
        }
        (state, end)
    }

    /// The runs of blocks that are not absent, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (State, Range<u64>)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.blocks {
                let (state, end) = self.run(at, self.blocks);
                let run = at..end;
                at = end;
                if state != State::Absent {
                    return Some((state, run));
                }
            }
            None
        })
    }

    /// Takes the chunks that changed since they were last taken: number and codes as of now.
    pub(crate) fn take_touched(&self) -> Vec<(u64, Vec<u8>)> {
        let mut out = Vec::new();
        for (number, chunk) in (0..).zip(&self.chunks) {
            let Some(chunk) = chunk.get() else { continue };
            if chunk.touched.swap(false, Ordering::AcqRel) {
                out.push((number, chunk.codes.iter().map(|c| c.load(Ordering::Acquire)).collect()));
            }
        }
        out
    }

    /// Gives chunks back whose durable copy could not be written.
    pub(crate) fn touch_again(&self, taken: &[(u64, Vec<u8>)]) {
        for (number, _) in taken {
            if let Some(chunk) = self.chunks[*number as usize].get() {
                chunk.touched.store(true, Ordering::Release);
            }
        }
    }
}
