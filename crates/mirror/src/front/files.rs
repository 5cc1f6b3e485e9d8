//! The file system: names, attributes, reads and writes.
//!
//! ```text
//! /ram/<16 hex digits>    mode 0400   a RAM file; opening it for writing is refused, always
//! /disk/<16 hex digits>   mode 0600   a writable disk, of fixed size
//! /blob/<name>/<number>   mode 0600   a version of a blob: see `tree`
//! ```
//!
//! An inode's number is its object's id. Handles of open files carry nothing, so any mirror can serve them; those of
//! the tree are on record.

use super::abi::{self, Attr, Body, Header, IN_HEADER, OUT_HEADER, WRITE_IN, fopen, init, op, u32_at, u64_at};
use super::tree::Routed;
use super::waiting::{Read, Tried};
use crate::core::Core;
use crate::disk::{DiskError, Extent, Overlay};
use crate::objects::{Object, ObjectError};
use crate::ram::{RamError, RamObject, RamTally};
use crate::resolve::VersionError;
use crate::stats::{Counters, add, is_dying};
use base::ByteRange;
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// The most one request moves.
pub(crate) const MAX_WRITE: u32 = 1 << 20;

const ROOT: u64 = 1;
const RAM: u64 = 2;
const DISK: u64 = 3;
/// The tree of blobs; see [`super::tree`].
pub(super) const BLOB: u64 = 4;

/// How often and how far apart a disk read asks the store again before the guest is told.
const STORE_TRIES: u32 = 4;
const STORE_PAUSE: Duration = Duration::from_millis(50);

/// The most that one seek looks over: the kernel lets nobody else change the file's attributes meanwhile.
const SEEK_SPAN: u64 = 64 << 30;
/// Extents asked for at a time.
const SEEK_EXTENTS: usize = 16;

/// What the kernel is told.
pub(crate) enum Answer {
    /// Nothing: the request has no reply, or waits.
    Nothing,
    /// A number of error.
    Error(Errno),
    /// This body.
    Body(Vec<u8>),
    /// So many bytes that already lie behind the header in the buffer.
    InPlace(usize),
}

impl Core {
    /// Answers the request in `buf[..len]`; the reply may be put into `buf`.
    pub(crate) fn answer(&self, mut header: Header, buf: &mut [u8], len: usize) -> Answer {
        if self.is_of_tree(&header) {
            match self.answer_in_tree(header, buf, len) {
                Routed::Answered(answer) => return answer,
                // The handle is one of a mirrored file, which is a disk as others are.
                Routed::To(overlay) => header.node = overlay,
            }
        }
        let body = &buf[IN_HEADER..len];
        match header.opcode {
            op::READ => {
                let (offset, size) = (u64_at(body, 8), u32_at(body, 16).min(MAX_WRITE) as usize);
                self.read(header, offset, &mut buf[OUT_HEADER..OUT_HEADER + size])
            }
            op::WRITE => {
                let (offset, size) = (u64_at(body, 8), u32_at(body, 16) as usize);
                match body.get(WRITE_IN..WRITE_IN + size) {
                    Some(data) => self.write(header, offset, data),
                    None => Answer::Error(Errno::INVAL),
                }
            }
            op::LOOKUP => self.lookup(header.node, body),
            op::GETATTR => self.attributes(header.node),
            op::SETATTR => self.set_attributes(header.node, body),
            op::OPEN => self.open(header.node, u32_at(body, 0)),
            op::FSYNC => self.fsync(header.node),
            op::FALLOCATE => self.fallocate(header.node, u64_at(body, 8), u64_at(body, 16), u32_at(body, 24)),
            op::LSEEK => self.seek(header.node, u64_at(body, 8), u32_at(body, 16)),
            op::READDIR => self.read_dir(header.node, u64_at(body, 8), u32_at(body, 16).min(MAX_WRITE) as usize),
            op::INIT => self.init(body),
            op::STATFS => self.statfs(),
            op::OPENDIR => Answer::Body(vec![0; 16]),
            op::RELEASE | op::RELEASEDIR | op::FLUSH | op::FSYNCDIR | op::DESTROY => Answer::Body(Vec::new()),
            op::FORGET => Answer::Nothing,
            op::BATCH_FORGET => {
                self.forget_all(body);
                Answer::Nothing
            }
            // The kernel then never asks again: attributes, locks, access and the like are its own matter.
            _ => Answer::Error(Errno::NOSYS),
        }
    }

