//! The local engine: files, space, other processes, and damage.
#![allow(missing_docs)]

use crate::common;

use common::{BLOCK, Mem, Rng, assert_same, assert_sound, commit, commit_all, manifest, publish, range, read_all};
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use store::{Error, Expect, Fate, Mode, Store, Version};

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() { out.extend(files(&entry.path())) } else { out.push(entry.path()) }
    }
    out.sort();
    out
}

/// Bytes that the packs take on the disk.
fn taken(dir: &Path) -> u64 {
    files(&dir.join("packs")).iter().map(|file| fs::metadata(file).unwrap().blocks() * 512).sum()
}

#[test]
fn one_writer_at_a_time_and_the_error_names_it() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(dir.path(), Mode::ReadOnly), Err(Error::NotAStore { .. })));
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let second = Store::open(dir.path(), Mode::ReadWrite).err().unwrap();
    assert!(second.to_string().contains(&std::process::id().to_string()), "{second}");
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    assert!(matches!(reader.delete_head("x"), Err(Error::ReadOnly { .. })));
    assert!(matches!(reader.begin().publish("x", Expect::Any, &manifest(&[])), Err(Error::ReadOnly { .. })));
    drop(store);
    Store::open(dir.path(), Mode::ReadWrite).unwrap();
}

#[test]
fn a_reader_sees_what_is_published_without_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    let mut rng = Rng(1);
    let (one, two) = (Mem(rng.noise(64 * BLOCK as usize)), Mem(rng.noise(64 * BLOCK as usize)));
    let both = Mem([one.0.clone(), two.0.clone()].concat());
    let whole = publish(&writer, "both", &both);
    assert_same(&read_all(&reader, &whole).unwrap(), &both.0);
    let second = publish(&writer, "two", &two);
    assert_same(&read_all(&reader, &second).unwrap(), &two.0);

    // The first half goes, is punched out of a pack that stays, and comes back in another pack.
    assert!(writer.delete_head("both").unwrap());
    let collected = writer.collect().unwrap();
    assert!(collected.frames >= 4 && collected.packs == 0, "{collected:?}");
    assert!(matches!(writer.head("both"), Ok(None)));
    let first = publish(&writer, "one", &one);
    let fresh_blocks_only = Mem(both.0.clone());
    let again = publish(&writer, "both", &fresh_blocks_only);
    assert_eq!(again, whole);
    let cold = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    assert_same(&read_all(&cold, &first).unwrap(), &one.0);
    assert_same(&read_all(&reader, &first).unwrap(), &one.0);
    assert_same(&read_all(&reader, &again).unwrap(), &both.0);

    // Whole packs go as well.
    for head in writer.heads("").unwrap() {
        writer.delete_head(&head).unwrap();
    }
    writer.collect().unwrap();
    let gone = cold.read_at(&second, 0, &mut [0; 1]);
    assert!(gone.is_err(), "what was collected cannot be read by who never read it: {gone:?}");
    let back = publish(&writer, "both", &both);
    assert_same(&read_all(&reader, &back).unwrap(), &both.0);
    assert_same(&read_all(&cold, &back).unwrap(), &both.0);
}

/// A reader whose knowledge of a pack is old: the pack stays, but the frames it knows were punched out.
#[test]
fn a_reader_with_old_knowledge_finds_what_moved() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let mut rng = Rng(2);
    let (one, two) = (rng.noise(64 * BLOCK as usize), rng.noise(64 * BLOCK as usize));
    publish(&writer, "both", &Mem([one.clone(), two.clone()].concat()));
    publish(&writer, "two", &Mem(two));
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    writer.delete_head("both").unwrap();
    assert!(writer.collect().unwrap().frames >= 4);
    let first = publish(&writer, "one", &Mem(one.clone()));
    assert_same(&read_all(&reader, &first).unwrap(), &one);
}

