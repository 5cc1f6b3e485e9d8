//! An outside client that never rests: how long a service was away.

use crate::guest::http_ok;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A client that requests a page every two milliseconds until told to end.
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Gaps>,
}

/// When answers came.
#[derive(Debug)]
pub struct Gaps {
    answers: Vec<Instant>,
}

impl Probe {
    /// Starts one.
    #[must_use]
    pub fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut answers = Vec::new();
            while !told.load(Ordering::Relaxed) {
                if http_ok(address, Duration::from_secs(10)).unwrap_or(false) {
                    answers.push(Instant::now());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Gaps { answers }
        });
        Self { stop, thread }
    }

    /// Ends it.
    #[must_use]
    pub fn end(self) -> Gaps {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the probe does not panic")
    }
}

impl Gaps {
    /// Answers in all.
    #[must_use]
    pub fn count(&self) -> usize {
        self.answers.len()
    }

    /// The longest time between two answers of which the later came in `from..to`, in milliseconds.
    #[must_use]
    pub fn longest_ms(&self, from: Instant, to: Instant) -> f64 {
        let within = self.answers.windows(2).filter(|w| w[1] >= from && w[0] <= to);
        within.map(|w| (w[1] - w[0]).as_secs_f64() * 1e3).fold(0.0, f64::max)
    }
}
