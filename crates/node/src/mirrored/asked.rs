//! What the kernel asks through the mirror: openings for writing and the ioctls.
//!
//! The mirror cannot call the daemon, which may be away; so the daemon asks the mirror what there is to do, all the
//! time, and says what it works on. Two threads of two daemons never do the same: a daemon holds its home's lock.

use super::Named;
use crate::error::Error;
use crate::node::Shared;
use crate::sweep;
use mirror::{Ask, AskAnswer, AskedOf};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// How long the mirror may keep a question.
const WAIT: Duration = Duration::from_secs(3);
/// How long to leave a mirror alone that does not answer.
const PAUSE: Duration = Duration::from_millis(200);
/// Requests worked on at once; the others wait in the mirror.
const MOST: usize = 64;
/// Commits behind which the store is tidied up.
const TIDY: u64 = 64;

/// Starts the thread that works for the kernel as long as the node lives.
///
/// # Errors
/// Where no thread can be had.
pub(crate) fn start(shared: &Arc<Shared>) -> crate::error::Result<()> {
    let node = Arc::downgrade(shared);
    let thread = std::thread::Builder::new().name("asked".into()).spawn(move || listen(&node));
    thread.map(drop).map_err(Error::io("start a thread for", "the tree of blobs"))
}

fn listen(node: &Weak<Shared>) {
    let at_work: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let commits = Arc::new(AtomicU64::new(0));
    while let Some(shared) = node.upgrade() {
        let known: Vec<String> = at_work.lock().expect("no holder panics").iter().cloned().collect();
        let full = known.len() >= MOST;
        let next = shared.mirror.next_ask(&known, if full { Duration::ZERO } else { WAIT });
        let ask = match next {
            Ok(Some(ask)) if !full => ask,
            Ok(None) if !full => continue,
            Ok(_) | Err(_) => {
                drop(shared);
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        at_work.lock().expect("no holder panics").insert(ask.token.clone());
        let (done, counted, token) = (at_work.clone(), commits.clone(), ask.token.clone());
        let spawned = std::thread::Builder::new().name("asked-work".into()).spawn(move || {
            let committed = work(&shared, &ask);
            let tidy = committed && counted.fetch_add(1, Ordering::Relaxed) % TIDY == TIDY - 1;
            done.lock().expect("no holder panics").remove(&ask.token);
            if tidy && let Err(error) = sweep::sweep(&shared) {
                log::warn!("the store is not tidied up: {error}");
            }
        });
        if let Err(error) = spawned {
            log::error!("no thread for what the kernel asks: {error}");
            at_work.lock().expect("no holder panics").remove(&token);
            std::thread::sleep(PAUSE);
        }
    }
}

/// Does what is asked and says what became of it; whether that was a commit.
fn work(shared: &Arc<Shared>, ask: &Ask) -> bool {
    let token = Some(ask.token.as_str());
    let say = |answer| {
        if let Err(error) = shared.mirror.answer_ask(&ask.token, answer) {
            // The mirror that comes next is asked by the kernel again, and asks us.
            log::warn!("what became of {:?} cannot be said: {error}", ask.asked);
        }
        Ok::<(), Error>(())
    };
    let (done, in_conflict) = match &ask.asked {
        AskedOf::Open { blob, number } => {
            let named = Named { blob: blob.clone(), number: *number };
            (super::open(shared, &named, |overlay| say(AskAnswer::Done(overlay))), Errno::BUSY)
        }
        AskedOf::Commit { overlay } => {
            (super::commit(shared, *overlay, token).and_then(|number| say(AskAnswer::Done(number))), Errno::STALE)
        }
        AskedOf::Clone { overlay, name } => {
            let cloned = super::clone(shared, *overlay, name, token);
            (cloned.and_then(|number| say(AskAnswer::Done(number))), Errno::EXIST)
        }
    };
    match done {
        Ok(()) => matches!(ask.asked, AskedOf::Commit { .. }),
        Err(error) => {
            let errno = match error.body().kind {
                api::ErrorKind::Invalid => Errno::INVAL,
                api::ErrorKind::NotFound => Errno::NOENT,
                api::ErrorKind::Conflict => in_conflict,
                api::ErrorKind::Host => Errno::NOSPC,
                _ => Errno::IO,
            };
            let why = format!("{:?}: {}", ask.asked, error.whole());
            let _ = say(AskAnswer::Failed { errno: errno.raw_os_error(), why });
            false
        }
    }
}
