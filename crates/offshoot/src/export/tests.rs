use super::qcow2::{CLUSTER, Layout};
use super::{PIECE, cut};
use base::ByteRange;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

/// A qcow2 file made of a disk in memory.
fn written(size: u64, data: &[ByteRange], path: &std::path::Path) -> Vec<u8> {
    let disk: Vec<u8> = (0..size).map(|at| (at / 512 * 31 + at) as u8 | 1).collect();
    let mut shown = vec![0; size as usize];
    let layout = Layout::new(size, data);
    let out = File::create(path).unwrap();
    out.set_len(layout.file_size()).unwrap();
    for (at, bytes) in layout.metadata() {
        out.write_all_at(&bytes, at).unwrap();
    }
    for piece in cut(layout.data(), size) {
        let bytes = &disk[piece.from.start as usize..piece.from.end as usize];
        out.write_all_at(bytes, piece.to).unwrap();
        shown[piece.from.start as usize..piece.from.end as usize].copy_from_slice(bytes);
    }
    shown
}

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{words:?}: {text}");
    text
}

#[test]
fn qemu_finds_nothing_wrong_with_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
    let (image_text, raw_text) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let range = |start, len| ByteRange::at(start, len);
    let cases: &[(u64, &[ByteRange])] = &[
        (4096, &[]),
        (4096, &[range(0, 4096)]),
        (CLUSTER, &[range(512, 1)]),
        (3 * CLUSTER + 4096, &[range(0, 4096), range(3 * CLUSTER, 4096)]),
        (40 << 20, &[range(0, 40 << 20)]),
        (64 << 20, &[range(4096, 4096), range(5 * CLUSTER - 10, 20), range(30 << 20, 5 << 20)]),
    ];
    for (size, data) in cases {
        std::fs::write(&raw, written(*size, data, &image)).unwrap();
        let said = run(&["qemu-img", "check", "-f", "qcow2", image_text]);
        assert!(said.contains("No errors were found"), "{said}");
        run(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image_text, raw_text]);
    }
}

#[test]
fn tables_of_large_disks_are_laid_out_right() {
    // Several L2 tables, several clusters of L1, several refcount blocks: metadata alone, as QEMU checks it.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let tib = 1u64 << 40;
    let data = [ByteRange::at(100, 1), ByteRange::at((512 << 20) - 1, 2), ByteRange::at(3 * tib, 5 << 30)];
    let layout = Layout::new(16 * tib, &data);
    let out = File::create(&image).unwrap();
    out.set_len(layout.file_size()).unwrap();
    for (at, bytes) in layout.metadata() {
        out.write_all_at(&bytes, at).unwrap();
    }
    let said = run(&["qemu-img", "check", "-f", "qcow2", image.to_str().unwrap()]);
    assert!(said.contains("No errors were found"), "{said}");
    let allocated: u64 = layout.data().map(|(run, _)| run.len()).sum();
    assert_eq!(allocated, (5 << 30) + 3 * CLUSTER);
}

#[test]
fn pieces_are_bounded_and_end_with_the_disk() {
    let pieces = cut(
        [(ByteRange::new(0, PIECE + 10), 100), (ByteRange::new(3 * PIECE, 4 * PIECE), 7)].into_iter(),
        3 * PIECE + 5,
    );
    let got: Vec<_> = pieces.iter().map(|p| (p.from.start, p.from.end, p.to)).collect();
    assert_eq!(got, [(0, PIECE, 100), (PIECE, PIECE + 10, 100 + PIECE), (3 * PIECE, 3 * PIECE + 5, 7)]);
}
