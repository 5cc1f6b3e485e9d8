use super::*;
use crate::engine::Memory;

const PACK: &str = "packs/00000001-0123456789abcdef.pack";
const INDEX: &str = "packs/00000001-0123456789abcdef.idx";

/// A pack of one process of a node, and its directory.
fn laid(origin: &Arc<Memory>, dir: &Path) -> Near {
    let near = Near::open(Arc::clone(origin) as Arc<dyn Engine>, dir, 1 << 20).unwrap();
    let mut upload = near.upload(PACK).unwrap();
    upload.append(b"what was ").unwrap();
    upload.append(b"written").unwrap();
    near.finish_with(&mut *upload, INDEX, b"where it is").unwrap();
    near
}

fn read(near: &Near) -> io::Result<Vec<u8>> {
    let pack = near.open(PACK)?;
    let mut buf = vec![0; pack.size()? as usize];
    pack.read_at(0, &mut buf).map(|()| buf)
}

#[test]
fn what_one_process_wrote_another_reads_without_the_engine_below() {
    let (origin, dir) = (Arc::new(Memory::default()), tempfile::tempdir().unwrap());
    laid(&origin, dir.path());
    origin.remove(&[PACK.to_owned(), INDEX.to_owned()]).unwrap();
    let other = Near::open(origin, dir.path(), 1 << 20).unwrap();
    assert_eq!(read(&other).unwrap(), b"what was written");
    assert_eq!(other.get(INDEX).unwrap().unwrap(), b"where it is");
    assert_eq!(other.taken_bytes(), 16 + 11);
}

#[test]
fn what_is_spoilt_cut_short_or_of_another_boot_comes_from_below() {
    let (origin, dir) = (Arc::new(Memory::default()), tempfile::tempdir().unwrap());
    let near = laid(&origin, dir.path());
    let file = near.shelf.path("00000001-0123456789abcdef.pack");
    fs::write(&file, b"what was wrotten").unwrap();
    let pack = near.open(PACK).unwrap();
    let mut buf = [0; 16];
    pack.read_at(0, &mut buf).unwrap();
    assert_eq!(&buf, b"what was wrotten", "the reader has to find out");
    assert!(pack.distrust(ByteRange::new(0, 16)));
    pack.read_at(0, &mut buf).unwrap();
    assert_eq!(&buf, b"what was written");
    assert!(!file.exists());

    fs::write(near.shelf.path("00000001-0123456789abcdef.idx"), b"where it was, and no sum of it at all").unwrap();
    assert_eq!(near.get(INDEX).unwrap().unwrap(), b"where it is");

    fs::write(&file, b"what").unwrap();
    let next = Near::open_in_boot(origin, dir.path(), 1 << 20, "another-boot").unwrap();
    assert_eq!(read(&next).unwrap(), b"what was written");
    assert!(!file.exists(), "a power loss may have torn it");
}

#[test]
fn the_oldest_go_when_there_is_no_room() {
    let (origin, dir) = (Arc::new(Memory::default()), tempfile::tempdir().unwrap());
    let near = Near::open(origin as Arc<dyn Engine>, dir.path(), 1000).unwrap();
    for number in 0..4 {
        let mut upload = near.upload(&format!("packs/0000000{number}-0123456789abcdef.pack")).unwrap();
        upload.append(&[number; 400]).unwrap();
        upload.finish().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let mut left: Vec<_> = fs::read_dir(&near.shelf.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["00000002-0123456789abcdef.pack", "00000003-0123456789abcdef.pack"]);
}