    /// Whether a request may take as long as a disk takes.
    pub(crate) fn is_disk_work(&self, header: &Header) -> bool {
        match header.opcode {
            op::WRITE | op::FSYNC | op::FALLOCATE => true,
            op::READ => self.is_of_tree(header) || self.objects.overlay(header.node).is_some(),
            _ => self.reads_tree(header),
        }
    }

    /// Says nothing of room: a mirror's files need none before they are written.
    pub(super) fn statfs(&self) -> Answer {
        Answer::Body(Body::default().bytes(&[0; 40]).u32(4096).u32(255).u32(4096).bytes(&[0; 28]).0)
    }

    fn init(&self, body: &[u8]) -> Answer {
        let offered = u64::from(u32_at(body, 12)) | u64::from(u32_at(body, 16)) << 32;
        let wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::EXPLICIT_INVAL_DATA
            | init::EXT
            | init::HAS_RESEND;
        if offered & init::HAS_RESEND == 0 {
            log::error!("this kernel cannot resend FUSE requests (Linux 6.9 can): VMs will not survive the mirror");
        }
        let readahead = self.max_readahead.min(u32_at(body, 8));
        Answer::Body(abi::init_out(u32_at(body, 4), offered & wanted, readahead, MAX_WRITE).0)
    }

    fn attr_of(&self, node: u64) -> Option<Attr> {
        match node {
            ROOT | RAM | DISK | BLOB => Some(Attr::fixed(node, 0, libc::S_IFDIR | 0o700)),
            _ => match self.objects.get(node)? {
                Object::Ram(ram) => Some(Attr::fixed(node, ram.map.size(), libc::S_IFREG | 0o400)),
                Object::Overlay(o) => Some(Attr::fixed(node, o.size, libc::S_IFREG | 0o600)),
                Object::View(_) => None,
            },
        }
    }

    fn lookup(&self, parent: u64, body: &[u8]) -> Answer {
        let name = body.split(|&b| b == 0).next().and_then(|n| std::str::from_utf8(n).ok()).unwrap_or("");
        let node = match (parent, name) {
            (ROOT, "ram") => Some(RAM),
            (ROOT, "disk") => Some(DISK),
            (ROOT, "blob") => Some(BLOB),
            (RAM | DISK, name) => object_named(name).filter(|&id| match self.objects.get(id) {
                Some(Object::Ram(_)) => parent == RAM,
                Some(Object::Overlay(_)) => parent == DISK,
                _ => false,
            }),
            _ => None,
        };
        match node.and_then(|n| self.attr_of(n)) {
            Some(attr) => Answer::Body(attr.entry().0),
            None => Answer::Error(Errno::NOENT),
        }
    }

    fn attributes(&self, node: u64) -> Answer {
        self.attr_of(node).map_or(Answer::Error(Errno::STALE), |a| Answer::Body(a.attr().0))
    }

    fn set_attributes(&self, node: u64, body: &[u8]) -> Answer {
        let (valid, size) = (u32_at(body, 0), u64_at(body, 16));
        let Some(attr) = self.attr_of(node) else { return Answer::Error(Errno::STALE) };
        let resized = valid & abi::SETATTR_SIZE != 0 && size != attr.size;
        match self.objects.get(node) {
            Some(Object::Ram(_)) => Answer::Error(Errno::ROFS),
            _ if resized || valid & abi::SETATTR_MODE_UID_GID != 0 => Answer::Error(Errno::PERM),
            // Times are not kept: nothing here depends on them.
            _ => Answer::Body(attr.attr().0),
        }
    }

