//! Blobs against a plain model, and what each operation costs.
#![allow(missing_docs)]

use crate::common;

use base::ByteRange;
use common::{Mem, Rng, assert_same, assert_sound, read_all};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use store::blob::{At, Blob, Change};
use store::{BlockSource, Changes, Error, Mode, Store, engine::Memory};

fn open(memory: &Memory) -> Store {
    Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap()
}

fn content(blob: &Blob<'_>, at: At) -> Vec<u8> {
    let (_, version) = blob.version(at).unwrap();
    let mut out = vec![0xaa; version.size as usize];
    blob.read(at, 0, &mut out).unwrap();
    out
}

/// What a blob must be.
#[derive(Clone, Debug, Default)]
struct Model {
    unit: usize,
    /// By number; `None`: deleted.
    versions: Vec<Option<Vec<u8>>>,
    changes: Vec<(Change, u64)>,
    tags: BTreeMap<String, u64>,
}

impl Model {
    fn latest(&self) -> Vec<u8> {
        self.versions.last().unwrap().clone().unwrap()
    }

    fn push(&mut self, content: Vec<u8>, change: Change, bytes: u64) -> u64 {
        self.versions.push(Some(content));
        self.changes.push((change, bytes));
        self.versions.len() as u64 - 1
    }

    fn pick(&self, number: u64) -> u64 {
        number % self.versions.len() as u64
    }
}

/// One operation; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Op {
    Create(u64, bool),
    Write(u64, u64, u64),
    WriteParts(Vec<(u64, u64)>, u64),
    Zero(u64, u64),
    Commit(Vec<(u64, u64)>, Vec<(u64, u64)>, u64),
    Append(u64, u64),
    Resize(u64),
    Clone(u64),
    Tag(u64, u64),
    Untag(u64),
    Delete(u64),
    DeleteBlob,
    Diff(u64, u64),
    Collect,
    Reopen,
}

/// Sizes go up to this; with blocks of 512 bytes that is a tree of three levels.
const SIZE_MAX: u64 = 200_000;

fn op() -> impl Strategy<Value = Op> {
    let any = || 0u64..1 << 40;
    let parts = || proptest::collection::vec((0..SIZE_MAX, 1u64..3000), 1..5);
    prop_oneof![
        2 => (0..SIZE_MAX, proptest::bool::ANY).prop_map(|(size, small)| Op::Create(size, small)),
        6 => (any(), 0u64..9000, any()).prop_map(|(at, len, seed)| Op::Write(at, len, seed)),
        3 => (parts(), any()).prop_map(|(parts, seed)| Op::WriteParts(parts, seed)),
        2 => (any(), 0u64..20_000).prop_map(|(at, len)| Op::Zero(at, len)),
        3 => (parts(), parts(), any()).prop_map(|(w, z, seed)| Op::Commit(w, z, seed)),
        4 => (0u64..9000, any()).prop_map(|(len, seed)| Op::Append(len, seed)),
        3 => (0..SIZE_MAX).prop_map(Op::Resize),
        2 => any().prop_map(Op::Clone),
        2 => (any(), 0u64..4).prop_map(|(number, tag)| Op::Tag(number, tag)),
        1 => (0u64..4).prop_map(Op::Untag),
        3 => any().prop_map(Op::Delete),
        1 => Just(Op::DeleteBlob),
        2 => (any(), any()).prop_map(|(a, b)| Op::Diff(a, b)),
        1 => Just(Op::Collect),
        1 => Just(Op::Reopen),
    ]
}

fn differing(a: &[u8], b: &[u8], unit: usize) -> Vec<ByteRange> {
    let size = a.len().max(b.len());
    let padded = |bytes: &[u8]| [bytes, &vec![0; size - bytes.len()]].concat();
    let (a, b) = (padded(a), padded(b));
    let mut out: Vec<ByteRange> = Vec::new();
    for (number, (x, y)) in a.chunks(unit).zip(b.chunks(unit)).enumerate() {
        let (start, end) = ((number * unit) as u64, (number * unit + x.len()) as u64);
        match out.last_mut() {
            _ if x == y => {}
            Some(last) if last.end == start => last.end = end,
            _ => out.push(ByteRange::new(start, end)),
        }
    }
    out
}

