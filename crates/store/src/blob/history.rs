//! What a blob's head says: the latest version, the versions before it, and the log.
//!
//! The history is kept as blobs of its own, so that reference counts, verification, collection and transfers know
//! nothing of it. An *epoch* is a sparse blob of *slots*, each as large as the tallest version in it: version `n` is
//! the subtree that stands at the start of slot `n - first`. So entering a version makes one path of nodes, finding one
//! walks one path, and a slot costs nothing where a version is zero or was deleted. The tree grows with the number of
//! versions, four bits of it a level. Only a version taller than its epoch, or one for which an epoch has no room
//! within 2^62 bytes, starts another epoch; heights are few, so there are few epochs.
//!
//! The latest version is in no slot: the head names it, and it enters the history when another follows. A clone
//! therefore is a head and nothing else. The log is a blob of records of 64 bytes, one for each version, written when
//! the first version follows the one that the blob was made with.
//!
//! Names of blocks and nodes stand in no content, only in trees: a transfer into another store, whose names differ,
//! moves a history as it moves any other blob.

use super::At;
use crate::error::Error;
use crate::head::Manifest;
use crate::name::{Name, Version};
use crate::read::tree_of;
use crate::store::Store;
use crate::transaction::Transaction;
use crate::tree::{self, Tree};
use base::ByteRange;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

const FORMAT: u32 = 1;
/// What the head calls its versions.
pub(crate) const LATEST: &str = "latest";
const LOG: &str = "log";
const EPOCH: &str = "history.";
/// Epochs of one blob at most.
const EPOCHS_MAX: usize = 16;
/// The lowest height of an epoch: a blob that grows from nothing should not start several.
const EPOCH_HEIGHT_MIN: u8 = 4;
/// Up to this height a blob that outgrew an epoch gets one with room to grow once more.
const GROWING_MAX: u8 = 6;
/// No epoch is larger than this many bytes.
const EPOCH_BYTES_MAX: u64 = 1 << 62;
/// Tags of one blob at most; they stand in its head.
const TAGS_MAX: usize = 1000;
/// Blocks of the log: small, for each version changes one.
const LOG_BLOCK: u32 = 512;
/// Bytes of a record of the log.
const RECORD: u64 = 64;
const DELETED: u8 = 1;

/// What made a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// The blob was created: version 0, all zero.
    Create,
    /// The blob was cloned: version 0 is a version of another blob.
    Clone,
    /// Bytes were written at offsets, or made zero.
    Write,
    /// Bytes were added at the end.
    Append,
    /// The size was changed.
    Resize,
}

const CHANGES: [Change; 5] = [Change::Create, Change::Clone, Change::Write, Change::Append, Change::Resize];

/// One line of a blob's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct LogEntry {
    /// The version's number.
    pub number: u64,
    /// When it was published, in milliseconds since 1970.
    pub time_ms: u64,
    /// Its size in bytes.
    pub size: u64,
    /// The version that its writer saw; others may have been published between the two.
    pub parent: u64,
    /// What made it.
    pub change: Change,
    /// Bytes written, added, made zero or cut off.
    pub bytes: u64,
    /// It was deleted and cannot be read.
    pub deleted: bool,
}

impl LogEntry {
    pub(crate) fn encode(&self) -> [u8; RECORD as usize] {
        let mut out = [0; RECORD as usize];
        for (at, value) in [self.time_ms, self.size, self.parent, self.bytes].into_iter().enumerate() {
            out[8 * at..8 * at + 8].copy_from_slice(&value.to_le_bytes());
        }
        // One is added, so that no record is all zero.
        out[32] = CHANGES.iter().position(|change| *change == self.change).expect("all are listed") as u8 + 1;
        out[33] = if self.deleted { DELETED } else { 0 };
        out
    }