#[test]
fn removal_gives_the_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let mut content = Mem(Rng(1).noise(1024 * BLOCK as usize));
    let first = publish(&store, "a", &content);
    let with_a = taken(dir.path());
    assert!(with_a > 4 << 20);
    // B shares the second half of A.
    let new = Rng(2).noise(512 * BLOCK as usize);
    content.0[..new.len()].copy_from_slice(&new);
    let tx = store.begin();
    let (second, stat) = commit(&tx, &first, &content, &[range(0, 512)], &[]).unwrap();
    assert_eq!(stat.stored, 512);
    tx.publish("b", Expect::Absent, &manifest(&[("ram", second)])).unwrap();
    let with_both = taken(dir.path());
    assert_eq!(store.collect().unwrap(), store::Collected::default(), "everything is needed");

    store.delete_head("a").unwrap();
    let collected = store.collect().unwrap();
    let with_b = taken(dir.path());
    assert!(with_both - with_b > 2_000_000, "{with_both} to {with_b}: {collected:?}");
    assert!(collected.bytes > 2_000_000, "{collected:?}");
    assert_same(&read_all(&store, &second).unwrap(), &content.0);
    assert_sound(&store);
    drop(store);
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    assert_sound(&store);
    assert_same(&read_all(&store, &second).unwrap(), &content.0);
    // What was given up is stored anew, not taken for there.
    let tx = store.begin();
    let again = Mem(Rng(1).noise(1024 * BLOCK as usize));
    let (version, stat) = commit_all(&tx, &again).unwrap();
    assert_eq!((version, stat.stored, stat.duplicate), (first, 512, 512));
    assert_same(&read_all(&store, &version).unwrap(), &again.0);
    drop(tx);
    store.delete_head("b").unwrap();
    store.collect().unwrap();
    assert_eq!((taken(dir.path()), files(&dir.path().join("packs")).len()), (0, 0));
}

#[test]
fn scattered_survivors_do_not_keep_the_space_of_their_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let content = Mem(Rng(1).noise(4000 * BLOCK as usize));
    let first = publish(&store, "a", &content);
    // B keeps every eighth block of A.
    let zeroed: Vec<_> = (0..500).map(|i| range(i * 8 + 1, i * 8 + 8)).collect();
    let tx = store.begin();
    let (second, _) = commit(&tx, &first, &content, &[], &zeroed).unwrap();
    tx.publish("b", Expect::Absent, &manifest(&[("ram", second)])).unwrap();
    let mut expected = content.0.clone();
    for range in &zeroed {
        expected[range.start as usize..range.end as usize].fill(0);
    }
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    store.delete_head("a").unwrap();
    let collected = store.collect().unwrap();
    assert!(collected.moved >= 500, "{collected:?}");
    let left = taken(dir.path());
    assert!(left < 500 * BLOCK + 300_000, "{left} bytes for {} of data", 500 * BLOCK);
    assert_same(&read_all(&reader, &second).unwrap(), &expected);
    assert_same(&read_all(&store, &second).unwrap(), &expected);
    assert_sound(&store);
    assert_eq!(store.collect().unwrap(), store::Collected::default(), "once is enough");
    drop(store);
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    assert_same(&read_all(&store, &second).unwrap(), &expected);
    assert_sound(&store);
    store.delete_head("b").unwrap();
    store.collect().unwrap();
    assert_eq!(taken(dir.path()), 0);
}

#[test]
fn a_long_history_of_small_commits_does_not_become_as_many_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let mut rng = Rng(1);
    let mut content = Mem(rng.noise(300 * BLOCK as usize));
    let mut version = publish(&store, "vm", &content);
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    let open_files = || {
        fs::read_dir("/proc/self/fd").unwrap().filter(|f| {
            fs::read_link(f.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(dir.path().join("packs")))
        })
    };
    for block in 0..200u64 {
        // Each commit writes a block that stays, so that no pack ever dies by itself.
        let at = (block * BLOCK) as usize;
        content.0[at..at + BLOCK as usize].copy_from_slice(&rng.noise(BLOCK as usize));
        let tx = store.begin();
        version = commit(&tx, &version, &content, &[range(block, block + 1)], &[]).unwrap().0;
        tx.publish("vm", Expect::Any, &manifest(&[("ram", version)])).unwrap();
        store.collect().unwrap();
    }
    let packs = files(&dir.path().join("packs")).len() / 2;
    assert!(packs <= 40, "{packs} packs");
    assert!(open_files().count() <= 2 * packs, "{} of {packs} packs are open", open_files().count());
    assert_same(&read_all(&reader, &version).unwrap(), &content.0);
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    assert_sound(&store);
    drop(store);
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    store.delete_head("vm").unwrap();
    store.collect().unwrap();
    assert_eq!(taken(dir.path()), 0);
}

#[test]
fn a_living_transaction_is_safe_from_the_collector() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let content = Mem(Rng(1).noise(300 * BLOCK as usize));
    publish(&store, "a", &content);
    let tx = store.begin();
    let (version, stat) = commit_all(&tx, &content).unwrap();
    assert_eq!(stat.stored, 0);
    store.delete_head("a").unwrap();
    assert_eq!(store.collect().unwrap(), store::Collected::default());
    tx.publish("b", Expect::Absent, &manifest(&[("ram", version)])).unwrap();
    store.collect().unwrap();
    assert_same(&read_all(&store, &version).unwrap(), &content.0);
    assert_sound(&store);
}

