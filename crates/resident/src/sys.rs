//! The kernel's calls and structures, straight: no call here goes through a function this library interposes.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_API: libc::c_ulong = iowr(0xAA, 0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::c_ulong = iowr(0xAA, 0x00, size_of::<UffdioRegister>());

// include/uapi/linux/fs.h
const PAGEMAP_SCAN: libc::c_ulong = iowr(b'f', 16, size_of::<PmScanArg>());
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(crate) const PAGE_IS_FILE: u64 = 1 << 2;
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(crate) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(crate) const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

// include/uapi/asm-generic/mman-common.h
pub(crate) const MADV_DONTNEED_LOCKED: libc::c_int = 24;
pub(crate) const MADV_COLLAPSE: libc::c_int = 25;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct page_region`: pages of one set of categories, as addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What a `PAGEMAP_SCAN` selects: pages that have all of `mask` and, where `any` is not 0, one of `any`.
#[derive(Clone, Copy)]
pub(crate) struct Categories {
    pub(crate) mask: u64,
    pub(crate) any: u64,
    pub(crate) returned: u64,
}

const fn iowr(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as libc::c_ulong) << 16) | ((kind as libc::c_ulong) << 8) | number as libc::c_ulong
}

pub(crate) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

pub(crate) fn set_errno(errno: i32) {
    // SAFETY: glibc's errno location is valid for the calling thread at all times.
    unsafe { *libc::__errno_location() = errno };
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Opens a file to read, past the interposed `open`.
pub(crate) fn open_read(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0) };
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The whole text of a file, past the interposed `open`.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::from(open_read(path)?).read_to_string(&mut text)?;
    Ok(text)
}

/// Device, inode and size of an open file; `None` for a descriptor that is not open.
pub(crate) fn identity(fd: RawFd) -> Option<(u64, u64, u64)> {
    // SAFETY: all-zero bytes are a valid `stat`, which the kernel then fills.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is a live structure of the size the kernel writes.
    let done = unsafe { libc::syscall(libc::SYS_fstat, fd, &raw mut stat) };
    (done == 0).then_some((stat.st_dev, stat.st_ino, stat.st_size.max(0) as u64))
}

/// `mmap` of memory that belongs to this library or to guest RAM.
///
/// # Safety
/// With `MAP_FIXED` the range at `address` must be guest RAM: what lies there is replaced.
pub(crate) unsafe fn mmap(
    address: usize,
    len: usize,
    prot: libc::c_int,
    flags: libc::c_int,
    fd: RawFd,
    offset: u64,
) -> io::Result<usize> {
    // SAFETY: the caller answers for the range.
    check(unsafe { libc::syscall(libc::SYS_mmap, address, len, prot, flags, fd, offset) }).map(|at| at as usize)
}

pub(crate) unsafe fn munmap(address: usize, len: usize) -> io::Result<()> {
    // SAFETY: the caller owns the range.
    check(unsafe { libc::syscall(libc::SYS_munmap, address, len) }).map(drop)
}

/// Moves the pages of `from` over whatever lies at `to`.
///
/// # Safety
/// Both ranges must belong to the caller.
pub(crate) unsafe fn mremap_over(from: usize, len: usize, to: usize) -> io::Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller owns both ranges.
    check(unsafe { libc::syscall(libc::SYS_mremap, from, len, len, flags, to) }).map(drop)
}

/// `madvise` past the interposed one.
///
/// # Safety
/// Advice that drops contents must be meant for the range.
pub(crate) unsafe fn madvise(address: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the caller answers for the range.
    check(unsafe { libc::syscall(libc::SYS_madvise, address, len, advice) }).map(drop)
}

/// Names the calling thread.
pub(crate) fn set_thread_name(name: &std::ffi::CStr) {
    // SAFETY: `name` is NUL-terminated and outlives the call.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// A userfaultfd that marks writes asynchronously, in memory not populated yet as well.
pub(crate) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: the call takes flags alone.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    let mut api = UffdioApi { api: UFFD_API, features: UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, ioctls: 0 };
    // SAFETY: `api` is the structure this ioctl reads and writes.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
    Ok(fd)
}

/// Registers `start..start + len` for asynchronous write protection.
pub(crate) fn uffd_register(uffd: &OwnedFd, start: usize, len: usize) -> io::Result<()> {
    let mut arg = UffdioRegister { start: start as u64, len: len as u64, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: `arg` is the structure this ioctl reads and writes; registration changes no contents.
    check(unsafe { libc::syscall(libc::SYS_ioctl, uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) }).map(drop)
}

/// Reports pages in a range of addresses that match; with `protect`, write-protects exactly those it reports.
/// Returns how many entries of `out` it filled, and from where to go on: nothing below is left to report.
pub(crate) fn pagemap_scan(
    pagemap: &OwnedFd,
    addresses: std::ops::Range<u64>,
    what: Categories,
    protect: bool,
    out: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: if protect { PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC } else { 0 },
        start: addresses.start,
        end: addresses.end,
        vec: out.as_mut_ptr() as u64,
        vec_len: out.len() as u64,
        category_mask: what.mask,
        category_anyof_mask: what.any,
        return_mask: what.returned,
        ..PmScanArg::default()
    };
    // SAFETY: `arg` is the structure this ioctl takes, and its vector is `out`, whose length it states.
    let filled = check(unsafe { libc::syscall(libc::SYS_ioctl, pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) })?;
    let (filled, end) = (filled as usize, addresses.end);
    // The kernel collects 512 ranges at a time, and says where the last of its collections that was *full* ended, even
    // where it went on from there to the end (Linux 6.7 to 6.18 at least). With room left in `out` it was at the end.
    let stopped = if filled < out.len() { end } else { out.last().map_or(end, |last| last.end.max(arg.walk_end)) };
    Ok((filled, stopped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!((UFFDIO_API, UFFDIO_REGISTER, PAGEMAP_SCAN), (0xc018_aa3f, 0xc020_aa00, 0xc060_6610));
    }
}
