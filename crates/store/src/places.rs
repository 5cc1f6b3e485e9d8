//! Where the content of a version lies: what to fetch ahead, or to keep at hand.

use crate::catalog::Location;
use crate::engine::cached::Place;
use crate::error::Error;
use crate::name::{Name, Version};
use crate::store::Store;
use crate::tree::Nodes as _;
use base::ByteRange;
use std::collections::{BTreeSet, HashSet};

impl Store {
    /// The packs, and the ranges in them, that hold `version`: its nodes and blocks, each range once, neighbours
    /// together, in the order in which they lie. Zero blocks lie nowhere.
    ///
    /// # Errors
    /// Something of it is missing, or a node cannot be read.
    pub fn places(&self, version: &Version) -> Result<Vec<Place>, Error> {
        self.refreshed(|| self.try_places(version))
    }

    fn try_places(&self, version: &Version) -> Result<Vec<Place>, Error> {
        let mut frames: BTreeSet<(u32, u32)> = BTreeSet::new();
        let mut seen: HashSet<Name> = HashSet::new();
        let mut todo = vec![(version.root, version.height())];
        while let Some((name, height)) = todo.pop() {
            if name.is_zero() {
                continue;
            }
            let kind = if height == 0 { "block" } else { "node" };
            let Location { pack, frame, .. } = self.catalog.find(&name).ok_or(Error::Unknown { kind, name })?;
            frames.insert((pack, frame));
            if height > 0 && seen.insert(name) {
                todo.extend(self.load(&name, height)?.names().iter().map(|child| (*child, height - 1)));
            }
        }
        let mut out: Vec<(u32, Place)> = Vec::new();
        for (handle, frame) in frames {
            // A collection may move things at any time; what went is found where it is needed.
            let Some(pack) = self.catalog.pack(handle) else { continue };
            let Some(info) = pack.frame(frame) else { continue };
            let range = ByteRange::at(u64::from(info.offset), u64::from(info.stored));
            match out.last_mut() {
                Some((last, place)) if *last == handle => match place.ranges.last_mut() {
                    Some(before) if before.end == range.start => before.end = range.end,
                    _ => place.ranges.push(range),
                },
                _ => out.push((handle, Place { object: pack.id.pack_object(), ranges: vec![range] })),
            }
        }
        Ok(out.into_iter().map(|(_, place)| place).collect())
    }
}
