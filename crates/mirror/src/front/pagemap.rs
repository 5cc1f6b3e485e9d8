//! Which pages of a process are there: the kernel's `PAGEMAP_SCAN` (Linux 6.7; Documentation/admin-guide/mm/pagemap).

use base::ByteRange;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
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

/// A process's page table, open. It stays with that process when the pid is reused.
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// Says the addresses from `start` on that have a page, in memory or in swap, ascending. Touches none of them.
    ///
    /// # Errors
    /// The process is gone, or the kernel is too old.
    pub(crate) fn present(&self, start: u64, len: u64, mut each: impl FnMut(ByteRange)) -> io::Result<()> {
        let mut regions = vec![Region::default(); REGIONS];
        let (mut at, end) = (start, start + len);
        while at < end {
            let any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_anyof_mask: any,
                return_mask: any,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is the structure that this ioctl takes and writes; its vector is `regions`, whose length
            // it states, and which outlives the call.
            let filled = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
            if arg.walk_end <= at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for region in &regions[..filled] {
                each(ByteRange::new(region.start, region.end));
            }
            at = arg.walk_end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::PAGE;

    #[test]
    fn pages_are_seen_once_they_are_touched() {
        let pages = 1024;
        // Straight from the kernel, zero and untouched.
        let mut memory = vec![0_u8; pages * PAGE as usize];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let pagemap = Pagemap::open(std::process::id()).unwrap();
        let present = || {
            let mut found = Vec::new();
            pagemap.present(start, (pages as u64 - 1) * PAGE, |range| found.push(range)).unwrap();
            found
        };
        let before = present();
        let at = (start - memory.as_ptr() as u64) as usize + 700 * PAGE as usize;
        memory[at] = 1;
        std::hint::black_box(&mut memory);
        let (after, touched) = (present(), start + 700 * PAGE);
        assert!(!before.iter().any(|r| (r.start..r.end).contains(&touched)), "{before:?}");
        assert!(after.iter().any(|r| (r.start..r.end).contains(&touched)), "{after:?}");
    }
}
