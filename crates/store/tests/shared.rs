//! Shared stores: several writers and collectors on one medium, with a grace period of moments. Whatever happens,
//! everything that a head names is there, and what none names goes.

use crate::common;
use crate::weed;

use base::ByteRange;
use common::{
    Mem, Rng, assert_same, assert_sound, collect_shared, commit, commit_all, manifest, publish, range, read_all,
};
use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;
use store::engine::object::Limits;
use store::engine::{Engine, Memory, Object, S3, Upload};
use store::{ArrangeOptions, Error, Etag, Expect, Fate, Mode, Store, Version};

fn open(engine: &Arc<dyn Engine>, grace_ms: u64) -> Store {
    Store::open_shared(Arc::clone(engine), Duration::from_millis(grace_ms)).unwrap()
}

fn memory() -> Arc<dyn Engine> {
    Arc::new(Memory::default())
}

#[test]
fn a_directory_or_an_engine_of_one_writer_cannot_be_shared() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(dir.path(), Mode::Shared), Err(Error::Invalid(_))));
    let local = store::engine::Local::open_writer(dir.path()).unwrap_or_else(|_| panic!("nobody else uses it"));
    assert!(matches!(Store::open_engine(Arc::new(local), Mode::Shared), Err(Error::Invalid(_))));
    // And what nobody locks is not for one writer.
    let server = Arc::new(weed::engine());
    assert!(matches!(Store::open_engine(server, Mode::ReadWrite), Err(Error::Invalid(_))));
    assert!(matches!(Store::open_place("s3://b?endpoint=nowhere", Mode::ReadWrite), Err(Error::Invalid(_))));
}

#[test]
fn two_writers_see_and_share_what_the_other_published() {
    let engine = memory();
    let (a, b) = (open(&engine, 10_000), open(&engine, 10_000));
    let mut content = Mem(Rng(1).mixed(500));
    let first = publish(&a, "a", &content);
    // B knew nothing of it when it opened, and finds it.
    assert_same(&read_all(&b, &first).unwrap(), &content.0);
    let tx = b.begin();
    let (same, stat) = commit_all(&tx, &content).unwrap();
    assert_eq!((same, stat.stored), (first, 0));
    drop(tx);
    content.0[..4096].fill(7);
    let tx = b.begin();
    let (next, stat) = commit(&tx, &first, &content, &[range(0, 1)], &[]).unwrap();
    assert_eq!(stat.stored, 1);
    tx.publish("b", Expect::Absent, &manifest(&[("ram", next)])).unwrap();
    assert_same(&read_all(&a, &next).unwrap(), &content.0);
    assert_sound(&a);
    assert_sound(&b);
    assert_eq!(a.heads("").unwrap(), ["a", "b"], "the store's own record is no head");
}

#[test]
fn a_transaction_that_is_dropped_leaves_nothing_and_harms_nobody() {
    let engine = memory();
    let store = open(&engine, 10_000);
    let content = Mem(Rng(2).mixed(300));
    let (first, second) = (store.begin(), store.begin());
    commit_all(&first, &content).unwrap();
    // Finds what the first has stored, and publishes after the first is gone.
    let (version, stat) = commit_all(&second, &content).unwrap();
    assert_eq!(stat.stored, 0);
    drop(first);
    second.publish("kept", Expect::Absent, &manifest(&[("ram", version)])).unwrap();
    assert_sound(&store);
    assert_same(&read_all(&open(&engine, 1), &version).unwrap(), &content.0);
    let packs = store.stats().packs;
    let tx = store.begin();
    commit_all(&tx, &Mem(Rng(3).mixed(300))).unwrap();
    drop(tx);
    assert_eq!(store.stats().packs, packs);
    assert_eq!(engine.list("packs").unwrap().len() as u64, 2 * packs);
}

