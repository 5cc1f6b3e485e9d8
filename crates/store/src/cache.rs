//! A sharded, bounded cache in which many waiters share one fetch.
//!
//! Eviction is a clock with one bit (second chance): reads only set a flag, so that threads that hit do not
//! queue behind one another for longer than a map lookup.

use crate::waits;
use hashbrown::HashMap;
use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

const SHARDS: usize = 16;

struct Slot<V> {
    value: OnceLock<V>,
    /// Held by the one thread that fetches.
    fetching: Mutex<()>,
    used: AtomicBool,
    /// Whether who fetched it waited for the medium: then whoever waited for that did so too.
    far: AtomicBool,
}

struct Shard<K, V> {
    slots: HashMap<K, Arc<Slot<V>>, std::hash::RandomState>,
    /// Keys in the order of the clock hand, with the weight of each.
    clock: VecDeque<(K, usize)>,
    weight: usize,
}

/// A cache of values that are cheap to clone (`Arc`s).
pub(crate) struct Cache<K, V> {
    shards: Box<[Mutex<Shard<K, V>>]>,
    shard_weight_max: usize,
}

/// Whether a value was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Cached,
    Fetched,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    /// A cache that keeps about `weight_max` in all.
    pub(crate) fn new(weight_max: usize) -> Self {
        let shard = || Mutex::new(Shard { slots: HashMap::default(), clock: VecDeque::new(), weight: 0 });
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), shard_weight_max: weight_max / SHARDS }
    }

    fn shard(&self, hash: u64) -> MutexGuard<'_, Shard<K, V>> {
        self.shards[hash as usize % SHARDS].lock().expect("no panic while a shard is locked")
    }

    /// The value of `key`, fetched by at most one thread at a time. A failed fetch leaves nothing behind: the
    /// next waiter tries again. `hash` picks the shard.
    pub(crate) fn get<E>(
        &self,
        key: K,
        hash: u64,
        weigh: impl Fn(&V) -> usize,
        fetch: impl FnOnce() -> Result<V, E>,
    ) -> Result<(V, Found), E> {
        let slot = {
            let mut shard = self.shard(hash);
            let slot = shard.slots.entry(key).or_insert_with(|| {
                let (used, far) = (AtomicBool::new(false), AtomicBool::new(false));
                Arc::new(Slot { value: OnceLock::new(), fetching: Mutex::new(()), used, far })
            });
            Arc::clone(slot)
        };
        if let Some(value) = slot.value.get() {
            slot.used.store(true, Ordering::Relaxed);
            return Ok((value.clone(), Found::Cached));
        }
        let guard = slot.fetching.lock().expect("no panic while fetching");
        if let Some(value) = slot.value.get() {
            if slot.far.load(Ordering::Relaxed) {
                waits::note();
            }
            return Ok((value.clone(), Found::Cached));
        }
        let waited = waits::waits();
        let fetched = fetch();
        slot.far.store(waits::waits() != waited, Ordering::Relaxed);
        let mut shard = self.shard(hash);
        match fetched {
            Ok(value) => {
                let _ = slot.value.set(value.clone());
                drop(guard);
                // Removed meanwhile (a failed fetch of another thread): do not account for it.
                if shard.slots.get(&key).is_some_and(|there| Arc::ptr_eq(there, &slot)) {
                    shard.keep(key, weigh(&value), self.shard_weight_max);
                }
                Ok((value, Found::Fetched))
            }
            Err(error) => {
                if shard.slots.get(&key).is_some_and(|there| Arc::ptr_eq(there, &slot)) {
                    shard.slots.remove(&key);
                }
                Err(error)
            }
        }
    }
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    /// The value of `key`, where it is here.
    pub(crate) fn peek(&self, key: &K, hash: u64) -> Option<V> {
        let shard = self.shard(hash);
        let slot = shard.slots.get(key)?;
        let value = slot.value.get()?;
        slot.used.store(true, Ordering::Relaxed);
        Some(value.clone())
    }
}

impl<K: Hash + Eq + Copy, V> Cache<K, V> {
    /// Drops the value of `key`; who has it keeps it.
    pub(crate) fn forget(&self, key: &K, hash: u64) {
        let mut shard = self.shards[hash as usize % SHARDS].lock().expect("no panic while a shard is locked");
        if shard.slots.remove(key).is_some()
            && let Some(at) = shard.clock.iter().position(|(there, _)| there == key)
            && let Some((_, weight)) = shard.clock.remove(at)
        {
            shard.weight -= weight;
        }
    }
}

impl<K: Hash + Eq + Copy, V> Shard<K, V> {
    /// Accounts for a new value and evicts until the shard is within its bound, the newest excepted.
    fn keep(&mut self, key: K, weight: usize, weight_max: usize) {
        self.clock.push_back((key, weight));
        self.weight += weight;
        while self.weight > weight_max && self.clock.len() > 1 {
            let (key, weight) = self.clock.pop_front().expect("more than one");
            let used = self.slots.get(&key).is_some_and(|slot| slot.used.swap(false, Ordering::Relaxed));
            if used {
                self.clock.push_back((key, weight));
            } else {
                self.slots.remove(&key);
                self.weight -= weight;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn many_waiters_share_one_fetch_and_failures_are_not_kept() {
        let cache: Cache<u32, u32> = Cache::new(1 << 20);
        let fetches = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let fetch = || {
                        fetches.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok::<_, ()>(7)
                    };
                    assert_eq!(cache.get(1, 1, |_| 1, fetch).unwrap().0, 7);
                });
            }
        });
        assert_eq!(fetches.load(Ordering::SeqCst), 1);
        assert_eq!(cache.get(2, 2, |_| 1, || Err("no")), Err("no"));
        assert_eq!(cache.get(2, 2, |_| 1, || Ok::<_, ()>(3)), Ok((3, Found::Fetched)));
    }

    #[test]
    fn stays_within_its_bound_and_keeps_what_is_used() {
        let cache: Cache<u32, u32> = Cache::new(SHARDS * 10);
        for key in 0..1000 {
            cache.get(key, 0, |_| 1, || Ok::<_, ()>(key)).unwrap();
            cache.get(0, 0, |_| 1, || Ok::<_, ()>(0)).unwrap();
        }
        assert_eq!(cache.get(0, 0, |_| 1, || Err(())), Ok((0, Found::Cached)));
        cache.forget(&0, 0);
        assert_eq!(cache.get(0, 0, |_| 1, || Err(())), Err(()));
        assert_eq!(cache.get(1, 0, |_| 1, || Err(())), Err(()));
        let shard = cache.shard(0);
        assert!(shard.weight <= 10 && shard.slots.len() == shard.clock.len(), "{} {}", shard.weight, shard.slots.len());
    }
}
