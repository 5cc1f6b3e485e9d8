//! The default guest: Debian 12 from packages, made by `mmdebstrap` as the host's apt is set up.
//!
//! A build is cached under the hash of all that goes into it (`recipe/`, packages, sources, size). It happens in
//! `building.*` beside its place and is renamed there when complete; a lock on the work directory keeps builds
//! apart. `mmdebstrap` runs in namespaces of its own that die with this process, so that what a killed build
//! leaves is a directory without mounts or processes, which the next build removes.

use super::ext4::{self, Identity};
use super::scratch::{Scratch, remove_where};
use super::tool::Tool;
use super::{Error, Parts};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const SUITE: &str = "bookworm";
const PACKAGES: &[&str] = &[
    "dbus",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "linux-image-cloud-amd64",
    "netbase",
    "nginx-light",
    "procps",
    "redis-server",
    "systemd-sysv",
    "udev",
    "zstd",
];
/// Runs on the bare tree, before the kernel's package makes its initial RAM disk.
const PREPARE: &str = include_str!("recipe/prepare.sh");
/// Runs on the finished tree.
const CUSTOMIZE: &str = include_str!("recipe/customize.sh");
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 rootflags=noatime";
/// Fixed, so that two builds of the same packages differ as little as can be.
const IDENTITY: Identity = Identity { uuid: "0ff50007-0000-4000-8000-000000000012", made: 1_700_000_000 };

/// How to build the default guest.
#[derive(Clone, Copy, Debug)]
pub struct BuildOptions {
    /// Bytes of the disk.
    pub size: u64,
    /// Build even where a build is cached.
    pub force: bool,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { size: 2 << 30, force: false }
    }
}

/// Builds the default guest under `work_dir`, or finds it there. The parts stay in `work_dir`.
///
/// # Errors
/// A missing or failing tool with its last words (no network, no space), or a directory that cannot be written.
pub fn build_default(work_dir: &Path, options: &BuildOptions, progress: &mut dyn FnMut(&str)) -> Result<Parts, Error> {
    fs::create_dir_all(work_dir).map_err(|e| Error::io("create", work_dir, e))?;
    let work_dir = &work_dir.canonicalize().map_err(|e| Error::io("find", work_dir, e))?;
    let _lock = lock(work_dir, progress)?;
    let sources = host_sources();
    let name = format!("{BUILT}{}", key(options, &sources));
    let place = work_dir.join(&name);
    // Made before the cache is looked at, so that even a build that finds it clears what a killed one left.
    let scratch = Scratch::new(work_dir, BUILDING)?;
    if place.is_dir() && !options.force {
        progress("the default guest is built already");
        return parts(&place);
    }
    build(scratch.path(), options.size, &sources, progress)?;
    // Whatever an older recipe made, or this one when forced, makes room.
    remove_where(work_dir, |name, _| name.starts_with(BUILT))?;
    scratch.settle(&place)?;
    parts(&place)
}

const BUILT: &str = "debian-12.";
const BUILDING: &str = "building.";

fn parts(place: &Path) -> Result<Parts, Error> {
    let disk = place.join("disk.raw");
    let size = disk.metadata().map_err(|e| Error::io("read", &disk, e))?.len();
    let (kernel, initrd) = (place.join("kernel"), Some(place.join("initrd")));
    Ok(Parts { disk, size, kernel, initrd, cmdline: CMDLINE.to_owned(), scratch: None })
}

