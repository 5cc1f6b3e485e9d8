//! Reads of RAM that cannot be answered now. They wait here, not in a worker, and are tried again until they can be
//! answered; an error would be a SIGBUS in the hypervisor, and the end of the guest.
//!
//! Only two kinds are given up, with an error that nobody sees: a file that was removed, and a thread that is
//! about to die of SIGKILL (which could otherwise not die).

use crate::control::Waiting;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

const DELAY_MIN: Duration = Duration::from_millis(10);
const DELAY_MAX: Duration = Duration::from_secs(1);

/// One read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) unique: u64,
    pub(crate) object: u64,
    pub(crate) offset: u64,
    pub(crate) size: usize,
    pub(crate) thread: u32,
    pub(crate) began: Instant,
}

struct Guest {
    read: Read,
    vm: Option<String>,
    why: String,
    delay: Duration,
    next: Instant,
}

/// All reads that wait.
#[derive(Default)]
pub(crate) struct WaitingRoom {
    guests: Mutex<Vec<Guest>>,
    came: Condvar,
}

/// What came of another try.
pub(crate) enum Tried {
    /// Answered, one way or the other.
    Answered,
    /// Waits on.
    Waits(String),
}

impl WaitingRoom {
    /// Lets a read wait.
    pub(crate) fn enter(&self, read: Read, vm: Option<String>, why: String) {
        let next = Instant::now() + DELAY_MIN;
        self.guests.lock().expect("no holder panics").push(Guest { read, vm, why, delay: DELAY_MIN, next });
        self.came.notify_one();
    }

    /// Something changed: all are tried at once.
    pub(crate) fn nudge(&self) {
        let now = Instant::now();
        for guest in self.guests.lock().expect("no holder panics").iter_mut() {
            (guest.next, guest.delay) = (now, DELAY_MIN);
        }
        self.came.notify_one();
    }

    /// Who waits.
    pub(crate) fn list(&self) -> Vec<Waiting> {
        let guests = self.guests.lock().expect("no holder panics");
        let waiting = |g: &Guest| Waiting {
            object: g.read.object,
            vm: g.vm.clone(),
            offset: g.read.offset,
            waited_ms: u64::try_from(g.read.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            why: g.why.clone(),
        };
        guests.iter().map(waiting).collect()
    }

    /// Works for ever: `attempt` tries one read again.
    pub(crate) fn work(&self, mut attempt: impl FnMut(&Read) -> Tried) {
        loop {
            let due = self.wait_for_due();
            for read in due {
                let tried = attempt(&read);
                let mut guests = self.guests.lock().expect("no holder panics");
                let Some(index) = guests.iter().position(|g| g.read.unique == read.unique) else { continue };
                match tried {
                    Tried::Answered => drop(guests.swap_remove(index)),
                    Tried::Waits(why) => {
                        let guest = &mut guests[index];
                        guest.why = why;
                        guest.delay = (guest.delay * 2).min(DELAY_MAX);
                        guest.next = Instant::now() + guest.delay;
                    }
                }
            }
        }
    }

    fn wait_for_due(&self) -> Vec<Read> {
        let mut guests = self.guests.lock().expect("no holder panics");
        loop {
            let now = Instant::now();
            let due: Vec<Read> = guests.iter().filter(|g| g.next <= now).map(|g| g.read).collect();
            if !due.is_empty() {
                return due;
            }
            let pause = guests.iter().map(|g| g.next - now).min().unwrap_or(DELAY_MAX);
            (guests, _) = self.came.wait_timeout(guests, pause).expect("no holder panics");
        }
    }
}