/// Ascending, disjoint ranges within `size`, in steps of `unit` (the end of the blob may cut the last).
fn fit(parts: &[(u64, u64)], size: u64, unit: u64) -> Vec<ByteRange> {
    let mut out: Vec<ByteRange> = Vec::new();
    let mut sorted = parts.to_vec();
    sorted.sort_unstable();
    for (at, len) in sorted {
        let start = at / unit * unit;
        let end = (start + len.next_multiple_of(unit)).min(size);
        if start < end && out.last().is_none_or(|last| last.end <= start) {
            out.push(ByteRange::new(start, end));
        }
    }
    out
}

/// The blobs `store` has, each with its model; the operation goes to the one that `which` picks.
fn apply(store: &Store, models: &mut BTreeMap<String, Model>, which: u64, op: &Op) {
    let name = models.keys().nth(which as usize % models.len().max(1)).cloned();
    let new_name = format!("b{}/x", (0..).find(|n| !models.contains_key(&format!("b{n}/x"))).unwrap());
    if let Op::Create(size, small) = op {
        let unit = if *small { 512 } else { 4096 };
        let blob = store.create_blob(&new_name, *size, unit as u32).unwrap();
        assert_eq!(blob.latest().unwrap().0, 0);
        let mut model = Model { unit, ..Model::default() };
        model.push(vec![0; *size as usize], Change::Create, 0);
        models.insert(new_name, model);
        return;
    }
    let Some(name) = name else { return };
    let blob = store.blob(&name).unwrap();
    let model = models.get_mut(&name).unwrap();
    let mut new = model.latest();
    let size = new.len() as u64;
    match op {
        Op::Create(..) | Op::Reopen => unreachable!(),
        Op::Write(at, len, seed) => {
            let at = at % (size + 1);
            let bytes = Rng(*seed).noise(*len as usize);
            if at + len > size {
                assert!(matches!(blob.write(at, &bytes), Err(Error::OutOfRange { .. })));
                return;
            }
            new[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            assert_eq!(blob.write(at, &bytes).unwrap(), model.push(new, Change::Write, *len));
        }
        Op::WriteParts(parts, seed) => {
            let ranges = fit(parts, size, 1);
            let source = Mem(Rng(*seed).noise(size as usize));
            for range in &ranges {
                let range = range.start as usize..range.end as usize;
                new[range.clone()].copy_from_slice(&source.0[range]);
            }
            let number = model.push(new, Change::Write, ranges.iter().map(ByteRange::len).sum());
            assert_eq!(blob.write_from(&ranges, &source, 2).unwrap().0, number);
        }
        Op::Zero(at, len) => {
            let at = at % (size + 1);
            let range = ByteRange::new(at, (at + len).min(size));
            new[range.start as usize..range.end as usize].fill(0);
            assert_eq!(blob.zero(range).unwrap(), model.push(new, Change::Write, range.len()));
        }
        Op::Commit(written, zeroed, seed) => {
            let unit = model.unit as u64;
            let (written, zeroed) = (fit(written, size, unit), fit(zeroed, size, unit));
            let source = Mem(Rng(*seed).noise(size as usize));
            let mut touched = vec![false; size as usize];
            for range in &zeroed {
                new[range.start as usize..range.end as usize].fill(0);
                touched[range.start as usize..range.end as usize].fill(true);
            }
            for range in &written {
                let range = range.start as usize..range.end as usize;
                new[range.clone()].copy_from_slice(&source.0[range.clone()]);
                touched[range].fill(true);
            }
            let bytes = touched.iter().filter(|touched| **touched).count() as u64;
            let (written, zeroed) = (&written[..], &zeroed[..]);
            let changes = Changes { written, zeroed, source: &source, threads: 1, progress: None, cancel: None };
            assert_eq!(blob.commit(&changes).unwrap().0, model.push(new, Change::Write, bytes));
        }
        Op::Append(len, seed) => {
            let bytes = Rng(*seed).noise(*len as usize);
            new.extend_from_slice(&bytes);
            assert_eq!(blob.append(&bytes).unwrap(), model.push(new, Change::Append, *len));
        }
        Op::Resize(to) => {
            new.resize(*to as usize, 0);
            assert_eq!(blob.resize(*to).unwrap(), model.push(new, Change::Resize, to.abs_diff(size)));
        }
        Op::Clone(number) => {
            let number = model.pick(*number);
            let Some(content) = model.versions[number as usize].clone() else {
                assert!(matches!(blob.clone(number, &new_name), Err(Error::NotFound { .. })));
                return;
            };
            let clone = blob.clone(number, &new_name).unwrap();
            let info = clone.info().unwrap();
            assert_eq!(info.origin.map(|origin| (origin.blob, origin.number)), Some((name.clone(), number)));
            let mut clone = Model { unit: model.unit, ..Model::default() };
            clone.push(content, Change::Clone, 0);
            models.insert(new_name, clone);
        }
        Op::Tag(number, tag) => {
            let (number, tag) = (model.pick(*number), format!("t{tag}"));
            let result = blob.tag(number, &tag);
            if model.versions[number as usize].is_none() {
                assert!(matches!(result, Err(Error::NotFound { .. })));
                return;
            }
            assert_eq!(result.unwrap(), number);
            model.tags.insert(tag, number);
        }
        Op::Untag(tag) => {
            let tag = format!("t{tag}");
            assert_eq!(blob.untag(&tag).ok(), model.tags.remove(&tag));
        }
        Op::Delete(number) => {
            let number = model.pick(*number);
            let latest = number + 1 == model.versions.len() as u64;
            let refused = latest || model.tags.values().any(|tagged| *tagged == number);
            match blob.delete_version(number) {
                Ok(_) => assert!(!refused && model.versions[number as usize].take().is_some()),
                Err(Error::Invalid(_)) => assert!(refused),
                Err(Error::NotFound { .. }) => assert!(model.versions[number as usize].is_none()),
                Err(other) => panic!("{other}"),
            }
        }
        Op::DeleteBlob => {
            blob.delete().unwrap();
            models.remove(&name);
            assert!(matches!(store.blob(&name), Err(Error::NotFound { .. })));
        }
        Op::Diff(a, b) => {
            let (a, b) = (model.pick(*a), model.pick(*b));
            if let (Some(x), Some(y)) = (&model.versions[a as usize], &model.versions[b as usize]) {
                assert_eq!(blob.diff(a, b).unwrap(), differing(x, y, model.unit));
            }
        }
        Op::Collect => drop(store.collect().unwrap()),
    }
}

fn check(store: &Store, models: &BTreeMap<String, Model>) {
    assert_eq!(store.blobs().unwrap(), models.keys().cloned().collect::<Vec<_>>());
    for (name, model) in models {
        let blob = store.blob(name).unwrap();
        let info = blob.info().unwrap();
        assert_eq!((info.latest + 1, &info.tags), (model.versions.len() as u64, &model.tags));
        let log = blob.log(0..u64::MAX).unwrap();
        assert_eq!(log.len(), model.versions.len());
        for (number, (version, entry)) in model.versions.iter().zip(&log).enumerate() {
            let at = At::Number(number as u64);
            assert_eq!((entry.number, (entry.change, entry.bytes)), (number as u64, model.changes[number]));
            assert_eq!((entry.parent, entry.deleted), (number.saturating_sub(1) as u64, version.is_none()));
            match version {
                Some(expected) => {
                    assert_eq!(entry.size, expected.len() as u64);
                    assert_same(&content(&blob, at), expected);
                }
                None => assert!(matches!(blob.version(at), Err(Error::NotFound { .. }))),
            }
        }
        assert_same(&content(&blob, At::Latest), &model.latest());
        assert!(matches!(blob.version(log.len() as u64), Err(Error::NotFound { .. })));
    }
    assert_sound(store);
}

/// What is stored must be what the heads reach, no more and no less, as a new writer counts it.
fn check_nothing_leaks(memory: &Memory, store: Store) {
    store.collect().unwrap();
    let kept = store.stats();
    drop(store);
    let store = open(memory);
    store.collect().unwrap();
    let recounted = store.stats();
    assert_eq!((kept.blocks, kept.nodes, kept.packs), (recounted.blocks, recounted.nodes, recounted.packs));
}

fn cases() -> u32 {
    if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 2000 } else { 60 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn behaves_as_a_list_of_byte_vectors(ops in proptest::collection::vec((0u64..100, op()), 1..50)) {
        let memory = Memory::default();
        let mut store = open(&memory);
        let mut models = BTreeMap::new();
        apply(&store, &mut models, 0, &Op::Create(50_000, true));
        for (which, op) in &ops {
            if let Op::Reopen = op {
                drop(store);
                store = open(&memory);
            } else {
                apply(&store, &mut models, *which, op);
            }
        }
        check(&store, &models);
        check_nothing_leaks(&memory, store);
        let store = open(&memory);
        check(&store, &models);
        for name in models.keys() {
            store.blob(name).unwrap().delete().unwrap();
        }
        store.collect().unwrap();
        let stats = store.stats();
        prop_assert_eq!((stats.blocks, stats.nodes, stats.packs, stats.heads), (0, 0, 0, 0));
    }
}

/// A source that lets another writer publish while this one prepares: what it made must be rebased.
struct Interrupted<'a> {
    inner: &'a dyn BlockSource,
    once: std::sync::Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>,
}