#[test]
fn garbage_waits_for_the_grace_period_and_is_spared_when_it_is_reached_again() {
    let engine = memory();
    let store = open(&engine, 3000);
    let (a, b) = (Mem(Rng(4).mixed(300)), Mem(Rng(5).mixed(300)));
    let (version_a, _) = (publish(&store, "a", &a), publish(&store, "b", &b));
    let (head_a, _) = store.head("a").unwrap().unwrap();
    let young = store.explain_collection(&["a".to_owned(), "b".to_owned()]).unwrap();
    assert!(young.packs.iter().all(|pack| pack.fate == Fate::Keep && pack.why.contains("younger")), "{young:#?}");
    store.delete_head("a").unwrap();
    store.delete_head("b").unwrap();
    assert_eq!(store.collect().unwrap().condemned, 0, "nothing that young is condemned");
    sleep(Duration::from_millis(3100));
    assert!(store.explain_collection(&[]).unwrap().packs.iter().all(|pack| pack.fate == Fate::Condemn));
    assert_eq!(store.collect().unwrap().condemned, 2);
    assert!(store.explain_collection(&[]).unwrap().packs.iter().all(|pack| pack.fate == Fate::Wait));
    assert_eq!(store.collect().unwrap().packs, 0);
    // One more writer publishes the old version again: what it reaches is stored again, or spared.
    let other = open(&engine, 3000);
    other.begin().publish("a/again", Expect::Absent, &head_a).unwrap();
    sleep(Duration::from_millis(3100));
    collect_shared(&store);
    let kept = store.explain_collection(&[]).unwrap();
    assert!(kept.packs.iter().all(|pack| pack.why.contains("`a/again`")), "{kept:#?}");
    assert_sound(&store);
    assert_sound(&other);
    assert_same(&read_all(&other, &version_a).unwrap(), &a.0);
    assert!(other.head("b").unwrap().is_none());
}

#[test]
fn what_no_head_reaches_any_more_cannot_be_published_by_halves() {
    let engine = memory();
    let (store, other) = (open(&engine, 1000), open(&engine, 1000));
    let content = Mem(Rng(6).mixed(300));
    let version = publish(&store, "a", &content);
    assert_same(&read_all(&other, &version).unwrap(), &content.0);
    store.delete_head("a").unwrap();
    sleep(Duration::from_millis(1100));
    collect_shared(&store);
    assert!(engine.list("packs").unwrap().is_empty());
    // This writer remembers the version, its nodes and some frames.
    let tx = other.begin();
    let refused = tx.publish("b", Expect::Absent, &manifest(&[("ram", version)])).unwrap_err();
    assert!(matches!(refused, Error::Unknown { .. } | Error::Io { .. }), "{refused}");
    assert!(other.heads("").unwrap().is_empty());
    // The content itself can be stored anew.
    assert_eq!(publish(&other, "c", &content), version);
    assert_sound(&other);
    assert_sound(&store);
}

/// A writer that works for longer than the grace period, while its packs are taken for garbage.
#[test]
fn a_slow_writer_publishes_whole_or_not_at_all() {
    let engine = memory();
    let (slow, collector) = (open(&engine, 600), open(&engine, 600));
    let mut rng = Rng(7);
    for round in 0..6 {
        let base = Mem(rng.mixed(200));
        let base_version = publish(&collector, "base", &base);
        let tx = slow.begin();
        let content = Mem(rng.mixed(200));
        let (version, _) = commit_all(&tx, &content).unwrap();
        assert_eq!(commit_all(&tx, &base).unwrap().0, base_version);
        if round % 2 == 0 {
            // Sealed early, as large transactions do, and condemned before it is published.
            let other = slow.begin();
            let (one, _) = commit_all(&other, &Mem(rng.mixed(1))).unwrap();
            other.publish("other", Expect::Any, &manifest(&[("ram", one)])).unwrap();
        }
        collector.delete_head("base").unwrap();
        for _ in 0..round {
            sleep(Duration::from_millis(300));
            collector.collect().unwrap();
        }
        let published = tx.publish("slow", Expect::Any, &manifest(&[("own", version), ("base", base_version)]));
        match published {
            Ok(_) => {
                for (version, content) in [(&version, &content), (&base_version, &base)] {
                    assert_same(&read_all(&open(&engine, 1), version).unwrap(), &content.0);
                }
            }
            Err(Error::Unknown { .. } | Error::Invalid(_) | Error::Io { .. }) => {
                assert!(round > 0, "nobody removed anything");
            }
            Err(other) => panic!("{other}"),
        }
        assert_sound(&collector);
    }
}

