//! The files of the slots: bytes with O_DIRECT, so that nothing is held twice, and a record for each slot.
//!
//! ```text
//! record  0 magic "OCHK" | 4 bytes of content | 8 pack: sequence | 16 pack: random | 24 number of the chunk
//!        28 0 | 32 bytes of the whole pack | 40 checksums of the 8 pieces, 8 bytes each | 104 0
//!       112 checksum of bytes 0 to 112, 16 bytes
//! header  0 magic "OFFCACHE" | 8 format, 1 | 12 bytes of a chunk | 16 0 | 112 checksum as above
//! ```
//!
//! Integers are little endian, checksums the start of BLAKE3. A piece is an eighth of a chunk, so that a small read
//! reads and checks no more than it must.

use super::Key;
use crate::pack::PackId;
use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const RECORD: usize = 128;
const RECORD_MAGIC: &[u8; 4] = b"OCHK";
const HEADER_MAGIC: &[u8; 8] = b"OFFCACHE";
const FORMAT: u32 = 1;
/// Pieces of a chunk, each with a checksum.
pub(crate) const PIECES: usize = 8;
/// What O_DIRECT asks of addresses, offsets and lengths: enough for every block device there is.
pub(crate) const ALIGN: usize = 4096;
/// Bytes a slot takes on the disk beside its chunk.
pub(crate) const SLOT_OVERHEAD: u64 = RECORD as u64;

/// Bytes at an address that O_DIRECT takes.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zeros; the length is rounded up to the alignment.
    pub(crate) fn new(len: usize) -> Self {
        let len = len.next_multiple_of(ALIGN);
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// A record that is what it says: which chunk, how many bytes, of a pack of how many.
struct Record {
    key: Key,
    len: u32,
    pack_size: u64,
    pieces: [u64; PIECES],
}

fn checksum(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(blake3::hash(bytes).as_bytes()[..8].try_into().expect("eight bytes"))
}

pub(crate) fn seal(record: &mut [u8; RECORD]) {
    let hash = blake3::hash(&record[..112]);
    record[112..].copy_from_slice(&hash.as_bytes()[..16]);
}

fn is_sealed(record: &[u8; RECORD]) -> bool {
    record[112..] == blake3::hash(&record[..112]).as_bytes()[..16]
}

impl Record {
    fn encode(&self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        out[..4].copy_from_slice(RECORD_MAGIC);
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..16].copy_from_slice(&self.key.pack.sequence.to_le_bytes());
        out[16..24].copy_from_slice(&self.key.pack.random.to_le_bytes());
        out[24..26].copy_from_slice(&self.key.number.to_le_bytes());
        out[32..40].copy_from_slice(&self.pack_size.to_le_bytes());
        for (place, piece) in out[40..104].chunks_exact_mut(8).zip(self.pieces) {
            place.copy_from_slice(&piece.to_le_bytes());
        }
        seal(&mut out);
        out
    }

    fn decode(bytes: &[u8; RECORD], chunk: usize) -> Option<Self> {
        if &bytes[..4] != RECORD_MAGIC || !is_sealed(bytes) {
            return None;
        }
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let pack = PackId { sequence: u64_at(8), random: u64_at(16) };
        let record = Self {
            key: Key { pack, number: u16::from_le_bytes([bytes[24], bytes[25]]) },
            len: u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes")),
            pack_size: u64_at(32),
            pieces: std::array::from_fn(|piece| u64_at(40 + 8 * piece)),
        };
        let end = u64::from(record.key.number) * chunk as u64 + u64::from(record.len);
        (record.len > 0 && record.len as usize <= chunk && end <= record.pack_size).then_some(record)
    }
}

/// A slot that an earlier life filled.
pub(crate) struct Kept {
    pub(crate) slot: u32,
    pub(crate) key: Key,
    pub(crate) pack_size: u64,
}

/// The two files.
pub(crate) struct Disk {
    data: File,
    /// The same without O_DIRECT, for a file system that refuses some request after all.
    buffered: File,
    direct: AtomicBool,
    map: File,
    chunk: usize,
}

