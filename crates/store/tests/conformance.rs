//! One suite for every engine: what the store's safety stands on, and the store's basic behaviour above it.

use crate::common;
use crate::weed;

use common::{Mem, Rng, assert_same, assert_sound, commit, manifest, publish, range, read_all};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use store::engine::{Engine, Local, Memory};
use store::{Error, Expect, Mode, Store};

/// Long enough for what the tests publish, short enough to wait for.
const GRACE: Duration = Duration::from_secs(3);

/// A medium, and how one more process opens it where many may write.
struct Medium {
    engine: Arc<dyn Engine>,
    mode: Mode,
    _dir: Option<tempfile::TempDir>,
}

fn memory() -> Medium {
    Medium { engine: Arc::new(Memory::default()), mode: Mode::ReadWrite, _dir: None }
}

fn memory_shared() -> Medium {
    Medium { mode: Mode::Shared, ..memory() }
}

fn local() -> Medium {
    let dir = tempfile::tempdir().unwrap();
    let engine = Local::open_writer(dir.path()).unwrap_or_else(|_| panic!("nobody else uses it"));
    Medium { engine: Arc::new(engine), mode: Mode::ReadWrite, _dir: Some(dir) }
}

fn object() -> Medium {
    Medium { engine: Arc::new(weed::engine()), mode: Mode::Shared, _dir: None }
}

macro_rules! conformance {
    ($($medium:ident),*) => {$(
        mod $medium {
            conformance!(@each $medium: objects, uploads_dropped, ranges, large_uploads, lists, heads,
                races_on_heads, heads_are_linear, races_on_new_objects, removal, odd_names, times,
                versions_read_back, heads_are_swapped, reopened, collected);
        }
    )*};
    (@each $medium:ident: $($test:ident),*) => {$(
        #[test]
        fn $test() {
            super::$test(super::$medium());
        }
    )*};
}

conformance!(memory, memory_shared, local, object);

fn upload(engine: &dyn Engine, name: &str, bytes: &[u8]) {
    let mut upload = engine.upload(name).unwrap();
    upload.append(bytes).unwrap();
    upload.finish().unwrap();
}

fn read(engine: &dyn Engine, name: &str, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0xee; len];
    engine.open(name)?.read_at(offset, &mut buf)?;
    Ok(buf)
}

fn objects(medium: Medium) {
    let engine = &*medium.engine;
    engine.prove().unwrap();
    assert_eq!(engine.get("packs/none").unwrap(), None);
    engine.put("packs/a", b"first").unwrap();
    assert_eq!(engine.get("packs/a").unwrap().unwrap(), b"first");
    engine.put("packs/a", b"second, and longer").unwrap();
    assert_eq!(engine.get("packs/a").unwrap().unwrap(), b"second, and longer");
    engine.put("packs/empty", b"").unwrap();
    assert_eq!(engine.get("packs/empty").unwrap().unwrap(), b"");
    assert!(engine.put_new("packs/new", b"one").unwrap());
    assert!(!engine.put_new("packs/new", b"two").unwrap());
    assert_eq!(engine.get("packs/new").unwrap().unwrap(), b"one");
    assert!(!engine.describe().is_empty());
}

fn uploads_dropped(medium: Medium) {
    let engine = &*medium.engine;
    let mut rng = Rng(1);
    for size in [100, 20 << 20] {
        let bytes = rng.noise(size);
        let mut upload = engine.upload("packs/dropped").unwrap();
        upload.append(&bytes).unwrap();
        let mut buf = vec![0; 50];
        upload.object().read_at(size as u64 - 50, &mut buf).unwrap();
        assert_eq!(buf, bytes[size - 50..]);
        assert_eq!(engine.get("packs/dropped").unwrap(), None, "invisible until it is finished");
        drop(upload);
        assert_eq!(engine.get("packs/dropped").unwrap(), None);
        assert!(!engine.list("packs").unwrap().contains(&"dropped".to_owned()));
    }
}

