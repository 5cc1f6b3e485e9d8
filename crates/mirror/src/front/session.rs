//! One FUSE session: its mount, its descriptor, and the messages the mirror sends unasked.
//!
//! The descriptor is the session. Every hypervisor keeps a copy of it, so the session, with its requests in flight,
//! outlives the mirror. A clone of it (`FUSE_DEV_IOC_CLONE`) would be another queue whose requests in flight die
//! with its last holder: never made.

use super::abi::{Body, OUT_HEADER, notify, put_header};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A session's descriptor.
#[derive(Debug)]
pub(crate) struct Session {
    fd: OwnedFd,
}

impl Session {
    /// Mounts a fresh file system at `mnt`, in place of dead ones that lie there.
    pub(crate) fn mount(mnt: &Path) -> io::Result<Self> {
        while is_mounted(mnt)? {
            log::warn!("unmounting {}, left by an earlier mirror", mnt.display());
            rustix::mount::unmount(mnt, UnmountFlags::DETACH)?;
        }
        fs::create_dir_all(mnt)?;
        let fd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), format!("/dev/fuse: {e}; is fuse in the kernel?"))
        })?;
        let uid = rustix::process::getuid().as_raw();
        let gid = rustix::process::getgid().as_raw();
        let options = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", fd.as_raw_fd());
        let options = CString::new(options).expect("no zero byte in it");
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
        rustix::mount::mount(c"offshoot-mirror", mnt, c"fuse.offshoot", flags, options.as_c_str())
            .map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("mounting {}: {e}", mnt.display())))?;
        Ok(Self { fd })
    }

    /// Takes over a session whose mirror died. Must come before the first request is read: it asks the kernel for
    /// all that the dead mirror had in hand, and would fetch this one's again.
    pub(crate) fn take_over(fd: OwnedFd) -> io::Result<Self> {
        let session = Self { fd };
        match session.send(notify::RESEND, &[]) {
            Ok(()) => Ok(session),
            Err(e) => {
                Err(io::Error::new(e.kind(), format!("resending the session's requests (Linux 6.9 or later): {e}")))
            }
        }
    }

    /// One of which nobody reads.
    #[cfg(test)]
    pub(crate) fn on(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// Puts `data` into the page cache of a file. False: the kernel does not know the file.
    pub(crate) fn store(&self, node: u64, offset: u64, data: &[u8]) -> io::Result<bool> {
        let size = u32::try_from(data.len()).expect("pieces are small");
        let head = Body::default().u64(node).u64(offset).u32(size).u32(0);
        known(self.send(notify::STORE, &[&head.0, data]))
    }

    /// Drops a file's pages from the page cache.
    pub(crate) fn drop_pages(&self, node: u64) -> io::Result<bool> {
        let body = Body::default().u64(node).u64(0).u64(0);
        known(self.send(notify::INVAL_INODE, &[&body.0]))
    }

    /// Lets the kernel forget a name.
    pub(crate) fn drop_name(&self, parent: u64, name: &str) -> io::Result<bool> {
        let len = u32::try_from(name.len()).expect("names are short");
        let body = Body::default().u64(parent).u32(len).u32(0).bytes(name.as_bytes()).bytes(&[0]);
        known(self.send(notify::INVAL_ENTRY, &[&body.0]))
    }

    fn send(&self, code: i32, parts: &[&[u8]]) -> io::Result<()> {
        let mut header = [0; OUT_HEADER];
        put_header(&mut header, 0, code, parts.iter().map(|p| p.len()).sum());
        let mut slices = vec![IoSlice::new(&header)];
        slices.extend(parts.iter().map(|p| IoSlice::new(p)));
        rustix::io::writev(&self.fd, &slices).map(drop).map_err(Into::into)
    }
}

fn known(sent: io::Result<()>) -> io::Result<bool> {
    match sent {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Unmounts; files still open or mapped keep the session alive until they are closed.
pub(crate) fn unmount(mnt: &Path) -> io::Result<()> {
    rustix::mount::unmount(mnt, UnmountFlags::DETACH).map_err(Into::into)
}

/// Whether something is mounted at `path`. Asks the kernel's list: a look at the path itself would wait for the
/// mirror that is gone.
pub(crate) fn is_mounted(path: &Path) -> io::Result<bool> {
    let parent = path.parent().and_then(|p| fs::canonicalize(p).ok());
    let Some(path) = parent.and_then(|p| Some(p.join(path.file_name()?))) else { return Ok(false) };
    let mounts = fs::read("/proc/self/mountinfo")?;
    let at = |line: &[u8]| line.split(|&b| b == b' ').nth(4).map(unescape);
    Ok(mounts.split(|&b| b == b'\n').any(|line| at(line).is_some_and(|m| m == path.as_os_str().as_bytes())))
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'\\').then(|| after.get(..3)).flatten().and_then(|o| std::str::from_utf8(o).ok());
        match code.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_mountinfo_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\"), b"/a b\\c\\");
        assert!(is_mounted(Path::new("/proc")).unwrap());
        assert!(!is_mounted(Path::new("/proc/sys/kernel")).unwrap());
        assert!(!is_mounted(Path::new("/no/such/place")).unwrap());
    }
}
