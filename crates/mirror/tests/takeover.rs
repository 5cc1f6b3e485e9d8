//! A mirror that is killed under load is replaced through the session's descriptor: stalls, no errors, no wrong
//! byte. Needs root and /dev/fuse.

mod common;

use base::{ByteRange, RamFileId, RamMap, Source};
use common::{Aligned, Mapping, Mirror, PAGE, bytes, in_child, reap};
use mirror::{Below, Holder, OverlaySpec, RamSource, RamSpec, fuse_fd_of, process_start, socket_path};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
#[ignore = "is the mirror of the other tests"]
fn mirror_process() {
    common::mirror_process();
}

const RAM_PAGES: usize = 20_000;
const DISK: usize = 16 << 20;
const KILLS: u64 = 20;

fn map_of(id: u64, len: usize) -> String {
    let mut map = RamMap::zero(len as u64);
    map.set(ByteRange::new(0, len as u64), Source::File(RamFileId(id)));
    map.encode()
}

/// Touches every page of fresh mappings, over and over, in a process of its own: a SIGBUS must fail this test
/// and not take it down. Pages are dropped from the cache by mapping file after file.
fn fault_for_ever(paths: Vec<std::path::PathBuf>, wanted: Arc<Vec<u8>>, progress: &'static [AtomicU64]) -> libc::pid_t {
    in_child(std::panic::AssertUnwindSafe(move || {
        for path in &paths {
            let mapping = Mapping::of(path, RAM_PAGES * PAGE);
            // Spread over the file, so that each touch is a fault of its own.
            for i in 0..RAM_PAGES {
                let page = i * 7919 % RAM_PAGES;
                assert!(mapping.page(page) == &wanted[page * PAGE..(page + 1) * PAGE], "{path:?} page {page}");
                progress[0].fetch_add(1, Ordering::Relaxed);
            }
        }
    }))
}

/// Counters that a forked child shares with its parent.
fn shared_counters() -> &'static [AtomicU64] {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh anonymous mapping, never unmapped; zeroed pages are valid atomics.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), PAGE, prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        std::slice::from_raw_parts(at.cast::<AtomicU64>(), 8)
    }
}

