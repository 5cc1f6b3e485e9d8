//! Freezing: what the holder holds, and which writes the next freeze reports.
//!
//! The tests of tracking are the proof of the kernel behaviour that the crate's header relies on.

mod common;

use base::{ByteRange, RamFileId, RamMap, Source};
use common::{Driver, PAGE, Scratch, pages, pattern, status};

const PAGES: u64 = 4096;
const SIZE: u64 = PAGES * PAGE;

/// Pages 0..2048 of a file, the rest zero.
fn start(name: &str) -> (Scratch, Driver) {
    let scratch = Scratch::new(name);
    scratch.ram_file(1, 2048);
    let mut map = RamMap::zero(SIZE);
    map.set(pages(0, 2048), Source::File(RamFileId(1)));
    let driver = Driver::with_ram(&scratch, SIZE, Some(&map));
    (scratch, driver)
}

#[test]
fn a_holder_keeps_the_instant_while_the_parent_writes_on() {
    let (_scratch, mut driver) = start("instant");
    driver.fill(pages(0, 10), 1);
    driver.fill(pages(3000, 3010), 1);
    let mut resident = driver.connect();
    let first = resident.freeze();
    driver.fill(pages(0, 20), 2);
    driver.advise(pages(3000, 3005), libc::MADV_DONTNEED);
    driver.advise(pages(40, 50), libc::MADV_DONTNEED);
    let second = resident.freeze();
    driver.fill(pages(0, PAGES), 3);
    for (page, then, later) in [
        (0, 1, 2),
        (15, pattern(15), 2),
        (30, pattern(30), pattern(30)),
        (45, pattern(45), 0),
        (3002, 1, 0),
        (3009, 1, 1),
        (4000, 0, 0),
    ] {
        assert_eq!((first.byte(page * PAGE), second.byte(page * PAGE)), (then, later), "page {page}");
        assert_eq!(driver.get(page * PAGE), 3);
    }
}

#[test]
fn a_holder_is_inconspicuous_and_outlives_its_parent() {
    let (_scratch, driver) = start("holder");
    let mut resident = driver.connect();
    let held = resident.freeze();
    let parent = driver.pid();
    wait_until(|| status(held.holder, "cmdline").is_some_and(|line| line.trim_end_matches('\0') == "offshoot-hold"));
    assert_eq!(status(held.holder, "comm").unwrap(), "offshoot-hold\n");
    assert_eq!(std::fs::read_dir(format!("/proc/{}/fd", held.holder)).unwrap().count(), 0, "no descriptor is kept");
    assert_eq!(std::fs::read_link(format!("/proc/{}/cwd", held.holder)).unwrap().to_str(), Some("/"));
    let stat = status(held.holder, "stat").unwrap();
    let words: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    assert_eq!((words[19].parse(), words[3].parse()), (Ok(held.start), Ok(held.holder)), "start time and session");
    assert_ne!(status(parent as i32, "cmdline").unwrap().trim_end_matches('\0'), "offshoot-hold", "the parent's stays");
    assert_eq!(resident.ok("hello")["holders"], held.holder.to_string());
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGSEGV] {
        // SAFETY: a signal to the holder of this test.
        unsafe { libc::kill(held.holder, signal) };
    }
    drop(driver);
    assert_eq!(held.byte(7 * PAGE), pattern(7), "readable after the parent's death");
    // SAFETY: a signal to the holder of this test.
    unsafe { libc::kill(held.holder, libc::SIGKILL) };
    wait_until(|| status(held.holder, "stat").is_none_or(|stat| stat.contains(") Z ")));
}

#[test]
fn holders_are_released_and_reaped() {
    let (_scratch, driver) = start("release");
    let mut resident = driver.connect();
    let (a, b, c) = (resident.freeze(), resident.freeze(), resident.freeze());
    assert_eq!(resident.ok("hello")["holders"], format!("{},{},{}", a.holder, b.holder, c.holder));
    resident.ok(&format!("release {}", b.holder));
    assert!(status(b.holder, "stat").is_none(), "no zombie stays");
    // SAFETY: a signal to the holder of this test.
    unsafe { libc::kill(a.holder, libc::SIGKILL) };
    wait_until(|| status(a.holder, "stat").is_none_or(|stat| stat.contains(") Z ")));
    assert_eq!(driver.connect().ok("hello")["holders"], c.holder.to_string());
    assert!(status(a.holder, "stat").is_none(), "one killed by somebody else is reaped by the next request");
    for pid in [b.holder.to_string(), "1".to_owned(), "x".to_owned(), String::new()] {
        assert!(resident.error(&format!("release {pid}")).contains("no holder"), "{pid}");
    }
    resident.ok(&format!("release {}", c.holder));
    assert_eq!(resident.ok("hello")["holders"], "");
}

