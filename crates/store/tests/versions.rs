//! Versions: what is committed is what is read, at the cost the tree promises.
#![allow(missing_docs)]

use crate::common;

use base::ByteRange;
use common::{BLOCK, Mem, Rng, assert_same, assert_sound, commit, commit_all, manifest, publish, range, read_all};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use store::{Changes, Error, Expect, Mode, Store, engine::Memory};

fn store() -> Store {
    Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap()
}

#[test]
fn an_empty_blob_costs_nothing_and_reads_as_zero() {
    let memory = Memory::default();
    let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
    let steps = memory.log().len();
    let version = store.empty(1 << 50, 4096);
    let mut buf = [1; 10_000];
    let stat = store.read_at(&version, (1 << 49) + 7, &mut buf).unwrap();
    assert_eq!((buf, stat.zero_blocks, stat.stored_bytes), ([0; 10_000], 3, 0));
    assert!(store.is_zero(&version, ByteRange::new(0, 1 << 50)).unwrap());
    assert_eq!(store.data_ranges(&version).unwrap(), []);
    assert_eq!(memory.log().len(), steps);
    assert!(matches!(store.read_at(&version, (1 << 50) - 1, &mut [0; 2]), Err(Error::OutOfRange { .. })));
    assert!(matches!(store.read_at(&version, u64::MAX, &mut [0; 2]), Err(Error::OutOfRange { .. })));
}

#[test]
fn what_is_data_in_a_range_is_told_in_parts() {
    let (store, mut rng) = (store(), Rng(11));
    let mut content = vec![0; 700 * BLOCK as usize - 100];
    for block in (0..700).filter(|b| b % 7 < 2) {
        let end = content.len().min((block + 1) * BLOCK as usize);
        content[block * BLOCK as usize..end].fill(9);
    }
    let version = publish(&store, "t", &Mem(content));
    let whole = store.data_ranges(&version).unwrap();
    assert_eq!(whole.len(), 100);
    for _ in 0..50 {
        let start = rng.below(version.size);
        let asked = ByteRange::new(start, start + rng.below(version.size - start + 1));
        let wanted: Vec<ByteRange> = whole.iter().filter_map(|r| r.intersect(&asked)).collect();
        let (mut got, mut at): (Vec<ByteRange>, u64) = (Vec::new(), asked.start);
        while at < asked.end {
            let (part, reached) = store.data_ranges_in(&version, ByteRange::new(at, asked.end), 3).unwrap();
            assert!(part.len() <= 3 && reached > at, "{part:?} up to {reached} from {at}");
            got.extend(part);
            at = reached;
        }
        assert_eq!(got, wanted, "{asked:?}");
    }
    let beyond = store.data_ranges_in(&version, ByteRange::new(0, version.size + 1), 3);
    assert!(matches!(beyond, Err(Error::OutOfRange { .. })));
}

#[test]
fn names_agree_exactly_where_content_does() {
    let (store, blocks) = (store(), 60_usize);
    let content = |salt: usize| -> Vec<u8> {
        (0..blocks).flat_map(|i| vec![((i / 2 + salt) % 5) as u8; BLOCK as usize]).collect()
    };
    let versions = [0, 3].map(|salt| publish(&store, &format!("t{salt}"), &Mem(content(salt))));
    let all = versions.map(|version| store.names(&version, 0..version.blocks()).unwrap());
    let named =
        all.iter().zip([0, 3]).flat_map(|(names, salt)| names.iter().zip((0..blocks).map(move |i| (i / 2 + salt) % 5)));
    let named: Vec<_> = named.collect();
    for (name, value) in &named {
        assert_eq!(name.is_none(), *value == 0);
        assert!(named.iter().all(|(n, v)| (n == name) == (v == value)));
    }
    assert_eq!(store.names(&versions[0], 17..23).unwrap(), all[0][17..23]);
    for blocks in [0..61, 61..61, u64::MAX - 1..u64::MAX] {
        assert!(matches!(store.names(&versions[0], blocks), Err(Error::OutOfRange { .. })));
    }
}

