//! What is garbage, found by marking from the heads: the collection of shared stores, and the explanation of what a
//! collection would do, for every store. The argument for its safety is in `shared`.
//!
//! Marking keeps 16 bytes of each reached name, and who reached it first: about 32 bytes a block while it runs. Two
//! names that agree in these could only keep something that might have gone.

use crate::arrange::{Reading, WALK};
use crate::collect::Collected;
use crate::engine::{Etag, Expect};
use crate::error::Error;
use crate::frame::{FrameInfo, Kind};
use crate::name::Name;
use crate::pack::PackId;
use crate::shared::{Condemned, Record, boot_time};
use crate::store::Store;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// Rounds of a collection that others come in between of.
const ROUNDS: usize = 8;
/// Rounds in which a fault is taken for somebody else's work.
const AGAIN: usize = 2;
/// Indexes read at once.
const INDEXES_AT_ONCE: usize = 16;
/// Less waste than this is not worth copying for.
const WASTE_MIN: u64 = 1 << 20;
/// A pack in which less than this lives is small, and more small ones than `SMALL_PACKS_MAX` become one.
const SMALL_BYTES: u64 = 256 << 10;
const SMALL_PACKS_MAX: usize = 32;
/// Items copied by one collection at most; the next one goes on.
const ITEMS_MAX: usize = 1 << 17;

/// What a collection would do, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Explanation {
    /// Each head with what it keeps.
    pub heads: Vec<HeadShare>,
    /// Each pack with what becomes of it.
    pub packs: Vec<PackFate>,
    /// Bytes that go at once.
    pub bytes_now: u64,
    /// Bytes that go when the grace period of their packs is over, if nothing reaches them by then.
    pub bytes_later: u64,
}

/// What a head keeps.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HeadShare {
    /// Its name.
    pub head: String,
    /// Blocks and nodes that it reaches and no head before it in this list does.
    pub items: u64,
    /// Whether the explanation takes it for removed.
    pub dropped: bool,
}

/// What becomes of a pack.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PackFate {
    /// Its object.
    pub pack: String,
    /// Bytes of its frames.
    pub bytes: u64,
    /// Of these, bytes of frames in which something is reached.
    pub kept_bytes: u64,
    /// What a collection does to it.
    pub fate: Fate,
    /// Why.
    pub why: String,
}

/// What a collection does to a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It stays as it is.
    Keep,
    /// It stays, and frames of which nothing is reached are given up.
    Trim,
    /// What is reached in it is copied into another pack, so that it can go later.
    Compact,
    /// It is condemned: from now on nothing new relies on it.
    Condemn,
    /// It was condemned and its grace period is not over.
    Wait,
    /// It was condemned, and is reached all the same.
    Spare,
    /// It goes.
    Remove,
}

/// A pack as marking found it.
#[derive(Clone, Debug, Default)]
struct Found {
    bytes: u64,
    kept_bytes: u64,
    items: u64,
    kept_items: u64,
    /// Bytes of what is reached, frames counted in proportion.
    live_bytes: u64,
    /// A head, by its number, that reaches something here.
    reached_by: Option<u32>,
    has_index: bool,
    has_pack: bool,
}

/// All that a decision stands on.
struct Marked {
    heads: Vec<HeadShare>,
    packs: BTreeMap<PackId, Found>,
    /// What is reached in packs worth compacting.
    movable: Vec<(PackId, Name, Kind)>,
    /// Something reached that no pack has.
    missing: Option<(Name, String)>,
}

fn short(name: &Name) -> u128 {
    u128::from_le_bytes(name.0[..16].try_into().expect("16 bytes"))
}

