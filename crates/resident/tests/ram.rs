//! RAM under the library: what is mapped, what is refused, what a discard leaves.

mod common;

use base::{RamFileId, RamMap, Source};
use common::{Driver, PAGE, Scratch, mappings, pages, pattern};

const PAGES: u64 = 4096;
const SIZE: u64 = PAGES * PAGE;

/// Pages 0..1024 of file 1, 1024..2048 zero, 2048..3072 of file 2, the rest zero.
fn mixed() -> RamMap {
    let mut map = RamMap::zero(SIZE);
    map.set(pages(0, 1024), Source::File(RamFileId(1)));
    map.set(pages(2048, 3072), Source::File(RamFileId(0xAB)));
    map
}

fn mixed_driver(name: &str) -> (Scratch, Driver) {
    let scratch = Scratch::new(name);
    scratch.ram_file(1, 1024);
    scratch.ram_file(0xAB, PAGES);
    let driver = Driver::with_ram(&scratch, SIZE, Some(&mixed()));
    (scratch, driver)
}

#[test]
fn ram_is_what_the_map_says_and_writes_stay_private() {
    let (scratch, mut driver) = mixed_driver("map");
    let before = std::fs::read(scratch.0.join("0000000000000001")).unwrap();
    for (page, byte) in [(0, pattern(0)), (1023, pattern(1023)), (1024, 0), (2047, 0), (2048, pattern(2048)), (3072, 0)]
    {
        assert_eq!(driver.get(page * PAGE), byte, "page {page}");
    }
    driver.fill(pages(0, PAGES), 0xEE);
    assert_eq!(driver.get(5 * PAGE), 0xEE);
    assert_eq!(std::fs::read(scratch.0.join("0000000000000001")).unwrap(), before);
    assert!(std::fs::read(scratch.0.join("placeholder")).unwrap().iter().all(|&b| b == 0));
    let mut resident = driver.connect();
    let hello = resident.ok("hello");
    assert_eq!((hello["mapped"].as_str(), hello["size"].as_str()), ("1", SIZE.to_string().as_str()));
    let start = u64::from_str_radix(&hello["ram"], 16).unwrap();
    let maps = mappings(driver.pid(), start, SIZE);
    assert!(maps.iter().all(|m| m.contains(" rw-p ")), "{maps:?}");
    assert_eq!(maps.len(), 4, "{maps:?}");
}

#[test]
fn a_map_is_installed_later_once_or_not_at_all() {
    let scratch = Scratch::new("later");
    scratch.ram_file(1, 1024);
    let mut driver = Driver::with_ram(&scratch, SIZE, None);
    let mut resident = driver.connect();
    assert_eq!(resident.ok("hello")["mapped"], "0");
    let map = scratch.map_file(&mixed());
    let request = format!("map {}", map.display());
    assert!(resident.error(&request).contains("00000000000000ab"), "a RAM file is missing");
    scratch.ram_file(0xAB, 3071);
    assert!(resident.error(&request).contains("extent ends at"), "a RAM file is too short");
    assert_eq!(driver.get(0), 0, "a refused map leaves the placeholder");
    scratch.ram_file(0xAB, 3072);
    assert_eq!(resident.ok(&request)["extents"], "4");
    assert_eq!((driver.get(0), driver.get(3071 * PAGE)), (pattern(0), pattern(3071)));
    assert!(resident.error(&request).contains("installed already"));
    std::fs::write(&map, RamMap::zero(PAGE).encode()).unwrap();
    drop(driver);
    let driver = Driver::with_ram(&scratch, SIZE, None);
    assert!(driver.connect().error(&request).contains("covers 4096 bytes"));
    std::fs::write(&map, "offshoot-ram-map 1 8192\nzero 0 4096\n").unwrap();
    assert!(driver.connect().error(&request).contains("ends at 4096"));
    assert!(driver.connect().error("map /nonexistent").contains("No such file"));
}

