//! Laying blocks down in the order of a plan: what reading the plan then takes, counted at the engine; and that nothing
//! else changes, whoever reads, commits, collects or arranges beside it.
#![allow(missing_docs)]

use crate::common;
use crate::watched;

use base::ByteRange;
use common::{BLOCK, Mem, Rng, assert_same, assert_sound, commit, manifest, publish, range, read_all};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use store::engine::Memory;
use store::engine::cached::{CacheOptions, Cached};
use store::transfer::{Options, transfer};
use store::{ArrangeOptions, Arranged, BlockSource, Changes, Error, Expect, Mode, Store, Version};
use watched::Watched;

fn writer() -> (Watched, Store) {
    let below = Watched::default();
    let store = Store::open_engine(Arc::new(below.clone()), Mode::ReadWrite).unwrap();
    (below, store)
}

/// Short runs of blocks anywhere, as what an offshoot touches: in an order that is not that of addresses.
fn plan(rng: &mut Rng, blocks: u64, count: usize) -> Vec<u64> {
    let mut out: Vec<u64> = Vec::new();
    while out.len() < count {
        let (start, len) = (rng.below(blocks), 1 + rng.below(6));
        let run = (start..(start + len).min(blocks)).filter(|block| !out.contains(block));
        out.extend(run.collect::<Vec<_>>());
    }
    out.truncate(count);
    out
}

fn shuffled(rng: &mut Rng, blocks: u64) -> Vec<u64> {
    let mut out: Vec<u64> = (0..blocks).collect();
    (1..out.len()).rev().for_each(|at| out.swap(at, rng.below(at as u64 + 1) as usize));
    out
}

fn arrange(store: &Store, version: &Version, order: &[u64]) -> Arranged {
    store.arrange(version, order, &ArrangeOptions { always: true, ..ArrangeOptions::default() }).unwrap()
}

/// Bytes of these blocks compressed by eights, as a frame has them.
fn compressed(content: &Mem, order: &[u64]) -> u64 {
    let bytes = |block: &u64| content.0[(block * BLOCK) as usize..][..BLOCK as usize].to_vec();
    let each = order.chunks(8).map(|blocks| blocks.iter().flat_map(bytes).collect::<Vec<u8>>());
    each.map(|raw| zstd::bulk::compress(&raw, 1).unwrap().len().min(raw.len()) as u64).sum()
}

/// Has a node with nothing read a plan as the mirror does; requests and bytes that it asked the engine for.
fn cold(below: &Watched, version: &Version, content: &Mem, order: &[u64]) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { chunk_bytes: Some(64 << 10), ..CacheOptions::new(256 << 20) };
    let cached = Arc::new(Cached::open(Arc::new(below.clone()), dir.path(), &options).unwrap());
    let store = Store::open_engine(cached, Mode::ReadOnly).unwrap();
    let (reads, bytes) = (below.control.reads(), below.control.bytes.load(Ordering::SeqCst));
    let mut left: std::collections::BTreeSet<u64> = order.iter().copied().collect();
    for batch in order.chunks(512) {
        for span in store.spans(version, batch).unwrap() {
            let check = &mut |block: u64, bytes: &[u8]| {
                assert!(left.remove(&block), "block {block} was asked for once");
                assert_same(bytes, &content.0[(block * BLOCK) as usize..][..BLOCK as usize]);
            };
            store.read_blocks(version, &span.blocks, check).unwrap();
        }
    }
    assert!(left.is_empty(), "{} blocks did not come", left.len());
    (below.control.reads() - reads, below.control.bytes.load(Ordering::SeqCst) - bytes)
}

#[test]
fn a_plan_laid_down_in_order_is_a_few_large_reads() {
    let (below, store) = writer();
    let mut rng = Rng(1);
    let blocks = 12_000;
    let content = Mem((0..blocks).flat_map(|_| rng.block()).collect());
    let version = publish(&store, "web@1", &content);
    let order = plan(&mut rng, blocks, 2500);
    let alone = compressed(&content, &order);
    let before = cold(&below, &version, &content, &order);
    let done = store.arrange(&version, &order, &ArrangeOptions::default()).unwrap();
    let after = cold(&below, &version, &content, &order);
    println!("{alone} bytes; before: {before:?} requests and bytes; after: {after:?}; {done:?}");
    assert_eq!((done.blocks, done.moved, done.left), (2500, 2500, 0));
    assert!(before.1 > 3 * alone && before.0 > 50, "there was something to gain: {before:?}");
    assert!(after.1 as f64 <= 1.25 * alone as f64, "{} bytes fetched for {alone}", after.1);
    assert!(after.0 <= after.1 / (1 << 20) + 12, "{} requests for {} bytes", after.0, after.1);
    // What it says beforehand is what happens.
    let (told, did) = (done.after.fetched_bytes as f64, after.1 as f64);
    assert!((told - did).abs() < 0.1 * did, "{told} told, {did} fetched");
    assert!(done.after.requests <= after.0, "{done:?}");
    // Good is good enough.
    let again = store.arrange(&version, &order, &ArrangeOptions::default()).unwrap();
    assert_eq!((again.moved, again.written_bytes, again.before), (0, 0, done.after));
    assert_sound(&store);
}

