//! What a layer knows about each of its blocks: half a byte a block in memory, a byte in the files behind.
//!
//! Neighbours change at once without a lock, in memory by a compare-and-swap of the word that they share, in the files
//! because each has a byte of its own. Chunks are allocated when first touched: a fresh layer of a large disk costs
//! nearly nothing, and one of 1 TiB written all over 134 MB.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Blocks in one chunk: a quarter of a page of the file of states, for scattered writes touch a chunk each.
pub(crate) const CHUNK: u64 = 1024;

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

/// Blocks in one word: 4 bits each.
const WORD: u64 = 16;

struct Chunk {
    words: [AtomicU64; (CHUNK / WORD) as usize],
    /// Changed since it was last taken for the durable copy.
    touched: AtomicBool,
}

impl Chunk {
    fn empty() -> Box<Self> {
        Box::new(Self {
            words: [const { AtomicU64::new(0) }; (CHUNK / WORD) as usize],
            touched: AtomicBool::new(false),
        })
    }

    fn codes(&self) -> Vec<u8> {
        let words = self.words.iter().map(|w| w.load(Ordering::Acquire));
        words.flat_map(|word| (0..WORD).map(move |i| (word >> (4 * i) & 0xf) as u8)).collect()
    }
}

/// The states of all blocks of one layer.
pub(crate) struct StateMap {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    blocks: u64,
}

/// A word of one state throughout.
fn repeated(state: State) -> u64 {
    state as u64 * 0x1111_1111_1111_1111
}

impl StateMap {
    /// All absent.
    pub(crate) fn new(blocks: u64) -> Self {
        Self { chunks: (0..blocks.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(), blocks }
    }

    /// How many blocks there are.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The word that holds `block`; all absent where there is no chunk.
    fn word(&self, block: u64) -> u64 {
        let chunk = self.chunks[(block / CHUNK) as usize].get();
        chunk.map_or(0, |chunk| chunk.words[(block % CHUNK / WORD) as usize].load(Ordering::Acquire))
    }

    /// The state of one block.
    pub(crate) fn get(&self, block: u64) -> State {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let code = self.word(block) >> (4 * (block % WORD)) & 0xf;
        State::from_code(code as u8).expect("only codes of states are stored")
    }

    /// Sets a run of blocks.
    pub(crate) fn set(&self, run: Range<u64>, state: State) {
        assert!(run.end <= self.blocks, "blocks {run:?} of {}", self.blocks);
        let mut at = run.start;
        while at < run.end {
            let end = run.end.min((at / WORD + 1) * WORD);
            let chunk = self.chunks[(at / CHUNK) as usize].get_or_init(Chunk::empty);
            let mask = u64::MAX >> (64 - 4 * (end - at)) << (4 * (at % WORD));
            // Its neighbours may be changed by another thread at the same time.
            let word = &chunk.words[(at % CHUNK / WORD) as usize];
            let put = |old| Some(old & !mask | repeated(state) & mask);
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, put);
            chunk.touched.store(true, Ordering::Release);
            at = end;
        }
    }

    /// The state of `block` and the end, at most `limit`, of the run of blocks that share it.
    pub(crate) fn run(&self, block: u64, limit: u64) -> (State, u64) {
        let state = self.get(block);
        let mut at = block;
        while at < limit {
            if at.is_multiple_of(CHUNK) && self.chunks[(at / CHUNK) as usize].get().is_none() {
                if state != State::Absent {
                    break;
                }
                at += CHUNK;
                continue;
            }
            let differ = (self.word(at) ^ repeated(state)) >> (4 * (at % WORD));
            if differ != 0 {
                at += u64::from(differ.trailing_zeros() / 4);
                break;
            }
            at = (at / WORD + 1) * WORD;
        }
        (state, at.clamp(block + 1, limit.max(block + 1)))
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

    /// Takes chunks that changed since they were last taken, from the chunk `first` on and at most so many: number and
    /// codes as of now. And the chunk to go on with, if all were not looked at.
    pub(crate) fn take_touched(&self, first: u64, most: usize) -> (Vec<(u64, Vec<u8>)>, Option<u64>) {
        let mut out = Vec::new();
        for (number, chunk) in (first..).zip(&self.chunks[first as usize..]) {
            let Some(chunk) = chunk.get() else { continue };
            if chunk.touched.load(Ordering::Acquire) {
                if out.len() == most {
                    return (out, Some(number));
                }
                chunk.touched.swap(false, Ordering::AcqRel);
                out.push((number, chunk.codes()));
            }
        }
        (out, None)
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