impl BlockSource for Interrupted<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if let Some(interrupt) = self.once.lock().unwrap().take() {
            interrupt();
        }
        self.inner.read(offset, buf)
    }
}

#[derive(Clone, Debug)]
enum Other {
    Write(u64, u64, u64),
    Append(u64),
    Resize(u64),
}

fn other() -> impl Strategy<Value = Other> {
    prop_oneof![
        4 => (0..SIZE_MAX, 1u64..6000, 0u64..99).prop_map(|(at, len, seed)| Other::Write(at, len, seed)),
        1 => (1u64..6000).prop_map(Other::Append),
        2 => (0..SIZE_MAX).prop_map(Other::Resize),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases() * 4))]

    /// One writer prepares on a version; others publish; then it publishes: its bytes win where it wrote, theirs stay
    /// everywhere else.
    #[test]
    fn a_rebased_write_covers_its_own_bytes_and_no_others(
        size in 1..SIZE_MAX,
        seed in 0u64..1000,
        parts in proptest::collection::vec((0..SIZE_MAX, 1u64..5000), 1..5),
        others in proptest::collection::vec(other(), 1..4),
    ) {
        let memory = Memory::default();
        let store = open(&memory);
        let blob = store.create_blob("b", size, 512).unwrap();
        let mut expected = Rng(seed).noise(size as usize);
        blob.write(0, &expected).unwrap();
        let parts: Vec<(u64, u64)> = parts.iter().map(|(at, len)| (at % size, *len)).collect();
        let ranges = fit(&parts, size, 1);
        let source = Mem(Rng(seed + 1).noise(size as usize));
        let interrupt = || {
            let blob = store.blob("b").unwrap();
            for other in &others {
                let size = expected.len() as u64;
                match other {
                    Other::Write(at, len, seed) => {
                        let range = fit(&[(*at, *len)], size, 1);
                        for range in range {
                            let bytes = Rng(*seed).noise(range.len() as usize);
                            expected[range.start as usize..range.end as usize].copy_from_slice(&bytes);
                            blob.write(range.start, &bytes).unwrap();
                        }
                    }
                    Other::Append(len) => {
                        let bytes = Rng(*len).noise(*len as usize);
                        expected.extend_from_slice(&bytes);
                        blob.append(&bytes).unwrap();
                    }
                    Other::Resize(size) => {
                        expected.resize(*size as usize, 0);
                        blob.resize(*size).unwrap();
                    }
                }
            }
        };
        let once = std::sync::Mutex::new(Some(Box::new(interrupt) as Box<dyn FnOnce() + Send>));
        let interrupted = Interrupted { inner: &source, once };
        let result = blob.write_from(&ranges, &interrupted, 1);
        drop(interrupted);
        let fits = ranges.iter().all(|range| range.end <= expected.len() as u64);
        match result {
            Ok((number, _)) => {
                prop_assert!(fits);
                prop_assert_eq!(number, blob.latest().unwrap().0);
                for range in &ranges {
                    let range = range.start as usize..range.end as usize;
                    expected[range.clone()].copy_from_slice(&source.0[range]);
                }
            }
            Err(Error::OutOfRange { .. }) => prop_assert!(!fits),
            Err(other) => panic!("{other}"),
        }
        assert_same(&content(&blob, At::Latest), &expected);
        // What was cut off stays zero when it grows again.
        let grown = SIZE_MAX + 1000;
        expected.resize(grown as usize, 0);
        blob.resize(grown).unwrap();
        assert_same(&content(&blob, At::Latest), &expected);
        assert_sound(&store);
        check_nothing_leaks(&memory, store);
    }
}