#[test]
fn a_small_version_is_read_whole_with_a_request_for_each_level() {
    let (below, store) = writer();
    let mut rng = Rng(10);
    // Something before it and behind it, so that it does not come along by chance.
    for head in ["before", "device", "behind"] {
        publish(&store, head, &Mem(rng.noise((150 * BLOCK) as usize)));
    }
    let content = Mem(Rng(11).noise(150 * BLOCK as usize));
    let version = publish(&store, "device", &content);
    let reader = Store::open_engine(Arc::new(below.clone()), Mode::ReadOnly).unwrap();
    let before = below.control.reads();
    assert_same(&reader.read_whole(&version).unwrap(), &content.0);
    let requests = below.control.reads() - before;
    assert!(requests <= 3, "{requests} requests for the root, its leaves and their blocks");
    let tx = store.begin();
    let odd = tx.put_bytes(&content.0[..5000]).unwrap();
    assert_same(&store.read_whole(&odd).unwrap(), &content.0[..5000]);
    assert_eq!(store.read_whole(&store.empty(0, BLOCK as u32)).unwrap(), Vec::<u8>::new());
}

#[test]
fn nothing_but_the_place_changes_and_the_old_places_are_given_back() {
    let (below, store) = writer();
    let mut rng = Rng(2);
    let content = Mem(rng.mixed(3000));
    let version = publish(&store, "web@1", &content);
    let tx = store.begin();
    let mut changed = Mem(content.0.clone());
    changed.0[..BLOCK as usize].fill(3);
    let (next, _) = commit(&tx, &version, &changed, &[range(0, 1)], &[]).unwrap();
    tx.publish("web@2", Expect::Absent, &manifest(&[("ram", next)])).unwrap();
    let old_reader = Store::open_engine(Arc::new(below.clone()), Mode::ReadOnly).unwrap();
    let mut half = vec![0; 1500 * BLOCK as usize];
    old_reader.read_at(&version, 0, &mut half).unwrap();
    let stored = |store: &Store| store.stats().stored_bytes;
    let first = stored(&store);
    for round in 0..4 {
        let order = if round == 3 { shuffled(&mut rng, 3000) } else { plan(&mut rng, 3000, 900) };
        let done = arrange(&store, &version, &order);
        assert!(done.moved == done.blocks && done.left == 0, "{done:?}");
        store.collect().unwrap();
        assert_sound(&store);
        let fresh = Store::open_engine(Arc::new(below.clone()), Mode::ReadOnly).unwrap();
        for store in [&store, &old_reader, &fresh] {
            assert_same(&read_all(store, &version).unwrap(), &content.0);
            assert_same(&read_all(store, &next).unwrap(), &changed.0);
        }
    }
    store.collect().unwrap();
    // All of it was moved by the last round: once more what it was, and some dead blocks that share frames with others.
    assert!(stored(&store) < first + first / 4, "{} bytes, {first} before", stored(&store));
    drop(store);
    let store = Store::open_engine(Arc::new(below.clone()), Mode::ReadWrite).unwrap();
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    for head in store.heads("").unwrap() {
        store.delete_head(&head).unwrap();
    }
    store.collect().unwrap();
    assert_eq!((store.stats().packs, store.stats().blocks), (0, 0));
}

#[test]
fn blocks_in_the_order_of_another_version_stay_as_long_as_a_head_names_it() {
    let (below, store) = writer();
    let mut rng = Rng(3);
    let content = Mem((0..2000).flat_map(|_| rng.block()).collect());
    let version = publish(&store, "web@1", &content);
    let tx = store.begin();
    let mut changed = Mem(content.0.clone());
    changed.0[..100 * BLOCK as usize].copy_from_slice(&rng.noise(100 * BLOCK as usize));
    let (next, _) = commit(&tx, &version, &changed, &[range(0, 100)], &[]).unwrap();
    tx.publish("web@2", Expect::Absent, &manifest(&[("ram", next)])).unwrap();
    let order: Vec<u64> = (0..2000).step_by(4).collect();
    arrange(&store, &version, &order);
    let good = store.read_cost(&version, &order).unwrap();
    let done = arrange(&store, &next, &order);
    assert_eq!((done.moved, done.left), (25, 475), "{done:?}");
    assert_eq!(store.read_cost(&version, &order).unwrap(), good, "the order of the first is as it was");
    assert_same(&read_all(&store, &next).unwrap(), &changed.0);
    // The mark survives the process.
    drop(store);
    let store = Store::open_engine(Arc::new(below), Mode::ReadWrite).unwrap();
    assert_eq!(arrange(&store, &next, &order).left, 475);
    assert_eq!(arrange(&store, &version, &order).moved, 500, "its own may be laid down anew");
    store.delete_head("web@1").unwrap();
    let done = arrange(&store, &next, &order);
    assert_eq!((done.moved, done.left), (500, 0), "{done:?}");
    store.collect().unwrap();
    assert_sound(&store);
    assert_same(&read_all(&store, &next).unwrap(), &changed.0);
}

