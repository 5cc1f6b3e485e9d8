//! Push and pull between stores with different keys.

use crate::common;
use crate::weed;

use common::{Mem, Rng, assert_same, assert_sound, commit, commit_all, manifest, publish, range, read_all};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use store::blob::LogEntry;
use store::engine::{Engine, Memory};
use store::transfer::{Options, Progress, transfer};
use store::{Error, Expect, Mode, Store, Version};

fn memory() -> Store {
    Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap()
}

fn version(store: &Store, head: &str, blob: &str) -> Version {
    store.head(head).unwrap().unwrap().0.versions[blob]
}

#[test]
fn a_head_arrives_whole_and_only_what_is_lacking_is_sent() {
    let (from, to) = (memory(), memory());
    assert_ne!(from.id(), to.id());
    let mut rng = Rng(1);
    let (mut ram, disk) = (Mem(rng.mixed(1000)), Mem(rng.mixed(300)));
    let tx = from.begin();
    let (ram_version, _) = commit_all(&tx, &ram).unwrap();
    let (disk_version, _) = commit_all(&tx, &disk).unwrap();
    tx.publish("web@1", Expect::Absent, &manifest(&[("ram", ram_version), ("disk", disk_version)])).unwrap();
    let sent = transfer(&from, "web@1", &to, "far/web@1", &Options::default()).unwrap();
    assert!(sent.blocks_sent > 900 && sent.based_on.is_empty(), "{sent:?}");
    let arrived = to.head("far/web@1").unwrap().unwrap().0;
    assert_eq!(arrived.meta, from.head("web@1").unwrap().unwrap().0.meta);
    assert_same(&read_all(&to, &arrived.versions["ram"]).unwrap(), &ram.0);
    assert_same(&read_all(&to, &arrived.versions["disk"]).unwrap(), &disk.0);
    assert_ne!(arrived.versions["ram"].root, ram_version.root, "each store has names of its own");
    // Again: nothing is even read.
    let again = transfer(&from, "web@1", &to, "far/web@1", &Options::default()).unwrap();
    assert_eq!((again.blocks_read, again.blocks_sent, again.stored_bytes), (0, 0, 0));
    // A later version of the same machine: only the difference is read.
    ram.0[17 * 4096..18 * 4096].copy_from_slice(&rng.block());
    ram.0[500 * 4096..502 * 4096].fill(0);
    let tx = from.begin();
    let (next, _) = commit(&tx, &ram_version, &ram, &[range(17, 18)], &[range(500, 502)]).unwrap();
    tx.publish("web@2", Expect::Absent, &manifest(&[("ram", next), ("disk", disk_version)])).unwrap();
    let loaded = from.stats().nodes_loaded;
    let sent = transfer(&from, "web@2", &to, "far/web@2", &Options::default()).unwrap();
    assert!(sent.blocks_read <= 3 && sent.blocks_sent == 1, "{sent:?}");
    assert_eq!(sent.based_on["ram"], "far/web@1");
    assert!(from.stats().nodes_loaded - loaded < 40, "{}", from.stats().nodes_loaded - loaded);
    assert_same(&read_all(&to, &version(&to, "far/web@2", "ram")).unwrap(), &ram.0);
    assert_eq!(to.heads("").unwrap(), ["far/web@1", "far/web@2"], "notes are no heads");
    assert_sound(&to);
    // And back: the store it came from has it all.
    let back = transfer(&to, "far/web@2", &from, "back", &Options::default()).unwrap();
    assert_eq!(back.blocks_sent, 0);
    assert_eq!(version(&from, "back", "ram"), next);
}

#[test]
fn a_note_whose_head_went_or_changed_is_not_relied_on() {
    let (from, to) = (memory(), memory());
    let mut rng = Rng(2);
    let mut content = Mem(rng.mixed(400));
    publish(&from, "a", &content);
    transfer(&from, "a", &to, "a", &Options::default()).unwrap();
    assert!(to.delete_head("a").unwrap());
    to.collect().unwrap();
    content.0[..4096].copy_from_slice(&rng.block());
    publish(&from, "b", &content);
    let sent = transfer(&from, "b", &to, "b", &Options::default()).unwrap();
    assert!(sent.based_on.is_empty() && sent.blocks_sent > 200, "{sent:?}");
    assert_same(&read_all(&to, &version(&to, "b", "ram")).unwrap(), &content.0);
    // Somebody publishes something else under the name.
    publish(&to, "b", &Mem(rng.mixed(400)));
    let sent = transfer(&from, "b", &to, "c", &Options::default()).unwrap();
    assert!(sent.based_on.is_empty(), "{sent:?}");
    assert_same(&read_all(&to, &version(&to, "c", "ram")).unwrap(), &content.0);
    // The source forgets what the note speaks of.
    from.delete_head("a").unwrap();
    from.delete_head("b").unwrap();
    from.collect().unwrap();
    let other = Mem(rng.mixed(400));
    publish(&from, "b", &other);
    transfer(&from, "b", &to, "c", &Options::default()).unwrap();
    assert_same(&read_all(&to, &version(&to, "c", "ram")).unwrap(), &other.0);
    assert_sound(&to);
}

