//! Stores that many processes write at once (`Mode::Shared`), none of them special.
//!
//! Nobody counts references there: what is garbage is found by marking (`sweep`). What writers and collectors agree
//! on is one object, the **record** of condemned packs, swapped like a head. It says how long the *grace* G is,
//! which packs are condemned and since when by the server's clock, and which of these are being removed.
//!
//! # Why nothing that a head reaches is ever removed
//!
//! - **LOOK.** A writer *looks* when it begins: it notes its own clock, reads the record, then lists the packs and
//!   forgets those that are gone. It never deduplicates against a condemned pack.
//! - **WINDOW.** It swaps its head within G/2 of its last look, by a clock that runs on while the machine sleeps;
//!   else it looks again and *secures* what it is about to publish: walks it, and stores again what lies in
//!   condemned packs. It walks also where the record was not empty when it looked, and where it cannot know that a
//!   version it builds on was reachable since: whatever is not new and not seen in a head since the look.
//! - **NET.** A swap lands within G/4 of being sent, or never; so does the swap by which a collector condemns,
//!   counted from when it asked for the time. G is an hour by default; requests live seconds.
//! - **MARK.** A collector condemns a pack of which no head reaches anything. It removes one only when, at least G
//!   after it was condemned, it marked anew, from heads that it listed after that, and still nothing was reached.
//!   Any writer that did not see the pack condemned has swapped by 3G/4 after, so that mark sees its head; every
//!   other one does not rely on the pack.
//! - **ONE RECORD.** Before anything is removed, the pack is said to be *being removed* by a swap of the very record
//!   that was read before the mark. So of two collectors one goes first: if another one spared the pack meanwhile,
//!   the swap fails, and if it comes later, it finds that the pack cannot be spared any more, which is right, because
//!   it was condemned without a break for G.
//! - **COPIES.** A name may stand in several packs. A pack counts as reached when it is the newest one holding a
//!   reached name that is not in the record; those in the record count only where there is no other. Every
//!   decision is a swap of the record that it was made on, so a reached name always keeps a copy outside of it.
//! - **DEATH.** A writer that dies leaves packs that nothing reaches; a collector that dies leaves a record that
//!   the next one goes on with. Removing twice does no harm. Nothing younger than G is condemned, so that
//!   writers are not bothered; their safety does not depend on it.

use crate::catalog::Location;
use crate::engine::{Etag, Expect};
use crate::error::Error;
use crate::frame::{self, FRAME_NODES, Kind};
use crate::head::{self, Manifest};
use crate::name::Name;
use crate::pack::PackId;
use crate::store::{Mode, Store};
use crate::transaction::{Appended, Transaction};
use crate::tree::Nodes as _;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// The record's name among the heads; no head's name starts with a dot.
pub(crate) const RECORD: &str = ".condemned";
/// Grace of a store that is made without saying otherwise.
pub(crate) const GRACE_DEFAULT: Duration = Duration::from_secs(3600);
/// Nodes loaded at once while walking.
const WALK_THREADS: usize = 8;
const WALK_BATCH: usize = 512;

/// The record of condemned packs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) grace_ms: u64,
    /// By the id of the pack.
    pub(crate) packs: BTreeMap<String, Condemned>,
}

/// One condemned pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Condemned {
    /// By the server's clock, in milliseconds since 1970.
    pub(crate) since_ms: u64,
    /// It cannot be spared any more.
    pub(crate) removing: bool,
}

impl Record {
    pub(crate) fn get(&self, id: PackId) -> Option<Condemned> {
        self.packs.get(&id.to_string()).copied()
    }
}

/// What a writer saw when it last looked.
#[derive(Default)]
pub(crate) struct Watch {
    /// When it began to look, by [`boot_time`].
    looked: Option<Duration>,
    grace: Duration,
    etag: Option<Etag>,
    /// Some pack was condemned.
    any: bool,
    /// Nodes below which everything was found in packs that were there and not condemned.
    sound: HashSet<Name>,
    /// Roots seen in heads, and when.
    seen: HashMap<Name, Duration>,
}