#[test]
fn what_cannot_be_arranged_is_refused_and_nothing_is_left_of_it() {
    let (below, store) = writer();
    let content = Mem(Rng(4).noise(3000 * BLOCK as usize));
    let version = publish(&store, "a", &content);
    let packs = store.stats().packs;
    let always = ArrangeOptions { always: true, ..ArrangeOptions::default() };
    let refused = store.arrange(&version, &[7, 3000], &always).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
    let cancel = AtomicBool::new(false);
    let stop = |done: u64, all: u64| cancel.store(done > all / 2, Ordering::Relaxed);
    let options = ArrangeOptions { always: true, progress: Some(&stop), cancel: Some(&cancel) };
    let order = shuffled(&mut Rng(5), 3000);
    assert!(matches!(store.arrange(&version, &order, &options), Err(Error::Cancelled)));
    let used: usize = below.memory.contents().values().map(Vec::len).sum();
    below.memory.set_capacity(Some(used as u64 + (1 << 20)));
    let full = store.arrange(&version, &order, &always).unwrap_err();
    assert!(matches!(full, Error::NoSpace { .. }), "{full}");
    below.memory.set_capacity(None);
    assert_eq!((store.stats().packs, below.memory.contents().values().map(Vec::len).sum()), (packs, used));
    let unknown = store.empty(BLOCK, BLOCK as u32);
    assert_eq!(store.arrange(&unknown, &[0], &always).unwrap(), Arranged::default(), "a zero block lies nowhere");
    let reader = Store::open_engine(Arc::new(below), Mode::ReadOnly).unwrap();
    assert!(matches!(reader.arrange(&version, &order, &always), Err(Error::ReadOnly { .. })));
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    assert_sound(&store);
}

