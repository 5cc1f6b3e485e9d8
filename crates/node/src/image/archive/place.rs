//! The directory an archive is unpacked into, reached beneath one descriptor only.

use super::super::Error;
use super::entry::{Entry, Kind};
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub(super) struct Place {
    path: PathBuf,
    root: OwnedFd,
    /// Directories get their times at the end: entries within would change them.
    times: Vec<(PathBuf, i64)>,
}

impl Place {
    pub(super) fn new(path: &Path) -> Result<Self, Error> {
        let root = fs::open(path, DIRECTORY, Mode::empty()).map_err(|e| Error::io("open", path, e))?;
        Ok(Self { path: path.to_owned(), root, times: Vec::new() })
    }

    /// Makes `entry`, with `contents` where it is a file; else says what stood in the way.
    pub(super) fn put(&mut self, entry: &Entry, contents: &mut dyn Read) -> Result<(), String> {
        let (Some(name), Some(parent)) = (entry.path.file_name(), entry.path.parent()) else {
            return own(self.root.as_fd(), entry);
        };
        let parent = self.directory(parent)?;
        let at = parent.as_fd();
        if entry.kind == Kind::Directory {
            return self.put_directory(at, name.as_ref(), entry);
        }
        match fs::unlinkat(at, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => return Err("a directory of that name came before it".to_owned()),
            Err(e) => return Err(format!("cannot replace what came before it: {e}")),
        }
        let made = match &entry.kind {
            Kind::File => return put_file(at, name.as_ref(), entry, contents),
            Kind::HardLink(target) => return self.put_hard_link(at, name.as_ref(), target),
            Kind::Symlink(target) => fs::symlinkat(target.as_slice(), at, name),
            Kind::Fifo => fs::mknodat(at, name, FileType::Fifo, Mode::empty(), 0),
            &Kind::CharDevice(major, minor) => {
                fs::mknodat(at, name, FileType::CharacterDevice, Mode::empty(), fs::makedev(major, minor))
            }
            &Kind::BlockDevice(major, minor) => {
                fs::mknodat(at, name, FileType::BlockDevice, Mode::empty(), fs::makedev(major, minor))
            }
            Kind::Directory => unreachable!("made above"),
        };
        made.and_then(|()| fs::chownat(at, name, Some(uid(entry)), Some(gid(entry)), AtFlags::SYMLINK_NOFOLLOW))
            .map_err(said)?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            // Made a moment ago in a directory that is ours alone, so no link: chmod cannot be led astray.
            fs::chmodat(at, name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).map_err(said)?;
        }
        fs::utimensat(at, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(said)
    }

    /// Sets what had to wait for the last entry.
    pub(super) fn finish(&self) -> Result<(), Error> {
        for (path, mtime) in self.times.iter().rev() {
            // A later entry may have replaced the directory by something else; then there is nothing to set.
            if let Ok(dir) = fs::openat2(&self.root, path, DIRECTORY, Mode::empty(), BENEATH) {
                fs::futimens(dir, &times(*mtime))
                    .map_err(|e| Error::io("set the times of", &self.path.join(path), e))?;
            }
        }
        Ok(())
    }

    fn put_directory(&mut self, at: BorrowedFd<'_>, name: &Path, entry: &Entry) -> Result<(), String> {
        match fs::mkdirat(at, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(said(e)),
        }
        let dir = fs::openat(at, name, DIRECTORY, Mode::empty())
            .map_err(|_| "something that is no directory came before it under that name".to_owned())?;
        self.times.push((entry.path.clone(), entry.mtime));
        own(dir.as_fd(), entry)
    }

    fn put_hard_link(&self, at: BorrowedFd<'_>, name: &Path, target: &Path) -> Result<(), String> {
        let lost = || format!("a hard link to `{}`, which no entry before it made", target.display());
        let (Some(target_name), Some(parent)) = (target.file_name(), target.parent()) else { return Err(lost()) };
        let parent = self.open(parent).map_err(|e| if e == Errno::NOENT { lost() } else { led_outside(parent, e) })?;
        fs::linkat(parent, target_name, at, name, AtFlags::empty())
            .map_err(|e| if e == Errno::NOENT { lost() } else { said(e) })
    }

    fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        // A link on the way may be followed, but only to somewhere beneath the root.
        fs::openat2(&self.root, path, DIRECTORY.difference(OFlags::NOFOLLOW), Mode::empty(), BENEATH)
    }

    /// Opens the directory `path`, making what archives may leave out.
    fn directory(&self, path: &Path) -> Result<OwnedFd, String> {
        match self.open(path) {
            Ok(dir) => return Ok(dir),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(led_outside(path, e)),
        }
        let mut so_far = PathBuf::new();
        let mut dir = self.open(&so_far).map_err(said)?;
        for name in path {
            so_far.push(name);
            match fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(said(e)),
            }
            dir = self.open(&so_far).map_err(|e| led_outside(&so_far, e))?;
        }
        Ok(dir)
    }
}

fn put_file(at: BorrowedFd<'_>, name: &Path, entry: &Entry, contents: &mut dyn Read) -> Result<(), String> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(fs::openat(at, name, flags, Mode::RUSR | Mode::WUSR).map_err(said)?);
    let copied = std::io::copy(contents, &mut file).map_err(|e| format!("its contents do not arrive: {e}"))?;
    if copied < entry.size {
        return Err(format!("the archive is truncated: it ends {copied} bytes into {}", entry.size));
    }
    own(file.as_fd(), entry)?;
    fs::futimens(&file, &times(entry.mtime)).map_err(said)
}

/// Owner before mode, which a change of owner trims; attributes last, for the same reason.
fn own(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), String> {
    fs::fchown(fd, Some(uid(entry)), Some(gid(entry))).map_err(said)?;
    fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(said)?;
    for (name, value) in &entry.xattrs {
        fs::fsetxattr(fd, name.as_str(), value, XattrFlags::empty())
            .map_err(|e| format!("its attribute `{name}` cannot be set: {e}"))?;
    }
    Ok(())
}

fn uid(entry: &Entry) -> Uid {
    Uid::from_raw(entry.uid)
}

fn gid(entry: &Entry) -> Gid {
    Gid::from_raw(entry.gid)
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn said(e: Errno) -> String {
    format!("cannot be made: {e}")
}

fn led_outside(parent: &Path, e: Errno) -> String {
    match e {
        Errno::XDEV | Errno::LOOP => format!("its directory `{}` leads outside through a link", parent.display()),
        Errno::NOTDIR => format!("its directory `{}` is something else", parent.display()),
        e => format!("its directory `{}` cannot be reached: {e}", parent.display()),
    }
}
