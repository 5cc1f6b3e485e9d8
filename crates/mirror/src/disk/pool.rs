//! Data files made ahead, so that a mark, which runs in a VM's pause, need not wait for a file system whose journal is
//! busy with other guests' flushes.

use super::layer::Blank;
use crate::home::Home;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Files kept ready: a few VMs marked at once.
const READY: usize = 16;
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Names and makes layers' data files. Names are never used twice while a description may hold them.
pub(crate) struct Pool {
    home: Home,
    next: AtomicU64,
    ready: Mutex<Vec<Blank>>,
    took: Condvar,
}

impl Pool {
    /// A pool whose first name is `next`.
    pub(crate) fn new(home: Home, next: u64) -> Self {
        Self { home, next: AtomicU64::new(next), ready: Mutex::default(), took: Condvar::new() }
    }

    /// An empty data file.
    pub(crate) fn take(&self) -> io::Result<Blank> {
        let mut ready = self.ready.lock().expect("no holder panics");
        let blank = ready.pop();
        // Not at each: whoever takes one is in a hurry, and the worker would compete with it for the processor.
        if ready.len() < READY / 2 {
            self.took.notify_one();
        }
        drop(ready);
        blank.map_or_else(|| self.make(), Ok)
    }

    /// Works for ever: keeps files ready.
    pub(crate) fn work(&self) {
        loop {
            {
                let ready = self.ready.lock().expect("no holder panics");
                drop(self.took.wait_while(ready, |r| r.len() >= READY / 2).expect("no holder panics"));
            }
            while self.ready.lock().expect("no holder panics").len() < READY {
                match self.make() {
                    Ok(blank) => self.ready.lock().expect("no holder panics").push(blank),
                    // Whoever takes one says what is wrong.
                    Err(_) => std::thread::sleep(TRY_AGAIN),
                }
            }
        }
    }

    fn make(&self) -> io::Result<Blank> {
        Blank::open(&self.home, self.next.fetch_add(1, Ordering::Relaxed))
    }
}
