//! Every decoder of the store against every kind of bytes, as `edits` says. Half of the scripts seal the result anew,
//! since a seal would otherwise keep everything else from being tried.

use crate::blob::history::{LogEntry, State};
use crate::blob::{At, BlobSnapshot};
use crate::chunks::disk;
use crate::edits::{SMALL, within};
use crate::engine::Memory;
use crate::frame::{self, Encoded, Frame, Kind};
use crate::head::{self, Manifest};
use crate::name::{FORMAT, Keys, Name, Version};
use crate::pack::{self, Index, PackId};
use crate::shared::Record;
use crate::store::{self, Mode, Store};
use crate::tree::{Children, Node};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

fn keys() -> Keys {
    Keys::derive(&[7; 32], FORMAT)
}

fn id() -> PackId {
    PackId { sequence: 3, random: 0x0123_4567_89ab_cdef }
}

/// Replaces the last 32 bytes by the seal of what precedes them.
fn sealed(bytes: &[u8], reseal: bool) -> Vec<u8> {
    let mut out = bytes.to_vec();
    if reseal && out.len() >= 32 {
        let at = out.len() - 32;
        let seal = keys().seal(&out[..at]);
        out[at..].copy_from_slice(&seal);
    }
    out
}

fn frames() -> Vec<(Encoded, Vec<Name>)> {
    let blocks = [vec![7; 4096], (0..=255).cycle().take(4096).collect()].concat();
    let noise: Vec<u8> = (0..512u64).flat_map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..8].to_vec()).collect();
    let child = keys().block(b"child");
    let node = |height, slots: &[usize]| {
        let mut children: Children = [None; 16];
        slots.iter().for_each(|slot| children[*slot] = Some(child));
        Node::new(height, &children).encode()
    };
    let nodes = [node(1, &[0]), node(2, &[3, 15]), node(1, &(0..16).collect::<Vec<_>>())].concat();
    let encode = |kind, raw: &[u8], items| (frame::encode(kind, raw).unwrap(), vec![child; items]);
    vec![encode(Kind::Blocks, &blocks, 2), encode(Kind::Blocks, &noise, 1), encode(Kind::Nodes, &nodes, 3)]
}

fn full_index() -> Index {
    let (mut index, mut at) = (Index::default(), 32);
    for (encoded, names) in frames() {
        index.push(at, &encoded, &names);
        at += encoded.stored.len() as u32;
    }
    index
}

#[test]
fn index() {
    let valid = vec![
        full_index().encode(id(), &keys()),
        full_index().without(|number| number == 1).encode(id(), &keys()),
        Index::default().encode(id(), &keys()),
    ];
    fuzz!(valid, |bytes, reseal| {
        let bytes = sealed(bytes, reseal);
        let keys = keys();
        within(2 * bytes.len() + SMALL, || pack::end_of_encoded(&bytes));
        if let Ok(index) = within(2 * bytes.len() + SMALL, || Index::decode(&bytes, id(), &keys)) {
            assert_eq!(Index::decode(&index.encode(id(), &keys), id(), &keys), Ok(index.clone()));
            assert_eq!(index.items().map(|(_, _, names)| names.len()).sum::<usize>(), index.names.len());
            assert!(index.end() <= u64::from(u32::MAX));
        }
    });
}

#[test]
fn head() {
    let version = Version { root: keys().node(b"x"), size: 12345, block_size: 4096 };
    let versions = BTreeMap::from([("disk".to_owned(), version), ("ram".to_owned(), version)]);
    let manifest = Manifest { versions, meta: "{\"a\": \"\\u00e9\\n\"}".to_owned() };
    fuzz!(vec![manifest.encode("a/b", &keys()), Manifest::default().encode("a/b", &keys())], |bytes, reseal| {
        let bytes = sealed(bytes, reseal);
        // A message quotes what it does not like.
        let decoded = within(16 * bytes.len() + SMALL, || Manifest::decode(&bytes, "a/b", &keys()));
        if let Ok(manifest) = decoded {
            let again = Manifest::decode(&manifest.encode("a/b", &keys()), "a/b", &keys()).unwrap();
            assert_eq!(again, manifest);
        }
    });
}

#[test]
fn key() {
    fuzz!(vec![store::encode_key(&[9; 32], 1), store::encode_key(&[9; 32], 2)], |bytes, reseal| {
        let mut bytes = bytes.to_vec();
        if reseal && bytes.len() == 80 {
            let sum = blake3::hash(&bytes[..48]);
            bytes[48..].copy_from_slice(sum.as_bytes());
        }
        if let Ok((key, format)) = within(SMALL, || store::decode_key(&bytes)) {
            assert_eq!(store::encode_key(&key, format), bytes);
        }
    });
}

/// The bytes of a frame come with a record from a sealed index, but the pack that holds them is not sealed.
#[test]
fn frame() {
    let valid: Vec<Vec<u8>> = frames().into_iter().map(|(encoded, _)| encoded.stored).collect();
    fuzz!(valid, |bytes, _| {
        let index = full_index();
        for info in &index.frames {
            let bound = frame::FRAME_RAW_MAX.min(info.raw as usize) + bytes.len() + SMALL;
            let Ok(frame) = within(bound, || Frame::decode(info, bytes.to_vec())) else { continue };
            let items: Vec<&[u8]> = (0..usize::from(info.items)).map(|slot| frame.item(slot).unwrap()).collect();
            assert_eq!(items.concat().len(), info.raw as usize);
            assert!(frame.item(usize::from(info.items)).is_none());
        }
    });
}

