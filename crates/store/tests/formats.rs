//! Old formats stay open for ever: stores that earlier releases wrote are read completely, byte for byte.
//!
//! `formats/<n>/store.txt` is a store of format n as text, since the repository holds no binary files: a line
//! `content <head> <blob> <size> <BLAKE3>` for each version, then `file <path>` with its bytes in hexadecimal below, in
//! lines of 64. Each was written once by
//!
//! ```text
//! STORE_WRITE_FORMAT=crates/store/tests/formats/<n>/store.txt cargo test -p store --test formats writes
//! ```
//!
//! with the release that brought format n, and is never written again.
#![allow(missing_docs)]

use crate::common;

use base::ByteRange;
use common::{Mem, Rng, assert_sound, manifest, publish, read_all};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use store::{Changes, Error, Expect, Mode, Store, Version};

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() { out.extend(files(&entry.path())) } else { out.push(entry.path()) }
    }
    out.sort();
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Every kind of thing a store may hold: sparse and full, small and large blocks, compressed and not, trees of
/// several heights, shared content, several blobs in a head, frames given up, two packs.
fn fill(store: &Store) {
    let mut rng = Rng(1);
    publish(store, "first", &Mem(rng.mixed(3)));
    let mut sparse = vec![0; 3 << 20];
    sparse[5000..5010].copy_from_slice(b"here I am.");
    sparse[(3 << 20) - 1] = 9;
    let small = [rng.noise(700), vec![0; 5000], vec![b'x'; 900], b"the end".to_vec()].concat();
    let large = [vec![1; 40_000], vec![2; 40_000], vec![3; 17]].concat();
    let tx = store.begin();
    let mut versions = Vec::new();
    for (blob, content, block_size) in [("sparse", sparse, 4096), ("small", small, 512), ("large", large, 65536)] {
        let base = store.empty(content.len() as u64, block_size);
        let all = [ByteRange::new(0, base.size)];
        let source = Mem(content);
        let changes = Changes { written: &all, zeroed: &[], source: &source, threads: 1, progress: None, cancel: None };
        versions.push((blob, tx.commit(&base, &changes).unwrap().0));
    }
    versions.push(("zero", store.empty(1 << 40, 4096)));
    tx.publish("vm/a-b:c@d+e", Expect::Absent, &manifest(&versions)).unwrap();
    let tx = store.begin();
    let one = tx.put_bytes(&vec![b'k'; 9000]).unwrap();
    let two = tx.put_bytes(&rng.noise(2000)).unwrap();
    tx.publish("both", Expect::Absent, &manifest(&[("one", one), ("two", two)])).unwrap();
    // The frames of the other one are given up.
    store.begin().publish("both", Expect::Any, &manifest(&[("two", two)])).unwrap();
    store.collect().unwrap();
}

/// Size and hash of every version that heads name. What is larger than 16 MiB is known by its first 16 MiB.
fn contents(store: &Store) -> BTreeMap<(String, String), (u64, String)> {
    let mut out = BTreeMap::new();
    for head in store.heads("").unwrap() {
        for (blob, version) in store.head(&head).unwrap().unwrap().0.versions {
            let part = Version { size: version.size.min(16 << 20), ..version };
            let bytes = if part == version {
                read_all(store, &version).unwrap()
            } else {
                let mut bytes = vec![1; part.size as usize];
                store.read_at(&version, 0, &mut bytes).unwrap();
                bytes
            };
            out.insert((head.clone(), blob), (version.size, blake3::hash(&bytes).to_hex().to_string()));
        }
    }
    out
}

#[test]
fn writes_a_store_of_this_format() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    fill(&store);
    assert_sound(&store);
    let mut text = String::new();
    for ((head, blob), (size, hash)) in contents(&store) {
        writeln!(text, "content {head} {blob} {size} {hash}").unwrap();
    }
    drop(store);
    for file in files(dir.path()).iter().filter(|file| file.file_name().unwrap() != "lock") {
        writeln!(text, "file {}", file.strip_prefix(dir.path()).unwrap().display()).unwrap();
        fs::read(file).unwrap().chunks(32).for_each(|line| writeln!(text, "{}", hex(line)).unwrap());
    }
    assert!(text.len() < 50_000, "{} bytes", text.len());
    if let Ok(target) = std::env::var("STORE_WRITE_FORMAT") {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(target), &text).unwrap();
    }
    // What it writes is what is read back below.
    let again = tempfile::tempdir().unwrap();
    let expected = unpack(&text, again.path());
    assert_eq!(contents(&Store::open(again.path(), Mode::ReadOnly).unwrap()), expected);
}

/// Makes the files of a store from its text; the contents it must have.
fn unpack(text: &str, dir: &Path) -> BTreeMap<(String, String), (u64, String)> {
    let mut expected = BTreeMap::new();
    let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["content", head, blob, size, hash] => {
                expected.insert((head.to_owned(), blob.to_owned()), (size.parse().unwrap(), hash.to_owned()));
            }
            ["file", path] => files.push((dir.join(path), Vec::new())),
            [bytes] => files.last_mut().unwrap().1.extend(unhex(bytes)),
            _ => panic!("`{line}`"),
        }
    }
    for folder in ["packs", "heads", "tmp"] {
        fs::create_dir_all(dir.join(folder)).unwrap();
    }
    files.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    expected
}

#[test]
fn stores_of_every_format_are_read_completely_and_go_on() {
    let formats = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats");
    let mut seen = Vec::new();
    for entry in fs::read_dir(formats).unwrap().map(Result::unwrap) {
        seen.push(entry.file_name().to_string_lossy().parse::<u32>().unwrap());
        let text = fs::read_to_string(entry.path().join("store.txt")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let expected = unpack(&text, dir.path());
        assert!(expected.len() >= 6, "{} versions", expected.len());
        let store = Store::open(dir.path(), Mode::ReadOnly).unwrap();
        assert_eq!(contents(&store), expected);
        assert_sound(&store);
        drop(store);
        // A writer finds it as good as its own.
        let store = Store::open(dir.path(), Mode::ReadWrite).unwrap();
        assert_eq!(contents(&store), expected);
        publish(&store, "new", &Mem(Rng(5).mixed(20)));
        store.delete_head("first").unwrap();
        store.collect().unwrap();
        assert_sound(&store);
        for head in store.heads("").unwrap() {
            store.delete_head(&head).unwrap();
        }
        store.collect().unwrap();
        assert_eq!((store.stats().blocks, store.stats().packs), (0, 0));
    }
    assert!(seen.contains(&1) && seen.contains(&2), "{seen:?}");
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), Mode::ReadWrite).unwrap());
    let mut key = fs::read(dir.path().join("key")).unwrap();
    key[8] = 99;
    let sum = blake3::hash(&key[..48]);
    key[48..].copy_from_slice(sum.as_bytes());
    fs::write(dir.path().join("key"), key).unwrap();
    for mode in [Mode::ReadOnly, Mode::ReadWrite] {
        let error = Store::open(dir.path(), mode).err().unwrap();
        assert!(matches!(&error, Error::Corrupt { what, .. } if what.contains("newer release")), "{error}");
    }
}