#[test]
fn transactions_readers_and_collections_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let reader = Store::open(dir.path(), Mode::ReadOnly).unwrap();
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    let content = |writer: u64, round: u64| {
        // Writers share much of what they write, so that each finds blocks the others are about to store.
        Mem([Rng(round).mixed(60), Rng(writer * 100 + round).mixed(40)].concat())
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (store, content) = (&store, &content);
                scope.spawn(move || {
                    for round in 0..12 {
                        let tx = store.begin();
                        let wanted = content(writer, round);
                        let (version, _) = commit_all(&tx, &wanted).unwrap();
                        if (writer + round) % 5 == 0 {
                            continue; // dropped: others may have come to rely on its blocks
                        }
                        let head = format!("w/{writer}");
                        tx.publish(&head, Expect::Any, &manifest(&[("ram", version)])).unwrap();
                        assert_same(&read_all(store, &version).unwrap(), &wanted.0);
                        if round % 4 == 3 {
                            store.delete_head(&head).unwrap();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                store.collect().unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for head in reader.heads("").unwrap() {
                    if let Ok(Some((manifest, _))) = reader.head(&head)
                        && let Ok(bytes) = read_all(&reader, &manifest.versions["ram"])
                    {
                        assert_eq!(bytes.len() as u64, 100 * BLOCK);
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 0);
    assert_sound(&store);
    let before = store.stats();
    drop(store);
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    assert_sound(&store);
    assert_eq!(store.stats().heads, before.heads);
    for head in store.heads("").unwrap() {
        store.delete_head(&head).unwrap();
    }
    store.collect().unwrap();
    let stats = store.stats();
    assert_eq!((stats.packs, stats.blocks, stats.nodes), (0, 0, 0), "no reference was leaked");
}

/// A store with two packs, one of them with holes, and two heads; and what its versions hold.
fn small_store(dir: &Path) -> Vec<(String, Version, Vec<u8>)> {
    let store = Store::open(dir, Mode::ReadWrite).unwrap();
    let mut rng = Rng(9);
    let (a, b) = (Mem(rng.mixed(60)), Mem(rng.mixed(20)));
    let versions = [("image/a", &a), ("snap/b", &b)]
        .map(|(head, content)| (head.to_owned(), publish(&store, head, content), content.0.clone()));
    versions.to_vec()
}

/// Opens the store as a reader and checks that everything is either right or refused; returns what was found.
fn inspect(dir: &Path, versions: &[(String, Version, Vec<u8>)]) -> Vec<String> {
    let store = match Store::open(dir, Mode::ReadOnly) {
        Ok(store) => store,
        Err(error) => return vec![error.to_string()],
    };
    let mut found = Vec::new();
    for (head, version, content) in versions {
        match read_all(&store, version) {
            Ok(bytes) => assert_same(&bytes, content),
            Err(error) => found.push(error.to_string()),
        }
        match store.head(head) {
            Ok(Some((manifest, _))) => assert_eq!(manifest.versions["ram"], *version),
            Ok(None) => found.push(format!("{head} is gone")),
            Err(error) => found.push(error.to_string()),
        }
    }
    found.extend(store.verify(&mut |_, _| {}).unwrap().faults.iter().map(ToString::to_string));
    found
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_named_and_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let versions = small_store(dir.path());
    assert_eq!(inspect(dir.path(), &versions), Vec::<String>::new());
    let mut rng = Rng(4);
    let mut flips = 0;
    for path in files(dir.path()).into_iter().filter(|path| !path.ends_with("lock")) {
        let len = fs::metadata(&path).unwrap().len();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let edges = (0..len.min(44)).chain(len.saturating_sub(34)..len);
        let inside: Vec<u64> = (0..24).map(|_| rng.below(len)).collect();
        for at in edges.chain(inside) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            let flipped = byte[0] ^ 1 << rng.below(8);
            file.write_all_at(&[flipped], at).unwrap();
            let found = inspect(dir.path(), &versions);
            let name = path.file_name().unwrap().to_str().unwrap().replace("%2F", "/");
            assert!(
                found.iter().any(|what| what.contains(&name)),
                "byte {at} of {} was not named: {found:?}",
                path.display()
            );
            file.write_all_at(&byte, at).unwrap();
            flips += 1;
        }
    }
    assert!(flips > 500, "{flips}");
    assert_eq!(inspect(dir.path(), &versions), Vec::<String>::new());
}

#[test]
fn files_cut_short_or_missing_are_found_and_nothing_else_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let versions = small_store(dir.path());
    for path in files(dir.path()).into_iter().filter(|path| !path.ends_with("lock")) {
        let bytes = fs::read(&path).unwrap();
        let is_head = path.parent().unwrap().ends_with("heads");
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..cut]).unwrap();
            assert!(!inspect(dir.path(), &versions).is_empty(), "{} cut to {cut}", path.display());
        }
        fs::remove_file(&path).unwrap();
        assert!(!inspect(dir.path(), &versions).is_empty(), "{} missing", path.display());
        if !is_head {
            // A writer must not take a damaged store for one with much to clean up.
            if let Ok(store) = Store::open(dir.path(), Mode::ReadWrite) {
                assert!(matches!(store.collect(), Err(Error::Damaged { .. })), "{}", path.display());
            }
        }
        fs::write(&path, &bytes).unwrap();
        assert_eq!(inspect(dir.path(), &versions), Vec::<String>::new(), "{} is back", path.display());
    }
}

