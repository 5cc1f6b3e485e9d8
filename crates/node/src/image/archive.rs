//! Unpacking a root file system's tar archive that nobody vouches for.
//!
//! Nothing outside the target directory is ever named: every path is resolved by the kernel beneath it
//! (`openat2` with `RESOLVE_BENEATH`), names are cleaned of `.` and refused with `..` or a leading `/`, links are
//! made as they stand and never followed on the way to a file, and what stands in an entry's place is unlinked
//! first, not written through. A symbolic link may point anywhere, as in any root file system; an entry that
//! would land outside *through* one is refused.
//!
//! What the archive declares is bounded before it is believed: bytes of contents, number of entries, length of
//! extended headers. A truncated archive is one without its end mark, or whose decompressor says so.

mod entry;
mod place;

use super::Error;
use super::tool::{Stream, Tool};
use entry::{Entry, Extensions};
use place::Place;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

/// How much an archive may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of contents, all files together.
    pub(super) bytes: u64,
    /// Entries.
    pub(super) entries: u64,
}

/// What an archive held.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unpacked {
    /// Bytes of contents, all files together.
    pub(super) bytes: u64,
    /// Entries.
    pub(super) entries: u64,
}

/// Whether the file's first bytes are those of a tar archive, or of a compressed file that may hold one.
pub(super) fn is_archive(head: &[u8]) -> bool {
    decompressor(head).is_some() || head.get(257..262) == Some(b"ustar")
}

fn decompressor(head: &[u8]) -> Option<&'static str> {
    const MAGIC: [(&[u8], &str); 3] = [(b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")];
    MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map(|&(_, tool)| tool)
}

/// Unpacks `archive` into the empty directory `into`.
pub(super) fn unpack(
    archive: &Path,
    into: &Path,
    limits: Limits,
    progress: &mut dyn FnMut(&str),
) -> Result<Unpacked, Error> {
    let mut file = File::open(archive).map_err(|e| Error::io("open", archive, e))?;
    let mut head = Vec::new();
    (&mut file).take(512).read_to_end(&mut head).map_err(|e| Error::io("read", archive, e))?;
    file.rewind().map_err(|e| Error::io("read", archive, e))?;
    let mut unpacker = Unpacker { archive, place: Place::new(into)?, limits, seen: Unpacked::default(), progress };
    match decompressor(&head) {
        None => unpacker.entries(file)?,
        Some(tool) => {
            let mut stream =
                Tool::new(tool, format!("decompressing {}", archive.display()))?.arg("-dc").stream(file)?;
            let read = unpacker.entries(&mut stream);
            finish(stream, read, archive)?;
        }
    }
    unpacker.place.finish()?;
    Ok(unpacker.seen)
}

/// A corrupt compressed file shows as an early end of the archive; the decompressor's words say more.
fn finish(mut stream: Stream, read: Result<(), Error>, archive: &Path) -> Result<(), Error> {
    match read {
        Ok(()) => {
            std::io::copy(&mut stream, &mut std::io::sink()).map_err(|e| Error::io("read", archive, e))?;
            stream.finish()
        }
        Err(Error::Refused { .. }) => match stream.finish() {
            // Killed for not being read on, it has nothing to say.
            Err(e) if !matches!(e, Error::Tool { status, .. } if status.code().is_none()) => Err(e),
            _ => read,
        },
        Err(_) => read,
    }
}

struct Unpacker<'a> {
    archive: &'a Path,
    place: Place,
    limits: Limits,
    seen: Unpacked,
    progress: &'a mut dyn FnMut(&str),
}

impl Unpacker<'_> {
    fn entries(&mut self, from: impl Read) -> Result<(), Error> {
        let mut from = Tail { inner: from, read: 0, zeros: 0 };
        let mut end = 0;
        let mut extensions = Extensions::default();
        let mut archive = tar::Archive::new(&mut from);
        let corrupt = |e: std::io::Error| Error::refused(self.archive, format!("not a whole tar archive: {e}"));
        for raw in archive.entries().map_err(corrupt)?.raw(true) {
            let mut raw = raw.map_err(corrupt)?;
            let size = raw.header().entry_size().map_err(corrupt)?;
            end = raw.raw_file_position() + size.next_multiple_of(512);
            if extensions.take(&mut raw).map_err(|why| self.wrong(&extensions.name_of(&raw), why))? {
                continue;
            }
            let name = extensions.name_of(&raw);
            let entry = Entry::new(&raw, std::mem::take(&mut extensions)).map_err(|why| self.wrong(&name, why))?;
            self.admit(&name, size)?;
            self.place.put(&entry, &mut raw).map_err(|why| self.wrong(&name, why))?;
        }
        if self.seen.entries == 0 {
            return Err(Error::refused(self.archive, "not a tar archive, or an empty one"));
        }
        if from.read < end + 512 || from.zeros < 512 {
            return Err(Error::refused(self.archive, "the archive is truncated: its end mark is missing"));
        }
        Ok(())
    }

    fn admit(&mut self, name: &str, size: u64) -> Result<(), Error> {
        self.seen.entries += 1;
        self.seen.bytes = self.seen.bytes.saturating_add(size);
        if self.seen.entries > self.limits.entries {
            return Err(self.wrong(name, format!("more than {} entries", self.limits.entries)));
        }
        if self.seen.bytes > self.limits.bytes {
            let (size, limit) = (base::units::human(size), base::units::human(self.limits.bytes));
            return Err(self.wrong(name, format!("its {size} take the archive's contents over the limit of {limit}")));
        }
        if self.seen.entries.is_multiple_of(5000) {
            (self.progress)(&format!("unpacked {} files, {}", self.seen.entries, base::units::human(self.seen.bytes)));
        }
        Ok(())
    }

    fn wrong(&self, entry: &str, why: String) -> Error {
        Error::Entry { archive: self.archive.to_owned(), entry: entry.to_owned(), why }
    }
}

/// Counts what is read, and the zeros it ends with.
struct Tail<R> {
    inner: R,
    read: u64,
    zeros: u64,
}

impl<R: Read> Read for Tail<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(buf)?;
        self.read += len as u64;
        match buf[..len].iter().rposition(|&b| b != 0) {
            Some(last) => self.zeros = (len - 1 - last) as u64,
            None => self.zeros += len as u64,
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
