//! Deterministic simulation: one seed drives writers, readers, collections, faults, deaths and reopenings, one step
//! after another. A seed that fails is printed and repeats exactly: `OFFSHOOT_SEED=n cargo test --test simulation`.
//! `OFFSHOOT_TEST_FULL=1` runs many thousands.
//!
//! What is checked: whatever is read is right; what was acknowledged stays, across every death; what was not is there
//! as a whole or not at all; nothing that is needed is collected; nothing that is not stays for ever; without faults
//! nothing fails.
#![allow(missing_docs, unreachable_pub)]

use crate::common;
use crate::faulty;

use common::{BLOCK, Mem, Rng, assert_sound, commit, manifest, read_all};
use faulty::{Faults, Faulty};
use std::collections::BTreeMap;
use std::sync::Arc;
use store::engine::cached::{CacheOptions, Cached};
use store::engine::{Engine, Memory};
use store::{ArrangeOptions, Error, Etag, Expect, Mode, Store, Transaction, Version};

/// Seeds that found something once.
const FOUND: [u64; 3] = [3_826_254_113, 14_763_951_313, 12_626_953_454];
/// Blocks of every blob.
const BLOCKS: u64 = 24;

/// A transaction under way.
struct Writer<'a> {
    tx: Transaction<'a>,
    /// What it committed last, with its content.
    work: Option<(Version, Vec<u8>)>,
}

/// Everything that must be so.
#[derive(Default)]
struct Model {
    heads: BTreeMap<String, Version>,
    contents: BTreeMap<Version, Vec<u8>>,
    etags: BTreeMap<String, Etag>,
}

struct Simulation {
    rng: Rng,
    engine: Faulty,
    /// What the store sees: the engine, or a cache in front of it.
    seen: Arc<dyn Engine>,
    faults: Faults,
    model: Model,
    steps_left: u64,
    /// How often each thing happened, so that a simulation that does nothing is found out.
    tally: BTreeMap<&'static str, u64>,
    _dir: Option<tempfile::TempDir>,
}