impl Store {
    /// Marks from all heads but those in `drop`, and finds the pack that each reached name counts for.
    fn mark(&self, record: &Record, drop: &HashSet<&str>) -> Result<Marked, Error> {
        let mut reached: HashMap<u128, u32> = HashMap::new();
        let mut names_left: HashMap<u128, Name> = HashMap::new();
        let mut heads = Vec::new();
        for name in self.heads("")? {
            let dropped = drop.contains(name.as_str());
            let number = heads.len() as u32;
            let mut items = 0;
            if !dropped && let Some((manifest, _)) = self.head(&name)? {
                let roots = manifest.versions.values().map(|version| (version.root, version.height()));
                self.reach(roots, &mut |name, _| {
                    let new = reached.insert_if_absent(short(name), number);
                    items += u64::from(new);
                    new
                })?;
            }
            heads.push(HeadShare { head: name, items, dropped });
        }
        // Listed after the marking: the packs of every head that was read were there before it.
        let mut packs: BTreeMap<PackId, Found> = BTreeMap::new();
        let files = self.engine.list("packs").map_err(|error| Error::io("list", "packs", error))?;
        for (id, is_index) in files.iter().filter_map(|file| PackId::parse(file)) {
            let found = packs.entry(id).or_default();
            if is_index { found.has_index = true } else { found.has_pack = true }
        }
        // Newest first, the condemned ones last, those being removed not at all.
        let rank = |id: &PackId| record.get(*id).map_or(0, |entry| 1 + u8::from(entry.removing));
        let whole = packs.iter().filter(|(_, found)| found.has_index && found.has_pack).map(|(id, _)| *id);
        let mut order: Vec<PackId> = whole.filter(|id| rank(id) < 2).collect();
        order.sort_by_key(|id| (rank(id), std::cmp::Reverse(*id)));
        let mut movable = Vec::new();
        for ids in order.chunks(INDEXES_AT_ONCE) {
            let read = crate::commit::in_parallel(INDEXES_AT_ONCE, ids.to_vec(), |id| Ok((id, self.read_index(id))))?;
            for (id, index) in read {
                // A corrupt index keeps nothing reachable; what is missed shows below.
                let index = match index {
                    Ok(Some(index)) => index,
                    Ok(None) | Err(Error::Corrupt { .. }) => continue,
                    Err(error) => return Err(error),
                };
                let found = packs.get_mut(&id).expect("listed above");
                let mut kept = Vec::new();
                for (_, info, names) in index.items() {
                    let mut count = 0;
                    for name in names {
                        if let Some(head) = reached.remove(&short(name)) {
                            found.reached_by.get_or_insert(head);
                            kept.push((id, *name, info.kind));
                            count += 1;
                        }
                    }
                    found.add(info, count);
                }
                if found.is_sparse() {
                    movable.extend(kept);
                }
            }
        }
        let missing = match reached.iter().next() {
            None => None,
            Some((left, number)) => {
                // Once more, to be able to name it.
                let left = *left;
                let head = heads[*number as usize].head.clone();
                if let Some((manifest, _)) = self.head(&head)? {
                    let roots = manifest.versions.values().map(|version| (version.root, version.height()));
                    let mut met = HashSet::new();
                    self.reach(roots, &mut |name, _| {
                        if short(name) == left {
                            names_left.insert(left, *name);
                        }
                        met.insert(short(name))
                    })?;
                }
                Some((names_left.get(&left).copied().unwrap_or(Name::zero(0)), head))
            }
        };
        Ok(Marked { heads, packs, movable, missing })
    }

    /// One collection of a shared store: condemns, spares, removes, compacts.
    pub(crate) fn sweep(&self) -> Result<Collected, Error> {
        let mut done = Collected::default();
        for round in 0..ROUNDS {
            let began = boot_time();
            let now_ms = self
                .engine
                .now_ms()
                .map_err(|error| Error::io("ask for the time of", self.engine.describe(), error))?;
            let (record, etag) = self.record()?;
            let marked = match self.mark(&record, &HashSet::new()) {
                // A head may have gone while it was followed; what it reached may be gone as well.
                Err(error) if error.may_be_stale() && round < AGAIN => continue,
                marked => marked?,
            };
            if let Some((name, head)) = &marked.missing {
                if round < AGAIN || self.record()?.1 != etag {
                    continue; // the same, or another collector removed a pack while this one looked
                }
                let first = format!("head `{head}`: no pack holds {name}");
                return Err(Error::Damaged { faults: 1, first });
            }
            let next = decide(&record, &marked, now_ms, |id| self.is_old(id, now_ms, record.grace_ms))?;
            let Some((record, etag)) = self.agree(&record, next, etag, began)? else { continue };
            done.condemned +=
                marked.packs.keys().filter(|id| record.get(**id).is_some_and(|e| !e.removing)).count() as u64;
            self.remove_condemned(&record, &etag, &marked, &mut done)?;
            done.moved = self.copy_survivors(&record, &marked)?;
            return Ok(done);
        }
        log::warn!("other collectors of {} come in between; this collection gave up", self.engine.describe());
        Ok(done)
    }

