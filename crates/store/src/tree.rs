//! The copy-on-write segment tree over block names. Pure: knows no file, pack, thread or key.
//!
//! A tree of height h covers 16^h blocks. A node has up to 16 children: at height 1 these are blocks, above
//! that nodes of one height less. A subtree of zero blocks only is never stored: its place in the parent is
//! empty, so a node lists the children it has under a bit mask. Nodes are named by the hash of their encoding,
//! so equal subtrees are one subtree, a clone is a copy of the root's name, and a comparison of two trees
//! stops wherever names agree.
//!
//! Writing is one ascending sweep ([`Update`]): only the path from the root to the current place is open, so
//! memory is O(height) however much changes, and each changed node is made exactly once.

use crate::name::{Name, SHORT_BYTES};
use std::ops::Range;
use std::sync::Arc;

/// Children of a node.
pub(crate) const FANOUT: usize = 16;
const FANOUT_BITS: u32 = 4;
/// In the first byte of an encoding: names have 24 bytes.
const SHORT: u8 = 0x80;
/// The longest encoding of a node.
pub(crate) const NODE_BYTES_MAX: usize = 3 + FANOUT * 32;
/// Above this no 64-bit blob reaches.
pub(crate) const HEIGHT_MAX: u8 = 16;

/// The height of the tree of a blob of `blocks` blocks: at least 1.
pub(crate) fn height_of(blocks: u64) -> u8 {
    let mut height = 1;
    while span(height) < blocks {
        height += 1;
    }
    height
}

/// How many blocks a subtree of `height` covers (saturating: height 16 covers every 64-bit number).
pub(crate) fn span(height: u8) -> u64 {
    1u64.checked_shl(FANOUT_BITS * u32::from(height)).unwrap_or(u64::MAX)
}

/// The 16 places of a node; empty ones are zero subtrees.
pub(crate) type Children = [Option<Name>; FANOUT];

/// One node, in the sparse form in which it is kept in memory and on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    height: u8,
    mask: u16,
    names: Box<[Name]>,
}

impl Node {
    /// Packs `children`; at least one must be there.
    pub(crate) fn new(height: u8, children: &Children) -> Self {
        let mask = children.iter().enumerate().fold(0, |mask, (i, c)| mask | u16::from(c.is_some()) << i);
        assert!(mask != 0 && (1..=HEIGHT_MAX).contains(&height), "an empty node is a zero name, never stored");
        Self { height, mask, names: children.iter().flatten().copied().collect() }
    }

    /// Child `slot`.
    pub(crate) fn child(&self, slot: usize) -> Option<Name> {
        let bit = 1u16 << slot;
        (self.mask & bit != 0).then(|| self.names[(self.mask & (bit - 1)).count_ones() as usize])
    }

    /// All places.
    pub(crate) fn children(&self) -> Children {
        std::array::from_fn(|slot| self.child(slot))
    }

    /// The children that are there.
    pub(crate) fn names(&self) -> &[Name] {
        &self.names
    }

    pub(crate) fn height(&self) -> u8 {
        self.height
    }

    /// Height, mask (little endian), then the names of the children that are there: of all of them the first 24 bytes
    /// where the rest is zero, as in every store of format 2, and a bit beside the height says so.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let is_short = self.names.iter().all(Name::is_short);
        let (tag, width) = if is_short { (SHORT, SHORT_BYTES) } else { (0, 32) };
        let mut out = Vec::with_capacity(3 + width * self.names.len());
        out.push(self.height | tag);
        out.extend_from_slice(&self.mask.to_le_bytes());
        self.names.iter().for_each(|name| out.extend_from_slice(&name.0[..width]));
        out
    }

    /// The length of the encoding that starts with these bytes, or `None` where none does.
    pub(crate) fn encoded_len(bytes: &[u8]) -> Option<usize> {
        let head: [u8; 3] = bytes.get(..3)?.try_into().ok()?;
        let mask = u16::from_le_bytes([head[1], head[2]]);
        let len = 3 + name_width(head[0]) * mask.count_ones() as usize;
        ((1..=HEIGHT_MAX).contains(&(head[0] & !SHORT)) && mask != 0 && bytes.len() >= len).then_some(len)
    }

    /// Reads what [`Node::encode`] wrote; `None` for anything else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if Self::encoded_len(bytes)? != bytes.len() {
            return None;
        }
        let width = name_width(bytes[0]);
        let names: Box<[Name]> = bytes[3..].chunks_exact(width).map(Name::padded).collect();
        let node = Self { height: bytes[0] & !SHORT, mask: u16::from_le_bytes([bytes[1], bytes[2]]), names };
        // One encoding for each node: long names are not all short.
        let needs_long = width == SHORT_BYTES || !node.names.iter().all(Name::is_short);
        (needs_long && node.names.iter().all(|name| !name.is_zero())).then_some(node)
    }
}

