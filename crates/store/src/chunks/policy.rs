//! Which chunk goes when room is needed: S3-FIFO. Pure: knows slots by number and nothing of what they hold.
//!
//! S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23): new chunks enter a *small*
//! queue of a tenth of the slots. What was asked for again by the time it reaches the end goes to the *main* queue,
//! the rest leaves, and a *ghost* remembers its hash: what comes back soon enters the main queue at once. In the main
//! queue, what was used gets another round. SIEVE (Zhang et al., NSDI'24) is simpler still, but its authors advise
//! against it where scans matter: imports, verification and full copies read everything once, and must not drive
//! out what every boot needs.
//!
//! One change: the frames of one chunk are usually read one after another, which would make every chunk of a scan
//! look popular. So a use counts only when it comes at least an eighth of the small queue's length after the chunk's
//! insertion or its last use that counted (the "correlated references" of LRU-K and 2Q).
//!
//! Pinned slots are in no queue.

/// No slot.
const NONE: u32 = u32::MAX;
const FREQUENCY_MAX: u8 = 3;
/// Hashes in a bucket of the ghost.
const WAYS: usize = 4;

/// Where a slot is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Queue {
    /// In no queue: free, being written, or pinned.
    #[default]
    None,
    Small,
    Main,
}

/// 12 bytes a slot.
#[derive(Clone, Copy, Default)]
struct Link {
    newer: u32,
    older: u32,
    queue: Queue,
    /// Frequency in the low two bits; the rest is the period of the last use that counted.
    used: Used,
}

const _: () = assert!(size_of::<Link>() == 12);

#[derive(Clone, Copy, Default)]
struct Used {
    frequency: u8,
    period: u8,
}

struct List {
    newest: u32,
    oldest: u32,
    len: usize,
}

impl List {
    const fn new() -> Self {
        Self { newest: NONE, oldest: NONE, len: 0 }
    }
}

/// The queues.
pub(crate) struct Policy {
    links: Vec<Link>,
    small: List,
    main: List,
    ghost: Ghost,
    limit: usize,
    insertions: u64,
}

impl Policy {
    /// For `limit` slots.
    pub(crate) fn new(limit: usize) -> Self {
        let ghost = Ghost::new(limit);
        Self { links: Vec::new(), small: List::new(), main: List::new(), ghost, limit, insertions: 0 }
    }

