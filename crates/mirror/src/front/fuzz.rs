//! Requests of the kernel with any of their bytes exchanged. The kernel makes no wrong ones, but whoever may open a file
//! chooses what they ask for: each is answered within bounds, and nothing is read or written beyond an object.

use super::abi::{Header, IN_HEADER, OUT_HEADER, op};
use super::files::{Answer, MAX_WRITE};
use super::session::Session;
use super::workers;
use crate::control::{Below, OverlaySpec, RamSource, RamSpec};
use crate::core::Core;
use crate::edits::{SMALL, within};
use crate::home::Home;
use crate::objects::Objects;
use crate::resolve::double::Memory;
use crate::tree::{FIRST, Tree};
use crate::{IOCTL_CLONE, IOCTL_COMMIT};
use std::fs::File;
use std::sync::{Arc, LazyLock, mpsc};

const RAM: u64 = 0x10;
const DISK: u64 = 0x20;
const SIZE: u64 = 1 << 20;

/// A RAM file of 16 pages and a disk of 1 MiB.
static CORE: LazyLock<(tempfile::TempDir, Core)> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let home = Home::prepare_for_boot(dir.path(), "boot").unwrap();
    home.reset_live().unwrap();
    let objects = Objects::open(home.clone(), Arc::new(Memory::default())).unwrap();
    let map = base::RamMap::zero(16 * base::PAGE).encode();
    objects.add_ram(&RamSpec { id: RAM, map, source: RamSource::Blank }).unwrap();
    let (vm, below) = ("vm".to_owned(), Below::Zero);
    objects.add_overlay(&OverlaySpec { id: DISK, vm, size: SIZE, block_size: 4096, below }).unwrap();
    let tree = Tree::open(home.clone(), false).unwrap();
    let session = Session::on(File::options().write(true).open("/dev/null").unwrap().into());
    (dir, crate::assemble(home, objects, tree, (session, "s".to_owned()), 0, mpsc::channel().0))
});

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let head = [(IN_HEADER + body.len()) as u32, opcode].map(u32::to_le_bytes).concat();
    let names = [7, node, 0, 0].map(u64::to_le_bytes).concat();
    [head, names, body.to_vec()].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// One of each kind that does more than say no.
fn requests() -> Vec<Vec<u8>> {
    let read = |offset, size| words(&[0, offset, size, 0, 0]);
    let ioctl = |command: u32, data: &[u8]| [words(&[0, u64::from(command) << 32, 0, 8 << 32]), data.to_vec()].concat();
    vec![
        request(op::READ, RAM, &read(4096, 4096)),
        request(op::READ, DISK, &read(8192, 4096)),
        request(op::READ, FIRST, &read(0, 4096)),
        request(op::WRITE, DISK, &[words(&[0, 4096, 512, 0, 0]), vec![7; 512]].concat()),
        request(op::LOOKUP, 1, b"disk\0"),
        request(op::LOOKUP, 3, b"0000000000000020\0"),
        request(op::LOOKUP, 4, b"team%2fdata\0"),
        request(op::GETATTR, DISK, &words(&[0, 0])),
        request(op::SETATTR, DISK, &words(&[8, 0, SIZE, 0, 0, 0, 0, 0, 0, 0, 0])),
        request(op::OPEN, RAM, &words(&[0])),
        request(op::OPEN, FIRST, &words(&[2])),
        request(op::READDIR, 1, &read(0, 4096)),
        request(op::READDIR, 4, &read(0, 4096)),
        request(op::FALLOCATE, DISK, &words(&[0, 4096, 8192, 3])),
        request(op::LSEEK, DISK, &words(&[0, 0, 3])),
        request(op::FSYNC, DISK, &words(&[0, 0])),
        request(op::IOCTL, FIRST, &ioctl(IOCTL_COMMIT, &[])),
        request(op::IOCTL, FIRST, &ioctl(IOCTL_CLONE, b"new\0")),
        request(op::FORGET, FIRST, &words(&[1])),
        request(op::BATCH_FORGET, 0, &words(&[2, FIRST, 1, FIRST + 1, 1])),
        request(op::READLINK, FIRST, &[]),
        request(op::RELEASE, FIRST, &words(&[0, 0, 0])),
        request(op::INIT, 0, &words(&[7 | 40 << 32, 4096 | 0xff << 32])),
        request(op::STATFS, 1, &[]),
    ]
}

#[test]
fn requests_of_the_kernel() {
    fuzz!(requests(), |bytes, _| {
        let (_, core) = &*CORE;
        let mut buf = workers::buffer();
        let len = bytes.len().max(IN_HEADER).min(buf.len());
        buf[..bytes.len().min(len)].copy_from_slice(&bytes[..bytes.len().min(len)]);
        let header = Header::parse(&buf);
        core.is_disk_work(&header);
        let answer = within((MAX_WRITE as usize) + len + SMALL, || core.answer(header, &mut buf, len));
        match answer {
            Answer::Nothing => {}
            Answer::Error(errno) => assert!(errno.raw_os_error() > 0),
            Answer::InPlace(len) => assert!(OUT_HEADER + len <= buf.len() && header.opcode == op::READ),
            Answer::Body(body) => assert!(OUT_HEADER + body.len() <= buf.len()),
        }
        let size = |object: u64| core.objects.overlay(object).map(|disk| disk.size);
        assert_eq!((size(DISK), core.objects.ram(RAM).map(|ram| ram.map.size())), (Some(SIZE), Some(16 * base::PAGE)));
    });
}