    fn open(&self, node: u64, flags: u32) -> Answer {
        let reply = |flags: u32| Answer::Body(Body::default().u64(0).u32(flags).u32(0).0);
        match self.objects.get(node) {
            // A hypervisor that does not map its RAM privately must fail here, not write into a template.
            Some(Object::Ram(_)) if flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 => {
                Answer::Error(Errno::ROFS)
            }
            Some(Object::Ram(_)) => reply(fopen::KEEP_CACHE | fopen::NOFLUSH),
            Some(Object::Overlay(_)) => reply(fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES | fopen::NOFLUSH),
            Some(Object::View(_)) | None => Answer::Error(Errno::STALE),
        }
    }

    fn read_dir(&self, node: u64, offset: u64, size: usize) -> Answer {
        let (directory, file) = (libc::DT_DIR, libc::DT_REG);
        let entries: Vec<(u64, String, u8)> = match node {
            ROOT => [(RAM, "ram"), (DISK, "disk"), (BLOB, "blob")].map(|(id, n)| (id, n.to_owned(), directory)).into(),
            RAM | DISK => {
                self.objects.names(node == RAM).into_iter().map(|id| (id, format!("{id:016x}"), file)).collect()
            }
            _ => return Answer::Error(Errno::NOTDIR),
        };
        let mut body = Body::default();
        // The place behind an entry is its node number, so that adding and removing others moves nothing.
        for (node, name, kind) in entries.into_iter().filter(|(node, ..)| *node > offset) {
            if body.0.len() + 24 + name.len().next_multiple_of(8) > size {
                break;
            }
            body = abi::dirent(body, node, node, &name, kind);
        }
        Answer::Body(body.0)
    }

    fn read(&self, header: Header, offset: u64, out: &mut [u8]) -> Answer {
        let began = Instant::now();
        match self.objects.get(header.node) {
            Some(Object::Overlay(disk)) => {
                let counters = self.vms.known(&disk.vm);
                let answer = self.read_disk(&disk, offset, out, &counters);
                counters.disk_read_latency.add(began.elapsed());
                answer
            }
            Some(Object::View(_)) => Answer::Error(Errno::STALE),
            ram => {
                let object = header.node;
                let read =
                    Read { unique: header.unique, object, offset, size: out.len(), thread: header.thread, began };
                let ram = match ram {
                    Some(Object::Ram(ram)) => ram,
                    _ if self.was_removed(object) => return Answer::Error(Errno::STALE),
                    // Not removed by this mirror, so it may be one that could not be opened: the guest must live.
                    _ => {
                        let why = format!("RAM file {object:016x} is not there; add it, or remove the VM that maps it");
                        return self.let_wait(read, why);
                    }
                };
                match self.read_ram(&ram, &read, out) {
                    Ok(len) => Answer::InPlace(len),
                    Err(e) => self.let_wait(read, e.to_string()),
                }
            }
        }
    }