#[test]
fn scattered_survivors_and_small_packs_are_gathered() {
    let engine = memory();
    let store = open(&engine, 1500);
    let mut rng = Rng(8);
    let mut content = Mem(rng.noise(2000 * 4096));
    let mut version = publish(&store, "vm", &content);
    for _ in 0..60 {
        let tx = store.begin();
        let block = rng.below(2000);
        let at = block as usize * 4096;
        content.0[at..at + 4096].copy_from_slice(&rng.block());
        (version, _) = commit(&tx, &version, &content, &[range(block, block + 1)], &[]).unwrap();
        tx.publish("vm", Expect::Any, &manifest(&[("ram", version)])).unwrap();
    }
    let tx = store.begin();
    let half = Mem(vec![0; content.0.len()]);
    let zeroed: Vec<_> = (0..1999).map(|block| range(block, block + 1)).collect();
    content.0[..1999 * 4096].fill(0);
    let (last, _) = commit(&tx, &version, &half, &[], &zeroed).unwrap();
    tx.publish("vm", Expect::Any, &manifest(&[("ram", last)])).unwrap();
    sleep(Duration::from_millis(1600));
    collect_shared(&store);
    assert!(store.stats().packs <= 3, "{:?}", store.stats());
    assert!(store.stats().stored_bytes < 100_000, "{:?}", store.stats());
    assert_same(&read_all(&open(&engine, 1), &last).unwrap(), &content.0);
    assert_sound(&store);
}

#[test]
fn a_collector_that_died_is_taken_over_from() {
    let memory = Memory::default();
    let engine: Arc<dyn Engine> = Arc::new(memory.clone());
    let store = open(&engine, 400);
    let kept = Mem(Rng(9).mixed(200));
    let version = publish(&store, "kept", &kept);
    for number in 0..4 {
        publish(&store, &format!("gone{number}"), &Mem(Rng(10 + number).mixed(100)));
    }
    (0..4).for_each(|number| assert!(store.delete_head(&format!("gone{number}")).unwrap()));
    let before = memory.log().len();
    sleep(Duration::from_millis(450));
    collect_shared(&store);
    let log = memory.log();
    assert!(log.len() > before + 8);
    // Every state that the death of the collector can leave.
    for end in before..=log.len() {
        let crashed: Arc<dyn Engine> = Arc::new(Memory::crashed_after(&log[..end]));
        let next = open(&crashed, 400);
        assert_same(&read_all(&next, &version).unwrap(), &kept.0);
        assert_sound(&next);
        collect_shared(&next);
        assert_eq!(next.stats().packs, 1, "after step {end}");
        assert_same(&read_all(&next, &version).unwrap(), &kept.0);
        assert_sound(&next);
    }
}

/// Memory that does something just before the record is swapped.
struct Hooked {
    memory: Memory,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Engine for Hooked {
    fn describe(&self) -> String {
        self.memory.describe()
    }
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        self.memory.upload(name)
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        self.memory.open(name)
    }
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.memory.get(name)
    }
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.memory.put(name, bytes)
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.memory.list(folder)
    }
    fn remove(&self, names: &[String]) -> io::Result<()> {
        self.memory.remove(names)
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        self.memory.punch(name, ranges)
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.memory.footprint(name)
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        self.memory.head(name)
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        self.memory.heads()
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Result<Etag, &'static str>> {
        let hook = self.hook.lock().unwrap().take_if(|_| name == ".condemned");
        if let Some(hook) = hook {
            hook();
        }
        self.memory.swap_head(name, expect, bytes)
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.memory.remove_head(name)
    }
    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        self.memory.put_new(name, bytes)
    }
    fn can_share(&self) -> bool {
        true
    }
    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        self.memory.made_ms(name)
    }
}