#[test]
fn the_first_freeze_names_all_anonymous_memory() {
    let (_scratch, mut driver) = start("first");
    driver.advise(pages(100, 120), libc::MADV_DONTNEED);
    let mut resident = driver.connect();
    let expected = [pages(100, 120), pages(2048, PAGES)];
    let first = resident.freeze();
    assert!(!first.tracked && first.written.is_empty());
    assert_eq!(first.zeroed, expected);
    driver.fill(pages(5, 6), 1);
    let all = resident.freeze_as("freeze all");
    assert!(!all.tracked && all.written.is_empty());
    assert_eq!(all.zeroed, expected);
    let next = resident.freeze();
    assert!(next.tracked && next.written.is_empty(), "`freeze all` starts counting anew: {next:?}");
}

/// Runs `act` between two freezes of a VM whose pages are in every state, and compares what is reported.
fn check(name: &str, act: impl Fn(&mut Driver), written: &[ByteRange], zeroed: &[ByteRange]) {
    let (_scratch, mut driver) = start(name);
    driver.touch(pages(0, 100)); // file pages read in
    driver.fill(pages(200, 300), 1); // private pages over the file
    driver.touch(pages(2100, 2200)); // the zero page
    driver.fill(pages(2300, 2400), 1); // anonymous pages
    let mut resident = driver.connect();
    assert!(!resident.freeze().tracked);
    for round in 0..3 {
        let quiet = resident.freeze();
        assert!(quiet.tracked, "{name}: userfaultfd and PAGEMAP_SCAN are there");
        assert!(quiet.written.is_empty() && quiet.zeroed.is_empty(), "{name} {round}: nothing happened: {quiet:?}");
        act(&mut driver);
        let found = resident.freeze();
        assert_eq!((found.written.as_slice(), found.zeroed.as_slice()), (written, zeroed), "{name}, round {round}");
    }
}

#[test]
fn every_write_is_reported_whatever_the_page_was() {
    let places = [
        ("unpopulated file page", 1000),
        ("file page that was read", 50),
        ("private page over the file", 250),
        ("unpopulated anonymous page", 3000),
        ("zero page", 2150),
        ("anonymous page", 2350),
        ("unpopulated, in an empty page table", 4090),
    ];
    for (what, page) in places {
        check(what, |driver| driver.fill(pages(page, page + 1), 9), &[pages(page, page + 1)], &[]);
        let by_kernel = |driver: &mut Driver| {
            assert_eq!(driver.ask(&format!("kernel-write {} 5", page * PAGE)), "4096");
        };
        check(what, by_kernel, &[pages(page, page + 1)], &[]);
        let read_first = |driver: &mut Driver| {
            driver.touch(pages(page, page + 1));
            driver.fill(pages(page, page + 1), 8);
        };
        check(what, read_first, &[pages(page, page + 1)], &[]);
    }
}

#[test]
fn reads_of_clean_pages_are_not_reported() {
    check("reading file pages", |driver| driver.touch(pages(0, 2048)), &[], &[]);
    check("reading written pages", |driver| driver.touch(pages(2300, 2400)), &[], &[]);
    check("reading the zero page", |driver| driver.touch(pages(2100, 2200)), &[], &[]);
}

#[test]
fn reading_untouched_zero_memory_reports_zeros_at_most_once() {
    let (_scratch, mut driver) = start("zeros");
    let mut resident = driver.connect();
    resident.freeze();
    driver.touch(pages(2500, 2600));
    let found = resident.freeze();
    assert!(found.written.is_empty());
    assert_eq!(found.zeroed, [pages(2500, 2600)]);
    driver.touch(pages(2500, 2600));
    assert!(resident.freeze().zeroed.is_empty());
    driver.fill(pages(2550, 2551), 1);
    assert_eq!(resident.freeze().written, [pages(2550, 2551)]);
}

