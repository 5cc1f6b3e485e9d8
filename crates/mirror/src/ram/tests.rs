use super::*;
use crate::resolve::double::Memory;
use base::PAGE;
use std::collections::HashMap;

/// This process plays its own holder: `bytes` is the RAM.
fn holder_of(bytes: &[u8]) -> Holder {
    let pid = std::process::id();
    Holder { pid, start: process_start(pid).unwrap(), address: bytes.as_ptr() as u64 }
}

fn read(
    object: &RamObject,
    files: &HashMap<u64, Arc<RamObject>>,
    versions: &Memory,
    range: ByteRange,
) -> Result<Vec<u8>, RamError> {
    let mut out = vec![0xee; range.len() as usize];
    object.read(&|id| files.get(&id).cloned(), versions, range.start, &mut out, &mut RamTally::default())?;
    Ok(out)
}

#[test]
fn each_page_comes_from_where_the_map_says() {
    let versions = Memory::default();
    versions.put("old", (0..4).flat_map(|page| [page + 1; PAGE as usize]).collect());
    let mut map = RamMap::zero(4 * PAGE);
    map.set(ByteRange::new(0, 4 * PAGE), Source::File(RamFileId(100)));
    let old = Arc::new(RamObject::new(100, map.clone(), RamSource::Committed("old".to_owned())));
    let files = HashMap::from([(100, old)]);
    map.set(ByteRange::at(PAGE, PAGE), Source::Zero);
    map.set(ByteRange::at(2 * PAGE, PAGE), Source::File(RamFileId(101)));
    let memory = vec![0x55; 4 * PAGE as usize];
    let new = RamObject::new(101, map, RamSource::Pending(holder_of(&memory)));
    assert_eq!(new.ancestors(), BTreeSet::from([100]));
    let all = read(&new, &files, &versions, ByteRange::new(100, 4 * PAGE - 100)).unwrap();
    let firsts: Vec<u8> = (0..4).map(|page| all[(page * PAGE as usize).saturating_sub(100)]).collect();
    assert_eq!(firsts, [1, 0, 0x55, 4]);
    // A version is the whole RAM: once committed, nothing is asked of ancestors, nor are they needed.
    versions.put("new", (0..4).flat_map(|page| [page + 0x11; PAGE as usize]).collect());
    new.set_source(RamSource::Committed("new".to_owned()));
    assert_eq!(new.ancestors(), BTreeSet::new());
    let all = read(&new, &HashMap::new(), &versions, ByteRange::new(0, 4 * PAGE)).unwrap();
    let firsts: Vec<u8> = (0..4).map(|page| all[page * PAGE as usize]).collect();
    assert_eq!(firsts, [0x11, 0, 0x13, 0x14]);
    new.set_source(RamSource::Blank);
    assert_eq!(read(&new, &files, &versions, ByteRange::at(2 * PAGE, 9)).unwrap(), [0; 9]);
    let orphan = read(&new, &HashMap::new(), &versions, ByteRange::at(0, 1)).unwrap_err().to_string();
    assert!(orphan.contains("0000000000000064"), "{orphan}");
}

#[test]
fn another_process_under_the_holders_pid_is_never_read() {
    let memory = vec![1; PAGE as usize];
    let holder = Holder { start: holder_of(&memory).start + 1, ..holder_of(&memory) };
    let mut map = RamMap::zero(PAGE);
    map.set(ByteRange::at(0, PAGE), Source::File(RamFileId(100)));
    let ram = RamObject::new(100, map, RamSource::Pending(holder));
    let versions = Memory::default();
    let lost = read(&ram, &HashMap::new(), &versions, ByteRange::at(0, PAGE)).unwrap_err();
    assert!(matches!(&lost, RamError::Lost { id: 100, why, .. } if why.contains("another's")), "{lost}");
    versions.put("v", vec![3; PAGE as usize]);
    ram.set_source(RamSource::Committed("v".to_owned()));
    assert_eq!(read(&ram, &HashMap::new(), &versions, ByteRange::at(0, 2)).unwrap(), [3, 3]);
    ram.set_source(RamSource::Committed("gone".to_owned()));
    assert!(matches!(read(&ram, &HashMap::new(), &versions, ByteRange::at(0, 2)), Err(RamError::Version(_))));
}
