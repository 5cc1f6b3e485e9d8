//! Versions that follow one version and no other.
#![allow(missing_docs)]

use crate::common;

use base::ByteRange;
use common::{Mem, Rng, assert_same};
use std::sync::Arc;
use store::blob::{At, Origin};
use store::{Changes, Error, Mode, Store, engine::Memory};

fn changes<'a>(written: &'a [ByteRange], zeroed: &'a [ByteRange], source: &'a Mem) -> Changes<'a> {
    Changes { written, zeroed, source, threads: 1, progress: None, cancel: None }
}

#[test]
fn of_all_who_would_follow_one_version_exactly_one_does() {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 1 << 20, 4096).unwrap();
    let sources: Vec<Mem> = (0..8).map(|n| Mem(Rng(n + 1).noise(1 << 20))).collect();
    for base in 0..20_u64 {
        let range = ByteRange::at((base % 10) * 65_536, 40_960);
        let follow = |n: usize| store.blob("b").unwrap().commit_onto(base, &changes(&[range], &[], &sources[n]));
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || follow(n))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let (mut winner, mut lost) = (None, 0);
        for (n, result) in results.into_iter().enumerate() {
            match result {
                Ok((number, version)) => assert!(winner.replace((n, number, version)).is_none(), "two follow {base}"),
                Err(Error::HeadChanged { .. }) => lost += 1,
                Err(other) => panic!("{other}"),
            }
        }
        let (n, number, version) = winner.expect("one follows");
        assert_eq!((number, lost), (base + 1, 7));
        assert_eq!(blob.latest().unwrap(), (number, version));
        let mut read = vec![0; range.len() as usize];
        blob.read(At::Latest, range.start, &mut read).unwrap();
        assert_same(&read, &sources[n].0[range.start as usize..range.end as usize]);
    }
    // Made again from the same base, it has the same name.
    let (_, base) = blob.version(19).unwrap();
    let zeroed = [ByteRange::new(0, 8192)];
    let (_, made) = blob.commit_onto(20, &changes(&[], &zeroed, &sources[0])).unwrap();
    let (_, twenty) = blob.version(20).unwrap();
    assert_ne!(base, made);
    assert_eq!(store.begin().commit(&twenty, &changes(&[], &zeroed, &sources[0])).unwrap().0, made);
}

#[test]
fn a_blob_of_a_version_outlives_what_the_version_came_from() {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 300_000, 4096).unwrap();
    let bytes = Rng(3).noise(300_000);
    blob.write(0, &bytes).unwrap();
    let (number, version) = blob.latest().unwrap();
    let origin = Origin { blob: "b".to_owned(), number };
    store.create_blob_of("c", version, Some(&origin)).unwrap();
    assert!(matches!(store.create_blob_of("c", version, None), Err(Error::HeadChanged { .. })));
    blob.delete().unwrap();
    store.collect().unwrap();
    let clone = store.blob("c").unwrap();
    assert_eq!(clone.info().unwrap().origin, Some(origin));
    let mut read = vec![0; bytes.len()];
    clone.read(0, 0, &mut read).unwrap();
    assert_same(&read, &bytes);
}