#[test]
fn a_rebase_moves_names_and_not_bytes() {
    let store = open(&Memory::default());
    let blob = store.create_blob("b", 64 << 20, 4096).unwrap();
    let source = Mem(Rng(1).noise(64 << 20));
    let interrupt = || _ = store.blob("b").unwrap().write(40 << 20, b"other").unwrap();
    let once = std::sync::Mutex::new(Some(Box::new(interrupt) as Box<dyn FnOnce() + Send>));
    let interrupted = Interrupted { inner: &source, once };
    let range = ByteRange::new(0, 32 << 20);
    let changes =
        Changes { written: &[range], zeroed: &[], source: &interrupted, threads: 1, progress: None, cancel: None };
    let before = store.stats();
    let (number, stat) = blob.commit(&changes).unwrap();
    let after = store.stats();
    assert_eq!((number, stat.stored), (2, 8192));
    assert_eq!(after.duplicate_blocks, before.duplicate_blocks, "no block was hashed again");
    // Its own 512 + 32 + 2 + 1, one path of the other, three of the rebase; history and log.
    let made = after.nodes_made - before.nodes_made;
    assert!((547..580).contains(&made), "{made} nodes");
    assert_same(&content(&blob, At::Latest)[..32 << 20], &source.0[..32 << 20]);
    assert_eq!(&content(&blob, At::Latest)[40 << 20..][..5], b"other");
}