fn ranges(medium: Medium) {
    let engine = &*medium.engine;
    let bytes = Rng(2).noise(100_000);
    upload(engine, "packs/r", &bytes);
    for (offset, len) in [(0, 1), (0, 100_000), (99_999, 1), (4096, 8192), (50, 0), (100_000, 0)] {
        assert_same(&read(engine, "packs/r", offset, len).unwrap(), &bytes[offset as usize..][..len]);
    }
    for (offset, len) in [(0, 100_001), (99_999, 2), (100_000, 1), (1 << 40, 10)] {
        let error = read(engine, "packs/r", offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset}+{len}: {error}");
    }
    assert_eq!(engine.open("packs/r").unwrap().size().unwrap(), 100_000);
    assert!(engine.footprint("packs/r").unwrap() >= 100_000);
    let missing = read(engine, "packs/none", 0, 10).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    assert_eq!(engine.footprint("packs/none").unwrap_err().kind(), ErrorKind::NotFound);
}

fn large_uploads(medium: Medium) {
    let engine = &*medium.engine;
    let bytes = Rng(3).noise((41 << 20) + 777);
    let mut upload = engine.upload("packs/large").unwrap();
    let object = upload.object();
    for chunk in bytes.chunks(1_234_567) {
        upload.append(chunk).unwrap();
    }
    let part = |at: usize, len: usize| {
        let mut buf = vec![0; len];
        object.read_at(at as u64, &mut buf).unwrap();
        assert_same(&buf, &bytes[at..at + len]);
    };
    part((8 << 20) - 10, 20);
    part((40 << 20) - 5, 1 << 20);
    upload.finish().unwrap();
    upload.finish().unwrap();
    part((16 << 20) - 10, 20);
    assert_eq!(object.size().unwrap(), bytes.len() as u64);
    drop(upload);
    assert_same(&read(engine, "packs/large", 0, bytes.len()).unwrap(), &bytes);
    assert_same(&engine.get("packs/large").unwrap().unwrap(), &bytes);
}

fn lists(medium: Medium) {
    let engine = &*medium.engine;
    assert_eq!(engine.list("packs").unwrap(), Vec::<String>::new());
    // More than one page of S3's listing.
    let count = if engine.is_remote() { 1100 } else { 200 };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for number in (thread..count).step_by(4) {
                    engine.put(&format!("packs/{number:04}"), b"x").unwrap();
                }
            });
        }
    });
    let mut found = engine.list("packs").unwrap();
    found.sort_unstable();
    assert_eq!(found, (0..count).map(|number| format!("{number:04}")).collect::<Vec<_>>());
}

fn heads(medium: Medium) {
    let engine = &*medium.engine;
    assert_eq!(engine.head("h").unwrap(), None);
    let first = engine.swap_head("h", &Expect::Absent, b"one").unwrap().unwrap();
    assert_eq!(engine.head("h").unwrap().unwrap(), (b"one".to_vec(), first.clone()));
    assert_eq!(engine.swap_head("h", &Expect::Absent, b"two").unwrap(), Err("it exists already"));
    let second = engine.swap_head("h", &Expect::Etag(first.clone()), b"two").unwrap().unwrap();
    assert_ne!(first, second);
    assert_eq!(engine.swap_head("h", &Expect::Etag(first), b"three").unwrap(), Err("another writer published first"));
    assert_eq!(engine.head("h").unwrap().unwrap(), (b"two".to_vec(), second.clone()));
    let third = engine.swap_head("h", &Expect::Any, b"three").unwrap().unwrap();
    assert_eq!(engine.head("h").unwrap().unwrap(), (b"three".to_vec(), third.clone()));
    engine.swap_head("other", &Expect::Any, b"x").unwrap().unwrap();
    let mut names = engine.heads().unwrap();
    names.sort_unstable();
    assert_eq!(names, ["h", "other"]);
    assert!(engine.remove_head("h").unwrap());
    assert!(!engine.remove_head("h").unwrap());
    assert_eq!(engine.swap_head("h", &Expect::Etag(third), b"four").unwrap(), Err("it was removed"));
    assert_eq!(engine.heads().unwrap(), ["other"]);
}

