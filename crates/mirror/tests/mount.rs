//! The file system as a hypervisor sees it, over a real mount. Needs root and /dev/fuse.

mod common;

use base::{ByteRange, RamFileId, RamMap, Source};
use common::{Aligned, Mapping, Mirror, PAGE, bytes, in_child, kill, reap};
use mirror::{Below, Holder, OverlaySpec, RamSource, RamSpec, process_start};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
#[ignore = "is the mirror of the other tests"]
fn mirror_process() {
    common::mirror_process();
}

fn own(id: u64, len: usize) -> RamMap {
    let mut map = RamMap::zero(len as u64);
    map.set(ByteRange::new(0, len as u64), Source::File(RamFileId(id)));
    map
}

fn ram(id: u64, map: &RamMap, source: RamSource) -> RamSpec {
    RamSpec { id, map: map.encode(), source }
}

#[test]
fn ram_reads_right_is_shared_and_cannot_be_written() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let len = 64 * PAGE;
    let content = bytes(1, len);
    mirror.put_version("v", &content);
    let mut map = own(0x100, len);
    map.set(ByteRange::new(0, 8 * PAGE as u64), Source::Zero);
    client.add_ram(ram(0x100, &map, RamSource::Committed("v".to_owned()))).unwrap();
    client.register_vm("web", std::process::id()).unwrap();
    let path = mirror.ram(0x100);
    let check = || {
        let mapping = Mapping::of(&path, len);
        assert!(mapping.bytes()[..8 * PAGE].iter().all(|&b| b == 0));
        assert!(mapping.bytes()[8 * PAGE..] == content[8 * PAGE..]);
    };
    check();
    let stats = &client.stats(Some("web")).unwrap().vms["web"];
    assert_eq!((stats.ram_faults, stats.ram_fetched_bytes), (64, len as u64), "readahead of one page");
    assert_eq!((stats.ram_from_store_bytes, stats.ram_from_holder_bytes), (56 * PAGE as u64, 0));
    assert_eq!(stats.ram_latency_us.iter().sum::<u64>(), 64);
    assert_eq!(reap(in_child(check)), 0);
    let again = client.stats(None).unwrap();
    assert_eq!((again.vms["web"].ram_faults, again.others.ram_faults), (64, 0), "a second mapping fetches nothing");
    for mode in [OpenOptions::new().write(true), OpenOptions::new().read(true).write(true)] {
        assert_eq!(mode.open(&path).unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
    let truncated = OpenOptions::new().read(true).open(&path).unwrap().set_len(0);
    assert!(truncated.is_err());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), len as u64);
    assert_eq!(std::fs::read_dir(mirror.home.join("mnt/ram")).unwrap().count(), 1);
    assert_eq!(client.remove(&[0x100]).unwrap().removed, [0x100]);
    assert!(!path.exists());
}

