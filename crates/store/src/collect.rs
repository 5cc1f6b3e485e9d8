//! Giving space back: what no head and no live transaction reaches.
//!
//! Packs without a live item are removed. From the others, frames without a live item are given up: first the
//! index is replaced by one that does not list them, then holes are punched. Dead items in living frames stay,
//! readable and ready to be taken up again, until most of their frame is dead: then the rest moves (`compact`).

use crate::catalog::Pack;
use crate::error::Error;
use crate::pack::PackId;
use crate::store::{Store, given_up_ranges};
use base::Bitmap;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a collection gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Packs removed.
    pub packs: u64,
    /// Frames given up in packs that stay.
    pub frames: u64,
    /// Items moved out of frames that were mostly dead.
    pub moved: u64,
    /// Packs that wait for the end of their grace period: shared stores only.
    pub condemned: u64,
    /// Bytes given back, as the medium counts them; what moved is not subtracted.
    pub bytes: u64,
}

/// What is to be done to the medium, decided under the ledger.
#[derive(Default)]
struct Plan {
    remove: Vec<Arc<Pack>>,
    rewrite: Vec<Arc<Pack>>,
    frames: u64,
}

impl Store {
    /// Gives back what no head and no live transaction reaches. May run beside everything else. In a shared store it
    /// condemns, and removes what an earlier collection condemned and nothing has reached for the grace period.
    ///
    /// # Errors
    /// The store is damaged, so that counts cannot be trusted: nothing is removed. Or the medium fails: what was
    /// not given back is tried again by the next collection.
    pub fn collect(&self) -> Result<Collected, Error> {
        self.writable("collect")?;
        let _one = self.collecting.lock().expect("no panic while collecting");
        if self.is_shared() {
            return self.sweep();
        }
        let mut done = self.give_back()?;
        match self.compact() {
            Ok(0) => {}
            Ok(moved) => {
                let more = self.give_back()?;
                done.moved = moved;
                done.packs += more.packs;
                done.frames += more.frames;
                done.bytes += more.bytes;
            }
            // There is no room for the copies yet; everything is as it was.
            Err(Error::NoSpace { .. }) => log::warn!("no room to compact sparse packs of {}", self.engine.describe()),
            Err(error) => return Err(error),
        }
        Ok(done)
    }

    fn give_back(&self) -> Result<Collected, Error> {
        let plan = self.plan_collection()?;
        let mut done = Collected { packs: plan.remove.len() as u64, frames: plan.frames, ..Collected::default() };
        let removed: Vec<PackId> = plan.remove.iter().map(|pack| pack.id).collect();
        let footprint = |id: &PackId| self.engine.footprint(&id.pack_object()).unwrap_or(0);
        let bytes: u64 = removed.iter().map(footprint).sum();
        // The index first: an index without its pack would look like a loss.
        for objects in [PackId::index_object, PackId::pack_object] {
            let names: Vec<String> = removed.iter().map(|id| objects(*id)).collect();
            if let Some(first) = names.first() {
                self.engine.remove(&names).map_err(|error| Error::io("remove", first.clone(), error))?;
            }
        }
        done.bytes += bytes;
        plan.remove.iter().for_each(|pack| self.catalog.remove_pack(pack.handle));
        for pack in &plan.rewrite {
            let before = footprint(&pack.id);
            self.give_back_frames(pack)?;
            done.bytes += before.saturating_sub(footprint(&pack.id));
        }
        Ok(done)
    }

    /// Forgets what is dead and decides what becomes of each pack.
    fn plan_collection(&self) -> Result<Plan, Error> {
        let mut ledger = self.ledger();
        if !ledger.faults.is_empty() {
            if ledger.holders == 0 {
                self.recount(&mut ledger)?;
            }
            if let Some(first) = ledger.faults.first() {
                return Err(Error::Damaged { faults: ledger.faults.len(), first: first.to_string() });
            }
        }
        self.drop_orphans(&mut ledger);
        let sealed: HashMap<u32, Arc<Pack>> =
            self.catalog.packs().into_iter().filter(|p| p.is_settled()).map(|p| (p.handle, p)).collect();
        let mut live: HashMap<u32, Bitmap> =
            sealed.iter().map(|(handle, pack)| (*handle, Bitmap::new(pack.frames().len() as u64))).collect();
        self.catalog.for_each(|_, location, refs| {
            if refs.load(Ordering::Relaxed) > 0
                && let Some(frames) = live.get_mut(&location.pack)
            {
                frames.set(u64::from(location.frame));
            }
        });
        let mut plan = Plan::default();
        let mut dead: HashSet<(u32, u32)> = HashSet::new();
        for (handle, pack) in &sealed {
            let (frames, live) = (pack.frames(), &live[handle]);
            let newly = frames.iter().enumerate().filter(|(n, f)| f.items > 0 && !live.get(*n as u64));
            let newly: HashSet<u32> = newly.map(|(number, _)| number as u32).collect();
            dead.extend(newly.iter().map(|number| (*handle, *number)));
            if live.count() == 0 {
                plan.remove.push(Arc::clone(pack));
            } else if !newly.is_empty() || pack.stale.load(Ordering::Relaxed) {
                plan.frames += newly.len() as u64;
                pack.stale.store(true, Ordering::Relaxed);
                pack.give_up(|number| newly.contains(&number));
                plan.rewrite.push(Arc::clone(pack));
            }
        }
        // In an order that does not depend on a hash map's, so that a simulation repeats.
        plan.remove.sort_unstable_by_key(|pack| pack.handle);
        plan.rewrite.sort_unstable_by_key(|pack| pack.handle);
        if !dead.is_empty() {
            self.catalog.forget_where(|location| dead.contains(&(location.pack, location.frame)));
        }
        Ok(plan)
    }

    /// Brings the medium in line with the frames given up in memory.
    fn give_back_frames(&self, pack: &Pack) -> Result<(), Error> {
        let frames = pack.frames();
        if let Some(index) = self.read_index(pack.id)? {
            let kept = index.without(|number| frames.get(number as usize).is_some_and(|frame| frame.items > 0));
            let object = pack.id.index_object();
            let bytes = kept.encode(pack.id, &self.keys);
            self.engine.put(&object, &bytes).map_err(|error| Error::io("write", object, error))?;
        }
        let object = pack.id.pack_object();
        let ranges = given_up_ranges(&frames);
        self.engine.punch(&object, &ranges).map_err(|error| Error::io("punch holes in", object, error))?;
        pack.stale.store(false, Ordering::Relaxed);
        Ok(())
    }
}