#[test]
fn a_damaged_store_heals_when_the_heads_it_names_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let versions = small_store(dir.path());
    let victim = files(&dir.path().join("packs")).into_iter().find(|f| f.extension().unwrap() == "pack").unwrap();
    fs::remove_file(victim).unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let report = store.verify(&mut |_, _| {}).unwrap();
    let fault = report.faults.iter().find(|fault| fault.head.is_some()).unwrap();
    assert_eq!((fault.head.as_deref(), fault.blob.as_deref()), (Some("image/a"), Some("ram")), "{fault}");
    assert!(matches!(store.collect(), Err(Error::Damaged { .. })));
    assert_same(&read_all(&store, &versions[1].1).unwrap(), &versions[1].2);
    store.delete_head("image/a").unwrap();
    store.collect().unwrap();
    assert_same(&read_all(&store, &versions[1].1).unwrap(), &versions[1].2);
    drop(store);
    assert_sound(&Store::open(dir.path(), Mode::ReadWrite).unwrap());
    assert_sound(&Store::open(dir.path(), Mode::ReadWrite).unwrap());
}

/// A small file system of its own, gone with the value.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "this test needs root, to mount a small tmpfs");
        Self(dir)
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.0.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_named_and_survived() {
    let disk = Tmpfs::new("12m");
    let dir = disk.0.path().join("store");
    let store = Store::open(&dir, Mode::ReadWrite).unwrap();
    let reader = Store::open(&dir, Mode::ReadOnly).unwrap();
    let small = Mem(Rng(1).noise(1000 * BLOCK as usize));
    let version = publish(&store, "small", &small);
    let free = disk.free();
    let large = Mem(Rng(2).noise(4000 * BLOCK as usize));
    let tx = store.begin();
    let failed = commit_all(&tx, &large).unwrap_err();
    assert!(matches!(failed, Error::NoSpace { .. }) && failed.to_string().contains("no space left"), "{failed}");
    drop(tx);
    assert_eq!(disk.free(), free, "what failed was removed");
    assert_eq!(store.heads("").unwrap(), ["small"]);
    assert_same(&read_all(&store, &version).unwrap(), &small.0);
    assert_sound(&store);
    // A reader that has the pack open does not keep its space.
    assert_same(&read_all(&reader, &version).unwrap(), &small.0);
    store.delete_head("small").unwrap();
    store.collect().unwrap();
    assert!(disk.free() > free + (4 << 20) - (64 << 10), "{} after {free}", disk.free());
    let medium = Mem(Rng(3).noise(2500 * BLOCK as usize));
    let version = publish(&store, "medium", &medium);
    assert_same(&read_all(&store, &version).unwrap(), &medium.0);
    assert_sound(&store);
}

#[test]
fn what_a_collection_would_do_is_what_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let mut rng = Rng(77);
    let (a, b) = (Mem(rng.noise(400 * 4096)), Mem(rng.noise(400 * 4096)));
    publish(&store, "a", &a);
    publish(&store, "b", &b);
    // Half of it lives on under another name.
    let half = Mem(a.0[..200 * 4096].to_vec());
    publish(&store, "half", &half);
    let all = store.explain_collection(&[]).unwrap();
    assert_eq!((all.bytes_now, all.bytes_later), (0, 0), "{all:#?}");
    let without = store.explain_collection(&["a".to_owned(), "b".to_owned()]).unwrap();
    let fates: Vec<Fate> = without.packs.iter().map(|pack| pack.fate).collect();
    assert_eq!(fates, [Fate::Trim, Fate::Remove, Fate::Keep], "{without:#?}");
    assert!(without.packs[0].why.contains("`half`") && without.packs[1].why.contains("no head"), "{without:#?}");
    let shares: Vec<(&str, bool)> = without.heads.iter().map(|head| (head.head.as_str(), head.dropped)).collect();
    assert_eq!(shares, [("a", true), ("b", true), ("half", false)]);
    assert_eq!(store.explain_collection(&[]).unwrap(), all, "an explanation changes nothing");
    store.delete_head("a").unwrap();
    store.delete_head("b").unwrap();
    let given_back = store.collect().unwrap().bytes;
    // The medium counts whole blocks of its own.
    let said = without.bytes_now;
    assert!(given_back.abs_diff(said) < said / 20, "{given_back} {said}");
}