#[test]
fn a_blob_grows_and_shrinks_through_all_heights() {
    let memory = Memory::default();
    let store = open(&memory);
    let blob = store.create_blob("b", 0, 512).unwrap();
    let sizes: Vec<u64> = (0..=50).map(|bits| (1u64 << bits) + bits % 2 * 3).filter(|s| *s <= 1 << 50).collect();
    let mut rng = Rng(3);
    let mut model: BTreeMap<u64, u8> = BTreeMap::new();
    let mut history = vec![(0, 0, model.clone())];
    let mut step = |size: u64, rng: &mut Rng| {
        blob.resize(size).unwrap();
        model.retain(|at, _| *at < size);
        for at in [size - 1, rng.below(size)] {
            let byte = rng.next() as u8 | 1;
            model.insert(at, byte);
            let number = blob.write(at, &[byte]).unwrap();
            history.push((number, size, model.clone()));
        }
    };
    sizes.iter().for_each(|size| step(*size, &mut rng));
    sizes.iter().rev().for_each(|size| step(*size, &mut rng));
    for _ in 0..40 {
        step(sizes[rng.below(sizes.len() as u64) as usize], &mut rng);
    }
    let check = |store: &Store| {
        let blob = store.blob("b").unwrap();
        for (number, size, model) in &history {
            let (_, version) = blob.version(*number).unwrap();
            assert_eq!(version.size, *size);
            for (at, byte) in model {
                let mut read = [0];
                store.read_at(&version, *at, &mut read).unwrap();
                assert_eq!(read[0], *byte, "version {number} of {size} bytes at {at}");
            }
        }
        assert_sound(store);
    };
    check(&store);
    check_nothing_leaks(&memory, store);
    check(&open(&memory));
    let store = open(&memory);
    let blob = store.blob("b").unwrap();
    assert!(matches!(blob.resize((1 << 50) + 1), Err(Error::Invalid(_))));
    assert!(matches!(store.create_blob("c", 1 << 51, 512), Err(Error::Invalid(_))));
    assert!(matches!(store.create_blob("c", 1, 1000), Err(Error::Invalid(_))));
    assert!(matches!(store.create_blob("b", 1, 512), Err(Error::HeadChanged { .. })));
    assert!(matches!(store.create_blob("no good", 1, 512), Err(Error::Invalid(_))));
}

