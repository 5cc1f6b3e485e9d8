//! The tree of blobs as the kernel meets it; what it is, see [`crate::tree`].
//!
//! Everything in it is opened for direct transfers: a program's reads arrive whole and not by pages (the session's
//! readahead is set for faults of RAM), and all who have a mirrored file open see the same. Loop devices, `cp`,
//! hypervisors and private mappings work on that; shared mappings do not.

use super::abi::{self, Attr, Body, Header, IN_HEADER, OUT_HEADER, fopen, op, u32_at, u64_at};
use super::files::{Answer, BLOB, MAX_WRITE};
use crate::control::AskedOf;
use crate::core::Core;
use crate::disk::{DiskError, of_version};
use crate::resolve::VersionError;
use crate::stats::add;
use crate::tree::{self, Asker, For, Node, Opened, Target, VersionNode};
use crate::{IOCTL_CLONE, IOCTL_COMMIT};
use rustix::io::Errno;

/// The top bit of a request's name says that the kernel sends it again.
const AGAIN: u64 = 1 << 63;
/// How long the kernel may believe names and directories of the tree: others publish and delete.
const VALID_S: u64 = 1;
/// The link to the latest version.
const LATEST: &str = "latest";
/// Where the links' places in a directory end and the versions' begin.
const VERSIONS_FROM: u64 = 1 << 32;
/// Names at least that fit into what the kernel asks for at a time.
const NAMES: usize = 4096;
/// Bytes of an ioctl request before its data.
const IOCTL_IN: usize = 32;

/// What became of a request.
pub(super) enum Routed {
    /// It is answered.
    Answered(Answer),
    /// It is one for this overlay.
    To(u64),
}

/// What an ioctl that succeeded is answered.
pub(crate) fn ioctl_answer(number: u64, room: u32) -> Answer {
    let head = Body::default().u32(0).u32(0).u32(0).u32(0);
    Answer::Body(if room >= 8 { head.u64(number).0 } else { head.0 })
}

fn handle_answer(handle: u64) -> Answer {
    let flags = fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES | fopen::NOFLUSH;
    Answer::Body(Body::default().u64(handle).u32(flags).u32(0).0)
}

impl Core {
    /// Whether a request is one of the tree's.
    pub(super) fn is_of_tree(&self, header: &Header) -> bool {
        header.node == BLOB || header.node >= tree::FIRST
    }

    /// Whether it may have to read the store's metadata.
    pub(super) fn reads_tree(&self, header: &Header) -> bool {
        self.is_of_tree(header) && matches!(header.opcode, op::LOOKUP | op::READDIR | op::READLINK | op::LSEEK)
    }

    /// Answers a request of the tree, or says which overlay has to.
    pub(super) fn answer_in_tree(&self, header: Header, buf: &mut [u8], len: usize) -> Routed {
        let body = &buf[IN_HEADER..len];
        let answered = match header.opcode {
            op::READ | op::WRITE | op::FSYNC | op::FALLOCATE | op::LSEEK | op::IOCTL => {
                return self.by_handle(header, buf, len);
            }
            op::LOOKUP => self.lookup_in_tree(header.node, body).and_then(|node| self.entry_of(node)),
            op::GETATTR => self.attr_in_tree(header.node).map(|attr| Answer::Body(attr.attr().0)),
            op::SETATTR => self.set_attr_in_tree(header.node, body),
            op::OPEN => self.open_in_tree(&header, u32_at(body, 0)),
            op::READDIR => self.list_tree(header.node, u64_at(body, 8), u32_at(body, 16).min(MAX_WRITE) as usize),
            op::READLINK => self.read_link(header.node),
            op::RELEASE => {
                self.tree.close(u64_at(body, 0));
                Ok(Answer::Body(Vec::new()))
            }
            op::FORGET => {
                self.tree.forget(header.node, u64_at(body, 0));
                Ok(Answer::Nothing)
            }
            op::OPENDIR => Ok(Answer::Body(vec![0; 16])),
            op::RELEASEDIR | op::FLUSH | op::FSYNCDIR => Ok(Answer::Body(Vec::new())),
            op::STATFS => Ok(self.statfs()),
            _ => Err(Errno::NOSYS),
        };
        Routed::Answered(answered.unwrap_or_else(Answer::Error))
    }

    /// The kernel forgets several inodes at once.
    pub(super) fn forget_all(&self, body: &[u8]) {
        let there = (body.len() / 16).min(u32_at(body, 0) as usize);
        for at in (0..there).map(|n| 8 + 16 * n) {
            self.tree.forget(u64_at(body, at), u64_at(body, at + 8));
        }
    }

