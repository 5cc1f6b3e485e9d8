//! What the tests of the store share: sources, content and shorthands.
#![allow(dead_code, missing_docs, unreachable_pub)]

use base::ByteRange;
use std::collections::BTreeMap;
use std::io;
use store::{BlockSource, Changes, CommitStat, Error, Expect, Manifest, Store, Transaction, Version};

pub const BLOCK: u64 = 4096;

/// A blob's content in memory.
pub struct Mem(pub Vec<u8>);

impl BlockSource for Mem {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        buf.copy_from_slice(self.0.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A small generator of numbers, so that a seed repeats a test.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A block that compresses to about a half.
    pub fn block(&mut self) -> Vec<u8> {
        let mut out = vec![0; BLOCK as usize];
        for part in out.chunks_exact_mut(16) {
            part[..8].copy_from_slice(&self.next().to_le_bytes());
        }
        out
    }

    /// Bytes that do not compress.
    pub fn noise(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }

    /// `blocks` blocks: some zero, some alike, most of their own.
    pub fn mixed(&mut self, blocks: u64) -> Vec<u8> {
        let common = self.block();
        (0..blocks)
            .flat_map(|_| match self.below(8) {
                0 => vec![0; BLOCK as usize],
                1 => common.clone(),
                2 => self.noise(BLOCK as usize),
                _ => self.block(),
            })
            .collect()
    }
}

pub fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start * BLOCK, end * BLOCK)
}

pub fn commit(
    tx: &Transaction<'_>,
    base: &Version,
    content: &Mem,
    written: &[ByteRange],
    zeroed: &[ByteRange],
) -> Result<(Version, CommitStat), Error> {
    let changes = Changes { written, zeroed, source: content, threads: 1, progress: None, cancel: None };
    tx.commit(base, &changes)
}

/// Commits all of `content` on zero.
pub fn commit_all(tx: &Transaction<'_>, content: &Mem) -> Result<(Version, CommitStat), Error> {
    let base = tx_store(tx, content.0.len() as u64);
    commit(tx, &base, content, &[ByteRange::new(0, content.0.len() as u64)], &[])
}

fn tx_store(_tx: &Transaction<'_>, size: u64) -> Version {
    let mut height = 1;
    while 16u64.pow(height) < size.div_ceil(BLOCK) {
        height += 1;
    }
    format!("{:064x}.{size}.{BLOCK}", height).parse().unwrap()
}

pub fn manifest(versions: &[(&str, Version)]) -> Manifest {
    let versions: BTreeMap<_, _> = versions.iter().map(|(name, version)| ((*name).to_owned(), *version)).collect();
    Manifest { versions, meta: "{\"made\":\"by a test\"}".to_owned() }
}

/// Publishes all of `content` as blob `ram` of `head`.
pub fn publish(store: &Store, head: &str, content: &Mem) -> Version {
    let tx = store.begin();
    let (version, _) = commit_all(&tx, content).unwrap();
    tx.publish(head, Expect::Any, &manifest(&[("ram", version)])).unwrap();
    version
}

pub fn read_all(store: &Store, version: &Version) -> Result<Vec<u8>, Error> {
    let mut out = vec![0xaa; version.size as usize];
    store.read_at(version, 0, &mut out)?;
    Ok(out)
}

/// Asserts without printing megabytes.
#[track_caller]
pub fn assert_same(read: &[u8], expected: &[u8]) {
    assert_eq!(read.len(), expected.len());
    // Comparing whole first: byte by byte is slow without optimisation.
    if read != expected
        && let Some(at) = read.iter().zip(expected).position(|(a, b)| a != b)
    {
        panic!("byte {at:#x} is {:#x} instead of {:#x}", read[at], expected[at]);
    }
}

#[track_caller]
pub fn assert_sound(store: &Store) {
    let report = store.verify(&mut |_, _| {}).unwrap();
    assert!(report.faults.is_empty(), "{} faults, first: {}", report.faults_total, report.faults[0]);
}

/// Collects a shared store until nothing waits for the end of its grace period.
pub fn collect_shared(store: &Store) {
    for _ in 0..200 {
        store.collect().unwrap();
        let plan = store.explain_collection(&[]).unwrap();
        if plan.bytes_now + plan.bytes_later == 0 && plan.packs.iter().all(|pack| pack.kept_bytes > 0) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("garbage stays: {:#?}", store.explain_collection(&[]).unwrap().packs);
}

/// The name by which the test program knows a test of a module: what a test runs in a process of its own.
pub fn own(module: &str, test: &str) -> String {
    module.split_once("::").map_or_else(|| test.to_owned(), |(_, module)| format!("{module}::{test}"))
}