    /// Reads a RAM file, and counts it once it has succeeded.
    fn read_ram(&self, ram: &RamObject, read: &Read, out: &mut [u8]) -> Result<usize, RamError> {
        let len = out.len().min(usize::try_from(ram.map.size().saturating_sub(read.offset)).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let mut tally = RamTally::default();
        let waits = store::waits();
        let counters = self.vms.of_thread(read.thread);
        let member = counters.member.read().expect("no writer panics").clone();
        let mut answer =
            || ram.read(&|id| self.objects.ram(id), self.objects.versions(), read.offset, &mut out[..len], &mut tally);
        match &member {
            Some(member) => store::telling(member.clone().hears_of(read.offset, len), answer)?,
            None => answer()?,
        }
        let waited = store::waits() != waits;
        add(&counters.ram_faults, 1);
        add(&counters.ram_waited_faults, u64::from(waited));
        add(&counters.ram_fetched_bytes, len as u64);
        counters.faulted.note(ram.map.size(), read.offset, len as u64);
        add(&counters.ram_from_holder_bytes, tally.from_holder_bytes);
        add(&counters.ram_from_store_bytes, tally.from_store_bytes);
        add(&counters.store_read_bytes, tally.store_bytes);
        let took = read.began.elapsed();
        counters.ram_latency.add(took);
        if let Some(member) = member {
            member.fault(read.offset, len, took, waited);
        }
        Ok(len)
    }

    fn let_wait(&self, read: Read, why: String) -> Answer {
        self.problems.note(read.object, &why);
        self.waiting.enter(read, self.vms.name_of_thread(read.thread), why);
        Answer::Nothing
    }

    /// Tries a read of RAM that waits once more.
    pub(crate) fn try_again(&self, read: &Read, buf: &mut [u8]) -> Tried {
        let tried = match self.objects.ram(read.object) {
            _ if is_dying(read.thread) => Ok(Answer::Error(Errno::IO)),
            Some(ram) => self
                .read_ram(&ram, read, &mut buf[OUT_HEADER..OUT_HEADER + read.size])
                .map(Answer::InPlace)
                .map_err(|e| e.to_string()),
            None if self.was_removed(read.object) => Ok(Answer::Error(Errno::STALE)),
            None => Err(format!("RAM file {:016x} is not there", read.object)),
        };
        match tried {
            Ok(answer) => {
                super::workers::reply(self, read.unique, answer, buf);
                Tried::Answered
            }
            Err(why) => {
                self.problems.note(read.object, &why);
                Tried::Waits(why)
            }
        }
    }

    fn read_disk(&self, disk: &Overlay, offset: u64, out: &mut [u8], counters: &Counters) -> Answer {
        let len = out.len().min(usize::try_from(disk.size.saturating_sub(offset)).unwrap_or(usize::MAX));
        if len == 0 {
            // Of a file that is read past the page cache, the kernel asks for what lies beyond its end, too.
            return Answer::InPlace(0);
        }
        let out = &mut out[..len];
        match self.ask_again(|| disk.read(self.objects.versions(), offset, out)) {
            Ok(tally) => {
                add(&counters.disk_reads, 1);
                add(&counters.disk_read_bytes, len as u64);
                add(&counters.disk_hits, u64::from(tally.fetched_bytes == 0));
                add(&counters.disk_fetched_bytes, tally.fetched_bytes);
                add(&counters.store_read_bytes, tally.store_bytes);
                Answer::InPlace(len)
            }
            Err(e) => self.disk_failed(disk.id, &e),
        }
    }

    fn write(&self, header: Header, offset: u64, data: &[u8]) -> Answer {
        let disk = match self.objects.get(header.node) {
            Some(Object::Overlay(disk)) => disk,
            Some(Object::Ram(_)) => return Answer::Error(Errno::ROFS),
            _ => return Answer::Error(Errno::STALE),
        };
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > disk.size) {
            return Answer::Error(Errno::FBIG);
        }
        match self.ask_again(|| disk.write(self.objects.versions(), offset, data)) {
            Ok(tally) => {
                let counters = self.vms.known(&disk.vm);
                add(&counters.disk_written_bytes, data.len() as u64);
                add(&counters.disk_fetched_bytes, tally.fetched_bytes);
                add(&counters.store_read_bytes, tally.store_bytes);
                let len = u32::try_from(data.len()).expect("bounded by max_write");
                Answer::Body(Body::default().u32(len).u32(0).0)
            }
            Err(e) => self.disk_failed(disk.id, &e),
        }
    }