#[test]
fn a_map_that_fails_at_the_start_fails_the_hypervisors_mmap() {
    let scratch = Scratch::new("fails");
    let placeholder = scratch.0.join("placeholder");
    std::fs::File::create(&placeholder).unwrap().set_len(SIZE).unwrap();
    let map = scratch.map_file(&mixed());
    let mut driver = Driver::start(&scratch, &placeholder, Some(&map), None);
    assert_eq!(driver.ask(&format!("open {}", placeholder.display())), "0");
    assert_eq!(driver.ask(&format!("mmap {SIZE}")), format!("errno {}", libc::ENOENT));
}

#[test]
fn the_ram_file_is_opened_read_only_and_never_made() {
    let scratch = Scratch::new("open");
    let absent = scratch.0.join("absent");
    let mut driver = Driver::start(&scratch, &absent, None, None);
    assert_eq!(driver.ask(&format!("open {}", absent.display())), format!("errno {}", libc::ENOENT));
    let other = scratch.0.join("other");
    assert_eq!(driver.ask(&format!("open {}", other.display())), "0", "other files are opened as asked");
    assert!(other.exists() && !absent.exists());
}

#[test]
fn huge_page_advice_is_refused_and_other_advice_reaches_every_mapping() {
    let (_scratch, mut driver) = mixed_driver("advice");
    assert_eq!(driver.advise(pages(0, PAGES), libc::MADV_HUGEPAGE), format!("errno {}", libc::EINVAL));
    assert_eq!(driver.connect().ok("stat")["refused_advice"], "2", "one at the start and one now");
    assert_eq!(driver.advise(pages(0, PAGES), libc::MADV_DONTDUMP), "0");
    driver.advise(pages(10, 20), libc::MADV_DONTNEED);
    let start = u64::from_str_radix(&driver.connect().ok("hello")["ram"], 16).unwrap();
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", driver.pid())).unwrap();
    let mut inside = false;
    let mut seen = 0;
    for line in smaps.lines() {
        if let Some((at, _)) = line.split_once('-').filter(|_| line.contains("p ") && !line.starts_with("VmFlags")) {
            inside = u64::from_str_radix(at, 16).is_ok_and(|at| (start..start + SIZE).contains(&at));
        }
        if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags: Vec<&str> = flags.split_ascii_whitespace().collect();
            for flag in ["nh", "dc", "dd", "nr"] {
                assert!(flags.contains(&flag), "{flag} is missing in {flags:?}");
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 6, "the discard split the first extent in three");
}

#[test]
fn a_discarded_page_reads_zero_whatever_it_was_and_can_be_written_again() {
    let (_scratch, mut driver) = mixed_driver("discard");
    driver.fill(pages(1, 2), 7);
    driver.fill(pages(1100, 1101), 7);
    for advice in [libc::MADV_DONTNEED, libc::MADV_REMOVE, libc::MADV_FREE] {
        for page in [0, 1, 1100, 1200, 2050] {
            assert_eq!(driver.advise(pages(page, page + 1), advice), "0");
            assert_eq!(driver.get(page * PAGE), 0, "page {page} after {advice}");
            driver.fill(pages(page, page + 1), 9);
            assert_eq!(driver.get(page * PAGE + 4095), 9, "page {page} written again");
        }
    }
    assert_eq!(driver.ask(&format!("punch {} {}", 5 * PAGE, 2000 * PAGE)), "0");
    for page in [5, 1000, 1100, 1500, 2004] {
        assert_eq!(driver.get(page * PAGE), 0, "page {page}");
    }
    assert_eq!(
        (driver.get(4 * PAGE), driver.get(3000 * PAGE)),
        (pattern(4), pattern(3000)),
        "neighbours are left alone"
    );
    let stat = driver.connect().ok("stat");
    assert_eq!(stat["discards"], "16");
    assert_eq!(stat["discarded_bytes"], ((15 + 2000) * PAGE).to_string());
}

#[test]
fn bytes_short_of_a_page_are_zeroed_in_place() {
    let (_scratch, mut driver) = mixed_driver("edges");
    assert_eq!(driver.ask(&format!("punch {} {}", PAGE + 100, 3 * PAGE)), "0");
    let around =
        [(PAGE + 99, pattern(1)), (PAGE + 100, 0), (2 * PAGE, 0), (4 * PAGE + 99, 0), (4 * PAGE + 100, pattern(4))];
    for (at, byte) in around {
        assert_eq!(driver.get(at), byte, "byte {at}");
    }
}

#[test]
fn a_balloon_page_by_page_leaves_one_mapping() {
    for frozen in [false, true] {
        let (_scratch, mut driver) = mixed_driver("balloon");
        if frozen {
            driver.connect().freeze();
        }
        driver.touch(pages(0, 600));
        driver.fill(pages(100, 200), 3);
        driver.ask(&format!("balloon {} {} 1", 50 * PAGE, 550 * PAGE));
        let hello = driver.connect().ok("hello");
        let maps = mappings(driver.pid(), u64::from_str_radix(&hello["ram"], 16).unwrap(), SIZE);
        assert_eq!(maps.len(), 6, "frozen {frozen}: {maps:#?}");
        assert_eq!(
            (driver.get(50 * PAGE), driver.get(49 * PAGE), driver.get(550 * PAGE)),
            (0, pattern(49), pattern(550))
        );
    }
}

#[test]
fn too_many_mappings_are_avoided_by_writing_zeros() {
    let scratch = Scratch::new("many");
    let pages_all = 40_000;
    scratch.ram_file(1, pages_all);
    let mut map = RamMap::zero(pages_all * PAGE);
    map.set(pages(0, pages_all), Source::File(RamFileId(1)));
    let mut driver = Driver::with_ram(&scratch, pages_all * PAGE, Some(&map));
    driver.connect().freeze();
    driver.ask(&format!("balloon 0 {} 2", pages_all * PAGE));
    let mut resident = driver.connect();
    let start = u64::from_str_radix(&resident.ok("hello")["ram"], 16).unwrap();
    let count = mappings(driver.pid(), start, pages_all * PAGE).len();
    assert!((12_000..=base::resident::MAPPINGS_MAX).contains(&count), "{count} mappings");
    let frozen = resident.freeze();
    assert!(frozen.tracked && !frozen.written.is_empty(), "pages overwritten with zeros count as written");
    for page in (0..pages_all).step_by(997) {
        let byte = if page % 2 == 0 { 0 } else { pattern(page) };
        assert_eq!((driver.get(page * PAGE), frozen.byte(page * PAGE)), (byte, byte), "page {page}");
    }
    let covered: u64 = frozen.written.iter().chain(&frozen.zeroed).map(|r| r.len()).sum();
    assert_eq!(covered, pages_all / 2 * PAGE, "every discarded page is in exactly one list");
}

/// Pages of RAM that the process has mapped or in swap.
fn present(pid: u32, start: u64) -> Vec<u64> {
    use std::os::unix::fs::FileExt;
    let mut entries = vec![0; PAGES as usize * 8];
    let file = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    file.read_exact_at(&mut entries, start / PAGE * 8).unwrap();
    let entries = entries.chunks_exact(8).map(|e| u64::from_le_bytes(e.try_into().unwrap()));
    entries.enumerate().filter(|(_, e)| e >> 62 != 0).map(|(page, _)| page as u64).collect()
}

#[test]
fn a_watched_page_is_mapped_only_when_it_is_touched() {
    let (_scratch, mut driver) = mixed_driver("watch");
    let mut resident = driver.connect();
    let start = u64::from_str_radix(&resident.ok("hello")["ram"], 16).unwrap();
    // The files were just written, so all of them is in the page cache.
    driver.get(100 * PAGE);
    assert!(present(driver.pid(), start).len() > 1, "the kernel maps neighbours: or the rest shows nothing");
    resident.ok("watch");
    // Far from those that came with the first: a file system may keep 2 MiB as one piece.
    for page in [517, 900, 2100] {
        driver.get(page * PAGE);
    }
    driver.fill(pages(700, 701), 1);
    let found: Vec<u64> = present(driver.pid(), start).into_iter().filter(|p| *p >= 512).collect();
    assert_eq!(found, [517, 700, 900, 2100]);
    // What is tracked later is what it would have been.
    assert_eq!(resident.ok("watch").len(), 0);
    let frozen = resident.ok("freeze");
    assert_eq!(frozen["tracked"], "0");
}