/// The narrowest moment: the collector has marked, found nothing, and is about to say that the pack goes. What a
/// writer stores, changes and names again just then is there afterwards.
#[test]
fn what_is_published_between_the_mark_and_the_removal_is_kept() {
    for what in ["same content", "change of an old version", "old version"] {
        let memory = Memory::default();
        let hooked = Arc::new(Hooked { memory: memory.clone(), hook: Mutex::default() });
        let collector = open(&(Arc::clone(&hooked) as Arc<dyn Engine>), 1000);
        let writer = Arc::new(open(&(Arc::new(memory.clone()) as Arc<dyn Engine>), 1000));
        let content = Mem(Rng(20).mixed(300));
        let version = publish(&writer, "a", &content);
        writer.delete_head("a").unwrap();
        sleep(Duration::from_millis(1100));
        assert_eq!(collector.collect().unwrap().condemned, 1);
        sleep(Duration::from_millis(1100));
        let published = Arc::new(Mutex::new(None));
        let (also, writer_also) = (Arc::clone(&published), Arc::clone(&writer));
        *hooked.hook.lock().unwrap() = Some(Box::new(move || {
            let mut content = Mem(Rng(20).mixed(300));
            let tx = writer_also.begin();
            let made = match what {
                "same content" => commit_all(&tx, &content).unwrap().0,
                "old version" => version,
                _ => {
                    content.0[..4096].fill(9);
                    commit(&tx, &version, &content, &[range(0, 1)], &[]).unwrap().0
                }
            };
            tx.publish("b", Expect::Absent, &manifest(&[("ram", made)])).unwrap();
            *also.lock().unwrap() = Some((made, content));
        }));
        assert_eq!(collector.collect().unwrap().packs, 1, "the old pack goes");
        let (made, content) = published.lock().unwrap().take().expect("the hook ran");
        let fresh = open(&(Arc::new(memory) as Arc<dyn Engine>), 1000);
        assert_same(&read_all(&fresh, &made).unwrap(), &content.0);
        assert_sound(&fresh);
        assert_sound(&writer);
    }
}

/// What one round of the storm published, by head.
type Published = Mutex<BTreeMap<String, (Version, Arc<Vec<u8>>)>>;

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Lays some version down anew, in any order; how many blocks. It may be removed meanwhile.
fn arrange_any(store: &Store, rng: &mut Rng) -> u64 {
    let heads = store.heads("").unwrap();
    let Some(head) = heads.get(rng.below(heads.len().max(1) as u64) as usize) else { return 0 };
    let Some((manifest, _)) = store.head(head).unwrap() else { return 0 };
    let Some(version) = manifest.versions.values().next() else { return 0 };
    let blocks = version.blocks();
    let order: Vec<u64> = (0..blocks / 2).map(|_| rng.below(blocks)).collect();
    match store.arrange(version, &order, &ArrangeOptions { always: true, ..ArrangeOptions::default() }) {
        Ok(done) => done.moved,
        Err(Error::Unknown { .. } | Error::Io { .. }) => 0,
        Err(error) => panic!("{error}"),
    }
}