/// Bytes of a name in an encoding that begins with `tag`.
fn name_width(tag: u8) -> usize {
    if tag & SHORT != 0 { SHORT_BYTES } else { 32 }
}

/// Where nodes are loaded from.
pub(crate) trait Nodes {
    type Error;
    /// The node of this name; its height must be `height`.
    fn load(&self, name: &Name, height: u8) -> Result<Arc<Node>, Self::Error>;
}

/// Where new nodes go.
pub(crate) trait Sink<E> {
    /// Keeps `node` and names it. `fresh` has a bit for each place whose child this update put there, as
    /// opposed to inherited: the reference that the update held on such a child passes to the node.
    fn put(&mut self, node: &Node, fresh: u16) -> Result<Name, E>;
}

/// A whole tree, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tree {
    /// `None`: all zero.
    pub(crate) name: Option<Name>,
    pub(crate) height: u8,
}

impl Tree {
    /// The tree that `root` names.
    pub(crate) fn new(root: Name, height: u8) -> Self {
        Self { name: (!root.is_zero()).then_some(root), height }
    }

    /// The children of this tree seen as one of `height`: a lower tree stands in the first place of taller ones.
    fn children_at<N: Nodes>(self, nodes: &N, height: u8) -> Result<[Tree; FANOUT], N::Error> {
        let mut out = [Tree { name: None, height: height - 1 }; FANOUT];
        if self.height < height {
            out[0] = self;
        } else if let Some(name) = &self.name {
            let node = nodes.load(name, height)?;
            for (slot, place) in out.iter_mut().enumerate() {
                place.name = node.child(slot);
            }
        }
        Ok(out)
    }
}

/// Subtree `number` of `height`, counted from the left: one way down, however much lies beside it. It must lie within
/// the tree.
pub(crate) fn subtree<N: Nodes>(nodes: &N, tree: Tree, height: u8, number: u64) -> Result<Tree, N::Error> {
    assert!(height <= tree.height && number < span(tree.height - height), "a subtree of that tree");
    let mut at = tree;
    while let Some(name) = at.name.filter(|_| at.height > height) {
        let below = at.height - 1;
        let slot = (number >> (FANOUT_BITS * u32::from(below - height))) as usize % FANOUT;
        at = Tree { name: nodes.load(&name, at.height)?.child(slot), height: below };
    }
    Ok(Tree { height, ..at })
}

/// A run of blocks met on a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) blocks: u64,
    /// `None`: zero blocks. Otherwise the run is one block.
    pub(crate) name: Option<Name>,
}

/// Walks the blocks of `range` in order; zero subtrees come as one run. Stops early when `visit` says false.
/// Returns whether it came to the end.
pub(crate) fn walk<N: Nodes>(
    nodes: &N,
    tree: Tree,
    range: Range<u64>,
    visit: &mut dyn FnMut(Run) -> bool,
) -> Result<bool, N::Error> {
    walk_at(nodes, tree, 0, &range, visit)
}

