//! What the kernel asks of the mirror and only the daemon can do. The daemon fetches it (`next`), and fetches again
//! while it works on it, which is how it is known to live; it answers when all is durable. What nobody tends for a
//! while fails, and so does what a dying process asked: no worker waits, and nobody waits for ever.
//!
//! A mirror that dies forgets its desk; the kernel then asks the next one the same again, under the same token, and
//! the daemon knows by the token what it has done already.

use crate::control::{Ask, AskedOf};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a request waits for a daemon that does not fetch it, or has ceased to tend it.
const UNTENDED: Duration = Duration::from_secs(30);
/// How often those who asked are looked after.
const ROUND: Duration = Duration::from_millis(100);

/// What is to be told to the kernel when the daemon has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// An opening: a handle of the mirrored file.
    Open,
    /// An ioctl, with room for so many bytes of answer.
    Ioctl { room: u32 },
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) unique: u64,
    pub(crate) thread: u32,
    pub(crate) what: For,
}

struct Waiting {
    asked: AskedOf,
    asker: Asker,
    tended: Instant,
}

/// The desk.
#[derive(Default)]
pub(crate) struct Desk {
    waiting: Mutex<BTreeMap<String, Waiting>>,
    came: Condvar,
}

impl Desk {
    /// Lays a request down.
    pub(crate) fn enter(&self, token: String, asked: AskedOf, asker: Asker) {
        let waiting = Waiting { asked, asker, tended: Instant::now() };
        self.waiting.lock().expect("no holder panics").insert(token, waiting);
        self.came.notify_all();
    }

    /// The next request that is none of `known`, on which the daemon works; waits for one up to `limit`.
    pub(crate) fn next(&self, known: &[String], limit: Duration) -> Option<Ask> {
        let end = Instant::now() + limit;
        let mut waiting = self.waiting.lock().expect("no holder panics");
        loop {
            let now = Instant::now();
            for token in known {
                if let Some(tended) = waiting.get_mut(token) {
                    tended.tended = now;
                }
            }
            if let Some((token, found)) = waiting.iter_mut().find(|(token, _)| !known.contains(token)) {
                found.tended = now;
                return Some(Ask { token: token.clone(), asked: found.asked.clone() });
            }
            let left = end.checked_duration_since(now).filter(|left| !left.is_zero())?;
            (waiting, _) = self.came.wait_timeout(waiting, left).expect("no holder panics");
        }
    }

    /// Takes a request off the desk; none: it was answered or given up.
    pub(crate) fn take(&self, token: &str) -> Option<Asker> {
        self.waiting.lock().expect("no holder panics").remove(token).map(|w| w.asker)
    }

    /// Gives requests up for ever: whose process is dying, and whom nobody tends.
    pub(crate) fn watch(&self, is_dying: impl Fn(u32) -> bool, give_up: impl Fn(Asker, Errno)) {
        loop {
            let waiting = self.waiting.lock().expect("no holder panics");
            let mut waiting = self.came.wait_while(waiting, |w| w.is_empty()).expect("no holder panics");
            let mut over = Vec::new();
            waiting.retain(|token, w| {
                let why = match () {
                    () if is_dying(w.asker.thread) => Errno::INTR,
                    () if w.tended.elapsed() > UNTENDED => {
                        log::error!("{:?} failed: no daemon came for {token} within {UNTENDED:?}", w.asked);
                        Errno::TIMEDOUT
                    }
                    () => return true,
                };
                over.push((w.asker, why));
                false
            });
            drop(waiting);
            over.into_iter().for_each(|(asker, why)| give_up(asker, why));
            std::thread::sleep(ROUND);
        }
    }
}
