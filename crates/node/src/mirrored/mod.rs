//! Mirrored files: versions of blobs with local changes, as files of the mirror's tree, and how these become versions.
//!
//! A mirrored file is a record `<home>/files/<id>.json`, a pin of the version it stands on, and an overlay in the
//! mirror. It is found in the tree under its blob and that version's number.
//!
//! **COMMIT.** The overlay is flushed and marked, so that what it shows at one instant is a chain of frozen views; the
//! changes of all that are not yet in the store are made one version, published only if the version that the file
//! stands on is the latest: what others published is never mixed in, block by block, with a file system that does not
//! know of it. A death at any instant leaves it done or not done:
//!
//! ```text
//! asked on record -> flush, mark, flush -> publish -> record moved, settling on record -> view committed
//!                                          │          └ after a death: the view is committed
//!                                          └ after a death: the version behind the file's own is what the views make
//!                                            of that (their content has one name): it is adopted, and no other made
//! ```
//!
//! **CLONE.** The new name is on record before the blob is made; a blob of that name that is a clone of the file's
//! version and has no history is then the file's own.
//!
//! Whoever changes a file or deletes versions holds the lock of the blob. Who asked is on record with the answer, so
//! that a request that the kernel repeats is answered as it was.

mod asked;
mod changes;
mod interface;

pub(crate) use asked::start;

use crate::error::{Error, Result};
use crate::home::write_atomically;
use crate::node::Shared;
use crate::record;
use changes::Merged;
use mirror::{Below, FilePlace, Opens};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use store::blob::{At, Origin};
use store::{Changes, Expect, Manifest, Version};

/// What begins the heads that keep open versions.
const OPEN_PIN: &str = "open-";

/// A version of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) blob: String,
    pub(crate) number: u64,
}

/// A mirrored file, as a later daemon must know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    /// Its id, in the name of its pin.
    id: u64,
    overlay: u64,
    blob: String,
    /// The version it stands on.
    number: u64,
    version: String,
    /// Who asked for the commit that was begun last.
    asked: Option<String>,
    /// The view that `version` is, where the mirror may not know it yet.
    settling: Option<u64>,
    /// The blob that it is about to become a file of.
    cloning: Option<String>,
    /// Who asked last, and the answer.
    done: Option<(String, u64)>,
}

/// All mirrored files.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// By overlay.
    records: Mutex<BTreeMap<u64, FileRecord>>,
    blobs: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl FileRecord {
    fn answered(&self, token: Option<&str>) -> Option<u64> {
        self.done.as_ref().filter(|(who, _)| token == Some(who)).map(|(_, number)| *number)
    }

    fn base(&self) -> Result<Version> {
        self.version.parse().map_err(|_| Error::Damaged {
            path: format!("files/{:016x}.json", self.id).into(),
            reason: format!("`{}` is no version", self.version),
        })
    }

    /// For people.
    fn name(&self) -> String {
        format!("{}@{}", self.blob, self.number)
    }
}

impl Files {
    /// The lock of a blob: held by whoever deletes versions of it or changes a file that stands on one.
    pub(crate) fn lock_of(&self, blob: &str) -> Arc<Mutex<()>> {
        let mut blobs = self.blobs.lock().expect("no holder panics");
        // Those that nobody has in hand are forgotten, or every name ever used would stay.
        blobs.retain(|_, lock| Arc::strong_count(lock) > 1);
        blobs.entry(blob.to_owned()).or_default().clone()
    }

    /// The overlays, and the ids of pins, that the sweep must keep.
    pub(crate) fn roots(&self) -> (Vec<u64>, Vec<u64>) {
        let records = self.records.lock().expect("no holder panics");
        (records.keys().copied().collect(), records.values().map(|r| r.id).collect())
    }

    fn all(&self) -> Vec<FileRecord> {
        self.records.lock().expect("no holder panics").values().cloned().collect()
    }

    fn get(&self, overlay: u64) -> Result<FileRecord> {
        let record = self.records.lock().expect("no holder panics").get(&overlay).cloned();
        record.ok_or_else(|| Error::NotFound(format!("{overlay:016x} is no mirrored file any more")))
    }

