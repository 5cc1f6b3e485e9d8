//! Where a commit's new nodes go: gathered, then written a frame at a time.
//!
//! References pass from hand to hand. A child that the update put in place comes with a reference; a new node
//! takes that over, and takes references of its own on the children it inherits. A node that is known already
//! has its references, so those that came with it are dropped.

use crate::error::Error;
use crate::frame::{self, FRAME_NODES, Kind};
use crate::ledger::Ledger;
use crate::name::Name;
use crate::store::Store;
use crate::transaction::Transaction;
use crate::tree::{Node, Sink};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// A node that no pack holds yet.
struct Pending {
    name: Name,
    node: Node,
    refs: u32,
}

pub(crate) struct NodeSink<'a> {
    tx: &'a Transaction<'a>,
    pending: Vec<Pending>,
    place: HashMap<Name, usize>,
    /// Bytes that its frames take in packs.
    pub(crate) stored_bytes: u64,
}

impl<'a> NodeSink<'a> {
    pub(crate) fn new(tx: &'a Transaction<'a>) -> Self {
        Self { tx, pending: Vec::new(), place: HashMap::new(), stored_bytes: 0 }
    }

    fn store(&self) -> &'a Store {
        self.tx.store
    }

    /// Drops a reference on a child, wherever it is.
    fn release(&mut self, ledger: &mut Ledger, name: Name, height: u8) {
        match self.place.get(&name) {
            Some(&at) => self.pending[at].refs -= 1,
            None => self.store().release(ledger, name, height),
        }
    }

    fn release_fresh(&mut self, node: &Node, fresh: u16) {
        let store = self.store();
        let mut ledger = store.ledger();
        for slot in (0..16).filter(|slot| fresh >> slot & 1 == 1) {
            if let Some(name) = node.child(slot) {
                self.release(&mut ledger, name, node.height() - 1);
            }
        }
    }

    /// Takes references on the children that `node` inherits.
    fn acquire_inherited(&self, node: &Node, fresh: u16) -> Result<(), Error> {
        let store = self.store();
        let mut ledger = store.ledger();
        let inherited = (0..16).filter(|slot| fresh >> slot & 1 == 0).filter_map(|slot| node.child(slot));
        let mut taken: Vec<Name> = Vec::new();
        for name in inherited {
            if let Err(error) = store.acquire(&mut ledger, name, node.height() - 1) {
                taken.into_iter().for_each(|name| store.release(&mut ledger, name, node.height() - 1));
                return Err(error);
            }
            taken.push(name);
        }
        Ok(())
    }

    /// Writes the gathered nodes as one frame and enters them.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        let used: Vec<&Pending> = self.pending.iter().filter(|p| p.refs > 0).collect();
        let mut appended = None;
        if !used.is_empty() {
            let raw: Vec<u8> = used.iter().flat_map(|pending| pending.node.encode()).collect();
            let names: Vec<Name> = used.iter().map(|pending| pending.name).collect();
            let encoded =
                frame::encode(Kind::Nodes, &raw).map_err(|error| Error::io("compress", "a frame of nodes", error))?;
            appended = Some(self.tx.append(&encoded, &names)?);
            self.stored_bytes += encoded.stored.len() as u64;
        }
        let store = self.store();
        store.counters.nodes_made.fetch_add(used.len() as u64, Ordering::Relaxed);
        self.place.clear();
        let mut ledger = store.ledger();
        let mut slots = 0..;
        // Children come before their parents, so whatever is released here has been entered.
        for pending in std::mem::take(&mut self.pending) {
            let known = match appended.as_ref().filter(|_| pending.refs > 0) {
                None => true,
                Some(appended) => {
                    let at = appended.location(slots.next().expect("endless"));
                    store.enter(&mut ledger, pending.name, at, pending.refs) > 0
                }
            };
            if known {
                let height = pending.node.height() - 1;
                pending.node.names().iter().for_each(|name| store.release(&mut ledger, *name, height));
            }
        }
        Ok(())
    }

    /// Gives up: drops every reference that pending nodes, and `held`, have on what is stored.
    pub(crate) fn abandon(&mut self, held: Vec<(Name, u8)>) {
        let store = self.store();
        let pending = std::mem::take(&mut self.pending);
        let place = std::mem::take(&mut self.place);
        let edges = pending.iter().flat_map(|p| p.node.names().iter().map(|name| (*name, p.node.height() - 1)));
        let mut ledger = store.ledger();
        for (name, height) in edges.chain(held) {
            if !place.contains_key(&name) {
                store.release(&mut ledger, name, height);
            }
        }
    }
}

impl Sink<Error> for NodeSink<'_> {
    fn put(&mut self, node: &Node, fresh: u16) -> Result<Name, Error> {
        let store = self.store();
        let name = store.keys.node(&node.encode());
        if let Some(&at) = self.place.get(&name) {
            self.pending[at].refs += 1;
            self.release_fresh(node, fresh);
            return Ok(name);
        }
        let before = {
            let _ledger = store.ledger();
            store.take_known(&name)
        };
        match before {
            Some(0) => self.acquire_inherited(node, fresh).inspect_err(|_| {
                let _ledger = store.ledger();
                store.catalog.drop_ref(&name);
            })?,
            // A node that is known to a shared store may be garbage whose children are gone: they are written.
            Some(_) if store.is_shared() => {}
            Some(_) => self.release_fresh(node, fresh),
            None => {
                if self.pending.len() == FRAME_NODES {
                    self.flush()?;
                }
                self.acquire_inherited(node, fresh)?;
                self.place.insert(name, self.pending.len());
                self.pending.push(Pending { name, node: node.clone(), refs: 1 });
            }
        }
        Ok(name)
    }
}
