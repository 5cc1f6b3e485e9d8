//! Crashes: every state that the medium may be found in opens, is sound, and has what was published.
#![allow(missing_docs)]

use crate::common;

use common::{BLOCK, Mem, Rng, assert_same, assert_sound, commit, commit_all, manifest, publish, range, read_all};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use store::{ArrangeOptions, Error, Expect, Mode, Store, Version, engine::Memory, engine::memory::Step};

type Heads = BTreeMap<String, Version>;

/// A life of a store with everything in it: shared content, replaced heads, dropped work, removals, collections.
/// Tells after each step which heads there are.
fn life(store: &Store, told: &mut dyn FnMut(&Heads, &Heads)) -> BTreeMap<Version, Vec<u8>> {
    let mut rng = Rng(11);
    let mut heads = Heads::new();
    let mut contents = BTreeMap::new();
    let mut content = Mem(rng.mixed(150));
    let base = publish(store, "base", &content);
    contents.insert(base, content.0.clone());
    let mut step = |heads: &mut Heads, change: &dyn Fn(&mut Heads)| {
        let before = heads.clone();
        change(heads);
        told(&before, heads);
    };
    step(&mut heads, &|h| _ = h.insert("base".to_owned(), base));
    for round in 0..12u64 {
        let tx = store.begin();
        let at = rng.below(100);
        let new = rng.mixed(30);
        content.0[(at * BLOCK) as usize..][..new.len()].copy_from_slice(&new);
        let (version, _) = commit(&tx, &base, &content, &[range(at, at + 30)], &[range(120, 140)]).unwrap();
        // What lies outside the range is the base's.
        let mut expected = contents[&base].clone();
        expected[120 * BLOCK as usize..140 * BLOCK as usize].fill(0);
        expected[(at * BLOCK) as usize..][..new.len()].copy_from_slice(&new);
        contents.insert(version, expected);
        let head = format!("snap/{}", round % 4);
        tx.publish(&head, Expect::Any, &manifest(&[("ram", version)])).unwrap();
        step(&mut heads, &|h| _ = h.insert(head.clone(), version));
        // Work that is dropped.
        let tx = store.begin();
        commit_all(&tx, &Mem(rng.noise(40 * BLOCK as usize))).unwrap();
        drop(tx);
        if round == 2 {
            store.delete_head("base").unwrap();
            step(&mut heads, &|h| _ = h.remove("base"));
            store.begin().publish("again", Expect::Absent, &manifest(&[("ram", base)])).unwrap();
            step(&mut heads, &|h| _ = h.insert("again".to_owned(), base));
        }
        if round == 4 {
            store.delete_head("snap/1").unwrap();
            step(&mut heads, &|h| _ = h.remove("snap/1"));
        }
        // Laid down anew, in an order of its own each time.
        let order: Vec<u64> = (0..60).map(|n| (n * 37 + round * 11) % 150).collect();
        let always = ArrangeOptions { always: true, ..ArrangeOptions::default() };
        store.arrange(&version, &order, &always).unwrap();
        store.collect().unwrap();
    }
    contents
}

#[test]
fn every_prefix_of_the_steps_that_reached_the_medium_is_a_sound_store() {
    let memory = Memory::default();
    let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
    // After each step of the log: which heads may be found (the state before or after the one under way).
    let mut allowed: Vec<(usize, Heads, Heads)> = Vec::new();
    let contents = life(&store, &mut |before, after| allowed.push((memory.log().len(), before.clone(), after.clone())));
    drop(store);
    let log = memory.log();
    assert!(log.len() > 50, "{} steps", log.len());
    assert!(log.iter().any(|step| matches!(step, Step::Punch(..))), "the life gives frames up");
    for cut in 0..=log.len() {
        let crashed = Memory::crashed_after(&log[..cut]);
        let store = Store::open_engine(Arc::new(crashed), Mode::ReadWrite).unwrap();
        let found: Heads = store
            .heads("")
            .unwrap()
            .into_iter()
            .map(|head| (head.clone(), store.head(&head).unwrap().unwrap().0.versions["ram"]))
            .collect();
        let next = allowed.iter().find(|(len, _, _)| *len >= cut);
        let fits = match next {
            Some((len, before, after)) => found == *before && cut < *len || found == *after,
            None => found == allowed.last().unwrap().2,
        };
        assert!(fits, "after {cut} steps: {found:?}");
        for version in found.values() {
            assert_same(&read_all(&store, version).unwrap(), &contents[version]);
        }
        assert_sound(&store);
        // It goes on from there, and nothing of what was lost stays behind.
        let content = Mem(Rng(cut as u64).mixed(20));
        let version = publish(&store, "new", &content);
        assert_same(&read_all(&store, &version).unwrap(), &content.0);
        for head in store.heads("").unwrap() {
            store.delete_head(&head).unwrap();
        }
        store.collect().unwrap();
        let stats = store.stats();
        assert_eq!((stats.blocks, stats.nodes, stats.packs), (0, 0, 0), "after {cut} steps");
    }
}