/// Nodes loaded by `work`.
fn nodes_loaded(store: &Store, work: impl FnOnce()) -> u64 {
    let before = store.stats().nodes_loaded;
    work();
    store.stats().nodes_loaded - before
}

#[test]
fn the_length_of_the_history_costs_a_reader_nothing() {
    let memory = Memory::default();
    let store = open(&memory);
    let size = 1 << 30;
    let blob = store.create_blob("disk", size, 4096).unwrap();
    let mut rng = Rng(5);
    let mut commit = |number: u64| {
        let at = rng.below(size / 4096) * 4096;
        let stored = blob.write(at, &rng.block()).unwrap();
        assert_eq!(stored, number);
        at
    };
    let first = commit(1);
    let read = |store: &Store, at: At, offset: u64| {
        let blob = store.blob("disk").unwrap();
        nodes_loaded(store, || _ = blob.read(at, offset, &mut [0; 4096]).unwrap())
    };
    let after_one = read(&open(&Memory::crashed_after(&memory.log())), At::Latest, first);
    assert_eq!(after_one, 5, "one node a level");
    for number in 2..=2000 {
        commit(number);
    }
    drop(blob);
    let again = open(&memory);
    assert_eq!(read(&again, At::Latest, first), after_one);
    // The log tells the size, then a way through 2,000 slots: two levels and three more than the version's own.
    for number in [1, 2, 999, 1999] {
        let nodes = read(&again, At::Number(number), first);
        assert!(nodes <= after_one + 6, "version {number}: {nodes} nodes");
    }
    let head = again.head("blob/disk").unwrap().unwrap().0;
    assert!(head.meta.len() + 200 * head.versions.len() < 4096, "the head stays small");
}

#[test]
fn a_commit_adds_little_more_than_its_blocks() {
    let memory = Memory::default();
    let store = open(&memory);
    let size = 100 << 30;
    let blob = store.create_blob("disk", size, 4096).unwrap();
    let mut rng = Rng(5);
    let bytes = |memory: &Memory| memory.contents().values().map(Vec::len).sum::<usize>() as u64;
    for _ in 0..5 {
        let mut blocks: Vec<u64> = (0..64).map(|_| rng.below(size / 4096)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let ranges: Vec<ByteRange> = blocks.iter().map(|block| ByteRange::at(block * 4096, 4096)).collect();
        struct Noise;
        impl BlockSource for Noise {
            fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                buf.copy_from_slice(&Rng(offset).noise(buf.len()));
                Ok(())
            }
        }
        let before = bytes(&memory);
        blob.write_from(&ranges, &Noise, 1).unwrap();
        let growth = bytes(&memory) - before;
        let limit = (64 << 10) + 12 * 4096 * ranges.len() as u64 / 10;
        assert!(growth <= limit, "{growth} bytes instead of {limit}");
    }
}

