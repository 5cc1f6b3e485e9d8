//! All objects of one mirror, and every change to them.
//!
//! Three locks, never taken in another order: `admin` (one change at a time; only fast file writes below it, since
//! a mark waits for it in a VM's pause), then the map of objects, then those inside an object. Whatever waits for
//! a disk to make something durable holds none of the first two.

mod description;
mod recover;

use crate::control::{
    Below, ID_MIN, Listing, OverlaySpec, RamEntry, RamSource, RamSpec, Removed, ViewChanges, ViewEntry,
};
use crate::disk::{Layer, Lower, Overlay, Pool, View};
use crate::home::{Home, remove_if_there, replace_json, replace_json_durably};
use crate::ram::RamObject;
use crate::resolve::Versions;
use base::RamMap;
use description::{Description, below_of};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, RwLock};
use thiserror::Error;

/// A mark of `durable` and `flushing`: the object is gone, nothing of it may reach the disk again.
const GONE: u64 = u64::MAX;

/// The most blocks of a disk: 64 TiB of the usual ones. A mirror's table of them takes a byte for each 64.
const BLOCKS_MAX: u64 = 1 << 34;

/// Why there can be no disk of such bytes and blocks; none: there can.
fn impossible(size: u64, block_size: u64) -> Option<String> {
    if !block_size.is_power_of_two() || !(512..=1 << 20).contains(&block_size) {
        return Some(format!("blocks of {block_size} bytes; write a power of two from 512 to 1 MiB"));
    }
    if size == 0 || size > i64::MAX as u64 - (1 << 20) {
        return Some(format!("a disk of {size} bytes cannot be"));
    }
    let blocks = size.div_ceil(block_size);
    (blocks > BLOCKS_MAX).then(|| format!("{size} bytes are {blocks} blocks, more than {BLOCKS_MAX}"))
}

/// Anything with an id.
#[derive(Clone)]
pub(crate) enum Object {
    Ram(Arc<RamObject>),
    Overlay(Arc<Overlay>),
    View(Arc<View>),
}

/// All of them.
pub(crate) struct Objects {
    home: Home,
    versions: Arc<dyn Versions>,
    pub(crate) pool: Arc<Pool>,
    map: RwLock<HashMap<u64, Object>>,
    admin: Mutex<Admin>,
}

#[derive(Default)]
struct Admin {
    /// To be removed with the last object that stands on them.
    deferred: BTreeSet<u64>,
}

