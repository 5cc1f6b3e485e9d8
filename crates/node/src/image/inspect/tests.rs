use super::partitions::{Fault, scan};
use super::*;

#[test]
fn versions_order_by_value() {
    let mut names =
        ["vmlinuz-6.1.0-10-amd64", "vmlinuz-6.1.0-9-amd64", "vmlinuz-6.10.0-1-amd64", "vmlinuz", "vmlinuz-5.10"];
    names.sort_by_key(|name| version_key(name));
    let expected =
        ["vmlinuz", "vmlinuz-5.10", "vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-10-amd64", "vmlinuz-6.10.0-1-amd64"];
    assert_eq!(names, expected);
}

#[test]
fn listings_yield_regular_files_of_plain_names_only() {
    let file = |inode, name: &str, size| Listed { inode, name: name.to_owned(), size };
    assert_eq!(parse_listed("/12/100644/0/0/vmlinuz-6.1/8192/"), Some(file(12, "vmlinuz-6.1", 8192)));
    for line in [
        "/12/120777/0/0/vmlinuz/20/",
        "/2/040755/0/0/..//",
        "/12/100644/0/0/a name/1/",
        "/12/100644/0/0/\"; rm/1/",
        "/12/100644/0/0/<3>/1/",
        "vmlinuz",
        "",
    ] {
        assert_eq!(parse_listed(line), None, "{line}");
    }
}

#[test]
fn the_initrd_of_the_newest_kernel_is_chosen() {
    let names =
        ["initrd.img-6.1.0-9", "vmlinuz-6.1.0-9", "initrd.img-6.1.0-10", "vmlinuz-6.1.0-10", "vmlinuz-0-rescue-ab"];
    let files: Vec<Listed> = names
        .iter()
        .enumerate()
        .map(|(i, name)| Listed { inode: i as u64, name: (*name).to_owned(), size: 1 })
        .collect();
    let kernel = newest_kernel(&files).unwrap();
    assert_eq!(kernel.name, "vmlinuz-6.1.0-10");
    assert_eq!(initrd_of(&files, "6.1.0-10").unwrap().name, "initrd.img-6.1.0-10");
    assert!(initrd_of(&files, "7").is_none());
}

/// A disk in memory.
fn faults(disk: &[u8]) -> Result<Vec<(u32, u64)>, String> {
    let read = |offset: u64, buf: &mut [u8]| {
        let from = disk.get(offset as usize..offset as usize + buf.len());
        from.map(|from| buf.copy_from_slice(from)).ok_or_else(|| std::io::Error::other("read beyond the disk"))
    };
    match scan(&read, disk.len() as u64) {
        Ok(found) => Ok(found.iter().map(|fs| (fs.extent.partition, fs.extent.start)).collect()),
        Err(Fault::Wrong(why)) => Err(why),
        Err(Fault::Io(e)) => panic!("the scan read where nothing is: {e}"),
    }
}

fn superblock(disk: &mut [u8], start: usize, blocks: u32) {
    disk[start + 1024 + 4..][..4].copy_from_slice(&blocks.to_le_bytes());
    disk[start + 1024 + 24..][..4].copy_from_slice(&2u32.to_le_bytes());
    disk[start + 1024 + 56..][..2].copy_from_slice(&[0x53, 0xef]);
}

