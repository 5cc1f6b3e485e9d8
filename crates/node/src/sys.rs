//! What the kernel says about the pages of other processes.

use base::{Bitmap, ByteRange, PAGE};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

// Documentation/admin-guide/mm/pagemap.rst
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// The pages of one mapping, by how they came to be.
#[derive(Debug)]
pub struct Pages {
    /// Written by the process: anonymous, present or swapped.
    pub private: Bitmap,
    /// Present and backed by a file: shared with whoever maps the same.
    pub shared: Bitmap,
}

/// Looks at `size` bytes at `address` of process `pid`.
///
/// # Errors
/// Where `/proc/PID/pagemap` cannot be read: the process is gone, or we are not privileged.
pub fn pages(pid: u32, address: u64, size: u64) -> io::Result<Pages> {
    let file = File::open(format!("/proc/{pid}/pagemap"))?;
    let count = size / PAGE;
    let mut pages = Pages { private: Bitmap::new(count), shared: Bitmap::new(count) };
    let mut buffer = vec![0u8; 1 << 19];
    let mut page = 0;
    while page < count {
        let want = (buffer.len() as u64 / 8).min(count - page) as usize * 8;
        file.read_exact_at(&mut buffer[..want], (address / PAGE + page) * 8)?;
        for (i, entry) in buffer[..want].chunks_exact(8).enumerate() {
            let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if entry & (PRESENT | SWAPPED) == 0 {
                continue;
            }
            let set = if entry & FILE_OR_SHARED == 0 { &mut pages.private } else { &mut pages.shared };
            set.set(page + i as u64);
        }
        page += want as u64 / 8;
    }
    Ok(pages)
}

/// The memory of another process as a source of bytes; offset 0 is `address`.
#[derive(Debug)]
pub struct ProcessMemory {
    /// The process.
    pub pid: u32,
    /// Where offset 0 lies.
    pub address: u64,
}

/// Pages of which one call reads the beginnings: as many as the kernel takes pieces (`UIO_MAXIOV`).
const HEADS: usize = 1024;

impl ProcessMemory {
    /// Reads the first `each` bytes of every page from `offset` on, one after another into `into`.
    ///
    /// # Errors
    /// As for reading: the process is gone, or has no such memory.
    pub fn read_heads(&self, offset: u64, each: usize, into: &mut [u8]) -> io::Result<()> {
        let mut page = self.address + offset;
        for out in into.chunks_mut(HEADS * each) {
            let count = out.len() / each;
            let remote: Vec<libc::iovec> = (0..count)
                .map(|i| libc::iovec { iov_base: (page + i as u64 * PAGE) as *mut _, iov_len: each })
                .collect();
            let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
            let (pid, pieces) = (self.pid.cast_signed(), count as libc::c_ulong);
            // SAFETY: `local` describes `out`, which is exclusively borrowed for the call; the remote side is only read,
            // and the kernel checks its addresses.
            let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), pieces, 0) };
            match n {
                -1 => return Err(io::Error::last_os_error()),
                n if n.cast_unsigned() < out.len() => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => page += count as u64 * PAGE,
            }
        }
        Ok(())
    }
}

impl store::BlockSource for ProcessMemory {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = &mut buf[done..];
            let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
            let remote = libc::iovec { iov_base: (self.address + offset + done as u64) as *mut _, iov_len: rest.len() };
            // SAFETY: `local` describes `rest`, which is exclusively borrowed for the call; the remote side is
            // only read, and the kernel checks its addresses.
            let n =
                unsafe { libc::process_vm_readv(self.pid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
            match n {
                -1 => return Err(io::Error::last_os_error()),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n.cast_unsigned(),
            }
        }
        Ok(())
    }
}