#[test]
fn commits_readers_collections_and_arrangements_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let content = Mem(Rng(6).mixed(2000));
    let version = publish(&store, "base", &content);
    let (over, arranged) = (AtomicBool::new(false), AtomicU64::new(0));
    let going = || !over.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for me in 0..2 {
            let (store, arranged, going) = (&store, &arranged, &going);
            scope.spawn(move || {
                let mut rng = Rng(100 + me);
                while going() {
                    arranged.fetch_add(arrange(store, &version, &plan(&mut rng, 2000, 300)).moved, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while going() {
                store.collect().unwrap();
            }
        });
        scope.spawn(|| {
            let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
            let mut rng = Rng(200);
            while going() {
                let order = plan(&mut rng, 2000, 200);
                let check = &mut |block: u64, bytes: &[u8]| {
                    assert_same(bytes, &content.0[(block * BLOCK) as usize..][..BLOCK as usize]);
                };
                reader.read_blocks(&version, &order, check).unwrap();
                store.read_blocks(&version, &order, check).unwrap();
            }
        });
        let mut rng = Rng(300);
        for round in 0..30 {
            let tx = store.begin();
            let at = rng.below(1900);
            let mut changed = Mem(content.0.clone());
            changed.0[(at * BLOCK) as usize..][..100 * BLOCK as usize].copy_from_slice(&rng.mixed(100));
            let (next, _) = commit(&tx, &version, &changed, &[range(at, at + 100)], &[]).unwrap();
            tx.publish(&format!("n/{}", round % 3), Expect::Any, &manifest(&[("ram", next)])).unwrap();
            assert_same(&read_all(&store, &next).unwrap(), &changed.0);
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(arranged.into_inner() > 0);
    assert_sound(&store);
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    drop(store);
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    assert_sound(&store);
    store.heads("").unwrap().iter().for_each(|head| assert!(store.delete_head(head).unwrap()));
    store.collect().unwrap();
    assert_eq!(std::fs::read_dir(Path::new(dir.path()).join("packs")).unwrap().count(), 0);
}

fn changes<'a>(written: &'a [ByteRange], zeroed: &'a [ByteRange], source: &'a dyn BlockSource) -> Changes<'a> {
    Changes { written, zeroed, source, threads: 2, progress: None, cancel: None }
}

#[test]
fn a_commit_in_order_makes_the_version_that_any_commit_makes() {
    let mut rng = Rng(7);
    let base_content = Mem(rng.mixed(3000));
    for round in 0..6 {
        let (_, store) = writer();
        let base = publish(&store, "base", &base_content);
        let mut content = Mem(base_content.0.clone());
        // Some of it as it was, some zero, some twice.
        for block in (0..3000).filter(|_| rng.below(3) > 0).collect::<Vec<u64>>() {
            let new = Rng(rng.below(900)).mixed(1);
            content.0[(block * BLOCK) as usize..][..BLOCK as usize].copy_from_slice(&new);
        }
        let written: Vec<ByteRange> = (0..300).map(|n| range(10 * n, 10 * n + 7)).collect();
        let zeroed: Vec<ByteRange> = (0..100).map(|n| range(30 * n + 5, 30 * n + 9)).collect();
        let mut order = shuffled(&mut rng, 3000);
        order.truncate(500 * (round + 1));
        order.extend_from_within(..100);
        order.extend([3000, u64::MAX]);
        let tx = store.begin();
        let (ordered, stat) = tx.commit_in_order(&base, &changes(&written, &zeroed, &content), &order).unwrap();
        let (_, other) = writer();
        let apart = other.begin();
        let there = publish(&other, "base", &base_content);
        let (_, as_ever) = apart.commit(&there, &changes(&written, &zeroed, &content)).unwrap();
        let (plain, again) = tx.commit(&base, &changes(&written, &zeroed, &content)).unwrap();
        assert_eq!(ordered, plain);
        assert_eq!((again.stored, stat.blocks, stat.zero), (0, as_ever.blocks, as_ever.zero));
        assert_eq!((stat.stored, stat.unchanged), (as_ever.stored, as_ever.unchanged));
        tx.publish("next", Expect::Any, &manifest(&[("ram", ordered)])).unwrap();
        assert_sound(&store);
        assert_same(&read_all(&store, &ordered).unwrap(), &read_all(&store, &plain).unwrap());
        store.heads("").unwrap().iter().for_each(|head| assert!(store.delete_head(head).unwrap()));
        store.collect().unwrap();
        assert_eq!(store.stats().blocks, 0, "every reference was given back");
    }
}

#[test]
fn what_a_commit_lays_down_in_order_is_read_in_order() {
    let (_, store) = writer();
    let mut rng = Rng(8);
    let content = Mem((0..4000).flat_map(|_| rng.block()).collect());
    let order = plan(&mut rng, 4000, 1000);
    let tx = store.begin();
    let base = store.empty(4000 * BLOCK, BLOCK as u32);
    let whole = [range(0, 4000)];
    let (version, _) = tx.commit_in_order(&base, &changes(&whole, &[], &content), &order).unwrap();
    tx.publish("a", Expect::Absent, &manifest(&[("ram", version)])).unwrap();
    let cost = store.read_cost(&version, &order).unwrap();
    // All nodes, which lie in the order of addresses, and no other block.
    assert!(cost.fetched_bytes < cost.bytes + (300 << 10), "{cost:?}");
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    // And on the other side of a transfer.
    let far = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let options = Options { order: [("ram".to_owned(), order.clone())].into(), ..Options::default() };
    transfer(&store, "a", &far, "a", &options).unwrap();
    let there = far.head("a").unwrap().unwrap().0.versions["ram"];
    assert_same(&read_all(&far, &there).unwrap(), &content.0);
    let cost = far.read_cost(&there, &order).unwrap();
    assert!(cost.fetched_bytes < cost.bytes + (300 << 10), "{cost:?}");
}

/// Fails behind so many reads.
struct Failing<'a>(&'a Mem, AtomicU64);

impl BlockSource for Failing<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.1.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
            return Err(io::Error::other("the source is gone"));
        }
        self.0.read(offset, buf)
    }
}

#[test]
fn a_commit_in_order_that_fails_gives_everything_back() {
    let (_, store) = writer();
    let mut rng = Rng(9);
    let content = Mem(rng.mixed(3000));
    let whole = [range(0, 3000)];
    let order = shuffled(&mut rng, 2000);
    let base = store.empty(3000 * BLOCK, BLOCK as u32);
    for reads in (0..3000).step_by(173) {
        let source = Failing(&content, AtomicU64::new(reads));
        let tx = store.begin();
        match tx.commit_in_order(&base, &changes(&whole, &[], &source), &order) {
            Ok((version, _)) => assert_same(&read_all(&store, &version).unwrap(), &content.0),
            Err(error) => assert!(matches!(error, Error::Source { .. }), "{error}"),
        }
        drop(tx);
        store.collect().unwrap();
        assert_eq!((store.stats().blocks, store.stats().packs), (0, 0), "after {reads} reads");
    }
}
