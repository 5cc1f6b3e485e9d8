//! Whether a read waited for the medium: what tells a fault that blocked on the network from one that the cache answered.

use std::cell::Cell;

thread_local! {
    static WAITS: Cell<u64> = const { Cell::new(0) };
}

/// How often reads of this thread have waited for the medium: for the server, or without one for the local disk. What
/// a cache or memory held does not count; what another thread was fetching just then does.
#[must_use]
pub fn waits() -> u64 {
    WAITS.get()
}

/// This thread waits.
pub(crate) fn note() {
    WAITS.set(WAITS.get() + 1);
}
