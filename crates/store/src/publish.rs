//! Publication: everything durable, then heads swapped. Transactions that publish at the same time do it together.
//!
//! Each takes its references on what it publishes, then joins the group: one of them makes every pack durable to which
//! something refers, beside them what the heads are to become, and swaps the heads of all. A block that one transaction stored may be one that another found
//! there, so it is all packs, and nobody's round can be shared by a transaction that appends afterwards: a round takes
//! only those that came before it began.

use crate::commit::in_parallel;
use crate::engine::{Etag, Expect, HeadSwap, Staged};
use crate::error::Error;
use crate::head::{self, Manifest};
use crate::name::Name;
use crate::store::Store;
use crate::transaction::Transaction;
use std::collections::HashSet;

/// A head to be swapped. References on its versions were taken.
pub(crate) struct Publication {
    head: String,
    expect: Expect,
    manifest: Manifest,
    /// The head as it is to be, once that is known to come.
    bytes: Vec<u8>,
    staged: Option<Staged>,
}

/// The outcome, and the manifest that needs its references no more: the one before, or this one where it did not come
/// to be. Where nobody can tell, none: too many references only leak.
type Outcome = (Result<Etag, Error>, Option<Manifest>);

impl Transaction<'_> {
    /// [`Transaction::publish`] for a transaction that goes on.
    pub(crate) fn publish_so_far(&self, head: &str, expect: Expect, manifest: &Manifest) -> Result<Etag, Error> {
        if self.store.is_shared() {
            return self.publish_shared(head, &expect, manifest);
        }
        let mut results = self.store.publish_all(vec![(head.to_owned(), expect, manifest.clone())]);
        results.pop().expect("a result for each head")
    }
}

impl Store {
    /// Publishes each manifest under its head, as [`Transaction::publish`] would; results in order.
    pub(crate) fn publish_all(&self, heads: Vec<(String, Expect, Manifest)>) -> Vec<Result<Etag, Error>> {
        if self.is_shared() {
            // Each by itself: a transaction that made none of it looks at all of it.
            let publish = |(head, expect, manifest): (String, Expect, Manifest)| {
                self.begin().publish_shared(&head, &expect, &manifest)
            };
            return heads.into_iter().map(publish).collect();
        }
        let mut results: Vec<Option<Result<Etag, Error>>> = Vec::with_capacity(heads.len());
        let mut admitted = Vec::new();
        for (head, expect, manifest) in heads {
            let publication = Publication { head, expect, manifest, bytes: Vec::new(), staged: None };
            results.push(match self.admit(&publication) {
                Ok(()) => {
                    admitted.push(publication);
                    None
                }
                Err(error) => Some(Err(error)),
            });
        }
        let work = |batches: Vec<Vec<Publication>>| {
            let lengths: Vec<usize> = batches.iter().map(Vec::len).collect();
            let mut done = self.publish_round(batches.into_iter().flatten().collect()).into_iter();
            lengths.into_iter().map(|length| done.by_ref().take(length).collect()).collect()
        };
        let mut done =
            if admitted.is_empty() { Vec::new() } else { self.publications.submit(admitted, work) }.into_iter();
        let each = results.into_iter().map(|early| early.or_else(|| done.next()));
        each.map(|result| result.expect("a result for each publication")).collect()
    }

    /// Refuses early what the swap would refuse, before anything is made durable for it, and takes references.
    fn admit(&self, publication: &Publication) -> Result<(), Error> {
        let Publication { head, expect, manifest, .. } = publication;
        self.writable("publish")?;
        head::check_name(head)?;
        let found = self.engine.head(head).map_err(|error| Error::io("read", head::object(head), error))?;
        if let Some(found) = expect.refuses(found.map(|(_, etag)| etag).as_ref()) {
            return Err(Error::HeadChanged { head: head.clone(), found });
        }
        let roots: Vec<(Name, u8)> = manifest.versions.values().map(|v| (v.root, v.height())).collect();
        let mut ledger = self.ledger();
        for (done, (name, height)) in roots.iter().enumerate() {
            if let Err(error) = self.acquire(&mut ledger, *name, *height) {
                roots[..done].iter().for_each(|(name, height)| self.release(&mut ledger, *name, *height));
                return Err(error);
            }
        }
        Ok(())
    }