    /// Reads what [`LogEntry::encode`] wrote; `None` for anything else.
    pub(crate) fn decode(number: u64, bytes: &[u8; RECORD as usize]) -> Option<Self> {
        let value = |at: usize| u64::from_le_bytes(bytes[8 * at..8 * at + 8].try_into().expect("eight bytes"));
        let change = *CHANGES.get(usize::from(bytes[32]).checked_sub(1)?)?;
        let known = bytes[33] & !DELETED == 0 && bytes[34..].iter().all(|byte| *byte == 0);
        known.then_some(Self {
            number,
            time_ms: value(0),
            size: value(1),
            parent: value(2),
            change,
            bytes: value(3),
            deleted: bytes[33] & DELETED != 0,
        })
    }
}

/// The version that a clone began with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The blob it was cloned from.
    pub blob: String,
    /// The version's number there.
    pub number: u64,
}

/// The description in a blob's head.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Meta {
    format: u32,
    /// Random: tells a blob from one made later under its name.
    id: String,
    /// The number that the next version gets.
    next: u64,
    created_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    origin: Option<Origin>,
    /// Height and first number of each epoch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    epochs: Vec<(u8, u64)>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    tags: BTreeMap<String, u64>,
}

/// A part of the history whose slots are of one height.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    height: u8,
    first: u64,
    slots: Version,
}

impl Epoch {
    fn slot_bytes(&self) -> u64 {
        u64::from(self.slots.block_size) << (4 * u32::from(self.height))
    }

    fn has_room(&self, number: u64, version: &Version) -> bool {
        version.height() <= self.height && number - self.first < EPOCH_BYTES_MAX / self.slot_bytes()
    }

    /// Whether it can have the version `number`, if that is of `height`.
    fn has_slot(&self, number: u64, height: u8) -> bool {
        let slots = self.slots.size / self.slot_bytes();
        height <= self.height && number.checked_sub(self.first).is_some_and(|slot| slot < slots)
    }

    /// Where the version `number` of `height` stands: its place among the subtrees of that height.
    fn place(&self, number: u64, height: u8) -> u64 {
        (number - self.first) << (4 * u32::from(self.height - height))
    }
}

/// The state of a blob that its head publishes.
#[derive(Clone, Debug)]
pub(crate) struct State {
    name: String,
    meta: Meta,
    latest: Version,
    log: Version,
    epochs: Vec<Epoch>,
    /// What is to be entered into the history; `None`: deleted.
    entering: BTreeMap<u64, Option<Version>>,
    /// Records to be written.
    records: BTreeMap<u64, LogEntry>,
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl State {
    /// A blob whose version 0 is `latest`.
    pub(crate) fn new(store: &Store, name: &str, latest: Version, origin: Option<Origin>) -> Result<Self, Error> {
        let id: [u8; 8] = crate::store::random_bytes().map_err(|error| Error::io("read", "/dev/urandom", error))?;
        let meta = Meta {
            format: FORMAT,
            id: format!("{:016x}", u64::from_le_bytes(id)),
            next: 1,
            created_ms: now_ms(),
            origin,
            epochs: Vec::new(),
            tags: BTreeMap::new(),
        };
        let log = store.empty(0, LOG_BLOCK);
        let (entering, records) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { name: name.to_owned(), meta, latest, log, epochs: Vec::new(), entering, records })
    }