    fn at(&self, named: &Named) -> Option<FileRecord> {
        self.all().into_iter().find(|r| r.blob == named.blob && r.number == named.number)
    }
}

fn path_of(shared: &Shared, id: u64) -> PathBuf {
    shared.home.path(&format!("files/{id:016x}.json"))
}

fn keep(shared: &Shared, record: &FileRecord) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(record).expect("records serialise");
    write_atomically(&path_of(shared, record.id), &bytes, true)?;
    shared.files.records.lock().expect("no holder panics").insert(record.overlay, record.clone());
    Ok(())
}

/// Takes a file that nobody has open, and that has no changes or (`changed`) of no use ones, from the tree and off the
/// record; whether that was so. Its overlay is the sweep's.
fn withdraw(shared: &Shared, record: &FileRecord, changed: bool) -> Result<bool> {
    {
        // Under the lock under which the mirror is told of all files: a list from before would bring it back.
        let mut records = shared.files.records.lock().expect("no holder panics");
        if !shared.mirror.retire(record.overlay, changed)? {
            return Ok(false);
        }
        records.remove(&record.overlay);
    }
    let path = path_of(shared, record.id);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
        _ => {}
    }
    let _ = shared.mirror.unregister_vm(&counted_as(record.id));
    Ok(true)
}

/// Tells the mirror where which file is found.
fn tell(shared: &Shared) -> Result<()> {
    // One after the other, or an older list could replace a newer one.
    let records = shared.files.records.lock().expect("no holder panics");
    let place = |r: &FileRecord| FilePlace { overlay: r.overlay, blob: r.blob.clone(), number: r.number };
    shared.mirror.set_files(records.values().map(place).collect())
}

/// Keeps versions for a file.
fn pin(shared: &Shared, id: u64, versions: &[Version]) -> Result<()> {
    let versions = (0..).zip(versions).map(|(n, v): (u32, _)| (format!("file{n}"), *v)).collect();
    let manifest = Manifest { versions, meta: String::new() };
    shared.store.begin().publish(&shared.pin_head(id), Expect::Any, &manifest)?;
    Ok(())
}

/// Whose the mirror's counters of a mirrored file are; no VM can be named so.
fn counted_as(id: u64) -> String {
    format!("file:{id:x}")
}

/// Says which overlay is the mirrored file of a version, made where there is none. It is not pruned before `say` has
/// returned.
fn open(shared: &Arc<Shared>, named: &Named, say: impl FnOnce(u64) -> Result<()>) -> Result<()> {
    let lock = shared.files.lock_of(&named.blob);
    let _blob = lock.lock().expect("no holder panics");
    match shared.files.at(named) {
        // The mirror asks for it, so it does not know of it: it died while it was told, or while it withdrew it.
        Some(there) => {
            serve(shared, &there)?;
            tell(shared)?;
            say(there.overlay)
        }
        None => say(make(shared, named)?),
    }
}

fn make(shared: &Arc<Shared>, named: &Named) -> Result<u64> {
    let _making = shared.making.read().expect("no holder panics");
    let (number, version) = shared.store.blob(&named.blob)?.version(At::Number(named.number))?;
    let record = FileRecord {
        id: shared.home.new_id()?,
        overlay: shared.home.new_id()?,
        blob: named.blob.clone(),
        number,
        version: version.to_string(),
        asked: None,
        settling: None,
        cloning: None,
        done: None,
    };
    pin(shared, record.id, &[version])?;
    let made = keep(shared, &record).and_then(|()| serve(shared, &record)).and_then(|()| tell(shared));
    if let Err(error) = made {
        // A mirror that died when it had noted the file may have opened it since for whoever asked. Then it stays, as
        // it does where the mirror cannot be asked: it is found by the next who opens it, or by the sweep.
        if withdraw(shared, &record, false).is_ok_and(|withdrawn| withdrawn) {
            let _ = shared.mirror.remove(&[record.overlay]);
            let _ = shared.store.delete_head(&shared.pin_head(record.id));
        }
        return Err(error);
    }
    Ok(record.overlay)
}

