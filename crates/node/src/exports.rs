//! Disks served over NBD: images and snapshots as they are, or writable scratch disks over them.
//!
//! An export is a record `<home>/exports/<name>.json`, a pin of the version it shows, for a scratch disk an overlay in
//! the mirror, and while it is served an export of the mirror. The mirror serves on while no daemon runs, and a new
//! mirror serves what the last one did; a daemon that starts brings the mirror to what is on record. A scratch disk is
//! kept under its name when it is no longer served, until it is discarded.

use crate::error::{Error, Result};
use crate::foresight::disk::{self, Wanted};
use crate::home::write_atomically;
use crate::node::{Node, Shared};
use crate::{image, names, record, snapshots, sweep};
use api::{NbdExport, NbdRequest, NbdState};
use mirror::control::OfDisk;
use mirror::{Below, ExportSource, ExportSpec};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use store::Version;

/// What begins the source text of a scratch disk that was kept.
const SCRATCH: &str = "scratch:";

/// An export, as a later daemon must know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExportRecord {
    /// Its id, in the name of its pin.
    id: u64,
    name: String,
    created: String,
    /// As the user named it.
    source: String,
    /// What it shows, or showed before it was written.
    version: String,
    /// Its overlay, where it has one.
    overlay: Option<u64>,
    /// Whether the overlay is its own: that of a scratch disk, not one that an export of such a disk only shows.
    writable: bool,
    /// Where it is served; none: it is kept and not served.
    socket: Option<PathBuf>,
    /// Whether it ends by itself.
    ephemeral: bool,
}

/// What a source text stands for.
struct Resolved {
    version: Version,
    /// The head of the image or snapshot that it is a disk of, and the disk's name there.
    of: Option<(String, String)>,
    /// The scratch disk's, where it is one.
    scratch: Option<ExportRecord>,
}

impl Shared {
    /// What the sweep must keep: overlays, and the ids of pins.
    pub(crate) fn export_roots(&self) -> (Vec<u64>, Vec<u64>) {
        let exports = self.exports.lock().expect("no holder panics");
        (exports.values().filter_map(|e| e.overlay).collect(), exports.values().map(|e| e.id).collect())
    }

    fn export(&self, name: &str) -> Option<ExportRecord> {
        self.exports.lock().expect("no holder panics").get(name).cloned()
    }

    fn keep_export(&self, record: &ExportRecord) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(record).expect("records serialise");
        write_atomically(&self.export_path(&record.name), &bytes, true)?;
        self.exports.lock().expect("no holder panics").insert(record.name.clone(), record.clone());
        Ok(())
    }

    fn export_path(&self, name: &str) -> PathBuf {
        self.home.path(&format!("exports/{name}.json"))
    }

    /// Forgets an export that is no longer served; the sweep takes its overlay and its pin.
    fn forget_export(&self, record: &ExportRecord) -> Result<()> {
        let path = self.export_path(&record.name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
            _ => {}
        }
        self.exports.lock().expect("no holder panics").remove(&record.name);
        if record.writable {
            let _ = self.mirror.unregister_vm(&counted_as(&record.name));
        }
        Ok(())
    }

    /// Tells the mirror of an export, and what is wanted for its readers of the disk named.
    fn serve_export(self: &Arc<Self>, record: &ExportRecord, ahead: Option<&(Wanted, (String, String))>) -> Result<()> {
        let version = version_of(record)?;
        if let (Some(id), true) = (record.overlay, record.writable) {
            let below = Below::Version(record.version.clone());
            self.mirror.add_overlay(id, &counted_as(&record.name), version.size, version.block_size, below)?;
        }
        let Some(socket) = record.socket.clone() else { return Ok(()) };
        let look_ahead = || {
            if let Some((wanted, (of, name))) = ahead {
                disk::begin(self, of, &[(name.clone(), version, record.in_mirror())], wanted.clone());
            }
        };
        if record.overlay.is_some() {
            // Before anybody can read.
            look_ahead();
        }
        let source = match record.overlay {
            Some(id) => ExportSource::Overlay(id),
            None => ExportSource::Version {
                version: record.version.clone(),
                size: version.size,
                block_size: version.block_size.into(),
            },
        };
        self.mirror.add_export(ExportSpec {
            name: record.name.clone(),
            description: format!("{}{}", if record.writable { "scratch disk over " } else { "" }, record.source),
            socket,
            source,
            read_only: !record.writable,
            ephemeral: record.ephemeral,
        })?;
        if record.overlay.is_none() {
            look_ahead();
        }
        Ok(())
    }
}

