//! Measures what a fault on a RAM file and a mark of a disk cost, end to end:
//! `cargo run --release -p mirror --example mirror_latency`.
//! Needs root and /dev/fuse. The mirror runs as a process of its own.

use base::{ByteRange, RamFileId, RamMap, Source};
use mirror::{Below, Client, Config, Holder, OverlaySpec, RamSource, RamSpec, StoreVersions};
use mirror::{disk_path, process_start, ram_path, socket_path};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Expect, Manifest, Mode, Store};

const PAGE: usize = 4096;
const PAGES: usize = 16_384;

fn main() {
    if let Some(home) = std::env::args().nth(1) {
        let home = Path::new(&home);
        let versions = StoreVersions::open(&home.join("store")).expect("the store is there");
        mirror::run(Config::new(home), Arc::new(versions)).expect("the mirror runs");
        return;
    }
    let dir = std::env::temp_dir().join(format!("mirror-latency-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("store")).expect("a directory");
    let content: Vec<u8> = (0..PAGES * PAGE).map(|i| (i / 7 * 31 + i / PAGE) as u8).collect();
    let version = fill_store(&dir.join("store"), &content);
    let me = std::env::current_exe().expect("a path");
    let mut process = std::process::Command::new(me).arg(&dir).spawn().expect("a mirror");
    let mut client = Client::new(socket_path(&dir));
    let pid = std::process::id();
    let holder = Holder { pid, start: process_start(pid).expect("alive"), address: content.as_ptr() as u64 };
    for (id, name, source) in [
        (0x100, "holder", RamSource::Pending(holder)),
        (0x101, "store", RamSource::Committed(version.clone())),
        (0x102, "blank", RamSource::Blank),
    ] {
        let mut map = RamMap::zero((PAGES * PAGE) as u64);
        map.set(ByteRange::new(0, (PAGES * PAGE) as u64), Source::File(RamFileId(id)));
        client.add_ram(RamSpec { id, map: map.encode(), source }).expect("added");
        for order in ["sequential", "random"] {
            let path = ram_path(&dir, id);
            drop_cache(&path);
            report(name, order, touch(&path, order == "random"));
        }
        report(name, "cached", touch(&ram_path(&dir, id), true));
    }
    report("mark", "of a disk", marks(&mut client, &dir));
    client.shutdown(true).expect("ends");
    process.wait().expect("ended");
    std::fs::remove_dir_all(&dir).expect("removed");
}

/// Marks of a disk that is written between them, at the pace of a busy node.
fn marks(client: &mut Client, home: &Path) -> Vec<Duration> {
    let disk = OverlaySpec { id: 0x200, vm: "vm".to_owned(), size: 20 << 30, block_size: 4096, below: Below::Zero };
    client.add_overlay(disk).expect("added");
    let file = File::options().write(true).open(disk_path(home, 0x200)).expect("a disk");
    let mut took = Vec::new();
    for view in 0x1000..0x1064 {
        file.write_all_at(&[1; PAGE], view << 20).expect("written");
        std::thread::sleep(Duration::from_millis(10));
        let began = Instant::now();
        client.mark(0x200, view).expect("marked");
        took.push(began.elapsed());
    }
    took
}

fn fill_store(dir: &Path, content: &[u8]) -> String {
    let store = Store::open(dir, Mode::ReadWrite).expect("a store");
    let transaction = store.begin();
    let version = transaction.put_bytes(content).expect("stored");
    let mut manifest = Manifest::default();
    manifest.versions.insert("ram".to_owned(), version);
    transaction.publish("bench", Expect::Absent, &manifest).expect("published");
    version.to_string()
}

fn drop_cache(path: &Path) {
    let file = File::open(path).expect("a RAM file");
    // SAFETY: an open descriptor and plain numbers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Touches each page of a private mapping once; the time of each touch.
fn touch(path: &Path, random: bool) -> Vec<Duration> {
    let file = File::open(path).expect("a RAM file");
    let len = PAGES * PAGE;
    // SAFETY: a fresh mapping of an open file; it is read within its length and unmapped before the end.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let mut took = Vec::with_capacity(PAGES);
    for i in 0..PAGES {
        let page = if random { i * 7919 % PAGES } else { i };
        let began = Instant::now();
        // SAFETY: within the mapping.
        std::hint::black_box(unsafe { at.cast::<u8>().add(page * PAGE).read_volatile() });
        took.push(began.elapsed());
    }
    // SAFETY: mapped above with this length.
    unsafe { libc::munmap(at, len) };
    took
}

fn report(source: &str, order: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |permille: usize| took[(took.len() - 1) * permille / 1000].as_secs_f64() * 1e6;
    println!("{source:8} {order:10} p50 {:6.1} us  p90 {:6.1} us  p99 {:6.1} us", at(500), at(900), at(990));
}
