//! Which pages of a process are there: the kernel's `PAGEMAP_SCAN` (Linux 6.7; Documentation/admin-guide/mm/pagemap).

use base::ByteRange;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
/// Ranges that one call may report.
const REGIONS: usize = 4096;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
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

/// How a page of a private mapping came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Written by the process, and its own: in memory or in swap.
    Own,
    /// Of the file that is mapped, as the file has it.
    File,
    /// Anonymous memory that was read and never written: the kernel's one page of zeros stands for it.
    Zero,
}

/// A process's page table, open. It stays with that process when the pid is reused.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Of a process.
    ///
    /// # Errors
    /// It is gone, or another's.
    pub fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Says the addresses from `start` on that have a page, in memory or in swap, ascending. Touches none of them.
    ///
    /// # Errors
    /// The process is gone, or the kernel is too old.
    pub(crate) fn present(&self, start: u64, len: u64, mut each: impl FnMut(ByteRange)) -> io::Result<()> {
        self.scan(start, len, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, |region| {
            each(ByteRange::new(region.start, region.end));
        })
    }

    /// As [`Pagemap::present`], with how each page came to be there.
    ///
    /// # Errors
    /// As [`Pagemap::present`].
    pub fn kinds(&self, start: u64, len: u64, mut each: impl FnMut(ByteRange, Kind)) -> io::Result<()> {
        let wanted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_FILE | PAGE_IS_PFNZERO;
        self.scan(start, len, wanted, |region| {
            let kind = match region.categories {
                of if of & PAGE_IS_PFNZERO != 0 => Kind::Zero,
                // A page in swap is no file's, whatever else is said of it.
                of if of & PAGE_IS_FILE != 0 && of & PAGE_IS_SWAPPED == 0 => Kind::File,
                _ => Kind::Own,
            };
            each(ByteRange::new(region.start, region.end), kind);
        })
    }

    fn scan(&self, start: u64, len: u64, categories: u64, mut each: impl FnMut(&Region)) -> io::Result<()> {
        let mut regions = vec![Region::default(); REGIONS];
        let (mut at, end) = (start, start + len);
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: categories,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is the structure that this ioctl takes and writes; its vector is `regions`, whose length
            // it states, and which outlives the call.
            let filled = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
            regions[..filled].iter().for_each(&mut each);
            // With room left the kernel was at the end, whatever it says: `walk_end` is where the last collection of
            // 512 ranges that was *full* ended, even where the walk went on from there.
            let stopped = if filled < REGIONS { end } else { regions[filled - 1].end.max(arg.walk_end) };
            if stopped <= at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at = stopped;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::PAGE;
    use std::os::fd::AsFd;

    #[test]
    fn pages_are_seen_once_they_are_touched() {
        let (len, touched) = (1024 * PAGE as usize, 700 * PAGE as usize);
        let (prot, private) =
            (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::PRIVATE);
        // Not from the allocator, which may hand out again what another test has touched.
        // SAFETY: the kernel chooses the place of a new mapping; it is unmapped below and not used after.
        let memory = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, private) }.unwrap();
        // SAFETY: this advice changes no contents.
        unsafe { rustix::mm::madvise(memory, len, rustix::mm::Advice::LinuxNoHugepage) }.unwrap();
        let pagemap = Pagemap::open(std::process::id()).unwrap();
        let present = || {
            let mut found = Vec::new();
            pagemap.present(memory as u64, len as u64, |range| found.push(range)).unwrap();
            found
        };
        let before = present();
        // SAFETY: a byte of the mapping.
        unsafe { memory.cast::<u8>().add(touched).write_volatile(1) };
        let after = present();
        // SAFETY: mapped above with this length.
        unsafe { rustix::mm::munmap(memory, len) }.unwrap();
        let page = memory as u64 + touched as u64;
        assert_eq!((before, after), (Vec::new(), vec![ByteRange::new(page, page + PAGE)]));
    }

    #[test]
    fn each_of_many_pages_is_told_once_and_in_order() {
        let pages = 2600;
        let (prot, private) =
            (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::PRIVATE);
        let len = pages * PAGE as usize;
        // SAFETY: the kernel chooses the place of a new mapping; it is unmapped below and not used after.
        let memory = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, private) }.unwrap();
        // SAFETY: this advice changes no contents.
        unsafe { rustix::mm::madvise(memory, len, rustix::mm::Advice::LinuxNoHugepage) }.unwrap();
        for page in (0..pages).step_by(2) {
            // SAFETY: a byte of the mapping.
            unsafe { memory.cast::<u8>().add(page * PAGE as usize).write_volatile(1) };
        }
        let mut found = Vec::new();
        let add = |range: ByteRange| found.push(((range.start - memory as u64) / PAGE, range.len() / PAGE));
        // 1,300 ranges: more than the kernel collects at a time.
        Pagemap::open(std::process::id()).unwrap().present(memory as u64, len as u64, add).unwrap();
        // SAFETY: mapped above with this length.
        unsafe { rustix::mm::munmap(memory, len) }.unwrap();
        assert_eq!(found, (0..pages as u64).step_by(2).map(|page| (page, 1)).collect::<Vec<_>>());
    }

    #[test]
    fn pages_are_told_apart_by_how_they_came_to_be() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[7; 8 * PAGE as usize]).unwrap();
        let len = 8 * PAGE as usize;
        let (prot, private) =
            (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::PRIVATE);
        // SAFETY: the kernel chooses the place of a new mapping; it is unmapped below and not used after.
        let mapped = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, private, file.as_fd(), 0) }.unwrap();
        // SAFETY: as above.
        let blank = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, private) }.unwrap();
        for memory in [mapped, blank] {
            // SAFETY: as above; what lies around the pages touched is to stay untouched, and not become huge pages.
            unsafe {
                rustix::mm::madvise(memory, len, rustix::mm::Advice::Random).unwrap();
                rustix::mm::madvise(memory, len, rustix::mm::Advice::LinuxNoHugepage).unwrap();
                memory.cast::<u8>().add(2 * PAGE as usize).read_volatile();
                memory.cast::<u8>().add(5 * PAGE as usize).write_volatile(1);
            }
        }
        let kinds = |memory: *mut std::ffi::c_void| {
            let mut found = Vec::new();
            let pagemap = Pagemap::open(std::process::id()).unwrap();
            let add =
                |range: ByteRange, kind| found.push(((range.start - memory as u64) / PAGE, range.len() / PAGE, kind));
            pagemap.kinds(memory as u64, len as u64, add).unwrap();
            found
        };
        // The kernel may map the neighbours of a file's page along with it.
        let of_file = kinds(mapped);
        let kind_of =
            |page: u64| of_file.iter().find(|(at, len, _)| (*at..at + len).contains(&page)).map(|(.., kind)| *kind);
        assert_eq!((kind_of(2), kind_of(5)), (Some(Kind::File), Some(Kind::Own)));
        assert!((0..8).filter(|page| *page != 5).all(|page| kind_of(page) != Some(Kind::Own)), "{of_file:?}");
        assert_eq!(kinds(blank), [(2, 1, Kind::Zero), (5, 1, Kind::Own)]);
        for memory in [mapped, blank] {
            // SAFETY: mapped above with this length.
            unsafe { rustix::mm::munmap(memory, len) }.unwrap();
        }
    }
}