#[test]
fn discards_are_zeroed_and_writes_after_them_written() {
    for (what, page) in [("file", 1000), ("read file", 50), ("private", 250), ("anonymous", 2350), ("untouched", 3000)]
    {
        let range = pages(page, page + 4);
        let discard = |driver: &mut Driver| drop(driver.advise(range, libc::MADV_DONTNEED));
        check(what, discard, &[], &[range]);
        let rewrite = |driver: &mut Driver| {
            driver.advise(range, libc::MADV_DONTNEED);
            driver.fill(pages(page + 1, page + 2), 4);
        };
        check(what, rewrite, &[pages(page + 1, page + 2)], &[pages(page, page + 1), pages(page + 2, page + 4)]);
        let write_then_discard = |driver: &mut Driver| {
            driver.fill(range, 4);
            driver.ask(&format!("punch {} {}", range.start, range.len()));
            driver.touch(range);
        };
        check(what, write_then_discard, &[], &[range]);
    }
}

#[test]
fn what_is_prepared_before_the_pause_is_not_lost() {
    let (_scratch, mut driver) = start("prepare");
    driver.fill(pages(2300, 2310), 1);
    let mut resident = driver.connect();
    resident.ok("prepare");
    driver.fill(pages(2304, 2312), 2);
    assert!(!resident.freeze().tracked, "the first freeze counts from the start, prepared or not");
    driver.fill(pages(100, 110), 3);
    driver.fill(pages(3000, 3010), 3);
    driver.touch(pages(500, 600));
    resident.ok("prepare");
    driver.fill(pages(108, 112), 4);
    driver.advise(pages(3004, 3006), libc::MADV_DONTNEED);
    resident.ok("prepare");
    driver.fill(pages(3005, 3006), 5);
    let found = resident.freeze();
    assert_eq!(found.written, [pages(100, 112), pages(3000, 3004), pages(3005, 3010)]);
    assert_eq!(found.zeroed, [pages(3004, 3005)]);
    let quiet = resident.freeze();
    assert!(quiet.tracked && quiet.written.is_empty() && quiet.zeroed.is_empty());
}

/// A model of RAM, changed at random together with the real one: after each freeze, applying what it reports to
/// the image of the freeze before must give the image the holder has.
#[test]
fn random_writes_and_discards_never_escape_a_freeze() {
    let (_scratch, mut driver) = start("random");
    let mut resident = driver.connect();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut image: Vec<u8> = (0..PAGES).map(|page| if page < 2048 { pattern(page) } else { 0 }).collect();
    for round in 0..12 {
        for _ in 0..60 {
            let from = random(PAGES);
            let range = pages(from, (from + 1 + random(40)).min(PAGES));
            match random(5) {
                0 => driver.touch(range),
                1 => drop(driver.advise(range, libc::MADV_DONTNEED)),
                2 => drop(driver.ask(&format!("punch {} {}", range.start, range.len()))),
                3 => driver.fill(pages(from, from + 1), 1 + random(255) as u8),
                _ => driver.fill(range, 1 + random(255) as u8),
            }
        }
        if random(2) == 0 {
            resident.ok("prepare");
            driver.fill(pages(random(PAGES / 2), PAGES / 2), 77);
            driver.advise(pages(random(PAGES), PAGES), libc::MADV_DONTNEED);
        }
        let frozen = resident.freeze();
        let now: Vec<u8> = (0..PAGES).map(|page| frozen.byte(page * PAGE)).collect();
        if frozen.tracked {
            for range in &frozen.zeroed {
                image[(range.start / PAGE) as usize..(range.end / PAGE) as usize].fill(0);
            }
            for page in frozen.written.iter().flat_map(|r| r.start / PAGE..r.end / PAGE) {
                image[page as usize] = now[page as usize];
            }
            let wrong: Vec<usize> = (0..PAGES as usize).filter(|&page| image[page] != now[page]).collect();
            assert_eq!(wrong, [0usize; 0], "round {round}: these pages changed unreported");
        }
        image = now;
        resident.ok(&format!("release {}", frozen.holder));
    }
}

fn wait_until(mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("it did not come about in 5 s");
}
