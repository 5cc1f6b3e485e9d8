//! Moving what lives out of frames that are mostly dead, so that scattered survivors do not keep the space of
//! everything around them; and out of small packs when there are many, so that a long history of small commits does
//! not become as many files. `arrange` says in which order.
//!
//! The survivors are written into a new pack, which is made durable before anyone is told; then their entries
//! point there, the old frames have nothing that lives, and the collection gives them up. A crash in between
//! leaves two good copies, of which the one in the newer pack counts. No more is copied than is freed, but for small
//! packs: what they hold is copied until it is a pack that is not small, once for [`SMALL_PACKS_MAX`] commits, and with it
//! leaves of trees that take no more than twice what the nodes above them do, and no more upper nodes than are moved.

use crate::arrange::{Reading, WALK};
use crate::catalog::Location;
use crate::error::Error;
use crate::frame::{self, FRAME_NODES, Kind};
use crate::name::Name;
use crate::store::Store;
use crate::transaction::Appended;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

/// Less waste than this is left alone.
const WASTE_MIN: u64 = 1 << 20;
/// A pack in which less than this lives is small.
const SMALL_BYTES: u64 = 1 << 20;
/// More small packs than this become one.
const SMALL_PACKS_MAX: usize = 32;
/// Items moved by one collection at most; the next one goes on.
const ITEMS_MAX: usize = 1 << 17;

/// An item that lives in a sparse frame.
struct Survivor {
    from: Location,
    name: Name,
    kind: Kind,
}

/// An item in its new frame.
struct Move {
    name: Name,
    from: Location,
    to: Location,
}

impl Store {
    /// Moves survivors; how many. The caller keeps other collections away.
    pub(crate) fn compact(&self) -> Result<u64, Error> {
        let (sparse, small) = self.sparse_frames();
        if sparse.is_empty() {
            return Ok(0);
        }
        let survivors = self.survivors(&sparse, small)?;
        let tx = self.begin();
        let mut moves = Vec::with_capacity(survivors.len());
        // Kept until the entries point to the new frames, so that nobody takes those for dead.
        let mut appended: Vec<Appended> = Vec::new();
        let mut gathered: Vec<(&Survivor, Vec<u8>)> = Vec::new();
        for survivor in &survivors {
            let bytes = match self.item_bytes(survivor.kind, &survivor.name) {
                Ok(bytes) => bytes,
                Err(error) => {
                    log::warn!("cannot move {} out of its frame: {error}", survivor.name);
                    continue;
                }
            };
            let full = gathered.first().is_some_and(|(first, old)| {
                let limit = match first.kind {
                    Kind::Nodes => FRAME_NODES,
                    Kind::Blocks => frame::blocks_per_frame(old.len() as u32),
                };
                let differs = first.kind != survivor.kind || (first.kind == Kind::Blocks && old.len() != bytes.len());
                differs || gathered.len() >= limit
            });
            if full {
                appended.push(append(&tx, &mut gathered, &mut moves)?);
            }
            gathered.push((survivor, bytes));
        }
        if !gathered.is_empty() {
            appended.push(append(&tx, &mut gathered, &mut moves)?);
        }
        tx.seal()?;
        let _ledger = self.ledger();
        let moved = moves.iter().filter(|m| self.catalog.relocate(&m.name, m.from, m.to)).count();
        drop(appended);
        drop(_ledger);
        Ok(moved as u64)
    }

    /// Frames to move out of: those of which at most half lives, when together they waste enough, and all of small
    /// packs, when there are too many; and the oldest of these.
    fn sparse_frames(&self) -> (HashMap<(u32, u32), Kind>, Option<u32>) {
        let packs: HashMap<u32, _> =
            self.catalog.packs().into_iter().filter(|p| p.is_settled()).map(|p| (p.handle, p.frames())).collect();
        let mut live: HashMap<u32, Vec<u8>> = packs.iter().map(|(handle, f)| (*handle, vec![0; f.len()])).collect();
        self.catalog.for_each(|_, location, refs| {
            if refs.load(Ordering::Relaxed) > 0
                && let Some(frames) = live.get_mut(&location.pack)
            {
                frames[location.frame as usize] += 1;
            }
        });
        let mut waste = 0;
        let mut sparse = HashMap::new();
        let (mut small, mut in_small) = (Vec::new(), Vec::new());
        for (handle, frames) in &packs {
            let living = || frames.iter().zip(&live[handle]).zip(0..).filter(|((_, live), _)| **live > 0);
            for ((info, live), number) in living().filter(|((info, live), _)| 2 * **live <= info.items) {
                waste += u64::from(info.stored) * u64::from(info.items - live) / u64::from(info.items);
                sparse.insert((*handle, number), info.kind);
            }
            // Those laid down for a version have an order of their own, and as many as there are such versions.
            let is_laid = self.catalog.pack(*handle).is_some_and(|pack| pack.laid_for() != 0);
            if !is_laid && living().map(|((info, _), _)| u64::from(info.stored)).sum::<u64>() < SMALL_BYTES {
                small.push(*handle);
                in_small.extend(living().map(|((info, _), number)| ((*handle, number), info.kind)));
            }
        }
        if waste < WASTE_MIN {
            sparse.clear();
        }
        if small.len() <= SMALL_PACKS_MAX {
            return (sparse, None);
        }
        sparse.extend(in_small);
        (sparse, small.into_iter().min())
    }

    /// What lives in these frames, blocks before nodes, in the order in which it is read, or else lies.
    fn survivors(&self, sparse: &HashMap<(u32, u32), Kind>, oldest_small: Option<u32>) -> Result<Vec<Survivor>, Error> {
        let mut out = Vec::new();
        self.catalog.for_each(|name, from, refs| {
            if refs.load(Ordering::Relaxed) > 0
                && let Some(kind) = sparse.get(&(from.pack, from.frame))
            {
                out.push(Survivor { from, name: *name, kind: *kind });
            }
        });
        let mut places = HashMap::new();
        if let Some(oldest) = oldest_small {
            let reading = Reading::of(self, oldest, WALK * out.len())?;
            places = reading.places();
            let moving: HashSet<Name> = out.iter().map(|survivor| survivor.name).collect();
            let along = reading.along.into_iter().filter(|(name, _)| !moving.contains(name));
            out.extend(along.map(|(name, from)| Survivor { from, name, kind: Kind::Nodes }));
        }
        let place = |s: &Survivor| places.get(&s.name).copied().unwrap_or(usize::MAX);
        out.sort_by_cached_key(|s| (s.kind == Kind::Nodes, place(s), s.from.pack, s.from.frame, s.from.slot));
        out.truncate(ITEMS_MAX);
        Ok(out)
    }
}

/// Writes the gathered items as one frame.
fn append(
    tx: &crate::Transaction<'_>,
    gathered: &mut Vec<(&Survivor, Vec<u8>)>,
    moves: &mut Vec<Move>,
) -> Result<Appended, Error> {
    let raw: Vec<u8> = gathered.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
    let names: Vec<Name> = gathered.iter().map(|(survivor, _)| survivor.name).collect();
    let kind = gathered[0].0.kind;
    let encoded = frame::encode(kind, &raw).map_err(|error| Error::io("compress", "a frame", error))?;
    let appended = tx.append(&encoded, &names)?;
    for (slot, (survivor, _)) in gathered.drain(..).enumerate() {
        moves.push(Move { name: survivor.name, from: survivor.from, to: appended.location(slot) });
    }
    Ok(appended)
}