impl ExportRecord {
    /// What the mirror calls the disk.
    fn in_mirror(&self) -> OfDisk {
        self.overlay.map_or_else(|| OfDisk::Export(self.name.clone()), OfDisk::Overlay)
    }

    /// The disk, where its readers may teach: what only shows somebody's scratch disk leaves that to the disk's own.
    fn teaching(&self) -> Option<OfDisk> {
        (self.writable || self.overlay.is_none()).then(|| self.in_mirror())
    }
}

impl Node {
    /// Serves a disk over NBD; clients can connect when this returns.
    ///
    /// # Errors
    /// There is no such source, the name or the socket is taken, or the mirror refuses.
    pub fn serve_nbd(&self, request: &NbdRequest) -> Result<NbdExport> {
        let shared = &self.shared;
        let _one = shared.exporting.lock().expect("no holder panics");
        self.prune_exports()?;
        let _making = shared.making.read().expect("no holder panics");
        let found = self.resolve(&request.source)?;
        if let (Some(kept), false) = (&found.scratch, request.ephemeral) {
            return self.serve_again(kept, request);
        }
        let wanted = disk::wanted(shared, request.prefetch.as_deref(), None, request.learn)?;
        // A copy reads everything, once, from one end to the other.
        let ahead = wanted.filter(|_| !request.ephemeral).zip(found.of);
        let id = shared.home.new_id()?;
        let name = self.export_name(request, id)?;
        if request.writable && request.ephemeral {
            return Err(Error::Invalid("an export that ends by itself is read-only".into()));
        }
        let record = ExportRecord {
            id,
            created: record::now(),
            source: request.source.clone(),
            version: found.version.to_string(),
            overlay: match found.scratch {
                Some(kept) => kept.overlay,
                None => request.writable.then(|| shared.home.new_id()).transpose()?,
            },
            writable: request.writable,
            socket: Some(self.export_socket(&name, request)?),
            ephemeral: request.ephemeral,
            name,
        };
        self.pin(id, [("disk0".to_owned(), found.version)].into())?;
        let served = shared.keep_export(&record).and_then(|()| shared.serve_export(&record, ahead.as_ref()));
        if let Err(error) = served {
            let _ = shared.forget_export(&record);
            let _ = record.overlay.filter(|_| record.writable).map(|id| shared.mirror.remove(&[id]));
            let _ = shared.store.delete_head(&shared.pin_head(id));
            return Err(error);
        }
        self.described(&record)
    }

    /// Serves a scratch disk that was kept.
    fn serve_again(&self, kept: &ExportRecord, request: &NbdRequest) -> Result<NbdExport> {
        if request.name.as_ref().is_some_and(|name| *name != kept.name) {
            return Err(Error::Invalid(format!(
                "scratch disk {} is served under its own name; leave --name out",
                kept.name
            )));
        }
        if let Some(socket) = &kept.socket {
            return Err(Error::Conflict(format!("{} is served already, at {}", kept.name, socket.display())));
        }
        let record = ExportRecord { socket: Some(self.export_socket(&kept.name, request)?), ..kept.clone() };
        let served = self.shared.keep_export(&record).and_then(|()| self.shared.serve_export(&record, None));
        if let Err(error) = served {
            self.shared.keep_export(kept)?;
            return Err(error);
        }
        self.described(&record)
    }

