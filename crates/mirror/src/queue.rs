//! Demand before prefetch.
//!
//! Demand never queues here: the workers of the front answer it at once. What queues is prefetch, worked by one
//! thread of low priority in small pieces, which lets all demand go first between two of them.

use crate::control::Queued;
use base::ByteRange;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Bytes prefetched between two looks at demand: what one frame of the store is likely to hold.
pub(crate) const PIECE: u64 = 64 << 10;
/// Bytes the queue takes on at most.
const QUEUED_MAX: u64 = 64 << 30;
/// Ranges the queue takes on at most.
const RANGES_MAX: usize = 1 << 20;
/// The longest that prefetch waits for demand to cease before it does one piece all the same.
const YIELD_MAX: Duration = Duration::from_millis(100);

/// How many requests the front is answering right now.
#[derive(Default)]
pub(crate) struct Demand {
    now: AtomicU64,
    ceased: Condvar,
    lock: Mutex<()>,
}

/// One request being answered.
pub(crate) struct Serving<'a>(&'a Demand);

impl Demand {
    /// A request has arrived.
    pub(crate) fn serve(&self) -> Serving<'_> {
        self.arrive();
        Serving(self)
    }

    /// A request has arrived that another thread will answer, and tell by [`Demand::leave`].
    pub(crate) fn arrive(&self) {
        self.now.fetch_add(1, Ordering::AcqRel);
    }

    /// A request that arrived so has been answered.
    pub(crate) fn leave(&self) {
        if self.now.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.ceased.notify_one();
        }
    }

    /// Waits until no request is being answered, but not for ever.
    pub(crate) fn give_way(&self) {
        if self.now.load(Ordering::Acquire) == 0 {
            return;
        }
        let guard = self.lock.lock().expect("no waiter panics");
        // A wake-up lost between the count and the wait costs a millisecond, and spares demand a lock.
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(1);
        let mut guard = Some(guard);
        while self.now.load(Ordering::Acquire) > 0 && waited < YIELD_MAX {
            let (again, _) = self.ceased.wait_timeout(guard.take().expect("held"), step).expect("no waiter panics");
            guard = Some(again);
            waited += step;
        }
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// What came of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Go on with the next.
    Done,
    /// The kernel does not know the file yet: try again a little later.
    NotYet,
    /// Give this request up.
    Stop,
}

/// One request's remaining ranges.
#[derive(Debug)]
struct Job {
    object: u64,
    vm: Option<String>,
    ranges: VecDeque<ByteRange>,
    tries_left: u32,
}

/// The queue of prefetch.
#[derive(Default)]
pub(crate) struct Prefetch {
    jobs: Mutex<VecDeque<Job>>,
    came: Condvar,
}

/// Tries of a file that the kernel does not know, and how far apart: it is prefetched as soon as a VM opens it.
const TRIES: u32 = 2_000;
const TRY_AGAIN: Duration = Duration::from_millis(5);

impl Prefetch {
    /// Takes on ranges of an object, in order, as far as there is room.
    pub(crate) fn add(&self, object: u64, vm: Option<String>, ranges: impl IntoIterator<Item = ByteRange>) -> Queued {
        let mut jobs = self.jobs.lock().expect("no worker panics");
        let mut room = QUEUED_MAX.saturating_sub(jobs.iter().flat_map(|j| &j.ranges).map(ByteRange::len).sum());
        let places = RANGES_MAX.saturating_sub(jobs.iter().map(|j| j.ranges.len()).sum());
        let mut taken = VecDeque::new();
        let mut bytes = 0;
        for range in ranges.into_iter().filter(|r| !r.is_empty()).take(places) {
            let Some(left) = room.checked_sub(range.len()) else { break };
            room = left;
            bytes += range.len();
            taken.push_back(range);
        }
        if !taken.is_empty() {
            jobs.push_back(Job { object, vm, ranges: taken, tries_left: TRIES });
            self.came.notify_one();
        }
        Queued { bytes }
    }

