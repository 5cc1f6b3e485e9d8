//! One template's planner on this node, and what is under way for it.

use crate::control::StreamStats;
use base::{Bitmap, ByteRange, PAGE, RamMap};
use guest::plan::{Pace, Page, Planner};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// Pages of one run at most: what one frame of the store holds.
const RUN_PAGES: u32 = 16;
/// Pages that the planner is asked for at a time.
const BATCH: usize = 64;

/// Pages side by side, to be fetched at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: Page,
    pub(crate) pages: u32,
}

/// The longest that a guest waits for its working set: it can run without.
const FIRST_WAIT: Duration = Duration::from_secs(60);
/// A fault that took longer is worth guessing for: it went to another machine. One that the disk at hand, or a
/// holder's memory, answers takes a tenth of it.
const DEAR: Duration = Duration::from_micros(500);

/// One template's stream of prefetch.
pub(crate) struct Stream {
    /// Where the template's pages lie.
    pub(crate) map: RamMap,
    state: Mutex<State>,
    first_here: Condvar,
    began: Instant,
}

struct State {
    planner: Planner,
    pace: Pace,
    ready: VecDeque<Run>,
    flying_bytes: u64,
    fetched_bytes: u64,
    /// The pages that it brought.
    brought: Bitmap,
    failed: u64,
    /// Pages of the working set that are to come before the guest runs.
    first_left: u64,
}

impl Stream {
    pub(crate) fn new(planner: Planner, map: RamMap) -> Self {
        let (pace, ready) = (Pace::default(), VecDeque::new());
        let first_left = planner.first() as u64;
        let brought = Bitmap::new(map.size() / PAGE);
        let state = State { planner, pace, ready, flying_bytes: 0, fetched_bytes: 0, brought, failed: 0, first_left };
        Self { map, state: Mutex::new(state), first_here: Condvar::new(), began: Instant::now() }
    }

    /// A guest waited for a page, `took` long; `far`: the store had to be asked. Says whether there may be something
    /// to fetch because of it.
    pub(crate) fn fault(&self, page: Page, took: Duration, far: bool) -> bool {
        let mut state = self.state();
        if far {
            state.pace.demand(took);
        }
        state.planner.fault(page, took > DEAR);
        !state.planner.is_idle()
    }

    /// Guests touched these pages without waiting. `judge`: all that was touched until now has been told.
    pub(crate) fn used(&self, pages: &[Page], judge: bool) {
        let mut state = self.state();
        for &page in pages {
            state.planner.used(page);
        }
        if judge {
            state.planner.judge();
        }
    }

    /// The next run, where there is one and the link has room for it.
    pub(crate) fn take(&self) -> Option<Run> {
        let mut state = self.state();
        if state.flying_bytes > 0 && state.flying_bytes >= state.pace.allowed() {
            return None;
        }
        if state.ready.is_empty() {
            let mut pages = Vec::with_capacity(BATCH);
            state.planner.next(BATCH, &mut pages);
            for page in pages {
                match state.ready.back_mut() {
                    Some(run) if run.first + run.pages == page && run.pages < RUN_PAGES => run.pages += 1,
                    _ => state.ready.push_back(Run { first: page, pages: 1 }),
                }
            }
        }
        let run = state.ready.pop_front()?;
        if state.flying_bytes == 0 {
            let now = self.began.elapsed();
            state.pace.rested(now);
        }
        state.flying_bytes += u64::from(run.pages) * PAGE;
        Some(run)
    }

    /// A run is here, or could not be had.
    pub(crate) fn arrived(&self, run: Run, took: Duration, fetched: &Result<u64, String>) {
        let now = self.began.elapsed();
        let mut state = self.state();
        state.flying_bytes -= u64::from(run.pages) * PAGE;
        if state.first_left > 0 {
            // Nothing but the plan, whose first pages these are, is asked for before the guest runs.
            state.first_left = state.first_left.saturating_sub(u64::from(run.pages));
            self.first_here.notify_all();
        }
        match fetched {
            Ok(bytes) => {
                state.fetched_bytes += bytes;
                state.brought.set_range(run.first.into(), (run.first + run.pages).into());
                state.pace.arrived(now, took, *bytes);
            }
            Err(_) => {
                state.failed += 1;
                for page in run.first..run.first + run.pages {
                    state.planner.lost(page);
                }
            }
        }
    }

    /// Waits until the pages are here that the guest should not run without, and not for ever.
    pub(crate) fn await_first(&self) {
        let waits = |state: &mut State| state.first_left > 0;
        drop(self.first_here.wait_timeout_while(self.state(), FIRST_WAIT, waits).expect("no holder panics"));
    }

    /// Bytes asked for and not here.
    pub(crate) fn flying(&self) -> u64 {
        self.state().flying_bytes
    }

    /// Whether there is nothing to fetch until a fault comes.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.state();
        state.ready.is_empty() && state.flying_bytes == 0 && state.planner.is_idle()
    }

    /// Runs of the pages that it brought.
    pub(crate) fn brought(&self) -> Vec<ByteRange> {
        self.state().brought.ranges(1)
    }

    /// Counters.
    pub(crate) fn stats(&self, ram: u64) -> StreamStats {
        let state = self.state();
        let colors = state.planner.tallies().iter().enumerate();
        let by_color = colors
            .filter(|(_, t)| **t != guest::plan::Tally::default())
            .map(|(color, t)| (color as u8, (t.faults, t.prefetched, t.used)))
            .collect();
        StreamStats {
            ram,
            fetched_bytes: state.fetched_bytes,
            flying_bytes: state.flying_bytes,
            failed: state.failed,
            idle: state.ready.is_empty() && state.planner.is_idle(),
            by_color,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}
