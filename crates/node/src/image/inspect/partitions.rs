//! Partition tables and ext superblocks, read with suspicion. Pure but for the reader it is given.
//!
//! GPT: header in block 1, `EFI PART`; table position, entry count and size at 72, 80 and 84; an entry's first and
//! last block at 32 and 40. MBR: four entries of 16 bytes at 446, type at 4, first block and count at 8 and 12.
//! ext superblock, 1024 bytes in: magic 0xEF53 at 56, blocks at 4 (upper half at 336), log of block size at 24.

use std::io;

const SECTOR: u64 = 512;
/// More entries than any tool makes.
const GPT_ENTRIES_MAX: u32 = 512;

pub(super) enum Fault {
    Io(io::Error),
    Wrong(String),
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// A stretch of the disk that may hold a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// 0 for the whole disk.
    pub(super) partition: u32,
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Extent {
    /// The guest's name of it, where the disk is the first virtio disk.
    pub(super) fn device(&self) -> String {
        if self.partition == 0 { "/dev/vda".to_owned() } else { format!("/dev/vda{}", self.partition) }
    }
}

/// An ext2, ext3 or ext4 file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    pub(super) extent: Extent,
}

type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

/// The ext file systems of a disk of `size` bytes: the whole of it, or in its partitions.
pub(super) fn scan(read: Read<'_>, size: u64) -> Result<Vec<FileSystem>, Fault> {
    let whole = Extent { partition: 0, start: 0, len: size };
    if let Some(found) = ext(read, whole)? {
        return Ok(vec![found]);
    }
    let mut found = Vec::new();
    for extent in table(read, size)? {
        let end = extent.start.checked_add(extent.len).filter(|&end| end <= size);
        if end.is_none() {
            return Err(Fault::Wrong(format!(
                "partition {} ends beyond the disk's {size} bytes: the image is truncated or its table corrupt",
                extent.partition
            )));
        }
        found.extend(ext(read, extent)?);
    }
    Ok(found)
}

fn ext(read: Read<'_>, extent: Extent) -> Result<Option<FileSystem>, Fault> {
    if extent.len < 4096 {
        return Ok(None);
    }
    let mut block = [0; 1024];
    read(extent.start + 1024, &mut block)?;
    if block[56..58] != [0x53, 0xef] {
        return Ok(None);
    }
    let wide = u32_at(&block, 96) & 0x80 != 0;
    let blocks = u64::from(u32_at(&block, 4)) | if wide { u64::from(u32_at(&block, 336)) << 32 } else { 0 };
    let log = u32_at(&block, 24);
    let bytes = (log <= 6).then(|| blocks.checked_mul(1024 << log)).flatten();
    if bytes.is_none_or(|bytes| bytes > extent.len) {
        return Err(Fault::Wrong(format!(
            "the file system on {} says it is longer than the {} bytes there: the image is truncated or corrupt",
            extent.device(),
            extent.len
        )));
    }
    Ok(Some(FileSystem { extent }))
}

fn table(read: Read<'_>, size: u64) -> Result<Vec<Extent>, Fault> {
    let mut mbr = [0; 512];
    if size < 2 * SECTOR {
        return Ok(Vec::new());
    }
    read(0, &mut mbr)?;
    if mbr[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let entries: Vec<&[u8]> = mbr[446..510].chunks(16).collect();
    if entries.iter().any(|entry| entry[4] == 0xee) {
        return gpt(read, size);
    }
    let used = entries.iter().enumerate().filter(|(_, entry)| !matches!(entry[4], 0x00 | 0x05 | 0x0f | 0x85));
    let extent = |(index, entry): (usize, &&[u8])| Extent {
        partition: index as u32 + 1,
        start: u64::from(u32_at(entry, 8)) * SECTOR,
        len: u64::from(u32_at(entry, 12)) * SECTOR,
    };
    Ok(used.map(extent).filter(|e| e.start > 0 && e.len > 0).collect())
}

fn gpt(read: Read<'_>, size: u64) -> Result<Vec<Extent>, Fault> {
    let wrong = |why: String| Err(Fault::Wrong(format!("its partition table (GPT) is corrupt: {why}")));
    let mut header = [0; 512];
    read(SECTOR, &mut header)?;
    if header[..8] != *b"EFI PART" {
        return wrong("the header is missing".to_owned());
    }
    let (at, count, len) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    if count > GPT_ENTRIES_MAX || !(128..=4096).contains(&len) || !len.is_power_of_two() {
        return wrong(format!("{count} entries of {len} bytes"));
    }
    let bytes = u64::from(count) * u64::from(len);
    let Some(start) = at.checked_mul(SECTOR).filter(|start| start.checked_add(bytes).is_some_and(|end| end <= size))
    else {
        return wrong("its entries lie beyond the disk".to_owned());
    };
    let mut entries = vec![0; bytes as usize];
    read(start, &mut entries)?;
    let mut out = Vec::new();
    for (index, entry) in entries.chunks_exact(len as usize).enumerate() {
        if entry[..16] == [0; 16] {
            continue;
        }
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let blocks = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let extent = blocks.and_then(|n| Some((first.checked_mul(SECTOR)?, n.checked_mul(SECTOR)?)));
        let Some((start, len)) = extent else { return wrong(format!("entry {} ends before it starts", index + 1)) };
        out.push(Extent { partition: index as u32 + 1, start, len });
    }
    Ok(out)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
