//! Packs and their indexes: many frames in one object, and beside it what lies where.
//!
//! The index is not part of the content names, so a pack may lose frames, or be rewritten, without any version
//! noticing. It is replaced *before* frames are given up: whatever an index lists can be read.

use crate::frame::{Encoded, FRAME_ITEMS_MAX, FRAME_RAW_MAX, FrameInfo, Kind};
use crate::name::{Keys, Name, SHORT_BYTES};
use std::fmt;

/// A pack is closed once it has this many bytes.
pub(crate) const PACK_BYTES_MAX: u64 = 64 << 20;
/// Frames of a pack are counted in 24 bits of a location.
pub(crate) const PACK_FRAMES_MAX: usize = 1 << 20;

const PACK_MAGIC: &[u8; 8] = b"OFFSPACK";
const INDEX_MAGIC: &[u8; 8] = b"OFFSINDX";
const FORMAT: u32 = 1;
/// An index whose names have 24 bytes.
const FORMAT_SHORT: u32 = 2;
/// Bytes before the first frame.
pub(crate) const HEADER_BYTES: u32 = 32;
const INDEX_HEADER: usize = 40;
const FRAME_RECORD: usize = 24;
const FLAG_NODES: u8 = 1;
const FLAG_COMPRESSED: u8 = 2;

/// Names a pack for ever: a sequence number, and random bits so that a number taken twice (after the newest
/// pack was removed) is another pack to whoever still remembers the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PackId {
    pub(crate) sequence: u64,
    pub(crate) random: u64,
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:016x}", self.sequence, self.random)
    }
}

impl PackId {
    /// The object that holds the frames.
    pub(crate) fn pack_object(self) -> String {
        format!("packs/{self}.pack")
    }

    /// The object that holds the index.
    pub(crate) fn index_object(self) -> String {
        format!("packs/{self}.idx")
    }

    /// Reads a file name in `packs/`: the id, and whether it is an index.
    pub(crate) fn parse(file: &str) -> Option<(Self, bool)> {
        let (stem, is_index) = match file.strip_suffix(".idx") {
            Some(stem) => (stem, true),
            None => (file.strip_suffix(".pack")?, false),
        };
        let (sequence, random) = stem.split_once('-')?;
        let id =
            Self { sequence: u64::from_str_radix(sequence, 16).ok()?, random: u64::from_str_radix(random, 16).ok()? };
        (id.to_string() == stem).then_some((id, is_index))
    }

    /// The bytes every pack starts with.
    pub(crate) fn header(self) -> [u8; HEADER_BYTES as usize] {
        let mut out = [0; HEADER_BYTES as usize];
        out[..8].copy_from_slice(PACK_MAGIC);
        out[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..].copy_from_slice(&self.random.to_le_bytes());
        out
    }
}

/// What an index says: the frames in order, and the names of their items, frame after frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) frames: Vec<FrameInfo>,
    pub(crate) names: Vec<Name>,
    /// For which version its frames were laid down in order ([`layout_tag`]); 0 for none. A hint: nothing but the
    /// choice of what to move depends on it.
    pub(crate) laid_for: u32,
}

/// What an index says of the version that its pack was laid down for: the start of the root's name, never 0.
pub(crate) fn layout_tag(root: &Name) -> u32 {
    u32::from_le_bytes(root.0[..4].try_into().expect("four bytes")).max(1)
}

impl Index {
    /// Adds the record of a frame that was appended at `offset`.
    pub(crate) fn push(&mut self, offset: u32, encoded: &Encoded, names: &[Name]) {
        self.frames.push(frame_info(offset, encoded, names.len()));
        self.names.extend_from_slice(names);
    }

    /// Each frame's number with the names of its items.
    pub(crate) fn items(&self) -> impl Iterator<Item = (u32, &FrameInfo, &[Name])> {
        let mut rest = self.names.as_slice();
        self.frames.iter().enumerate().map(move |(number, info)| {
            let (names, after) = rest.split_at(usize::from(info.items));
            rest = after;
            (number as u32, info, names)
        })
    }

    /// The same index with the frames that `keep` refuses given up: they keep their number and place.
    pub(crate) fn without(&self, keep: impl Fn(u32) -> bool) -> Self {
        let mut out = Self { laid_for: self.laid_for, ..Self::default() };
        for (number, info, names) in self.items() {
            if keep(number) {
                out.frames.push(*info);
                out.names.extend_from_slice(names);
            } else {
                out.frames.push(FrameInfo { items: 0, ..*info });
            }
        }
        out
    }

    /// Where the last frame ends.
    pub(crate) fn end(&self) -> u64 {
        self.frames.last().map_or(u64::from(HEADER_BYTES), |f| u64::from(f.offset) + u64::from(f.stored))
    }

