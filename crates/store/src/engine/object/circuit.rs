//! When a request is sent, sent again, or not sent at all.
//!
//! Every request has a time limit. One that fails for a reason that may pass (no answer, a broken one, 408, 429,
//! 5xx) is sent again, a bounded number of times, after a pause drawn evenly from a range that doubles (full
//! jitter: those who failed together do not come back together). After too many failures in a row, over all
//! requests, the circuit opens: for some seconds every request fails at once, so that callers fall back on what
//! they have; then a single one is let through to see.

use crate::engine::{Circuit, Health};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Limits on requests. The defaults suit a server on the same continent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest one attempt may take, and a second more for each MiB it carries.
    pub attempt: Duration,
    /// Attempts at one request.
    pub attempts: u32,
    /// The range of the first pause; it doubles with each.
    pub pause_first: Duration,
    /// The longest range of a pause.
    pub pause_max: Duration,
    /// Failures in a row that open the circuit.
    pub circuit_failures: u32,
    /// How long it stays open.
    pub circuit_open: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(15),
            attempts: 5,
            pause_first: Duration::from_millis(100),
            pause_max: Duration::from_secs(3),
            circuit_failures: 10,
            circuit_open: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// How long to wait before attempt `next` (1 is the first repeat).
    pub(crate) fn pause(&self, next: u32) -> Duration {
        let range = self.pause_first.saturating_mul(1 << next.saturating_sub(1).min(20)).min(self.pause_max);
        range.mul_f64(random_u64() as f64 / u64::MAX as f64)
    }

    /// The longest an attempt that carries `bytes` may take.
    pub(crate) fn attempt_for(&self, bytes: usize) -> Duration {
        self.attempt + Duration::from_secs(bytes as u64 >> 20)
    }
}

/// Bits that nobody can predict; each `RandomState` has keys of its own.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().hash_one(Instant::now())
}

#[derive(Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
    /// A request was let through to see, and has not come back.
    trying: bool,
    requests: u64,
    repeats: u64,
    last: Option<String>,
}

/// The circuit breaker of one engine.
pub(crate) struct Breaker {
    limits: Limits,
    state: Mutex<State>,
}

impl Breaker {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while the state is locked")
    }

    /// Whether a request may be sent now; else why not. Each admission owes one [`Breaker::record`].
    pub(crate) fn admit(&self, is_repeat: bool) -> Result<(), String> {
        let mut state = self.state();
        if let Some(until) = state.open_until {
            let now = Instant::now();
            if now < until || state.trying {
                let wait = until.saturating_duration_since(now).as_secs_f32();
                let last = state.last.as_deref().unwrap_or("no answer");
                return Err(format!(
                    "{} requests in a row failed, the last with: {last}; not asked again for {wait:.1} s",
                    state.failures
                ));
            }
            state.trying = true;
        }
        state.requests += 1;
        state.repeats += u64::from(is_repeat);
        Ok(())
    }

    /// Notes how an admitted request went: any answer that makes sense is a success.
    pub(crate) fn record(&self, failure: Option<&str>) {
        let mut state = self.state();
        state.trying = false;
        match failure {
            None => (state.failures, state.open_until) = (0, None),
            Some(what) => {
                state.failures = state.failures.saturating_add(1);
                state.last = Some(what.to_owned());
                if state.failures >= self.limits.circuit_failures {
                    state.open_until = Some(Instant::now() + self.limits.circuit_open);
                }
            }
        }
    }

    pub(crate) fn health(&self) -> Health {
        let state = self.state();
        let circuit = match state.open_until {
            None => Circuit::Closed,
            Some(until) if Instant::now() < until && !state.trying => Circuit::Open,
            Some(_) => Circuit::HalfOpen,
        };
        Health {
            circuit,
            failures_in_a_row: state.failures,
            requests: state.requests,
            repeats: state.repeats,
            last_failure: state.last.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_bounds() {
        let limits = Limits {
            pause_first: Duration::from_millis(10),
            pause_max: Duration::from_millis(35),
            ..Limits::default()
        };
        for (next, bound) in [(1, 10), (2, 20), (3, 35), (30, 35)] {
            let longest = (0..200).map(|_| limits.pause(next)).max().unwrap();
            assert!(
                longest <= Duration::from_millis(bound) && longest > Duration::from_millis(bound / 2),
                "{longest:?}"
            );
        }
    }

    #[test]
    fn the_circuit_opens_lets_one_through_and_closes() {
        let limits = Limits { circuit_failures: 3, circuit_open: Duration::ZERO, ..Limits::default() };
        let breaker = Breaker::new(limits);
        for _ in 0..3 {
            assert_eq!(breaker.health().circuit, Circuit::Closed);
            breaker.admit(false).unwrap();
            breaker.record(Some("503"));
        }
        assert_eq!(breaker.health().circuit, Circuit::HalfOpen);
        breaker.admit(false).unwrap();
        let refused = breaker.admit(false).unwrap_err();
        assert!(refused.contains("3 requests") && refused.contains("503"), "{refused}");
        breaker.record(None);
        assert_eq!(breaker.health().circuit, Circuit::Closed);
        let long = Breaker::new(Limits { circuit_failures: 1, circuit_open: Duration::from_secs(3600), ..limits });
        long.admit(false).unwrap();
        long.record(Some("gone"));
        assert_eq!(long.health().circuit, Circuit::Open);
        assert!(long.admit(false).is_err());
    }
}
