//! Many writers and readers of one blob, and of many, at once; and every state a crash may leave.
#![allow(missing_docs)]

use crate::common;

use base::ByteRange;
use common::{Mem, Rng, assert_same, assert_sound, read_all};
use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use store::blob::{At, Blob, Change};
use store::engine::{Engine, Local, Memory, Object, Swapped, Upload};
use store::{BlockSource, Error, Etag, Expect, Mode, Store};

/// An engine on which swaps are lost to writers of elsewhere, as on a medium that several processes share: every third
/// one is refused although nothing changed, which the caller cannot tell from a change.
struct Contended {
    inner: Memory,
    swaps: AtomicU64,
}

impl Engine for Contended {
    fn describe(&self) -> String {
        "contended memory".to_owned()
    }
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        self.inner.upload(name)
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        self.inner.open(name)
    }
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.inner.get(name)
    }
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.inner.put(name, bytes)
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.inner.list(folder)
    }
    fn remove(&self, names: &[String]) -> io::Result<()> {
        self.inner.remove(names)
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        self.inner.punch(name, ranges)
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.inner.footprint(name)
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        self.inner.head(name)
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        self.inner.heads()
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Swapped> {
        let lost = self.swaps.fetch_add(1, Ordering::Relaxed) % 3 == 1;
        match expect {
            Expect::Etag(_) if lost => Ok(Err("another writer published first")),
            _ => self.inner.swap_head(name, expect, bytes),
        }
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.inner.remove_head(name)
    }
}

/// What a writer was told.
#[derive(Clone, Debug)]
struct Done {
    change: Change,
    /// Ignored for appends.
    offset: u64,
    bytes: Vec<u8>,
    number: u64,
    /// Instants of a common clock.
    began: u64,
    ended: u64,
}

const WRITERS: u64 = 6;
const WRITES: u64 = 40;
const SIZE: u64 = 20_000;

