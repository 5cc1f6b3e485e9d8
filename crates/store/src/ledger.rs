//! Reference counts: who may go when a head goes.
//!
//! The invariant: *an entry with references holds one reference on each of its children, an entry without holds
//! none.* References come from heads, from live transactions, and from nodes with references. Counts live in
//! memory only; a writer counts anew when it opens, by walking from the heads, each node once.
//!
//! An entry without references stays readable, and may be taken up again by a commit that finds it, until the
//! collector forgets it. Too many references leak space until the next opening; too few would lose data. So
//! wherever something fails half way, references are left over.

use crate::catalog::Location;
use crate::error::Error;
use crate::name::Name;
use crate::store::Store;
use crate::tree::Nodes as _;
use crate::verify::Fault;
use std::sync::MutexGuard;

/// The right to change reference counts.
#[derive(Default)]
pub(crate) struct Ledger {
    /// Transactions, and removals under way: what they hold is known to them alone, so nobody may count anew.
    pub(crate) holders: usize,
    /// What was found missing while counting. Nothing may be collected while there is any.
    pub(crate) faults: Vec<Fault>,
}

/// Keeps others from counting references anew.
pub(crate) struct HoldCounts<'a>(&'a Store);

impl Drop for HoldCounts<'_> {
    fn drop(&mut self) {
        self.0.ledger().holders -= 1;
    }
}

impl Store {
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("no panic while the ledger is locked")
    }

    pub(crate) fn hold_counts(&self) -> HoldCounts<'_> {
        self.ledger().holders += 1;
        HoldCounts(self)
    }

    /// Takes a reference on a subtree; a zero name needs none. On failure nothing was taken.
    pub(crate) fn acquire(&self, _ledger: &mut Ledger, name: Name, height: u8) -> Result<(), Error> {
        if name.is_zero() {
            return Ok(());
        }
        if self.is_shared() {
            return self.look_up(name, height);
        }
        let mut taken = Vec::new();
        let mut todo = vec![(name, height)];
        while let Some((name, height)) = todo.pop() {
            match self.take_one(name, height, &mut todo) {
                Ok(()) => taken.push(name),
                Err(error) => {
                    taken.iter().for_each(|name| {
                        self.catalog.drop_ref(name);
                    });
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Makes sure that a name is known: all that is asked where nobody counts.
    fn look_up(&self, name: Name, height: u8) -> Result<(), Error> {
        let kind = if height == 0 { "block" } else { "node" };
        for all in [false, true] {
            if self.catalog.find(&name).is_some() {
                return Ok(());
            }
            self.refresh(all)?;
        }
        self.catalog.find(&name).map(|_| ()).ok_or(Error::Unknown { kind, name })
    }

    /// Takes a reference on a name that is stored already and may be relied on; how many it had.
    pub(crate) fn take_known(&self, name: &Name) -> Option<u32> {
        if !self.is_shared() {
            return self.catalog.add_refs(name, 1);
        }
        self.is_safe_to_share(name).then_some(1)
    }

    fn take_one(&self, name: Name, height: u8, todo: &mut Vec<(Name, u8)>) -> Result<(), Error> {
        let kind = if height == 0 { "block" } else { "node" };
        let before = self.catalog.add_refs(&name, 1).ok_or(Error::Unknown { kind, name })?;
        if before == 0 && height > 0 {
            match self.load(&name, height) {
                Ok(node) => todo.extend(node.names().iter().rev().map(|child| (*child, height - 1))),
                Err(error) => {
                    self.catalog.drop_ref(&name);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Enters a new item with `refs` references, or adds them to one that another transaction entered
    /// meanwhile. Returns how many it had.
    pub(crate) fn enter(&self, _ledger: &mut Ledger, name: Name, at: Location, refs: u32) -> u32 {
        if self.catalog.insert(name, at, refs) {
            return 0;
        }
        if self.is_shared() && !self.is_safe_to_share(&name) {
            let old = self.catalog.find(&name).expect("only the holder of the ledger forgets names");
            self.catalog.relocate(&name, old, at);
        }
        self.catalog.add_refs(&name, refs).expect("only the holder of the ledger forgets names")
    }

    /// Drops a reference on a subtree, and on everything that held only through it.
    pub(crate) fn release(&self, ledger: &mut Ledger, name: Name, height: u8) {
        if self.is_shared() {
            return; // nobody counts
        }
        let mut todo = vec![(name, height)];
        while let Some((name, height)) = todo.pop() {
            if name.is_zero() || self.catalog.drop_ref(&name) != Some(0) || height == 0 {
                continue;
            }
            match self.load(&name, height) {
                Ok(node) => todo.extend(node.names().iter().rev().map(|child| (*child, height - 1))),
                // Its children keep their references: a leak, until the store is opened again.
                Err(error) => ledger.faults.push(Fault::of_error(None, None, None, &error)),
            }
        }
    }

    /// Counts anew from the heads. Call only while nothing else holds references.
    pub(crate) fn recount(&self, ledger: &mut Ledger) -> Result<(), Error> {
        assert_eq!(ledger.holders, 0, "references of transactions would be lost");
        // Listed first: a failure must leave the counts, and the faults that forbid to trust them, as they are.
        let heads = self.heads("")?;
        ledger.faults.clear();
        self.catalog.clear_refs();
        for head in heads {
            let manifest = match self.head(&head) {
                Ok(Some((manifest, _))) => manifest,
                Ok(None) => continue,
                Err(error) => {
                    ledger.faults.push(Fault::of_error(Some(&head), None, None, &error));
                    continue;
                }
            };
            for (blob, version) in &manifest.versions {
                if let Err(error) = self.acquire(ledger, version.root, version.height()) {
                    ledger.faults.push(Fault::of_error(Some(&head), Some(blob), None, &error));
                }
            }
        }
        Ok(())
    }
}
