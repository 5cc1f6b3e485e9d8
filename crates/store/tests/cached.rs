//! The disk cache: right bytes whatever happens to the disk, the engine below or the process; few fetches.
#![allow(missing_docs)]

use crate::common;
use crate::watched;

use base::ByteRange;
use common::{Mem, Rng, assert_same, assert_sound, publish, read_all};
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;
use store::engine::Engine;
use store::engine::cached::{CacheOptions, Cached, Place};
use store::{Error, Expect, Manifest, Mode, Store, Version};
use watched::Watched;

const CHUNK: u64 = 64 << 10;
const PACK: &str = "packs/00000007-0123456789abcdef.pack";
/// So long that only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);

fn options(bytes: u64) -> CacheOptions {
    CacheOptions { chunk_bytes: Some(CHUNK as u32), ..CacheOptions::new(bytes) }
}

/// An engine with one pack of noise, and that noise.
fn one_pack(len: usize) -> (Watched, Vec<u8>) {
    let (below, bytes) = (Watched::default(), Rng(3).noise(len));
    let mut upload = below.memory.upload(PACK).unwrap();
    upload.append(&bytes).unwrap();
    upload.finish().unwrap();
    (below, bytes)
}

fn open(below: &Watched, dir: &Path, bytes: u64) -> Cached {
    Cached::open(Arc::new(below.clone()), dir, &options(bytes)).unwrap()
}

fn place(start: u64, end: u64) -> Place {
    Place { object: PACK.to_owned(), ranges: vec![ByteRange::new(start * CHUNK, end * CHUNK)] }
}

fn read(cached: &Cached, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut out = vec![0xaa; len];
    cached.open(PACK)?.read_at(offset, &mut out)?;
    Ok(out)
}

/// Reads at random places; every byte must be right.
fn read_around(cached: &Cached, bytes: &[u8], rng: &mut Rng, times: u64) {
    let object = cached.open(PACK).unwrap();
    for _ in 0..times {
        let offset = rng.below(bytes.len() as u64);
        let len = rng.below((bytes.len() as u64 - offset).min(300_000) + 1) as usize;
        let mut out = vec![0xaa; len];
        object.read_at(offset, &mut out).unwrap();
        assert_same(&out, &bytes[offset as usize..][..len]);
    }
}

/// Bytes that the files of the cache take on the disk.
fn taken(dir: &Path) -> u64 {
    let files = |dir: &Path| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    files(dir).chain(files(&dir.join("small"))).filter(|m| m.is_file()).map(|m| m.blocks() * 512).sum()
}

#[test]
fn neighbours_come_in_one_fetch_and_nothing_comes_twice() {
    let (below, bytes) = one_pack(40 * CHUNK as usize + 777);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 64 << 20);
    assert_same(&read(&cached, 3 * CHUNK + 5, 10).unwrap(), &bytes[3 * CHUNK as usize + 5..][..10]);
    assert_eq!((below.control.reads(), cached.stats().fetched_bytes), (1, CHUNK));
    // 16 chunks are one fetch; the one that is here divides them.
    let whole = read(&cached, 0, 20 * CHUNK as usize).unwrap();
    assert_same(&whole, &bytes[..whole.len()]);
    assert_eq!((below.control.reads(), cached.stats().fetched_bytes), (3, 20 * CHUNK));
    let end = read(&cached, 0, bytes.len()).unwrap();
    assert_same(&end, &bytes);
    assert_eq!(cached.stats().fetched_bytes, bytes.len() as u64);
    let fetches = below.control.reads();
    read_around(&cached, &bytes, &mut Rng(1), 200);
    assert_eq!(below.control.reads(), fetches, "all of it is here");
    let past = read(&cached, bytes.len() as u64 - 5, 6).unwrap_err();
    assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    let stats = cached.stats();
    assert_eq!((stats.misses, stats.chunks, stats.healed, stats.uncached), (41, 41, 0, 0));
    assert!(stats.hits > 200, "{stats:?}");
}