/// Writers and readers of one blob at the same time; everything that was acknowledged or seen is then checked against
/// the order of the versions.
fn many_at_once(engine: Arc<dyn Engine>) {
    let store = Store::open_engine(engine, Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", SIZE, 512).unwrap();
    let clock = AtomicU64::new(0);
    let acknowledged = AtomicU64::new(0);
    let done: Mutex<Vec<Done>> = Mutex::default();
    let seen: Mutex<Vec<(u64, Vec<u8>)>> = Mutex::default();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (blob, clock, done, acknowledged) = (&blob, &clock, &done, &acknowledged);
                scope.spawn(move || {
                    let mut rng = Rng(writer);
                    for _ in 0..WRITES {
                        let len = rng.below(3000) as usize + 1;
                        let bytes = rng.noise(len);
                        let offset = rng.below(SIZE - len as u64);
                        let change = if rng.below(3) == 0 { Change::Append } else { Change::Write };
                        let began = clock.fetch_add(1, Ordering::SeqCst);
                        let number = match change {
                            Change::Append => blob.append(&bytes),
                            _ => blob.write(offset, &bytes),
                        };
                        let (number, ended) = (number.unwrap(), clock.fetch_add(1, Ordering::SeqCst));
                        acknowledged.fetch_max(number, Ordering::SeqCst);
                        done.lock().unwrap().push(Done { change, offset, bytes, number, began, ended });
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                let mut last = 0;
                while !over.load(Ordering::Relaxed) {
                    let at_least = acknowledged.load(Ordering::SeqCst).max(last);
                    let (number, version) = blob.latest().unwrap();
                    assert!(number >= at_least, "version {number} after {at_least} was seen");
                    last = number;
                    seen.lock().unwrap().push((number, read_all(&store, &version).unwrap()));
                    std::thread::sleep(Duration::from_micros(300));
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                store.collect().unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        for writer in writers {
            // Readers must end even when a writer fails.
            if writer.join().is_err() {
                over.store(true, Ordering::Relaxed);
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let mut done = done.into_inner().unwrap();
    assert_eq!(done.len() as u64, WRITERS * WRITES);
    done.sort_unstable_by_key(|done| done.number);
    // Each acknowledged write is one version; together they are all.
    assert!(done.iter().map(|done| done.number).eq(1..=WRITERS * WRITES));
    for (at, later) in done.iter().enumerate() {
        for earlier in &done[..at] {
            assert!(earlier.began < later.ended, "{} was over before {} began", later.number, earlier.number);
        }
    }
    let log = blob.log(0..u64::MAX).unwrap();
    assert_eq!(log.len() as u64, WRITERS * WRITES + 1);
    let mut content = vec![0; SIZE as usize];
    let mut contents = vec![content.clone()];
    for (done, entry) in done.iter().zip(&log[1..]) {
        let offset = if done.change == Change::Append { content.len() } else { done.offset as usize };
        content.resize(content.len().max(offset + done.bytes.len()), 0);
        content[offset..offset + done.bytes.len()].copy_from_slice(&done.bytes);
        assert_eq!((entry.change, entry.bytes), (done.change, done.bytes.len() as u64));
        assert!(entry.parent < entry.number);
        let (_, version) = blob.version(done.number).unwrap();
        assert_same(&read_all(&store, &version).unwrap(), &content);
        contents.push(content.clone());
    }
    let seen = seen.into_inner().unwrap();
    assert!(!seen.is_empty());
    for (number, read) in &seen {
        assert_same(read, &contents[*number as usize]);
    }
    assert_sound(&store);
}

#[test]
fn versions_are_a_total_order_of_whole_writes_in_memory() {
    many_at_once(Arc::new(Memory::default()));
}

#[test]
fn versions_are_a_total_order_of_whole_writes_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    many_at_once(Arc::new(Local::open_writer(dir.path()).unwrap()));
}

#[test]
fn versions_are_a_total_order_of_whole_writes_when_swaps_are_lost() {
    let engine = Contended { inner: Memory::default(), swaps: AtomicU64::new(0) };
    many_at_once(Arc::new(engine));
}

/// Says that it was asked, then waits for a word.
struct Stalling {
    asked: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
    stalled: AtomicBool,
}

impl BlockSource for Stalling {
    fn read(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.stalled.swap(true, Ordering::SeqCst) {
            self.asked.lock().unwrap().send(()).unwrap();
            // A sender that went: the test failed elsewhere.
            let _ = self.go_on.lock().unwrap().recv();
        }
        buf.fill(7);
        Ok(())
    }
}

#[test]
fn a_writer_that_stalls_delays_nobody() {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 1 << 20, 4096).unwrap();
    let (asked, was_asked) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let source = Stalling { asked: Mutex::new(asked), go_on: Mutex::new(may_go_on), stalled: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| blob.write_from(&[ByteRange::new(100, 9000)], &source, 1).map(|(n, _)| n));
        was_asked.recv().unwrap();
        // All of this would hang if anything waited for it.
        for number in 1..=20 {
            assert_eq!(blob.write(number * 1000, b"others go on").unwrap(), number);
        }
        blob.append(b"more").unwrap();
        blob.tag(3, "three").unwrap();
        blob.delete_version(2).unwrap();
        store.collect().unwrap();
        blob.clone(At::Latest, "c").unwrap().write(0, b"x").unwrap();
        store.snapshot_blobs("s", &[("b", At::Latest), ("c", At::Latest)]).unwrap();
        drop(go_on);
        assert_eq!(stalled.join().unwrap().unwrap(), 22);
    });
    let mut read = vec![0; 21_000];
    blob.read(At::Latest, 0, &mut read).unwrap();
    assert!(read[100..9000].iter().all(|byte| *byte == 7));
    assert_eq!(&read[20_000..20_012], b"others go on");
    assert_eq!(&read[9000..9012], b"others go on", "written by the others where the stalled one ends");
    assert_sound(&store);
}

/// A source that fails, for a writer that gives up.
struct Failing;

impl BlockSource for Failing {
    fn read(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("the source is gone"))
    }
}

#[test]
fn a_writer_that_fails_leaves_nothing() {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 1 << 20, 4096).unwrap();
    blob.write(0, b"first").unwrap();
    store.collect().unwrap();
    let before = store.stats();
    let failed = blob.write_from(&[ByteRange::new(0, 10_000)], &Failing, 1);
    assert!(matches!(failed, Err(Error::Source { .. })), "{failed:?}");
    assert_eq!(blob.latest().unwrap().0, 1);
    store.collect().unwrap();
    let after = store.stats();
    assert_eq!((before.blocks, before.nodes, before.packs), (after.blocks, after.nodes, after.packs));
}

#[test]
fn many_blobs_at_once_get_what_was_written() {
    let memory = Memory::default();
    let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
    let blobs: Vec<Blob<'_>> = (0..40).map(|n| store.create_blob(&format!("b{n}"), 100_000, 4096).unwrap()).collect();
    let start = std::sync::Barrier::new(blobs.len());
    std::thread::scope(|scope| {
        for (seed, blob) in blobs.iter().enumerate() {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                for round in 0..5 {
                    blob.write(round * 1000, &Rng(seed as u64 * 10 + round).noise(20_000)).unwrap();
                }
            });
        }
    });
    for (seed, blob) in blobs.iter().enumerate() {
        assert_eq!(blob.latest().unwrap().0, 5);
        let mut read = vec![0; 20_000];
        blob.read(At::Latest, 4000, &mut read).unwrap();
        assert_same(&read, &Rng(seed as u64 * 10 + 4).noise(20_000));
    }
    assert_sound(&store);
}