/// Lets all threads of process `pid`, and those they start, run only when nobody else wants the processor (sched(7),
/// `SCHED_IDLE`), or takes that back. Only root may take it back, so for others nothing is done at all.
pub fn give_way(pid: u32, give: bool) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let param = libc::sched_param { sched_priority: 0 };
    let policy = if give { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    let mut done = std::collections::BTreeSet::new();
    // A thread that starts meanwhile may come from one that was not reached yet.
    loop {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let tasks: Vec<libc::pid_t> = tasks.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let new: Vec<_> = tasks.into_iter().filter(|task| done.insert(*task)).collect();
        if new.is_empty() {
            return;
        }
        for task in new {
            // SAFETY: the call takes a number and a structure that lives through it; a thread that is gone is an
            // error that needs no handling.
            unsafe { libc::sched_setscheduler(task, policy, &raw const param) };
        }
    }
}

/// Lets the calling thread, and those it starts, run only when nobody else wants the processor (sched(7),
/// `SCHED_IDLE`): what runs behind the backs of guests must not slow their start.
pub fn lowest_priority() {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: plain system calls on the calling thread with a pointer to a live local.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param);
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
    }
}

/// CPU seconds a process has used.
#[must_use]
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some(end) = stat.rfind(')') else { return 0.0 };
    let ticks: u64 =
        stat[end + 1..].split_ascii_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Whether written pages can be tracked here.
///
/// # Errors
/// Why not.
pub fn userfaultfd_opens() -> io::Result<()> {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: a system call without pointers; the descriptor it returns is owned at once.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) });
    Ok(())
}

/// Which of the first `size` bytes of a file are in the host's page cache (mincore(2)), by page. Brings none in.
///
/// # Errors
/// Where the file cannot be mapped, or its owner is another and does not let us know.
pub fn cached(file: &File, size: u64) -> io::Result<Bitmap> {
    let len = usize::try_from(size).map_err(io::Error::other)?;
    // SAFETY: a new mapping at a place of the kernel's choice, which nobody reads from.
    let mapped = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), len, rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED, file, 0)
    }?;
    let mut pages = vec![0u8; len.div_ceil(PAGE as usize)];
    // SAFETY: the range is the mapping above, and the vector has a byte for each of its pages.
    let asked = match unsafe { libc::mincore(mapped, len, pages.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: mapped above, and used by nobody else.
    unsafe { rustix::mm::munmap(mapped, len) }?;
    asked?;
    let mut cached = Bitmap::new(pages.len() as u64);
    for (page, _) in (0..).zip(&pages).filter(|(_, byte)| **byte & 1 == 1) {
        cached.set(page);
    }
    Ok(cached)
}

/// Ranges of whole pages that are set in `pages`.
#[must_use]
pub fn ranges(pages: &Bitmap) -> Vec<ByteRange> {
    pages.ranges(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::BlockSource;

    #[test]
    fn what_was_just_written_to_a_file_is_cached_and_its_holes_are_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(64 * PAGE).unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(40 * PAGE)).unwrap();
        std::io::Write::write_all(&mut file, &[1; 2 * PAGE as usize]).unwrap();
        let cached = cached(&file, 64 * PAGE).unwrap();
        assert_eq!(cached.iter().collect::<Vec<_>>(), [40, 41]);
    }

    #[test]
    fn a_page_that_was_written_is_private_and_an_untouched_one_is_nothing() {
        let size = 64 * PAGE as usize;
        let layout = std::alloc::Layout::from_size_align(size, PAGE as usize).unwrap();
        // SAFETY: the layout has a size; the memory is freed with the same layout below.
        let memory = unsafe { std::alloc::alloc(layout) };
        for page in [3usize, 4, 60] {
            // SAFETY: within the allocation.
            unsafe { memory.add(page * PAGE as usize).write_volatile(7) };
        }
        let pages = pages(std::process::id(), memory as u64, size as u64).unwrap();
        for page in [3, 4, 60] {
            assert!(pages.private.get(page), "page {page} was written");
        }
        let source = ProcessMemory { pid: std::process::id(), address: memory as u64 };
        let mut byte = [0];
        source.read(4 * PAGE, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        let mut heads = [0; 2];
        source.read_heads(3 * PAGE, 1, &mut heads).unwrap();
        assert_eq!(heads, [7, 7]);
        // SAFETY: allocated above with this layout, and not used after.
        unsafe { std::alloc::dealloc(memory, layout) };
    }
}
