use super::FOLDERS;
use super::recorded::{Disk, Fate, Op, Recorder};
use crate as store;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use store::{Error, Expect, Manifest, Mode, Store, Version};

/// Heads, each with the version it publishes.
type Heads = BTreeMap<String, Version>;

/// Bytes of blocks: some zero, some that compress, some that do not.
fn blocks(count: u64, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ z >> 27
    };
    let mut block = |_| -> Vec<u8> {
        match next() % 4 {
            0 => vec![0; 4096],
            1 => (0..512).flat_map(|_| next().to_le_bytes()).collect(),
            _ => (0..256).flat_map(|_| [next(), 7]).flat_map(u64::to_le_bytes).collect(),
        }
    };
    (0..count).flat_map(&mut block).collect()
}

fn read(store: &Store, version: &Version) -> Result<Vec<u8>, Error> {
    let mut out = vec![0; version.size as usize];
    store.read_at(version, 0, &mut out)?;
    Ok(out)
}

fn publish(store: &Store, head: &str, bytes: &[u8]) -> Version {
    let tx = store.begin();
    let version = tx.put_bytes(bytes).unwrap();
    let manifest = Manifest { versions: BTreeMap::from([("disk".to_owned(), version)]), meta: String::new() };
    tx.publish(head, Expect::Any, &manifest).unwrap();
    version
}

/// What was recorded of a life: the calls, the heads before and after each step with the number of calls by then,
/// and the content of every version.
struct Life {
    ops: Vec<Op>,
    steps: Vec<(usize, Heads, Heads)>,
    contents: BTreeMap<Version, Vec<u8>>,
}

/// Publishes, replaces, shares, drops, removes, collects until packs shrink and go, and opens anew.
fn life(dir: &Path, rounds: u64) -> Life {
    let recorder = Recorder::of(dir);
    let mut store = Store::open(dir, Mode::ReadWrite).unwrap();
    let (mut steps, mut contents) = (vec![(recorder.len(), Heads::new(), Heads::new())], BTreeMap::new());
    let mut heads = Heads::new();
    for round in 0..rounds {
        let before = heads.clone();
        // Half of it was there in the round before, so that frames outlive the head they came with.
        let bytes = [blocks(20, round / 2), blocks(20, 100 + round)].concat();
        let head = format!("vm/{}", round % 3);
        let version = publish(&store, &head, &bytes);
        contents.insert(version, bytes);
        heads.insert(head, version);
        steps.push((recorder.len(), before, heads.clone()));
        drop(store.begin().put_bytes(&blocks(10, 1000 + round)));
        if round % 3 == 2 {
            let before = heads.clone();
            let gone = format!("vm/{}", (round + 1) % 3);
            assert!(store.delete_head(&gone).unwrap());
            heads.remove(&gone);
            steps.push((recorder.len(), before, heads.clone()));
        }
        store.collect().unwrap();
        if round % 4 == 3 {
            drop(store);
            store = Store::open(dir, Mode::ReadWrite).unwrap();
        }
        steps.push((recorder.len(), heads.clone(), heads.clone()));
    }
    Life { ops: recorder.ops(), steps, contents }
}

/// Whether the heads found after `calls` calls are those before or after the step then under way.
fn may_be(life: &Life, calls: usize, found: &Heads) -> bool {
    let next = life.steps.iter().find(|(len, _, _)| *len >= calls).or(life.steps.last()).expect("a life has steps");
    let (len, before, after) = next;
    found == after && (calls == *len || before != after || found == before) || found == before && calls < *len
}

/// The files that a crash left.
type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Opens what a crash left in a directory of its own.
fn opened(files: &Files, from: &Path) -> Result<(tempfile::TempDir, Store), String> {
    let scratch = scratch();
    let at = scratch.path();
    for folder in FOLDERS {
        fs::create_dir_all(at.join(folder)).unwrap();
    }
    for (path, bytes) in files {
        fs::write(at.join(path.strip_prefix(from).unwrap()), bytes).unwrap();
    }
    let store = Store::open(at, Mode::ReadWrite).map_err(|error| format!("it does not open: {error}"))?;
    let report = store.verify(&mut |_, _| {}).map_err(|error| error.to_string())?;
    match report.faults.first() {
        Some(first) => Err(format!("{} faults, the first: {first}", report.faults_total)),
        None => Ok((scratch, store)),
    }
}

/// Opens what a crash left and looks at all of it; what is wrong.
fn check(life: &Life, calls: usize, files: &Files, from: &Path) -> Result<(), String> {
    let (scratch, store) = opened(files, from)?;
    let mut found = Heads::new();
    for head in store.heads("").map_err(|error| error.to_string())? {
        let (manifest, _) = store.head(&head).map_err(|error| error.to_string())?.ok_or("a head went")?;
        found.insert(head, manifest.versions["disk"]);
    }
    if !may_be(life, calls, &found) {
        return Err(format!("these heads were never there then: {:?}", found.keys()));
    }
    for version in found.values() {
        if read(&store, version).map_err(|error| error.to_string())? != life.contents[version] {
            return Err(format!("wrong bytes in {version}"));
        }
    }
    let bytes = blocks(5, calls as u64);
    let version = publish(&store, "new", &bytes);
    if read(&store, &version).map_err(|error| error.to_string())? != bytes {
        return Err("wrong bytes in what was written anew".to_owned());
    }
    nothing_stays(&store, scratch.path())
}

