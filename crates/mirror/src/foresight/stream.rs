//! One template's planner on this node, and what is under way for it.

use crate::control::StreamStats;
use base::{Bitmap, ByteRange, PAGE, RamMap};
use guest::plan::{Pace, Page, Planner};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// Pages that the planner is asked for at a time: as many as half of what may be under way, within these bounds. Those
/// of a plan that was laid down in its order lie together then, and few requests bring them.
const BATCH: std::ops::RangeInclusive<u64> = 64..=1024;

/// What a thread that fetches is to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Find out which of these pages lie together, then [`Stream::sorted`].
    Sort(Vec<Page>),
    /// Fetch these pages, which lie together, then [`Stream::arrived`].
    Fetch(Vec<Page>),
}

/// The longest that a guest waits for pages that its policy wants first: it can run without.
const FIRST_WAIT: Duration = Duration::from_secs(60);
/// The same for `auto`, in trips to the store, each of which a fault would cost by itself: where recordings say what the
/// guest touches at once, and where only colors do, so that much more is brought of which less is touched.
const FIRST_TRIPS: u32 = 12;
const FIRST_TRIPS_UNKNOWN: u32 = 64;
/// Whatever a trip takes, the wait for them is within these.
const FIRST_WAIT_AUTO: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(2);
/// As long as nobody knows what a trip takes.
const TRIP: Duration = Duration::from_millis(20);
/// Bytes that may be under way before the guest runs.
const FIRST_FLYING: u64 = 8 << 20;
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
    /// Groups of pages that lie together, and how many pages they are.
    ready: VecDeque<Vec<Page>>,
    ready_pages: u64,
    /// A batch is being sorted; whether it is one that a fault called for.
    sorting: Option<bool>,
    /// Batches sorted.
    batches: u64,
    flying_bytes: u64,
    fetched_bytes: u64,
    /// The pages that it brought.
    brought: Bitmap,
    failed: u64,
    /// The last page that came from the store took long.
    dear: bool,
    /// The least that a fetch from the store took.
    trip: Option<Duration>,
    /// Pages of the working set that are to come before the guest runs.
    first_left: u64,
}

impl Stream {
    pub(crate) fn new(planner: Planner, map: RamMap) -> Self {
        let first_left = planner.first() as u64;
        let state = State {
            planner,
            pace: Pace::default(),
            ready: VecDeque::new(),
            ready_pages: 0,
            sorting: None,
            batches: 0,
            flying_bytes: 0,
            fetched_bytes: 0,
            brought: Bitmap::new(map.size() / PAGE),
            failed: 0,
            dear: false,
            trip: None,
            first_left,
        };
        Self { map, state: Mutex::new(state), first_here: Condvar::new(), began: Instant::now() }
    }

    /// A guest begins to wait for a page, and it will be long, as far as is known. Says whether there may be something to
    /// fetch because of it.
    pub(crate) fn waits(&self, page: Page) -> bool {
        let mut state = self.state();
        if !state.dear {
            return false;
        }
        log::trace!(
            "{:.3} s: waits for page {page:#x}, {}",
            self.began.elapsed().as_secs_f64(),
            state.planner.describe(page)
        );
        state.planner.fault(page, true);
        !state.planner.is_idle()
    }

    /// A guest waited for a page, `took` long; `far`: the store had to be asked. Says whether there may be something
    /// to fetch because of it.
    pub(crate) fn fault(&self, page: Page, took: Duration, far: bool) -> bool {
        let mut state = self.state();
        if far {
            state.pace.demand(took);
            state.dear = took > DEAR;
            log::trace!(
                "{:.3} s: waited {:.1} ms for page {page:#x}",
                self.began.elapsed().as_secs_f64(),
                took.as_secs_f64() * 1e3
            );
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
            let cost = state.pace.page_cost();
            state.planner.set_cost(cost);
            state.planner.judge();
        }
    }