    fn fallocate(&self, node: u64, offset: u64, len: u64, mode: u32) -> Answer {
        let Some(disk) = self.objects.overlay(node) else { return Answer::Error(Errno::ROFS) };
        let zeroing = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) as u32;
        if mode & zeroing == 0 {
            // Space cannot be promised: blocks of a layer are allocated when written.
            return Answer::Error(Errno::OPNOTSUPP);
        }
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE as u32 != 0;
        let end = offset.checked_add(len).filter(|_| offset < disk.size);
        let Some(end) = end.filter(|&end| keeps_size || end <= disk.size) else { return Answer::Error(Errno::FBIG) };
        let len = end.min(disk.size) - offset;
        match self.ask_again(|| disk.zero(self.objects.versions(), offset, len, false)) {
            Ok(()) => Answer::Body(Vec::new()),
            Err(e) => self.disk_failed(disk.id, &e),
        }
    }

    /// SEEK_DATA and SEEK_HOLE; all others are the kernel's own matter.
    fn seek(&self, node: u64, offset: u64, whence: u32) -> Answer {
        let found = |at: u64| Answer::Body(Body::default().u64(at).0);
        let data = match whence.cast_signed() {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Answer::Error(Errno::INVAL),
        };
        let disk = match self.objects.get(node) {
            Some(Object::Overlay(disk)) => disk,
            // All data up to its end: holes in RAM are nobody's business.
            Some(Object::Ram(ram)) if offset < ram.map.size() => {
                return found(if data { offset } else { ram.map.size() });
            }
            Some(Object::Ram(_)) => return Answer::Error(Errno::NXIO),
            _ => return Answer::Error(Errno::STALE),
        };
        let extents = |range, most| disk.extents(self.objects.versions(), range, most);
        self.seek_extents(disk.id, disk.size, (offset, whence), extents)
    }

    /// SEEK_DATA and SEEK_HOLE from `offset` in `id`, which is of `size` bytes and has these extents.
    pub(super) fn seek_extents(
        &self,
        id: u64,
        size: u64,
        (offset, whence): (u64, u32),
        extents: impl Fn(ByteRange, usize) -> Result<Vec<Extent>, DiskError>,
    ) -> Answer {
        let found = |at: u64| Answer::Body(Body::default().u64(at).0);
        let data = match whence.cast_signed() {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Answer::Error(Errno::INVAL),
        };
        if offset >= size {
            return Answer::Error(Errno::NXIO);
        }
        let (mut at, until) = (offset, size.min(offset.saturating_add(SEEK_SPAN)));
        while at < until {
            let step = ByteRange::new(at, until.min(at + (1 << 30)));
            let extents = match self.ask_again(|| extents(step, SEEK_EXTENTS)) {
                Ok(extents) => extents,
                Err(e) => return self.disk_failed(id, &e),
            };
            for extent in extents {
                if extent.kind.zero != data {
                    return found(at);
                }
                at = extent.end;
            }
        }
        match (data, at == size) {
            (true, true) => Answer::Error(Errno::NXIO),
            // A hole that is none, or data that are zero, cost the asker another question and nothing else.
            _ => found(at),
        }
    }

    fn fsync(&self, node: u64) -> Answer {
        match self.objects.flush(node) {
            Ok(()) => {
                if let Some(disk) = self.objects.overlay(node) {
                    add(&self.vms.known(&disk.vm).disk_flushes, 1);
                }
                Answer::Body(Vec::new())
            }
            Err(ObjectError::Missing { .. }) if self.objects.ram(node).is_some() => Answer::Body(Vec::new()),
            Err(e) => {
                self.problems.note(node, &e.to_string());
                Answer::Error(match e {
                    ObjectError::Io { source, .. } => errno_of(&source),
                    _ => Errno::STALE,
                })
            }
        }
    }

    /// Asks again where the store cannot answer now; a guest, or a client, is told only when it does not come back.
    pub(crate) fn ask_again<T>(&self, mut ask: impl FnMut() -> Result<T, DiskError>) -> Result<T, DiskError> {
        let mut tries = 1;
        loop {
            match ask() {
                Err(DiskError::Version(VersionError::Unavailable { .. })) if tries < STORE_TRIES => {
                    tries += 1;
                    std::thread::sleep(STORE_PAUSE);
                }
                done => return done,
            }
        }
    }

    /// The hypervisor stops the guest on such an error (`werror=stop,rerror=stop`), and goes on with it later.
    pub(super) fn disk_failed(&self, disk: u64, error: &DiskError) -> Answer {
        let errno = match error {
            DiskError::Version(_) => Errno::IO,
            DiskError::Local(e) => errno_of(e),
        };
        self.problems.note(disk, &error.describe(disk));
        Answer::Error(errno)
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// The id that a file's name says: exactly 16 hex digits, in lower case, so that each file has one name.
fn object_named(name: &str) -> Option<u64> {
    let right = name.len() == 16 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    right.then(|| u64::from_str_radix(name, 16).ok())?
}

/// Parent directory and name of an object, as the kernel knows it.
pub(crate) fn name_of(object: &Object) -> Option<(u64, String)> {
    match object {
        Object::Ram(ram) => Some((RAM, format!("{:016x}", ram.id))),
        Object::Overlay(o) => Some((DISK, format!("{:016x}", o.id))),
        Object::View(_) => None,
    }
}
