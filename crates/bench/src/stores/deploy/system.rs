//! What deploys an image to a node: each system makes the image's disk, writable, appear on a unix socket of the
//! node, where the same client replays the same trace.

use super::net::{Network, Place};
use super::server::{self, IMAGE, finish};
use super::trace::await_socket;
use crate::Outcome;
use std::path::{Path, PathBuf};
use std::process::Child;

/// One of those measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::stores) enum System {
    /// `offshoot nbd serve` on a node that runs from the shared store, nothing cached, of an image that was never
    /// deployed before.
    OffshootFirst,
    /// The same of an image that was deployed, and booted, once before.
    Offshoot,
    /// The whole image first, as a qcow2 file compressed by zstd, then `qemu-nbd` on it.
    CopyQcow2,
    /// The whole image first, as a raw file compressed by zstd and unpacked while it comes, then `qemu-nbd` on it.
    CopyRaw,
    /// `qemu-nbd` on a qcow2 overlay whose backing file is the origin's `qemu-nbd`.
    QemuNbd,
}

impl System {
    /// All but what can only be measured before the image was deployed once.
    pub(in crate::stores) const ALL: [Self; 4] = [Self::Offshoot, Self::CopyQcow2, Self::CopyRaw, Self::QemuNbd];

    /// Its name in plots and lists.
    pub(in crate::stores) fn name(self) -> &'static str {
        match self {
            Self::OffshootFirst => "offshoot, first",
            Self::Offshoot => "offshoot",
            Self::CopyQcow2 => "full copy (qcow2, zstd)",
            Self::CopyRaw => "full copy (raw, zstd)",
            Self::QemuNbd => "qemu-nbd, qcow2 overlay",
        }
    }
}

/// A node that has a system and no image yet.
pub(super) struct Node<'a> {
    pub(super) network: &'a Network,
    pub(super) program: &'a Path,
    pub(super) place: Place,
    /// Its disk.
    pub(super) dir: PathBuf,
}

/// A disk that is served at a node; the process ends with it, where it is not the node's daemon.
pub(super) struct Served {
    pub(super) socket: PathBuf,
    child: Option<Child>,
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Node<'_> {
    /// What is there before anybody asks for the image: the node's services.
    pub(super) fn prepare(&self, system: System) -> Outcome {
        match system {
            System::OffshootFirst | System::Offshoot => self.offshoot(&["nbd", "ls"]).map(drop),
            _ => Ok(()),
        }
    }

    /// Makes the image's disk appear; what is read of it teaches or does not.
    pub(super) fn deploy(&self, system: System, teaches: bool) -> Outcome<Served> {
        let socket = self.dir.join("disk.sock");
        match system {
            System::OffshootFirst | System::Offshoot => {
                let path = socket.to_string_lossy();
                let mut words = vec!["nbd", "serve", IMAGE, "--writable", "--name", IMAGE, "--socket", &path];
                words.extend((!teaches).then_some("--no-learn"));
                self.offshoot(&words)?;
                Ok(Served { socket, child: None })
            }
            System::CopyQcow2 => {
                let disk = self.dir.join("disk.qcow2");
                let mut curl = self.network.command(self.place, "curl");
                curl.args(["--silent", "--show-error", "--fail", "--output"]).arg(&disk);
                finish(curl.arg(server::url("disk.qcow2")))?;
                self.qemu_nbd("qcow2", &disk, socket)
            }
            System::CopyRaw => {
                let disk = self.dir.join("disk.raw");
                let script = "set -eu; { curl --silent --show-error --fail \"$1\" || kill $$; } \
                              | zstd --decompress --quiet --sparse -o \"$2\"";
                let mut shell = self.network.command(self.place, "sh");
                finish(shell.args(["-c", script, "sh", &server::url("disk.raw.zst")]).arg(&disk))?;
                self.qemu_nbd("raw", &disk, socket)
            }
            System::QemuNbd => {
                let disk = self.dir.join("overlay.qcow2");
                let mut create = self.network.command(self.place, "qemu-img");
                create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &server::nbd_url()]).arg(&disk);
                finish(&mut create)?;
                self.qemu_nbd("qcow2", &disk, socket)
            }
        }
    }

    /// Serves a local file. Its writes go through the page cache: the faster way.
    fn qemu_nbd(&self, format: &str, disk: &Path, socket: PathBuf) -> Outcome<Served> {
        let mut command = self.network.command(self.place, "qemu-nbd");
        command.args(["--persistent", "--cache=writeback", "--aio=threads", "--discard=unmap"]);
        command.args(["--export-name", IMAGE, "--format", format, "--socket"]).arg(&socket).arg(disk);
        let child = server::serve(&mut command, &self.dir.join("qemu-nbd.log"))?;
        let served = Served { socket, child: Some(child) };
        await_socket(&served.socket)?;
        Ok(served)
    }

    pub(super) fn offshoot(&self, words: &[&str]) -> Outcome<String> {
        let mut command = self.network.command(self.place, self.program);
        finish(server::shared_store(command.arg("--home").arg(self.dir.join("home")).args(words)))
    }
}