    /// Swaps the record for `next` if it changed; `None` where another collector was faster, or this one too slow.
    fn agree(
        &self,
        record: &Record,
        next: Record,
        etag: Etag,
        began: Duration,
    ) -> Result<Option<(Record, Etag)>, Error> {
        if next == *record {
            return Ok(Some((next, etag)));
        }
        let quarter = Duration::from_millis(record.grace_ms / 4);
        let newly = next.packs.iter().any(|(id, _)| !record.packs.contains_key(id));
        let mut next = next;
        // Marking took long: what is condemned now is condemned from now.
        let asked = if newly && boot_time() - began > quarter / 2 {
            let asked = boot_time();
            let now_ms = self
                .engine
                .now_ms()
                .map_err(|error| Error::io("ask for the time of", self.engine.describe(), error))?;
            let fresh = next.packs.iter_mut().filter(|(id, _)| !record.packs.contains_key(*id));
            fresh.for_each(|(_, entry)| entry.since_ms = now_ms);
            asked
        } else {
            began
        };
        let Some(etag) = self.swap_record(&next, &Expect::Etag(etag))? else { return Ok(None) };
        if newly && boot_time() - asked > quarter {
            // Their time began before anyone could know. They are taken back, to be condemned once more.
            let mut taken_back = next.clone();
            taken_back.packs.retain(|id, entry| record.packs.contains_key(id) || entry.removing);
            self.swap_record(&taken_back, &Expect::Etag(etag))?;
            return Ok(None);
        }
        Ok(Some((next, etag)))
    }

    /// Whether a pack has been there for the grace period.
    fn is_old(&self, id: PackId, now_ms: u64, grace_ms: u64) -> Result<bool, Error> {
        let made = |object: String| {
            self.engine.made_ms(&object).map_err(|error| Error::io("ask for the age of", object.clone(), error))
        };
        let made = made(id.pack_object())?.or(made(id.index_object())?);
        Ok(made.is_none_or(|made| made.saturating_add(grace_ms) <= now_ms))
    }

    fn remove_condemned(
        &self,
        record: &Record,
        etag: &Etag,
        marked: &Marked,
        done: &mut Collected,
    ) -> Result<(), Error> {
        let removing: Vec<PackId> = record
            .packs
            .iter()
            .filter(|(_, entry)| entry.removing)
            .filter_map(|(id, _)| PackId::parse(&format!("{id}.pack")).map(|(id, _)| id))
            .collect();
        if removing.is_empty() {
            return Ok(());
        }
        let footprint = |id: &PackId| self.engine.footprint(&id.pack_object()).unwrap_or(0);
        let there = removing.iter().filter(|id| marked.packs.get(id).is_some_and(|found| found.has_pack));
        let bytes: u64 = there.clone().map(footprint).sum();
        let packs = there.count() as u64;
        // The index first: an index without its pack would look like a loss.
        for objects in [PackId::index_object, PackId::pack_object] {
            let names: Vec<String> = removing.iter().map(|id| objects(*id)).collect();
            self.engine.remove(&names).map_err(|error| Error::io("remove", names[0].clone(), error))?;
        }
        done.packs += packs;
        done.bytes += bytes;
        let mut rest = record.clone();
        rest.packs.retain(|_, entry| !entry.removing);
        // Where another collector was faster, the next one finds them gone.
        self.swap_record(&rest, &Expect::Etag(etag.clone()))?;
        self.refresh(false)?;
        Ok(())
    }

