//! Which chunk lies in which slot, what is pinned, and who gets room. Pure: does no IO, blocks nobody.
//!
//! A slot takes 12 bytes in the queues, 8 here, 6 to 12 in the hash table, and its hash 4 to 8 in the ghost: 30 to
//! 40 bytes a chunk. Packs of which a chunk is kept take some 100 bytes each.

use super::Key;
use super::policy::{Policy, Queue};
use crate::pack::PackId;
use hashbrown::HashTable;
use std::collections::HashMap;

const FREE: u32 = u32::MAX;

/// What a slot holds.
#[derive(Clone, Copy)]
struct Slot {
    /// Index in `packs`, or [`FREE`].
    pack: u32,
    number: u16,
}

const _: () = assert!(size_of::<Slot>() == 8);

struct Pack {
    id: PackId,
    /// Bytes of the whole pack.
    size: u64,
    chunks: u32,
}

/// The slots of one cache.
pub(crate) struct Index {
    packs: Vec<Pack>,
    free_packs: Vec<u32>,
    by_id: HashMap<PackId, u32>,
    slots: Vec<Slot>,
    table: HashTable<u32>,
    /// Slots given back.
    free: Vec<u32>,
    /// Slots that hold something, or that somebody fills.
    used: usize,
    /// Slots that may be used.
    limit: usize,
    policy: Policy,
    /// How many times each chunk is pinned, whether or not it is here.
    pins: HashMap<Key, u32>,
    /// Chunks that went to make room.
    pub(crate) evicted: u64,
}

