//! Verification: every pack and everything that heads reach, read and checked, each fault with its place.

use crate::catalog::Location;
use crate::engine::Etag;
use crate::engine::Object;
use crate::error::Error;
use crate::frame::{self, Frame, FrameInfo, Kind};
use crate::head::{self, Manifest};
use crate::name::{Name, Version};
use crate::pack::{HEADER_BYTES, Index, PackId};
use crate::store::{Mode, Store};
use crate::tree::{self, Nodes as _};
use base::ByteRange;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

/// Faults listed; beyond it they are only counted.
const FAULTS_MAX: usize = 10_000;

/// Something that is not as it was written, and what it affects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// The head whose content is affected; `None` where no head needs it.
    pub head: Option<String>,
    /// Which of its versions.
    pub blob: Option<String>,
    /// Offset of the block in the blob, or of the first byte below the node.
    pub offset: Option<u64>,
    /// The file: pack, index or head.
    pub pack: Option<String>,
    /// Where in that file.
    pub pack_offset: Option<u64>,
    /// What is wrong.
    pub what: String,
}

impl Fault {
    /// The fault that an error tells of.
    pub(crate) fn of_error(head: Option<&str>, blob: Option<&str>, offset: Option<u64>, error: &Error) -> Self {
        let (pack, pack_offset) = match error {
            Error::Corrupt { object, offset, .. } => (Some(object.clone()), Some(*offset)),
            Error::Io { object, .. } => (Some(object.clone()), None),
            _ => (None, None),
        };
        let what = match error {
            Error::Corrupt { what, .. } => what.clone(),
            other => std::error::Error::source(other).map_or(other.to_string(), |source| format!("{other}: {source}")),
        };
        Self { head: head.map(str::to_owned), blob: blob.map(str::to_owned), offset, pack, pack_offset, what }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(head) = &self.head {
            write!(f, "head `{head}`")?;
            self.blob.iter().try_for_each(|blob| write!(f, ", blob `{blob}`"))?;
            self.offset.iter().try_for_each(|offset| write!(f, ", offset {offset:#x}"))?;
            f.write_str(": ")?;
        }
        f.write_str(&self.what)?;
        if let Some(pack) = &self.pack {
            write!(f, " ({pack}")?;
            self.pack_offset.iter().try_for_each(|offset| write!(f, " at byte {offset}"))?;
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// What a verification looked at and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Packs read.
    pub packs: u64,
    /// Frames read.
    pub frames: u64,
    /// Blocks checked against their names.
    pub blocks: u64,
    /// Nodes checked against their names.
    pub nodes: u64,
    /// Heads followed.
    pub heads: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong, at most 10,000 entries.
    pub faults: Vec<Fault>,
    /// How many faults there are.
    pub faults_total: u64,
}

impl Report {
    fn add(&mut self, fault: Fault) {
        self.faults_total += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        }
    }
}

/// Items that are bad, with what is wrong; `used` once a head was found to need it.
#[derive(Default)]
struct Bad {
    items: HashMap<Location, (Fault, bool)>,
    packs: HashMap<u32, (Fault, bool)>,
    /// Faults of packs this process does not know.
    others: Vec<Fault>,
}

impl Bad {
    fn at(&mut self, location: Location) -> Option<&Fault> {
        let found = match self.items.get_mut(&location) {
            Some(found) => found,
            None => self.packs.get_mut(&location.pack)?,
        };
        found.1 = true;
        Some(&found.0)
    }
}

impl Store {
    /// Reads and checks every pack and everything that heads reach. `progress` is told bytes done and in all.
    ///
    /// # Errors
    /// The folders cannot be listed. Everything else that is wrong is in the report.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, Error> {
        // A collection of this process would give up frames under our eyes.
        let _quiet = self.collecting.lock().expect("no panic while collecting");
        if self.mode != Mode::ReadWrite {
            self.refresh(true)?;
        }
        let mut report = Report::default();
        let mut bad = Bad::default();
        self.verify_packs(&mut report, &mut bad, progress)?;
        self.verify_heads(&mut report, &mut bad)?;
        let unused = bad.items.into_values().chain(bad.packs.into_values()).filter(|(_, used)| !used);
        let mut unused: Vec<Fault> = unused.map(|(fault, _)| fault).chain(bad.others).collect();
        unused.sort_unstable_by(|a, b| (&a.pack, a.pack_offset).cmp(&(&b.pack, b.pack_offset)));
        unused.into_iter().for_each(|fault| report.add(fault));
        Ok(report)
    }