    /// Copies what is reached out of packs that are mostly dead, and out of small ones when there are many; the
    /// newer copy counts from then on, and a later collection condemns the old pack. `arrange` says in which order.
    fn copy_survivors(&self, record: &Record, marked: &Marked) -> Result<u64, Error> {
        let chosen = marked.to_compact(record);
        let mut items: Vec<(Name, Kind)> = marked
            .movable
            .iter()
            .filter(|(id, ..)| chosen.contains(id))
            .map(|(_, name, kind)| (*name, *kind))
            .take(ITEMS_MAX)
            .collect();
        if items.is_empty() {
            return Ok(0);
        }
        items.sort_by_key(|(_, kind)| *kind == Kind::Nodes);
        let is_small = |id: PackId| {
            chosen.contains(&id) && marked.packs.get(&id).is_some_and(|found| found.live_bytes < SMALL_BYTES)
        };
        let small = self.catalog.packs().into_iter().filter(|pack| is_small(pack.id)).map(|pack| pack.handle);
        if let Some(oldest) = small.min() {
            let reading = Reading::of(self, oldest, WALK * items.len())?;
            let places = reading.places();
            let moving: HashSet<Name> = items.iter().map(|(name, _)| *name).collect();
            let along = reading.along.into_iter().map(|(name, _)| (name, Kind::Nodes));
            items.extend(along.filter(|(name, _)| !moving.contains(name)));
            let place = |name: &Name| places.get(name).copied().unwrap_or(usize::MAX);
            items.sort_by_cached_key(|(name, kind)| (*kind == Kind::Nodes, place(name)));
        }
        let tx = self.begin();
        tx.copy_items(&items)?;
        tx.seal()?;
        Ok(items.len() as u64)
    }

    /// What a collection would do now if the heads in `drop` were gone, and why. Changes nothing.
    ///
    /// # Errors
    /// Something that heads reach cannot be read.
    pub fn explain_collection(&self, drop: &[String]) -> Result<Explanation, Error> {
        let _one = self.collecting.lock().expect("no panic while collecting");
        let drop: HashSet<&str> = drop.iter().map(String::as_str).collect();
        let record = if self.is_shared() { self.record()?.0 } else { Record { grace_ms: 0, packs: BTreeMap::new() } };
        let marked = self.mark(&record, &drop)?;
        if let Some((name, head)) = &marked.missing {
            return Err(Error::Damaged { faults: 1, first: format!("head `{head}`: no pack holds {name}") });
        }
        let mut out = Explanation { heads: marked.heads.clone(), ..Explanation::default() };
        let now_ms =
            self.engine.now_ms().map_err(|error| Error::io("ask for the time of", self.engine.describe(), error))?;
        let chosen = marked.to_compact(&record);
        let held: HashMap<PackId, bool> =
            self.catalog.packs().iter().map(|pack| (pack.id, !pack.is_sealed() || pack.live() > 0)).collect();
        for (id, found) in &marked.packs {
            let (fate, why) = if self.is_shared() {
                self.fate_when_shared(*id, found, &record, &marked, &chosen, now_ms)?
            } else {
                let in_use = held.get(id).copied().unwrap_or(false);
                found.fate_when_counted(&marked.heads, in_use && drop.is_empty(), self.engine.can_punch())
            };
            match fate {
                Fate::Remove => out.bytes_now += found.bytes,
                Fate::Trim => out.bytes_now += found.bytes - found.kept_bytes,
                Fate::Condemn | Fate::Wait => out.bytes_later += found.bytes,
                Fate::Compact => out.bytes_later += found.bytes - found.live_bytes.min(found.bytes),
                Fate::Keep | Fate::Spare => {}
            }
            let pack = id.pack_object();
            out.packs.push(PackFate { pack, bytes: found.bytes, kept_bytes: found.kept_bytes, fate, why });
        }
        Ok(out)
    }

    fn fate_when_shared(
        &self,
        id: PackId,
        found: &Found,
        record: &Record,
        marked: &Marked,
        chosen: &HashSet<PackId>,
        now_ms: u64,
    ) -> Result<(Fate, String), Error> {
        let grace_s = record.grace_ms / 1000;
        let seconds_left = |entry: Condemned| (entry.since_ms + record.grace_ms).saturating_sub(now_ms).div_ceil(1000);
        Ok(match (record.get(id), found.reached_by) {
            (Some(entry), _) if entry.removing => {
                (Fate::Remove, "a collection that ended early began to remove it".to_owned())
            }
            (Some(_), Some(_)) => {
                (Fate::Spare, format!("condemned, and reached again: {}", found.why_kept(&marked.heads)))
            }
            (Some(entry), None) if seconds_left(entry) > 0 => (
                Fate::Wait,
                format!("no head reaches anything in it; its grace period ends in {} s", seconds_left(entry)),
            ),
            (Some(_), None) => (Fate::Remove, format!("no head has reached anything in it for {grace_s} s")),
            (None, Some(_)) if chosen.contains(&id) => (
                Fate::Compact,
                format!("{}; what lives is copied out, and the rest goes later", found.why_kept(&marked.heads)),
            ),
            (None, Some(_)) => (Fate::Keep, found.why_kept(&marked.heads)),
            (None, None) if self.is_old(id, now_ms, record.grace_ms)? => {
                (Fate::Condemn, format!("no head reaches anything in it; it goes {grace_s} s after it is condemned"))
            }
            (None, None) => (
                Fate::Keep,
                format!(
                    "no head reaches anything in it, but it is younger than {grace_s} s and may be about to be published"
                ),
            ),
        })
    }
}