    /// What a source text stands for: an image, a snapshot's disk, a scratch disk, a blob's version.
    fn resolve(&self, source: &str) -> Result<Resolved> {
        if let Some(name) = source.strip_prefix(SCRATCH) {
            let record = self.shared.export(name).filter(|e| e.writable).ok_or_else(|| {
                Error::NotFound(format!("no scratch disk is named {name}; `offshoot nbd ls` lists them"))
            })?;
            return Ok(Resolved { version: version_of(&record)?, of: None, scratch: Some(record) });
        }
        if let Some(text) = source.strip_prefix("blob:") {
            return Ok(Resolved { version: self.blob_version(text)?.version, of: None, scratch: None });
        }
        if source.contains('@') {
            let (head, disk, version) = snapshots::disk_of(&self.shared, source)?;
            return Ok(Resolved { version, of: Some((head, disk)), scratch: None });
        }
        let of = Some((image::head(source), image::DISK.to_owned()));
        Ok(Resolved { version: image::load(&self.shared.store, source)?.disk(), of, scratch: None })
    }

    fn export_name(&self, request: &NbdRequest, id: u64) -> Result<String> {
        let exports = self.shared.exports.lock().expect("no holder panics");
        match &request.name {
            Some(name) => {
                names::check("disk to serve", name)?;
                if exports.contains_key(name) {
                    return Err(Error::Conflict(format!(
                        "an export named {name} is there already; `offshoot nbd stop {name} --discard` or choose another --name"
                    )));
                }
                Ok(name.clone())
            }
            None if request.ephemeral => Ok(format!("export-{id:x}")),
            None => {
                let letter =
                    |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c) { c } else { '-' };
                let base: String = request.source.to_lowercase().chars().map(letter).take(50).collect();
                let numbered = (2..).map(|n: u32| format!("{base}-{n}"));
                let mut names = std::iter::once(base.clone()).chain(numbered);
                Ok(names.find(|name| !exports.contains_key(name)).expect("numbers do not end"))
            }
        }
    }

    fn export_socket(&self, name: &str, request: &NbdRequest) -> Result<PathBuf> {
        if let Some(path) = &request.socket {
            return Ok(PathBuf::from(path));
        }
        let dir = self.shared.home.path("run/nbd");
        std::fs::create_dir_all(&dir).map_err(Error::io("make", &dir))?;
        Ok(dir.join(format!("{name}.sock")))
    }

    /// The exports, and the scratch disks that are kept.
    ///
    /// # Errors
    /// Where the mirror does not answer.
    pub fn nbd_exports(&self) -> Result<Vec<NbdExport>> {
        let _one = self.shared.exporting.lock().expect("no holder panics");
        self.prune_exports()?;
        let records: Vec<_> = self.shared.exports.lock().expect("no holder panics").values().cloned().collect();
        records.iter().filter(|record| !record.ephemeral).map(|record| self.described(record)).collect()
    }

    fn described(&self, record: &ExportRecord) -> Result<NbdExport> {
        let exports = self.shared.mirror.list()?.exports;
        let served = exports.iter().find(|e| e.spec.name == record.name);
        let socket = record.socket.as_ref().map(|socket| socket.display().to_string());
        Ok(NbdExport {
            name: record.name.clone(),
            source: record.source.clone(),
            writable: record.writable,
            state: match (&record.socket, served) {
                (None, _) => NbdState::Stopped,
                (Some(_), Some(_)) => NbdState::Serving,
                (Some(_), None) => NbdState::Failed,
            },
            uri: socket.as_ref().map(|socket| format!("nbd+unix:///{}?socket={socket}", record.name)),
            socket,
            size_bytes: version_of(record)?.size,
            connections: served.map_or(0, |e| e.connections),
            created: record.created.clone(),
        })
    }

    /// Ends an export. A scratch disk is kept, unless it is to be discarded.
    ///
    /// # Errors
    /// There is none of that name, or what was written to it cannot be made durable.
    pub fn stop_nbd(&self, name: &str, discard: bool) -> Result<()> {
        {
            let _one = self.shared.exporting.lock().expect("no holder panics");
            let record = self
                .shared
                .export(name)
                .ok_or_else(|| Error::NotFound(format!("no export is named {name}; `offshoot nbd ls` lists them")))?;
            let kept = record.writable && !discard;
            if kept && record.socket.is_none() {
                return Err(Error::Conflict(format!(
                    "{name} is not served; `offshoot nbd stop {name} --discard` drops what was written to it"
                )));
            }
            disk::ended(&self.shared, record.teaching());
            self.shared.mirror.remove_export(name)?;
            if kept {
                return self.shared.keep_export(&ExportRecord { socket: None, ..record });
            }
            self.shared.forget_export(&record)?;
        }
        sweep::sweep(&self.shared)
    }

    /// Forgets exports that have ended by themselves. The caller is the only one to change exports.
    fn prune_exports(&self) -> Result<()> {
        let records: Vec<_> = self.shared.exports.lock().expect("no holder panics").values().cloned().collect();
        if !records.iter().any(|record| record.ephemeral) {
            return Ok(());
        }
        let served = self.shared.mirror.list()?.exports;
        for record in records.iter().filter(|r| r.ephemeral && !served.iter().any(|e| e.spec.name == r.name)) {
            self.shared.forget_export(record)?;
            // Not a sweep: that would have to wait for whoever makes objects, us among them.
            self.shared.store.delete_head(&self.shared.pin_head(record.id))?;
        }
        Ok(())
    }

    /// Ends all exports, before the mirror does. Scratch disks are kept.
    pub(crate) fn end_exports(&self) {
        let _one = self.shared.exporting.lock().expect("no holder panics");
        let records: Vec<_> = self.shared.exports.lock().expect("no holder panics").values().cloned().collect();
        for record in records {
            disk::ended(&self.shared, record.teaching());
            let ended = self.shared.mirror.remove_export(&record.name).map(drop);
            let noted = if record.writable {
                self.shared.keep_export(&ExportRecord { socket: None, ..record.clone() })
            } else {
                let _ = self.shared.store.delete_head(&self.shared.pin_head(record.id));
                self.shared.forget_export(&record)
            };
            if let Err(error) = ended.and(noted) {
                log::error!("ending export {}: {error}", record.name);
            }
        }
    }
}