/// Two blobs whose versions are always made in turn: a snapshot of both must never see the second ahead of the first.
#[test]
fn a_snapshot_of_blobs_is_one_instant() {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    one_instant(&store, &store);
}

/// The lock of one process is of no use then.
#[test]
fn a_snapshot_of_blobs_that_another_process_writes_is_one_instant() {
    let engine = Arc::new(Memory::default());
    let open = || Store::open_engine(Arc::clone(&engine) as Arc<dyn Engine>, Mode::Shared).unwrap();
    one_instant(&open(), &open());
}

fn one_instant(writer: &Store, store: &Store) {
    let first = writer.create_blob("first", 4096, 512).unwrap();
    let second = writer.create_blob("second", 4096, 512).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..300u64 {
                first.write(0, &round.to_le_bytes()).unwrap();
                second.write(0, &round.to_le_bytes()).unwrap();
            }
            over.store(true, Ordering::SeqCst);
        });
        let mut taken = 0;
        while !over.load(Ordering::SeqCst) {
            let name = format!("s{taken}");
            let snapshot = store.snapshot_blobs(&name, &[("second", At::Latest), ("first", At::Latest)]).unwrap();
            let (a, b) = (snapshot.versions["first"].0, snapshot.versions["second"].0);
            assert!(a == b || a == b + 1, "{a} and {b} never stood together");
            taken += 1;
        }
        assert!(taken > 0);
    });
}

/// A life of blobs; tells after each operation what blobs there are: number and content of the latest version.
type Blobs = BTreeMap<String, (u64, Vec<u8>)>;

fn life(store: &Store, told: &mut dyn FnMut(&Blobs)) {
    let mut rng = Rng(17);
    let mut blobs = Blobs::new();
    for round in 0..30u64 {
        let name = format!("b{}", round % 3);
        match blobs.get(&name).cloned() {
            None => {
                store.create_blob(&name, 5000, 512).unwrap();
                blobs.insert(name, (0, vec![0; 5000]));
            }
            Some((number, mut content)) => {
                let blob = store.blob(&name).unwrap();
                let bytes = rng.noise(1500);
                match round % 5 {
                    0 => {
                        blob.append(&bytes).unwrap();
                        content.extend_from_slice(&bytes);
                    }
                    1 => {
                        blob.resize(3000 + round * 100).unwrap();
                        content.resize(3000 + round as usize * 100, 0);
                    }
                    _ => {
                        blob.write(700, &bytes).unwrap();
                        content[700..2200].copy_from_slice(&bytes);
                    }
                }
                blobs.insert(name, (number + 1, content));
            }
        }
        told(&blobs);
        if round == 20 {
            store.blob("b1").unwrap().clone(2, "c").unwrap();
            let (_, version) = store.blob("b1").unwrap().version(2).unwrap();
            blobs.insert("c".to_owned(), (0, read_all(store, &version).unwrap()));
            told(&blobs);
            store.blob("b1").unwrap().delete_version(3).unwrap();
            told(&blobs);
        }
        if round == 25 {
            store.blob("b2").unwrap().delete().unwrap();
            blobs.remove("b2");
            told(&blobs);
        }
        if round % 4 == 3 {
            store.collect().unwrap();
        }
    }
}

fn found(store: &Store) -> Blobs {
    let names = store.blobs().unwrap().into_iter();
    let each = names.map(|name| {
        let (number, version) = store.blob(&name).unwrap().latest().unwrap();
        let content = read_all(store, &version).unwrap();
        (name, (number, content))
    });
    each.collect()
}

#[test]
fn every_prefix_of_the_steps_that_reached_the_medium_has_whole_versions() {
    let memory = Memory::default();
    let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
    let mut told: Vec<(usize, Blobs)> = vec![(memory.log().len(), Blobs::new())];
    life(&store, &mut |blobs| told.push((memory.log().len(), blobs.clone())));
    drop(store);
    let log = memory.log();
    for cut in 0..=log.len() {
        let store = Store::open_engine(Arc::new(Memory::crashed_after(&log[..cut])), Mode::ReadWrite).unwrap();
        let now = found(&store);
        // The last state told before the cut, or the one that was under way.
        let after = told.partition_point(|(len, _)| *len <= cut);
        let states = &told[after.saturating_sub(1)..(after + 1).min(told.len())];
        assert!(states.iter().any(|(_, state)| *state == now), "after {cut} steps");
        // Whatever the history has can be read, and it goes on from there.
        for name in store.blobs().unwrap() {
            let blob = store.blob(&name).unwrap();
            for entry in blob.log(0..u64::MAX).unwrap().iter().filter(|entry| !entry.deleted) {
                let (_, version) = blob.version(entry.number).unwrap();
                assert_eq!(read_all(&store, &version).unwrap().len() as u64, entry.size);
            }
            let number = blob.append(b"after the crash").unwrap();
            assert_eq!(number, now[&name].0 + 1);
        }
        assert_sound(&store);
        for name in store.blobs().unwrap() {
            store.blob(&name).unwrap().delete().unwrap();
        }
        store.collect().unwrap();
        let stats = store.stats();
        assert_eq!((stats.blocks, stats.nodes, stats.packs), (0, 0, 0), "after {cut} steps");
    }
}

