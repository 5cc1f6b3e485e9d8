//! Looking into a disk for the kernel it would boot, without mounting it.
//!
//! A foreign file system is never given to the host's kernel: partitions are read here, and files are listed and
//! copied out by `debugfs`, a user-space program. Everything a disk says about itself is checked against its
//! length first; only regular files of plain names and bounded size are taken.

mod partitions;

use super::Error;
use super::tool::Tool;
use partitions::FileSystem;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The largest kernel or initial RAM disk taken out of an image.
const FILE_MAX: u64 = 1 << 30;

/// What a disk boots from, copied out of it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    /// The guest's name of the file system that holds `/etc`.
    pub(super) root: String,
}

/// Which of the two files are wanted; the root file system is looked for in any case.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) kernel: bool,
    pub(super) initrd: bool,
}

/// A regular file in a directory of a file system.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    inode: u64,
    name: String,
    size: u64,
}

/// Checks what `disk` says of its own extent: partitions and ext4 file systems that end beyond it mean that the
/// file was truncated.
pub(super) fn check(disk: &Path, size: u64) -> Result<(), Error> {
    file_systems(disk, size).map(drop)
}

/// The guest's name of the root file system on `disk`.
pub(super) fn root_device(disk: &Path, size: u64, scratch: &Path) -> Result<String, Error> {
    let view = View::new(disk, size, scratch)?;
    view.root().ok_or_else(|| {
        Error::refused(disk, "no ext4 file system with an /etc was found on it; give the command line with --cmdline")
    })
}

/// Finds the newest kernel in `/boot` or `/` of any ext4 file system of `disk`, with its initial RAM disk, and
/// copies both into `scratch`.
pub(super) fn find(disk: &Path, size: u64, scratch: &Path, wanted: Wanted) -> Result<Found, Error> {
    let view = View::new(disk, size, scratch)?;
    let root = view.root();
    for fs in &view.systems {
        for directory in ["/boot", "/"] {
            let files = view.list(fs, directory)?;
            let Some(kernel) = newest_kernel(&files) else { continue };
            let version = kernel.name.split_once('-').map_or("", |(_, version)| version);
            let initrd = initrd_of(&files, version);
            let out = Found {
                kernel: scratch.join("kernel"),
                initrd: initrd.map(|_| scratch.join("initrd")),
                root: root.unwrap_or_else(|| fs.extent.device()),
            };
            if wanted.kernel {
                view.dump(fs, kernel, &out.kernel)?;
            }
            if let (true, Some(from), Some(to)) = (wanted.initrd, initrd, &out.initrd) {
                view.dump(fs, from, to)?;
            }
            return Ok(out);
        }
    }
    Err(Error::refused(
        disk,
        "no kernel (/boot/vmlinuz*) was found in an ext4 file system on it; give --kernel and --initrd",
    ))
}

/// A disk and the ext4 file systems on it.
struct View<'a> {
    disk: &'a Path,
    /// A link to the disk with a name that debugfs cannot misread.
    link: PathBuf,
    systems: Vec<FileSystem>,
}

impl<'a> View<'a> {
    fn new(disk: &'a Path, size: u64, scratch: &Path) -> Result<Self, Error> {
        let systems = file_systems(disk, size)?;
        let link = scratch.join("disk.link");
        let target = disk.canonicalize().map_err(|e| Error::io("find", disk, e))?;
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(target, &link).map_err(|e| Error::io("create", &link, e))?;
        Ok(Self { disk, link, systems })
    }

    /// The device of the file system that looks like a root: it has `/etc` and a place for init.
    fn root(&self) -> Option<String> {
        let is_root = |fs: &&FileSystem| {
            ["/etc/fstab", "/etc/os-release", "/etc/passwd", "/sbin/init", "/etc/inittab"]
                .iter()
                .any(|path| self.ask(fs, &format!("stat {path}")).is_ok_and(|out| out.starts_with("Inode:")))
        };
        self.systems.iter().find(is_root).map(|fs| fs.extent.device())
    }