/// A key that is the same for every seed: names, and with them every order, depend on it.
fn put_key(memory: &Memory, format: u8) {
    let mut key = Vec::new();
    key.extend_from_slice(b"OFFSTORE");
    key.extend_from_slice(&[format, 0, 0, 0, 0, 0, 0, 0]);
    key.extend_from_slice(&[42; 32]);
    let sum = blake3::hash(&key);
    key.extend_from_slice(sum.as_bytes());
    memory.put("key", &key).unwrap();
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let engine = Faulty::new(rng.next());
        // Every other seed works on a store that an earlier release made.
        put_key(&engine.memory, 1 + (seed / 2 % 2) as u8);
        let faults = match rng.below(4) {
            0 => Faults::default(),
            1 => Faults { error: 0, full: 0, death: 60 },
            2 => Faults { error: 100, full: 60, death: 0 },
            _ => Faults { error: 60, full: 30, death: 30 },
        };
        let (mut seen, mut dir) = (Arc::new(engine.clone()) as Arc<dyn Engine>, None);
        if rng.below(6) == 0 {
            let at = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            // Nothing is fetched ahead: that would be other threads.
            let options = CacheOptions { chunk_bytes: Some(64 << 10), prefetchers: 0, ..CacheOptions::new(600_000) };
            seen = Arc::new(Cached::open(seen, at.path(), &options).unwrap());
            dir = Some(at);
        }
        let steps_left = 30 + rng.below(120);
        Self { rng, engine, seen, faults, model: Model::default(), steps_left, tally: BTreeMap::new(), _dir: dir }
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn dead(&self) -> bool {
        self.engine.state().dead
    }

    /// Opens the store; a machine that dies meanwhile is started again.
    fn open(&mut self) -> Store {
        self.engine.set_faults(self.faults);
        for _ in 0..5 {
            match Store::open_engine(Arc::clone(&self.seen), Mode::ReadWrite) {
                Ok(store) => return store,
                Err(_) if self.engine.state().injected > 0 => self.engine.set_faults(self.faults),
                Err(error) => panic!("it does not open: {error}"),
            }
        }
        self.engine.set_faults(Faults::default());
        let store = Store::open_engine(Arc::clone(&self.seen), Mode::ReadWrite).unwrap();
        self.engine.set_faults(self.faults);
        store
    }

    fn run(mut self) -> (u64, BTreeMap<&'static str, u64>) {
        while self.steps_left > 0 {
            let store = self.open();
            self.check_all(&store);
            self.live(&store);
            if self.dead() {
                self.count("death");
            }
        }
        // Nothing is left of a store without heads, once it was opened anew: what leaked is forgotten then.
        self.engine.set_faults(Faults::default());
        let store = Store::open_engine(Arc::clone(&self.seen), Mode::ReadWrite).unwrap();
        self.check_all(&store);
        for head in store.heads("").unwrap() {
            store.delete_head(&head).unwrap();
        }
        store.collect().unwrap();
        let left: Vec<String> = self.engine.memory.contents().into_keys().collect();
        assert_eq!(left, ["key"], "garbage stays");
        (self.engine.state().trace, self.tally)
    }

    /// Steps until the machine dies, the process is started anew, or it is over.
    fn live(&mut self, store: &Store) {
        let mut writers: Vec<Writer<'_>> = Vec::new();
        let mut reader = None;
        while self.steps_left > 0 && !self.dead() {
            self.steps_left -= 1;
            match self.rng.below(20) {
                0..=2 if writers.len() < 4 => writers.push(Writer { tx: store.begin(), work: None }),
                3..=7 if !writers.is_empty() => {
                    let at = self.rng.below(writers.len() as u64) as usize;
                    self.commit(store, &mut writers[at]);
                }
                8..=10 if !writers.is_empty() => {
                    let at = self.rng.below(writers.len() as u64) as usize;
                    let writer = writers.swap_remove(at);
                    self.publish(store, writer);
                }
                11 if !writers.is_empty() => {
                    let at = self.rng.below(writers.len() as u64) as usize;
                    drop(writers.swap_remove(at));
                    self.count("dropped");
                }
                12 => self.delete(store),
                13 | 14 => {
                    if store.collect().is_ok() {
                        self.count("collected");
                    }
                    if self.rng.below(3) == 0 && !self.dead() {
                        self.arrange(store);
                    }
                }
                15 => {
                    reader = Store::open_engine(Arc::clone(&self.seen), Mode::ReadOnly).ok();
                }
                16 => {
                    if let Some(reader) = &reader {
                        self.read(reader, "a reader");
                    }
                }
                17 if self.rng.below(6) == 0 => {
                    self.count("restart");
                    return;
                }
                18 if self.rng.below(4) == 0 => self.engine.quietly(|| assert_sound(store)),
                _ => self.read(store, "the writer"),
            }
        }
    }

    /// Whether an operation may fail: not unless something was made to go wrong since `before`.
    fn excused(&self, before: u64, error: &Error) {
        assert!(self.engine.state().injected > before, "it failed without a fault: {error:?}");
    }

    fn injected(&self) -> u64 {
        self.engine.state().injected
    }

    fn a_head(&mut self) -> Option<(String, Version)> {
        let at = self.rng.below(self.model.heads.len().max(1) as u64) as usize;
        self.model.heads.iter().nth(at).map(|(head, version)| (head.clone(), *version))
    }

    fn commit(&mut self, store: &Store, writer: &mut Writer<'_>) {
        let base = match (&writer.work, self.rng.below(4)) {
            (Some((version, bytes)), 1..) => (*version, bytes.clone()),
            (_, 0) => (store.empty(BLOCKS * BLOCK, BLOCK as u32), vec![0; (BLOCKS * BLOCK) as usize]),
            _ => match self.a_head() {
                Some((_, version)) => (version, self.model.contents[&version].clone()),
                None => (store.empty(BLOCKS * BLOCK, BLOCK as u32), vec![0; (BLOCKS * BLOCK) as usize]),
            },
        };
        let (start, zero) = (self.rng.below(BLOCKS), self.rng.below(BLOCKS));
        let len = 1 + self.rng.below((BLOCKS - start).min(10));
        // Few different seeds, so that writers store the same blocks.
        let new = Rng(self.rng.below(40)).mixed(len);
        let mut bytes = base.1;
        let zeroed = common::range(zero, zero + 1);
        bytes[zeroed.start as usize..zeroed.end as usize].fill(0);
        bytes[(start * BLOCK) as usize..][..new.len()].copy_from_slice(&new);
        let content = Mem(bytes);
        let before = self.injected();
        match commit(&writer.tx, &base.0, &content, &[common::range(start, start + len)], &[zeroed]) {
            Ok((version, _)) => {
                self.count("committed");
                writer.work = Some((version, content.0));
            }
            // A head may have been removed, and what it kept collected, since the base was chosen: not here.
            Err(error) => self.excused(before, &error),
        }
    }

    fn arrange(&mut self, store: &Store) {
        let Some((_, version)) = self.a_head() else { return };
        let order: Vec<u64> = (0..1 + self.rng.below(BLOCKS)).map(|_| self.rng.below(BLOCKS)).collect();
        let before = self.injected();
        match store.arrange(&version, &order, &ArrangeOptions { always: true, ..ArrangeOptions::default() }) {
            Ok(_) => self.count("arranged"),
            Err(error) => self.excused(before, &error),
        }
    }

    fn publish(&mut self, store: &Store, writer: Writer<'_>) {
        let Some((version, bytes)) = writer.work else { return };
        let head = format!("vm/{}", self.rng.below(8));
        let old = self.model.heads.get(&head).copied();
        let expect = match (self.rng.below(3), self.model.etags.get(&head)) {
            (0, _) => Expect::Absent,
            (1, Some(etag)) => Expect::Etag(etag.clone()),
            _ => Expect::Any,
        };
        self.model.contents.insert(version, bytes);
        let must_fit = match &expect {
            Expect::Absent => old.is_none(),
            Expect::Etag(_) => old.is_some(),
            Expect::Any => true,
        };
        let before = self.injected();
        match writer.tx.publish(&head, expect, &manifest(&[("ram", version)])) {
            Ok(etag) => {
                assert!(must_fit, "published over what was not expected");
                self.count("published");
                self.model.etags.insert(head.clone(), etag);
                self.model.heads.insert(head, version);
            }
            Err(Error::HeadChanged { .. }) => assert!(!must_fit, "the head is as it was left"),
            Err(error) => {
                // The pack of another transaction may fail for ever once it failed.
                if before == 0 {
                    self.excused(before, &error);
                }
                self.count("publication failed");
                self.settle(store, &head, &[old, Some(version)]);
            }
        }
    }

    fn delete(&mut self, store: &Store) {
        let Some((head, version)) = self.a_head() else { return };
        let before = self.injected();
        match store.delete_head(&head) {
            Ok(there) => {
                assert!(there, "{head} was there");
                self.count("removed");
                self.model.heads.remove(&head);
                self.model.etags.remove(&head);
            }
            Err(error) => {
                self.excused(before, &error);
                self.settle(store, &head, &[Some(version), None]);
            }
        }
    }

    /// After a failure: the head is in one of these states, and which is known from now on.
    fn settle(&mut self, store: &Store, head: &str, may_be: &[Option<Version>]) {
        let found = self.engine.quietly(|| store.head(head)).unwrap();
        let version = found.as_ref().map(|(manifest, _)| manifest.versions["ram"]);
        assert!(may_be.contains(&version), "{head} is {version:?}, which it can never have been");
        match found {
            Some((manifest, etag)) => {
                self.model.heads.insert(head.to_owned(), manifest.versions["ram"]);
                self.model.etags.insert(head.to_owned(), etag);
            }
            None => {
                self.model.heads.remove(head);
                self.model.etags.remove(head);
            }
        }
    }

    fn read(&mut self, store: &Store, who: &str) {
        let Some((head, version)) = self.a_head() else { return };
        let before = self.injected();
        let outcome = store.head(&head).and_then(|found| {
            let (manifest, _) = found.expect("a head that was published");
            assert_eq!(manifest.versions["ram"], version);
            read_all(store, &version)
        });
        match outcome {
            Ok(bytes) => {
                self.count("read");
                assert!(bytes == self.model.contents[&version], "wrong bytes in {version}, read by {who}");
            }
            Err(error) => {
                assert!(self.injected() > before, "{who} fails without a fault: {error}");
            }
        }
    }

    /// The store has exactly the heads of the model, all of them whole.
    fn check_all(&mut self, store: &Store) {
        let found: BTreeMap<String, Version> = self.engine.quietly(|| {
            assert_sound(store);
            let version = |head: String| {
                let version = store.head(&head).unwrap().unwrap().0.versions["ram"];
                (head, version)
            };
            store.heads("").unwrap().into_iter().map(version).collect()
        });
        assert_eq!(found, self.model.heads);
        for version in found.values() {
            let bytes = self.engine.quietly(|| read_all(store, version)).unwrap();
            assert!(bytes == self.model.contents[version], "wrong bytes in {version}");
        }
    }
}

