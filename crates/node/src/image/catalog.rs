//! Images in the store: one head `image/<name>` each, that names the disk, the kernel and the initial RAM disk.
//!
//! All three are versions, so that images made from one another share what is equal, and a kernel that many
//! images carry is kept once. The head appears in one step, when everything it names is durable; of two imports
//! that race for a name exactly one gets it, and the other's data is garbage that the store collects.

use super::{Parts, inspect as disks};
use crate::error::{Error, Result};
use crate::foresight::disk;
use crate::names;
use base::{ByteRange, PAGE};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use store::{BlockSource, Changes, Expect, Manifest, Store, Transaction, Version};

/// The name of an image's disk.
pub const DISK: &str = "disk0";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
/// Bytes copied out of the store at a time.
const COPY: usize = 1 << 20;

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Stored {
    name: String,
    disk: Version,
    kernel: Version,
    initrd: Option<Version>,
    meta: Meta,
}

/// What a head says of its image besides the versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Meta {
    created: String,
    cmdline: String,
    kernel_version: Option<String>,
    /// Bytes that the image added to the store when it was made.
    stored_bytes: u64,
}

impl Stored {
    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> Version {
        self.disk
    }

    /// The kernel's command line.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        &self.meta.cmdline
    }

    /// As lists show it.
    #[must_use]
    pub fn describe(&self) -> api::Image {
        api::Image {
            name: self.name.clone(),
            created: self.meta.created.clone(),
            disk_bytes: self.disk.size,
            stored_bytes: self.meta.stored_bytes,
            kernel: self.meta.kernel_version.clone(),
            cmdline: self.meta.cmdline.clone(),
        }
    }

    fn decode(name: &str, manifest: &Manifest) -> Result<Self> {
        let damaged = |reason: String| Error::Damaged { path: head(name).into(), reason };
        let version = |key: &str| manifest.versions.get(key).copied();
        let needed = |key: &str| version(key).ok_or_else(|| damaged(format!("it names no {key}")));
        let meta = serde_json::from_str(&manifest.meta).map_err(|e| damaged(e.to_string()))?;
        let (disk, kernel, initrd) = (needed(DISK)?, needed(KERNEL)?, version(INITRD));
        Ok(Self { name: name.to_owned(), disk, kernel, initrd, meta })
    }
}

/// The head of image `name`.
#[must_use]
pub fn head(name: &str) -> String {
    format!("image/{name}")
}

fn taken(name: &str) -> Error {
    Error::Conflict(format!(
        "image `{name}` exists; remove it first (`offshoot image rm {name}`) or choose another name"
    ))
}

/// Commits `parts` to the store as image `name`.
///
/// # Errors
/// The name is none or is taken, also by an import that was faster; a file cannot be read; the store is full.
pub fn add(store: &Store, name: &str, parts: &Parts, progress: &mut dyn FnMut(&str)) -> Result<Stored> {
    names::check("image", name)?;
    if store.head(&head(name))?.is_some() {
        return Err(taken(name));
    }
    let transaction = store.begin();
    let mut stored_bytes = 0;
    let mut put = |path: &Path, size: u64, what: &str| -> Result<Version> {
        let (version, bytes) = commit(store, &transaction, path, size, what, progress)?;
        stored_bytes += bytes;
        Ok(version)
    };
    let len = |path: &Path| path.metadata().map(|m| m.len()).map_err(Error::io("read", path));
    let disk = put(&parts.disk, parts.size, "disk")?;
    let kernel = put(&parts.kernel, len(&parts.kernel)?, KERNEL)?;
    let initrd = parts.initrd.as_deref().map(|path| put(path, len(path)?, INITRD)).transpose()?;
    let meta = Meta {
        created: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
        cmdline: parts.cmdline.clone(),
        kernel_version: disks::kernel_version(&parts.kernel),
        stored_bytes,
    };
    let versions = [(DISK, Some(disk)), (KERNEL, Some(kernel)), (INITRD, initrd)];
    let versions = versions.into_iter().filter_map(|(key, version)| Some((key.to_owned(), version?))).collect();
    let manifest = Manifest { versions, meta: serde_json::to_string(&meta).expect("plain fields serialize") };
    transaction.publish(&head(name), Expect::Absent, &manifest).map_err(|e| match e {
        store::Error::HeadChanged { .. } => taken(name),
        e => e.into(),
    })?;
    Ok(Stored { name: name.to_owned(), disk, kernel, initrd, meta })
}

/// The image `name`.
///
/// # Errors
/// There is none, or the store cannot read it.
pub fn load(store: &Store, name: &str) -> Result<Stored> {
    names::check("image", name)?;
    match store.head(&head(name))? {
        Some((manifest, _)) => Stored::decode(name, &manifest),
        None => Err(absent(name)),
    }
}

fn absent(name: &str) -> Error {
    Error::NotFound(format!("no image `{name}`; `offshoot image ls` lists those there are"))
}