impl Disk {
    /// Opens or makes the files in `dir`. What was made with another size of chunks is emptied.
    pub(crate) fn open(dir: &Path, chunk: usize) -> io::Result<Self> {
        let path = |name: &str| -> PathBuf { dir.join(name) };
        let open = |name: &str, flags: OFlags| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(flags.bits().cast_signed()).open(path(name))
        };
        let map = open("map", OFlags::empty())?;
        let buffered = open("data", OFlags::empty())?;
        let direct = open("data", OFlags::DIRECT);
        let is_direct = direct.is_ok();
        let data = direct.or_else(|_| buffered.try_clone())?;
        let disk = Self { data, buffered, direct: AtomicBool::new(is_direct), map, chunk };
        let mut header = [0; RECORD];
        header[..8].copy_from_slice(HEADER_MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..16].copy_from_slice(&(chunk as u32).to_le_bytes());
        seal(&mut header);
        let mut found = [0; RECORD];
        if disk.map.read_exact_at(&mut found, 0).is_err() || found != header {
            disk.clear_all()?;
            disk.map.write_all_at(&header, 0)?;
        }
        Ok(disk)
    }

    fn clear_all(&self) -> io::Result<()> {
        self.map.set_len(0)?;
        self.buffered.set_len(0)
    }

    /// Whether reads and writes go past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// Visits what earlier lives filled, in ascending order; `visit` says whether it is kept, else it is cleared.
    pub(crate) fn load(&self, mut visit: impl FnMut(Kept) -> bool) -> io::Result<()> {
        let records = (self.map.metadata()?.len() / RECORD as u64).saturating_sub(1);
        let mut at = 0;
        let mut batch = vec![0; RECORD << 12];
        while at < records {
            let count = (records - at).min(1 << 12) as usize;
            let batch = &mut batch[..count * RECORD];
            self.map.read_exact_at(batch, (at + 1) * RECORD as u64)?;
            for (slot, bytes) in (at..).zip(batch.chunks_exact(RECORD)) {
                let bytes: &[u8; RECORD] = bytes.try_into().expect("whole records");
                if bytes[..4] == [0; 4] {
                    continue;
                }
                let kept = Record::decode(bytes, self.chunk)
                    .is_some_and(|r| visit(Kept { slot: slot as u32, key: r.key, pack_size: r.pack_size }));
                if !kept {
                    self.clear(slot as u32)?;
                }
            }
            at += count as u64;
        }
        Ok(())
    }

    /// Fills the slots from `slot` on with the first `len` of `bytes`, which are aligned, zeros after the content: chunks
    /// side by side from `key` on, in one go.
    pub(crate) fn write(&self, slot: u32, key: Key, pack_size: u64, bytes: &[u8], len: usize) -> io::Result<()> {
        let padded = &bytes[..len.next_multiple_of(ALIGN)];
        let offset = u64::from(slot) * self.chunk as u64;
        self.transfer(|file| file.write_all_at(padded, offset))?;
        self.drop_pages(offset, padded.len());
        let mut records = Vec::with_capacity(len.div_ceil(self.chunk) * RECORD);
        for (number, content) in (key.number..).zip(bytes[..len].chunks(self.chunk)) {
            let mut pieces = [0; PIECES];
            for (piece, part) in pieces.iter_mut().zip(content.chunks(self.chunk / PIECES)) {
                *piece = checksum(part);
            }
            let record = Record { key: Key { number, ..key }, len: content.len() as u32, pack_size, pieces };
            records.extend(record.encode());
        }
        self.map.write_all_at(&records, (u64::from(slot) + 1) * RECORD as u64)
    }

    /// Fills `out` with the bytes of a chunk from `offset`; whether the slot holds them. An error of the disk is
    /// one more way of not holding them.
    pub(crate) fn read(&self, slot: u32, key: Key, offset: usize, out: &mut [u8]) -> bool {
        let mut record = [0; RECORD];
        if self.map.read_exact_at(&mut record, (u64::from(slot) + 1) * RECORD as u64).is_err() {
            return false;
        }
        let Some(record) = Record::decode(&record, self.chunk).filter(|record| record.key == key) else {
            return false;
        };
        let end = offset + out.len();
        if end > record.len as usize {
            return false;
        }
        // Pieces are checked as a whole.
        let piece = self.chunk / PIECES;
        let span: Range<usize> = offset / piece * piece..end.next_multiple_of(piece).min(record.len as usize);
        let mut buf = Aligned::new(span.len());
        let at = u64::from(slot) * self.chunk as u64 + span.start as u64;
        if self.transfer(|file| read_full(file, buf.bytes_mut(), at, span.len())).is_err() {
            return false;
        }
        self.drop_pages(at, span.len());
        let bytes = &buf.bytes()[..span.len()];
        let sums = &record.pieces[span.start / piece..];
        let fits = bytes.chunks(piece).zip(sums).all(|(part, sum)| checksum(part) == *sum);
        if fits {
            out.copy_from_slice(&bytes[offset - span.start..end - span.start]);
        }
        fits
    }

    /// Runs a transfer on the direct file; on the other one for good where the file system refuses that.
    fn transfer(&self, mut run: impl FnMut(&File) -> io::Result<()>) -> io::Result<()> {
        if !self.is_direct() {
            return run(&self.buffered);
        }
        match run(&self.data) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.direct.store(false, Ordering::Relaxed);
                run(&self.buffered)
            }
            done => done,
        }
    }

    /// Without O_DIRECT: what was read or written need not stay in the page cache.
    fn drop_pages(&self, offset: u64, len: usize) {
        if !self.is_direct() {
            // Advice; a file system that does not take it keeps the pages.
            let _ = fadvise(&self.buffered, offset, std::num::NonZeroU64::new(len as u64), Advice::DontNeed);
        }
    }

    /// Forgets a slot and gives its space back.
    pub(crate) fn clear(&self, slot: u32) -> io::Result<()> {
        let end = self.map.metadata()?.len();
        let at = (u64::from(slot) + 1) * RECORD as u64;
        if at < end {
            self.map.write_all_at(&[0; RECORD], at)?;
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.buffered, mode, u64::from(slot) * self.chunk as u64, self.chunk as u64) {
            // A file system without holes keeps the space until the directory goes.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Fills the first `needed` bytes of `buf`, whose length is aligned; the file may end before the rest.
fn read_full(file: &File, buf: &mut [u8], mut at: u64, needed: usize) -> io::Result<()> {
    let mut done = 0;
    while done < needed {
        match file.read_at(&mut buf[done..], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                done += count;
                at += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// For the fuzzer: a record, and whether bytes are one.
#[cfg(test)]
pub(crate) fn example_record() -> Vec<u8> {
    let key = Key { pack: PackId { sequence: 1, random: 2 }, number: 3 };
    Record { key, len: 5000, pack_size: 1 << 20, pieces: [7; PIECES] }.encode().to_vec()
}

#[cfg(test)]
pub(crate) fn is_possible(record: &[u8; RECORD]) -> bool {
    Record::decode(record, 1 << 16).is_some()
}