fn simulate(seed: u64) -> (u64, BTreeMap<&'static str, u64>) {
    let outcome = std::panic::catch_unwind(|| Simulation::new(seed).run());
    outcome.unwrap_or_else(|panic| {
        eprintln!("seed {seed} fails; OFFSHOOT_SEED={seed} repeats it");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn what_was_acknowledged_stays_whatever_fails() {
    if let Some(seed) = std::env::var("OFFSHOOT_SEED").ok().and_then(|seed| seed.parse().ok()) {
        println!("{:?}", simulate(seed).1);
        return;
    }
    let full = std::env::var_os("OFFSHOOT_TEST_FULL").is_some();
    let seeds = if full { 20_000 } else { 400 };
    // Other seeds every time in the long run; the short one is the same for all.
    let first = if full { u64::from(std::process::id()) << 20 } else { 0 };
    println!("seeds {first} to {}", first + seeds - 1);
    let mut tally: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in FOUND.into_iter().chain(first..first + seeds) {
        simulate(seed).1.into_iter().for_each(|(what, times)| *tally.entry(what).or_default() += times);
    }
    println!("{tally:?}");
    let things = [
        "death",
        "restart",
        "committed",
        "published",
        "publication failed",
        "removed",
        "collected",
        "arranged",
        "read",
    ];
    for what in things {
        assert!(tally.get(what).is_some_and(|times| *times > seeds / 8), "too little of `{what}`: {tally:?}");
    }
}

#[test]
fn a_seed_repeats_exactly() {
    for seed in 1000..1020 {
        assert_eq!(simulate(seed), simulate(seed), "{seed}");
    }
}
