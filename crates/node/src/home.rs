//! The directory that holds everything a node knows, and ids that are never used twice.
//!
//! ```text
//! <home>/store/                  the embedded store, or
//! <home>/store.json              which shared store it runs from, and
//! <home>/cache/{mirror,daemon,near}   what is kept of that
//! <home>/run/                    sockets, locks and logs of our processes
//! <home>/mnt/{ram,disk}/<id>     the mirror's mount
//! <home>/mnt/blob/<name>/<n>     the versions of blobs in it
//! <home>/mirror/                 the mirror's records and layers
//! <home>/vms/<id>/               a VM: vm.json, ram.map, sockets, logs
//! <home>/pending/<id>.{json,device}   snapshots that are frozen and not yet in the store
//! <home>/exports/<name>.json    disks served over NBD, and scratch disks that are kept
//! <home>/files/<id>.json        versions of blobs with local changes in the mirror
//! <home>/kernels/                kernels and initial RAM disks of images, by content
//! <home>/work/                   image builds and imports under way
//! <home>/next-id                 ids up to this number may be in use
//! ```

use crate::error::{Error, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Longest path that fits a unix socket's address, its terminating zero included.
const SOCKET_PATH_MAX: usize = 108;
/// Ids are reserved on disk in runs of this many, so that most cost no write.
const RESERVE: u64 = 1024;
/// Ids below belong to the mirror's root and fixed directories.
pub(crate) const FIRST_ID: u64 = 4096;

/// The home directory.
#[derive(Debug)]
pub struct Home {
    root: PathBuf,
    ids: Mutex<Ids>,
}

#[derive(Debug)]
struct Ids {
    next: u64,
    reserved: u64,
}

impl Home {
    /// Opens or makes the directory.
    ///
    /// # Errors
    /// Where it cannot be made, or its path is too long for the sockets in it.
    pub fn open(root: &Path) -> Result<Self> {
        let longest = root.join("vms/0123456789abcdef/resident.sock");
        if longest.as_os_str().len() >= SOCKET_PATH_MAX {
            let max = SOCKET_PATH_MAX - (longest.as_os_str().len() - root.as_os_str().len()) - 1;
            return Err(Error::Invalid(format!(
                "{} is too long for a home: sockets in it allow {max} bytes",
                root.display()
            )));
        }
        for dir in ["run", "vms", "pending", "exports", "files", "kernels", "work"] {
            let dir = root.join(dir);
            std::fs::create_dir_all(&dir).map_err(Error::io("make", &dir))?;
        }
        let root = root.canonicalize().map_err(Error::io("open", root))?;
        restrict(&root)?;
        let file = root.join("next-id");
        let next = match std::fs::read_to_string(&file) {
            Ok(text) => text
                .trim()
                .parse()
                .map_err(|_| Error::Damaged { path: file, reason: format!("`{text}` is no number") })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => FIRST_ID,
            Err(e) => return Err(Error::io("read", file)(e)),
        };
        Ok(Self { root, ids: Mutex::new(Ids { next, reserved: next }) })
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below it.
    #[must_use]
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// Bytes that its file system has room for.
    ///
    /// # Errors
    /// Where the file system does not say.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat =
            rustix::fs::statvfs(&self.root).map_err(|e| Error::io("ask for the room of", &self.root)(e.into()))?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// Directory of a VM.
    #[must_use]
    pub fn vm_dir(&self, id: u64) -> PathBuf {
        self.root.join(format!("vms/{id:016x}"))
    }

    /// The daemon's socket.
    #[must_use]
    pub fn daemon_socket(&self) -> PathBuf {
        self.path("run/daemon.sock")
    }

    /// A RAM file in the mirror's mount.
    #[must_use]
    pub fn ram_file(&self, id: u64) -> PathBuf {
        self.root.join(format!("mnt/ram/{id:016x}"))
    }

    /// A disk in the mirror's mount.
    #[must_use]
    pub fn disk_file(&self, id: u64) -> PathBuf {
        self.root.join(format!("mnt/disk/{id:016x}"))
    }

    /// An id that was never used on this node and never will be again.
    ///
    /// # Errors
    /// Where the reservation cannot be written.
    pub fn new_id(&self) -> Result<u64> {
        let mut ids = self.ids.lock().expect("no holder panics");
        if ids.next == ids.reserved {
            let reserved = ids.reserved + RESERVE;
            write_atomically(&self.root.join("next-id"), format!("{reserved}\n").as_bytes(), true)?;
            ids.reserved = reserved;
        }
        let id = ids.next;
        ids.next += 1;
        Ok(id)
    }
}

fn restrict(root: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // The network helper drops its privileges but keeps none of our paths: nobody else needs to enter.
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o700)).map_err(Error::io("restrict", root))
}

/// Replaces a file by a whole new one; with `durable`, also after a power cut.
///
/// # Errors
/// Names the file.
pub fn write_atomically(path: &Path, bytes: &[u8], durable: bool) -> Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_data()?;
        }
        std::fs::rename(&temporary, path)?;
        if durable {
            std::fs::File::open(path.parent().expect("a file has a directory"))?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path)(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_never_used_twice_however_often_the_home_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for _ in 0..5 {
            let home = Home::open(dir.path()).unwrap();
            for _ in 0..700 {
                let id = home.new_id().unwrap();
                assert!(id > last, "{id} after {last}");
                last = id;
            }
        }
    }

    #[test]
    fn a_home_too_deep_for_sockets_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Home::open(&dir.path().join("x".repeat(90))).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