/// Writers commit the same and different content, some die, heads come and go, and both stores collect all the
/// while; then everything that a head names is read.
fn storm(stores: &[Store], reopen: &dyn Fn() -> Store, rounds: u64, pause: Duration, seed: u64) {
    let common: Vec<Arc<Vec<u8>>> = (0..3).map(|n| Arc::new(Rng(seed + n).mixed(120))).collect();
    let published: Published = Mutex::default();
    let (lost_races, too_slow, removed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let arranged = AtomicU64::new(0);
    for round in 0..rounds {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let collectors: Vec<_> = stores
                .iter()
                .map(|store| {
                    let (over, removed) = (&over, &removed);
                    scope.spawn(move || {
                        while !over.load(Ordering::Relaxed) {
                            removed.fetch_add(store.collect().unwrap().packs, Ordering::Relaxed);
                            sleep(Duration::from_millis(20));
                        }
                    })
                })
                .collect();
            let arrangers: Vec<_> = stores
                .iter()
                .zip(0..)
                .map(|(store, me)| {
                    let (over, arranged) = (&over, &arranged);
                    scope.spawn(move || {
                        let mut rng = Rng(seed ^ (round << 8) ^ (77 + me));
                        while !over.load(Ordering::Relaxed) {
                            arranged.fetch_add(arrange_any(store, &mut rng), Ordering::Relaxed);
                            sleep(Duration::from_millis(rng.below(60)));
                        }
                    })
                })
                .collect();
            let writers: Vec<_> = (0..2 * stores.len() as u64)
                .map(|me| {
                    let store = &stores[me as usize % stores.len()];
                    let (published, common, lost_races, too_slow) = (&published, &common, &lost_races, &too_slow);
                    scope.spawn(move || {
                        let mut rng = Rng(seed ^ (round << 8) ^ me);
                        for _ in 0..6 {
                            // Two writers of different stores share each name.
                            let name = format!("vm{}", rng.below(stores.len() as u64 + 1));
                            match rng.below(8) {
                                0 => {
                                    // A writer that dies.
                                    let tx = store.begin();
                                    commit_all(&tx, &Mem(rng.mixed(60))).unwrap();
                                    continue;
                                }
                                1 => {
                                    let mut published = published.lock().unwrap();
                                    store.delete_head(&name).unwrap();
                                    published.remove(&name);
                                    continue;
                                }
                                2 => sleep(Duration::from_millis(rng.below(200))),
                                _ => {}
                            }
                            let found = store.head(&name).unwrap();
                            let expect = found.as_ref().map_or(Expect::Absent, |(_, etag)| Expect::Etag(etag.clone()));
                            let content = if rng.below(2) == 0 {
                                Arc::clone(&common[rng.below(3) as usize])
                            } else {
                                Arc::new(rng.mixed(60))
                            };
                            let tx = store.begin();
                            let (version, _) = commit_all(&tx, &Mem(content.to_vec())).unwrap();
                            sleep(Duration::from_millis(rng.below(30)));
                            // Nobody else notes what was published in between.
                            let mut published = published.lock().unwrap();
                            match tx.publish(&name, expect, &manifest(&[("ram", version)])) {
                                Ok(_) => drop(published.insert(name, (version, content))),
                                Err(Error::HeadChanged { .. }) => count(lost_races),
                                Err(Error::Unknown { .. } | Error::Invalid(_)) => count(too_slow),
                                Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
                            }
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            sleep(pause);
            over.store(true, Ordering::Relaxed);
            collectors.into_iter().for_each(|collector| collector.join().unwrap());
            arrangers.into_iter().for_each(|arranger| arranger.join().unwrap());
        });
        let fresh = reopen();
        for store in stores.iter().chain([&fresh]) {
            assert_sound(store);
        }
        let published = published.lock().unwrap();
        assert_eq!(fresh.heads("").unwrap(), published.keys().cloned().collect::<Vec<_>>(), "round {round}");
        for (name, (version, content)) in &*published {
            assert_eq!(fresh.head(name).unwrap().unwrap().0.versions["ram"], *version, "{name}");
            assert_same(&read_all(&fresh, version).unwrap(), content);
        }
    }
    let removed = removed.into_inner();
    assert!(removed > 0, "the collectors have had time to remove something");
    assert!(arranged.into_inner() > 0, "something was laid down anew");
    println!(
        "{rounds} rounds: {removed} packs removed, {} races lost, {} commits to be repeated",
        lost_races.into_inner(),
        too_slow.into_inner()
    );
}

#[test]
fn writers_and_collectors_at_once_in_memory() {
    let engine = memory();
    let stores: Vec<Store> = (0..3).map(|_| open(&engine, 1000)).collect();
    let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 100 } else { 5 };
    storm(&stores, &|| open(&engine, 1000), rounds, Duration::from_millis(1100), 11);
    stores[0].heads("").unwrap().iter().for_each(|head| assert!(stores[0].delete_head(head).unwrap()));
    collect_shared(&stores[1]);
    assert!(engine.list("packs").unwrap().is_empty());
}

#[test]
fn writers_and_collectors_at_once_on_s3() {
    // Each store has an engine of its own, as each process has.
    let url = weed::url_at(&weed::weed().endpoint, &weed::fresh_prefix());
    let engine =
        || -> Arc<dyn Engine> { Arc::new(S3::open_with(&url, weed::credentials(), Limits::default()).unwrap()) };
    let stores: Vec<Store> = (0..2).map(|_| open(&engine(), 8000)).collect();
    let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 20 } else { 2 };
    storm(&stores, &|| open(&engine(), 8000), rounds, Duration::from_secs(9), 12);
}

const KILLED_GRACE: Duration = Duration::from_millis(3000);

fn on_server(url: &str) -> Store {
    let engine = S3::open_with(url, weed::credentials(), Limits::default()).unwrap();
    Store::open_shared(Arc::new(engine), KILLED_GRACE).unwrap()
}

/// What `token` stands for.
fn of_token(token: u64) -> Vec<u8> {
    Rng(token).noise(6000)
}

/// The writer that is killed: writes, deletes and collects for ever, and says what was published.
#[test]
fn killed_shared_writer_process() {
    let Ok(url) = std::env::var("STORE_TEST_SHARED_WRITER") else { return };
    let store = on_server(&url);
    let blob = store.blob("b").unwrap();
    let mut rng = Rng(std::process::id().into());
    loop {
        let (token, offset) = (rng.below(1 << 40), rng.below(120) * 8192);
        let number = blob.write(offset, &of_token(token)).unwrap();
        println!("published {number} {offset} {token} whole");
        if number.is_multiple_of(4) && number > 12 {
            // Others may be about to delete the same one.
            let _ = blob.delete_version(number - 10);
            store.collect().unwrap();
            arrange_any(&store, &mut rng);
        }
    }
}

#[test]
fn processes_killed_at_any_instant_leave_a_shared_store_whole() {
    let url = weed::url_at(&weed::weed().endpoint, &weed::fresh_prefix());
    on_server(&url).create_blob("b", 1 << 20, 4096).unwrap();
    let mut rng = Rng(std::process::id().into());
    let mut lines: Vec<String> = Vec::new();
    for _ in 0..5 {
        let start = || {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &common::own(module_path!(), "killed_shared_writer_process"), "--nocapture"])
                .env("STORE_TEST_SHARED_WRITER", &url)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
            (child, output)
        };
        let mut writers: Vec<_> = (0..3).map(|_| start()).collect();
        for (child, output) in &mut writers {
            lines.extend(output.by_ref().take(5 + rng.below(6) as usize));
            sleep(Duration::from_millis(rng.below(60)));
            assert!(child.try_wait().unwrap().is_none(), "it writes until it is killed");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        for (_, output) in writers {
            lines.extend(output);
        }
    }
    let store = on_server(&url);
    let blob = store.blob("b").unwrap();
    let check = || {
        let mut read_back = 0;
        for line in &lines {
            let Some((_, line)) = line.split_once("published ") else { continue };
            let [number, offset, token, "whole"] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
            let [number, offset, token] = [number, offset, token].map(|text| text.parse::<u64>().unwrap());
            match blob.version(number) {
                Ok((_, version)) => {
                    let mut read = vec![0; 6000];
                    store.read_at(&version, offset, &mut read).unwrap();
                    assert_same(&read, &of_token(token));
                    read_back += 1;
                }
                Err(Error::NotFound { .. }) => assert!(blob.log(number..number + 1).unwrap()[0].deleted, "{line}"),
                Err(error) => panic!("{line}: {error}"),
            }
        }
        assert!(read_back > 20, "only {read_back} of {} lines", lines.len());
        assert_sound(&store);
    };
    check();
    // What goes is garbage and nothing else, and all garbage goes.
    collect_shared(&store);
    check();
    for head in store.heads("").unwrap() {
        store.delete_head(&head).unwrap();
    }
    collect_shared(&store);
    assert_eq!(store.stats().blocks, 0);
}