/// All images, by name.
///
/// # Errors
/// The store cannot read one.
pub fn list(store: &Store) -> Result<Vec<api::Image>> {
    let mut out = Vec::new();
    for head in store.heads("image/")? {
        let name = head.strip_prefix("image/").unwrap_or(&head);
        // One removed since the listing is simply no longer there.
        if let Some((manifest, _)) = store.head(&head)? {
            out.push(Stored::decode(name, &manifest)?.describe());
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

/// What there is to say of image `name`.
///
/// # Errors
/// As [`load`].
pub fn inspect(store: &Store, name: &str) -> Result<api::Image> {
    Ok(load(store, name)?.describe())
}

/// Removes image `name`; VMs and snapshots made from it keep what they use. The space is back after the store's
/// next collection.
///
/// # Errors
/// There is none of that name, or the store cannot be written.
pub fn remove(store: &Store, name: &str) -> Result<()> {
    names::check("image", name)?;
    if !store.delete_head(&head(name))? {
        return Err(absent(name));
    }
    // As of a snapshot's: what was learnt of it is of no use to anybody else.
    store.delete_head(&disk::profile_head(&head(name)))?;
    Ok(())
}

/// The image's kernel and initial RAM disk as files in `dir`, for a hypervisor to read: named by their content,
/// complete whenever they are there.
///
/// # Errors
/// The store cannot read them, or `dir` cannot be written.
pub fn kernel_files(store: &Store, image: &Stored, dir: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    std::fs::create_dir_all(dir).map_err(Error::io("make", dir))?;
    let kernel = extract(store, &image.kernel, dir, KERNEL)?;
    let initrd = image.initrd.map(|version| extract(store, &version, dir, INITRD)).transpose()?;
    Ok((kernel, initrd))
}

/// Where the kernel and the initial RAM disk that a snapshot carries are to be, as [`kernel_files`]; none where it carries
/// none. They are brought by [`ensure_file`]: a machine that goes on where it was frozen does not need them, and they
/// are larger than most of what it touches at first.
#[must_use]
pub fn carried_files(manifest: &store::Manifest, dir: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let file = |what| manifest.versions.get(what).map(|version| file_of(version, dir, what));
    Some((file(KERNEL)?, file(INITRD)))
}

/// Brings a kernel or an initial RAM disk out of the store, by the name of its file, where it is not there.
///
/// # Errors
/// As [`kernel_files`].
pub fn ensure_file(store: &Store, path: &Path) -> Result<()> {
    let named = || -> Option<(&Path, &str, Version)> {
        let (what, rest) = path.file_name()?.to_str()?.split_once('-')?;
        Some((path.parent()?, what, format!("{rest}.{PAGE}").parse().ok()?))
    };
    match named() {
        Some((dir, what, version)) if !path.exists() => extract(store, &version, dir, what).map(drop),
        // Files of another name were never brought from the store.
        _ => Ok(()),
    }
}

fn file_of(version: &Version, dir: &Path, what: &str) -> PathBuf {
    dir.join(format!("{what}-{}.{}", version.root, version.size))
}

fn extract(store: &Store, version: &Version, dir: &Path, what: &str) -> Result<PathBuf> {
    let path = file_of(version, dir, what);
    if path.metadata().is_ok_and(|meta| meta.len() == version.size) {
        return Ok(path);
    }
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io("create a file in", dir))?;
    let mut buf = vec![0; COPY];
    for at in (0..version.size).step_by(COPY) {
        let len = (version.size - at).min(COPY as u64) as usize;
        store.read_at(version, at, &mut buf[..len])?;
        file.write_all(&buf[..len]).map_err(Error::io("write", &path))?;
    }
    file.as_file().sync_data().map_err(Error::io("write", &path))?;
    file.persist(&path).map_err(|e| Error::io("write", &path)(e.error))?;
    Ok(path)
}

/// Commits a file as a blob of `size` bytes, zeros from the file's end; also returns the bytes this took.
fn commit(
    store: &Store,
    transaction: &Transaction<'_>,
    path: &Path,
    size: u64,
    what: &str,
    progress: &mut dyn FnMut(&str),
) -> Result<(Version, u64)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let written = data_ranges(&file, size).map_err(Error::io("read", path))?;
    let base = store.empty(size, PAGE as u32);
    if written.is_empty() {
        return Ok((base, 0));
    }
    let (tell, told) = mpsc::channel();
    let notify = move |done: u64, all: u64| {
        // A reader that stopped listening does not stop the commit.
        let _ = tell.send((done, all));
    };
    let source = Padded(file);
    let committed = std::thread::scope(|scope| {
        let commit = scope.spawn(|| {
            let notify = notify;
            let changes = Changes {
                written: &written,
                zeroed: &[],
                source: &source,
                threads: std::thread::available_parallelism().map_or(1, usize::from),
                progress: Some(&notify),
                cancel: None,
            };
            transaction.commit(&base, &changes)
        });
        for (done, all) in told {
            progress(&format!("storing the {what}: {} of {}", base::units::human(done), base::units::human(all)));
        }
        commit.join().expect("a commit does not panic")
    });
    let (version, stat) = committed?;
    Ok((version, stat.stored_bytes))
}

/// Where a file holds data, in whole blocks, up to `size`.
fn data_ranges(file: &File, size: u64) -> std::io::Result<Vec<ByteRange>> {
    let end = file.metadata()?.len().min(size);
    let mut out: Vec<ByteRange> = Vec::new();
    let mut at = 0;
    while at < end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(end);
        let (start, stop) = (start / PAGE * PAGE, at.next_multiple_of(PAGE).min(size));
        match out.last_mut() {
            Some(last) if last.end >= start => last.end = stop,
            _ => out.push(ByteRange::new(start, stop)),
        }
    }
    Ok(out)
}

/// A file with zeros behind its end.
struct Padded(File);

impl BlockSource for Padded {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            match self.0.read_at(&mut buf[at..], offset + at as u64) {
                Ok(0) => break,
                Ok(len) => at += len,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buf[at..].fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
