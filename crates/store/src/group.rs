//! Work that many threads ask for at once and one of them does for all who wait.
//!
//! Whoever finds nobody at work takes everything that waits, its own task included, does it in one go and tells the
//! others; what arrives meanwhile waits for the next one. So nobody works more than one round for others, and a
//! cost that a round has once (making data durable) is shared by as many as came together.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard};

/// The meeting place.
pub(crate) struct Group<T, R> {
    queue: Mutex<Queue<T, R>>,
    changed: Condvar,
}

struct Queue<T, R> {
    waiting: Vec<(u64, T)>,
    /// `None`: whoever worked for it panicked.
    done: HashMap<u64, Option<R>>,
    next: u64,
    working: bool,
}

impl<T, R> Default for Group<T, R> {
    fn default() -> Self {
        let queue = Queue { waiting: Vec::new(), done: HashMap::new(), next: 0, working: false };
        Self { queue: Mutex::new(queue), changed: Condvar::new() }
    }
}

/// Hands over to the next one, also when the work panics.
struct Turn<'a, T, R> {
    group: &'a Group<T, R>,
    tickets: Vec<u64>,
    results: Vec<R>,
}

impl<T, R> Drop for Turn<'_, T, R> {
    fn drop(&mut self) {
        let mut results = std::mem::take(&mut self.results).into_iter();
        let mut queue = self.group.lock();
        queue.done.extend(self.tickets.iter().map(|ticket| (*ticket, results.next())));
        queue.working = false;
        drop(queue);
        self.group.changed.notify_all();
    }
}

impl<T, R> Group<T, R> {
    fn lock(&self) -> MutexGuard<'_, Queue<T, R>> {
        self.queue.lock().expect("no panic while the queue is locked")
    }

    /// Has `task` done: by `work` of this thread, which is given all that waits and returns as many results, or by
    /// that of another thread.
    pub(crate) fn submit(&self, task: T, work: impl FnOnce(Vec<T>) -> Vec<R>) -> R {
        let mut queue = self.lock();
        let ticket = queue.next;
        queue.next += 1;
        queue.waiting.push((ticket, task));
        while queue.working {
            if let Some(done) = queue.done.remove(&ticket) {
                return done.expect("the thread that worked for this one did not panic");
            }
            queue = self.changed.wait(queue).expect("no panic while the queue is locked");
        }
        if let Some(done) = queue.done.remove(&ticket) {
            return done.expect("the thread that worked for this one did not panic");
        }
        queue.working = true;
        let (tickets, tasks): (Vec<u64>, Vec<T>) = std::mem::take(&mut queue.waiting).into_iter().unzip();
        drop(queue);
        let mut turn = Turn { group: self, tickets, results: Vec::new() };
        turn.results = work(tasks);
        assert_eq!(turn.results.len(), turn.tickets.len(), "a result for each task");
        drop(turn);
        let done = self.lock().done.remove(&ticket).flatten();
        done.expect("its own task was among those that waited")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

    #[test]
    fn everybody_gets_the_result_of_the_own_task_and_who_waits_shares_a_round() {
        let group: Group<u64, u64> = Group::default();
        let rounds = AtomicUsize::new(0);
        let start = Barrier::new(8);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (group, rounds, start) = (&group, &rounds, &start);
                scope.spawn(move || {
                    start.wait();
                    for turn in 0..500 {
                        let task = thread * 1000 + turn;
                        let result = group.submit(task, |tasks| {
                            rounds.fetch_add(1, Ordering::Relaxed);
                            tasks.into_iter().map(|task| task * 2).collect()
                        });
                        assert_eq!(result, task * 2);
                    }
                });
            }
        });
        assert!(rounds.load(Ordering::Relaxed) <= 4000);
        assert!(group.lock().done.is_empty() && group.lock().waiting.is_empty());
    }

    #[test]
    fn who_comes_while_one_works_is_served_by_one_more_round() {
        let group: Group<u64, u64> = Group::default();
        let rounds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (begun, has_begun) = mpsc::channel();
            let (group, rounds) = (&group, &rounds);
            scope.spawn(move || {
                group.submit(0, |tasks| {
                    begun.send(()).unwrap();
                    while group.lock().waiting.len() < 7 {
                        std::thread::yield_now();
                    }
                    tasks
                });
            });
            has_begun.recv().unwrap();
            for task in 1..8 {
                scope.spawn(move || {
                    let work = |tasks: Vec<u64>| {
                        rounds.fetch_add(1, Ordering::Relaxed);
                        tasks
                    };
                    assert_eq!(group.submit(task, work), task);
                });
            }
        });
        assert_eq!(rounds.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_panic_ends_the_round_and_not_the_group() {
        let group: Group<u64, u64> = Group::default();
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| group.submit(1, |_| panic!("on purpose"))));
        assert!(caught.is_err());
        assert_eq!(group.submit(2, |tasks| tasks), 2);
    }
}
