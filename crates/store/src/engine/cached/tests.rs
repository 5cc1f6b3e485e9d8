use super::*;
use crate::engine::Memory;

#[test]
fn the_index_of_a_tebibyte_takes_less_than_a_hundred_megabytes() {
    for (bytes, chunk) in [(1 << 30, 64 << 10), (1 << 39, 256 << 10), (1 << 40, 512 << 10), (1 << 42, 1 << 20)] {
        assert_eq!(CacheOptions::new(bytes).chunk().unwrap(), chunk, "{bytes}");
    }
    let options = CacheOptions::new(1 << 40);
    // 40 bytes a chunk at most: `chunks::index` tests it.
    assert!(CacheOptions::slots(options.bytes, options.chunk().unwrap().into()) * 40 < 100_000_000);
    for bad in [0, 4096, 100_000, 2 << 20] {
        assert!(CacheOptions { chunk_bytes: Some(bad), ..options.clone() }.chunk().is_err(), "{bad}");
    }
}

#[test]
fn only_packs_are_cached_in_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let cached = Cached::open(Arc::new(Memory::default()), dir.path(), &CacheOptions::new(1 << 22)).unwrap();
    assert!(pack_of("packs/00000001-0000000000000002.pack").is_some());
    for other in ["packs/00000001-0000000000000002.idx", "packs/x.pack", "key", "other/00000001-0000000000000002.pack"]
    {
        assert_eq!(pack_of(other), None);
        let place = Place { object: other.to_owned(), ranges: vec![ByteRange::new(0, 1)] };
        assert!(cached.pin(&[place]).is_err());
    }
    assert!(cached.open("packs/00000001-0000000000000002.pack").is_err(), "it is not there");
    let second = Cached::open(Arc::new(Memory::default()), dir.path(), &CacheOptions::new(1 << 22)).err().unwrap();
    assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
}