    fn publish_round(&self, mut publications: Vec<Publication>) -> Vec<Result<Etag, Error>> {
        let outcomes: Vec<Outcome> = match self.make_durable(&mut publications) {
            Ok(()) => self.swap_all(publications),
            Err(error) => publications.into_iter().map(|p| (Err(error.copy()), Some(p.manifest))).collect(),
        };
        let mut ledger = self.ledger();
        let each = outcomes.into_iter().map(|(result, unused)| {
            for version in unused.iter().flat_map(|manifest| manifest.versions.values()) {
                self.release(&mut ledger, version.root, version.height());
            }
            result
        });
        each.collect()
    }

    /// Makes packs durable, and beside them what the heads are to become.
    fn make_durable(&self, publications: &mut [Publication]) -> Result<(), Error> {
        let stage = |publication: &mut Publication| {
            let bytes = publication.manifest.encode(&publication.head, &self.keys);
            publication.staged = self.engine.stage_head(&bytes);
            publication.bytes = bytes;
            Ok(())
        };
        let threads = self.engine.concurrency();
        if threads == 1 {
            publications.iter_mut().try_for_each(stage)?;
            return self.seal_open_packs();
        }
        std::thread::scope(|scope| {
            let staging = scope.spawn(|| in_parallel(threads, publications.iter_mut().collect(), stage));
            let sealed = self.seal_open_packs();
            staging.join().expect("staging does not panic")?;
            sealed
        })
    }

    fn swap_all(&self, publications: Vec<Publication>) -> Vec<Outcome> {
        let _one = self.publishing.lock().expect("no panic while publishing");
        let mut outcomes = Vec::with_capacity(publications.len());
        let mut rest = publications.into_iter().peekable();
        // Heads that are swapped together must differ.
        while rest.peek().is_some() {
            let mut names = HashSet::new();
            let mut together = Vec::new();
            while let Some(publication) = rest.next_if(|next| names.insert(next.head.clone())) {
                together.push(publication);
            }
            outcomes.extend(self.swap_together(together));
        }
        outcomes
    }

    fn swap_together(&self, mut publications: Vec<Publication>) -> Vec<Outcome> {
        let mut swaps = Vec::with_capacity(publications.len());
        // What was there before; what could not be read is not swapped.
        let mut before: Vec<Result<Option<Manifest>, Error>> = Vec::with_capacity(publications.len());
        for Publication { head, expect, bytes, staged, .. } in &mut publications {
            let old = match self.head(head) {
                Ok(found) => Ok(found.map(|(manifest, _)| manifest)),
                Err(Error::Corrupt { .. }) => Ok(None),
                Err(error) => Err(error),
            };
            if old.is_ok() {
                let (bytes, staged) = (std::mem::take(bytes), staged.take());
                swaps.push(HeadSwap { name: head.clone(), expect: expect.clone(), bytes, staged });
            }
            before.push(old);
        }
        let mut swapped = self.engine.swap_heads(&swaps).into_iter().zip(&swaps);
        let each = publications.into_iter().zip(before).map(|(Publication { head, manifest, .. }, old)| {
            let old = match old {
                Ok(old) => old,
                Err(error) => return (Err(error), Some(manifest)),
            };
            match swapped.next().expect("a result for each swap") {
                (Ok(Ok(etag)), _) => (Ok(etag), old),
                (Ok(Err(found)), _) => (Err(Error::HeadChanged { head, found }), Some(manifest)),
                (Err(error), swap) => {
                    let there = self.engine.head(&head);
                    let absent = there.is_ok_and(|found| found.is_none_or(|(there, _)| there != swap.bytes));
                    (Err(Error::io("publish", head::object(&head), error)), absent.then_some(manifest))
                }
            }
        });
        each.collect()
    }
}
