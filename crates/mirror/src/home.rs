//! The mirror's directories, and how its descriptions reach the disk.
//!
//! Two copies of the state exist, for two kinds of death:
//!
//! - **live** (`mirror/live-<boot id>/`): written before each reply by plain writes and renames. It is always
//!   current and survives the death of every process, since the page cache does; it says nothing after a power
//!   loss, when the kernel may have written its parts in any order. Hence the boot id in its name. It lies on a
//!   tmpfs of its own: it needs no disk, and a mark in a VM's pause must not wait for a busy journal.
//! - **durable** (`mirror/objects/`, `mirror/layers/*.map`): written when a guest flushes its disk, data before
//!   states before descriptions, each step made durable before the next. It is what a new boot starts from.
//!
//! RAM files have no durable copy: they live as long as the processes that map them.

use crate::front::session::is_mounted;
use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Serialize, de::DeserializeOwned};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where everything of one node's mirror lies.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    root: PathBuf,
    boot: String,
}

impl Home {
    /// Makes the directories (mode 0700) that are not there. Never touches the mount point.
    pub(crate) fn prepare(root: &Path) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Self::prepare_for_boot(root, &boot)
    }

    /// As [`Home::prepare`], for the boot named. Tests play a power loss by naming another.
    pub(crate) fn prepare_for_boot(root: &Path, boot: &str) -> io::Result<Self> {
        let home = Self { root: root.to_owned(), boot: boot.to_owned() };
        for dir in [home.root.clone(), home.run(), home.root.join("mirror"), home.objects(), home.layers()] {
            match DirBuilder::new().mode(0o700).recursive(true).create(&dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(at(&dir, e)),
                _ => {}
            }
        }
        Ok(home)
    }

    /// The mount point.
    pub(crate) fn mnt(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// Sockets and locks.
    pub(crate) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run().join("mirror.sock")
    }

    /// Durable descriptions.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("mirror/objects")
    }

    /// Layers' data and durable states.
    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("mirror/layers")
    }

    /// Descriptions and layers' states valid in this boot.
    pub(crate) fn live(&self) -> PathBuf {
        self.root.join("mirror").join(format!("live-{}", self.boot))
    }

    /// Ensures the live directory; says whether it was there, and removes those of other boots.
    pub(crate) fn enter_live(&self) -> io::Result<bool> {
        let live = self.live();
        for entry in fs::read_dir(self.root.join("mirror"))? {
            let path = entry?.path();
            let stale = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("live-")) && path != live;
            if stale {
                fs::remove_dir_all(&path).map_err(|e| at(&path, e))?;
            }
        }
        Ok(live.join("complete").exists())
    }

    /// Says that the live directory holds all there is, so that it rules from now on.
    pub(crate) fn complete_live(&self) -> io::Result<()> {
        File::create(self.live().join("complete")).map(drop)
    }

    /// Empties the live directory: a start that follows a power loss, or one that was killed in such a start.
    pub(crate) fn reset_live(&self) -> io::Result<()> {
        let live = self.live();
        match DirBuilder::new().mode(0o700).create(&live) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(at(&live, e)),
            _ => {}
        }
        for entry in fs::read_dir(&live)? {
            remove_if_there(&entry?.path())?;
        }
        Ok(())
    }

    /// Puts a tmpfs under the live directory, unless one is there.
    pub(crate) fn mount_live(&self) -> io::Result<()> {
        let live = self.live();
        if is_mounted(&live)? {
            return Ok(());
        }
        fs::create_dir_all(&live)?;
        rustix::mount::mount(c"offshoot-live", &live, c"tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0700")
            .map_err(|e| at(&live, e.into()))
    }

    /// Drops the tmpfs, and with it all that is only live.
    pub(crate) fn unmount_live(&self) -> io::Result<()> {
        let live = self.live();
        if is_mounted(&live)? {
            rustix::mount::unmount(&live, UnmountFlags::DETACH).map_err(|e| at(&live, e.into()))?;
        }
        fs::remove_dir_all(&live)
    }

    /// Path of an object's live description.
    pub(crate) fn live_description(&self, id: u64) -> PathBuf {
        self.live().join(format!("{id:016x}.json"))
    }

    /// Path of an object's durable description.
    pub(crate) fn durable_description(&self, id: u64) -> PathBuf {
        self.objects().join(format!("{id:016x}.json"))
    }

    /// Path of a layer's data.
    pub(crate) fn layer_data(&self, layer: u64) -> PathBuf {
        self.layers().join(format!("{layer:016x}.data"))
    }

    /// Path of a layer's durable states.
    pub(crate) fn layer_durable_states(&self, layer: u64) -> PathBuf {
        self.layers().join(format!("{layer:016x}.map"))
    }

    /// Path of a layer's live states.
    pub(crate) fn layer_live_states(&self, layer: u64) -> PathBuf {
        self.live().join(format!("{layer:016x}.map"))
    }

    /// Removes every file of a layer; those absent already are no error.
    pub(crate) fn remove_layer(&self, layer: u64) -> io::Result<()> {
        remove_if_there(&self.layer_durable_states(layer))?;
        remove_if_there(&self.layer_live_states(layer))?;
        remove_if_there(&self.layer_data(layer))
    }
}

/// Replaces `path` by `value` in JSON so that a reader sees the old file or the new one, whole. Survives the
/// death of the process, not a power loss.
pub(crate) fn replace_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    replace(path, value, |_| Ok(())).map_err(|e| at(path, e))
}

/// As [`replace_json`], and survives a power loss once it has returned.
pub(crate) fn replace_json_durably<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    replace(path, value, File::sync_all).and_then(|()| sync_dir(path)).map_err(|e| at(path, e))
}

fn replace<T: Serialize>(path: &Path, value: &T, settle: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        settle(&file)?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Reads what [`replace_json`] wrote.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let bytes = fs::read(path).map_err(|e| at(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| at(path, e.into()))
}

/// As [`read_json`]; a file that is not there, as in a fresh home, holds the default.
pub(crate) fn read_json_or_default<T: DeserializeOwned + Default>(path: &Path) -> io::Result<T> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| at(path, e.into())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(e) => Err(at(path, e)),
    }
}

/// Makes the entries of the directory that holds `path` durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Removes a file; one that is not there is no error.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(path, e)),
        _ => Ok(()),
    }
}

/// Names the path in an error and keeps its kind and number.
pub(crate) fn at(path: &Path, error: io::Error) -> io::Error {
    match error.raw_os_error() {
        // A number must survive: ENOSPC decides what the guest is told.
        Some(_) => {
            log::warn!("{}: {error}", path.display());
            error
        }
        None => io::Error::new(error.kind(), format!("{}: {error}", path.display())),
    }
}
