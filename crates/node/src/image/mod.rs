//! Images: where VMs come from.
//!
//! An image is a snapshot that has disks and no RAM: one disk, the kernel and initial RAM disk that boot it, and
//! the kernel's command line. It is made in two steps. First its *parts* are made as plain files: the default
//! guest by [`build_default`], anything foreign by [`import`]. Then [`add`] commits them to the store under
//! `image/<name>`, in one publication; the files are no longer needed then.
//!
//! Foreign input is hostile until checked: [`import`] says what is refused, and leaves nothing behind. This
//! module knows no VM and no network; it runs tools of the distribution (`mmdebstrap`, `qemu-img`, e2fsprogs).

mod archive;
mod build;
mod catalog;
mod error;
mod ext4;
mod import;
mod inspect;
mod scratch;
mod tool;

pub use build::{BuildOptions, build_default};
pub use catalog::{DISK, Stored, add, carried_files, ensure_file, head, inspect, kernel_files, list, load, remove};
pub use error::Error;
pub use import::{ImportOptions, Kind, import};

use std::path::PathBuf;

/// What an image is made of, as files.
#[derive(Debug)]
pub struct Parts {
    /// A raw disk.
    pub disk: PathBuf,
    /// Bytes of the disk: the file's, or more, and zeros from its end.
    pub size: u64,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk, where the kernel needs one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the files lie that go when the parts do.
    scratch: Option<scratch::Scratch>,
}

/// Sees what a long operation is doing, line by line.
type Notes<'a> = &'a mut dyn FnMut(&str);