/// Brings the mirror to what is on record.
pub(crate) fn recover(shared: &Arc<Shared>) -> Result<()> {
    let dir = shared.home.path("exports");
    let served = shared.mirror.list()?.exports;
    for entry in std::fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
        let path = entry.map_err(Error::io("list", &dir))?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let record: ExportRecord = match record::load(&path) {
            Ok(record) => record,
            Err(error) => {
                log::error!("{error}");
                continue;
            }
        };
        if record.ephemeral && !served.iter().any(|e| e.spec.name == record.name) {
            shared.forget_export(&record)?;
            continue;
        }
        shared.exports.lock().expect("no holder panics").insert(record.name.clone(), record.clone());
        if let Err(error) = shared.serve_export(&record, None) {
            log::error!("export {} is not served: {error}", record.name);
        }
    }
    // What a daemon had begun to end when it died.
    for export in served.iter().filter(|e| shared.export(&e.spec.name).is_none()) {
        shared.mirror.remove_export(&export.spec.name)?;
    }
    Ok(())
}

fn version_of(record: &ExportRecord) -> Result<Version> {
    record.version.parse().map_err(|_| Error::Damaged {
        path: record.name.clone().into(),
        reason: format!("`{}` is no version", record.version),
    })
}

/// Whose the mirror's counters of a scratch disk are; no VM can be named so.
fn counted_as(name: &str) -> String {
    format!("nbd:{name}")
}