    /// Reads what [`State::manifest`] made.
    pub(crate) fn decode(name: &str, manifest: &Manifest) -> Result<Self, Error> {
        let corrupt =
            |what: String| Error::Corrupt { object: crate::head::object(&super::head(name)), offset: 0, what };
        let meta: Meta = serde_json::from_str(&manifest.meta)
            .map_err(|error| corrupt(format!("its description is not that of a blob: {error}")))?;
        let version = |called: &str| {
            let found = manifest.versions.get(called).copied();
            found.ok_or_else(|| corrupt(format!("it names no version `{called}`")))
        };
        let (latest, log) = (version(LATEST)?, version(LOG)?);
        let mut epochs = Vec::with_capacity(meta.epochs.len());
        for (at, (height, first)) in meta.epochs.iter().enumerate() {
            let epoch = Epoch { height: *height, first: *first, slots: version(&epoch_name(at))? };
            let ascends = epochs.last().is_none_or(|last: &Epoch| last.first < epoch.first);
            let sound = (1..tree::HEIGHT_MAX).contains(height)
                && 4 * u32::from(*height) <= 30 + latest.block_size.leading_zeros()
                && epoch.slots.block_size == latest.block_size
                && epoch.slots.size.is_multiple_of(epoch.slot_bytes());
            if !ascends || !sound || epoch.first >= meta.next {
                return Err(corrupt(format!("its epoch {at} cannot be")));
            }
            epochs.push(epoch);
        }
        let logged = if meta.next == 1 { Some(0) } else { meta.next.checked_mul(RECORD) };
        if meta.format != FORMAT || meta.next == 0 || epochs.len() > EPOCHS_MAX || Some(log.size) != logged {
            return Err(corrupt("its description is not that of a blob of format 1".to_owned()));
        }
        let (entering, records) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { name: name.to_owned(), meta, latest, log, epochs, entering, records })
    }

    /// The manifest of this state, with the nodes of its history and log made by `tx`.
    pub(crate) fn manifest(&mut self, tx: &Transaction<'_>) -> Result<Manifest, Error> {
        self.enter_history(tx)?;
        self.write_log(tx)?;
        self.meta.epochs = self.epochs.iter().map(|epoch| (epoch.height, epoch.first)).collect();
        let mut versions = BTreeMap::from([(LATEST.to_owned(), self.latest), (LOG.to_owned(), self.log)]);
        versions.extend(self.epochs.iter().enumerate().map(|(at, epoch)| (epoch_name(at), epoch.slots)));
        let meta = serde_json::to_string(&self.meta).expect("numbers and strings always serialize");
        Ok(Manifest { versions, meta })
    }

    fn enter_history(&mut self, tx: &Transaction<'_>) -> Result<(), Error> {
        let entering = std::mem::take(&mut self.entering);
        let mut at = 0;
        let entering: Vec<(u64, Option<Version>)> = entering.into_iter().collect();
        while at < entering.len() {
            let epoch = match &entering[at] {
                (number, Some(version)) => self.epoch_for(tx.store, *number, version)?,
                // Deleted together with its publication, before there was any history.
                (number, None) if self.epochs.first().is_none_or(|epoch| *number < epoch.first) => {
                    at += 1;
                    continue;
                }
                (number, None) => self.epoch_of(*number),
            };
            let ours = |(number, version): &(u64, Option<Version>)| match version {
                Some(version) => self.epoch_of(*number) == epoch && self.epochs[epoch].has_room(*number, version),
                None => self.epoch_of(*number) == epoch,
            };
            let end = entering[at..].iter().position(|entry| !ours(entry)).map_or(entering.len(), |found| at + found);
            self.epochs[epoch].slots = enter(tx, &self.epochs[epoch], &entering[at..end])?;
            at = end;
        }
        Ok(())
    }

    /// Which epoch has the number, though perhaps not the room.
    fn epoch_of(&self, number: u64) -> usize {
        self.epochs.partition_point(|epoch| epoch.first <= number).saturating_sub(1)
    }

    /// The epoch for a version about to be entered: another one where the last has no room.
    fn epoch_for(&mut self, store: &Store, number: u64, version: &Version) -> Result<usize, Error> {
        if self.epochs.last().is_none_or(|last| !last.has_room(number, version)) {
            if self.epochs.len() == EPOCHS_MAX {
                return Err(Error::Invalid(format!(
                    "the history of blob `{}` has no room for more versions of {} bytes; go on with a clone of it",
                    self.name, version.size
                )));
            }
            let height = match self.epochs.last() {
                None => version.height().max(EPOCH_HEIGHT_MIN),
                // It grew: it may grow again.
                Some(last) if version.height() > last.height && version.height() <= GROWING_MAX => version.height() + 1,
                Some(_) => version.height(),
            };
            self.epochs.push(Epoch { height, first: number, slots: store.empty(0, version.block_size) });
        }
        Ok(self.epochs.len() - 1)
    }

    fn write_log(&mut self, tx: &Transaction<'_>) -> Result<(), Error> {
        let records = std::mem::take(&mut self.records);
        if records.is_empty() {
            return Ok(());
        }
        self.log = tx.resized(&self.log, self.meta.next * RECORD)?;
        let ranges: Vec<ByteRange> = records.keys().map(|number| ByteRange::at(number * RECORD, RECORD)).collect();
        self.log = tx.patch(&self.log, &ranges, &Records(&records), 1)?.0;
        Ok(())
    }

    /// Publishes `version` as the next one; its number.
    pub(crate) fn push(&mut self, version: Version, parent: u64, change: Change, bytes: u64) -> u64 {
        let number = self.meta.next;
        if number == 1 {
            self.records.insert(0, self.first_entry());
        }
        self.entering.insert(number - 1, Some(self.latest));
        self.latest = version;
        self.meta.next += 1;
        let (time_ms, size) = (now_ms(), version.size);
        self.records.insert(number, LogEntry { number, time_ms, size, parent, change, bytes, deleted: false });
        number
    }

    fn first_entry(&self) -> LogEntry {
        LogEntry {
            number: 0,
            time_ms: self.meta.created_ms,
            size: self.latest.size,
            parent: 0,
            change: if self.meta.origin.is_some() { Change::Clone } else { Change::Create },
            bytes: 0,
            deleted: false,
        }
    }

    /// Deletes a version.
    pub(crate) fn delete(&mut self, store: &Store, number: u64) -> Result<(), Error> {
        if number == self.number() {
            return Err(Error::Invalid(format!(
                "version {number} of blob `{}` is its latest; write another one first, or delete the blob",
                self.name
            )));
        }
        if let Some((tag, _)) = self.meta.tags.iter().find(|(_, tagged)| **tagged == number) {
            return Err(Error::Invalid(format!(
                "version {number} of blob `{}` is tagged `{tag}`; remove its tags first",
                self.name
            )));
        }
        let entry = self.readable(store, number)?;
        self.entering.insert(number, None);
        self.records.insert(number, LogEntry { deleted: true, ..entry });
        Ok(())
    }

    /// Names a version that can be read.
    pub(crate) fn tag(&mut self, store: &Store, number: u64, tag: &str) -> Result<(), Error> {
        crate::head::check_name(tag)?;
        self.readable(store, number)?;
        if self.meta.tags.len() >= TAGS_MAX && !self.meta.tags.contains_key(tag) {
            return Err(Error::Invalid(format!("blob `{}` has {TAGS_MAX} tags, the most there may be", self.name)));
        }
        self.meta.tags.insert(tag.to_owned(), number);
        Ok(())
    }

    /// Removes a tag; the number it stood for.
    pub(crate) fn untag(&mut self, tag: &str) -> Result<u64, Error> {
        let found = self.meta.tags.remove(tag);
        found.ok_or_else(|| Error::NotFound { what: format!("tag `{tag}` of blob `{}`", self.name) })
    }

    pub(crate) fn id(&self) -> &str {
        &self.meta.id
    }

    /// The number of the latest version.
    pub(crate) fn number(&self) -> u64 {
        self.meta.next - 1
    }

    /// The latest version.
    pub(crate) fn latest(&self) -> Version {
        self.latest
    }

    pub(crate) fn tags(&self) -> &BTreeMap<String, u64> {
        &self.meta.tags
    }

    pub(crate) fn origin(&self) -> Option<&Origin> {
        self.meta.origin.as_ref()
    }

    pub(crate) fn created_ms(&self) -> u64 {
        self.meta.created_ms
    }

    /// The number and version that `at` means.
    pub(crate) fn version(&self, store: &Store, at: At) -> Result<(u64, Version), Error> {
        let number = match at {
            At::Latest => return Ok((self.number(), self.latest)),
            At::Number(number) if number == self.number() => return Ok((number, self.latest)),
            At::Number(number) => number,
        };
        let entry = self.readable(store, number)?;
        let blank = store.empty(entry.size, self.latest.block_size);
        let height = blank.height();
        let slot = self.epochs.get(self.epoch_of(number)).filter(|epoch| epoch.has_slot(number, height));
        let epoch = slot.ok_or_else(|| Error::Corrupt {
            object: crate::head::object(&super::head(&self.name)),
            offset: 0,
            what: format!("its history has no place for version {number} of {} bytes", entry.size),
        })?;
        let tree = tree_of(&epoch.slots);
        if tree.name.is_none() {
            return Ok((number, blank));
        }
        let found = store.refreshed(|| tree::subtree(store, tree, height, epoch.place(number, height)))?;
        Ok((number, Version { root: found.name.unwrap_or(blank.root), ..blank }))
    }

    /// The entry of a version that was not deleted.
    fn readable(&self, store: &Store, number: u64) -> Result<LogEntry, Error> {
        let missing = |why: &str| Error::NotFound { what: format!("version {number} of blob `{}`{why}", self.name) };
        if number >= self.meta.next {
            return Err(missing(""));
        }
        match self.entry(store, number)? {
            entry if entry.deleted => Err(missing(": it was deleted")),
            entry => Ok(entry),
        }
    }

    fn entry(&self, store: &Store, number: u64) -> Result<LogEntry, Error> {
        match self.records.get(&number) {
            Some(entry) => Ok(*entry),
            None => Ok(self.entries(store, number..number + 1)?[0]),
        }
    }

    /// The log of the versions in `range`, less those not there yet.
    pub(crate) fn entries(&self, store: &Store, range: std::ops::Range<u64>) -> Result<Vec<LogEntry>, Error> {
        let range = range.start..range.end.min(self.meta.next);
        if range.is_empty() {
            return Ok(Vec::new());
        }
        if self.meta.next == 1 {
            return Ok(vec![self.first_entry()]);
        }
        let mut bytes = vec![0; ((range.end - range.start) * RECORD) as usize];
        store.read_at(&self.log, range.start * RECORD, &mut bytes)?;
        let records = range.zip(bytes.chunks_exact(RECORD as usize));
        let decoded = records.map(|(number, record)| {
            let record = record.try_into().expect("whole records");
            LogEntry::decode(number, record).ok_or_else(|| Error::Corrupt {
                object: crate::head::object(&super::head(&self.name)),
                offset: number * RECORD,
                what: format!("record {number} of its log is none"),
            })
        });
        decoded.collect()
    }
}