#[test]
fn a_clone_is_a_head_and_nothing_else() {
    let memory = Memory::default();
    let store = open(&memory);
    let blob = store.create_blob("disk", 1 << 30, 4096).unwrap();
    let mut rng = Rng(5);
    for _ in 0..50 {
        blob.write(rng.below(1 << 29), &rng.noise(10_000)).unwrap();
    }
    let steps = memory.log().len();
    let names: Vec<String> = (0..100).map(|n| format!("clones/{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut clones = blob.clone_each(At::Number(30), &names).unwrap();
    assert!(clones.iter().all(Result::is_ok));
    assert_eq!(memory.log().len(), steps + 100, "a step each");
    let taken = blob.clone_each(At::Latest, &["clones/100", "clones/7", "bad name"]).unwrap();
    assert!(taken[0].is_ok());
    assert!(matches!(taken[1], Err(Error::HeadChanged { .. })));
    assert!(matches!(taken[2], Err(Error::Invalid(_))));
    let clone = clones.pop().unwrap().unwrap();
    let original = content(&blob, At::Number(30));
    blob.delete().unwrap();
    store.collect().unwrap();
    assert_same(&content(&clone, At::Latest), &original);
    assert_eq!(clone.write(5, b"mine").unwrap(), 1);
    assert_same(&content(&clone, At::Number(0)), &original);
    assert_eq!(&content(&clone, At::Number(1))[5..9], b"mine");
    assert_eq!(store.stats().logical_bytes, 101 << 30);
    assert_sound(&store);
}

#[test]
fn a_handle_does_not_reach_another_blob_made_under_its_name() {
    let store = open(&Memory::default());
    let old = store.create_blob("b", 100, 512).unwrap();
    store.blob("b").unwrap().delete().unwrap();
    assert!(matches!(old.write(0, b"x"), Err(Error::NotFound { .. })));
    let new = store.create_blob("b", 100, 512).unwrap();
    assert!(matches!(old.write(0, b"x"), Err(Error::NotFound { .. })));
    assert!(matches!(old.delete(), Err(Error::NotFound { .. })));
    assert_eq!(new.write(0, b"x").unwrap(), 1);
}

#[test]
fn a_snapshot_of_blobs_keeps_what_it_names() {
    let memory = Memory::default();
    let store = open(&memory);
    let one = store.create_blob("one", 10_000, 512).unwrap();
    let two = store.create_blob("two", 10_000, 4096).unwrap();
    let noise = Rng(1).noise(10_000);
    one.write(0, &noise).unwrap();
    one.write(0, b"later").unwrap();
    two.write(100, b"two").unwrap();
    let snapshot = store.snapshot_blobs("s", &[("one", At::Number(1)), ("two", At::Latest)]).unwrap();
    assert_eq!(store.blob_snapshot("s").unwrap(), snapshot);
    assert_eq!(snapshot.versions["one"].0, 1);
    assert!(matches!(store.snapshot_blobs("s", &[("one", At::Latest)]), Err(Error::HeadChanged { .. })));
    assert!(matches!(store.snapshot_blobs("t", &[("none", At::Latest)]), Err(Error::NotFound { .. })));
    let twice = [("one", At::Latest), ("one", At::Number(1))];
    assert!(matches!(store.snapshot_blobs("t", &twice), Err(Error::Invalid(_))));
    one.delete().unwrap();
    two.delete().unwrap();
    store.collect().unwrap();
    assert_same(&read_all(&store, &snapshot.versions["one"].1).unwrap(), &noise);
    assert_eq!(&read_all(&store, &snapshot.versions["two"].1).unwrap()[100..103], b"two");
    assert_eq!(store.blob_snapshots().unwrap(), ["s"]);
    assert!(store.delete_blob_snapshot("s").unwrap() && !store.delete_blob_snapshot("s").unwrap());
    check_nothing_leaks(&memory, store);
}

#[test]
fn a_reading_process_sees_each_version_as_it_is_published() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let blob = writer.create_blob("b", 1 << 20, 4096).unwrap();
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    let seen = reader.blob("b").unwrap();
    let mut contents = vec![vec![0; 1 << 20]];
    for round in 1..40u64 {
        let mut content = contents.last().unwrap().clone();
        let bytes = Rng(round).noise(20_000);
        let at = Rng(round).below((1 << 20) - 20_000);
        content[at as usize..at as usize + 20_000].copy_from_slice(&bytes);
        blob.write(at, &bytes).unwrap();
        contents.push(content);
        assert_same(&self::content(&seen, At::Latest), contents.last().unwrap());
        let old = round / 2;
        assert_same(&self::content(&seen, At::Number(old)), &contents[old as usize]);
        if round % 10 == 9 {
            writer.collect().unwrap();
        }
    }
    assert!(matches!(seen.write(0, b"x"), Err(Error::ReadOnly { .. })));
    assert!(matches!(seen.tag(1, "t"), Err(Error::ReadOnly { .. })));
    assert!(matches!(reader.create_blob("c", 1, 512), Err(Error::ReadOnly { .. })));
    assert!(matches!(reader.snapshot_blobs("s", &[("b", At::Latest)]), Err(Error::ReadOnly { .. })));
    assert!(matches!(seen.clone(At::Latest, "c"), Err(Error::ReadOnly { .. })));
}

#[test]
fn a_deleted_version_gives_back_what_only_it_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 8 << 20, 4096).unwrap();
    let (shared, first, second) = (Rng(1).noise(1 << 20), Rng(2).noise(2 << 20), Rng(3).noise(2 << 20));
    blob.write(4 << 20, &shared).unwrap();
    blob.write(0, &first).unwrap();
    blob.write(0, &second).unwrap();
    blob.clone(1, "c").unwrap();
    assert_eq!(store.collect().unwrap().bytes, 0, "everything is needed");
    blob.tag(2, "keep").unwrap();
    assert!(matches!(blob.delete_version(2), Err(Error::Invalid(_))));
    blob.untag("keep").unwrap();
    blob.delete_version(2).unwrap();
    let freed = store.collect().unwrap().bytes;
    assert!((2 << 20..3 << 20).contains(&freed), "{freed} bytes");
    blob.delete_version(1).unwrap();
    assert!(store.collect().unwrap().bytes < 100_000, "the clone has it still");
    let mut read = vec![0; 2 << 20];
    blob.read(At::Latest, 0, &mut read).unwrap();
    assert_same(&read, &second);
    store.blob("c").unwrap().read(0, 4 << 20, &mut read[..1 << 20]).unwrap();
    assert_same(&read[..1 << 20], &shared);
    assert_sound(&store);
}