#[test]
fn random_commits_read_back_in_every_version() {
    let mut rng = Rng(7);
    for (block_size, blocks, threads) in [(4096, 700, 1), (65536, 40, 3), (1 << 20, 5, 2), (512, 3000, 1)] {
        let store = store();
        let size = blocks * u64::from(block_size) - 100;
        let mut model = Mem(vec![0; size as usize]);
        let mut version = store.empty(size, block_size);
        let mut history = vec![(version, model.0.clone())];
        let tx = store.begin();
        for _ in 0..12 {
            let (written, zeroed) = (random_ranges(&mut rng, blocks), random_ranges(&mut rng, blocks));
            let bytes = |ranges: &[(u64, u64)]| -> Vec<ByteRange> {
                let unit = u64::from(block_size);
                ranges.iter().map(|(s, e)| ByteRange::new(s * unit, (e * unit).min(size))).collect()
            };
            let (written, zeroed) = (bytes(&written), bytes(&zeroed));
            for range in &zeroed {
                model.0[range.start as usize..range.end as usize].fill(0);
            }
            for range in &written {
                let new =
                    if rng.below(4) == 0 { vec![7; range.len() as usize] } else { rng.noise(range.len() as usize) };
                model.0[range.start as usize..range.end as usize].copy_from_slice(&new);
            }
            let changes =
                Changes { written: &written, zeroed: &zeroed, source: &model, threads, progress: None, cancel: None };
            let stat;
            (version, stat) = tx.commit(&version, &changes).unwrap();
            assert_eq!(stat.blocks, stat.zero + stat.unchanged + stat.duplicate + stat.stored);
            history.push((version, model.0.clone()));
        }
        let (last, last_content) = history.last().unwrap();
        for (version, content) in &history {
            assert_same(&read_all(&store, version).unwrap(), content);
            let offset = rng.below(size);
            let mut part = vec![0; rng.below((size - offset).min(200_000) + 1) as usize];
            store.read_at(version, offset, &mut part).unwrap();
            assert_same(&part, &content[offset as usize..][..part.len()]);
            let diff = store.diff(version, last).unwrap();
            assert_eq!(diff, differing(content, last_content, block_size as usize));
            let zeros = vec![0; content.len()];
            assert_eq!(store.data_ranges(version).unwrap(), differing(content, &zeros, block_size as usize));
        }
        tx.publish("a", Expect::Absent, &manifest(&[("disk", *last)])).unwrap();
        assert_sound(&store);
    }
}

fn random_ranges(rng: &mut Rng, blocks: u64) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let mut at = rng.below(blocks);
    while at < blocks {
        let end = (at + 1 + rng.below(1 + blocks / 8)).min(blocks);
        out.push((at, end));
        at = end + rng.below(1 + blocks / 4);
    }
    out
}

fn differing(a: &[u8], b: &[u8], block: usize) -> Vec<ByteRange> {
    let mut out: Vec<ByteRange> = Vec::new();
    for (number, (x, y)) in a.chunks(block).zip(b.chunks(block)).enumerate() {
        if x != y {
            let start = (number * block) as u64;
            let end = start + x.len() as u64;
            match out.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => out.push(ByteRange::new(start, end)),
            }
        }
    }
    out
}

#[test]
fn a_commit_tells_new_blocks_from_known_ones() {
    let store = store();
    let mut rng = Rng(1);
    let mut content = Mem(rng.noise(64 * BLOCK as usize));
    content.0[..4 * BLOCK as usize].fill(0);
    content.0.copy_within(10 * BLOCK as usize..11 * BLOCK as usize, 20 * BLOCK as usize);
    let tx = store.begin();
    let (first, stat) = commit_all(&tx, &content).unwrap();
    assert_eq!((stat.blocks, stat.zero, stat.unchanged, stat.duplicate, stat.stored), (64, 4, 0, 1, 59));
    let (second, stat) = commit(&tx, &first, &content, &[range(0, 64)], &[]).unwrap();
    assert_eq!((second, stat.unchanged, stat.stored_bytes), (first, 60, 0));
    let (third, stat) = commit_all(&tx, &content).unwrap();
    assert_eq!((third, stat.duplicate, stat.stored, stat.stored_bytes), (first, 60, 0, 0));
    // The same bytes elsewhere in another blob are the same blocks.
    let shifted = Mem([vec![1; BLOCK as usize], content.0.clone()].concat());
    let (_, stat) = commit_all(&tx, &shifted).unwrap();
    assert_eq!((stat.zero, stat.duplicate, stat.stored), (4, 60, 1));
    assert_eq!(store.stats().duplicate_blocks, 121);
}

#[test]
fn small_blobs_keep_their_exact_size() {
    let store = store();
    let tx = store.begin();
    for len in [0, 1, 4095, 4096, 4097, 300_000] {
        let bytes = Rng(len as u64).noise(len);
        let version = tx.put_bytes(&bytes).unwrap();
        assert_eq!(version.size, len as u64);
        assert_same(&read_all(&store, &version).unwrap(), &bytes);
    }
}

#[test]
fn a_clone_costs_nothing_and_a_diff_only_what_differs() {
    let store = store();
    let mut content = Mem(Rng(3).noise(5000 * BLOCK as usize));
    let version = publish(&store, "a", &content);
    let stored = store.stats();
    store.begin().publish("b", Expect::Absent, &manifest(&[("ram", version)])).unwrap();
    let cloned = store.stats();
    assert_eq!(
        (cloned.nodes_made, cloned.packs, cloned.stored_bytes),
        (stored.nodes_made, stored.packs, stored.stored_bytes)
    );

    content.0[1234 * BLOCK as usize] ^= 1;
    let tx = store.begin();
    let (changed, _) = commit(&tx, &version, &content, &[range(1234, 1235)], &[]).unwrap();
    assert_eq!(store.stats().nodes_made - stored.nodes_made, 4, "one node a level");
    let before = store.stats().nodes_loaded;
    assert_eq!(store.diff(&version, &changed).unwrap(), [range(1234, 1235)]);
    assert_eq!(store.stats().nodes_loaded - before, 8, "two paths");
    let before = store.stats().nodes_loaded;
    assert_eq!(store.diff(&version, &version).unwrap(), []);
    assert_eq!(store.stats().nodes_loaded - before, 0);
}

