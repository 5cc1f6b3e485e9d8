//! What a random read costs after a long history, counted in places that are read and not in time: a blob with data in
//! one commit, and the same with as many small commits after it as change a block in two.
#![allow(missing_docs)]

use crate::common;

use common::{BLOCK, Mem, Rng, assert_sound};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use store::blob::At;
use store::engine::{Engine, Memory};
use store::{BlockSource, Mode, Store};

const BLOCKS: u64 = 1 << 20;
const DATA: usize = 16 << 10;
/// A daemon tidies up behind so many commits.
const TIDY: u64 = 64;

/// `count` blocks anywhere, ascending.
fn scattered(rng: &mut Rng, count: usize) -> Vec<base::ByteRange> {
    let mut blocks = BTreeSet::new();
    while blocks.len() < count {
        blocks.insert(rng.below(BLOCKS));
    }
    blocks.into_iter().map(|block| common::range(block, block + 1)).collect()
}

struct Noise(u64);

impl BlockSource for Noise {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for (number, block) in buf.chunks_mut(BLOCK as usize).enumerate() {
            let seed = self.0 << 40 ^ (offset / BLOCK + number as u64);
            block.copy_from_slice(&Rng(seed).noise(block.len()));
        }
        Ok(())
    }
}

fn grow(store: &Store, commits: u64) {
    let blob = store.create_blob("disk", BLOCKS * BLOCK, BLOCK as u32).unwrap();
    let mut rng = Rng(7);
    blob.write_from(&scattered(&mut rng, DATA), &Noise(1), 2).unwrap();
    for commit in 1..commits {
        blob.write_from(&scattered(&mut rng, 16), &Noise(commit + 1), 1).unwrap();
        if commit % TIDY == 0 {
            store.collect().unwrap();
        }
    }
    assert_sound(store);
}

/// Frames read for each of some random reads of blocks that have data, by a process that has cached nothing.
fn frames_a_read(store: &Store) -> f64 {
    let blob = store.blob("disk").unwrap();
    let written = scattered(&mut Rng(7), DATA);
    let (mut rng, mut block) = (Rng(100), Mem(vec![0; BLOCK as usize]));
    let reads = 200;
    for _ in 0..reads {
        let at = written[rng.below(DATA as u64) as usize].start;
        blob.read(At::Latest, at, &mut block.0).unwrap();
        assert!(block.0.iter().any(|byte| *byte != 0), "the block at {at:#x} has lost its data");
    }
    store.stats().frames_read as f64 / f64::from(reads)
}

fn check(open: impl Fn(bool, Mode) -> Store) {
    grow(&open(false, Mode::ReadWrite), 1);
    grow(&open(true, Mode::ReadWrite), 520);
    let (one, many) = (frames_a_read(&open(false, Mode::ReadOnly)), frames_a_read(&open(true, Mode::ReadOnly)));
    println!("frames a read: {one:.2} after one commit, {many:.2} after 520");
    assert!(many <= one, "{many:.2} frames a read after 520 commits, {one:.2} after one");
}

#[test]
fn a_read_after_many_commits_reads_no_more_places_than_after_one() {
    let scratch = || tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let (young, old) = (scratch(), scratch());
    check(|is_old, mode| Store::open(if is_old { old.path() } else { young.path() }, mode).unwrap());
}

#[test]
fn nor_does_it_in_a_shared_store() {
    let (young, old): (Arc<dyn Engine>, Arc<dyn Engine>) = (Arc::new(Memory::default()), Arc::new(Memory::default()));
    // Whoever reads is a process of its own, with nothing cached.
    check(|is_old, _| {
        Store::open_shared(Arc::clone(if is_old { &old } else { &young }), Duration::from_secs(3600)).unwrap()
    });
}