    fn ask(&self, fs: &FileSystem, request: &str) -> Result<String, Error> {
        let mut device = self.link.clone().into_os_string();
        if fs.extent.start > 0 {
            device.push(format!("?offset={}", fs.extent.start));
        }
        let out = Tool::new("debugfs", format!("reading {}", self.disk.display()))?
            .args(["-R", request])
            .arg(device)
            .env("DEBUGFS_PAGER", "cat")
            .run()?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    fn list(&self, fs: &FileSystem, directory: &str) -> Result<Vec<Listed>, Error> {
        Ok(self.ask(fs, &format!("ls -p {directory}"))?.lines().filter_map(parse_listed).collect())
    }

    fn dump(&self, fs: &FileSystem, file: &Listed, to: &Path) -> Result<(), Error> {
        if file.size > FILE_MAX {
            let size = base::units::human(file.size);
            return Err(Error::refused(self.disk, format!("its {} claims {size}: too large to boot", file.name)));
        }
        let cannot = |e| Error::io("create", to, e);
        // debugfs writes to a name in the scratch directory, which holds no blanks or quotes of its own making.
        let plain = to.to_str().filter(|t| !t.contains(['"', ' ', '\n']));
        let plain =
            plain.ok_or_else(|| cannot(std::io::Error::other("the directory's path holds a blank or a quote")))?;
        self.ask(fs, &format!("dump <{}> {plain}", file.inode))?;
        let got = std::fs::metadata(to).map_err(cannot)?.len();
        if got == file.size {
            return Ok(());
        }
        Err(Error::refused(
            self.disk,
            format!("its {} is damaged: {got} of {} bytes can be read", file.name, file.size),
        ))
    }
}

fn file_systems(disk: &Path, size: u64) -> Result<Vec<FileSystem>, Error> {
    let file = File::open(disk).map_err(|e| Error::io("open", disk, e))?;
    let read = |offset: u64, buf: &mut [u8]| file.read_exact_at(buf, offset);
    let found = partitions::scan(&read, size).map_err(|e| match e {
        partitions::Fault::Io(e) => Error::io("read", disk, e),
        partitions::Fault::Wrong(why) => Error::refused(disk, why),
    })?;
    Ok(found)
}

/// A line of `ls -p`: `/inode/mode/uid/gid/name/size/`. Regular files of plain names only.
fn parse_listed(line: &str) -> Option<Listed> {
    let fields: Vec<&str> = line.split('/').collect();
    let &["", inode, mode, _, _, name, size, ""] = &fields[..] else { return None };
    let regular = mode.len() == 6 && mode.starts_with("100");
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+~-".contains(&b));
    (regular && plain).then_some(())?;
    Some(Listed { inode: inode.parse().ok()?, name: name.to_owned(), size: size.parse().ok()? })
}

fn newest_kernel(files: &[Listed]) -> Option<&Listed> {
    let kernel = |f: &&Listed| {
        let name = f.name.strip_prefix("vmlinuz").or(f.name.strip_prefix("bzImage"));
        f.size > 0 && name.is_some_and(|rest| rest.is_empty() || rest.starts_with('-')) && !f.name.contains("rescue")
    };
    files.iter().filter(kernel).max_by_key(|f| version_key(&f.name))
}

/// The initial RAM disk of kernel `version`, as Debian, Red Hat, Arch and Alpine name it.
fn initrd_of<'a>(files: &'a [Listed], version: &str) -> Option<&'a Listed> {
    let names = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
        "initrd.img".to_owned(),
        "initrd".to_owned(),
    ];
    names.iter().find_map(|name| files.iter().find(|f| f.name == *name))
}

/// Orders versions as people do: runs of digits by value, `6.1.0-10` after `6.1.0-9`.
fn version_key(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let word = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(word);
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (number, tail) = tail.split_at(digits);
        key.push((u64::MAX, text.to_owned()));
        key.push((number.parse().unwrap_or(0), String::new()));
        rest = tail;
    }
    key
}

/// The version a kernel image says it has, where it does: a bzImage's header points at it.
pub(super) fn kernel_version(kernel: &Path) -> Option<String> {
    let file = File::open(kernel).ok()?;
    let mut header = [0; 0x210];
    file.read_exact_at(&mut header, 0).ok()?;
    (header[0x202..0x206] == *b"HdrS").then_some(())?;
    let at = u64::from(u16::from_le_bytes([header[0x20e], header[0x20f]])) + 0x200;
    let mut text = [0; 128];
    let len = file.read_at(&mut text, at).ok()?;
    let end = text[..len].iter().position(|&b| b == 0 || b == b' ')?;
    let version = std::str::from_utf8(&text[..end]).ok()?;
    (!version.is_empty() && version.bytes().all(|b| b.is_ascii_graphic())).then(|| version.to_owned())
}

/// Whether `path` is something QEMU can start: a bzImage, or an ELF file with an entry for hypervisors.
pub(super) fn check_kernel(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut header = [0; 0x210];
    let got = file.read_at(&mut header, 0).map_err(|e| Error::io("read", path, e))?;
    if header.starts_with(b"\x7fELF") || (got == header.len() && header[0x202..0x206] == *b"HdrS") {
        return Ok(());
    }
    Err(Error::refused(path, "not a Linux kernel (neither a bzImage nor an ELF file)"))
}

#[cfg(test)]
mod tests;
