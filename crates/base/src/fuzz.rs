//! What other processes and files say in this crate's forms, edited at random.

use crate::edits::{SMALL, within};
use crate::{ByteRange, PAGE, RamFileId, RamMap, Source, resident, units};

fn map() -> RamMap {
    let mut map = RamMap::zero(64 * PAGE);
    map.set(ByteRange::new(0, 9 * PAGE), Source::File(RamFileId(0x10)));
    map.set(ByteRange::new(9 * PAGE, 20 * PAGE), Source::File(RamFileId(u64::MAX)));
    map.set(ByteRange::new(63 * PAGE, 64 * PAGE), Source::File(RamFileId(0x11)));
    map
}

#[test]
fn ram_maps() {
    let valid = [map(), RamMap::zero(PAGE), RamMap::zero(u64::MAX - u64::MAX % PAGE)];
    fuzz!(valid.iter().map(|map| map.encode().into_bytes()).collect(), |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        // A line of nine bytes is an extent, kept in a tree and, while it is read, as words.
        let Ok(map) = within(16 * text.len() + SMALL, || RamMap::decode(&text)) else { return };
        assert_eq!(RamMap::decode(&map.encode()).as_ref(), Ok(&map));
        let mut at = 0;
        for (range, source) in map.extents() {
            assert!(range.start == at && !range.is_empty() && range.end.is_multiple_of(PAGE));
            assert_eq!(map.lookup(range.end - 1), (source, range.end));
            at = range.end;
        }
        assert_eq!(at, map.size());
        assert!(map.files().values().sum::<u64>() <= map.size());
    });
}

#[test]
fn replies_of_the_resident_library() {
    let lines = [
        "ok holder=4711 start=99 ram=0x7f00 tracked=1 written=2 zeroed=0 ranges=2 fork_us=7 scan_us=0\n",
        "error no memory\n",
        "ok\n",
    ];
    fuzz!(lines.map(|line| line.as_bytes().to_vec()).to_vec(), |bytes, _| {
        let line = String::from_utf8_lossy(bytes);
        match within(64 * line.len() + SMALL, || resident::fields(&line)) {
            Ok(fields) => assert!(line.starts_with("ok") && fields.keys().all(|key| !key.contains(['=', ' ']))),
            Err(why) => assert!(!line.starts_with("ok ") && why.len() <= line.len() + 40),
        }
    });
}

#[test]
fn sizes() {
    let texts = ["512M", "1.5GiB", "18446744073709551615", "0.001T", "64kb"];
    fuzz!(texts.map(|text| text.as_bytes().to_vec()).to_vec(), |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        if let Ok(size) = within(4 * text.len() + SMALL, || units::parse_size(&text)) {
            assert_eq!(units::parse_size(&size.to_string()), Ok(size));
            assert!(!units::human(size).is_empty());
        }
    });
}