#[test]
fn holder_gives_way_to_store_in_the_middle_of_reads() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let len = 2048 * PAGE;
    let content = bytes(2, len);
    mirror.put_version("v", &content);
    for round in 0..3 {
        let id = 0x100 + round;
        // A copy of this process stands for the stopped hypervisor: its memory is the frozen image.
        let pid = in_child(|| {
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        let pid_u32 = pid.cast_unsigned();
        let holder = Holder { pid: pid_u32, start: process_start(pid_u32).unwrap(), address: content.as_ptr() as u64 };
        client.add_ram(ram(id, &own(id, len), RamSource::Pending(holder))).unwrap();
        let mapping = Mapping::of(&mirror.ram(id), len);
        let half = AtomicBool::new(false);
        std::thread::scope(|s| {
            for thread in 0..4 {
                let (mapping, content, half) = (&mapping, &content, &half);
                s.spawn(move || {
                    for page in (thread..2048).step_by(4) {
                        half.fetch_or(page > 700, Ordering::Relaxed);
                        assert!(mapping.page(page) == &content[page * PAGE..(page + 1) * PAGE], "page {page}");
                    }
                });
            }
            while !half.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            client.set_ram_committed(id, "v").unwrap();
            kill(pid);
            assert_eq!(reap(pid), -libc::SIGKILL);
        });
        let stats = client.stats(None).unwrap();
        assert_eq!(stats.waiting, []);
        assert!(stats.others.ram_from_holder_bytes > 0 && stats.others.ram_from_store_bytes > 0);
    }
}

#[test]
fn a_lost_holder_makes_readers_wait_and_is_named() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let content = bytes(3, 16 * PAGE);
    let pid = in_child(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    let holder = Holder {
        pid: pid.cast_unsigned(),
        start: process_start(pid.cast_unsigned()).unwrap(),
        address: content.as_ptr() as u64,
    };
    client.add_ram(ram(0x100, &own(0x100, content.len()), RamSource::Pending(holder))).unwrap();
    kill(pid);
    reap(pid);
    let (path, known) = (mirror.ram(0x100), mirror.home.join("known"));
    let (wanted, go) = (content[0], known.clone());
    // It reads when the mirror knows whose it is: a read counts for whom its reader was when it began.
    let reader = in_child(move || {
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(Mapping::of(&path, PAGE).bytes()[0], wanted);
    });
    client.register_vm("web", reader.cast_unsigned()).unwrap();
    std::fs::write(known, "").unwrap();
    let waiting = wait_for(|| client.stats(Some("web")).unwrap().waiting.pop());
    assert_eq!((waiting.object, waiting.vm.as_deref()), (0x100, Some("web")));
    assert!(waiting.why.contains("0000000000000100") && waiting.why.contains("lost"), "{}", waiting.why);
    // Another reader, given up, dies at once and leaves nobody waiting for it.
    let path = mirror.ram(0x100);
    let doomed = in_child(move || assert_eq!(Mapping::of(&path, 2 * PAGE).bytes()[PAGE], 0));
    wait_for(|| (client.stats(None).unwrap().waiting.len() == 2).then_some(()));
    kill(doomed);
    assert_eq!(reap(doomed), -libc::SIGKILL);
    wait_for(|| (client.stats(None).unwrap().waiting.len() == 1).then_some(()));
    mirror.put_version("v", &content);
    client.set_ram_committed(0x100, "v").unwrap();
    assert_eq!(reap(reader), 0, "it waited and then read the right byte");
}

#[test]
fn a_store_that_is_down_or_corrupt_stalls_ram_and_serves_nothing_wrong() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let content = bytes(4, 4 * PAGE);
    mirror.put_version("v", &content);
    mirror.put_version("down", b"");
    client.add_ram(ram(0x100, &own(0x100, content.len()), RamSource::Committed("v".to_owned()))).unwrap();
    client.add_ram(ram(0x101, &own(0x101, content.len()), RamSource::Committed("corrupt".to_owned()))).unwrap();
    let path = mirror.ram(0x100);
    let wanted = content.clone();
    let reader = in_child(move || assert!(Mapping::of(&path, wanted.len()).bytes() == wanted));
    wait_for(|| client.stats(None).unwrap().waiting.pop().filter(|w| w.why.contains("down")));
    std::fs::remove_file(mirror.store.join("down")).unwrap();
    assert_eq!(reap(reader), 0);
    let path = mirror.ram(0x101);
    let stuck = in_child(move || drop(std::hint::black_box(Mapping::of(&path, PAGE).bytes().to_vec())));
    let waiting = wait_for(|| client.stats(None).unwrap().waiting.pop().filter(|w| w.object == 0x101));
    assert!(waiting.why.contains("corrupt"), "{}", waiting.why);
    let problems = client.stats(None).unwrap().problems;
    assert!(problems.iter().any(|p| p.object == 0x101 && p.what.contains("corrupt")), "{problems:?}");
    // Many more readers wait than there are workers, and others are served all the same.
    let stalled: Vec<_> = (0..40)
        .map(|i| {
            let path = mirror.ram(0x101);
            in_child(move || drop(std::hint::black_box(Mapping::of(&path, 4 * PAGE).page(i % 4).to_vec())))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(50));
    mirror.put_version("w", &content);
    client.add_ram(ram(0x102, &own(0x102, content.len()), RamSource::Committed("w".to_owned()))).unwrap();
    assert!(Mapping::of(&mirror.ram(0x102), content.len()).bytes() == content);
    for pid in stalled.into_iter().chain([stuck]) {
        kill(pid);
        reap(pid);
    }
    wait_for(|| client.stats(None).unwrap().waiting.is_empty().then_some(()));
}

#[track_caller]
fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "it did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_forks_and_each_copy_is_its_own() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let size = 3 << 20;
    let mut now = bytes(5, size - 12345);
    mirror.put_version("image", &now);
    now.resize(size, 0);
    let spec = |id, below| OverlaySpec { id, vm: format!("vm{id}"), size: size as u64, block_size: 4096, below };
    client.add_overlay(spec(0x20, Below::Version("image".to_owned()))).unwrap();
    let parent = mirror.open_disk(0x20);
    let mut buf = Aligned::new(size);
    parent.read_exact_at(buf.get(size), 0).unwrap();
    assert!(buf.get(size) == now);
    let put = |file: &std::fs::File, at: usize, data: &[u8]| {
        let mut buf = Aligned::new(data.len());
        buf.get(data.len()).copy_from_slice(data);
        file.write_all_at(buf.get(data.len()), at as u64).unwrap();
    };
    put(&parent, 1 << 20, &[0x11; 8192]);
    now[1 << 20..(1 << 20) + 8192].fill(0x11);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for (mode, at, len) in [(mode, 100_000, 50_000), (libc::FALLOC_FL_ZERO_RANGE, 2 << 20, 4096)] {
        // SAFETY: an open descriptor and plain numbers.
        let done = unsafe { libc::fallocate(parent.as_raw_fd(), mode, at as i64, len as i64) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        now[at..at + len].fill(0);
    }
    parent.sync_data().unwrap();
    client.mark(0x20, 0x30).unwrap();
    client.add_overlay(spec(0x21, Below::View(0x30))).unwrap();
    let child = mirror.open_disk(0x21);
    put(&parent, 0, &[0x22; 4096]);
    put(&child, 4096, &[0x33; 4096]);
    let mut of_child = now.clone();
    of_child[4096..8192].fill(0x33);
    now[..4096].fill(0x22);
    for (file, wanted) in [(&parent, &now), (&child, &of_child)] {
        file.read_exact_at(buf.get(size), 0).unwrap();
        assert!(buf.get(size) == wanted.as_slice());
    }
    let changes = client.view(0x30).unwrap();
    assert_eq!(changes.below, Below::Version("image".to_owned()));
    assert!(changes.dirty.contains(&(1 << 20, (1 << 20) + 8192)), "{changes:?}");
    assert!(changes.zeroed.contains(&(102_400, 147_456)), "{changes:?}");
    assert!(parent.write_at(&[0; 10], size as u64).is_err(), "a disk does not grow");
    assert!(parent.set_len(10).is_err(), "nor shrink");
    let stats = client.stats(None).unwrap();
    assert_eq!((stats.vms["vm32"].disk_reads, stats.vms["vm32"].disk_hits), (6, 3));
    assert_eq!(stats.vms["vm32"].disk_flushes, 1);
    assert_eq!(client.remove(&[0x30, 0x20, 0x21]).unwrap().removed.len(), 3);
}

#[test]
fn unaligned_requests_of_many_threads_hold_what_was_written_last() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let size = 1 << 20;
    mirror.put_version("image", &bytes(6, size));
    let below = Below::Version("image".to_owned());
    client
        .add_overlay(OverlaySpec { id: 0x20, vm: "a".to_owned(), size: size as u64, block_size: 16384, below })
        .unwrap();
    // Each thread owns every fourth piece of 1000 bytes: all of them write into the same blocks.
    std::thread::scope(|s| {
        for thread in 0..4u8 {
            let file = OpenOptions::new().read(true).write(true).open(mirror.disk(0x20)).unwrap();
            s.spawn(move || {
                for piece in (usize::from(thread)..1000).step_by(4) {
                    file.write_all_at(&[thread + 1; 1000], piece as u64 * 1000).unwrap();
                }
            });
        }
    });
    let all = std::fs::read(mirror.disk(0x20)).unwrap();
    for (piece, got) in all.chunks(1000).take(1000).enumerate() {
        assert!(got.iter().all(|&b| usize::from(b) == piece % 4 + 1), "piece {piece}");
    }
    assert!(all[1_000_000..] == bytes(6, size)[1_000_000..]);
}