/// Why a change was refused or failed.
#[derive(Debug, Error)]
pub(crate) enum ObjectError {
    #[error("there is no {kind} {id:016x}")]
    Missing { kind: &'static str, id: u64 },
    #[error("id {id:016x} is in use by another object; ids are never used again")]
    Taken { id: u64 },
    #[error("{what} {id:016x} is refused: {why}")]
    Refused { what: &'static str, id: u64, why: String },
    #[error("{what} {id:016x}: {source}")]
    Io { what: &'static str, id: u64, source: io::Error },
}

impl Object {
    /// The ids of the objects it stands on.
    fn stands_on(&self) -> BTreeSet<u64> {
        let below = |lower: &Lower| match lower {
            Lower::View(view) => BTreeSet::from([view.id]),
            Lower::Zero | Lower::Version(_) => BTreeSet::new(),
        };
        match self {
            Self::Ram(ram) => ram.ancestors(),
            Self::Overlay(overlay) => below(&overlay.stack().lower),
            Self::View(view) => below(&view.lower()),
        }
    }

    fn layer(&self) -> Option<u64> {
        match self {
            Self::Ram(_) => None,
            Self::Overlay(overlay) => Some(overlay.stack().top.id()),
            Self::View(view) => Some(view.layer.id()),
        }
    }
}

impl Objects {
    /// The store's versions.
    pub(crate) fn versions(&self) -> &dyn Versions {
        &*self.versions
    }

    /// An object by id.
    pub(crate) fn get(&self, id: u64) -> Option<Object> {
        self.map.read().expect("no writer panics").get(&id).cloned()
    }

    /// A RAM file by id.
    pub(crate) fn ram(&self, id: u64) -> Option<Arc<RamObject>> {
        match self.map.read().expect("no writer panics").get(&id) {
            Some(Object::Ram(ram)) => Some(ram.clone()),
            _ => None,
        }
    }

    /// An overlay by id.
    pub(crate) fn overlay(&self, id: u64) -> Option<Arc<Overlay>> {
        match self.map.read().expect("no writer panics").get(&id) {
            Some(Object::Overlay(overlay)) => Some(overlay.clone()),
            _ => None,
        }
    }

    fn view(&self, id: u64) -> Option<Arc<View>> {
        match self.map.read().expect("no writer panics").get(&id) {
            Some(Object::View(view)) => Some(view.clone()),
            _ => None,
        }
    }

    fn insert(&self, id: u64, object: Object) {
        self.map.write().expect("no writer panics").insert(id, object);
    }

    fn write_live(&self, what: &'static str, description: &Description) -> Result<(), ObjectError> {
        let id = description.id();
        replace_json(&self.home.live_description(id), description).map_err(io_error(what, id))
    }

    /// Adds a RAM file.
    pub(crate) fn add_ram(&self, spec: &RamSpec) -> Result<(), ObjectError> {
        let what = "adding RAM file";
        let refused = |why: String| ObjectError::Refused { what, id: spec.id, why };
        let map = RamMap::decode(&spec.map).map_err(&refused)?;
        let _admin = self.admin.lock().expect("no admin panics");
        match self.get(spec.id) {
            // Its source may have moved on since the request was first made.
            Some(Object::Ram(there)) if there.map == map => return Ok(()),
            Some(_) => return Err(ObjectError::Taken { id: spec.id }),
            None if spec.id < ID_MIN => return Err(refused(format!("ids below {ID_MIN} are the mount's own"))),
            None => {}
        }
        let ram = RamObject::new(spec.id, map, spec.source.clone());
        if let Some(missing) = ram.ancestors().iter().find(|&&a| self.ram(a).is_none()) {
            return Err(refused(format!("its map names RAM file {missing:016x}, which is not there")));
        }
        if let Some(why) = ram.holder_error() {
            return Err(refused(format!("its holder cannot be read: {why}")));
        }
        self.write_live(what, &Description::ram(&ram))?;
        self.insert(spec.id, Object::Ram(Arc::new(ram)));
        Ok(())
    }

    /// Lets a RAM file's own pages come from a version.
    pub(crate) fn set_ram_committed(&self, id: u64, version: &str) -> Result<(), ObjectError> {
        let _admin = self.admin.lock().expect("no admin panics");
        let ram = self.ram(id).ok_or(ObjectError::Missing { kind: "RAM file", id })?;
        let source = RamSource::Committed(version.to_owned());
        let description = Description::Ram { id, map: ram.map.encode(), source: source.clone() };
        self.write_live("committing RAM file", &description)?;
        ram.set_source(source);
        Ok(())
    }

    /// Adds a writable disk.
    pub(crate) fn add_overlay(&self, spec: &OverlaySpec) -> Result<(), ObjectError> {
        let what = "adding overlay";
        let refused = |why: String| Err(ObjectError::Refused { what, id: spec.id, why });
        let admin = self.admin.lock().expect("no admin panics");
        match self.get(spec.id) {
            Some(Object::Overlay(there)) if there.size == spec.size && there.block_size == spec.block_size => {
                return Ok(());
            }
            Some(_) => return Err(ObjectError::Taken { id: spec.id }),
            None if spec.id < ID_MIN => return refused(format!("ids below {ID_MIN} are the mount's own")),
            None => {}
        }
        if let Some(why) = impossible(spec.size, spec.block_size) {
            return refused(why);
        }
        let lower = match &spec.below {
            Below::Zero => Lower::Zero,
            Below::Version(version) => Lower::Version(version.as_str().into()),
            Below::View(view) => Lower::View(self.view(*view).ok_or(ObjectError::Missing { kind: "view", id: *view })?),
        };
        if let Lower::View(view) = &lower
            && admin.deferred.contains(&view.id)
        {
            return refused(format!("view {:016x} is being removed", view.id));
        }
        if let Lower::View(view) = &lower
            && (view.size, view.block_size) != (spec.size, spec.block_size)
        {
            return refused(format!(
                "{} bytes in blocks of {} do not fit view {:016x}, {} bytes in blocks of {}",
                spec.size, spec.block_size, view.id, view.size, view.block_size
            ));
        }
        let top = self.new_layer(spec.size, spec.block_size).map_err(io_error(what, spec.id))?;
        let layer = top.id();
        let overlay = Overlay::new(spec.id, spec.vm.clone(), spec.size, spec.block_size, top, lower);
        let described = self.write_live(what, &Description::overlay(&overlay, layer, spec.below.clone()));
        if described.is_err() {
            let _ = self.home.remove_layer(layer);
        }
        described?;
        self.insert(spec.id, Object::Overlay(Arc::new(overlay)));
        Ok(())
    }

    /// Freezes what an overlay shows now into a new view. Runs in the VM's pause.
    pub(crate) fn mark(&self, overlay_id: u64, view_id: u64) -> Result<(), ObjectError> {
        let what = "marking overlay";
        let refused = |why: String| ObjectError::Refused { what, id: overlay_id, why };
        let _admin = self.admin.lock().expect("no admin panics");
        let overlay = self.overlay(overlay_id).ok_or(ObjectError::Missing { kind: "overlay", id: overlay_id })?;
        match self.get(view_id) {
            Some(Object::View(_)) if matches!(&overlay.stack().lower, Lower::View(v) if v.id == view_id) => {
                return Ok(());
            }
            Some(_) => return Err(ObjectError::Taken { id: view_id }),
            None if view_id < ID_MIN => return Err(refused(format!("ids below {ID_MIN} are the mount's own"))),
            None => {}
        }
        let top = self.new_layer(overlay.size, overlay.block_size).map_err(io_error(what, overlay_id))?;
        let layer = top.id();
        let mut frozen = None;
        let settled = overlay.replace_stack(|old| {
            let (size, block_size) = (overlay.size, overlay.block_size);
            let view = Arc::new(View::new(view_id, size, block_size, old.top.clone(), old.lower.clone(), false));
            // A view whose layer is still an overlay's top is a mark cut short: a start takes it back.
            self.write_live(what, &Description::view(&view))?;
            self.write_live(what, &Description::overlay(&overlay, top.id(), Below::View(view_id)))?;
            frozen = Some(view.clone());
            Ok(crate::disk::Stack { top, lower: Lower::View(view) })
        });
        if let (Ok(()), Some(view)) = (&settled, frozen) {
            self.insert(view_id, Object::View(view));
        } else {
            let _ = remove_if_there(&self.home.live_description(view_id));
            let _ = self.home.remove_layer(layer);
        }
        settled
    }

    fn new_layer(&self, size: u64, block_size: u64) -> io::Result<Arc<Layer>> {
        Layer::create(&self.home, self.pool.take()?, size.div_ceil(block_size), block_size).map(Arc::new)
    }

    /// What a view changed against what lies below it.
    pub(crate) fn view_changes(&self, id: u64) -> Result<ViewChanges, ObjectError> {
        let view = self.view(id).ok_or(ObjectError::Missing { kind: "view", id })?;
        let (written, zeroed) = view.layer.changes();
        let pairs = |ranges: Vec<base::ByteRange>| ranges.into_iter().map(|r| (r.start, r.end)).collect();
        Ok(ViewChanges {
            data_path: view.layer.data_path().clone(),
            dirty: pairs(written),
            zeroed: pairs(zeroed),
            below: version_of(&view.lower()),
            committed: view.committed.load(Ordering::Acquire),
            size: view.size,
            block_size: view.block_size,
        })
    }

    /// Bytes that an overlay holds beyond what is in the store; none: there is no such overlay.
    pub(crate) fn changed_bytes(&self, id: u64) -> Option<u64> {
        let stack = self.overlay(id)?.stack();
        let of_layer = |layer: &Layer| {
            let (written, zeroed) = layer.changes();
            written.iter().chain(&zeroed).map(base::ByteRange::len).sum::<u64>()
        };
        let (mut bytes, mut lower) = (of_layer(&stack.top), stack.lower.clone());
        while let Lower::View(view) = &lower
            && !view.committed.load(Ordering::Acquire)
        {
            bytes += of_layer(&view.layer);
            lower = view.lower();
        }
        Some(bytes)
    }

    /// Lets what a view's layer lacks come from its own version.
    pub(crate) fn set_view_committed(&self, id: u64, version: &str) -> Result<(), ObjectError> {
        let what = "committing view";
        let view = {
            let _admin = self.admin.lock().expect("no admin panics");
            let view = self.view(id).ok_or(ObjectError::Missing { kind: "view", id })?;
            let (size, block_size, layer) = (view.size, view.block_size, view.layer.id());
            let below = Below::Version(version.to_owned());
            self.write_live(what, &Description::View { id, size, block_size, layer, below, committed: true })?;
            view.commit(version.into());
            view
        };
        // The durable copy names what lay below until it is written anew, and that may now be removed.
        if self.home.durable_description(id).exists() {
            self.settle_view(&view).map_err(io_error(what, id))?;
        }
        self.remove_deferred()?;
        Ok(())
    }

    /// Makes durable all that was written to an overlay before the call, and all it stands on.
    pub(crate) fn flush(&self, id: u64) -> Result<(), ObjectError> {
        let overlay = self.overlay(id).ok_or(ObjectError::Missing { kind: "overlay", id })?;
        self.flush_overlay(&overlay).map_err(io_error("flushing overlay", id))
    }

    fn flush_overlay(&self, overlay: &Overlay) -> io::Result<()> {
        let mut flushed = overlay.flushing.lock().expect("no flusher panics");
        let (stack, changed) = overlay.stack_and_change();
        if *flushed == GONE {
            return Ok(());
        }
        self.settle_lower(&stack.lower)?;
        stack.top.sync()?;
        if *flushed != changed {
            let description = Description::overlay(overlay, stack.top.id(), below_of(&stack.lower));
            replace_json_durably(&self.home.durable_description(overlay.id), &description)?;
            *flushed = changed;
        }
        Ok(())
    }

    /// Makes every disk durable.
    pub(crate) fn flush_all(&self) -> Result<(), ObjectError> {
        self.names(false).into_iter().try_for_each(|id| match self.flush(id) {
            // Removed meanwhile.
            Err(ObjectError::Missing { .. }) => Ok(()),
            done => done,
        })
    }

    /// Makes durable what lies below: deepest first, so that no durable description names what is not there.
    fn settle_lower(&self, lower: &Lower) -> io::Result<()> {
        let Lower::View(view) = lower else { return Ok(()) };
        self.settle_lower(&view.lower())?;
        view.layer.sync()?;
        self.settle_view(view)
    }

    fn settle_view(&self, view: &View) -> io::Result<()> {
        let mut durable = view.durable.lock().expect("no flusher panics");
        let changed = view.changed.load(Ordering::Acquire);
        if *durable != GONE && *durable != changed {
            replace_json_durably(&self.home.durable_description(view.id), &Description::view(view))?;
            *durable = changed;
        }
        Ok(())
    }

    /// Removes objects, and those deferred that nothing stands on any more. Says which went, with their kinds.
    pub(crate) fn remove(&self, ids: &[u64]) -> Result<(Removed, Vec<Object>), ObjectError> {
        let mut report = Removed::default();
        {
            let mut admin = self.admin.lock().expect("no admin panics");
            for &id in ids {
                if self.get(id).is_some() {
                    admin.deferred.insert(id)
                } else {
                    report.missing.push(id);
                    false
                };
            }
            self.write_deferred(&admin)?;
        }
        let gone = self.remove_deferred()?;
        report.removed = gone.iter().map(Object::id).collect();
        let left = ids.iter().filter(|id| self.get(**id).is_some());
        report.deferred = left.map(|&id| (id, self.standing_on(id))).collect();
        Ok((report, gone))
    }

    fn remove_deferred(&self) -> Result<Vec<Object>, ObjectError> {
        let mut gone: Vec<Object> = Vec::new();
        loop {
            let deferred = self.admin.lock().expect("no admin panics").deferred.clone();
            let free: Vec<u64> = deferred.into_iter().filter(|&id| self.standing_on(id).is_empty()).collect();
            if free.is_empty() {
                return Ok(gone);
            }
            // A durable description behind its time may still name what goes.
            self.flush_stale(&free).map_err(io_error("removing", free[0]))?;
            self.bar_from_disk(&free);
            let mut admin = self.admin.lock().expect("no admin panics");
            let mut took = Vec::new();
            for id in free.into_iter().filter(|&id| self.standing_on(id).is_empty()) {
                admin.deferred.remove(&id);
                took.extend(self.map.write().expect("no writer panics").remove(&id));
            }
            for object in &took {
                self.forget(object.id())?;
            }
            self.write_deferred(&admin)?;
            drop(admin);
            for layer in took.iter().filter_map(Object::layer) {
                self.home.remove_layer(layer).map_err(io_error("removing layer", layer))?;
            }
            gone.append(&mut took);
        }
    }

    /// The ids of the objects that stand on `id`.
    fn standing_on(&self, id: u64) -> Vec<u64> {
        let map = self.map.read().expect("no writer panics");
        let mut standing: Vec<u64> = map.iter().filter(|(_, o)| o.stands_on().contains(&id)).map(|(&i, _)| i).collect();
        standing.sort_unstable();
        standing
    }

    fn flush_stale(&self, going: &[u64]) -> io::Result<()> {
        if !going.iter().any(|&id| self.view(id).is_some()) {
            return Ok(());
        }
        let overlays: Vec<_> = self.map.read().expect("no writer panics").values().cloned().collect();
        for object in overlays {
            let Object::Overlay(overlay) = object else { continue };
            let path = self.home.durable_description(overlay.id);
            // One that was never flushed has none.
            let described = path.exists().then(|| crate::home::read_json::<Description>(&path).ok()).flatten();
            let named = described.and_then(|d| d.view_below());
            if named.is_some_and(|v| going.contains(&v)) && !going.contains(&overlay.id) {
                self.flush_overlay(&overlay)?;
            }
        }
        Ok(())
    }

    /// Lets flushes in flight end, and no later one write anything for these objects.
    fn bar_from_disk(&self, going: &[u64]) {
        for object in going.iter().filter_map(|&id| self.get(id)) {
            match object {
                Object::Overlay(overlay) => *overlay.flushing.lock().expect("no flusher panics") = GONE,
                Object::View(view) => *view.durable.lock().expect("no flusher panics") = GONE,
                Object::Ram(_) => {}
            }
        }
    }

    /// Removes an object's descriptions: the durable one first, so that the live one still says what to finish.
    fn forget(&self, id: u64) -> Result<(), ObjectError> {
        let removed = remove_if_there(&self.home.durable_description(id))
            .and_then(|()| remove_if_there(&self.home.live_description(id)));
        removed.map_err(io_error("removing", id))
    }

    fn write_deferred(&self, admin: &Admin) -> Result<(), ObjectError> {
        let path = self.home.live().join("deferred.json");
        replace_json(&path, &admin.deferred).map_err(io_error("deferring", 0))
    }

    /// Every object, described.
    pub(crate) fn list(&self) -> Listing {
        let deferred = self.admin.lock().expect("no admin panics").deferred.iter().copied().collect();
        let mut out = Listing { deferred, ..Listing::default() };
        for object in self.map.read().expect("no writer panics").values() {
            match object {
                Object::Ram(ram) => out.ram.push(RamEntry {
                    id: ram.id,
                    size: ram.map.size(),
                    source: ram.source(),
                    lost: ram.holder_error(),
                }),
                Object::Overlay(o) => out.overlays.push(OverlaySpec {
                    id: o.id,
                    vm: o.vm.clone(),
                    size: o.size,
                    block_size: o.block_size,
                    below: below_of(&o.stack().lower),
                }),
                Object::View(v) => out.views.push(ViewEntry {
                    id: v.id,
                    below: below_of(&v.lower()),
                    committed: v.committed.load(Ordering::Acquire),
                }),
            }
        }
        out.ram.sort_unstable_by_key(|r| r.id);
        out.overlays.sort_unstable_by_key(|o| o.id);
        out.views.sort_unstable_by_key(|v| v.id);
        out
    }

    /// The ids of the RAM files, or of the overlays, ascending.
    pub(crate) fn names(&self, ram: bool) -> Vec<u64> {
        let map = self.map.read().expect("no writer panics");
        let wanted = |o: &Object| if ram { matches!(o, Object::Ram(_)) } else { matches!(o, Object::Overlay(_)) };
        let mut ids: Vec<u64> = map.iter().filter(|(_, o)| wanted(o)).map(|(&id, _)| id).collect();
        ids.sort_unstable();
        ids
    }
}

impl Object {
    /// Its id.
    pub(crate) fn id(&self) -> u64 {
        match self {
            Self::Ram(ram) => ram.id,
            Self::Overlay(overlay) => overlay.id,
            Self::View(view) => view.id,
        }
    }
}

/// What lies below: by its version where it is a view that has become one.
fn version_of(lower: &Lower) -> Below {
    match lower {
        Lower::View(view) if view.committed.load(Ordering::Acquire) => below_of(&view.lower()),
        _ => below_of(lower),
    }
}

fn io_error(what: &'static str, id: u64) -> impl Fn(io::Error) -> ObjectError {
    move |source| ObjectError::Io { what, id, source }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
