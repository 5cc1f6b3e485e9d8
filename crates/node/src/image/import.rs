//! Bringing in a disk or a root file system from outside.
//!
//! What a file is gets decided here, from its first bytes, once: no tool is ever left to guess. A disk image that
//! names another file (a backing file, an external data file) is refused by that name before `qemu-img`, which
//! would open it, sees the image. A raw disk is whatever its bytes are, and never probed again.

mod qcow2;

use super::archive::{self, Limits};
use super::inspect::{self, Wanted};
use super::scratch::Scratch;
use super::{Error, Notes, Parts, ext4};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// What is being imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// Decide by what it is.
    #[default]
    Auto,
    /// A raw disk.
    Raw,
    /// A qcow2 disk.
    Qcow2,
    /// A directory that holds a root file system.
    Directory,
    /// A tar archive of a root file system, possibly compressed (gzip, xz, zstd).
    Archive,
}

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// What the path is.
    pub kind: Kind,
    /// The kernel; else it is looked for inside.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk; else it is looked for inside, next to the kernel.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; else a serial console and the root file system that was found.
    pub cmdline: Option<String>,
    /// Bytes of the disk: the file system made for a tree, or a disk made longer. By default as it is, or
    /// twice what a tree holds and 2 GiB at least.
    pub size: Option<u64>,
    /// The most bytes a disk or a tree may claim.
    pub limit: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self { kind: Kind::Auto, kernel: None, initrd: None, cmdline: None, size: None, limit: 1 << 40 }
    }
}

/// The smallest file system made for a tree, unless a size is given.
const TREE_DISK_MIN: u64 = 2 << 30;
/// More files than a root file system has.
const ENTRIES_MAX: u64 = 20_000_000;

/// Turns what lies at `path` into the parts of an image. Temporary files go to a directory of their own in
/// `work_dir`, which goes with the returned parts.
///
/// # Errors
/// Refuses, by name, what is malformed, truncated, too large or names files elsewhere; nothing is left behind.
pub fn import(
    path: &Path,
    options: &ImportOptions,
    work_dir: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Parts, Error> {
    std::fs::create_dir_all(work_dir).map_err(|e| Error::io("create", work_dir, e))?;
    let scratch = Scratch::new(work_dir, "import-")?;
    let work = scratch.path().canonicalize().map_err(|e| Error::io("find", scratch.path(), e))?;
    let kind = if options.kind == Kind::Auto { probe(path)? } else { options.kind };
    let (disk, size) = match kind {
        Kind::Raw => raw(path, options)?,
        Kind::Qcow2 => converted(path, options, &work, progress)?,
        Kind::Directory => tree(path, path, options, &work, progress)?,
        Kind::Archive => unpacked(path, options, &work, progress)?,
        Kind::Auto => unreachable!("decided above"),
    };
    let mut parts = bootable(&disk, size, options, &work, progress)?;
    parts.scratch = Some(scratch);
    Ok(parts)
}

/// What lies at `path`, by its first bytes.
fn probe(path: &Path) -> Result<Kind, Error> {
    let meta = path.metadata().map_err(|e| Error::io("read", path, e))?;
    if meta.is_dir() {
        return Ok(Kind::Directory);
    }
    if !meta.is_file() {
        return Err(Error::refused(path, "neither a file nor a directory"));
    }
    let mut head = Vec::new();
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    file.take(512).read_to_end(&mut head).map_err(|e| Error::io("read", path, e))?;
    const FOREIGN: [(&[u8], &str); 8] = [
        (b"KDMV", "VMDK"),
        (b"COWD", "VMDK"),
        (b"# Disk DescriptorFile", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"QED\0", "QED"),
        (b"LUKS\xba\xbe", "LUKS"),
        (b"<<< ", "VDI"),
    ];
    if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        let why = format!("a {name} disk; convert it first: qemu-img convert -O qcow2 {} disk.qcow2", path.display());
        return Err(Error::refused(path, why));
    }
    Ok(match &head {
        h if h.starts_with(qcow2::MAGIC) => Kind::Qcow2,
        h if archive::is_archive(h) => Kind::Archive,
        _ => Kind::Raw,
    })
}

fn within_limit(path: &Path, size: u64, options: &ImportOptions) -> Result<u64, Error> {
    let human = base::units::human;
    if size > options.limit {
        let why = format!("it claims {}, over the limit of {}", human(size), human(options.limit));
        return Err(Error::refused(path, why));
    }
    match options.size {
        Some(asked) if asked > options.limit => Err(Error::refused(
            path,
            format!("the size asked, {}, is over the limit of {}", human(asked), human(options.limit)),
        )),
        Some(asked) if asked < size => {
            Err(Error::refused(path, format!("the disk holds {} and cannot shrink to {}", human(size), human(asked))))
        }
        Some(asked) => Ok(asked.next_multiple_of(base::PAGE)),
        None => Ok(size.next_multiple_of(base::PAGE)),
    }
}