    fn verify_packs(
        &self,
        report: &mut Report,
        bad: &mut Bad,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        let files = self.engine.list("packs").map_err(|error| Error::io("list", "packs", error))?;
        let mut ids: Vec<PackId> = files.iter().filter_map(|f| PackId::parse(f)).map(|(id, _)| id).collect();
        ids.sort_unstable();
        ids.dedup();
        let handles: HashMap<PackId, u32> = self.catalog.packs().into_iter().map(|p| (p.id, p.handle)).collect();
        let size = |id: &PackId| self.engine.open(&id.pack_object()).and_then(|o| o.size()).unwrap_or(0);
        let total: u64 = ids.iter().map(size).sum();
        for id in ids {
            let handle = handles.get(&id).copied();
            if let Err(error) = self.verify_pack(id, handle, report, bad, &mut |done| progress(done, total)) {
                let fault = Fault::of_error(None, None, None, &error);
                match handle {
                    Some(handle) => drop(bad.packs.insert(handle, (fault, false))),
                    None => bad.others.push(fault),
                }
            }
        }
        Ok(())
    }

    /// An error concerns the whole pack; what is wrong with single items goes into `bad`.
    fn verify_pack(
        &self,
        id: PackId,
        handle: Option<u32>,
        report: &mut Report,
        bad: &mut Bad,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        // A pack without an index is one that a publication is about to finish, or the remains of one.
        let Some(index) = self.read_index(id)? else { return Ok(()) };
        let name = id.pack_object();
        let corrupt = |offset, what: &str| Error::Corrupt { object: name.clone(), offset, what: what.to_owned() };
        let object = match self.engine.open(&name) {
            Ok(object) => object,
            // The writer removed the pack meanwhile.
            Err(_) if self.read_index(id)?.is_none() => return Ok(()),
            Err(error) => return Err(Error::io("open", name, error)),
        };
        report.packs += 1;
        for (number, info, names) in index.items().filter(|(_, info, _)| info.items > 0) {
            for (slot, what) in self.check_frame(&*object, info, names) {
                if self.mode != Mode::ReadWrite && !self.lists(id, number)? {
                    break; // the writer gave the frame up meanwhile
                }
                let offset = u64::from(info.offset);
                let fault = Fault { pack: Some(name.clone()), pack_offset: Some(offset), what, ..Fault::default() };
                match handle {
                    Some(pack) => {
                        let location = Location { pack, frame: number, slot: slot as u8 };
                        bad.items.insert(location, (fault, false));
                    }
                    None => bad.others.push(fault),
                }
            }
            report.frames += 1;
            let items = u64::from(info.items);
            if info.kind == Kind::Nodes {
                report.nodes += items
            } else {
                report.blocks += items
            }
            report.bytes += u64::from(info.stored);
            progress(report.bytes);
        }
        let mut header = [0; HEADER_BYTES as usize];
        let readable = object.read_at(0, &mut header).is_ok();
        if !readable || header != id.header() {
            return Err(corrupt(0, "the pack does not start with its header"));
        }
        let len = object.size().map_err(|error| Error::io("read", name.clone(), error))?;
        if len != index.end() {
            return Err(corrupt(len.min(index.end()), &format!("the pack has {len} bytes instead of {}", index.end())));
        }
        Ok(())
    }

    fn lists(&self, id: PackId, number: u32) -> Result<bool, Error> {
        let index: Option<Index> = self.read_index(id)?;
        Ok(index.and_then(|index| index.frames.get(number as usize).copied()).is_some_and(|info| info.items > 0))
    }

