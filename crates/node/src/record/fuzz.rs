//! Records edited at random: each is refused by the name of its file, or is one that all behind it can rely on.

use super::*;
use crate::edits::{SMALL, within};
use base::{PAGE, RamFileId, Source};

const RAM: u64 = 64 * PAGE;

fn shape() -> serde_json::Value {
    serde_json::json!({
        "machine": "pc-q35-7.2", "accelerator": "tcg", "cpu_model": "Westmere-v1", "cpus": 1,
        "ram": [{"id": "ram", "bytes": RAM}],
        "disks": [{"id": "disk0", "bytes": 1 << 20, "block_bytes": 4096}],
        "nic": {"mac": "52:54:00:12:34:56"}
    })
}

fn origin() -> serde_json::Value {
    serde_json::json!({"image": "tiny", "kernel": "/k", "initrd": null, "cmdline": "quiet"})
}

fn frozen() -> Vec<u8> {
    let mut map = RamMap::zero(RAM);
    map.set(ByteRange::new(0, 9 * PAGE), Source::File(RamFileId(0x10)));
    let record = serde_json::json!({
        "id": 7, "vm": "web", "vm_id": 3, "created": "2026-01-01T00:00:00Z", "tag": "ready", "shape": shape(),
        "origin": origin(), "generation": 1, "publish": [], "pause_ms": 1.5, "map": map.encode(), "base_ram": 16,
        "written": [[0, PAGE], [2 * PAGE, 9 * PAGE]], "zeroed": [[9 * PAGE, 11 * PAGE]],
        "holder": {"pid": 1, "start": 2}, "address": 1_u64 << 40, "views": [5]
    });
    serde_json::to_vec(&record).unwrap()
}

fn started() -> Vec<u8> {
    let record = serde_json::json!({
        "id": 7, "name": "web", "created": "2026-01-01T00:00:00Z", "origin": origin(), "parent": "old", "generation": 1,
        "shape": shape(), "publish": ["127.0.0.1:8080:80"], "overlays": [5],
        "start_ram": 16, "generation_id": "g", "life": {"running": {"hypervisor": {"pid": 1, "start": 2},
        "passt": {"pid": 3, "start": 4}}}
    });
    serde_json::to_vec(&record).unwrap()
}

/// Numbers and ranges exchanged, since an edited byte mostly leaves no JSON.
fn exchanged(valid: &[u8], script: &[u8]) -> Vec<u8> {
    let mut text = String::from_utf8(valid.to_vec()).unwrap();
    for edit in script.chunks_exact(2) {
        let starts: Vec<usize> = text
            .char_indices()
            .filter(|&(at, c)| c.is_ascii_digit() && !text[..at].ends_with(|c: char| c.is_ascii_digit()))
            .map(|(at, _)| at)
            .collect();
        let Some(&at) = starts.get(usize::from(edit[0]) % starts.len().max(1)) else { continue };
        let len = text[at..].find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len() - at);
        let numbers = [0, 1, PAGE - 1, PAGE, 9 * PAGE, RAM, RAM + PAGE, i64::MAX as u64, u64::MAX];
        text.replace_range(at..at + len, &numbers[usize::from(edit[1]) % numbers.len()].to_string());
    }
    text.into_bytes()
}

fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn is_named<T>(found: Result<T>, path: &Path) -> Option<T> {
    match found {
        Ok(record) => Some(record),
        Err(error) => {
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            None
        }
    }
}

fn freeze(bytes: &[u8]) {
    let (_dir, path) = file("f.json", bytes);
    let found = within(64 * bytes.len() + SMALL, || FreezeRecord::load(&path));
    let Some(record) = is_named(found, &path) else { return };
    assert!(record.changed_bytes() <= RAM.max(record.shape.memory_bytes()));
    let size = record.shape.memory_bytes();
    assert!(record.written().iter().chain(&record.zeroed()).all(|range| range.end <= size && !range.is_empty()));
    assert_eq!(RamMap::decode(&record.map).unwrap().size(), size);
    save(&path, &record).unwrap();
    assert_eq!(FreezeRecord::load(&path).unwrap().written, record.written);
}

#[test]
fn freezes() {
    fuzz!(vec![frozen()], |bytes, _| { freeze(bytes) });
}

#[test]
fn freezes_with_other_numbers() {
    fuzz!(vec![frozen()], exchanged, |bytes, _| { freeze(bytes) });
}

#[test]
fn machines() {
    fuzz!(vec![started()], |bytes, _| {
        let (dir, path) = file("vm.json", bytes);
        let found = within(64 * bytes.len() + SMALL, || VmRecord::load(dir.path()));
        let Some(record) = is_named(found, &path) else { return };
        record.save(dir.path()).unwrap();
        assert_eq!(VmRecord::load(dir.path()).unwrap().life, record.life);
    });
}

#[test]
fn valid_ones_are_read() {
    let (_dir, path) = file("f.json", &frozen());
    assert_eq!(FreezeRecord::load(&path).unwrap().changed_bytes(), 8 * PAGE);
    let (dir, _) = file("vm.json", &started());
    assert_eq!(VmRecord::load(dir.path()).unwrap().overlays, [5]);
}