/// Whether a page of a file is in the page cache, by `cachestat(2)` (Linux 6.5).
fn is_cached(file: &File, offset: u64) -> bool {
    let (range, mut found) = ([offset, 1], [0u64; 5]);
    // SAFETY: the kernel reads two words and writes five, which live through the call.
    let asked = unsafe { libc::syscall(451, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
    found[0] > 0
}

/// Requests of all lengths about those at which a disk changes from the page cache to direct reads and writes, on
/// blocks of several sizes, against an array.
fn hold_what_an_array_holds(mirror: &Mirror, id: u64, block_size: u64) {
    const SIZE: usize = 2 << 20;
    let mut array = bytes(block_size, SIZE);
    mirror.put_version("image", &array);
    let below = Below::Version("image".to_owned());
    mirror.client().add_overlay(OverlaySpec { id, vm: "a".to_owned(), size: SIZE as u64, block_size, below }).unwrap();
    let (past, through) = (mirror.open_disk(id), File::options().read(true).write(true).open(mirror.disk(id)).unwrap());
    let mut buf = Aligned::new(SIZE);
    let mut seed = block_size;
    let mut draw = |below: usize| {
        seed = u64::from_le_bytes(bytes(seed, 8).try_into().unwrap());
        (seed >> 8) as usize % below
    };
    for round in 0..600 {
        let near = [512, 4096, 64 << 10, 128 << 10, 256 << 10][draw(5)];
        let unit = [1, 512, 4096][draw(3)];
        let len = (near + draw(9) * unit).saturating_sub(4 * unit).max(unit).next_multiple_of(unit);
        let at = draw((SIZE - len) / unit) * unit;
        let file = if unit == 1 { &through } else { &past };
        match draw(5) {
            0 | 1 => {
                let data = bytes(round, len);
                buf.get(len).copy_from_slice(&data);
                file.write_all_at(buf.get(len), at as u64).unwrap();
                array[at..at + len].copy_from_slice(&data);
            }
            2 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: an open descriptor and plain numbers.
                let punched = unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) };
                assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
                array[at..at + len].fill(0);
            }
            _ => {}
        }
        if draw(4) == 0 {
            mirror.drop_layers();
        }
        let at = draw((SIZE - len) / unit) * unit;
        file.read_exact_at(buf.get(len), at as u64).unwrap();
        assert!(buf.get(len) == &array[at..at + len], "blocks of {block_size}, round {round}: {len} bytes at {at}");
    }
    assert!(std::fs::read(mirror.disk(id)).unwrap() == array, "blocks of {block_size}");
}