    /// The next thing to do, where there is one and the link has room for it. What a fault called for is sorted at once
    /// and goes first; of the rest only as much is sorted ahead as may be under way.
    pub(crate) fn take(&self) -> Option<Work> {
        let mut state = self.state();
        state.planner.set_age(self.began.elapsed());
        let mut allowed = state.pace.allowed();
        if state.first_left > 0 {
            // No guest runs whose demand could meet a queue, and one waits.
            allowed = allowed.max(FIRST_FLYING);
        }
        if state.flying_bytes > 0 && state.flying_bytes >= allowed {
            state.pace.held_back();
            return None;
        }
        let urgent = state.planner.is_urgent();
        let is_short = state.ready_pages * PAGE < allowed;
        if state.sorting.is_none() && (urgent || is_short) && !state.planner.is_idle() {
            let most = if urgent { *BATCH.start() } else { (allowed / 2 / PAGE).clamp(*BATCH.start(), *BATCH.end()) };
            let mut pages = Vec::with_capacity(most as usize);
            state.planner.next(most as usize, &mut pages);
            if !pages.is_empty() {
                state.sorting = Some(urgent);
                return Some(Work::Sort(pages));
            }
        }
        let group = state.ready.pop_front()?;
        if state.flying_bytes == 0 {
            let now = self.began.elapsed();
            state.pace.rested(now);
        }
        state.ready_pages -= group.len() as u64;
        state.flying_bytes += group.len() as u64 * PAGE;
        Some(Work::Fetch(group))
    }

    /// The pages of a batch, in groups that lie together, or why that cannot be told.
    pub(crate) fn sorted(&self, pages: &[Page], groups: Result<Vec<Vec<Page>>, String>) {
        let mut state = self.state();
        let urgent = state.sorting.take().unwrap_or(false);
        state.batches += 1;
        match groups {
            Ok(groups) => {
                state.ready_pages += groups.iter().map(|group| group.len() as u64).sum::<u64>();
                if urgent {
                    groups.into_iter().rev().for_each(|group| state.ready.push_front(group));
                } else {
                    state.ready.extend(groups);
                }
            }
            Err(_) => self.lose(&mut state, pages),
        }
    }

    /// Batches sorted so far.
    pub(crate) fn batches(&self) -> u64 {
        self.state().batches
    }

    /// A group is here, or could not be had; `far`: the store had to be asked.
    pub(crate) fn arrived(&self, pages: &[Page], (took, far): (Duration, bool), fetched: &Result<u64, String>) {
        let now = self.began.elapsed();
        let mut state = self.state();
        state.flying_bytes -= pages.len() as u64 * PAGE;
        match fetched {
            Ok(bytes) => {
                state.fetched_bytes += bytes;
                for &page in pages {
                    state.brought.set(page.into());
                }
                state.pace.arrived(now, took, *bytes);
                if far {
                    state.trip = Some(state.trip.map_or(took, |trip| trip.min(took)));
                }
                self.count_first(&mut state, pages.len() as u64);
            }
            Err(_) => self.lose(&mut state, pages),
        }
    }

    fn lose(&self, state: &mut State, pages: &[Page]) {
        state.failed += 1;
        for &page in pages {
            state.planner.lost(page);
        }
        self.count_first(state, pages.len() as u64);
    }

    /// Nothing but the plan, whose first pages these are, is asked for before the guest runs.
    fn count_first(&self, state: &mut State, pages: u64) {
        if state.first_left > 0 {
            state.first_left = state.first_left.saturating_sub(pages);
            self.first_here.notify_all();
        }
    }

    /// Waits until the pages are here that the guest should not run without, and not for ever.
    pub(crate) fn await_first(&self) {
        let began = Instant::now();
        let mut state = self.state();
        while state.first_left > 0 {
            // What a trip takes is learnt meanwhile.
            let left = state.first_wait().saturating_sub(began.elapsed());
            if left.is_zero() {
                break;
            }
            state = self.first_here.wait_timeout(state, left).expect("no holder panics").0;
        }
        log::debug!(
            "{} pages wait for the guest, {} are to come, after {:?}",
            state.brought.count(),
            state.first_left,
            began.elapsed()
        );
    }

    /// Bytes asked for and not here.
    pub(crate) fn flying(&self) -> u64 {
        self.state().flying_bytes
    }

    /// Whether there is nothing to fetch until a fault comes.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.state();
        state.is_asked_for() && state.flying_bytes == 0
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
            idle: state.is_asked_for(),
            by_color,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

impl State {
    /// How long the guest waits at most for what it should not run without.
    fn first_wait(&self) -> Duration {
        if !self.planner.adapts() {
            return FIRST_WAIT;
        }
        let trips = if self.planner.is_trained() { FIRST_TRIPS } else { FIRST_TRIPS_UNKNOWN };
        (self.trip.unwrap_or(TRIP) * trips).clamp(*FIRST_WAIT_AUTO.start(), *FIRST_WAIT_AUTO.end())
    }

    /// Whether all that is wanted for now has been asked for.
    fn is_asked_for(&self) -> bool {
        self.ready.is_empty() && self.sorting.is_none() && self.planner.is_idle()
    }
}

#[cfg(test)]
mod tests;