/// Names a build by everything that goes into it.
fn key(options: &BuildOptions, sources: &[String]) -> String {
    let mut hash = blake3::Hasher::new();
    let texts = [SUITE, PREPARE, CUSTOMIZE, CMDLINE, IDENTITY.uuid].into_iter();
    let texts = texts.chain(PACKAGES.iter().copied()).chain(sources.iter().map(String::as_str));
    for text in texts {
        hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hash.update(&options.size.to_le_bytes());
    hash.finalize().to_hex()[..16].to_owned()
}

fn build(work: &Path, size: u64, sources: &[String], progress: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let root = work.join("root");
    let (prepare, customize) = (work.join("prepare.sh"), work.join("customize.sh"));
    script(&prepare, PREPARE)?;
    script(&customize, CUSTOMIZE)?;
    let apt = work.join("apt.conf");
    fs::write(&apt, host_apt_options()).map_err(|e| Error::io("write", &apt, e))?;
    bootstrap(&root, &prepare, &customize, &apt, sources, progress)?;
    progress("taking the kernel and its initial RAM disk");
    copy_newest(&root.join("boot"), "vmlinuz-", &work.join("kernel"))?;
    copy_newest(&root.join("boot"), "initrd.img-", &work.join("initrd"))?;
    let list = root.join("var/lib/dpkg/status");
    fs::copy(&list, work.join("packages")).map_err(|e| Error::io("copy", &list, e))?;
    progress(&format!("making an ext4 disk of {}", base::units::human(size)));
    ext4::make(&root, &work.join("disk.raw"), size, Some(&IDENTITY))?;
    for made in [prepare, customize, apt] {
        fs::remove_file(&made).map_err(|e| Error::io("remove", &made, e))?;
    }
    fs::remove_dir_all(&root).map_err(|e| Error::io("remove", &root, e))
}

fn bootstrap(
    root: &Path,
    prepare: &Path,
    customize: &Path,
    apt: &Path,
    sources: &[String],
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    const NAMESPACES: &[&str] = &["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
    let hook = |kind: &str, path: &Path| format!("--{kind}-hook={} \"$1\"", path.display());
    Tool::within(NAMESPACES, "mmdebstrap", "building the default guest from packages")?
        .args(["--mode=root", "--format=directory", "--variant=minbase", "--dpkgopt=force-unsafe-io"])
        .args(["doc", "locale", "man", "info"].map(|dir| format!("--dpkgopt=path-exclude=/usr/share/{dir}/*")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg(format!("--aptopt={}", apt.display()))
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args([hook("essential", prepare), hook("customize", customize)])
        .arg(SUITE)
        .arg(root)
        .args(sources)
        .env("SOURCE_DATE_EPOCH", IDENTITY.made.to_string())
        // What mmdebstrap keeps aside goes with the build's directory even when it is killed.
        .env("TMPDIR", root.parent().expect("the tree lies in the build's directory"))
        .run_watched(&mut |line| {
            if let Some(step) = line.strip_prefix("I: ") {
                progress(step);
            }
        })
        .map(drop)
}

/// The host's own entries for this suite, so that a build fetches from where the host does; none where the host
/// is another release, and `mmdebstrap` then chooses.
fn host_sources() -> Vec<String> {
    let fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let asked = Tool::new("apt-get", "asking for the host's package sources")
        .and_then(|tool| tool.args(["indextargets", "--format", fields, "Created-By: Packages"]).run());
    let Ok(out) = asked else { return Vec::new() };
    let mut sources: Vec<String> = String::from_utf8_lossy(&out).lines().filter_map(source_line).collect();
    sources.sort();
    sources.dedup();
    let whole = sources.iter().any(|line| line.ends_with(&format!(" {SUITE} main")));
    if whole { sources } else { Vec::new() }
}

/// `URI suite component`, of Debian's own archive, as an entry for the guest.
fn source_line(target: &str) -> Option<String> {
    let words: Vec<&str> = target.split_ascii_whitespace().collect();
    let &[uri, suite, component] = &words[..] else { return None };
    let ours = suite.strip_prefix(SUITE).is_some_and(|rest| ["", "-updates", "-security"].contains(&rest));
    let plain = uri.starts_with("http://") || uri.starts_with("https://");
    // Credentials of the host's have no place in a guest.
    (ours && plain && component == "main" && !uri.contains('@')).then(|| format!("deb {uri} {suite} {component}"))
}

/// How the host's apt reaches its sources: proxies, and what it is lenient about.
fn host_apt_options() -> String {
    let asked = Tool::new("apt-config", "asking for the host's apt options").and_then(|tool| tool.arg("dump").run());
    let dump = asked.unwrap_or_default();
    let wanted = |line: &&str| {
        ["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"].iter().any(|p| line.starts_with(p))
            && !line.ends_with(" \"\";")
    };
    let mut out: String =
        String::from_utf8_lossy(&dump).lines().filter(wanted).map(|line| format!("{line}\n")).collect();
    if !out.contains("Acquire::Retries") {
        out.push_str("Acquire::Retries \"3\";\n");
    }
    out
}

fn script(path: &Path, text: &str) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt as _;
    let made = fs::write(path, text).and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    made.map_err(|e| Error::io("write", path, e))
}

fn copy_newest(boot: &Path, prefix: &str, to: &Path) -> Result<(), Error> {
    let fault = |e| Error::io("read", boot, e);
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(boot).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    found.sort();
    let from = found.last().ok_or_else(|| Error::refused(boot, format!("the build made no {prefix}*")))?;
    fs::copy(from, to).map(drop).map_err(|e| Error::io("copy", from, e))
}

fn lock(work_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<File, Error> {
    use rustix::fs::FlockOperation;
    let path = work_dir.join("lock");
    let file = File::options().create(true).append(true).open(&path).map_err(|e| Error::io("open", &path, e))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress("waiting for another build of the default guest");
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", &path, e))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
