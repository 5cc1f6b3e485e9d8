//! Directories of work under way, which end with the work, however it ends.
//!
//! Each is locked by the process that works in it; a lock ends with its process, so a directory nobody holds is
//! what a killed process left, and the next one to begin removes it. Both are done under a lock on the parent.

use super::Error;
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::path::Path;

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    dir: tempfile::TempDir,
    /// Holds the lock on the directory.
    _alive: File,
}

impl Scratch {
    /// A new directory in `parent`, its name beginning with `prefix`; removes those of that prefix that dead
    /// processes left.
    pub(super) fn new(parent: &Path, prefix: &str) -> Result<Self, Error> {
        let turn = File::open(parent).map_err(|e| Error::io("open", parent, e))?;
        rustix::fs::flock(&turn, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", parent, e))?;
        remove_where(parent, |name, path| name.starts_with(prefix) && is_dead(path))?;
        let dir = tempfile::Builder::new().prefix(prefix).tempdir_in(parent);
        let dir = dir.map_err(|e| Error::io("create a directory in", parent, e))?;
        let alive = File::open(dir.path()).map_err(|e| Error::io("open", dir.path(), e))?;
        rustix::fs::flock(&alive, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", dir.path(), e))?;
        Ok(Self { dir, _alive: alive })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Moves the directory to `place`, to stay.
    pub(super) fn settle(self, place: &Path) -> Result<(), Error> {
        fs::rename(self.path(), place).map_err(|e| Error::io("move into place", place, e))?;
        let _ = self.dir.keep();
        Ok(())
    }
}

fn is_dead(dir: &Path) -> bool {
    File::open(dir).is_ok_and(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
}

/// Removes the entries of `parent` that are chosen by name and path. Refuses to where something is mounted inside.
pub(super) fn remove_where(parent: &Path, chosen: impl Fn(&str, &Path) -> bool) -> Result<(), Error> {
    let fault = |e| Error::io("read", parent, e);
    let table = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(table).map_err(|e| Error::io("read", table, e))?;
    for entry in fs::read_dir(parent).map_err(fault)? {
        let path = entry.map_err(fault)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !chosen(&name, &path) {
            continue;
        }
        if mounts.contains(&format!(" {}/", path.display())) {
            return Err(Error::refused(&path, "left by earlier work, and something is mounted in it; unmount it"));
        }
        fs::remove_dir_all(&path).map_err(|e| Error::io("remove", &path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_the_dead_left_goes_and_what_the_living_use_stays() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir_all(parent.path().join("import-dead/deep/er")).unwrap();
        fs::create_dir_all(parent.path().join("other")).unwrap();
        let first = Scratch::new(parent.path(), "import-").unwrap();
        let second = Scratch::new(parent.path(), "import-").unwrap();
        assert!(first.path().is_dir() && second.path().is_dir());
        assert_eq!(names(parent.path()).len(), 3, "{:?}", names(parent.path()));
        drop(first);
        second.settle(&parent.path().join("kept")).unwrap();
        assert_eq!(names(parent.path()), ["kept", "other"]);
    }
}