#[test]
fn requests_of_every_length_hold_what_an_array_holds() {
    let mirror = Mirror::start();
    for (id, block_size) in [(0x20, 512), (0x21, 4096), (0x22, 64 << 10)] {
        hold_what_an_array_holds(&mirror, id, block_size);
    }
}

#[test]
fn a_file_system_without_direct_access_serves_as_well() {
    for kind in [c"tmpfs", c"ramfs"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let at = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: strings that end in a zero byte and live through the call.
        let mounted = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        {
            let mirror = Mirror::start_in(dir);
            hold_what_an_array_holds(&mirror, 0x20, 4096);
            let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(mirror.store.join("image"));
            assert_eq!(direct.is_err(), kind == c"ramfs", "ramfs is here because it refuses O_DIRECT");
        }
        common::unmount(&path);
    }
}

#[test]
fn what_one_disk_alone_holds_is_read_and_written_past_the_page_cache() {
    const LONG: usize = 256 << 10;
    let mirror = Mirror::start();
    let size = 1 << 20;
    let spec = OverlaySpec { id: 0x20, vm: "a".to_owned(), size, block_size: 4096, below: Below::Zero };
    mirror.client().add_overlay(spec).unwrap();
    let disk = mirror.open_disk(0x20);
    let mut buf = Aligned::new(LONG);
    let content = bytes(7, LONG);
    buf.get(LONG).copy_from_slice(&content);
    disk.write_all_at(buf.get(LONG), 0).unwrap();
    let layers = mirror.drop_layers();
    disk.write_all_at(buf.get(LONG), 512 << 10).unwrap();
    for page in (0..LONG as u64).step_by(4096) {
        disk.read_exact_at(buf.get(4096), page).unwrap();
        assert!(buf.get(4096) == &content[page as usize..page as usize + 4096]);
    }
    let written: Vec<_> = layers.iter().filter(|file| file.metadata().unwrap().len() > 0).collect();
    assert_eq!(written.len(), 1, "one layer holds all of it");
    for at in [0, 4096, 512 << 10, (768 << 10) - 4096] {
        assert!(!is_cached(written[0], at), "{at}");
    }
    let stats = &mirror.client().stats(None).unwrap().vms["a"];
    assert_eq!((stats.disk_reads, stats.disk_read_bytes, stats.disk_hits), (64, LONG as u64, 64));
    // And what many share is worth the cache.
    mirror.client().mark(0x20, 0x30).unwrap();
    disk.read_exact_at(buf.get(4096), 8192).unwrap();
    assert!(buf.get(4096) == &content[8192..12288] && is_cached(written[0], 8192));
}