/// Writes and reads its own part of a disk, and knows what it must hold.
fn use_disk(file: &File, part: usize, stop: &AtomicBool, slowest_ms: &AtomicU64) -> Vec<u8> {
    const PART: usize = DISK / 2;
    let start = part * PART;
    let mut now = vec![0; PART];
    let mut buf = Aligned::new(PART);
    file.read_exact_at(buf.get(PART), start as u64).unwrap();
    now.copy_from_slice(buf.get(PART));
    let mut round = part as u64;
    while !stop.load(Ordering::Relaxed) {
        round += 2;
        let began = Instant::now();
        let draw = bytes(round, 8);
        let number = u64::from_le_bytes(draw.try_into().unwrap());
        let len = (1 + (number >> 40) as usize % 16) * 4096;
        let at = (number as usize >> 3) % ((PART - len) / 512) * 512;
        if number & 8 == 0 {
            let data = bytes(round, len);
            buf.get(len).copy_from_slice(&data);
            file.write_all_at(buf.get(len), (start + at) as u64).unwrap();
            now[at..at + len].copy_from_slice(&data);
        }
        file.read_exact_at(buf.get(len), (start + at) as u64).unwrap();
        assert!(buf.get(len) == &now[at..at + len], "part {part}, round {round}, at {at}, {len} bytes");
        if round % 64 < 2 {
            file.sync_data().unwrap();
        }
        slowest_ms.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
    now
}

#[test]
fn a_killed_mirror_is_replaced_under_load() {
    let mut mirror = Mirror::start();
    let mut client = mirror.client();
    let content = Arc::new(bytes(1, RAM_PAGES * PAGE));
    mirror.put_version("v", &content);
    let image = bytes(2, DISK);
    mirror.put_version("image", &image);
    let pid = std::process::id();
    let holder = Holder { pid, start: process_start(pid).unwrap(), address: content.as_ptr() as u64 };
    let mut paths = Vec::new();
    for id in 0x100..0x140 {
        let source = if id % 2 == 0 { RamSource::Pending(holder) } else { RamSource::Committed("v".to_owned()) };
        client.add_ram(RamSpec { id, map: map_of(id, RAM_PAGES * PAGE), source }).unwrap();
        paths.push(mirror.ram(id));
    }
    let below = Below::Version("image".to_owned());
    let disk = OverlaySpec { id: 0x20, vm: "vm".to_owned(), size: DISK as u64, block_size: 4096, below };
    client.add_overlay(disk).unwrap();
    client.register_vm("vm", pid).unwrap();
    let session = client.hello().unwrap().session;
    let kept = fuse_fd_of(&socket_path(&mirror.home)).unwrap();
    let counters = shared_counters();
    let faulter = fault_for_ever(paths, content.clone(), counters);
    let file = mirror.open_disk(0x20);
    let (stop, slowest_ms) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut marked = Vec::new();
    let parts = std::thread::scope(|s| {
        let users: Vec<_> = (0..2)
            .map(|part| {
                let (file, stop, slowest_ms) = (&file, &stop, &slowest_ms);
                s.spawn(move || use_disk(file, part, stop, slowest_ms))
            })
            .collect();
        for kill in 0..KILLS {
            let before = counters[0].load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(40 + kill * 7 % 50));
            // Every other kill finds the mirror gone for a while.
            mirror.kill();
            std::thread::sleep(Duration::from_millis(kill % 2 * 30));
            mirror.spawn(Some(&kept));
            let hello = client.hello().unwrap();
            assert_eq!((hello.pid, &hello.session), (mirror.pid(), &session));
            let began = Instant::now();
            while counters[0].load(Ordering::Relaxed) == before {
                assert!(began.elapsed() < Duration::from_secs(10), "faults do not go on after kill {kill}");
                std::thread::sleep(Duration::from_millis(1));
            }
            if kill % 5 == 4 {
                client.mark(0x20, 0x1000 + kill).unwrap();
                marked.push(0x1000 + kill);
            }
        }
        stop.store(true, Ordering::Relaxed);
        users.into_iter().map(|u| u.join().unwrap()).collect::<Vec<_>>()
    });
    common::kill(faulter);
    let ended = reap(faulter);
    assert!(ended == -libc::SIGKILL || ended == 0, "the faulting process ended with {ended}");
    eprintln!("{} faults, slowest disk request {slowest_ms:?} ms", counters[0].load(Ordering::Relaxed));
    let now = parts.concat();
    let mut all = Aligned::new(DISK);
    file.read_exact_at(all.get(DISK), 0).unwrap();
    assert!(all.get(DISK) == now.as_slice());
    assert_eq!(client.list().unwrap().vms["vm"], pid, "registrations are remembered");
    // What the layers say of themselves adds up to what the disk shows.
    let mut rebuilt = image;
    let end = 0x2000;
    client.mark(0x20, end).unwrap();
    for view in marked.into_iter().chain([end]) {
        let changes = client.view(view).unwrap();
        let data = std::fs::read(&changes.data_path).unwrap();
        for (start, end) in changes.dirty {
            rebuilt[start as usize..end as usize].copy_from_slice(&data[start as usize..end as usize]);
        }
        for (start, end) in changes.zeroed {
            rebuilt[start as usize..end as usize].fill(0);
        }
    }
    assert!(rebuilt == now, "the dirty blocks of all views make the disk");
}

/// `fio` writes in short and long requests, many at once, and reads all of it again, while mirrors die.
#[test]
fn what_was_written_past_the_page_cache_verifies_over_killed_mirrors() {
    let mut mirror = Mirror::start();
    let mut client = mirror.client();
    let size = 128 << 20;
    let below = Below::Zero;
    client.add_overlay(OverlaySpec { id: 0x20, vm: "vm".to_owned(), size, block_size: 4096, below }).unwrap();
    let kept = fuse_fd_of(&socket_path(&mirror.home)).unwrap();
    let file = format!("--filename={}", mirror.disk(0x20).display());
    let all = ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--verify=crc32c", "--verify_interval=4096"];
    let more = ["--verify_fatal=1", "--verify_state_save=0", "--rw=randwrite", "--loops=2", "--output=/dev/null"];
    let short = ["--name=short", "--bs=4k", "--size=32m", "--offset=0"];
    let long = ["--name=long", "--bs=256k", "--size=96m", "--offset=32m"];
    let mut fio = std::process::Command::new("timeout");
    fio.args(["-k", "5", "120", "fio", &file]).args(all).args(more).args(short).args(long);
    let mut fio = fio.spawn().expect("fio (`make setup`)");
    let mut kills = 0;
    let ended = loop {
        if let Some(ended) = fio.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(20 + kills * 7 % 60));
        if kills < 2 * KILLS {
            mirror.kill();
            mirror.spawn(Some(&kept));
            client.hello().unwrap();
            kills += 1;
        }
    };
    assert!(ended.success(), "fio: {ended} after {kills} kills");
    assert!(kills >= 3, "it was over before mirrors died: {kills}");
    let stats = client.stats(None).unwrap();
    assert_eq!((stats.waiting, stats.problems), (vec![], vec![]));
}