    /// From now on for `limit` slots. The ghost forgets.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.ghost = Ghost::new(limit);
    }

    fn small_target(&self) -> usize {
        (self.limit / 10).max(1)
    }

    /// Time, in periods of an eighth of the small queue; `None` where that is too short to tell apart.
    fn period(&self) -> Option<u8> {
        let length = self.small_target() as u64 / 8;
        (length > 0).then(|| (self.insertions / length) as u8)
    }

    /// Enters a slot that was just filled with content of this hash.
    pub(crate) fn insert(&mut self, slot: u32, hash: u64) {
        self.insertions += 1;
        let known = self.ghost.take(hash);
        self.enter(slot, if known { Queue::Main } else { Queue::Small });
    }

    /// Enters a slot that was filled in an earlier life or was pinned until now.
    pub(crate) fn insert_main(&mut self, slot: u32) {
        self.enter(slot, Queue::Main);
    }

    fn enter(&mut self, slot: u32, queue: Queue) {
        if self.links.len() <= slot as usize {
            if self.links.capacity() <= slot as usize {
                // Doubling would waste as much as half of a large structure.
                let more = slot as usize + 1 - self.links.len() + self.links.len() / 8;
                self.links.reserve_exact(more);
            }
            self.links.resize(slot as usize + 1, Link::default());
        }
        let period = self.period().unwrap_or(0);
        self.links[slot as usize].used = Used { frequency: 0, period };
        self.push(slot, queue);
    }

    /// Notes a use.
    pub(crate) fn touch(&mut self, slot: u32) {
        let period = self.period();
        let Some(link) = self.links.get_mut(slot as usize).filter(|link| link.queue != Queue::None) else { return };
        if let Some(period) = period {
            // Two periods apart by number: at least one whole one has passed.
            if period.wrapping_sub(link.used.period) < 2 {
                return;
            }
            link.used.period = period;
        }
        link.used.frequency = (link.used.frequency + 1).min(FREQUENCY_MAX);
    }

    /// Takes a slot out: dropped, or pinned.
    pub(crate) fn remove(&mut self, slot: u32) {
        if self.queue(slot) != Queue::None {
            self.unlink(slot);
        }
    }

    /// Where a slot is.
    pub(crate) fn queue(&self, slot: u32) -> Queue {
        self.links.get(slot as usize).map_or(Queue::None, |link| link.queue)
    }

    /// Takes the slot out that has to go, or `None` where every slot is pinned. `hash` tells what a slot holds.
    pub(crate) fn evict(&mut self, hash: impl Fn(u32) -> u64) -> Option<u32> {
        // Ends: each step evicts, moves from small to main (never back), or lowers a frequency.
        while self.small.len + self.main.len > 0 {
            let from_small = self.small.len >= self.small_target() || self.main.len == 0;
            let slot = if from_small { self.small.oldest } else { self.main.oldest };
            self.unlink(slot);
            let used = &mut self.links[slot as usize].used;
            match (from_small, used.frequency) {
                (true, 0) => {
                    self.ghost.add(hash(slot));
                    return Some(slot);
                }
                (true, _) => used.frequency = 0,
                (false, 0) => return Some(slot),
                (false, _) => used.frequency -= 1,
            }
            self.push(slot, Queue::Main);
        }
        None
    }

    fn list(&mut self, queue: Queue) -> &mut List {
        match queue {
            Queue::Small => &mut self.small,
            _ => &mut self.main,
        }
    }

    fn push(&mut self, slot: u32, queue: Queue) {
        let list = self.list(queue);
        let second = std::mem::replace(&mut list.newest, slot);
        list.len += 1;
        if second == NONE {
            list.oldest = slot;
        } else {
            self.links[second as usize].newer = slot;
        }
        let link = &mut self.links[slot as usize];
        (link.newer, link.older, link.queue) = (NONE, second, queue);
    }

    fn unlink(&mut self, slot: u32) {
        let Link { newer, older, queue, .. } = self.links[slot as usize];
        self.links[slot as usize].queue = Queue::None;
        if newer != NONE {
            self.links[newer as usize].older = older;
        }
        if older != NONE {
            self.links[older as usize].newer = newer;
        }
        let list = self.list(queue);
        list.len -= 1;
        if list.newest == slot {
            list.newest = older;
        }
        if list.oldest == slot {
            list.oldest = newer;
        }
    }

    /// Bytes it takes in memory.
    pub(crate) fn memory(&self) -> usize {
        self.links.capacity() * size_of::<Link>() + self.ghost.hashes.len() * 4
    }
}

/// Remembers about as many hashes as there are slots, 4 bytes each: buckets of four, the oldest of a bucket goes.
/// A hash is mistaken for another one in four of 2^32 look-ups, which costs a place in the wrong queue.
struct Ghost {
    hashes: Vec<u32>,
}

impl Ghost {
    fn new(limit: usize) -> Self {
        Self { hashes: vec![0; limit.max(WAYS).next_power_of_two()] }
    }

    /// The bucket, and what stands for the hash in it: never 0, which is an empty place.
    fn place(&mut self, hash: u64) -> (&mut [u32], u32) {
        let buckets = self.hashes.len() / WAYS;
        let at = (hash as usize & (buckets - 1)) * WAYS;
        (&mut self.hashes[at..at + WAYS], (hash >> 32) as u32 | 1)
    }

    fn add(&mut self, hash: u64) {
        let (bucket, mark) = self.place(hash);
        bucket.rotate_right(1);
        bucket[0] = mark;
    }

    /// Whether the hash is there; it is not afterwards.
    fn take(&mut self, hash: u64) -> bool {
        let (bucket, mark) = self.place(hash);
        let Some(at) = bucket.iter().position(|there| *there == mark) else { return false };
        bucket[at] = 0;
        bucket[at..].rotate_left(1);
        true
    }
}

#[cfg(test)]
mod tests;