/// Removes all heads: nothing may be left then.
fn nothing_stays(store: &Store, at: &Path) -> Result<(), String> {
    for head in store.heads("").map_err(|error| error.to_string())? {
        store.delete_head(&head).map_err(|error| error.to_string())?;
    }
    store.collect().map_err(|error| error.to_string())?;
    for folder in FOLDERS {
        let left: Vec<_> = fs::read_dir(at.join(folder)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        if !left.is_empty() {
            return Err(format!("garbage stays in {folder}: {left:?}"));
        }
    }
    Ok(())
}

/// Checks every state after each call, `mixed` of those in which any part arrived; how many there were.
fn check_all(life: &Life, from: &Path, mixed: u64) -> Result<u64, String> {
    check_states(&life.ops, mixed, &|calls, files| check(life, calls, files, from))
}

/// Has `check` look at every state that a crash after each of the calls may leave; how many there were.
fn check_states(ops: &[Op], mixed: u64, check: &dyn Fn(usize, &Files) -> Result<(), String>) -> Result<u64, String> {
    let (mut disk, mut states) = (Disk::new(), 0);
    for calls in 0..=ops.len() {
        if let Some(op) = calls.checked_sub(1).map(|last| &ops[last]) {
            disk.step(op);
        }
        let mut fates = vec![Fate::Kept];
        if !disk.is_durable() {
            fates.extend([Fate::Dropped, Fate::NamesOnly, Fate::BytesOnly]);
            fates.extend((0..mixed).map(|n| Fate::Mixed(calls as u64 * 1000 + n)));
        }
        for fate in fates {
            check(calls, &disk.crashed(fate)).map_err(|what| {
                let last = calls.checked_sub(1).map(|last| format!("{:.200?}", ops[last]));
                format!("after {calls} of {} calls ({last:?}), {fate:?}: {what}", ops.len())
            })?;
            states += 1;
        }
    }
    Ok(states)
}

/// Where many small files and their fsyncs cost little.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

#[test]
fn every_state_that_a_crash_of_the_machine_may_leave_is_a_sound_store() {
    let full = std::env::var_os("OFFSHOOT_TEST_FULL").is_some();
    let dir = scratch();
    let life = life(dir.path(), if full { 24 } else { 10 });
    let has = |wanted: fn(&Op) -> bool| life.ops.iter().filter(|op| wanted(op)).count();
    assert!(has(|op| matches!(op, Op::Punch(..))) > 0, "frames are given up");
    assert!(has(|op| matches!(op, Op::Unlink(path) if path.parent().unwrap().ends_with("tmp"))) > 5);
    assert!(life.ops.len() > 200, "{} calls", life.ops.len());
    let states = check_all(&life, dir.path(), if full { 24 } else { 3 }).unwrap_or_else(|what| panic!("{what}"));
    println!("{} calls, {states} states", life.ops.len());
}

/// All versions of all blobs, by name and number; `None`: deleted.
type Blobs = BTreeMap<String, Vec<Option<Vec<u8>>>>;

fn blobs_of(store: &Store) -> Result<Blobs, Error> {
    let mut out = Blobs::new();
    for name in store.blobs()? {
        let blob = store.blob(&name)?;
        let version = |entry: store::blob::LogEntry| match entry.deleted {
            true => Ok(None),
            false => read(store, &blob.version(entry.number)?.1).map(Some),
        };
        let versions = blob.log(0..u64::MAX)?.into_iter().map(version).collect::<Result<_, _>>()?;
        out.insert(name, versions);
    }
    Ok(out)
}

/// Writes, appends, resizes, clones and deletes blobs, collects, and opens anew; the calls, and after each operation
/// their number and what there was then.
fn blob_life(dir: &Path, rounds: u64) -> (Vec<Op>, Vec<(usize, Blobs)>) {
    let recorder = Recorder::of(dir);
    let mut store = Store::open(dir, Mode::ReadWrite).unwrap();
    let mut steps = vec![(recorder.len(), Blobs::new())];
    let told = |store: &Store, steps: &mut Vec<(usize, Blobs)>| {
        steps.push((recorder.len(), blobs_of(store).unwrap()));
    };
    for name in ["a", "b"] {
        store.create_blob(name, 3000, 512).unwrap();
        told(&store, &mut steps);
    }
    for round in 0..rounds {
        let blob = store.blob(["a", "b"][round as usize % 2]).unwrap();
        let bytes = &blocks(1, round)[..900];
        match round % 4 {
            0 => blob.write(700, bytes),
            1 => blob.append(bytes),
            2 => blob.resize(2000 + round * 300),
            _ => blob.zero(base::ByteRange::new(100, 1900)),
        }
        .unwrap();
        told(&store, &mut steps);
        if round % 5 == 4 {
            blob.delete_version(round / 4).unwrap();
            told(&store, &mut steps);
            blob.clone(store::blob::At::Latest, &format!("c{round}")).unwrap();
            told(&store, &mut steps);
        }
        store.collect().unwrap();
        if round % 6 == 5 {
            drop(store);
            store = Store::open(dir, Mode::ReadWrite).unwrap();
        }
        told(&store, &mut steps);
    }
    (recorder.ops(), steps)
}

#[test]
fn every_state_that_a_crash_of_the_machine_may_leave_has_whole_versions_of_blobs() {
    let full = std::env::var_os("OFFSHOOT_TEST_FULL").is_some();
    let dir = scratch();
    let (ops, steps) = blob_life(dir.path(), if full { 24 } else { 8 });
    assert!(ops.len() > 100, "{} calls", ops.len());
    let look = |calls: usize, files: &Files| {
        let (scratch, store) = opened(files, dir.path())?;
        let found = blobs_of(&store).map_err(|error| error.to_string())?;
        // What was there when the last operation ended, or what the one under way makes of it.
        let after = steps.iter().position(|(len, _)| *len >= calls).unwrap_or(steps.len() - 1);
        let fits = found == steps[after].1 || calls < steps[after].0 && found == steps[after.max(1) - 1].1;
        if !fits {
            return Err("these blobs were never there then".to_owned());
        }
        let blob = store.create_blob("new", 5000, 512).map_err(|error| error.to_string())?;
        blob.write(1, b"it goes on").map_err(|error| error.to_string())?;
        nothing_stays(&store, scratch.path())
    };
    let states = check_states(&ops, if full { 16 } else { 2 }, &look).unwrap_or_else(|what| panic!("{what}"));
    println!("{} calls, {states} states", ops.len());
}

/// The same life with one kind of call left out must not pass: each is needed, and the check notices.
#[test]
fn a_store_that_leaves_out_an_fsync_is_found_out() {
    let dir = scratch();
    let mut life = life(dir.path(), 4);
    let ops = life.ops.clone();
    type Picks = fn(&Op) -> bool;
    let without: [(&str, Picks); 3] = [
        ("fsync of files", |op| matches!(op, Op::Sync(_))),
        ("fsync of packs/", |op| matches!(op, Op::SyncDir(dir) if dir.ends_with("packs"))),
        ("fsync of heads/", |op| matches!(op, Op::SyncDir(dir) if dir.ends_with("heads"))),
    ];
    for (what, left_out) in without {
        // As if it had done nothing: a call that changes no durable state stands in its place.
        let nowhere = || Op::SyncDir(dir.path().join("nowhere"));
        life.ops = ops.iter().map(|op| if left_out(op) { nowhere() } else { op.clone() }).collect();
        let outcome = check_all(&life, dir.path(), 3);
        assert!(outcome.is_err(), "nobody noticed that there is no {what}");
    }
}

/// The model must notice what it is there for.
#[test]
fn the_model_of_the_disk_loses_what_was_not_made_durable() {
    let dir = scratch();
    let recorder = Recorder::of(dir.path());
    let (tmp, target) = (dir.path().join("tmp"), dir.path().join("target"));
    fs::create_dir(dir.path().join("folder")).unwrap();
    let file = super::OpenOptions::new().write(true).create_new(true).open(&tmp).unwrap();
    file.write_all_at(b"hello", 0).unwrap();
    super::fs::rename(&tmp, &target).unwrap();
    let crash = |ops: &[Op], fate| {
        let mut disk = Disk::new();
        ops.iter().for_each(|op| disk.step(op));
        disk.crashed(fate)
    };
    let ops = recorder.ops();
    assert_eq!(crash(&ops, Fate::Kept)[&target], b"hello");
    assert_eq!(crash(&ops, Fate::NamesOnly)[&target], b"", "renamed before its bytes were durable");
    assert!(crash(&ops, Fate::Dropped).is_empty() && crash(&ops, Fate::BytesOnly).is_empty());
    let torn = (0..200).map(|seed| crash(&ops, Fate::Mixed(seed)).get(&target).cloned());
    let mut torn: Vec<_> = torn.collect();
    torn.sort();
    torn.dedup();
    assert!(torn.len() >= 3, "{torn:?}");
    file.sync_all().unwrap();
    super::sync_dir(dir.path()).unwrap();
    assert_eq!(crash(&recorder.ops(), Fate::Dropped)[&target], b"hello");
    super::sync_dir(&dir.path().join("folder")).unwrap();
    super::fs::remove_file(&target).unwrap();
    assert_eq!(crash(&recorder.ops(), Fate::Dropped)[&target], b"hello");
    assert!(crash(&recorder.ops(), Fate::Kept).is_empty());
}