#[test]
fn who_reads_in_order_needs_few_requests_and_who_jumps_gets_no_more_than_asked() {
    let chunks = 200_u64;
    let (below, bytes) = one_pack((chunks * CHUNK) as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 64 << 20);
    let object = cached.open(PACK).unwrap();
    let check = |offset: u64| {
        let mut out = [0; 1000];
        object.read_at(offset, &mut out).unwrap();
        assert_same(&out, &bytes[offset as usize..][..1000]);
    };
    for jump in [190, 7, 150, 90, 30] {
        check(jump * CHUNK + 77);
    }
    assert_eq!((below.control.reads(), cached.stats().fetched_bytes), (5, 5 * CHUNK));
    // Two readers side by side, within what nobody has read.
    for step in (0..40 * CHUNK).step_by(10_000) {
        check(32 * CHUNK + step);
        check(100 * CHUNK + step);
    }
    let requests = below.control.reads() - 5;
    assert!(requests <= 2 * 7, "{requests} requests for twice 40 chunks in order");
    let ahead = cached.stats().fetched_bytes - 5 * CHUNK;
    assert!(ahead <= 2 * (40 + 16) * CHUNK, "{ahead} bytes fetched for {}", 80 * CHUNK);
    // To the very end, and no further.
    for step in (0..10 * CHUNK).step_by(10_000) {
        check((chunks - 10) * CHUNK + step.min(10 * CHUNK - 1000));
    }
}

#[test]
fn stays_within_its_bound_on_the_disk() {
    let (below, bytes) = one_pack(200 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let bound = 2 << 20;
    let cached = open(&below, dir.path(), bound);
    let mut rng = Rng(2);
    for _ in 0..20 {
        read_around(&cached, &bytes, &mut rng, 20);
        assert!(taken(dir.path()) <= bound + (16 << 10), "{}", taken(dir.path()));
    }
    let stats = cached.stats();
    assert!(stats.evicted > 100 && stats.chunks == stats.chunks_max, "{stats:?}");
}

#[test]
fn sixty_four_readers_of_one_chunk_are_one_fetch() {
    let (below, bytes) = one_pack(4 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 4 << 20);
    for round in 0..4u64 {
        below.control.hold(true);
        let arrived = below.control.arrived.load(Ordering::SeqCst);
        let start = Barrier::new(65);
        std::thread::scope(|scope| {
            for reader in 0..64u64 {
                let (cached, start, bytes) = (&cached, &start, &bytes);
                scope.spawn(move || {
                    start.wait();
                    let offset = round * CHUNK + reader * 100;
                    assert_same(&read(cached, offset, 100).unwrap(), &bytes[offset as usize..][..100]);
                });
            }
            start.wait();
            while below.control.arrived.load(Ordering::SeqCst) == arrived {
                std::thread::yield_now();
            }
            below.control.hold(false);
        });
        assert_eq!(below.control.reads(), round + 1);
    }
    assert_eq!((cached.stats().misses, cached.stats().hits), (4, 4 * 63));
}

#[test]
fn only_who_waited_for_the_engine_below_has_waited() {
    let (below, _) = one_pack(4 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 4 << 20);
    let waited = |chunk: u64| {
        let before = store::waits();
        read(&cached, chunk * CHUNK, 100).unwrap();
        store::waits() != before
    };
    assert!(waited(0) && !waited(0), "the second finds it on the disk");
    // Two at once: one fetches, the other waits for that, and so both have waited.
    below.control.hold(true);
    let looked = || cached.stats().hits + cached.stats().misses;
    let before = looked();
    std::thread::scope(|scope| {
        let readers = [scope.spawn(|| waited(2)), scope.spawn(|| waited(2))];
        while looked() < before + 2 {
            std::thread::yield_now();
        }
        below.control.hold(false);
        let waited = readers.map(|reader| reader.join().unwrap());
        assert_eq!(waited, [true; 2]);
    });
    assert!(!waited(2));
}

#[test]
fn a_failed_fetch_fails_those_who_waited_and_nobody_after() {
    let (below, bytes) = one_pack(CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 4 << 20);
    let object = cached.open(PACK).unwrap();
    below.control.set_away(true);
    let error = object.read_at(10, &mut [0; 10]).unwrap_err();
    assert!(error.to_string().contains(PACK) && error.to_string().contains("watched memory"), "{error}");
    assert!(cached.condition().away.unwrap().contains("nobody listens"));
    below.control.set_away(false);
    assert_same(&read(&cached, 10, 10).unwrap(), &bytes[10..20]);
    assert_eq!(cached.condition().away, None);
}

#[test]
fn what_was_kept_is_there_after_a_restart() {
    let (below, bytes) = one_pack(20 * CHUNK as usize + 5);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 8 << 20);
    assert_same(&read(&cached, 0, bytes.len()).unwrap(), &bytes);
    drop(cached);
    below.control.set_away(true);
    let cached = open(&below, dir.path(), 8 << 20);
    assert_same(&read(&cached, 0, bytes.len()).unwrap(), &bytes);
    drop(cached);
    // A smaller bound, or another size of chunks, is kept to from the beginning.
    below.control.set_away(false);
    let cached = open(&below, dir.path(), 1 << 20);
    assert!(taken(dir.path()) <= 1 << 20, "{}", taken(dir.path()));
    assert_same(&read(&cached, 0, bytes.len()).unwrap(), &bytes);
    drop(cached);
    let other = CacheOptions { chunk_bytes: Some(256 << 10), ..options(8 << 20) };
    let cached = Cached::open(Arc::new(below.clone()), dir.path(), &other).unwrap();
    assert_eq!(cached.stats().chunks, 0);
    assert_same(&read(&cached, 0, bytes.len()).unwrap(), &bytes);
}

