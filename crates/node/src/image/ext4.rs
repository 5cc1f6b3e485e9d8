//! Making an ext4 file system, the whole of a disk, out of a directory tree.

use super::Error;
use super::tool::Tool;
use std::path::Path;

/// What must not differ between two builds of the same tree.
pub(super) struct Identity {
    /// File system UUID and the seed of its directory hashes.
    pub(super) uuid: &'static str,
    /// Seconds since 1970 that the file system says it was made.
    pub(super) made: u64,
}

/// Writes `tree` into a new file system of `size` bytes in the new, sparse file `disk`.
pub(super) fn make(tree: &Path, disk: &Path, size: u64, identity: Option<&Identity>) -> Result<(), Error> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(disk);
    file.and_then(|f| f.set_len(size)).map_err(|e| Error::io("create", disk, e))?;
    // Inode tables initialised now, not by the guest in the background: an idle guest writes nothing.
    let mut extended = "lazy_itable_init=0,lazy_journal_init=0,nodiscard".to_owned();
    if let Some(identity) = identity {
        extended = format!("{extended},hash_seed={}", identity.uuid);
    }
    let mut tool = Tool::new("mke2fs", format!("making a file system of {}", tree.display()))?
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-J", "size=16", "-E", &extended]);
    if let Some(Identity { uuid, made }) = identity {
        // Both names: the first is e2fsprogs' own, the second what 1.47.1 and later follow.
        tool = tool.args(["-U", uuid]).env("E2FSPROGS_FAKE_TIME", made.to_string());
        tool = tool.env("SOURCE_DATE_EPOCH", made.to_string());
    }
    tool.arg("-d").arg(tree).arg(disk).run()?;
    punch_zeros(disk)
}

/// Gives back what mke2fs wrote as zeros, so that the file takes the room of its data only.
fn punch_zeros(disk: &Path) -> Result<(), Error> {
    Tool::new("fallocate", "digging holes into a new disk")?.args(["--dig-holes"]).arg(disk).run().map(drop)
}