/// Eight threads swap one head from the same state: exactly one wins, each round.
fn races_on_heads(medium: Medium) {
    let engine = &*medium.engine;
    // SeaweedFS lets those who wait for its lock sleep for whole seconds.
    let rounds = if engine.is_remote() { 8 } else { 100 };
    let (threads, start) = (8, Barrier::new(8));
    let wins: Vec<Vec<bool>> = std::thread::scope(|scope| {
        let racer = |me: u64| {
            let start = &start;
            scope.spawn(move || {
                let mut won = Vec::new();
                for round in 0..rounds {
                    start.wait();
                    let expect = engine.head("raced").unwrap().map_or(Expect::Absent, |(_, etag)| Expect::Etag(etag));
                    start.wait();
                    let bytes = format!("round {round} by {me}");
                    let swapped = engine.swap_head("raced", &expect, bytes.as_bytes()).unwrap();
                    won.push(swapped.is_ok());
                    start.wait();
                    let (now, etag) = engine.head("raced").unwrap().unwrap();
                    assert_eq!(now == bytes.as_bytes(), swapped.is_ok(), "who won is who is there");
                    if let Ok(tag) = swapped {
                        assert_eq!(tag, etag);
                    }
                }
                won
            })
        };
        let racers: Vec<_> = (0..threads).map(racer).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    for round in 0..rounds {
        assert_eq!(wins.iter().filter(|won| won[round]).count(), 1, "round {round}");
    }
}

/// Something that one thread did to a head, and between which two instants.
struct Done {
    began: Instant,
    ended: Instant,
    what: What,
}

/// Contents are numbers that occur once; 0 stands for no head.
enum What {
    Read(u64),
    /// Saw the first number and put the second in its place.
    Swapped(u64, u64),
    /// Saw a number that was no longer there.
    Lost(u64),
}

/// Many threads read a head and swap it. What they saw must be what one register could have shown to each at one
/// instant between its question and its answer (Herlihy and Wing): swaps form one chain, and no answer is older than
/// one that somebody had before it was asked for.
fn heads_are_linear(medium: Medium) {
    let engine = &*medium.engine;
    // As many rounds on S3 as fit into a second or two.
    let (threads, rounds) = (5u64, if medium.mode == Mode::Shared && medium._dir.is_none() { 40 } else { 60 });
    let look = || -> (u64, Expect) {
        let found = engine.head("linear").unwrap();
        found.map_or((0, Expect::Absent), |(bytes, etag)| {
            (u64::from_le_bytes(bytes.try_into().expect("eight bytes")), Expect::Etag(etag))
        })
    };
    let history: Vec<Done> = std::thread::scope(|scope| {
        let one = |me: u64| {
            scope.spawn(move || {
                let mut done = Vec::new();
                let mut note = |began, what| done.push(Done { began, ended: Instant::now(), what });
                for round in 0..rounds {
                    let began = Instant::now();
                    let (seen, expect) = look();
                    note(began, What::Read(seen));
                    // Some only look.
                    if (round + me).is_multiple_of(3) {
                        continue;
                    }
                    let (began, new) = (Instant::now(), 1 + me + round * threads);
                    let swapped = engine.swap_head("linear", &expect, &new.to_le_bytes()).unwrap();
                    note(began, if swapped.is_ok() { What::Swapped(seen, new) } else { What::Lost(seen) });
                }
                done
            })
        };
        let all: Vec<_> = (0..threads).map(one).collect();
        all.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let mut next = BTreeMap::new();
    for done in &history {
        if let What::Swapped(old, new) = done.what {
            assert_eq!(next.insert(old, (new, done)).map(|(other, _)| other), None, "two took the place of {old}");
        }
    }
    // The chain from no head on, and where in it each number stands.
    let (mut place, mut chain, mut at) = (BTreeMap::from([(0, 0)]), Vec::new(), 0);
    while let Some(&(new, done)) = next.get(&at) {
        chain.push(done);
        place.insert(new, chain.len());
        at = new;
    }
    assert_eq!(chain.len(), next.len(), "swaps that follow on no other");
    assert!(chain.len() as u64 >= rounds / 2, "only {} swaps", chain.len());
    assert_eq!(look().0, at, "the last of them is what is there");
    let place_of = |number: &u64| *place.get(number).unwrap_or_else(|| panic!("{number} was never there"));
    // From which place on an answer shows the register, and up to which.
    let span = |done: &Done| match &done.what {
        What::Read(seen) => (place_of(seen), place_of(seen)),
        What::Swapped(old, new) => (place_of(old), place_of(new)),
        What::Lost(seen) => (place_of(seen) + 1, place_of(seen) + 1),
    };
    for done in &history {
        let (from, _) = span(done);
        let made = from.checked_sub(1).map(|made| chain.get(made).unwrap_or_else(|| panic!("it lost to nobody")));
        assert!(made.is_none_or(|made| made.began <= done.ended), "place {from} was seen before it was made");
        for earlier in history.iter().filter(|earlier| earlier.ended < done.began) {
            let (_, seen) = span(earlier);
            // One that lost may have lost to later ones as well.
            let until = if matches!(done.what, What::Lost(_)) { usize::MAX } else { from };
            assert!(seen <= until, "place {from} was shown after place {seen} had been");
        }
    }
}

fn races_on_new_objects(medium: Medium) {
    let engine = &*medium.engine;
    if !engine.can_share() {
        return; // one process writes, and its store does this once, when it opens
    }
    let start = Barrier::new(8);
    for round in 0..10 {
        let name = format!("packs/race{round}");
        let winners = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8u8)
                .map(|me| {
                    let (start, name) = (&start, &name);
                    scope.spawn(move || {
                        start.wait();
                        engine.put_new(name, &[me]).unwrap().then_some(me)
                    })
                })
                .collect();
            racers.into_iter().filter_map(|racer| racer.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(engine.get(&name).unwrap().unwrap(), winners);
    }
}

fn removal(medium: Medium) {
    let engine = &*medium.engine;
    upload(engine, "packs/a", &Rng(4).noise(10_000));
    engine.put("packs/b", b"b").unwrap();
    engine.put("packs/c", b"c").unwrap();
    assert_eq!(read(engine, "packs/a", 0, 10).unwrap().len(), 10);
    engine.remove(&["packs/a".to_owned(), "packs/none".to_owned(), "packs/b".to_owned()]).unwrap();
    assert_eq!(engine.list("packs").unwrap(), ["c"]);
    assert_eq!(engine.get("packs/a").unwrap(), None);
    assert_eq!(read(engine, "packs/a", 0, 10).unwrap_err().kind(), ErrorKind::NotFound);
    engine.remove(&[]).unwrap();
    upload(engine, "packs/a", b"again");
    assert_eq!(read(engine, "packs/a", 0, 5).unwrap(), b"again");
}

fn odd_names(medium: Medium) {
    let engine = &*medium.engine;
    let mut names = ["a", "a/b", "a/b/c", "A", "x.y-z_+@:1", "a:b@c+d/e.f", &"n".repeat(200)].map(str::to_owned);
    for name in &names {
        engine.swap_head(name, &Expect::Absent, name.as_bytes()).unwrap().unwrap();
    }
    for name in &names {
        assert_eq!(engine.head(name).unwrap().unwrap().0, name.as_bytes(), "{name}");
    }
    let mut listed = engine.heads().unwrap();
    listed.sort_unstable();
    names.sort_unstable();
    assert_eq!(listed, names);
    for name in &names {
        assert!(engine.remove_head(name).unwrap(), "{name}");
    }
    assert_eq!(engine.heads().unwrap(), Vec::<String>::new());
}

fn times(medium: Medium) {
    let engine = &*medium.engine;
    let before = engine.now_ms().unwrap();
    engine.put("packs/t", b"t").unwrap();
    let after = engine.now_ms().unwrap();
    assert!(before <= after);
    let made = engine.made_ms("packs/t").unwrap().unwrap();
    assert!(made == 0 || (before / 1000 <= made / 1000 && made / 1000 <= after / 1000), "{before} {made} {after}");
    assert_eq!(engine.made_ms("packs/none").unwrap(), None);
}

fn open(medium: &Medium) -> Store {
    if medium.mode == Mode::Shared {
        return Store::open_shared(Arc::clone(&medium.engine), GRACE).unwrap();
    }
    Store::open_engine(Arc::clone(&medium.engine), medium.mode).unwrap()
}

fn versions_read_back(medium: Medium) {
    let store = open(&medium);
    let mut rng = Rng(5);
    let mut content = Mem(rng.mixed(600));
    let base = publish(&store, "vm/a", &content);
    for block in [0u64, 17, 300, 599] {
        let at = block as usize * 4096;
        content.0[at..at + 4096].copy_from_slice(&rng.block());
    }
    content.0[100 * 4096..110 * 4096].fill(0);
    let tx = store.begin();
    let written = [range(0, 1), range(17, 18), range(300, 301), range(599, 600)];
    let (next, stat) = commit(&tx, &base, &content, &written, &[range(100, 110)]).unwrap();
    assert_eq!((stat.blocks, stat.stored), (4, 4));
    assert_same(&read_all(&store, &next).unwrap(), &content.0);
    tx.publish("vm/b", Expect::Absent, &manifest(&[("ram", next)])).unwrap();
    assert_same(&read_all(&store, &next).unwrap(), &content.0);
    let differing: u64 = store.diff(&base, &next).unwrap().iter().map(|range| range.len() / 4096).sum();
    assert!((4..=14).contains(&differing), "{differing}");
    // The same content once more takes no block.
    let tx = store.begin();
    let (again, stat) = common::commit_all(&tx, &content).unwrap();
    assert_eq!((again, stat.stored), (next, 0));
    drop(tx);
    assert_sound(&store);
}

fn heads_are_swapped(medium: Medium) {
    let store = open(&medium);
    let mut rng = Rng(6);
    let (a, b) = (Mem(rng.mixed(20)), Mem(rng.mixed(20)));
    let first = publish(&store, "h", &a);
    let (found, etag) = store.head("h").unwrap().unwrap();
    assert_eq!(found, manifest(&[("ram", first)]));
    let tx = store.begin();
    let (second, _) = common::commit_all(&tx, &b).unwrap();
    let refused = tx.publish("h", Expect::Absent, &manifest(&[("ram", second)])).unwrap_err();
    assert!(matches!(refused, Error::HeadChanged { .. }), "{refused}");
    let tx = store.begin();
    let (second, _) = common::commit_all(&tx, &b).unwrap();
    tx.publish("h", Expect::Etag(etag), &manifest(&[("ram", second)])).unwrap();
    assert_eq!(store.heads("").unwrap(), ["h"]);
    assert_same(&read_all(&store, &second).unwrap(), &b.0);
    assert!(store.delete_head("h").unwrap());
    assert!(!store.delete_head("h").unwrap());
    assert_eq!(store.head("h").unwrap(), None);
}

fn reopened(medium: Medium) {
    let content = Mem(Rng(7).mixed(300));
    let version = publish(&open(&medium), "kept", &content);
    let store = open(&medium);
    assert_eq!(store.head("kept").unwrap().unwrap().0.versions["ram"], version);
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    let reader = Store::open_engine(Arc::clone(&medium.engine), Mode::ReadOnly).unwrap();
    assert_same(&read_all(&reader, &version).unwrap(), &content.0);
    // What is published later is found without opening again.
    let later = Mem(Rng(8).mixed(100));
    let next = publish(&store, "later", &later);
    assert_same(&read_all(&reader, &next).unwrap(), &later.0);
    assert_sound(&reader);
    assert!(matches!(reader.delete_head("kept"), Err(Error::ReadOnly { .. })));
}

fn collected(medium: Medium) {
    let store = open(&medium);
    let (kept, gone) = (Mem(Rng(9).mixed(200)), Mem(Rng(10).mixed(200)));
    let version = publish(&store, "kept", &kept);
    publish(&store, "gone", &gone);
    store.delete_head("gone").unwrap();
    let before = store.stats().stored_bytes;
    if medium.mode == Mode::Shared {
        common::collect_shared(&store);
    } else {
        store.collect().unwrap();
    }
    assert!(store.stats().stored_bytes < before);
    assert_same(&read_all(&store, &version).unwrap(), &kept.0);
    assert_sound(&store);
    assert_same(&read_all(&open(&medium), &version).unwrap(), &kept.0);
}
