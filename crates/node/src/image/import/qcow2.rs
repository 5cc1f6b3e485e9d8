//! qcow2 disks: the header is read here, the rest is `qemu-img`'s.
//!
//! Header (big-endian): magic at 0, version 4, offset and length of the backing file's name 8 and 16, size 24,
//! encryption 32, entries and place of the first-level table 36 and 40; in version 3 incompatible features at 72 (bit 2: external data file) and header length 100,
//! behind which extensions {type, length, data padded to 8} follow; 0x44415441 is the data file's name.

use super::super::Error;
use super::super::tool::Tool;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

pub(super) const MAGIC: &[u8] = b"QFI\xfb";
const EXTERNAL_DATA: u64 = 1 << 2;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// Checks that the image stands alone and is whole; returns the bytes of its disk.
pub(super) fn check(path: &Path) -> Result<u64, Error> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    let mut head = vec![0; 64 << 10];
    let got = read_up_to(&file, &mut head).map_err(|e| Error::io("read", path, e))?;
    head.truncate(got);
    let size = header(&head).map_err(|why| Error::refused(path, why))?;
    let found = consistent(path)?;
    let end = found.image_end_offset;
    if len < end && !(found.compressed_clusters > 0 || short_tail(&head, len, end)) {
        let why = format!("truncated: its tables reach to byte {end}, the file ends at {len}");
        return Err(Error::refused(path, why));
    }
    Ok(size)
}

/// Writes the disk in `path` to the new raw file `disk`.
pub(super) fn convert(path: &Path, disk: &Path) -> Result<(), Error> {
    Tool::new("qemu-img", format!("converting {}", path.display()))?
        .args(["convert", "-S", "4k"])
        .args(["-O", "raw", "--image-opts", &image_options(path)?])
        .arg(disk)
        .run()
        .map(drop)
}

/// The image as qemu-img is told to open it: this driver over this file, nothing to guess.
fn image_options(path: &Path) -> Result<String, Error> {
    let path = path.canonicalize().map_err(|e| Error::io("find", path, e))?;
    let text = path.to_str().ok_or_else(|| Error::refused(&path, "its path is not UTF-8, which qemu-img needs"))?;
    Ok(format!("driver=qcow2,file.driver=file,file.filename={}", text.replace(',', ",,")))
}

/// Whether the file, which ends at `len` within its last cluster, may do so: the cluster holds the first-level
/// table, written to its own length only, or the image has internal snapshots, whose list is as well. (Compressed
/// clusters end anywhere too; they cannot be cut unnoticed. More than a cluster missing is for `qemu-img check`.)
fn short_tail(head: &[u8], len: u64, end: u64) -> bool {
    let cluster = 1u64.checked_shl(be32(head, 20)).unwrap_or(0);
    let table = be64(head, 40);
    let table_end = table.saturating_add(8 * u64::from(be32(head, 36)));
    let last = end.saturating_sub(cluster);
    be32(head, 60) > 0 || (table_end > last && table_end <= len)
}

/// What `qemu-img check` found.
#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Check {
    check_errors: u64,
    corruptions: u64,
    compressed_clusters: u64,
    /// End of the last cluster that the tables name.
    image_end_offset: u64,
}

/// Lets `qemu-img check` walk the tables.
fn consistent(path: &Path) -> Result<Check, Error> {
    let out = Tool::new("qemu-img", format!("checking {}", path.display()))?
        .args(["check", "--output=json", "--image-opts", &image_options(path)?])
        .run_accepting(&[0, 2, 3])?;
    let check: Check = serde_json::from_slice(&out)
        .map_err(|e| Error::refused(path, format!("qemu-img check did not understand it: {e}")))?;
    if check.corruptions + check.check_errors > 0 {
        let why =
            format!("truncated or corrupt: qemu-img finds {} faults in it", check.corruptions + check.check_errors);
        return Err(Error::refused(path, why));
    }
    Ok(check)
}

/// The size of the disk, where the header names no other file.
fn header(head: &[u8]) -> Result<u64, String> {
    if head.len() < 72 || !head.starts_with(MAGIC) {
        return Err("not a qcow2 disk, or one cut off within its header".to_owned());
    }
    let version = be32(head, 4);
    if version != 2 && version != 3 {
        return Err(format!("qcow2 of version {version}, which is unknown"));
    }
    if be64(head, 8) != 0 {
        let (at, len) = (be64(head, 8) as usize, be32(head, 16) as usize);
        let name = at.checked_add(len).and_then(|end| head.get(at..end)).map(String::from_utf8_lossy);
        let name = name.as_deref().unwrap_or("(a name outside the header)");
        return Err(format!(
            "it has the backing file `{name}`; an image must stand alone: qemu-img convert makes it so"
        ));
    }
    if be32(head, 32) != 0 {
        return Err("an encrypted qcow2 disk".to_owned());
    }
    if version == 3 && head.len() < 104 {
        return Err("a qcow2 disk cut off within its header".to_owned());
    }
    let data_file = if version == 3 { data_file(head)? } else { None };
    if let Some(name) = data_file {
        return Err(format!("it keeps its data in the external file `{name}`; an image must stand alone"));
    }
    Ok(be64(head, 24))
}

/// The name of the external data file, where one is used or only named.
fn data_file(head: &[u8]) -> Result<Option<String>, String> {
    let mut at = be32(head, 100) as usize;
    while let Some(prefix) = head.get(at..at.saturating_add(8)) {
        let (kind, len) = (be32(prefix, 0), be32(prefix, 4) as usize);
        if kind == 0 {
            break;
        }
        let Some(data) = head.get(at + 8..(at + 8).saturating_add(len)) else {
            return Err("a header extension that ends outside the header".to_owned());
        };
        if kind == DATA_FILE_NAME {
            return Ok(Some(String::from_utf8_lossy(data).into_owned()));
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok((be64(head, 72) & EXTERNAL_DATA != 0).then(|| "(unnamed)".to_owned()))
}

fn read_up_to(file: &File, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut at = 0;
    while at < buf.len() {
        match file.read_at(&mut buf[at..], at as u64)? {
            0 => break,
            len => at += len,
        }
    }
    Ok(at)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests;
