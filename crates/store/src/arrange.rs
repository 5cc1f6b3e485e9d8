//! The order in which a compaction lays down what it moves: as a reader of the newest versions comes upon it.
//!
//! Small commits leave the nodes of their paths in as many packs. Laid together in the order of the commits, the nodes
//! that one read needs would still lie in as many frames. So the moved part of each tree is walked from its root:
//!
//! ```text
//! blocks, by their place │ upper nodes │ each node of height 2 with its leaves │ what only older versions reach
//! ```
//!
//! Upper nodes are few and wanted by every read: together they are in the cache soon. Those that nobody changed since
//! lie with an older compaction, and are taken along where at least as many of their siblings move. A node of height 2 is
//! followed by its leaves, so that both come with one frame. Leaves that nobody changed are taken along where they are
//! small against the node, as they are in a sparse blob: no more is copied than twice the node itself.
//!
//! Only what is no older than the small packs is walked: a node that was made lately has parents made no earlier.

use crate::blob;
use crate::catalog::{Catalog, Location};
use crate::error::Error;
use crate::name::Name;
use crate::store::Store;
use crate::tree::Nodes as _;
use std::collections::{HashMap, HashSet};

/// Items met for each that is moved, at most, to find their order.
pub(crate) const WALK: usize = 8;
/// Nodes from this height on lie together: one for 4,096 blocks.
const UPPER: u8 = 3;
/// Leaves are taken along that together have no more than this times the bytes of their parent.
const ALONG: usize = 2;
/// Leaves are looked at only where their frames do not make them that much larger than that.
const GUESS: usize = 4;

/// The walk, and then its outcome.
pub(crate) struct Reading<'a> {
    store: &'a Store,
    /// The first pack, by handle, that is looked at.
    oldest: u32,
    /// Items to be met at most.
    left: usize,
    met: HashSet<Name>,
    blocks: Vec<Name>,
    upper: Vec<Name>,
    lower: Vec<Name>,
    /// What only older versions reach.
    rest: Vec<Name>,
    /// Nodes to be moved although nobody changed them.
    pub(crate) along: Vec<(Name, Location)>,
}

impl<'a> Reading<'a> {
    /// Walks all versions as far as they are in `oldest` and later packs, the latest ones first, and meets `most` items
    /// at most.
    pub(crate) fn of(store: &'a Store, oldest: u32, most: usize) -> Result<Self, Error> {
        let (met, along) = (HashSet::new(), Vec::new());
        let (blocks, upper, lower, rest) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut reading = Self { store, oldest, left: most, met, blocks, upper, lower, rest, along };
        let mut past = Vec::new();
        for head in store.heads("")? {
            // What cannot be read has no say in an order.
            let Ok(Some((manifest, _))) = store.head(&head) else { continue };
            for (called, version) in &manifest.versions {
                if blob::is_past(&head, called) {
                    past.push(*version);
                } else {
                    reading.visit(version.root, version.height(), true);
                }
            }
        }
        past.iter().for_each(|version| reading.visit(version.root, version.height(), false));
        Ok(reading)
    }

    /// The place of each item that was met.
    pub(crate) fn places(&self) -> HashMap<Name, usize> {
        let all = [&self.blocks, &self.upper, &self.lower, &self.rest];
        all.into_iter().flatten().enumerate().map(|(place, name)| (*name, place)).collect()
    }

    fn visit(&mut self, name: Name, height: u8, is_latest: bool) {
        let recent = self.store.catalog.find(&name).is_some_and(|at| at.pack >= self.oldest);
        if !recent || self.left == 0 || !self.met.insert(name) {
            return;
        }
        self.left -= 1;
        if height == 0 {
            return self.blocks.push(name);
        }
        // Its survivors lie as they lay before.
        let Ok(node) = self.store.load(&name, height) else { return };
        match height {
            _ if !is_latest => self.rest.push(name),
            UPPER.. => self.upper.push(name),
            _ => self.lower.push(name),
        }
        let leaves = is_latest && height == 2 && self.is_small(node.names());
        for child in node.names() {
            self.visit(*child, height - 1, is_latest);
            if leaves && !self.met.contains(child) {
                self.take_along(*child, false);
            }
        }
        if is_latest && height > UPPER {
            let (_, stay): (Vec<Name>, Vec<Name>) = node.names().iter().partition(|child| self.met.contains(*child));
            if 2 * stay.len() <= node.names().len() {
                stay.into_iter().for_each(|child| self.take_along(child, true));
            }
        }
    }

    /// Whether leaves are small against their parent. What the frames they lie in say is a guess: they lie beside nodes
    /// from above them that may be ten times as large. It spares the reading of leaves that are far too large.
    fn is_small(&self, leaves: &[Name]) -> bool {
        let most = ALONG * node_bytes(leaves.len());
        let guess: usize =
            leaves.iter().map(|leaf| mean_bytes(&self.store.catalog, leaf).unwrap_or(usize::MAX >> 8)).sum();
        if guess <= most || guess > GUESS * most {
            return guess <= most;
        }
        let mut bytes = 0;
        leaves.iter().all(|leaf| {
            // One that cannot be read is not moved either.
            bytes += self.store.load(leaf, 1).map_or(usize::MAX >> 8, |leaf| node_bytes(leaf.names().len()));
            bytes <= most
        })
    }

    fn take_along(&mut self, node: Name, is_upper: bool) {
        let Some(at) = self.store.catalog.find(&node) else { return };
        let settled = self.store.catalog.pack(at.pack).is_some_and(|pack| pack.is_settled());
        if settled && self.left > 0 && self.met.insert(node) {
            self.left -= 1;
            if is_upper {
                self.upper.push(node)
            } else {
                self.lower.push(node)
            }
            self.along.push((node, at));
        }
    }
}

/// Bytes of a node with so many children.
fn node_bytes(children: usize) -> usize {
    3 + crate::name::SHORT_BYTES * children
}

/// Bytes of an item, taken for the mean of its frame.
fn mean_bytes(catalog: &Catalog, name: &Name) -> Option<usize> {
    let at = catalog.find(name)?;
    let info = catalog.pack(at.pack)?.frame(at.frame)?;
    (info.raw as usize).checked_div(usize::from(info.items))
}