/// What version `number` of the killed process's blobs holds at its place.
fn numbered(number: u64) -> Vec<u8> {
    Rng(number).noise(6000)
}

/// The writers that are killed: threads that write to two blobs for ever and say what was published.
#[test]
fn killed_writers_process() {
    let Ok(dir) = std::env::var("STORE_TEST_BLOB_WRITER") else { return };
    let store = Store::open(Path::new(&dir), Mode::ReadWrite).unwrap();
    for name in ["a", "b"] {
        if store.blob(name).is_err() {
            store.create_blob(name, 1 << 20, 4096).unwrap();
        }
    }
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let store = &store;
            scope.spawn(move || {
                let name = if thread % 2 == 0 { "a" } else { "b" };
                let blob = store.blob(name).unwrap();
                let mut rng = Rng(u64::from(std::process::id()) * 10 + thread);
                loop {
                    let token = rng.below(1 << 40);
                    let offset = rng.below(1 << 10) * 1000;
                    let number = blob.write(offset, &numbered(token)).unwrap();
                    println!("published {name} {number} {offset} {token} whole");
                    if number.is_multiple_of(7) && number > 20 {
                        let _ = blob.delete_version(number - 20);
                        store.collect().unwrap();
                    }
                }
            });
        }
    });
}

#[test]
fn writers_killed_at_any_instant_lose_nothing_they_published() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(std::process::id().into());
    let mut published = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &common::own(module_path!(), "killed_writers_process"), "--nocapture"])
            .env("STORE_TEST_BLOB_WRITER", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut lines: Vec<String> = output.by_ref().take(4 + rng.below(30) as usize).collect();
        std::thread::sleep(Duration::from_micros(rng.below(15_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        lines.extend(output);
        if dir.path().join("key").exists() {
            assert_sound(&Store::open(dir.path(), Mode::ReadOnly).unwrap());
        }
        let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
        assert_sound(&store);
        for line in &lines {
            let Some((_, line)) = line.split_once("published ") else { continue };
            let parts: Vec<&str> = line.split(' ').collect();
            // The last line may have been cut.
            let [name, number, offset, token, "whole"] = parts[..] else { continue };
            let (Ok(number), Ok(offset), Ok(token)) = (number.parse(), offset.parse(), token.parse()) else { continue };
            let blob = store.blob(name).unwrap();
            assert!(blob.latest().unwrap().0 >= number, "round {round}: {line}");
            match blob.version(At::Number(number)) {
                Ok((_, version)) => {
                    let mut read = vec![0; 6000];
                    store.read_at(&version, offset, &mut read).unwrap();
                    assert_same(&read, &numbered(token));
                    published += 1;
                }
                Err(Error::NotFound { .. }) => assert!(blob.log(number..number + 1).unwrap()[0].deleted),
                Err(other) => panic!("round {round}: {line}: {other}"),
            }
        }
    }
    assert!(published > 20, "only {published} publications");
}

#[test]
fn a_full_medium_refuses_by_name_and_the_blob_stays_as_it_was() {
    let mut refused = 0;
    for spare in (0..120_000).step_by(3907) {
        let memory = Memory::default();
        let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
        let blob = store.create_blob("b", 200_000, 4096).unwrap();
        let first = Rng(1).noise(100_000);
        blob.write(0, &first).unwrap();
        let used: usize = memory.contents().values().map(Vec::len).sum();
        memory.set_capacity(Some((used + spare) as u64));
        match blob.write_from(&[ByteRange::new(0, 100_000)], &Mem(Rng(2).noise(100_000)), 1) {
            Ok((number, _)) => assert_eq!(number, 2),
            Err(Error::NoSpace { .. }) => {
                refused += 1;
                assert_eq!(blob.latest().unwrap().0, 1);
                store.collect().unwrap();
                let left: usize = memory.contents().values().map(Vec::len).sum();
                assert_eq!(left, used, "nothing is left of what failed");
                let mut read = vec![0; 100_000];
                blob.read(At::Latest, 0, &mut read).unwrap();
                assert_same(&read, &first);
            }
            Err(other) => panic!("{other}"),
        }
        memory.set_capacity(None);
        blob.write(50, b"there is room again").unwrap();
        assert_sound(&store);
    }
    assert!(refused > 10, "{refused}");
}