fn mbr(disk: &mut [u8], index: usize, kind: u8, first: u32, count: u32) {
    let entry = &mut disk[446 + 16 * index..][..16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&first.to_le_bytes());
    entry[12..16].copy_from_slice(&count.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
}

#[test]
fn file_systems_are_found_on_the_disk_and_in_its_partitions() {
    let mut disk = vec![0; 1 << 20];
    assert_eq!(faults(&disk), Ok(vec![]));
    superblock(&mut disk, 0, 256);
    assert_eq!(faults(&disk), Ok(vec![(0, 0)]));

    let mut disk = vec![0; 1 << 20];
    mbr(&mut disk, 1, 0x83, 64, 1024);
    superblock(&mut disk, 64 * 512, 128);
    assert_eq!(faults(&disk), Ok(vec![(2, 64 * 512)]));

    let mut disk = vec![0; 1 << 20];
    gpt(&mut disk, 64, 64 + 1023);
    superblock(&mut disk, 64 * 512, 128);
    assert_eq!(faults(&disk), Ok(vec![(1, 64 * 512)]));
}

fn gpt(disk: &mut [u8], first: u64, last: u64) {
    mbr(disk, 0, 0xee, 1, u32::MAX);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 72..][..8].copy_from_slice(&2u64.to_le_bytes());
    disk[512 + 80..][..4].copy_from_slice(&4u32.to_le_bytes());
    disk[512 + 84..][..4].copy_from_slice(&128u32.to_le_bytes());
    disk[1024] = 1;
    disk[1024 + 32..][..8].copy_from_slice(&first.to_le_bytes());
    disk[1024 + 40..][..8].copy_from_slice(&last.to_le_bytes());
}

#[test]
fn tables_and_superblocks_that_lie_are_refused() {
    let mut disk = vec![0; 1 << 20];
    superblock(&mut disk, 0, 257);
    assert!(faults(&disk).unwrap_err().contains("truncated"));
    superblock(&mut disk, 0, u32::MAX);
    disk[1024 + 24] = 60;
    assert!(faults(&disk).unwrap_err().contains("corrupt"), "a block size of 2^70");

    let mut disk = vec![0; 1 << 20];
    mbr(&mut disk, 0, 0x83, 64, 2048);
    assert!(faults(&disk).unwrap_err().contains("partition 1 ends beyond"));

    for (first, last) in [(64, 4096), (64, 63), (u64::MAX, u64::MAX), (0, u64::MAX)] {
        let mut disk = vec![0; 1 << 20];
        gpt(&mut disk, first, last);
        assert!(faults(&disk).is_err(), "{first}..={last}");
    }
    for (at, value) in [(72, u64::MAX), (72, 1 << 40), (80, u64::from(u32::MAX)), (84, 1 << 10)] {
        let mut disk = vec![0; 1 << 20];
        gpt(&mut disk, 64, 100);
        disk[512 + at..][..8].copy_from_slice(&value.to_le_bytes());
        let found = faults(&disk);
        assert!(found.is_err() || found == Ok(vec![]), "GPT field {at} = {value}: {found:?}");
    }
}

#[test]
fn every_flipped_byte_of_a_partition_table_is_survived() {
    let mut disk = vec![0; 1 << 20];
    gpt(&mut disk, 64, 64 + 1023);
    superblock(&mut disk, 64 * 512, 128);
    let interesting = (440..512).chain(512..608).chain(1024..1152).chain(64 * 512 + 1024..64 * 512 + 1536);
    for at in interesting {
        for mask in [0x01, 0x80, 0xff] {
            disk[at] ^= mask;
            let _ = faults(&disk);
            disk[at] ^= mask;
        }
    }
    assert_eq!(faults(&disk), Ok(vec![(1, 64 * 512)]));
}

mod fuzz {
    use super::*;
    use crate::edits::{SMALL, within};

    /// What is found lies on the disk, whatever its tables say, and nothing beyond it is read.
    #[test]
    fn partition_tables() {
        let mut dos = vec![0; 8192];
        mbr(&mut dos, 1, 0x83, 6, 10);
        mbr(&mut dos, 3, 0x83, 2, 8);
        let mut modern = vec![0; 8192];
        gpt(&mut modern, 6, 15);
        fuzz!(vec![dos, modern], |head, _| {
            let mut disk = head.to_vec();
            disk.resize(32 << 10, 0);
            for start in [3072, 7168, 16384] {
                superblock(&mut disk, start, 2);
            }
            if let Ok(found) = within((2 << 20) + SMALL, || faults(&disk)) {
                assert!(found.iter().all(|&(_, start)| start + 2048 <= disk.len() as u64), "{found:?}");
            }
        });
    }
}
