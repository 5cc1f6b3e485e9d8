//! How much prefetch may be under way: enough to fill the link, and not more, so that a fault meets no queue.
//!
//! The product of the highest rate and the shortest round trip is what fills the link (as in BBR; Cardwell et al.,
//! ACM Queue 2016). Both are learnt anew in every epoch, which begins with less under way, or the queue that prefetch
//! itself makes would be taken for the length of the link. Demand that gets slower than its best shrinks the
//! allowance.

use std::time::Duration;

/// Always allowed, and never more than this.
const BYTES_MIN: u64 = 256 << 10;
const BYTES_MAX: u64 = 32 << 20;
/// Over what just fills the link, so that a higher rate can show itself; and at the beginning of an epoch.
const GAIN: f64 = 1.5;
const GAIN_DRAIN: f64 = 0.5;
const EPOCH: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_millis(200);
/// A rate is measured over at least this time, and over a trip.
const SPAN: Duration = Duration::from_millis(20);
/// Demand so much slower than its best suffers from prefetch.
const SUFFERS: f64 = 2.0;
/// What suffering costs, down to the least, and what each span gives back. Half of what fills the link meets no queue of
/// its own: demand that is slow then is so for another reason, as where processors are short, and less prefetch would
/// only make more of it.
const CUT: f64 = 0.7;
const CUT_MOST: f64 = 0.5 / GAIN;
const HEAL: f64 = 1.1;

/// The best of this epoch and of the one before.
#[derive(Clone, Copy, Debug)]
struct Best {
    now: f64,
    before: f64,
}

impl Best {
    const SHORTEST: Self = Self { now: f64::INFINITY, before: f64::INFINITY };
    const HIGHEST: Self = Self { now: 0.0, before: 0.0 };

    fn shortest(&mut self, value: f64) -> f64 {
        self.now = self.now.min(value);
        self.now.min(self.before)
    }

    fn highest(&mut self, value: f64) -> f64 {
        self.now = self.now.max(value);
        self.now.max(self.before)
    }
}

/// Paces one stream of prefetch. Times are since any fixed instant.
#[derive(Clone, Debug)]
pub struct Pace {
    epoch_began: Duration,
    span_began: Duration,
    span_bytes: u64,
    /// Bytes a second.
    rate: Best,
    trip_s: Best,
    demand_s: Best,
    cut: f64,
    draining: bool,
    /// Whether more was wanted in this epoch than was allowed, with nothing cut: what it measures is the link.
    full: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            epoch_began: Duration::ZERO,
            span_began: Duration::ZERO,
            span_bytes: 0,
            rate: Best::HIGHEST,
            trip_s: Best::SHORTEST,
            demand_s: Best::SHORTEST,
            cut: 1.0,
            draining: false,
            full: false,
        }
    }
}

impl Pace {
    /// Bytes that may be asked for and not yet here.
    #[must_use]
    pub fn allowed(&self) -> u64 {
        let (rate, trip_s) = (self.rate.now.max(self.rate.before), self.trip_s.now.min(self.trip_s.before));
        let gain = if self.draining { GAIN_DRAIN } else { GAIN };
        let fills = if trip_s.is_finite() { rate * trip_s * gain } else { 0.0 };
        ((fills * self.cut) as u64).clamp(BYTES_MIN, BYTES_MAX)
    }

    /// More is wanted than is allowed.
    pub fn held_back(&mut self) {
        self.full |= self.cut >= 1.0 && !self.draining;
    }

    /// What a page takes of the link's time, over what a fault that goes to the origin waits for; `None` before either is
    /// known.
    #[must_use]
    pub fn page_cost(&self) -> Option<f32> {
        let (rate, fault_s) = (self.rate.now.max(self.rate.before), self.demand_s.now.min(self.demand_s.before));
        (rate > 0.0 && fault_s.is_finite() && fault_s > 0.0).then(|| (base::PAGE as f64 / rate / fault_s) as f32)
    }

    /// A prefetch of `bytes` that took `took` ended at `now`.
    pub fn arrived(&mut self, now: Duration, took: Duration, bytes: u64) {
        let trip_s = self.trip_s.shortest(took.as_secs_f64());
        self.span_bytes += bytes;
        let span = now.saturating_sub(self.span_began);
        if span < SPAN || span.as_secs_f64() < trip_s {
            return;
        }
        self.rate.highest(self.span_bytes as f64 / span.as_secs_f64());
        self.cut = (self.cut * HEAL).min(1.0);
        (self.span_began, self.span_bytes) = (now, 0);
        if now.saturating_sub(self.epoch_began) >= EPOCH {
            self.epoch_began = now;
            // An epoch in which less was asked for than the link carries says nothing of that (as in BBR).
            self.rate.before = if self.full { self.rate.now } else { self.rate.now.max(self.rate.before) };
            (self.rate.now, self.full) = (0.0, false);
            for best in [&mut self.trip_s, &mut self.demand_s] {
                (best.before, best.now) = (best.now, f64::INFINITY);
            }
        }
        // Not in the first epoch, which has yet to find out what the link carries.
        self.draining = self.rate.before > 0.0 && now.saturating_sub(self.epoch_began) < DRAIN;
    }

    /// A fault that went to the origin took `took`.
    pub fn demand(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        if took > self.demand_s.shortest(took) * SUFFERS + 0.001 {
            self.cut = (self.cut * CUT).max(CUT_MOST);
        }
    }

    /// Prefetch rested: a span begins now.
    pub fn rested(&mut self, now: Duration) {
        (self.span_began, self.span_bytes) = (now, 0);
    }
}