#[test]
fn bad_requests_change_nothing() {
    let (from, to) = (memory(), memory());
    publish(&from, "a", &Mem(Rng(3).mixed(50)));
    assert!(matches!(transfer(&from, "none", &to, "a", &Options::default()), Err(Error::Invalid(_))));
    assert!(matches!(transfer(&from, "a", &to, ".a", &Options::default()), Err(Error::Invalid(_))));
    transfer(&from, "a", &to, "a", &Options::default()).unwrap();
    let absent = Options { expect: Expect::Absent, ..Options::default() };
    assert!(matches!(transfer(&from, "a", &to, "a", &absent), Err(Error::HeadChanged { .. })));
    assert_eq!(to.heads("").unwrap(), ["a"]);
}

/// A source block that is bad must not arrive anywhere.
#[test]
fn what_is_corrupt_in_the_source_is_not_sent() {
    let engine = Memory::default();
    let from = Store::open_engine(Arc::new(engine.clone()), Mode::ReadWrite).unwrap();
    publish(&from, "a", &Mem(Rng(4).noise(100 * 4096)));
    let pack = engine.list("packs").unwrap().into_iter().find(|name| name.ends_with(".pack")).unwrap();
    let mut bytes = engine.get(&format!("packs/{pack}")).unwrap().unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    engine.put(&format!("packs/{pack}"), &bytes).unwrap();
    let from = Store::open_engine(Arc::new(engine), Mode::ReadOnly).unwrap();
    let to = memory();
    let error = transfer(&from, "a", &to, "a", &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Source { .. }), "{error}");
    assert!(to.heads("").unwrap().is_empty());
}

/// Stops after 100 MiB, as a killed push does; the next process sends what is lacking.
fn resumes(engine: &Arc<dyn Engine>, mode: Mode) {
    let from = memory();
    let content = Mem(Rng(5).noise(150 << 20));
    publish(&from, "big", &content);
    let cancel = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    let watch = |progress: Progress<'_>| {
        assert_eq!((progress.blob, progress.total_bytes), ("ram", 150 << 20));
        seen.store(progress.done_bytes, Ordering::Relaxed);
        cancel.store(progress.done_bytes > 100 << 20, Ordering::Relaxed);
    };
    let options = Options { cancel: Some(&cancel), progress: Some(&watch), ..Options::default() };
    {
        let to = Store::open_engine(Arc::clone(engine), mode).unwrap();
        assert!(matches!(transfer(&from, "big", &to, "big", &options), Err(Error::Cancelled)));
        assert!(to.heads("").unwrap().is_empty());
    }
    assert!(seen.load(Ordering::Relaxed) > 100 << 20);
    let to = Store::open_engine(Arc::clone(engine), mode).unwrap();
    let sent = transfer(&from, "big", &to, "big", &Options::default()).unwrap();
    let blocks = (150 << 20) / 4096;
    assert_eq!(sent.blocks_read, blocks);
    assert!(sent.blocks_sent < blocks - (60 << 20) / 4096, "{sent:?}");
    assert_same(&read_all(&to, &version(&to, "big", "ram")).unwrap(), &content.0);
    assert_sound(&to);
}

#[test]
fn a_stopped_push_goes_on_where_it_was_in_memory() {
    let engine: Arc<dyn Engine> = Arc::new(Memory::default());
    resumes(&engine, Mode::ReadWrite);
}

#[test]
fn a_stopped_push_goes_on_where_it_was_on_s3() {
    let engine: Arc<dyn Engine> = Arc::new(weed::engine());
    resumes(&engine, Mode::Shared);
}

#[test]
fn from_a_directory_to_s3_and_to_another_directory() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = Store::open(one.path(), Mode::ReadWrite).unwrap();
    let middle = Store::open_engine(Arc::new(weed::engine()), Mode::Shared).unwrap();
    let to = Store::open(two.path(), Mode::ReadWrite).unwrap();
    let mut rng = Rng(6);
    let mut content = Mem(rng.mixed(2000));
    let mut last = publish(&from, "vm@0", &content);
    for number in 0..4u64 {
        let (source, target) = (format!("vm@{number}"), format!("team/vm@{number}"));
        let pushed = transfer(&from, &source, &middle, &target, &Options::default()).unwrap();
        let pulled = transfer(&middle, &target, &to, &source, &Options::default()).unwrap();
        if number > 0 {
            assert!(pushed.blocks_read <= 20 && pulled.blocks_read <= 20, "{pushed:?} {pulled:?}");
        }
        assert_same(&read_all(&to, &version(&to, &source, "ram")).unwrap(), &content.0);
        let tx = from.begin();
        let written = range(number * 100, number * 100 + 20);
        content.0[written.start as usize..written.end as usize].copy_from_slice(&rng.noise(20 * 4096));
        (last, _) = commit(&tx, &last, &content, &[written], &[]).unwrap();
        tx.publish(&format!("vm@{}", number + 1), Expect::Absent, &manifest(&[("ram", last)])).unwrap();
    }
    for store in [&from, &middle, &to] {
        assert_sound(store);
    }
}