    /// The bytes of the index object.
    pub(crate) fn encode(&self, id: PackId, keys: &Keys) -> Vec<u8> {
        let is_short = !self.names.is_empty() && self.names.iter().all(Name::is_short);
        let (format, width) = if is_short { (FORMAT_SHORT, SHORT_BYTES) } else { (FORMAT, 32) };
        let len = INDEX_HEADER + FRAME_RECORD * self.frames.len() + width * self.names.len() + 32;
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(INDEX_MAGIC);
        out.extend_from_slice(&format.to_le_bytes());
        out.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        out.extend_from_slice(&id.sequence.to_le_bytes());
        out.extend_from_slice(&id.random.to_le_bytes());
        out.extend_from_slice(&(self.names.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.laid_for.to_le_bytes());
        for frame in &self.frames {
            let nodes = if frame.kind == Kind::Nodes { FLAG_NODES } else { 0 };
            let compressed = if frame.compressed { FLAG_COMPRESSED } else { 0 };
            out.extend_from_slice(&frame.offset.to_le_bytes());
            out.extend_from_slice(&frame.stored.to_le_bytes());
            out.extend_from_slice(&frame.raw.to_le_bytes());
            out.extend_from_slice(&[nodes | compressed, frame.items, 0, 0]);
            out.extend_from_slice(&frame.checksum.to_le_bytes());
        }
        self.names.iter().for_each(|name| out.extend_from_slice(&name.0[..width]));
        let seal = keys.seal(&out);
        out.extend_from_slice(&seal);
        out
    }

    /// Reads what [`Index::encode`] wrote for this pack. The error says where and what is wrong.
    pub(crate) fn decode(bytes: &[u8], id: PackId, keys: &Keys) -> Result<Self, (u64, String)> {
        let wrong = |at: usize, what: &str| Err((at as u64, what.to_owned()));
        if bytes.len() < INDEX_HEADER + 32 {
            return wrong(bytes.len(), "the index is cut short");
        }
        let (body, seal) = bytes.split_at(bytes.len() - 32);
        if keys.seal(body) != seal {
            return wrong(0, "the index does not match its checksum");
        }
        // Past the seal only another release, or a pack under another name, can be at fault.
        let u32_at = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let width = match u32_at(8) {
            FORMAT => 32,
            FORMAT_SHORT => SHORT_BYTES,
            _ => 0,
        };
        if &body[..8] != INDEX_MAGIC || width == 0 {
            return wrong(0, "not an index of format 1 or 2");
        }
        if (u64_at(16), u64_at(24)) != (id.sequence, id.random) {
            return wrong(16, "the index belongs to another pack");
        }
        let (frames, names) = (u32_at(12) as usize, u32_at(32) as usize);
        if body.len() != INDEX_HEADER + FRAME_RECORD * frames + width * names {
            return wrong(12, "the counts do not fit the length");
        }
        let (records, name_bytes) = body[INDEX_HEADER..].split_at(FRAME_RECORD * frames);
        let mut out = Self { laid_for: u32_at(36), ..Self::default() };
        let mut at = HEADER_BYTES;
        for (number, record) in records.chunks_exact(FRAME_RECORD).enumerate() {
            let info = decode_frame(record.try_into().expect("whole records"));
            let Some(next) = info.offset.checked_add(info.stored).filter(|_| info.offset == at && plausible(&info))
            else {
                return wrong(INDEX_HEADER + FRAME_RECORD * number, "a frame that cannot be");
            };
            at = next;
            out.frames.push(info);
        }
        out.names = name_bytes.chunks_exact(width).map(Name::padded).collect();
        let items: usize = out.frames.iter().map(|frame| usize::from(frame.items)).sum();
        if items == names { Ok(out) } else { wrong(32, "the frames do not hold as many items as there are names") }
    }
}

/// Where the last frame of an encoded index ends, by an index whose seal nobody checked.
pub(crate) fn end_of_encoded(bytes: &[u8]) -> Option<u64> {
    let frames = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?) as usize;
    let Some(last) = frames.checked_sub(1) else { return Some(u64::from(HEADER_BYTES)) };
    let at = INDEX_HEADER.checked_add(FRAME_RECORD.checked_mul(last)?)?;
    let info = decode_frame(bytes.get(at..at.checked_add(FRAME_RECORD)?)?.try_into().ok()?);
    Some(u64::from(info.offset) + u64::from(info.stored))
}

/// The record of a frame at `offset` with `items` items.
pub(crate) fn frame_info(offset: u32, encoded: &Encoded, items: usize) -> FrameInfo {
    FrameInfo {
        offset,
        stored: encoded.stored.len() as u32,
        raw: encoded.raw,
        checksum: encoded.checksum,
        kind: encoded.kind,
        compressed: encoded.compressed,
        items: items as u8,
    }
}

fn plausible(info: &FrameInfo) -> bool {
    usize::from(info.items) <= FRAME_ITEMS_MAX
        && info.raw as usize <= FRAME_RAW_MAX
        && info.stored > 0
        && info.stored <= info.raw
}

fn decode_frame(record: &[u8; FRAME_RECORD]) -> FrameInfo {
    let u32_at = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().expect("four bytes"));
    FrameInfo {
        offset: u32_at(0),
        stored: u32_at(4),
        raw: u32_at(8),
        checksum: u64::from_le_bytes(record[16..24].try_into().expect("eight bytes")),
        kind: if record[12] & FLAG_NODES != 0 { Kind::Nodes } else { Kind::Blocks },
        compressed: record[12] & FLAG_COMPRESSED != 0,
        items: record[13],
    }
}