/// A fork of many registers them all at once.
#[test]
fn reads_behind_the_end_find_nothing_and_end_no_worker() {
    let mirror = Mirror::start();
    let size = 1 << 20;
    let spec = OverlaySpec { id: 0x20, vm: "a".to_owned(), size, block_size: 4096, below: Below::Zero };
    mirror.client().add_overlay(spec).unwrap();
    let disk = mirror.open_disk(0x20);
    // More of them than there may be workers. By another thread, since one that nobody answers waits for ever.
    let (done, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buf = Aligned::new(8192);
        let behind = (0..100).map(|n| size + (n << 20)).chain([i64::MAX as u64 & !0xffff]);
        let found: Vec<_> = behind.map(|at| disk.read_at(buf.get(4096), at).unwrap_or(1)).collect();
        done.send((found, disk.read_at(buf.get(8192), size - 4096).unwrap_or(0)))
    });
    let (behind, last) = end.recv_timeout(Duration::from_secs(60)).expect("a read behind the end is answered");
    assert_eq!((behind, last), (vec![0; 101], 4096));
}

#[test]
fn vms_that_are_registered_at_once_are_all_kept() {
    let mirror = Mirror::start();
    std::thread::scope(|scope| {
        for vm in 1..=16 {
            let mut client = mirror.client();
            scope.spawn(move || {
                for _ in 0..20 {
                    client.register_vm(&format!("vm-{vm}"), vm).unwrap();
                }
            });
        }
    });
    assert_eq!(mirror.client().list().unwrap().vms.len(), 16);
}