fn epoch_name(at: usize) -> String {
    format!("{EPOCH}{at:02}")
}

/// The history of an epoch with more versions in it, or without some.
fn enter(tx: &Transaction<'_>, epoch: &Epoch, entering: &[(u64, Option<Version>)]) -> Result<Version, Error> {
    let last = entering.last().expect("something to enter").0;
    // Two slots at least: a slot is a subtree of a tree that is taller.
    let size = epoch.slots.size.max((last - epoch.first + 1).max(2) * epoch.slot_bytes());
    let blank = tx.store.empty(size, epoch.slots.block_size);
    let tree = tx.lift(tree_of(&epoch.slots), blank.height())?;
    let done = tx.sweep(tree, |sweep| {
        for (number, version) in entering {
            match version {
                Some(version) => sweep.graft(tree_of(version), epoch.place(*number, version.height()))?,
                None => sweep.graft(Tree { name: None, height: epoch.height }, number - epoch.first)?,
            }
        }
        Ok(())
    })?;
    Ok(Version { root: done.name.unwrap_or(Name::zero(done.height)), ..blank })
}

/// The records to be written, where the log has them.
struct Records<'a>(&'a BTreeMap<u64, LogEntry>);

impl crate::BlockSource for Records<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let (number, inside) = (offset / RECORD, (offset % RECORD) as usize);
        let record = self.0.get(&number).ok_or(std::io::ErrorKind::NotFound)?.encode();
        buf.copy_from_slice(&record[inside..inside + buf.len()]);
        Ok(())
    }
}
