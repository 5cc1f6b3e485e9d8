//! Transactions: what they wrote is safe from the collector until they are published or dropped.

use crate::catalog::{Location, Pack};
use crate::engine::{Etag, Expect};
use crate::error::Error;
use crate::frame::Encoded;
use crate::head::Manifest;
use crate::ledger::{HoldCounts, Ledger};
use crate::name::{Name, Version};
use crate::shared::Safety;
use crate::store::Store;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A unit of writing: any number of commits, then one publication. Dropped unpublished, it leaves nothing that
/// the next collection would not remove.
pub struct Transaction<'a> {
    pub(crate) store: &'a Store,
    /// Subtrees this transaction holds a reference on.
    held: Mutex<Vec<(Name, u8)>>,
    /// The packs it started; the last one takes more frames.
    packs: Mutex<Vec<Arc<Pack>>>,
    pub(crate) safety: Mutex<Safety>,
    /// Full packs become durable at once.
    seal_full: AtomicBool,
    /// Bytes of the frames it stored.
    stored: AtomicU64,
    _counts: HoldCounts<'a>,
}

/// A frame that was appended. Keep it until its items are in the catalog: until then they only look dead.
pub(crate) struct Appended {
    pack: Arc<Pack>,
    frame: u32,
}

impl Appended {
    pub(crate) fn location(&self, slot: usize) -> Location {
        Location { pack: self.pack.handle, frame: self.frame, slot: slot as u8 }
    }

    /// Says for which version the pack is laid down.
    pub(crate) fn lay_for(&self, tag: u32) {
        self.pack.lay_for(tag);
    }
}

impl Drop for Appended {
    fn drop(&mut self) {
        self.pack.entered();
    }
}

impl Store {
    /// Starts a transaction. Any number may be under way.
    pub fn begin(&self) -> Transaction<'_> {
        Transaction {
            store: self,
            held: Mutex::default(),
            packs: Mutex::default(),
            safety: Mutex::default(),
            // What an engine holds in memory until it is durable must not grow with the transaction.
            seal_full: AtomicBool::new(self.engine.is_remote()),
            stored: AtomicU64::new(0),
            _counts: self.hold_counts(),
        }
    }

    /// Drops packs of ended transactions to which nothing refers.
    pub(crate) fn drop_orphans(&self, ledger: &mut Ledger) {
        // Where nobody counts, another transaction may rely on what an orphan holds.
        let alone = ledger.holders <= 1;
        let is_needed = |pack: &Pack| if self.is_shared() { !alone } else { pack.live() > 0 };
        let mut open = self.open_packs.lock().expect("no panic while open packs are locked");
        open.retain(|pack| {
            if !pack.orphan.load(Ordering::Relaxed) || is_needed(pack) || pack.is_sealed() {
                return true;
            }
            let Some((names, uploaded)) = pack.abandon() else { return true };
            names.iter().for_each(|name| self.catalog.forget(name, pack.handle));
            self.catalog.remove_pack(pack.handle);
            // The index first: an index without its pack would look like a loss.
            let objects = [pack.id.index_object(), pack.id.pack_object()];
            if uploaded && let Err(error) = self.engine.remove(&objects) {
                log::warn!("cannot remove {}, which nothing needs; a later collection will: {error}", objects[1]);
            }
            false
        });
    }
}

impl Transaction<'_> {
    /// Keeps a reference that the caller took until the transaction ends.
    pub(crate) fn hold(&self, name: Name, height: u8) {
        self.held.lock().expect("no panic while the list is locked").push((name, height));
    }

    /// Adds a frame to the pack of this transaction.
    pub(crate) fn append(&self, encoded: &Encoded, names: &[Name]) -> Result<Appended, Error> {
        let mut packs = self.packs.lock().expect("no panic while packs are locked");
        loop {
            if let Some(pack) = packs.last()
                && let Some(frame) = pack.append(encoded, names)?
            {
                self.stored.fetch_add(encoded.stored.len() as u64, Ordering::Relaxed);
                return Ok(Appended { pack: Arc::clone(pack), frame });
            }
            if self.seal_full.load(Ordering::Relaxed)
                && let Some(full) = packs.last()
            {
                self.store.seal_packs(std::iter::once(full))?;
            }
            packs.push(self.store.start_pack()?);
        }
    }

    /// Bytes by which it made the store grow so far, indexes not counted.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Makes each pack durable as soon as it is full, so that what a killed transaction has done is found again.
    pub(crate) fn seal_when_full(&self) {
        self.seal_full.store(true, Ordering::Relaxed);
    }

    /// Makes the packs of this transaction durable, whether or not anything refers to them yet.
    pub(crate) fn seal(&self) -> Result<(), Error> {
        let packs = self.packs.lock().expect("no panic while packs are locked").clone();
        self.store.seal_packs(packs.iter())
    }

    /// Stores a small blob as blocks of 4 KiB. Its size is that of `bytes` exactly.
    ///
    /// # Errors
    /// As [`Transaction::commit`].
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Version, Error> {
        struct Slice<'a>(&'a [u8]);
        impl crate::BlockSource for Slice<'_> {
            fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                buf.copy_from_slice(&self.0[offset as usize..offset as usize + buf.len()]);
                Ok(())
            }
        }
        let base = self.store.empty(bytes.len() as u64, base::PAGE as u32);
        if bytes.is_empty() {
            return Ok(base);
        }
        let written = [base::ByteRange::new(0, base.size)];
        let changes = crate::Changes {
            written: &written,
            zeroed: &[],
            source: &Slice(bytes),
            threads: 1,
            progress: None,
            cancel: None,
        };
        Ok(self.commit(&base, &changes)?.0)
    }

    /// Makes everything durable, then visible under `head` in one step, and ends the transaction. Versions in
    /// the manifest may come from this transaction or be older.
    ///
    /// # Errors
    /// [`Error::HeadChanged`] when the head is not as expected; a version in the manifest is unknown; the medium
    /// is full or fails. Nothing was published then.
    pub fn publish(self, head: &str, expect: Expect, manifest: &Manifest) -> Result<Etag, Error> {
        self.publish_so_far(head, expect, manifest)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        let mut ledger = self.store.ledger();
        let held = std::mem::take(&mut *self.held.lock().expect("no panic while the list is locked"));
        held.into_iter().for_each(|(name, height)| self.store.release(&mut ledger, name, height));
        for pack in &*self.packs.lock().expect("no panic while packs are locked") {
            pack.orphan.store(true, Ordering::Relaxed);
        }
        self.store.drop_orphans(&mut ledger);
    }
}