/// Makes the overlay, where the mirror has none: one that was never flushed is gone with the host.
fn serve(shared: &Shared, record: &FileRecord) -> Result<()> {
    let base = record.base()?;
    let below = Below::Version(record.version.clone());
    shared.mirror.add_overlay(record.overlay, &counted_as(record.id), base.size, base.block_size, below)
}

/// Runs `change` on a file with the locks of its blob and of `other` held.
fn change<T>(
    shared: &Arc<Shared>,
    overlay: u64,
    other: Option<&str>,
    change: impl FnOnce(FileRecord) -> Result<T>,
) -> Result<T> {
    loop {
        let record = shared.files.get(overlay)?;
        let mut names = vec![record.blob.as_str()];
        names.extend(other.filter(|o| *o != record.blob));
        // One order for all.
        names.sort_unstable();
        let locks: Vec<_> = names.iter().map(|name| shared.files.lock_of(name)).collect();
        let _held: Vec<_> = locks.iter().map(|lock| lock.lock().expect("no holder panics")).collect();
        // It may have become another blob's while this waited.
        let now = shared.files.get(overlay)?;
        if now.blob == record.blob {
            return change(now);
        }
    }
}

/// Makes the local changes the next version of the blob; its number, or that of the version the file stands on where
/// nothing was changed.
fn commit(shared: &Arc<Shared>, overlay: u64, token: Option<&str>) -> Result<u64> {
    change(shared, overlay, None, |mut record| {
        if let Some(number) = record.answered(token) {
            return Ok(number);
        }
        adopt(shared, &mut record)?;
        if let Some(number) = record.answered(token) {
            return Ok(number);
        }
        let blob = shared.store.blob(&record.blob)?;
        check_base(&record, &blob)?;
        record.asked = token.map(str::to_owned);
        keep(shared, &record)?;
        // The first takes long and lets writers on; the second makes the mark durable.
        shared.mirror.flush(overlay)?;
        let view = shared.home.new_id()?;
        shared.mirror.mark(overlay, view)?;
        shared.mirror.flush(overlay)?;
        let base = record.base()?;
        let chain = uncommitted(shared, overlay)?;
        let merged = Merged::of(&chain.layers, base.size)?;
        let (number, version) = if merged.is_empty() {
            (record.number, base)
        } else {
            blob.commit_onto(record.number, &changes_of(&merged)).map_err(|e| behind(&record, e))?
        };
        settle(shared, &mut record, chain.top, number, version)?;
        Ok(number)
    })
}

fn changes_of(merged: &Merged) -> Changes<'_> {
    let (written, zeroed) = (&merged.written, &merged.zeroed);
    Changes { written, zeroed, source: merged, threads: 2, progress: None, cancel: None }
}

/// Refuses a commit behind whose base others have published, before anything is frozen for it.
fn check_base(record: &FileRecord, blob: &store::blob::Blob<'_>) -> Result<()> {
    let (latest, version) = blob.latest()?;
    if latest != record.number {
        return Err(behind(record, store::Error::HeadChanged { head: String::new(), found: "" }));
    }
    if version.to_string() != record.version {
        return Err(Error::Conflict(format!(
            "blob {} was made anew under its name; clone the mirrored file to keep its changes",
            record.blob
        )));
    }
    Ok(())
}

fn behind(record: &FileRecord, error: store::Error) -> Error {
    match error {
        store::Error::HeadChanged { .. } => Error::Conflict(format!(
            "{} is not the latest version of its blob any more, and changes made to it cannot follow another; make the \
             mirrored file one of a new blob (`offshoot blob clone PATH NEW-NAME`) and commit it there",
            record.name()
        )),
        error => error.into(),
    }
}

/// The frozen views of a file that are not in the store.
struct Chain {
    /// From the lowest to the uppermost.
    layers: Vec<mirror::control::ViewChanges>,
    /// The uppermost.
    top: Option<u64>,
}