#[test]
fn a_read_decompresses_a_frame_once() {
    let store = store();
    let content = Mem(Rng(3).mixed(64));
    let version = publish(&store, "a", &content);
    let first = store.read_at(&version, 0, &mut [0; 32 * BLOCK as usize]).unwrap();
    assert!(first.stored_bytes > 0 && first.fetched_blocks > 0);
    let again = store.read_at(&version, 0, &mut [0; 32 * BLOCK as usize]).unwrap();
    assert_eq!((again.stored_bytes, again.fetched_blocks, again.zero_blocks), (0, 0, first.zero_blocks));
    assert_eq!(again.cached_blocks, first.cached_blocks + first.fetched_blocks);
}

#[test]
fn bad_requests_are_refused_and_leave_nothing() {
    let store = store();
    let content = Mem(Rng(3).noise(64 * BLOCK as usize));
    let tx = store.begin();
    let base = store.empty(64 * BLOCK, 4096);
    for written in [
        vec![ByteRange::new(1, 4096)],
        vec![ByteRange::new(0, 4095)],
        vec![range(2, 3), range(1, 2)],
        vec![range(0, 2), range(1, 3)],
        vec![range(0, 65)],
        vec![range(3, 3)],
    ] {
        assert!(matches!(commit(&tx, &base, &content, &written, &[]), Err(Error::Invalid(_))), "{written:?}");
    }
    let unknown = store::Version { root: format!("{:064x}", 1u128 << 99).parse().unwrap(), ..base };
    assert!(matches!(commit(&tx, &unknown, &content, &[], &[]), Err(Error::Unknown { .. })));
    let short = Mem(content.0[..10 * BLOCK as usize].to_vec());
    let failed = commit(&tx, &base, &short, &[range(0, 5), range(8, 64)], &[]);
    assert!(matches!(failed, Err(Error::Source { .. })));
    let cancel = AtomicBool::new(true);
    let changes = Changes {
        written: &[range(0, 64)],
        zeroed: &[],
        source: &content,
        threads: 1,
        progress: None,
        cancel: Some(&cancel),
    };
    assert!(matches!(tx.commit(&base, &changes), Err(Error::Cancelled)));
    for head in ["", "/a", "a//b", "../x", "a/.b", "a b", "a\u{e9}", &"x".repeat(300)] {
        assert!(matches!(store.begin().publish(head, Expect::Any, &manifest(&[])), Err(Error::Invalid(_))), "{head}");
    }
    let lost = manifest(&[("ram", unknown)]);
    assert!(matches!(store.begin().publish("a", Expect::Any, &lost), Err(Error::Unknown { .. })));
    drop(tx);
    let stats = store.stats();
    assert_eq!((stats.heads, stats.packs, stats.blocks), (0, 0, 0));
}

#[test]
fn progress_reaches_the_end() {
    let store = store();
    let content = Mem(Rng(3).noise(3000 * BLOCK as usize));
    let told = Mutex::new(Vec::new());
    let progress = |done, total| told.lock().unwrap().push((done, total));
    let changes = Changes {
        written: &[range(0, 3000)],
        zeroed: &[],
        source: &content,
        threads: 2,
        progress: Some(&progress),
        cancel: None,
    };
    store.begin().commit(&store.empty(3000 * BLOCK, 4096), &changes).unwrap();
    let told = told.into_inner().unwrap();
    assert!(told.is_sorted() && told.last() == Some(&(3000 * BLOCK, 3000 * BLOCK)), "{told:?}");
}

#[test]
fn heads_are_compared_and_swapped() {
    let store = store();
    let (a, b) = (manifest(&[]), manifest(&[("x", store.empty(4096, 4096))]));
    let first = store.begin().publish("snap/1", Expect::Absent, &a).unwrap();
    let lost = store.begin().publish("snap/1", Expect::Absent, &b);
    assert!(matches!(lost, Err(Error::HeadChanged { .. })), "{lost:?}");
    let second = store.begin().publish("snap/1", Expect::Etag(first.clone()), &b).unwrap();
    assert!(matches!(store.begin().publish("snap/1", Expect::Etag(first), &a), Err(Error::HeadChanged { .. })));
    assert_eq!(store.head("snap/1").unwrap(), Some((b, second.clone())));
    store.begin().publish("pin/x", Expect::Any, &a).unwrap();
    assert_eq!(store.heads("snap/").unwrap(), ["snap/1"]);
    assert_eq!(store.heads("").unwrap(), ["pin/x", "snap/1"]);
    assert!(store.delete_head("snap/1").unwrap() && !store.delete_head("snap/1").unwrap());
    assert_eq!(store.head("snap/1").unwrap(), None);
    assert!(matches!(store.begin().publish("snap/1", Expect::Etag(second), &a), Err(Error::HeadChanged { .. })));
}
