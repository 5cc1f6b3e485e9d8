//! `make bench-store`: what the store costs, beside what one would use instead.
//!
//! - `blobs`: clones, commits and reads of blobs, in this process, on the embedded engine and on S3.
//! - `disks`: a disk through the mirror's FUSE and NBD fronts, beside a plain file and `qemu-nbd`.
//! - `images`: bringing disks in, beside `qemu-img convert`.
//! - `sizes`: what sizes of blocks, frames and packs cost; only where it is named.
//! - `deploy`: one image to sixteen instances at once, beside copying it and beside `qemu-nbd`.
//! - `deployments`, `checkpoints`, `bonnie`: plots, drawn to `target/bench/plots`.

mod blobs;
mod bonnie;
pub(crate) mod deploy;
mod disks;
mod images;
pub(crate) mod origin;
mod plots;
mod sizes;

use crate::Outcome;
use crate::report::{Figure, Parts};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The command that measures all this again.
const COMMAND: &str = "make bench-store";

/// What a part of the benchmark needs.
struct Bench<'a> {
    /// The program measured.
    program: &'a Path,
    /// A directory for its files, on a file system that keeps blocks.
    dir: PathBuf,
    /// Small and few: to see that it works.
    quick: bool,
}

impl Bench<'_> {
    /// A fresh directory below the benchmark's.
    fn fresh(&self, name: &str) -> Outcome<PathBuf> {
        let dir = self.dir.join(name);
        // A run that was killed leaves mounts.
        unmount_below(&dir);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// One of two numbers: for a quick run, and for the real one.
    fn either<T>(&self, quick: T, whole: T) -> T {
        if self.quick { quick } else { whole }
    }
}

/// A part of the benchmark.
type Part = fn(&Bench<'_>) -> Outcome<Vec<Figure>>;

/// Measures everything, or the parts that `only` names, and writes `to`.
///
/// # Errors
/// What could not be measured, and why.
pub fn run(program: &Path, dir: &Path, to: &Path, only: &[String]) -> Outcome {
    let quick = std::env::var_os("BENCH_QUICK").is_some_and(|q| !q.is_empty() && q != "0");
    let bench = Bench { program, dir: dir.to_owned(), quick };
    let parts: [(&str, Part); 10] = [
        ("blobs", blobs::local),
        ("history", blobs::history),
        ("s3", blobs::s3),
        ("disks", disks::run),
        ("images", images::run),
        ("sizes", sizes::run),
        ("deploy", deploy::run),
        ("deployments", plots::deployments),
        ("checkpoints", plots::checkpoints),
        ("bonnie", plots::bonnie),
    ];
    let mut measured = Parts::new(to, &parts.map(|(part, _)| part), only)?;
    for (name, part) in parts {
        if only.is_empty() && name != "sizes" || only.iter().any(|wanted| wanted == name) {
            println!("-- {name}");
            measured.add(name, part(&bench))?;
        }
    }
    let _ = std::fs::remove_dir_all(dir);
    measured.end()
}

/// Unmounts what mirrors that are gone have mounted in a directory.
pub(crate) fn unmount_below(dir: &Path) {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for point in points.filter(|point| point.starts_with(&dir)) {
        let _ = Command::new("umount").arg("-l").arg(point).stderr(Stdio::null()).status();
    }
}

/// Bytes that a file, or everything in a directory, takes on the medium.
fn footprint(path: &Path) -> Outcome<u64> {
    let found = path.symlink_metadata()?;
    let mut bytes = found.blocks() * 512;
    if found.is_dir() {
        for entry in std::fs::read_dir(path)? {
            bytes += footprint(&entry?.path())?;
        }
    }
    Ok(bytes)
}

/// Empties the page cache, so that what is read next comes from the medium.
fn drop_caches() -> Outcome {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").map_err(|e| format!("emptying the page cache (as root): {e}"))?;
    Ok(())
}

/// Numbers that look random and are the same in each run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// One below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
