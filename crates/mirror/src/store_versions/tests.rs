use super::*;
use store::{Expect, Manifest};

#[test]
fn versions_of_a_real_store_read_right_and_a_flipped_bit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Store::open(dir.path(), Mode::ReadWrite).unwrap();
    let reader = StoreVersions::open(dir.path()).unwrap();
    let mut state = 1u32;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(300_000)
    .collect();
    let transaction = writer.begin();
    let version = transaction.put_bytes(&bytes).unwrap();
    let mut manifest = Manifest::default();
    manifest.versions.insert("ram".to_owned(), version);
    transaction.publish("test", Expect::Absent, &manifest).unwrap();
    let text = version.to_string();
    // A reader that was open before sees it, and what lies past the end reads as zero.
    let mut buf = vec![0xee; 8192];
    assert!(reader.read_at(&text, 296_000, &mut buf).unwrap() > 0);
    assert!(buf[..4000] == bytes[296_000..] && buf[4000..].iter().all(|&b| b == 0));
    assert_eq!(reader.read_at(&text, 400_000, &mut buf), Ok(0));
    assert!(matches!(reader.read_at("nonsense", 0, &mut buf), Err(VersionError::Unavailable { .. })));
    flip_a_bit_of_every_pack(dir.path());
    let fresh = StoreVersions::open(dir.path()).unwrap();
    let refused = fresh.read_at(&text, 100_000, &mut buf).unwrap_err();
    assert!(matches!(refused, VersionError::Corrupt { .. }), "{refused}");
}

fn flip_a_bit_of_every_pack(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            flip_a_bit_of_every_pack(&path);
        } else if path.metadata().unwrap().len() > 200_000 {
            let mut bytes = std::fs::read(&path).unwrap();
            // Every few hundred bytes: whichever frame is read, it is hit.
            (100..bytes.len()).step_by(500).for_each(|at| bytes[at] ^= 1);
            std::fs::write(&path, bytes).unwrap();
        }
    }
}