#[test]
fn a_full_medium_refuses_by_name_and_goes_on_when_there_is_room() {
    let content = Mem(Rng(5).noise(60 * BLOCK as usize));
    let changed = Mem(Rng(6).noise(60 * BLOCK as usize));
    let mut refused = 0;
    for spare in (0..300_000).step_by(7919) {
        let memory = Memory::default();
        let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).unwrap();
        let first = publish(&store, "a", &content);
        let used: usize = memory.contents().values().map(Vec::len).sum();
        memory.set_capacity(Some((used + spare) as u64));
        let tx = store.begin();
        let outcome = commit(&tx, &first, &changed, &[range(0, 60)], &[])
            .and_then(|(version, _)| tx.publish("b", Expect::Absent, &manifest(&[("ram", version)])));
        match outcome {
            Ok(_) => assert!(store.head("b").unwrap().is_some()),
            Err(Error::NoSpace { .. }) => {
                refused += 1;
                assert_eq!(store.head("b").unwrap(), None);
                store.collect().unwrap();
                let left: usize = memory.contents().values().map(Vec::len).sum();
                assert_eq!(left, used, "nothing is left of what failed");
                assert_same(&read_all(&store, &first).unwrap(), &content.0);
            }
            Err(other) => panic!("{other}"),
        }
        memory.set_capacity(None);
        let version = publish(&store, "b", &changed);
        assert_same(&read_all(&store, &version).unwrap(), &changed.0);
        assert_sound(&store);
    }
    assert!(refused > 20, "{refused}");
}

/// What head `number` of the killed writer holds.
fn numbered(number: u64) -> Mem {
    let mut rng = Rng(number / 3);
    let mut bytes = rng.mixed(40);
    bytes.extend(Rng(number).mixed(20));
    Mem(bytes)
}

/// The writer that is killed: publishes, removes and collects for ever, and says what it did.
#[test]
fn killed_writer_process() {
    let Ok(dir) = std::env::var("STORE_TEST_WRITER") else { return };
    let store = Store::open(Path::new(&dir), Mode::ReadWrite).unwrap();
    let heads = store.heads("n/").unwrap();
    let mut next = heads.iter().map(|head| head[2..].parse::<u64>().unwrap() + 1).max().unwrap_or(0);
    loop {
        publish(&store, &format!("n/{next:08}"), &numbered(next));
        println!("published {next:08}");
        if next >= 8 {
            let old = next - 8;
            store.delete_head(&format!("n/{old:08}")).unwrap();
            println!("removed {old:08}");
        }
        if next.is_multiple_of(3) {
            store.collect().unwrap();
            let (manifest, _) = store.head(&format!("n/{next:08}")).unwrap().unwrap();
            let order: Vec<u64> = (0..30).map(|n| (n * 7 + next) % 60).collect();
            let always = ArrangeOptions { always: true, ..ArrangeOptions::default() };
            store.arrange(&manifest.versions["ram"], &order, &always).unwrap();
        }
        next += 1;
    }
}

#[test]
fn a_writer_killed_at_any_instant_loses_nothing_it_published() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(std::process::id().into());
    let mut published = 0;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &common::own(module_path!(), "killed_writer_process"), "--nocapture"])
            .env("STORE_TEST_WRITER", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // So many steps, then an instant that falls anywhere in the next ones.
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut lines: Vec<String> = output.by_ref().take(4 + rng.below(12) as usize).collect();
        std::thread::sleep(Duration::from_micros(rng.below(15_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        lines.extend(output);
        // The store checks as it is, before a writer mends anything, and after.
        if dir.path().join("key").exists() {
            assert_sound(&Store::open(dir.path(), Mode::ReadOnly).unwrap());
        }
        let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
        assert_sound(&store);
        let heads = store.heads("n/").unwrap();
        for line in &lines {
            let there = |number: &str| heads.contains(&format!("n/{number}"));
            if let Some((_, number)) = line.split_once("removed ") {
                assert!(!there(number), "round {round}: {line}, but it is there");
            } else if let Some((_, number)) = line.split_once("published ") {
                published += 1;
                let removed = lines.iter().any(|line| line.ends_with(&format!("removed {number}")));
                let under_way = heads.iter().min().is_some_and(|oldest| oldest[2..] > *number);
                assert!(there(number) || removed || under_way, "round {round}: {line}, but it is not there");
            }
        }
        for head in &heads {
            let (manifest, _) = store.head(head).unwrap().unwrap();
            let content = numbered(head[2..].parse().unwrap());
            assert_same(&read_all(&store, &manifest.versions["ram"]).unwrap(), &content.0);
        }
    }
    assert!(published > 20, "only {published} publications");
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    for head in store.heads("").unwrap() {
        store.delete_head(&head).unwrap();
    }
    store.collect().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("packs")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
}