#[test]
fn a_flipped_bit_anywhere_costs_a_fetch_and_nothing_else() {
    let (below, bytes) = one_pack(10 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(9);
    let mut cached = Some(open(&below, dir.path(), 8 << 20));
    let mut fetched = 0;
    for round in 0..40 {
        assert_same(&read(cached.as_ref().unwrap(), 0, bytes.len()).unwrap(), &bytes);
        if round % 3 == 0 {
            cached = None;
        }
        let name = if round % 2 == 0 { "data" } else { "map" };
        let file = OpenOptions::new().read(true).write(true).open(dir.path().join(name)).unwrap();
        let len = if name == "data" { 10 * CHUNK } else { 11 * 128 };
        let at = if name == "data" { rng.below(len) } else { 128 + rng.below(len - 128) };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 1 << rng.below(8);
        file.write_all_at(&byte, at).unwrap();
        // What is read past the page cache sees what this wrote.
        file.sync_all().unwrap();
        let cached = cached.get_or_insert_with(|| open(&below, dir.path(), 8 << 20));
        let before = below.control.reads();
        assert_same(&read(cached, 0, bytes.len()).unwrap(), &bytes);
        fetched += below.control.reads() - before;
    }
    assert_eq!(fetched, 40, "each flipped bit was noticed, and cost one fetch");
}

/// The process that is killed while it fills the cache.
#[test]
fn killed_cache_process() {
    let Ok(dir) = std::env::var("STORE_TEST_CACHE") else { return };
    let (below, bytes) = one_pack(100 * CHUNK as usize);
    let cached = open(&below, Path::new(&dir), 3 << 20);
    let mut rng = Rng(std::process::id().into());
    println!("open {}", cached.stats().chunks);
    loop {
        read_around(&cached, &bytes, &mut rng, 3);
        println!("read");
    }
}

#[test]
fn a_process_killed_while_filling_leaves_a_cache_of_right_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (below, bytes) = one_pack(100 * CHUNK as usize);
    let mut rng = Rng(std::process::id().into());
    let (mut kept, mut healed) = (0, 0);
    for _ in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &common::own(module_path!(), "killed_cache_process"), "--nocapture"])
            .env("STORE_TEST_CACHE", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(output.by_ref().take(8 + rng.below(20) as usize).any(|line| line.ends_with("read")));
        std::thread::sleep(Duration::from_micros(rng.below(5000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let cached = open(&below, dir.path(), 3 << 20);
        kept += cached.stats().chunks;
        assert_same(&read(&cached, 0, bytes.len()).unwrap(), &bytes);
        read_around(&cached, &bytes, &mut rng, 20);
        healed += cached.stats().healed;
        assert!(taken(dir.path()) <= (3 << 20) + (16 << 10), "{}", taken(dir.path()));
    }
    assert!(kept > 15 * 20, "only {kept} chunks outlived a process");
    println!("{kept} chunks outlived 15 processes, {healed} were half written");
}

/// Runs in a mount namespace of its own, on a file system of 3 MiB.
#[test]
fn full_disk_process() {
    let Ok(dir) = std::env::var("STORE_TEST_FULL_DISK") else { return };
    let dir = Path::new(&dir);
    let (below, bytes) = one_pack(100 * CHUNK as usize);
    let cached = open(&below, dir, 64 << 20);
    let mut rng = Rng(4);
    read_around(&cached, &bytes, &mut rng, 300);
    let full = cached.stats();
    assert!(full.uncached > 0 && full.hits > full.uncached, "{:?} {full:?}", cached.condition());
    assert!((20..48).contains(&full.chunks), "{:?} {full:?}", cached.condition());
    assert_eq!(full.healed, 0, "{full:?}");
    // Others take the rest, and give it back: what is here is served all the while.
    drop(cached);
    fs::remove_file(dir.join("data")).unwrap();
    fs::write(dir.join("filler"), vec![1; 2_900_000]).unwrap();
    let cached = open(&below, dir, 64 << 20);
    read_around(&cached, &bytes, &mut rng, 100);
    assert!(cached.stats().chunks < 4 && cached.condition().disk.is_some(), "{:?}", cached.stats());
    fs::remove_file(dir.join("filler")).unwrap();
    read_around(&cached, &bytes, &mut rng, 1500);
    assert!(cached.stats().chunks > 10, "room is found again: {:?}", cached.stats());
    println!("ran to its end");
}

#[test]
fn a_full_disk_costs_hits_and_never_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let test = std::env::current_exe().unwrap();
    let script = "mount -t tmpfs -o size=3m none \"$STORE_TEST_FULL_DISK\" && exec \"$0\" --exact \"$1\" --nocapture";
    // A namespace of users as well where this does not run as root.
    let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-rm" };
    let ran = Command::new("unshare")
        .args([flags, "sh", "-c", script])
        .arg(&test)
        .arg(common::own(module_path!(), "full_disk_process"))
        .env("STORE_TEST_FULL_DISK", dir.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&ran.stdout);
    assert!(
        ran.status.success() && output.contains("ran to its end"),
        "{output}{}",
        String::from_utf8_lossy(&ran.stderr)
    );
}

#[test]
fn what_is_pinned_stays_and_too_much_is_refused() {
    let (below, bytes) = one_pack(100 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 2 << 20);
    let room = cached.stats().chunks_max;
    let pin = cached.pin(&[place(0, 5), place(50, 55)]).unwrap();
    assert!(cached.wait_for_prefetch(LONG));
    let refused = cached.pin(&[place(60, 60 + room)]).err().unwrap();
    assert!(refused.to_string().starts_with("10 chunks"), "{refused}");
    assert!(cached.set_bytes(512 << 10).is_err(), "more is pinned");
    read_around(&cached, &bytes, &mut Rng(1), 300);
    assert!(cached.stats().evicted > 50);
    below.control.set_away(true);
    for start in [0, 50] {
        let got = read(&cached, start * CHUNK, 5 * CHUNK as usize).unwrap();
        assert_same(&got, &bytes[(start * CHUNK) as usize..][..got.len()]);
    }
    below.control.set_away(false);
    drop(pin);
    assert_eq!(cached.stats().pinned, 0);
    cached.set_bytes(512 << 10).unwrap();
    assert!(taken(dir.path()) <= 512 << 10, "{}", taken(dir.path()));
}

#[test]
fn shrinks_and_grows_while_many_read() {
    let (below, bytes) = one_pack(150 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 12 << 20);
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (cached, bytes, stop, rounds) = (&cached, &bytes, &stop, &rounds);
            scope.spawn(move || {
                let mut rng = Rng(reader);
                while !stop.load(Ordering::Relaxed) {
                    read_around(cached, bytes, &mut rng, 4);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for step in 0..24u64 {
            cached.set_bytes([1 << 20, 12 << 20, 4 << 20][step as usize % 3]).unwrap();
            let seen = rounds.load(Ordering::Relaxed);
            while rounds.load(Ordering::Relaxed) < seen + 3 {
                std::thread::yield_now();
            }
        }
        cached.set_bytes(1 << 20).unwrap();
        stop.store(true, Ordering::Relaxed);
    });
    assert!(taken(dir.path()) <= 1 << 20, "{}", taken(dir.path()));
    read_around(&cached, &bytes, &mut Rng(77), 50);
    assert_eq!(cached.stats().uncached, 0);
}

#[test]
fn prefetch_waits_for_readers_and_readers_never_for_its_queue() {
    let (below, bytes) = one_pack(200 * CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 64 << 20);
    let arrived = |number: u64| {
        while below.control.arrived.load(Ordering::SeqCst) < number {
            std::thread::yield_now();
        }
    };
    let ranges: Vec<Place> = (0..6).map(|run| place(16 * run, 16 * run + 16)).collect();
    below.control.hold(true);
    cached.prefetch(&ranges);
    arrived(2);
    let reader = |chunk: u64| {
        let (cached, bytes) = (&cached, &bytes);
        move || assert_same(&read(cached, chunk * CHUNK, 50).unwrap(), &bytes[(chunk * CHUNK) as usize..][..50])
    };
    std::thread::scope(|scope| {
        // Two fetches for prefetch at a time; a reader's starts beside them at once.
        scope.spawn(reader(150));
        arrived(3);
        scope.spawn(reader(160));
        arrived(4);
        assert_eq!(below.control.arrived.load(Ordering::SeqCst), 4);
        below.control.hold(false);
    });
    assert!(cached.wait_for_prefetch(LONG));
    let stats = cached.stats();
    assert_eq!((stats.misses, stats.prefetched_bytes), (2, 96 * CHUNK));
    assert_eq!(below.control.reads(), 8, "six runs of a MiB, two chunks");
    // What is here is not fetched again.
    cached.prefetch(&ranges);
    assert!(cached.wait_for_prefetch(LONG));
    assert_eq!(below.control.reads(), 8);

    // While a reader fetches, none is started.
    below.control.hold(true);
    std::thread::scope(|scope| {
        scope.spawn(reader(170));
        arrived(9);
        cached.prefetch(&[place(100, 116)]);
        scope.spawn(reader(180));
        arrived(10);
        assert_eq!(below.control.arrived.load(Ordering::SeqCst), 10);
        below.control.hold(false);
    });
    assert!(cached.wait_for_prefetch(LONG));
    assert_eq!(below.control.reads(), 11);
}

/// A store below, written without the cache, and what it holds.
fn filled_store(below: &Watched) -> (Store, Vec<(String, Version, Vec<u8>)>) {
    let store = Store::open_engine(Arc::new(below.clone()), Mode::ReadWrite).unwrap();
    let contents = (0..3).map(|number| {
        let content = Mem(Rng(number).mixed(300));
        let head = format!("disk/{number}");
        let version = publish(&store, &head, &content);
        (head, version, content.0)
    });
    let contents = contents.collect();
    (store, contents)
}

fn reader_options() -> CacheOptions {
    CacheOptions { stale_reads: true, ..options(32 << 20) }
}

fn reader(below: &Watched, dir: &Path) -> (Arc<Cached>, Result<Store, Error>) {
    let cached = Arc::new(Cached::open(Arc::new(below.clone()), dir, &reader_options()).unwrap());
    let store = Store::open_engine(Arc::clone(&cached) as Arc<dyn Engine>, Mode::ReadOnly);
    (cached, store)
}

#[test]
fn a_node_opens_a_store_that_is_away_and_reads_what_is_cached() {
    let below = Watched::default();
    let (_writer, contents) = filled_store(&below);
    let dir = tempfile::tempdir().unwrap();
    let (cached, store) = reader(&below, dir.path());
    let store = store.unwrap();
    let (head, version, bytes) = &contents[0];
    assert_eq!(store.heads("").unwrap().len(), 3);
    let fresh = store.head(head).unwrap().unwrap();
    assert_same(&read_all(&store, version).unwrap(), bytes);
    drop((store, cached));

    below.control.set_away(true);
    let (cached, store) = reader(&below, dir.path());
    let store = store.unwrap();
    assert_same(&read_all(&store, version).unwrap(), bytes);
    let (manifest, etag) = store.head(head).unwrap().unwrap();
    assert_eq!(manifest, fresh.0);
    assert!(etag.to_string().starts_with("stale ") && etag != fresh.1);
    assert_eq!(store.heads("").unwrap().len(), 3);
    assert!(cached.stats().stale_answers > 0 && cached.condition().away.is_some());
    // A head that was never asked for, and content that was never read.
    assert!(matches!(store.head("disk/1"), Err(Error::Io { .. })));
    let missing = read_all(&store, &contents[2].1).unwrap_err();
    let source = std::error::Error::source(&missing).unwrap().to_string();
    assert!(source.contains("watched memory does not answer") && source.contains("packs/"), "{source}");
    // Nothing is written on what may be old, even once the store is back.
    below.control.set_away(false);
    let refused = cached.swap_head("disk/0", &Expect::Any, b"x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(cached.upload("packs/x.pack").is_err() && cached.put("key", b"").is_err());
    assert!(cached.remove_head("disk/0").is_err() && cached.remove(&["key".to_owned()]).is_err());
    assert_same(&read_all(&store, &contents[2].1).unwrap(), &contents[2].2);
    assert_eq!(cached.condition().away, None);
    drop((store, cached));

    // A cache for writing answers with nothing that may be old.
    below.control.set_away(true);
    let cached = Cached::open(Arc::new(below.clone()), dir.path(), &options(32 << 20)).unwrap();
    assert!(matches!(Store::open_engine(Arc::new(cached), Mode::ReadOnly), Err(Error::Io { .. })));
}

#[test]
fn a_cache_of_another_store_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        let below = Watched::default();
        let (_writer, contents) = filled_store(&below);
        let (cached, store) = reader(&below, dir.path());
        assert_eq!(cached.stats().chunks, 0, "{seed}");
        assert_same(&read_all(&store.unwrap(), &contents[1].1).unwrap(), &contents[1].2);
        assert!(cached.stats().chunks > 0);
    }
}

#[test]
fn what_was_spoilt_on_its_way_into_the_cache_is_fetched_once_more() {
    let below = Watched::default();
    let (_writer, contents) = filled_store(&below);
    let (_, version, bytes) = &contents[0];
    let dir = tempfile::tempdir().unwrap();
    let (cached, store) = reader(&below, dir.path());
    let store = store.unwrap();
    below.control.spoil.store(1, Ordering::SeqCst);
    assert_same(&read_all(&store, version).unwrap(), bytes);
    assert!(cached.stats().healed > 0, "{:?}", cached.stats());
    assert_eq!(below.control.spoil.load(Ordering::SeqCst), 0);
    assert_sound(&store);
    drop((store, cached));

    // Spoilt for ever: an error that names the pack, after one more try.
    let dir = tempfile::tempdir().unwrap();
    let (_cached, store) = reader(&below, dir.path());
    let store = store.unwrap();
    below.control.spoil.store(u64::MAX / 2, Ordering::SeqCst);
    let error = read_all(&store, version).unwrap_err();
    assert!(matches!(&error, Error::Corrupt { object, .. } if object.starts_with("packs/")), "{error}");
    below.control.spoil.store(0, Ordering::SeqCst);
    assert_same(&read_all(&store, version).unwrap(), bytes);
}

#[test]
fn a_store_lives_on_a_cache_and_a_version_can_be_pinned() {
    let below = Watched::default();
    let dir = tempfile::tempdir().unwrap();
    let cached = Arc::new(open(&below, dir.path(), 16 << 20));
    let store = Store::open_engine(Arc::clone(&cached) as Arc<dyn Engine>, Mode::ReadWrite).unwrap();
    let mut contents = Vec::new();
    for number in 0..8u64 {
        let content = Mem(Rng(number).mixed(200));
        contents.push((publish(&store, &format!("n/{number}"), &content), content.0));
        if number > 3 {
            store.delete_head(&format!("n/{}", number - 4)).unwrap();
            store.collect().unwrap();
        }
    }
    assert_sound(&store);
    let (version, bytes) = &contents[7];
    let places = store.places(version).unwrap();
    let ranged: u64 = places.iter().flat_map(|place| &place.ranges).map(ByteRange::len).sum();
    assert!(ranged > bytes.len() as u64 / 4, "{ranged}");
    let _pin = cached.pin(&places).unwrap();
    assert!(cached.wait_for_prefetch(LONG));
    let fresh = Store::open_engine(Arc::clone(&cached) as Arc<dyn Engine>, Mode::ReadOnly).unwrap();
    below.control.set_away(true);
    assert_same(&read_all(&fresh, version).unwrap(), bytes);
    assert!(store.begin().publish("x", Expect::Any, &Manifest::default()).is_err());
    below.control.set_away(false);
    assert_sound(&fresh);
    let direct = Store::open_engine(Arc::new(below.memory.clone()), Mode::ReadWrite).unwrap();
    assert_sound(&direct);
    for (version, bytes) in &contents[4..] {
        assert_same(&read_all(&direct, version).unwrap(), bytes);
    }
}

#[test]
fn an_engine_that_lost_a_pack_is_told_from_one_that_is_away() {
    let (below, _) = one_pack(CHUNK as usize);
    let dir = tempfile::tempdir().unwrap();
    let cached = open(&below, dir.path(), 4 << 20);
    below.memory.remove(&[PACK.to_owned()]).unwrap();
    assert_eq!(cached.open(PACK).err().unwrap().kind(), io::ErrorKind::NotFound);
    assert_eq!(cached.condition().away, None);
}