/// Everything that is to be seen of a blob: the bytes of each version, its log and its tags.
/// Every version's bytes, none of those deleted; the log; the tags.
type All = (Vec<Option<Vec<u8>>>, Vec<LogEntry>, BTreeMap<String, u64>);

fn all_of(store: &Store, name: &str) -> All {
    let blob = store.blob(name).unwrap();
    let log = blob.log(0..u64::MAX).unwrap();
    let bytes = |entry: &LogEntry| {
        let version = (!entry.deleted).then(|| blob.version(entry.number).unwrap().1);
        version.map(|version| read_all(store, &version).unwrap())
    };
    (log.iter().map(bytes).collect(), log, blob.info().unwrap().tags)
}

/// A blob with a history on its way from one store to another and on, twice; both go on from there.
fn travels(from: &Store, middle: &Store, to: &Store) {
    let blob = from.create_blob("team/b", 40_000, 512).unwrap();
    let mut rng = Rng(8);
    for round in 0..3u64 {
        for _ in 0..4 {
            blob.write(rng.below(30_000), &rng.noise(5000)).unwrap();
            blob.append(&rng.noise(700)).unwrap();
        }
        blob.resize(35_000 + round * 100).unwrap();
        blob.delete_version(3 * round + 1).unwrap();
        blob.tag(3 * round + 2, &format!("t{round}")).unwrap();
        for (source, target) in [(from, middle), (middle, to)] {
            let sent = transfer(source, "blob/team/b", target, "blob/team/b", &Options::default()).unwrap();
            assert!(round == 0 || sent.blocks_sent < sent.blocks_read, "{sent:?}");
            assert_eq!(all_of(source, "team/b"), all_of(target, "team/b"));
        }
    }
    // A clone shares what is there, and a copy is a blob like any other.
    blob.clone(5u64, "clone").unwrap();
    let sent = transfer(from, "blob/clone", middle, "blob/clone", &Options::default()).unwrap();
    assert_eq!(sent.blocks_sent, 0, "{sent:?}");
    let copy = to.blob("team/b").unwrap();
    let number = copy.write(7, b"it goes on").unwrap();
    let mut read = [0; 10];
    copy.read(number, 7, &mut read).unwrap();
    assert_eq!(&read, b"it goes on");
    [from, middle, to].into_iter().for_each(assert_sound);
}

#[test]
fn a_blob_travels_with_its_history_between_directories() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = |dir: &tempfile::TempDir| Store::open(dir.path(), Mode::ReadWrite).unwrap();
    travels(&open(&one), &memory(), &open(&two));
}

#[test]
fn a_blob_travels_with_its_history_over_s3() {
    travels(&memory(), &Store::open_engine(Arc::new(weed::engine()), Mode::Shared).unwrap(), &memory());
}

/// A push of a blob to a shared store is stopped, another writer publishes and collects there meanwhile, and it goes on.
#[test]
fn a_stopped_push_of_a_blob_goes_on_in_a_shared_store() {
    let from = memory();
    let blob = from.create_blob("b", 100 << 20, 4096).unwrap();
    blob.append(b"a version before").unwrap();
    blob.write(0, &Rng(9).noise(90 << 20)).unwrap();
    let engine: Arc<dyn Engine> = Arc::new(Memory::default());
    let open = || Store::open_engine(Arc::clone(&engine), Mode::Shared).unwrap();
    let cancel = AtomicBool::new(false);
    let watch = |progress: Progress<'_>| cancel.store(progress.done_bytes > 75 << 20, Ordering::Relaxed);
    let options = Options { cancel: Some(&cancel), progress: Some(&watch), ..Options::default() };
    assert!(matches!(transfer(&from, "blob/b", &open(), "blob/b", &options), Err(Error::Cancelled)));
    let other = open();
    assert!(other.blobs().unwrap().is_empty());
    other.create_blob("other", 10_000, 512).unwrap().write(0, b"published meanwhile").unwrap();
    other.collect().unwrap();
    let to = open();
    let sent = transfer(&from, "blob/b", &to, "blob/b", &Options::default()).unwrap();
    let blocks = (90 << 20) / 4096;
    assert!(sent.blocks_sent < blocks - (50 << 20) / 4096, "{sent:?}");
    let (copy, original) = (to.blob("b").unwrap(), read_all(&from, &blob.latest().unwrap().1).unwrap());
    assert_same(&read_all(&other, &copy.latest().unwrap().1).unwrap(), &original);
    assert_sound(&to);
}