/// Found by walking down from the overlay: what the mirror has, and not what somebody meant to do.
fn uncommitted(shared: &Shared, overlay: u64) -> Result<Chain> {
    let listing = shared.mirror.list()?;
    let found = listing.overlays.iter().find(|o| o.id == overlay);
    let mut below = found.ok_or_else(|| Error::Mirror(format!("has no overlay {overlay:016x}")))?.below.clone();
    let mut chain = Chain { layers: Vec::new(), top: None };
    while let Below::View(view) = below {
        let changes = shared.mirror.view(view)?;
        if changes.committed {
            break;
        }
        chain.top = chain.top.or(Some(view));
        let listed = listing.views.iter().find(|v| v.id == view);
        below = listed.ok_or_else(|| Error::Mirror(format!("has no view {view:016x}")))?.below.clone();
        chain.layers.insert(0, changes);
    }
    Ok(chain)
}

/// Brings a commit or a clone to its end that a death cut off behind the publication.
fn adopt(shared: &Arc<Shared>, record: &mut FileRecord) -> Result<()> {
    if let Some(view) = record.settling {
        let there = shared.mirror.list()?.views.iter().any(|v| v.id == view);
        if there {
            shared.mirror.set_view_committed(view, &record.version)?;
        }
        record.settling = None;
        keep(shared, record)?;
    }
    if let Some(name) = record.cloning.clone() {
        match shared.store.blob(&name) {
            Ok(blob) if is_own_clone(record, &blob)? => move_to(shared, record, &name)?,
            Ok(_) | Err(store::Error::NotFound { .. }) => {
                record.cloning = None;
                keep(shared, record)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let blob = match shared.store.blob(&record.blob) {
        Err(store::Error::NotFound { .. }) => return Ok(()),
        blob => blob?,
    };
    if blob.latest()?.0 <= record.number {
        return Ok(());
    }
    let chain = uncommitted(shared, record.overlay)?;
    let base = record.base()?;
    let merged = Merged::of(&chain.layers, base.size)?;
    let next = match blob.version(At::Number(record.number + 1)) {
        Err(store::Error::NotFound { .. }) => return Ok(()),
        next => next?,
    };
    if !merged.is_empty() && shared.store.begin().commit(&base, &changes_of(&merged))?.0 == next.1 {
        settle(shared, record, chain.top, next.0, next.1)?;
    }
    Ok(())
}

/// The file stands on `version` from now on, which is what its view `view` shows.
fn settle(
    shared: &Arc<Shared>,
    record: &mut FileRecord,
    view: Option<u64>,
    number: u64,
    version: Version,
) -> Result<()> {
    let before = record.base()?;
    pin(shared, record.id, &[version, before])?;
    record.number = number;
    record.version = version.to_string();
    record.settling = view;
    record.done = record.asked.take().map(|token| (token, number));
    keep(shared, record)?;
    if let Some(view) = view {
        shared.mirror.set_view_committed(view, &record.version)?;
    }
    record.settling = None;
    keep(shared, record)?;
    pin(shared, record.id, &[version])?;
    tell(shared)
}

/// Makes the file one of a new blob, which begins as the version it stands on; local changes stay as they are.
fn clone(shared: &Arc<Shared>, overlay: u64, name: &str, token: Option<&str>) -> Result<u64> {
    change(shared, overlay, Some(name), |mut record| {
        if let Some(number) = record.answered(token) {
            return Ok(number);
        }
        adopt(shared, &mut record)?;
        if let Some(number) = record.answered(token) {
            return Ok(number);
        }
        match shared.store.blob(name) {
            Err(store::Error::NotFound { .. }) => {}
            Ok(_) => return Err(Error::Conflict(format!("{name} is there already"))),
            Err(error) => return Err(error.into()),
        }
        record.cloning = Some(name.to_owned());
        record.asked = token.map(str::to_owned);
        keep(shared, &record)?;
        let origin = Origin { blob: record.blob.clone(), number: record.number };
        if let Err(error) = shared.store.create_blob_of(name, record.base()?, Some(&origin)) {
            record.cloning = None;
            keep(shared, &record)?;
            return Err(match error {
                store::Error::HeadChanged { .. } => Error::Conflict(format!("{name} is there already")),
                error => error.into(),
            });
        }
        move_to(shared, &mut record, name)?;
        Ok(0)
    })
}

fn is_own_clone(record: &FileRecord, blob: &store::blob::Blob<'_>) -> Result<bool> {
    let info = blob.info()?;
    let of_ours = info.origin.is_some_and(|o| o.blob == record.blob && o.number == record.number);
    Ok(of_ours && info.latest == 0)
}

fn move_to(shared: &Arc<Shared>, record: &mut FileRecord, name: &str) -> Result<()> {
    name.clone_into(&mut record.blob);
    record.number = 0;
    record.cloning = None;
    record.done = record.asked.take().map(|token| (token, 0));
    keep(shared, record)?;
    tell(shared)
}

/// Forgets files that nobody has open and nobody changed.
pub(crate) fn prune(shared: &Arc<Shared>) -> Result<()> {
    for record in shared.files.all() {
        let lock = shared.files.lock_of(&record.blob);
        // Who is at work with it needs it.
        let Ok(_blob) = lock.try_lock() else { continue };
        let Ok(record) = shared.files.get(record.overlay) else { continue };
        withdraw(shared, &record, false)?;
    }
    Ok(())
}

/// Pins what is open of a blob, about to lose `number` or all of it, and lets nobody open that any more; then deletes.
pub(crate) fn deleting<T>(
    shared: &Arc<Shared>,
    blob: &str,
    number: Option<u64>,
    delete: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let lock = shared.files.lock_of(blob);
    let _blob = lock.lock().expect("no holder panics");
    for record in shared.files.all() {
        let concerned = record.blob == blob && number.is_none_or(|n| n == record.number);
        if !concerned {
            continue;
        }
        if !withdraw(shared, &record, false)? {
            return Err(Error::Conflict(format!(
                "{} is open for writing or has changes that are not committed, at {}; close it and commit them, or \
                 `offshoot blob discard {}`",
                record.name(),
                mirror::version_path(shared.home.root(), &record.blob, record.number).display(),
                record.name()
            )));
        }
    }
    let opens = shared.mirror.bar(blob, number)?;
    let deleted = pin_open(shared, &opens, blob, number).and_then(|()| delete());
    shared.mirror.lift(Some((blob.to_owned(), number)))?;
    deleted
}

fn pin_open(shared: &Shared, opens: &Opens, blob: &str, number: Option<u64>) -> Result<()> {
    for open in opens.versions.iter().filter(|o| o.blob == blob && number.is_none_or(|n| n == o.number)) {
        let Ok(version) = open.version.parse::<Version>() else { continue };
        let manifest = Manifest { versions: [("open".to_owned(), version)].into(), meta: String::new() };
        shared.store.begin().publish(&open_pin(shared, open.node), Expect::Any, &manifest)?;
    }
    Ok(())
}

fn open_pin(shared: &Shared, node: u64) -> String {
    format!("{}{OPEN_PIN}{node:016x}", shared.own_heads("pin"))
}

/// The pins of versions that are open now.
pub(crate) fn open_pins(shared: &Shared) -> Result<Vec<String>> {
    Ok(shared.mirror.opens()?.versions.iter().map(|open| open_pin(shared, open.node)).collect())
}

/// Brings the mirror to what is on record, and to its end what a death cut off.
pub(crate) fn recover(shared: &Arc<Shared>) -> Result<()> {
    shared.mirror.lift(None)?;
    let dir = shared.home.path("files");
    for entry in std::fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
        let path = entry.map_err(Error::io("list", &dir))?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        match record::load::<FileRecord>(&path) {
            Ok(record) => {
                shared.files.records.lock().expect("no holder panics").insert(record.overlay, record.clone());
                if let Err(error) = serve(shared, &record) {
                    log::error!("mirrored file {} is not served: {error}", record.name());
                }
            }
            Err(error) => log::error!("{error}"),
        }
    }
    tell(shared)?;
    for mut record in shared.files.all() {
        // What cannot be finished now is when its file is committed next.
        if let Err(error) = adopt(shared, &mut record) {
            log::error!("mirrored file {}: {error}", record.name());
        }
    }
    Ok(())
}