#[test]
fn a_blob_deleted_while_it_is_written_stays_deleted() {
    let memory = Memory::default();
    let store = open(&memory);
    let blob = store.create_blob("b", 1 << 20, 4096).unwrap();
    blob.write(0, &Rng(1).noise(100_000)).unwrap();
    for again in [false, true] {
        let source = Mem(Rng(2).noise(1 << 20));
        let interrupt = || {
            store.blob("b").unwrap().delete().unwrap();
            store.collect().unwrap();
            if again {
                store.create_blob("b", 1 << 20, 4096).unwrap();
            }
        };
        let once = std::sync::Mutex::new(Some(Box::new(interrupt) as Box<dyn FnOnce() + Send>));
        let interrupted = Interrupted { inner: &source, once };
        let blob = store.blob("b").unwrap();
        let result = blob.write_from(&[ByteRange::new(5, 50_000)], &interrupted, 1);
        assert!(matches!(result, Err(Error::NotFound { .. })), "{result:?}");
        if !again {
            store.create_blob("b", 1 << 20, 4096).unwrap();
        }
    }
    assert_eq!(store.blob("b").unwrap().latest().unwrap().0, 0);
    store.collect().unwrap();
    let stats = store.stats();
    assert_eq!((stats.blocks, stats.nodes, stats.packs), (0, 0, 0));
    check_nothing_leaks(&memory, store);
}