impl Found {
    fn add(&mut self, info: &FrameInfo, reached: u64) {
        if info.items == 0 {
            return;
        }
        let stored = u64::from(info.stored);
        self.bytes += stored;
        self.items += u64::from(info.items);
        self.kept_items += reached;
        self.live_bytes += stored * reached / u64::from(info.items);
        if reached > 0 {
            self.kept_bytes += stored;
        }
    }

    /// Mostly dead, or small.
    fn is_sparse(&self) -> bool {
        self.kept_items > 0 && (2 * self.live_bytes <= self.bytes || self.live_bytes < SMALL_BYTES)
    }

    fn why_kept(&self, heads: &[HeadShare]) -> String {
        let head = self.reached_by.and_then(|number| heads.get(number as usize)).map_or("?", |head| &head.head);
        format!("heads reach {} of its {} items, `{head}` among them", self.kept_items, self.items)
    }

    /// Of a store with one writer, whose collection needs no grace.
    fn fate_when_counted(&self, heads: &[HeadShare], in_use: bool, can_punch: bool) -> (Fate, String) {
        match self.reached_by {
            None if in_use => (Fate::Keep, "a transaction that is not published yet uses it".to_owned()),
            None => (Fate::Remove, "no head reaches anything in it".to_owned()),
            Some(_) if can_punch && self.kept_bytes < self.bytes => (Fate::Trim, self.why_kept(heads)),
            Some(_) => (Fate::Keep, self.why_kept(heads)),
        }
    }
}

impl Marked {
    /// Packs to copy what lives out of.
    fn to_compact(&self, record: &Record) -> HashSet<PackId> {
        let free = || self.packs.iter().filter(|(id, found)| record.get(**id).is_none() && found.is_sparse());
        let wasteful: Vec<_> = free().filter(|(_, found)| 2 * found.live_bytes <= found.bytes).collect();
        let waste: u64 = wasteful.iter().map(|(_, found)| found.bytes - found.live_bytes.min(found.bytes)).sum();
        let small: Vec<PackId> = free().filter(|(_, f)| f.live_bytes < SMALL_BYTES).map(|(id, _)| *id).collect();
        let mut chosen = HashSet::new();
        if waste >= WASTE_MIN {
            chosen.extend(wasteful.into_iter().map(|(id, _)| *id));
        }
        if small.len() > SMALL_PACKS_MAX {
            chosen.extend(small);
        }
        chosen
    }
}

/// The next record: what is condemned, spared, to be removed, or gone.
fn decide(
    record: &Record,
    marked: &Marked,
    now_ms: u64,
    is_old: impl Fn(PackId) -> Result<bool, Error>,
) -> Result<Record, Error> {
    let mut next = record.clone();
    for (text, entry) in &record.packs {
        let found = PackId::parse(&format!("{text}.pack")).and_then(|(id, _)| marked.packs.get(&id));
        match found {
            None => drop(next.packs.remove(text)),
            Some(_) if entry.removing => {}
            Some(found) if found.kept_items > 0 => drop(next.packs.remove(text)),
            Some(_) if now_ms >= entry.since_ms.saturating_add(record.grace_ms) => {
                next.packs.insert(text.clone(), Condemned { removing: true, ..*entry });
            }
            Some(_) => {}
        }
    }
    for (id, found) in &marked.packs {
        if found.kept_items == 0 && record.get(*id).is_none() && is_old(*id)? {
            next.packs.insert(id.to_string(), Condemned { since_ms: now_ms, removing: false });
        }
    }
    Ok(next)
}

/// Inserts where there is nothing yet; whether it did.
trait InsertIfAbsent {
    fn insert_if_absent(&mut self, key: u128, value: u32) -> bool;
}

impl InsertIfAbsent for HashMap<u128, u32> {
    fn insert_if_absent(&mut self, key: u128, value: u32) -> bool {
        let before = self.len();
        self.entry(key).or_insert(value);
        self.len() > before
    }
}
