//! Frames: a few blocks, or a few nodes, compressed together. The unit of transfer.
//!
//! The items of a frame lie end to end: blocks are all of one size, nodes tell their own length. A frame is
//! kept compressed only where that saves at least an eighth, so that content that does not compress costs
//! no time on reading.

use crate::tree::{NODE_BYTES_MAX, Node};
use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// Blocks in a frame at most.
pub(crate) const FRAME_BLOCKS: usize = 16;
/// Bytes of blocks in a frame, where a block is not larger itself: 8 blocks of 4 KiB. Against 64 KiB it takes 2%
/// more space and 44% less time to read one block (docs/store-sizes.md).
pub(crate) const FRAME_BYTES: usize = 32 << 10;
/// Nodes in a frame: a cold read of one node fetches 16 KiB at most.
pub(crate) const FRAME_NODES: usize = 32;
/// No frame has more items: one bit each in [`Frame::verified`].
pub(crate) const FRAME_ITEMS_MAX: usize = 32;
/// No frame is larger, so that an index cannot ask for arbitrary memory.
pub(crate) const FRAME_RAW_MAX: usize = crate::name::BLOCK_SIZE_MAX as usize;

const _: () = assert!(FRAME_NODES * NODE_BYTES_MAX <= FRAME_RAW_MAX);
const LEVEL: i32 = 1;
/// What is laid down for many readers is worth more time, once.
const LEVEL_TIGHT: i32 = 9;

/// How many blocks of this size make a full frame.
pub(crate) fn blocks_per_frame(block_size: u32) -> usize {
    (FRAME_BYTES / block_size as usize).clamp(1, FRAME_BLOCKS)
}

/// What a frame's items are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Blocks,
    Nodes,
}

/// What an index says of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameInfo {
    /// Where it starts in the pack.
    pub(crate) offset: u32,
    /// Bytes in the pack.
    pub(crate) stored: u32,
    /// Bytes when decompressed.
    pub(crate) raw: u32,
    /// Start of the unkeyed BLAKE3 of the bytes in the pack.
    pub(crate) checksum: u64,
    pub(crate) kind: Kind,
    pub(crate) compressed: bool,
    /// Items; 0 once the frame was given up.
    pub(crate) items: u8,
}

/// The checksum of a frame's stored bytes.
pub(crate) fn checksum(stored: &[u8]) -> u64 {
    let hash = blake3::hash(stored);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

/// A frame ready to be appended to a pack.
pub(crate) struct Encoded {
    pub(crate) stored: Vec<u8>,
    pub(crate) raw: u32,
    pub(crate) checksum: u64,
    pub(crate) kind: Kind,
    pub(crate) compressed: bool,
}

thread_local! {
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static TIGHT: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses `raw` where that pays.
pub(crate) fn encode(kind: Kind, raw: &[u8]) -> io::Result<Encoded> {
    encode_with(&COMPRESSOR, LEVEL, kind, raw)
}

/// As [`encode`], with more time for fewer bytes; as quick to decompress.
pub(crate) fn encode_tight(kind: Kind, raw: &[u8]) -> io::Result<Encoded> {
    encode_with(&TIGHT, LEVEL_TIGHT, kind, raw)
}

type Kept = std::thread::LocalKey<RefCell<Option<zstd::bulk::Compressor<'static>>>>;

fn encode_with(compressor: &'static Kept, level: i32, kind: Kind, raw: &[u8]) -> io::Result<Encoded> {
    let small = compress(compressor, level, raw, raw.len() - raw.len() / 8)?;
    let compressed = small.is_some();
    let stored = small.unwrap_or_else(|| raw.to_vec());
    Ok(Encoded { checksum: checksum(&stored), raw: raw.len() as u32, stored, kind, compressed })
}

/// Compressed `raw`, where that takes at most `limit` bytes.
fn compress(compressor: &'static Kept, level: i32, raw: &[u8], limit: usize) -> io::Result<Option<Vec<u8>>> {
    compressor.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Compressor::new(level)?);
        }
        let compressor = slot.as_mut().expect("set above");
        let mut out = Vec::with_capacity(limit);
        // Too little room is the one error there is: the content does not compress well enough.
        Ok(compressor.compress_to_buffer(raw, &mut out).is_ok().then(|| {
            out.shrink_to_fit();
            out
        }))
    })
}

fn decompress(stored: &[u8], raw: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Decompressor::new()?);
        }
        slot.as_mut().expect("set above").decompress(stored, raw)
    })
}

/// A decompressed frame.
pub(crate) struct Frame {
    data: Vec<u8>,
    /// Where each item starts, and the end.
    bounds: Box<[u32]>,
    /// A bit for each item whose bytes were found to match its name.
    verified: AtomicU32,
}

impl Frame {
    /// Decompresses what a pack holds. The error says what is wrong with it.
    pub(crate) fn decode(info: &FrameInfo, stored: Vec<u8>) -> Result<Self, String> {
        let data = if info.compressed {
            decompress(&stored, info.raw as usize).map_err(|error| format!("the frame does not decompress: {error}"))?
        } else {
            stored
        };
        if data.len() != info.raw as usize {
            return Err(format!("the frame decompresses to {} bytes instead of {}", data.len(), info.raw));
        }
        let bounds = match info.kind {
            Kind::Blocks => block_bounds(data.len(), info.items),
            Kind::Nodes => node_bounds(&data, info.items),
        };
        let bounds = bounds.ok_or_else(|| format!("the frame does not hold {} items", info.items))?;
        Ok(Self { data, bounds, verified: AtomicU32::new(0) })
    }

    /// The bytes of an item.
    pub(crate) fn item(&self, slot: usize) -> Option<&[u8]> {
        let (start, end) = (self.bounds.get(slot)?, self.bounds.get(slot + 1)?);
        self.data.get(*start as usize..*end as usize)
    }

    /// Whether the item matched its name before. A frame never changes, so once is enough.
    pub(crate) fn is_verified(&self, slot: usize) -> bool {
        self.verified.load(Ordering::Acquire) >> slot & 1 == 1
    }

    pub(crate) fn set_verified(&self, slot: usize) {
        self.verified.fetch_or(1 << slot, Ordering::Release);
    }

    /// Bytes it keeps in memory.
    pub(crate) fn weight(&self) -> usize {
        self.data.len() + 4 * self.bounds.len() + 128
    }
}

fn block_bounds(len: usize, items: u8) -> Option<Box<[u32]>> {
    let items = usize::from(items);
    let size = len.checked_div(items).filter(|size| size * items == len && *size > 0)?;
    Some((0..=items).map(|item| (item * size) as u32).collect())
}

fn node_bounds(data: &[u8], items: u8) -> Option<Box<[u32]>> {
    let mut bounds = vec![0];
    let mut at = 0;
    for _ in 0..items {
        at += Node::encoded_len(&data[at..])?;
        bounds.push(at as u32);
    }
    (at == data.len()).then(|| bounds.into_boxed_slice())
}