/// What a transaction knows of its own safety.
#[derive(Default)]
pub(crate) struct Safety {
    /// The look that its window counts from.
    looked: Option<Duration>,
    /// Some pack was condemned then.
    any: bool,
    /// Roots it made on what was reachable since that look.
    made: HashSet<Name>,
}

/// A clock that runs on while the machine sleeps.
pub(crate) fn boot_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec as u32)
}

impl Store {
    pub(crate) fn is_shared(&self) -> bool {
        self.mode == Mode::Shared
    }

    pub(crate) fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().expect("no panic while the watch is locked")
    }

    /// The record and its tag, made where it is absent.
    pub(crate) fn record(&self) -> Result<(Record, Etag), Error> {
        loop {
            let found = self.engine.head(RECORD).map_err(|error| Error::io("read", RECORD, error))?;
            if let Some((bytes, etag)) = found {
                let manifest = Manifest::decode(&bytes, RECORD, &self.keys)?;
                let record = serde_json::from_str(&manifest.meta).map_err(|error| Error::Corrupt {
                    object: RECORD.to_owned(),
                    offset: 0,
                    what: format!("not a record that this release understands: {error}"),
                })?;
                return Ok((record, etag));
            }
            let fresh = Record { grace_ms: self.new_grace.as_millis() as u64, packs: BTreeMap::new() };
            // Where another process is faster, its record counts.
            self.swap_record(&fresh, &Expect::Absent)?;
        }
    }

    /// Swaps the record; its new tag, or `None` where it is not as expected.
    pub(crate) fn swap_record(&self, record: &Record, expect: &Expect) -> Result<Option<Etag>, Error> {
        let meta = serde_json::to_string(record).expect("numbers and strings always serialize");
        let bytes = Manifest { versions: BTreeMap::new(), meta }.encode(RECORD, &self.keys);
        let swapped = self.engine.swap_head(RECORD, expect, &bytes);
        Ok(swapped.map_err(|error| Error::io("publish", RECORD, error))?.ok())
    }

    /// Looks (LOOK), unless the last look is at most `age` old.
    pub(crate) fn look(&self, age: impl Fn(Duration) -> Duration) -> Result<(), Error> {
        let mut watch = self.watch();
        let now = boot_time();
        if watch.looked.is_some_and(|looked| now - looked <= age(watch.grace)) {
            return Ok(());
        }
        if watch.looked.is_none() {
            crate::store::prove(&*self.engine)?;
        }
        let (record, etag) = self.record()?;
        let lost = self.refresh(false)?;
        for pack in self.catalog.packs() {
            pack.condemned.store(record.get(pack.id).is_some(), Ordering::Relaxed);
        }
        if watch.etag.as_ref() != Some(&etag) || lost {
            watch.sound.clear();
        }
        watch.seen.retain(|_, seen| *seen >= now);
        watch.any = !record.packs.is_empty();
        watch.grace = Duration::from_millis(record.grace_ms);
        watch.etag = Some(etag);
        watch.looked = Some(now);
        Ok(())
    }

    /// Notes that a head names these versions now.
    pub(crate) fn note_seen(&self, manifest: &Manifest, when: Duration) {
        if self.is_shared() {
            let mut watch = self.watch();
            watch.seen.extend(manifest.versions.values().map(|version| (version.root, when)));
        }
    }

    /// Whether a name may be relied on without storing it again.
    pub(crate) fn is_safe_to_share(&self, name: &Name) -> bool {
        let pack = self.catalog.find(name).and_then(|location| self.catalog.pack(location.pack));
        pack.is_some_and(|pack| !pack.condemned.load(Ordering::Relaxed))
    }

    /// Walks everything below `roots`, in no order, each name once if `visit` says so: it is told name and height
    /// and decides whether to go on below.
    pub(crate) fn reach(
        &self,
        roots: impl IntoIterator<Item = (Name, u8)>,
        visit: &mut dyn FnMut(&Name, u8) -> bool,
    ) -> Result<(), Error> {
        let mut todo: Vec<(Name, u8)> = Vec::new();
        for (name, height) in roots {
            if !name.is_zero() && visit(&name, height) && height > 0 {
                todo.push((name, height));
            }
        }
        while !todo.is_empty() {
            let batch = todo.split_off(todo.len().saturating_sub(WALK_BATCH));
            let loaded = crate::commit::in_parallel(WALK_THREADS, batch, |(name, height)| {
                Ok((self.load(&name, height)?, height - 1))
            })?;
            for (node, height) in loaded {
                for child in node.names() {
                    if visit(child, height) && height > 0 {
                        todo.push((*child, height));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Transaction<'_> {
    fn safety(&self) -> MutexGuard<'_, Safety> {
        self.safety.lock().expect("no panic while the safety is locked")
    }

    /// Called before anything is relied on.
    pub(crate) fn enrol(&self) -> Result<(), Error> {
        if !self.store.is_shared() || self.safety().looked.is_some() {
            return Ok(());
        }
        self.store.look(|grace| grace / 4)?;
        let watch = self.store.watch();
        let mut safety = self.safety();
        (safety.looked, safety.any) = (watch.looked, watch.any);
        Ok(())
    }

    fn trusts(&self, watch: &Watch, safety: &Safety, root: &Name) -> bool {
        let since = |seen: &Duration| safety.looked.is_some_and(|looked| *seen >= looked);
        root.is_zero() || safety.made.contains(root) || watch.seen.get(root).is_some_and(since)
    }

    /// Notes that `root` was made by changing `base`.
    pub(crate) fn note_made(&self, base: Name, root: Name) {
        if self.store.is_shared() {
            let watch = self.store.watch();
            let mut safety = self.safety();
            if self.trusts(&watch, &safety, &base) {
                safety.made.insert(root);
            }
        }
    }

    /// Makes sure that everything below `roots` will be there when the head is (WINDOW). New frames may be added
    /// to the packs of this transaction.
    fn secure(&self, roots: &[(Name, u8)]) -> Result<(), Error> {
        let store = self.store;
        if !store.is_shared() {
            return Ok(());
        }
        self.enrol()?;
        let todo: Vec<(Name, u8)> = {
            let (watch, safety) = (store.watch(), self.safety());
            let in_window = safety.looked.is_some_and(|looked| boot_time() - looked < watch.grace / 2);
            let at_ease = in_window && !safety.any;
            roots.iter().filter(|(root, _)| !at_ease || !self.trusts(&watch, &safety, root)).copied().collect()
        };
        if todo.is_empty() {
            return Ok(());
        }
        for _ in 0..4 {
            store.look(|grace| grace / 8)?;
            let looked = store.watch().looked;
            self.store_again_below(&todo)?;
            let watch = store.watch();
            if looked == watch.looked && watch.looked.is_some_and(|at| boot_time() - at < watch.grace / 4) {
                let mut safety = self.safety();
                (safety.looked, safety.any) = (watch.looked, false);
                safety.made.extend(roots.iter().map(|(root, _)| *root));
                return Ok(());
            }
        }
        Err(Error::Invalid(
            "checking what is to be published takes longer than a quarter of the store's grace period; repeat the commit".to_owned(),
        ))
    }

    /// [`Transaction::publish`] where nobody counts: the engine alone decides who is first.
    pub(crate) fn publish_shared(&self, head: &str, expect: &Expect, manifest: &Manifest) -> Result<Etag, Error> {
        let store = self.store;
        head::check_name(head)?;
        // Refuses early what the swap would refuse, before anything is made durable for it. Where there is nothing to be
        // made durable, or nothing is refused, it would only cost a request.
        if self.stored_bytes() > 0 && *expect != Expect::Any {
            let found = store.engine.head(head).map_err(|error| Error::io("read", head::object(head), error))?;
            if let Some(found) = expect.refuses(found.map(|(_, etag)| etag).as_ref()) {
                return Err(Error::HeadChanged { head: head.to_owned(), found });
            }
        }
        let roots: Vec<(Name, u8)> = manifest.versions.values().map(|v| (v.root, v.height())).collect();
        for (name, height) in &roots {
            store.acquire(&mut store.ledger(), *name, *height)?;
        }
        self.secure(&roots)?;
        store.seal_open_packs()?;
        if !self.is_in_window() {
            // Uploading took long.
            self.secure(&roots)?;
            store.seal_open_packs()?;
        }
        let swapped = store.engine.swap_head(head, expect, &manifest.encode(head, &store.keys));
        match swapped.map_err(|error| Error::io("publish", head::object(head), error))? {
            Ok(etag) => {
                store.note_seen(manifest, boot_time());
                Ok(etag)
            }
            Err(found) => Err(Error::HeadChanged { head: head.to_owned(), found }),
        }
    }

    /// Whether there is still time to swap a head.
    fn is_in_window(&self) -> bool {
        let (watch, safety) = (self.store.watch(), self.safety());
        safety.looked.is_some_and(|looked| boot_time() - looked < watch.grace / 2)
    }

    /// Stores again what lies in condemned packs below these roots; fails where something is gone.
    fn store_again_below(&self, roots: &[(Name, u8)]) -> Result<(), Error> {
        let store = self.store;
        let mut met: HashSet<Name> = HashSet::new();
        let mut condemned: Vec<(Name, Kind)> = Vec::new();
        let mut gone = None;
        {
            let sound = store.watch().sound.clone();
            store.reach(roots.iter().copied(), &mut |name, height| {
                if sound.contains(name) || !met.insert(*name) {
                    return false;
                }
                let kind = if height == 0 { Kind::Blocks } else { Kind::Nodes };
                if store.catalog.find(name).is_none() {
                    gone = gone.or(Some((*name, kind)));
                } else if !store.is_safe_to_share(name) {
                    condemned.push((*name, kind));
                }
                true
            })?;
        }
        if let Some((name, kind)) = gone {
            let kind = if kind == Kind::Nodes { "node" } else { "block" };
            return Err(Error::Unknown { kind, name });
        }
        condemned.sort_by_key(|(_, kind)| *kind == Kind::Nodes);
        self.copy_items(&condemned)?;
        // Blocks are met too, but a walk that skips their node never asks for them.
        store.watch().sound.extend(met);
        Ok(())
    }

    /// Copies items into packs of this transaction; the catalog says so from then on.
    pub(crate) fn copy_items(&self, items: &[(Name, Kind)]) -> Result<u64, Error> {
        let store = self.store;
        let mut bytes = 0;
        let mut gathered: Vec<(Name, Location, Vec<u8>)> = Vec::new();
        let mut kind_now = Kind::Blocks;
        for (name, kind) in items {
            let from = store.catalog.find(name);
            let item = store.item_bytes(*kind, name)?;
            let limit = match kind {
                Kind::Nodes => FRAME_NODES,
                Kind::Blocks => frame::blocks_per_frame(item.len() as u32),
            };
            let differs = gathered
                .first()
                .is_some_and(|(_, _, first)| *kind != kind_now || (*kind == Kind::Blocks && first.len() != item.len()));
            if differs || gathered.len() >= limit {
                bytes += self.append_copies(kind_now, &mut gathered)?;
            }
            kind_now = *kind;
            if let Some(from) = from {
                gathered.push((*name, from, item));
            }
        }
        bytes += self.append_copies(kind_now, &mut gathered)?;
        Ok(bytes)
    }

    fn append_copies(&self, kind: Kind, gathered: &mut Vec<(Name, Location, Vec<u8>)>) -> Result<u64, Error> {
        if gathered.is_empty() {
            return Ok(0);
        }
        let raw: Vec<u8> = gathered.iter().flat_map(|(_, _, bytes)| bytes.iter().copied()).collect();
        let names: Vec<Name> = gathered.iter().map(|(name, _, _)| *name).collect();
        let encoded = frame::encode(kind, &raw).map_err(|error| Error::io("compress", "a frame", error))?;
        let appended: Appended = self.append(&encoded, &names)?;
        let _ledger = self.store.ledger();
        for (slot, (name, from, _)) in gathered.drain(..).enumerate() {
            self.store.catalog.add_refs(&name, 1);
            self.store.catalog.relocate(&name, from, appended.location(slot));
        }
        Ok(encoded.stored.len() as u64)
    }
}

/// The mutex of a store's watch.
pub(crate) type WatchLock = Mutex<Watch>;
