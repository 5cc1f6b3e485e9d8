//! Publication of blob versions: those who ask together are served together, in the order in which they asked.

use super::edit::Work;
use super::history::{Change, State};
use super::{Blob, head};
use crate::engine::Expect;
use crate::error::Error;
use crate::group::Group;
use crate::transaction::Transaction;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

/// Swaps lost to others before a writer gives up: with back-off about ten seconds.
const ATTEMPTS: u32 = 200;
const BACKOFF_MIN: Duration = Duration::from_millis(1);
const BACKOFF_DOUBLINGS_MAX: u32 = 7;

/// Where the writers of one blob in this process meet.
pub(crate) type Writers = Group<Op, Result<u64, Error>>;

/// What is to be done to a blob. What it speaks of is held by the transaction of who asks.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Publish what a writer made.
    Apply { work: Work, parent: u64, change: Change },
    /// Publish what a writer made of version `parent`, if that is the latest.
    Follow { work: Work, parent: u64 },
    /// Publish another size.
    Resize(u64),
    /// Tag a version.
    Tag(u64, String),
    /// Remove a tag.
    Untag(String),
    /// Delete a version.
    Delete(u64),
}

impl Blob<'_> {
    /// Has `op` done, with others'; the number published, or spoken of.
    pub(super) fn submit(&self, tx: &Transaction<'_>, op: Op) -> Result<u64, Error> {
        self.store.writable("publish a version")?;
        let name = head(&self.name);
        let known = || self.store.blob_writers.lock().expect("no panic while writers are looked up");
        let group = Arc::clone(known().entry(name.clone()).or_default());
        let result = group.submit(op, |ops| self.publish(tx, &ops));
        let mut known = known();
        // Two: the map's and this one. Nobody takes another while the map is locked.
        if Arc::strong_count(&group) == 2 {
            known.remove(&name);
        }
        drop(known);
        result
    }

    /// Does all of `ops` with one swap of the head. Each fails for itself where it alone is at fault.
    fn publish(&self, tx: &Transaction<'_>, ops: &[Op]) -> Vec<Result<u64, Error>> {
        let mut attempt = 0;
        let failed = loop {
            match self.try_publish(tx, ops) {
                Ok(results) => return results,
                Err(error @ Error::HeadChanged { .. }) if attempt == ATTEMPTS => break error,
                Err(Error::HeadChanged { .. }) => {
                    std::thread::sleep(backoff(attempt));
                    attempt += 1;
                }
                Err(error) => break error,
            }
        };
        ops.iter().map(|_| Err(failed.copy())).collect()
    }

    fn try_publish(&self, tx: &Transaction<'_>, ops: &[Op]) -> Result<Vec<Result<u64, Error>>, Error> {
        let (mut state, etag) = self.state()?;
        let results: Vec<Result<u64, Error>> = ops.iter().map(|op| self.apply(tx, &mut state, op)).collect();
        if results.iter().any(Result::is_ok) {
            let manifest = state.manifest(tx)?;
            tx.publish_so_far(&head(&self.name), Expect::Etag(etag), &manifest)?;
        }
        Ok(results)
    }

    fn apply(&self, tx: &Transaction<'_>, state: &mut State, op: &Op) -> Result<u64, Error> {
        match op {
            Op::Apply { work, parent, change } => {
                let version = tx.rebase(&state.latest(), work)?;
                super::check_size(version.size)?;
                let bytes = work.ranges.iter().map(base::ByteRange::len).sum();
                Ok(state.push(version, *parent, *change, bytes))
            }
            Op::Follow { parent, .. } if *parent != state.number() => Err(self.moved_on()),
            Op::Follow { work, parent } => {
                let bytes = work.ranges.iter().map(base::ByteRange::len).sum();
                Ok(state.push(work.ours, *parent, Change::Write, bytes))
            }
            Op::Resize(size) => {
                let (parent, latest) = (state.number(), state.latest());
                let version = tx.resized(&latest, *size)?;
                Ok(state.push(version, parent, Change::Resize, size.abs_diff(latest.size)))
            }
            Op::Tag(number, tag) => state.tag(self.store, *number, tag).map(|()| *number),
            Op::Untag(tag) => state.untag(tag),
            Op::Delete(number) => state.delete(self.store, *number).map(|()| *number),
        }
    }
}

/// How long to wait after `attempt` lost swaps: up to twice as long each time, by chance, so that those who collided
/// part.
fn backoff(attempt: u32) -> Duration {
    let most = BACKOFF_MIN * (1 << attempt.min(BACKOFF_DOUBLINGS_MAX));
    let chance = RandomState::new().hash_one(attempt) % 1024;
    most * chance as u32 / 1024
}