#[test]
fn a_mirror_ended_by_sigterm_unmounts_nothing() {
    let mut mirror = Mirror::start();
    let mut client = mirror.client();
    mirror.put_version("v", &bytes(3, PAGE));
    client
        .add_ram(RamSpec { id: 0x100, map: map_of(0x100, PAGE), source: RamSource::Committed("v".to_owned()) })
        .unwrap();
    let kept = client.fuse_fd().unwrap();
    let mapping = Mapping::of(&mirror.ram(0x100), PAGE);
    // SAFETY: a child of ours that was not reaped yet.
    unsafe { libc::kill(mirror.pid().cast_signed(), libc::SIGTERM) };
    assert!(!mirror.wait().success());
    std::thread::scope(|s| {
        let reader = s.spawn(|| mapping.bytes()[7]);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reader.is_finished(), "it waits for the next mirror");
        mirror.spawn(Some(&kept));
        assert_eq!(reader.join().unwrap(), bytes(3, PAGE)[7]);
    });
    // Without the descriptor the session ends; a mirror started afresh clears the dead mount away.
    drop(kept);
    mirror.kill();
    drop(mapping);
    mirror.spawn(None);
    assert_eq!(client.list().unwrap().ram.len(), 1);
    assert_eq!(std::fs::read(mirror.ram(0x100)).unwrap(), bytes(3, PAGE));
}

#[test]
fn a_full_disk_stops_writes_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let at = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    // SAFETY: strings that end in a zero byte and live through the call.
    let mounted =
        unsafe { libc::mount(c"none".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=24m".as_ptr().cast()) };
    assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
    let path = dir.path().to_owned();
    {
        let mut mirror = Mirror::start_in(dir);
        let mut client = mirror.client();
        let image = bytes(4, 12 << 20);
        mirror.put_version("image", &image);
        let below = Below::Version("image".to_owned());
        let disk = OverlaySpec { id: 0x20, vm: "vm".to_owned(), size: 64 << 20, block_size: 4096, below };
        client.add_overlay(disk).unwrap();
        let file = mirror.open_disk(0x20);
        let mut buf = Aligned::new(1 << 20);
        let mut written = 0;
        let full = loop {
            buf.get(1 << 20).fill(0x77);
            match file.write_at(buf.get(1 << 20), (20 << 20) + written) {
                Ok(n) => written += n as u64,
                Err(e) => break e,
            }
        };
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        assert!(written >= 4 << 20, "{written}");
        let kept = client.fuse_fd().unwrap();
        let check = |buf: &mut Aligned| {
            for at in 0..12 {
                file.read_exact_at(buf.get(1 << 20), at << 20).unwrap();
                assert!(buf.get(1 << 20) == &image[(at as usize) << 20..(at as usize + 1) << 20], "MiB {at}");
            }
            for at in 0..written >> 20 {
                file.read_exact_at(buf.get(1 << 20), (20 << 20) + (at << 20)).unwrap();
                assert!(buf.get(1 << 20).iter().all(|&b| b == 0x77), "what was written is there");
            }
        };
        check(&mut buf);
        mirror.kill();
        mirror.spawn(Some(&kept));
        check(&mut buf);
        let stats = client.stats(None).unwrap();
        assert_eq!(stats.waiting, []);
        // Space given back is space to write again.
        // SAFETY: an open descriptor and plain numbers.
        let punched = unsafe {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(std::os::fd::AsRawFd::as_raw_fd(&file), mode, 20 << 20, 4 << 20)
        };
        assert_eq!(punched, 0);
        buf.get(1 << 20).fill(0x55);
        file.write_all_at(buf.get(1 << 20), 50 << 20).unwrap();
    }
    common::unmount(&path);
}