fn raw(path: &Path, options: &ImportOptions) -> Result<(PathBuf, u64), Error> {
    let meta = path.metadata().map_err(|e| Error::io("read", path, e))?;
    if !meta.is_file() {
        return Err(Error::refused(path, "not a file"));
    }
    if meta.len() == 0 || !meta.len().is_multiple_of(512) {
        let why = format!("{} bytes are not whole sectors of 512: no raw disk, or a truncated one", meta.len());
        return Err(Error::refused(path, why));
    }
    let size = within_limit(path, meta.len(), options)?;
    inspect::check(path, meta.len())?;
    Ok((path.to_owned(), size))
}

fn converted(path: &Path, options: &ImportOptions, work: &Path, progress: Notes<'_>) -> Result<(PathBuf, u64), Error> {
    let size = qcow2::check(path)?;
    let size = within_limit(path, size, options)?;
    progress("converting the qcow2 disk");
    let disk = work.join("disk.raw");
    qcow2::convert(path, &disk)?;
    let len = disk.metadata().map_err(|e| Error::io("read", &disk, e))?.len();
    inspect::check(&disk, len)?;
    Ok((disk, size))
}

fn unpacked(path: &Path, options: &ImportOptions, work: &Path, progress: Notes<'_>) -> Result<(PathBuf, u64), Error> {
    let root = work.join("root");
    std::fs::create_dir(&root).map_err(|e| Error::io("create", &root, e))?;
    progress("unpacking the archive");
    let limits = Limits { bytes: options.size.unwrap_or(options.limit).min(options.limit), entries: ENTRIES_MAX };
    archive::unpack(path, &root, limits, progress)?;
    let disk = tree(path, &root, options, work, progress)?;
    std::fs::remove_dir_all(&root).map_err(|e| Error::io("remove", &root, e))?;
    Ok(disk)
}

/// Makes the file system of the tree at `root`, for the user's `path`.
fn tree(
    path: &Path,
    root: &Path,
    options: &ImportOptions,
    work: &Path,
    progress: Notes<'_>,
) -> Result<(PathBuf, u64), Error> {
    if !root.is_dir() {
        return Err(Error::refused(path, "not a directory"));
    }
    let used = used(root)?;
    let default = || used.saturating_mul(2).max(TREE_DISK_MIN);
    let size = options.size.unwrap_or_else(default).min(options.limit).next_multiple_of(base::PAGE);
    if used > size {
        let human = base::units::human;
        let why = format!("its files take {}, more than the {} the disk may have", human(used), human(size));
        return Err(Error::refused(path, why));
    }
    progress(&format!("making an ext4 disk of {}", base::units::human(size)));
    let disk = work.join("disk.raw");
    ext4::make(root, &disk, size, None)?;
    Ok((disk, size))
}

/// Bytes that the regular files beneath `dir` take, links not followed.
fn used(dir: &Path) -> Result<u64, Error> {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0u64;
    let mut rest = vec![dir.to_owned()];
    while let Some(dir) = rest.pop() {
        let fault = |e| Error::io("read", &dir, e);
        for entry in std::fs::read_dir(&dir).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            let meta = entry.metadata().map_err(|e| Error::io("read", &entry.path(), e))?;
            sum = sum.saturating_add(meta.blocks() * 512);
            if meta.is_dir() {
                rest.push(entry.path());
            }
        }
    }
    Ok(sum)
}

/// Finds what the options do not give.
fn bootable(disk: &Path, size: u64, options: &ImportOptions, work: &Path, progress: Notes<'_>) -> Result<Parts, Error> {
    let len = disk.metadata().map_err(|e| Error::io("read", disk, e))?.len();
    let given = |path: &Option<PathBuf>| match path {
        Some(path) if !path.is_file() => Err(Error::refused(path, "not a file")),
        path => Ok(path.clone()),
    };
    let (mut kernel, mut initrd) = (given(&options.kernel)?, given(&options.initrd)?);
    let mut root = None;
    if kernel.is_none() {
        progress("looking for the kernel inside");
        let found = inspect::find(disk, len, work, Wanted { kernel: true, initrd: initrd.is_none() })?;
        kernel = Some(found.kernel);
        initrd = initrd.or(found.initrd);
        root = Some(found.root);
    }
    let kernel = kernel.expect("given or found");
    inspect::check_kernel(&kernel)?;
    let cmdline = match (&options.cmdline, root) {
        (Some(given), _) => given.clone(),
        (None, Some(root)) => default_cmdline(&root),
        (None, None) => default_cmdline(&inspect::root_device(disk, len, work)?),
    };
    Ok(Parts { disk: disk.to_owned(), size, kernel, initrd, cmdline, scratch: None })
}

fn default_cmdline(root: &str) -> String {
    format!("console=ttyS0 root={root} rw quiet")
}

#[cfg(test)]
mod tests;