impl Index {
    /// With room for `limit` slots.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            packs: Vec::new(),
            free_packs: Vec::new(),
            by_id: HashMap::new(),
            slots: Vec::new(),
            table: HashTable::new(),
            free: Vec::new(),
            used: 0,
            limit,
            policy: Policy::new(limit),
            pins: HashMap::new(),
            evicted: 0,
        }
    }

    fn key(&self, slot: u32) -> Key {
        let Slot { pack, number } = self.slots[slot as usize];
        Key { pack: self.packs[pack as usize].id, number }
    }

    /// The slot of a chunk that is here.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        let pack = *self.by_id.get(&key.pack)?;
        let same = |slot: &u32| {
            let there = self.slots[*slot as usize];
            (there.pack, there.number) == (pack, key.number)
        };
        self.table.find(key.hash(), same).copied()
    }

    /// The same, noting the use.
    pub(crate) fn find_used(&mut self, key: &Key) -> Option<u32> {
        let slot = self.find(key)?;
        self.policy.touch(slot);
        Some(slot)
    }

    /// The size of a pack of which something is here.
    pub(crate) fn pack_size(&self, id: PackId) -> Option<u64> {
        self.by_id.get(&id).map(|pack| self.packs[*pack as usize].size)
    }

    /// A slot to fill, making room where there is none; `None` when all that is here is pinned or being filled.
    /// The caller owes a [`Index::publish`] or [`Index::give_back`].
    pub(crate) fn reserve(&mut self) -> Option<u32> {
        if self.used < self.limit {
            self.used += 1;
            return Some(self.free.pop().unwrap_or_else(|| {
                if self.slots.len() == self.slots.capacity() {
                    self.slots.reserve_exact((self.slots.len() / 8).max(64));
                }
                self.slots.push(Slot { pack: FREE, number: 0 });
                self.slots.len() as u32 - 1
            }));
        }
        self.evict()
    }

    /// Reserves this very slot, where it is the next new one and nothing has to go for it; whether it did.
    pub(crate) fn reserve_next(&mut self, slot: u32) -> bool {
        let is_next = self.used < self.limit && self.free.is_empty() && self.slots.len() == slot as usize;
        is_next && self.reserve() == Some(slot)
    }

    /// Takes out what has to go; the slot still counts as used.
    fn evict(&mut self) -> Option<u32> {
        let Self { policy, slots, packs, .. } = self;
        let slot = policy.evict(|slot| {
            let Slot { pack, number } = slots[slot as usize];
            Key { pack: packs[pack as usize].id, number }.hash()
        })?;
        self.unlist(slot);
        self.evicted += 1;
        Some(slot)
    }

    /// Takes out a slot while more are used than may be. The caller owes a [`Index::give_back`].
    pub(crate) fn evict_surplus(&mut self) -> Option<u32> {
        if self.used > self.limit { self.evict() } else { None }
    }

    /// Lists a slot that was filled.
    pub(crate) fn publish(&mut self, slot: u32, key: Key, pack_size: u64) {
        self.list(slot, key, pack_size);
        if !self.pins.contains_key(&key) {
            self.policy.insert(slot, key.hash());
        }
    }

    /// Lists a slot that an earlier life filled; whether it may be used. Call in ascending order of slots.
    pub(crate) fn restore(&mut self, slot: u32, key: Key, pack_size: u64) -> bool {
        while self.slots.len() < slot as usize {
            self.free.push(self.slots.len() as u32);
            self.slots.push(Slot { pack: FREE, number: 0 });
        }
        self.slots.push(Slot { pack: FREE, number: 0 });
        if self.used >= self.limit || self.find(&key).is_some() {
            self.free.push(slot);
            return false;
        }
        self.used += 1;
        self.list(slot, key, pack_size);
        self.policy.insert_main(slot);
        true
    }

    fn list(&mut self, slot: u32, key: Key, size: u64) {
        let pack = *self.by_id.entry(key.pack).or_insert_with(|| {
            let pack = Pack { id: key.pack, size, chunks: 0 };
            match self.free_packs.pop() {
                Some(at) => {
                    self.packs[at as usize] = pack;
                    at
                }
                None => {
                    self.packs.push(pack);
                    self.packs.len() as u32 - 1
                }
            }
        });
        self.packs[pack as usize].chunks += 1;
        self.slots[slot as usize] = Slot { pack, number: key.number };
        let Self { table, slots, packs, .. } = self;
        table.insert_unique(key.hash(), slot, |slot| {
            let Slot { pack, number } = slots[*slot as usize];
            Key { pack: packs[pack as usize].id, number }.hash()
        });
    }

    fn unlist(&mut self, slot: u32) {
        let key = self.key(slot);
        if let Ok(found) = self.table.find_entry(key.hash(), |there| *there == slot) {
            found.remove();
        }
        let pack = self.slots[slot as usize].pack;
        self.slots[slot as usize].pack = FREE;
        let entry = &mut self.packs[pack as usize];
        entry.chunks -= 1;
        if entry.chunks == 0 {
            self.by_id.remove(&key.pack);
            self.free_packs.push(pack);
        }
    }

    /// Takes out a chunk; its slot, for which the caller owes a [`Index::give_back`].
    pub(crate) fn take(&mut self, key: &Key) -> Option<u32> {
        let slot = self.find(key)?;
        self.policy.remove(slot);
        self.unlist(slot);
        Some(slot)
    }

    /// A slot that holds nothing (any more).
    pub(crate) fn give_back(&mut self, slot: u32) {
        self.used -= 1;
        self.free.push(slot);
    }

    /// How many slots are used, and how many may be.
    pub(crate) fn room(&self) -> (usize, usize) {
        (self.used, self.limit)
    }

    /// From now on no more than `limit`; refused with the number of chunks pinned where these are more.
    pub(crate) fn set_limit(&mut self, limit: usize) -> Result<(), usize> {
        if self.pins.len() > limit {
            return Err(self.pins.len());
        }
        self.limit = limit;
        self.policy.set_limit(limit);
        Ok(())
    }

    /// Pins chunks, here or not yet, all or none: refused with the number of chunks there is no room for.
    pub(crate) fn pin(&mut self, keys: &[Key]) -> Result<(), usize> {
        let new = keys.iter().filter(|key| !self.pins.contains_key(key)).count();
        if let Some(beyond) = (self.pins.len() + new).checked_sub(self.limit).filter(|beyond| *beyond > 0) {
            return Err(beyond);
        }
        for key in keys {
            *self.pins.entry(*key).or_insert(0) += 1;
            if let Some(slot) = self.find(key) {
                self.policy.remove(slot);
            }
        }
        Ok(())
    }

    /// Takes back one [`Index::pin`] of each.
    pub(crate) fn unpin(&mut self, keys: &[Key]) {
        for key in keys {
            let Some(count) = self.pins.get_mut(key) else { continue };
            *count -= 1;
            if *count > 0 {
                continue;
            }
            self.pins.remove(key);
            if let Some(slot) = self.find(key)
                && self.policy.queue(slot) == Queue::None
            {
                self.policy.insert_main(slot);
            }
        }
    }

    /// Chunks pinned.
    pub(crate) fn pinned(&self) -> usize {
        self.pins.len()
    }

    /// Bytes it takes in memory, pins aside.
    pub(crate) fn memory(&self) -> usize {
        // A pack: its entry, and its place in the hash map.
        self.policy.memory()
            + self.slots.capacity() * size_of::<Slot>()
            + self.table.capacity() * 5 * 8 / 7
            + self.free.capacity() * 4
            + self.packs.capacity() * size_of::<Pack>()
            + self.by_id.capacity() * (size_of::<(PackId, u32)>() + 1) * 8 / 7
    }
}

#[cfg(test)]
mod tests;
