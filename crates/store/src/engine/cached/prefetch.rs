//! The queue of what is to be fetched ahead, and the workers, which give way to readers.

use super::{Shared, pack_of};
use crate::engine::cached::fetch::OpenPack;
use crate::pack::PackId;
use base::ByteRange;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Ranges that may wait.
const WAITING_MAX: usize = 1 << 16;

#[derive(Default)]
struct Waiting {
    ranges: VecDeque<(PackId, ByteRange)>,
    /// Workers that are at it.
    busy: usize,
    /// Readers that fetch.
    demand: usize,
    stopped: bool,
}

/// The queue.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// A reader fetches while this lives.
pub(super) struct Demand<'a>(&'a Queue);

impl Drop for Demand<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.demand -= 1;
        if waiting.demand == 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no panic while the queue is locked")
    }

    fn wait<'a>(&self, waiting: MutexGuard<'a, Waiting>) -> MutexGuard<'a, Waiting> {
        self.changed.wait(waiting).expect("no panic while the queue is locked")
    }

    /// Adds a range; whether there was room.
    pub(super) fn push(&self, pack: PackId, range: ByteRange) -> bool {
        let mut waiting = self.waiting();
        if waiting.ranges.len() >= WAITING_MAX {
            return false;
        }
        waiting.ranges.push_back((pack, range));
        self.changed.notify_all();
        true
    }

    /// Says that a reader fetches.
    pub(super) fn demand(&self) -> Demand<'_> {
        self.waiting().demand += 1;
        Demand(self)
    }

    /// The next range; `None` when it is over. The caller owes a [`Queue::done`].
    fn next(&self) -> Option<(PackId, ByteRange)> {
        let mut waiting = self.waiting();
        loop {
            if waiting.stopped {
                return None;
            }
            if waiting.demand == 0
                && let Some(next) = waiting.ranges.pop_front()
            {
                waiting.busy += 1;
                return Some(next);
            }
            waiting = self.wait(waiting);
        }
    }

    fn done(&self) {
        self.waiting().busy -= 1;
        self.changed.notify_all();
    }

    /// Waits while readers fetch; whether to go on.
    fn give_way(&self) -> bool {
        let mut waiting = self.waiting();
        while waiting.demand > 0 && !waiting.stopped {
            waiting = self.wait(waiting);
        }
        !waiting.stopped
    }

    /// Ends the workers.
    pub(super) fn stop(&self) {
        self.waiting().stopped = true;
        self.changed.notify_all();
    }

    pub(super) fn wait_until_idle(&self, at_most: Duration) -> bool {
        let until = Instant::now() + at_most;
        let mut waiting = self.waiting();
        while waiting.busy > 0 || !waiting.ranges.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            waiting = self.changed.wait_timeout(waiting, left).expect("no panic while the queue is locked").0;
        }
        true
    }
}

impl Shared {
    /// A worker's life. What cannot be fetched ahead is left to the reader who needs it, and to its error.
    pub(super) fn prefetch_for_ever(self: &Arc<Self>) {
        while let Some((id, range)) = self.queue.next() {
            let name = id.pack_object();
            debug_assert_eq!(pack_of(&name), Some(id));
            let pack = OpenPack::new(Arc::clone(self), &name, id);
            if let Err(error) = pack.bring(&range, || self.queue.give_way()) {
                log::debug!("cannot fetch {name} ahead: {error}");
            }
            self.queue.done();
        }
    }
}