fn walk_at<N: Nodes>(
    nodes: &N,
    tree: Tree,
    start: u64,
    range: &Range<u64>,
    visit: &mut dyn FnMut(Run) -> bool,
) -> Result<bool, N::Error> {
    let from = start.max(range.start);
    let to = start.saturating_add(span(tree.height)).min(range.end);
    if from >= to {
        return Ok(true);
    }
    let Some(name) = tree.name else { return Ok(visit(Run { start: from, blocks: to - from, name: None })) };
    if tree.height == 0 {
        return Ok(visit(Run { start, blocks: 1, name: Some(name) }));
    }
    let node = nodes.load(&name, tree.height)?;
    let step = span(tree.height - 1);
    let (first, last) = ((from - start) / step, (to - 1 - start) / step);
    for slot in first..=last {
        let child = Tree { name: node.child(slot as usize), height: tree.height - 1 };
        if !walk_at(nodes, child, start + slot * step, range, visit)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reports every block whose name differs between two trees, in order. Visits only nodes that differ.
pub(crate) fn diff<N: Nodes>(nodes: &N, a: Tree, b: Tree, found: &mut dyn FnMut(u64)) -> Result<(), N::Error> {
    diff_at(nodes, a, b, a.height.max(b.height), 0, found)
}

fn diff_at<N: Nodes>(
    nodes: &N,
    a: Tree,
    b: Tree,
    height: u8,
    start: u64,
    found: &mut dyn FnMut(u64),
) -> Result<(), N::Error> {
    if a.name == b.name && (a.height == b.height || a.name.is_none()) {
        return Ok(());
    }
    if height == 0 {
        found(start);
        return Ok(());
    }
    let pairs = a.children_at(nodes, height)?.into_iter().zip(b.children_at(nodes, height)?);
    for (slot, (a, b)) in pairs.enumerate() {
        diff_at(nodes, a, b, height - 1, start + slot as u64 * span(height - 1), found)?;
    }
    Ok(())
}

/// One open node on the path of an [`Update`].
struct Level {
    height: u8,
    /// Which node of its height this is, counted from the left.
    number: u64,
    children: Children,
    fresh: u16,
    dirty: bool,
}

/// What an [`Update`] made.
pub(crate) struct Updated {
    /// The new root; `None` when all is zero.
    pub(crate) root: Option<Name>,
    /// Whether the root is new, so that the update's reference on it passes to the caller.
    pub(crate) changed: bool,
}

/// An ascending sweep of changes over one tree.
pub(crate) struct Update<'a, N: Nodes> {
    nodes: &'a N,
    base: Tree,
    /// From the root downwards. Empty once finished.
    path: Vec<Level>,
    /// The first block not yet passed: changes must ascend.
    next: u64,
}

impl<'a, N: Nodes> Update<'a, N> {
    /// Starts a sweep over `base`.
    pub(crate) fn new(nodes: &'a N, base: Tree) -> Result<Self, N::Error> {
        let mut update = Self { nodes, base, path: Vec::new(), next: 0 };
        update.open(base.name, base.height, 0)?;
        Ok(update)
    }

    fn open(&mut self, name: Option<Name>, height: u8, number: u64) -> Result<(), N::Error> {
        let children = match &name {
            Some(name) => self.nodes.load(name, height)?.children(),
            None => [None; FANOUT],
        };
        self.path.push(Level { height, number, children, fresh: 0, dirty: false });
        Ok(())
    }

    /// Sets block `block` to `name`. The caller's reference on `name` passes to the update, unless this returns
    /// false: the block has that name already and nothing was done.
    pub(crate) fn set<S: Sink<N::Error>>(&mut self, block: u64, name: Name, sink: &mut S) -> Result<bool, N::Error> {
        self.place(0, block, Some(name), sink)
    }

    /// Puts the subtree `name` in the place of number `number` of its height, which must be lower than the tree. The
    /// caller's reference on it passes to the update, unless this returns false: it is there already.
    pub(crate) fn graft<S: Sink<N::Error>>(
        &mut self,
        height: u8,
        number: u64,
        name: Name,
        sink: &mut S,
    ) -> Result<bool, N::Error> {
        self.place(height, number, Some(name), sink)
    }

    /// Makes blocks `range` zero, whole subtrees at a time.
    pub(crate) fn zero<S: Sink<N::Error>>(&mut self, range: Range<u64>, sink: &mut S) -> Result<(), N::Error> {
        let mut at = range.start;
        while at < range.end {
            let fits = |height: u8| at.is_multiple_of(span(height)) && range.end - at >= span(height);
            let height = (0..self.base.height).rev().find(|&height| fits(height)).unwrap_or(0);
            self.place(height, at / span(height), None, sink)?;
            at += span(height);
        }
        Ok(())
    }

    fn place<S: Sink<N::Error>>(
        &mut self,
        height: u8,
        number: u64,
        name: Option<Name>,
        sink: &mut S,
    ) -> Result<bool, N::Error> {
        let start = number * span(height);
        assert!(start >= self.next && start < span(self.base.height), "changes must ascend within the tree");
        self.next = start;
        if !self.open_to(height + 1, number >> FANOUT_BITS, name.is_none(), sink)? {
            self.next = start + span(height);
            return Ok(false);
        }
        self.next = start + span(height);
        let level = self.path.last_mut().expect("open until finished");
        let slot = number as usize % FANOUT;
        if level.children[slot] == name {
            return Ok(false);
        }
        level.children[slot] = name;
        level.fresh |= u16::from(name.is_some()) << slot;
        level.dirty = true;
        Ok(true)
    }

    /// Makes node `number` of `height` the last one of the path. False, with the path shorter, when the way
    /// leads into a zero subtree and `only_existing` asks to leave that alone.
    fn open_to<S: Sink<N::Error>>(
        &mut self,
        height: u8,
        number: u64,
        only_existing: bool,
        sink: &mut S,
    ) -> Result<bool, N::Error> {
        let above = |at: u8| number >> (FANOUT_BITS * u32::from(at - height));
        while self.path.last().is_some_and(|l| l.height < height || l.number != above(l.height)) {
            self.close(sink)?;
        }
        loop {
            let last = self.path.last().expect("the root covers every number");
            if last.height == height {
                return Ok(true);
            }
            let below = last.height - 1;
            let child = last.children[above(below) as usize % FANOUT];
            if child.is_none() && only_existing {
                return Ok(false);
            }
            self.open(child, below, above(below))?;
        }
    }

    /// Closes the last node of the path into its parent. On failure the path is as before.
    fn close<S: Sink<N::Error>>(&mut self, sink: &mut S) -> Result<(Option<Name>, bool), N::Error> {
        let level = self.path.last().expect("open until finished");
        if !level.dirty {
            self.path.pop();
            return Ok((None, false));
        }
        let empty = level.children.iter().all(Option::is_none);
        let name = if empty { None } else { Some(sink.put(&Node::new(level.height, &level.children), level.fresh)?) };
        let slot = level.number as usize % FANOUT;
        self.path.pop();
        if let Some(parent) = self.path.last_mut() {
            parent.children[slot] = name;
            parent.fresh |= u16::from(name.is_some()) << slot;
            parent.dirty = true;
        }
        Ok((name, true))
    }

    /// Closes the whole path.
    pub(crate) fn finish<S: Sink<N::Error>>(&mut self, sink: &mut S) -> Result<Updated, N::Error> {
        let mut root = (None, false);
        while !self.path.is_empty() {
            root = self.close(sink)?;
        }
        let (name, changed) = root;
        Ok(Updated { root: if changed { name } else { self.base.name }, changed: changed && name.is_some() })
    }

    /// Gives up: the children, with their heights, on which this update still holds a reference.
    pub(crate) fn abandon(&mut self) -> Vec<(Name, u8)> {
        let held = |level: &Level| {
            let height = level.height - 1;
            let (fresh, children) = (level.fresh, level.children);
            (0..FANOUT).filter(move |slot| fresh >> slot & 1 == 1).filter_map(move |s| children[s].map(|n| (n, height)))
        };
        let out = self.path.iter().flat_map(held).collect();
        self.path.clear();
        out
    }
}

#[cfg(test)]
mod tests;