    /// Requests on open files. All begin with the handle.
    fn by_handle(&self, header: Header, buf: &mut [u8], len: usize) -> Routed {
        let body = &buf[IN_HEADER..len];
        let target = self.tree.target(u64_at(body, 0));
        if header.opcode == op::IOCTL {
            return Routed::Answered(self.ioctl(&header, target, body).unwrap_or_else(Answer::Error));
        }
        let version = match target {
            Some(Target::Overlay(overlay)) => return Routed::To(overlay),
            Some(Target::Version(node)) => self.tree.version(node),
            None => None,
        };
        let Some(version) = version else { return Routed::Answered(Answer::Error(Errno::STALE)) };
        let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
        Routed::Answered(match header.opcode {
            op::READ => {
                let size = size.min(MAX_WRITE) as usize;
                self.read_version(header.node, &version, offset, &mut buf[OUT_HEADER..OUT_HEADER + size])
            }
            op::LSEEK => {
                let versions = self.objects.versions();
                let extents = |range, most| of_version(&version.version, versions, range, most);
                self.seek_extents(header.node, version.size, (offset, size), extents)
            }
            op::FSYNC => Answer::Body(Vec::new()),
            _ => Answer::Error(Errno::BADF),
        })
    }

    fn read_version(&self, node: u64, version: &VersionNode, offset: u64, out: &mut [u8]) -> Answer {
        let len = out.len().min(usize::try_from(version.size.saturating_sub(offset)).unwrap_or(usize::MAX));
        if len == 0 {
            return Answer::InPlace(0);
        }
        let mut read = || self.objects.versions().read_at(&version.version, offset, &mut out[..len]);
        match self.ask_again(|| read().map_err(DiskError::from)) {
            Ok(stored) => {
                add(&self.vms.others.disk_reads, 1);
                add(&self.vms.others.disk_read_bytes, len as u64);
                add(&self.vms.others.store_read_bytes, stored);
                Answer::InPlace(len)
            }
            Err(e) => self.disk_failed(node, &e),
        }
    }

    /// What a name in the tree stands for.
    fn lookup_in_tree(&self, parent: u64, body: &[u8]) -> Result<u64, Errno> {
        let name = body.split(|&b| b == 0).next().and_then(|n| std::str::from_utf8(n).ok()).ok_or(Errno::NOENT)?;
        let versions = self.objects.versions();
        let io = |e: VersionError| self.tree_failed(parent, &e);
        let node = if parent == BLOB {
            let blob = tree::blob_of(name).ok_or(Errno::NOENT)?;
            versions.blob(&blob).map_err(io)?.ok_or(Errno::NOENT)?;
            Node::Blob(blob)
        } else {
            let Some(Node::Blob(blob)) = self.tree.node(parent) else { return Err(Errno::NOTDIR) };
            match name.parse::<u64>() {
                Ok(number) if number.to_string() == name => {
                    let found = versions.blob_version(&blob, number).map_err(io)?.ok_or(Errno::NOENT)?;
                    let (version, size, time_ms) = (found.version, found.size, found.time_ms);
                    Node::Version(VersionNode { blob, number, version, size, time_ms })
                }
                _ => {
                    let entry = versions.blob(&blob).map_err(io)?.ok_or(Errno::NOENT)?;
                    if name != LATEST && !entry.tags.contains_key(name) {
                        return Err(Errno::NOENT);
                    }
                    Node::Link { blob, name: name.to_owned() }
                }
            }
        };
        self.tree.enter(node).map_err(|e| self.record_failed(&e))
    }

    fn entry_of(&self, node: u64) -> Result<Answer, Errno> {
        self.attr_in_tree(node).map(|attr| Answer::Body(attr.entry().0))
    }

    fn attr_in_tree(&self, node: u64) -> Result<Attr, Errno> {
        if node == BLOB {
            return Ok(Attr { valid_s: VALID_S, ..Attr::fixed(node, 0, libc::S_IFDIR | 0o700) });
        }
        let (size, mode, time_ms) = match self.tree.node(node).ok_or(Errno::STALE)? {
            Node::Version(version) => (version.size, libc::S_IFREG | 0o600, version.time_ms),
            Node::Link { .. } => (self.link_of(node)?.len() as u64, libc::S_IFLNK | 0o777, 0),
            Node::Blob(blob) => {
                let entry = self.objects.versions().blob(&blob).map_err(|e| self.tree_failed(node, &e))?;
                (0, libc::S_IFDIR | 0o700, entry.ok_or(Errno::STALE)?.created_ms)
            }
        };
        Ok(Attr { node, size, mode, time_ms, valid_s: VALID_S })
    }

    fn set_attr_in_tree(&self, node: u64, body: &[u8]) -> Result<Answer, Errno> {
        let (valid, size) = (u32_at(body, 0), u64_at(body, 16));
        let attr = self.attr_in_tree(node)?;
        let resized = valid & abi::SETATTR_SIZE != 0 && size != attr.size;
        if resized || valid & abi::SETATTR_MODE_UID_GID != 0 {
            return Err(Errno::PERM);
        }
        // A version's time is that of its publication.
        Ok(Answer::Body(attr.attr().0))
    }