    /// Requests not yet done.
    pub(crate) fn len(&self) -> u64 {
        self.jobs.lock().expect("no worker panics").len() as u64
    }

    /// Forgets what was asked for an object.
    pub(crate) fn forget(&self, object: u64) {
        self.jobs.lock().expect("no worker panics").retain(|j| j.object != object);
    }

    /// Works for ever: `fetch` brings one piece of an object.
    pub(crate) fn work(&self, demand: &Demand, mut fetch: impl FnMut(u64, ByteRange, Option<&str>) -> Outcome) {
        loop {
            let Some((object, piece, vm)) = self.first_piece() else { continue };
            demand.give_way();
            let outcome = fetch(object, piece, vm.as_deref());
            self.settle(object, piece, outcome);
        }
    }

    /// Waits for work and says its first piece, which stays queued until it is settled.
    fn first_piece(&self) -> Option<(u64, ByteRange, Option<String>)> {
        let jobs = self.jobs.lock().expect("no worker panics");
        let jobs = self.came.wait_while(jobs, |j| j.is_empty()).expect("no worker panics");
        let job = jobs.front()?;
        let range = job.ranges.front()?;
        Some((job.object, ByteRange::new(range.start, range.end.min(range.start + PIECE)), job.vm.clone()))
    }

    fn settle(&self, object: u64, piece: ByteRange, outcome: Outcome) {
        let mut jobs = self.jobs.lock().expect("no worker panics");
        // The job may have been forgotten meanwhile.
        let Some(job) = jobs.front_mut().filter(|j| j.object == object) else { return };
        let Some(range) = job.ranges.front_mut().filter(|r| r.start == piece.start) else { return };
        match outcome {
            Outcome::Done => {
                range.start = piece.end;
                if range.is_empty() {
                    job.ranges.pop_front();
                }
                if job.ranges.is_empty() {
                    jobs.pop_front();
                }
            }
            Outcome::NotYet if job.tries_left > 0 => {
                job.tries_left -= 1;
                let job = jobs.pop_front().expect("it is in front");
                jobs.push_back(job);
                drop(jobs);
                std::thread::sleep(TRY_AGAIN);
            }
            Outcome::NotYet | Outcome::Stop => drop(jobs.pop_front()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[test]
    fn pieces_come_in_order_and_bounded() {
        let queue = Arc::new(Prefetch::default());
        assert_eq!(
            queue.add(1, None, [ByteRange::at(0, QUEUED_MAX + 1)]),
            Queued { bytes: 0 },
            "more than it may hold"
        );
        let (first, second) = (ByteRange::at(PIECE, 2 * PIECE + 1), ByteRange::at(0, 10));
        assert_eq!(queue.add(7, None, [first, ByteRange::at(5, 0), second]), Queued { bytes: 2 * PIECE + 11 });
        queue.add(8, None, [ByteRange::at(3, 4)]);
        let (tx, rx) = mpsc::channel();
        let worker = queue.clone();
        std::thread::spawn(move || {
            worker.work(&Demand::default(), |object, piece, _| {
                tx.send((object, piece)).map_or(Outcome::Stop, |()| Outcome::Done)
            });
        });
        let got: Vec<_> = rx.iter().take(5).collect();
        let piece = |object, start, len| (object, ByteRange::at(start, len));
        let wanted = [piece(7, PIECE, PIECE), piece(7, 2 * PIECE, PIECE), piece(7, 3 * PIECE, 1), piece(7, 0, 10)];
        assert_eq!(got[..4], wanted);
        assert_eq!(got[4], piece(8, 3, 4));
    }

    #[test]
    fn demand_in_hand_holds_prefetch_back() {
        let demand = Demand::default();
        let serving = demand.serve();
        let began = std::time::Instant::now();
        std::thread::scope(|s| {
            let waiter = s.spawn(|| demand.give_way());
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiter.is_finished(), "prefetch went on while a request was in hand");
            drop(serving);
            waiter.join().unwrap();
        });
        assert!(began.elapsed() < YIELD_MAX, "prefetch did not go on when demand ceased");
    }
}
