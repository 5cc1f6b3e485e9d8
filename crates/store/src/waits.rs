//! Whether a read waited for the medium: what tells a fault that blocked on the network from one that the cache answered.

use std::cell::{Cell, RefCell};

/// Who is told of a wait as it begins.
type Listener = Box<dyn FnOnce()>;

thread_local! {
    static WAITS: Cell<u64> = const { Cell::new(0) };
    static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// How often reads of this thread have waited for the medium: for the server, or without one for the local disk. What
/// a cache or memory held does not count; what another thread was fetching just then does.
#[must_use]
pub fn waits() -> u64 {
    WAITS.get()
}

/// Does `read`, and calls `first` once within it, when this thread is about to wait for the medium; not at all where it
/// need not. So what a reader's wait says of what comes next is known before the wait, not behind it. `first` must be
/// short and read nothing.
pub fn telling<T>(first: Box<dyn FnOnce()>, read: impl FnOnce() -> T) -> T {
    LISTENER.set(Some(first));
    let out = read();
    LISTENER.take();
    out
}

/// This thread is about to wait.
pub(crate) fn note() {
    WAITS.set(WAITS.get() + 1);
    if let Some(first) = LISTENER.take() {
        first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn a_listener_hears_of_the_first_wait_and_of_none_behind_its_read() {
        let heard = Rc::new(Cell::new(0));
        let listener = || {
            let heard = heard.clone();
            Box::new(move || heard.set(heard.get() + 1)) as Listener
        };
        telling(listener(), || {
            note();
            note();
        });
        assert_eq!(heard.get(), 1);
        telling(listener(), || {});
        note();
        assert_eq!(heard.get(), 1);
        assert_eq!(waits(), 3);
    }
}