    fn link_of(&self, node: u64) -> Result<String, Errno> {
        let Some(Node::Link { blob, name }) = self.tree.node(node) else { return Err(Errno::INVAL) };
        let entry = self.objects.versions().blob(&blob).map_err(|e| self.tree_failed(node, &e))?;
        let entry = entry.ok_or(Errno::NOENT)?;
        let number = if name == LATEST { Some(&entry.latest) } else { entry.tags.get(&name) };
        Ok(number.ok_or(Errno::NOENT)?.to_string())
    }

    fn read_link(&self, node: u64) -> Result<Answer, Errno> {
        self.link_of(node).map(|target| Answer::Body(target.into_bytes()))
    }

    fn open_in_tree(&self, header: &Header, flags: u32) -> Result<Answer, Errno> {
        let write = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        let handle = header.unique & !AGAIN;
        match self.tree.open_as(handle, header.node, write).map_err(|e| self.record_failed(&e))? {
            Opened::Done => Ok(handle_answer(handle)),
            Opened::Gone => Err(Errno::STALE),
            Opened::Needs(version) => {
                let asked = AskedOf::Open { blob: version.blob, number: version.number };
                self.ask_daemon(header, asked, For::Open);
                Ok(Answer::Nothing)
            }
        }
    }

    /// The daemon has made the mirrored file that an opening needs.
    pub(crate) fn opened(&self, unique: u64, overlay: u64) -> Answer {
        let handle = unique & !AGAIN;
        match self.tree.open_file(handle, overlay) {
            Ok(true) => handle_answer(handle),
            Ok(false) => Answer::Error(Errno::STALE),
            Err(e) => Answer::Error(self.record_failed(&e)),
        }
    }

    fn ioctl(&self, header: &Header, target: Option<Target>, body: &[u8]) -> Result<Answer, Errno> {
        let (command, room) = (u32_at(body, 12), u32_at(body, 28));
        if command != IOCTL_COMMIT && command != IOCTL_CLONE {
            return Err(Errno::NOTTY);
        }
        let Some(Target::Overlay(overlay)) = target else { return Err(Errno::BADF) };
        let asked = if command == IOCTL_COMMIT {
            AskedOf::Commit { overlay }
        } else {
            let data = body.get(IOCTL_IN..).unwrap_or_default();
            let end = data.iter().position(|&b| b == 0).ok_or(Errno::NAMETOOLONG)?;
            let name = std::str::from_utf8(&data[..end]).map_err(|_| Errno::INVAL)?;
            AskedOf::Clone { overlay, name: name.to_owned() }
        };
        self.ask_daemon(header, asked, For::Ioctl { room });
        Ok(Answer::Nothing)
    }

    fn ask_daemon(&self, header: &Header, asked: AskedOf, what: For) {
        let token = format!("{}/{:x}", self.session_name, header.unique & !AGAIN);
        self.tree.desk.enter(token, asked, Asker { unique: header.unique, thread: header.thread, what });
    }

    fn list_tree(&self, node: u64, offset: u64, size: usize) -> Result<Answer, Errno> {
        let versions = self.objects.versions();
        let io = |e: VersionError| self.tree_failed(node, &e);
        // Names, kinds, and the place behind each.
        let mut entries: Vec<(u64, String, u8)> = Vec::new();
        if node == BLOB {
            let blobs = versions.blobs().map_err(io)?;
            let directory = |(at, blob): (u64, String)| (at, tree::directory_of(&blob), libc::DT_DIR);
            entries.extend((1..).zip(blobs).skip(offset as usize).take(NAMES).map(directory));
        } else {
            let Some(Node::Blob(blob)) = self.tree.node(node) else { return Err(Errno::NOTDIR) };
            if offset < VERSIONS_FROM {
                let entry = versions.blob(&blob).map_err(io)?.ok_or(Errno::STALE)?;
                let tags = entry.tags.into_keys().filter(|tag| tag != LATEST && !tag.contains('/'));
                let names = std::iter::once(LATEST.to_owned()).chain(tags);
                entries.extend((1..).zip(names).skip(offset as usize).map(|(at, name)| (at, name, libc::DT_LNK)));
            }
            let numbers = versions.blob_versions(&blob, offset.saturating_sub(VERSIONS_FROM), NAMES).map_err(io)?;
            entries.extend(numbers.into_iter().map(|n| (VERSIONS_FROM + n + 1, n.to_string(), libc::DT_REG)));
        }
        let mut body = Body::default();
        for (next, name, kind) in entries {
            if body.0.len() + 24 + name.len().next_multiple_of(8) > size {
                break;
            }
            // Inodes are given to what is looked up; a listing has to show some number.
            body = abi::dirent(body, tree::FIRST - 1, next, &name, kind);
        }
        Ok(Answer::Body(body.0))
    }

    fn tree_failed(&self, node: u64, error: &VersionError) -> Errno {
        self.problems.note(node, &format!("the tree of blobs: {error}"));
        Errno::IO
    }

    fn record_failed(&self, error: &std::io::Error) -> Errno {
        log::error!("the record of the tree of blobs cannot be written: {error}");
        error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
    }
}