    /// The slots of a frame that are bad, with what is wrong.
    fn check_frame(&self, object: &dyn Object, info: &FrameInfo, names: &[Name]) -> Vec<(usize, String)> {
        let all = |what: &str| (0..names.len()).map(|slot| (slot, what.to_owned())).collect();
        let mut stored = vec![0; info.stored as usize];
        let mut read = object.read_at(u64::from(info.offset), &mut stored);
        let range = ByteRange::at(u64::from(info.offset), u64::from(info.stored));
        if read.is_ok() && frame::checksum(&stored) != info.checksum && object.distrust(range) {
            read = object.read_at(u64::from(info.offset), &mut stored);
        }
        if let Err(error) = read {
            return all(&format!("the frame cannot be read: {error}"));
        }
        if frame::checksum(&stored) != info.checksum {
            return all("the frame does not match its checksum");
        }
        let frame = match Frame::decode(info, stored) {
            Ok(frame) => frame,
            Err(what) => return all(&what),
        };
        let fits = |slot: usize, name: &Name| {
            frame.item(slot).is_some_and(|bytes| match info.kind {
                Kind::Nodes => self.keys.node(bytes) == *name,
                Kind::Blocks => self.keys.block(bytes) == *name,
            })
        };
        let wrong = names.iter().enumerate().filter(|(slot, name)| !fits(*slot, name));
        wrong.map(|(slot, name)| (slot, format!("{name} does not match its name"))).collect()
    }

    fn verify_heads(&self, report: &mut Report, bad: &mut Bad) -> Result<(), Error> {
        let mut good = HashSet::new();
        for name in self.heads("")? {
            report.heads += 1;
            let manifest = match head::check_name(&name).and_then(|()| self.head(&name)) {
                Ok(Some((manifest, _))) => manifest,
                Ok(None) => continue,
                Err(error) => {
                    report.add(Fault::of_error(Some(&name), None, None, &error));
                    continue;
                }
            };
            let mut faults = Vec::new();
            for (blob, version) in &manifest.versions {
                let mut walk =
                    Walk { store: self, faults: &mut faults, bad, good: &mut good, head: &name, blob, version };
                if !version.root.is_zero() {
                    walk.subtree(version.root, version.height(), 0);
                }
            }
            // A reader may have followed a head that the writer removed meanwhile.
            let stands = |found: Result<Option<(Manifest, Etag)>, Error>| match found {
                Ok(found) => found.is_some_and(|(now, _)| now == manifest),
                Err(_) => true,
            };
            if faults.is_empty() || self.mode == Mode::ReadWrite || stands(self.head(&name)) {
                faults.into_iter().for_each(|fault| report.add(fault));
            }
        }
        Ok(())
    }
}

/// The way through one version.
struct Walk<'a> {
    store: &'a Store,
    faults: &'a mut Vec<Fault>,
    bad: &'a mut Bad,
    /// Nodes below which everything is well: met again, they need no second look.
    good: &'a mut HashSet<Name>,
    head: &'a str,
    blob: &'a str,
    version: &'a Version,
}

impl Walk<'_> {
    /// Whether everything below is well; otherwise it was reported.
    fn subtree(&mut self, name: Name, height: u8, first: u64) -> bool {
        if self.good.contains(&name) {
            return true;
        }
        let kind = if height == 0 { "block" } else { "node" };
        let Some(location) = self.store.catalog.find(&name) else {
            self.fault(first, &Fault { what: Error::Unknown { kind, name }.to_string(), ..Fault::default() });
            return false;
        };
        if let Some(fault) = self.bad.at(location) {
            let fault = fault.clone();
            self.fault(first, &fault);
            return false;
        }
        if height == 0 {
            return true;
        }
        let node: Arc<tree::Node> = match self.store.load(&name, height) {
            Ok(node) => node,
            Err(error) => {
                self.fault(first, &Fault::of_error(None, None, None, &error));
                return false;
            }
        };
        let step = tree::span(height - 1);
        let mut well = true;
        for slot in 0..tree::FANOUT {
            if let Some(child) = node.child(slot) {
                well &= self.subtree(child, height - 1, first + slot as u64 * step);
            }
        }
        if well {
            self.good.insert(name);
        }
        well
    }

    fn fault(&mut self, block: u64, fault: &Fault) {
        let offset = block.saturating_mul(u64::from(self.version.block_size));
        self.faults.push(Fault {
            head: Some(self.head.to_owned()),
            blob: Some(self.blob.to_owned()),
            offset: Some(offset),
            ..fault.clone()
        });
    }
}
