use super::*;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end)
}

#[test]
fn ranges_join_over_small_gaps() {
    let mut list = Vec::new();
    for next in [range(0, 4), range(4, 6), range(8, 9), range(20, 21)] {
        push(&mut list, next, 2);
    }
    assert_eq!(list, [range(0, 9), range(20, 21)]);
}

/// The kernel collects 512 ranges at a time, and says where the last *full* collection ended even where it went on to
/// the end (Linux 6.7 to 6.18 at least): whoever goes on from there meets what was written meanwhile a second time,
/// below what was reported before.
#[test]
fn a_scan_of_many_ranges_reports_each_page_and_each_once_while_others_write() {
    const PAGES: u64 = 4096;
    const LAST: u64 = 4000;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the place; the memory stays mapped for the rest of this process.
    let start = unsafe { sys::mmap(0, (PAGES * PAGE) as usize, libc::PROT_READ | libc::PROT_WRITE, anonymous, -1, 0) };
    let start = start.unwrap();
    // SAFETY: this advice changes no contents.
    unsafe { sys::madvise(start, (PAGES * PAGE) as usize, libc::MADV_NOHUGEPAGE) }.unwrap();
    let write = move |page: u64| {
        // SAFETY: a byte of the mapping above, which is accessed as an atomic only.
        let byte = unsafe { &*((start + (page * PAGE) as usize) as *const std::sync::atomic::AtomicU8) };
        byte.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    };
    let mut tracker = Tracker::open();
    tracker.arm(start, PAGES * PAGE);
    assert!(tracker.armed(), "this kernel does not track writes");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Ends that thread however this one ends.
        struct Done<'a>(&'a std::sync::atomic::AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let _ended = Done(&done);
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                (1101..1200).step_by(2).for_each(write);
            }
        });
        for round in 0..300 {
            // 600 ranges and one: more than the kernel collects at a time.
            (0..1200).step_by(2).chain([LAST]).for_each(write);
            let found = tracker.scan(start, PAGES * PAGE, |_| Vec::new()).unwrap().written;
            assert!(found.windows(2).all(|pair| pair[0].end <= pair[1].start), "round {round}: out of order");
            for page in (0..1200).step_by(2).chain([LAST]) {
                let there = found.iter().any(|r| (r.start..r.end).contains(&(page * PAGE)));
                assert!(there, "round {round}: page {page} is missing");
            }
        }
    });
}