/// Records that no writer makes, with bytes that are as they should be.
#[test]
fn frame_records() {
    fuzz!(vec![full_index().encode(id(), &keys())], |bytes, _| {
        let Ok(index) = Index::decode(&sealed(bytes, true), id(), &keys()) else { return };
        for info in &index.frames {
            for (encoded, _) in frames() {
                let bound = frame::FRAME_RAW_MAX + encoded.stored.len() + SMALL;
                if let Ok(frame) = within(bound, || Frame::decode(info, encoded.stored)) {
                    (0..usize::from(info.items)).for_each(|slot| assert!(frame.item(slot).is_some()));
                }
            }
        }
    });
}

#[test]
fn node() {
    let (encoded, _) = frames().swap_remove(2);
    let nodes = Frame::decode(&pack::frame_info(32, &encoded, 3), encoded.stored).unwrap();
    fuzz!((0..3).map(|slot| nodes.item(slot).unwrap().to_vec()).collect(), |bytes, _| {
        let len = within(SMALL, || Node::encoded_len(bytes));
        assert!(len.is_none_or(|len| len <= bytes.len()));
        if let Some(node) = within(bytes.len() + SMALL, || Node::decode(bytes)) {
            assert_eq!(node.encode(), bytes);
        }
    });
}

#[test]
fn text() {
    let version = Version { root: keys().node(b"x"), size: 12345, block_size: 4096 }.to_string();
    let zero = format!("{}.4096.4096", Name::zero(1));
    let names = ["a/b-c:d@e+f", "00000003-0123456789abcdef.pack", "00000003-0123456789abcdef.idx"];
    let valid = [version, zero].into_iter().chain(names.map(str::to_owned)).map(String::into_bytes).collect();
    fuzz!(valid, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        let bound = 8 * text.len() + SMALL;
        if let Ok(version) = within(bound, || text.parse::<Version>()) {
            assert_eq!(version.to_string().parse(), Ok(version));
            assert!(version.height() <= 16);
        }
        if let Ok(name) = within(bound, || text.parse::<Name>()) {
            assert_eq!(name.to_string(), text.to_lowercase());
        }
        if let Some((id, is_index)) = within(bound, || PackId::parse(&text)) {
            assert_eq!(format!("{id}{}", if is_index { ".idx" } else { ".pack" }), text);
        }
        if within(bound, || head::check_name(&text)).is_ok() {
            assert!(text.is_ascii() && text.len() <= 200 && text.split('/').all(|part| !part.starts_with('.')));
        }
    });
}

#[test]
fn cache_record() {
    fuzz!(vec![disk::example_record()], |bytes, reseal| {
        let Ok(record) = <&[u8; 128]>::try_from(bytes) else { return };
        let mut record = *record;
        if reseal {
            disk::seal(&mut record);
        }
        within(SMALL, || disk::is_possible(&record));
    });
}

/// A store with a blob of two epochs, a deleted version, tags and a clone, and its heads as they are on the medium.
static BLOBS: LazyLock<(Store, Vec<Manifest>)> = LazyLock::new(|| {
    let store = Store::open_engine(Arc::new(Memory::default()), Mode::ReadWrite).unwrap();
    let blob = store.create_blob("b", 3000, 512).unwrap();
    blob.write(100, b"one").unwrap();
    blob.append(&[7; 900]).unwrap();
    blob.resize(60 << 20).unwrap();
    blob.write(50 << 20, b"two").unwrap();
    blob.delete_version(1).unwrap();
    blob.tag(2, "kept").unwrap();
    blob.clone(2u64, "clone").unwrap();
    store.snapshot_blobs("both", &[("b", At::Latest), ("clone", At::Latest)]).unwrap();
    let heads = ["blob/b", "blob/clone", "blobsnap/both"].map(|head| store.head(head).unwrap().unwrap().0);
    assert_eq!(heads[0].versions.len(), 4, "two epochs");
    (store, heads.to_vec())
});

/// Heads that are sealed and say of a blob what cannot be.
#[test]
fn blob_states() {
    let valid = BLOBS.1.iter().map(|manifest| manifest.encode("x", &keys())).collect();
    fuzz!(valid, |bytes, _| {
        // The seal is right; which fields the edits hit is left to chance, so the lengths are mended as well.
        let mut bytes = sealed(bytes, true);
        if bytes.len() >= 48 {
            let length = (bytes.len() - 48) as u32;
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            bytes = sealed(&bytes, true);
        }
        let Ok(manifest) = Manifest::decode(&bytes, "x", &keys()) else { return };
        let store = &BLOBS.0;
        let bound = 64 * bytes.len() + (64 << 10);
        drop(within(bound, || BlobSnapshot::decode("x", manifest.clone())));
        drop(within(bound, || serde_json::from_str::<Record>(&manifest.meta)));
        let Ok(state) = within(bound, || State::decode("x", &manifest)) else { return };
        let latest = state.number();
        for number in [0, 1, 2, latest / 2, latest.saturating_sub(1), latest, latest.saturating_add(1), u64::MAX] {
            // An answer or an error; never more than the log of a few versions in memory.
            drop(state.entries(store, number..number.saturating_add(3)));
            if let Ok((_, version)) = state.version(store, At::Number(number)) {
                assert!(version.height() <= 16);
                drop(store.is_zero(&version, base::ByteRange::new(0, version.size.min(100))));
            }
        }
    });
}

#[test]
fn log_records() {
    let (store, heads) = &*BLOBS;
    let entries = State::decode("b", &heads[0]).unwrap().entries(store, 0..9).unwrap();
    fuzz!(entries.iter().map(|entry| entry.encode().to_vec()).collect(), |bytes, _| {
        let Ok(bytes) = <&[u8; 64]>::try_from(bytes) else { return };
        if let Some(entry) = within(SMALL, || LogEntry::decode(7, bytes)) {
            assert_eq!((entry.number, entry.encode()), (7, *bytes));
        }
    });
}