#[test]
fn demand_overtakes_prefetch() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let len = 4096 * PAGE;
    let content = bytes(7, len);
    mirror.put_version("v", &content);
    mirror.put_version("slow", b"10000");
    client.add_ram(ram(0x100, &own(0x100, len), RamSource::Committed("v".to_owned()))).unwrap();
    client.register_vm("web", 1).unwrap();
    let mapping = Mapping::of(&mirror.ram(0x100), len);
    let queued = client.prefetch(0x100, &[ByteRange::new(0, len as u64 / 2)], Some("web")).unwrap();
    assert_eq!(queued.bytes, len as u64 / 2);
    std::thread::sleep(Duration::from_millis(30));
    for page in [4000, 3000, 3500, 2500] {
        let began = Instant::now();
        assert!(mapping.page(page) == &content[page * PAGE..(page + 1) * PAGE]);
        let took = began.elapsed();
        assert!(took < Duration::from_millis(80), "a fault took {took:?}: it stood in line");
    }
    assert_eq!(client.stats(None).unwrap().prefetch_queued, 1, "prefetch was still at it");
    std::fs::remove_file(mirror.store.join("slow")).unwrap();
    wait_for(|| (client.stats(None).unwrap().prefetch_queued == 0).then_some(()));
    let faults = client.stats(None).unwrap().others.ram_faults;
    assert!(mapping.bytes()[..len / 2] == content[..len / 2]);
    let stats = client.stats(None).unwrap();
    assert_eq!(stats.others.ram_faults, faults, "what was prefetched is not asked for again");
    assert_eq!(stats.vms["web"].ram_prefetched_bytes, len as u64 / 2);
    let below = Below::Version("v".to_owned());
    let disk = OverlaySpec { id: 0x20, vm: "web".to_owned(), size: len as u64, block_size: 4096, below };
    client.add_overlay(disk).unwrap();
    client.prefetch(0x20, &[ByteRange::new(0, len as u64)], None).unwrap();
    wait_for(|| (client.stats(None).unwrap().prefetch_queued == 0).then_some(()));
    assert!(std::fs::read(mirror.disk(0x20)).unwrap() == content);
    let stats = &client.stats(None).unwrap().vms["web"];
    assert_eq!((stats.disk_reads, stats.disk_fetched_bytes), (stats.disk_hits, len as u64));
}

/// More flushes and writes at once than there are workers: faults and marks pass them by.
#[test]
fn guests_that_flush_hold_up_neither_faults_nor_marks() {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let len = 2000 * PAGE;
    mirror.put_version("v", &bytes(8, len));
    client.add_ram(ram(0x100, &own(0x100, len), RamSource::Committed("v".to_owned()))).unwrap();
    let overlay = |id| OverlaySpec { id, vm: "vm".to_owned(), size: 8 << 30, block_size: 4096, below: Below::Zero };
    for id in 0x1000..0x1030 {
        client.add_overlay(overlay(id)).unwrap();
    }
    client.add_overlay(overlay(0x20)).unwrap();
    let stop = AtomicBool::new(false);
    let (mut faults, mut marks) = (Vec::new(), Vec::new());
    std::thread::scope(|s| {
        for id in 0x1000..0x1030 {
            let (file, stop) = (mirror.open_disk(id), &stop);
            s.spawn(move || {
                let mut buf = Aligned::new(65536);
                for round in 0.. {
                    buf.get(65536).fill(round as u8);
                    file.write_all_at(buf.get(65536), round % 500 * 1_000_000).unwrap();
                    file.sync_data().unwrap();
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(100));
        let mapping = Mapping::of(&mirror.ram(0x100), len);
        let file = mirror.open_disk(0x20);
        for round in 0..100 {
            file.write_all_at(&[1; 4096], round * 4096).unwrap();
            let began = Instant::now();
            client.mark(0x20, 0x2000 + round).unwrap();
            marks.push(began.elapsed());
            let began = Instant::now();
            assert_ne!(mapping.page(round as usize * 17)[0], 0);
            faults.push(began.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
    });
    for (name, took) in [("fault", &mut faults), ("mark", &mut marks)] {
        took.sort_unstable();
        eprintln!("{name} beside 48 flushing disks: p50 {:?}, p90 {:?}, max {:?}", took[50], took[90], took[99]);
        assert!(took[50] < Duration::from_millis(20), "{name}: {:?}", took[50]);
    }
}

#[test]
fn a_second_mirror_on_the_same_home_is_refused() {
    let mut mirror = Mirror::start();
    let session = mirror.client().hello().unwrap().session;
    let mut second = std::process::Command::new(std::env::current_exe().unwrap());
    second.args(["--ignored", "--exact", "mirror_process", "--nocapture"]);
    second.env("MIRROR_HOME", &mirror.home).env("MIRROR_STORE", &mirror.store);
    let out = second.output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("another mirror serves"));
    assert_eq!(mirror.client().hello().unwrap().session, session);
    mirror.client().shutdown(true).unwrap();
    assert!(mirror.wait().success());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(mirror.home.to_str().unwrap()), "nothing stays mounted");
}
