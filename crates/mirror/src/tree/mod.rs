//! What the mirror knows of the tree of blobs: which inode is what, which handles are open, which versions have local
//! changes, and what is asked of the daemon.
//!
//! ```text
//! /blob/<name>/<number>    a version; with local changes once it was opened for writing: a mirrored file
//! /blob/<name>/latest      a link to the latest version; so with each tag
//! ```
//!
//! A `/` in a blob's name is written `%2F`, so that the tree has two levels and no name of a blob meets a number.
//!
//! **Mirrored files** (the seed's word for what lies below one path of one node) are disks: an overlay over the
//! version, made when somebody first opens the path for writing. All who open the path afterwards meet it, readers
//! too; who had it open for reading before sees the version on. COMMIT makes what was written the next version of the
//! blob, and the file is then found under that version's number; CLONE makes it a file of a new blob.
//!
//! The seed's rules of mirroring, and what became of them. *A read that misses brings whole chunks*: it brings whole
//! blocks, and the store decompresses them by frames. *A write fills the gap before it, so that a chunk is local up to
//! one point*: there the rule bounds what must be remembered of a chunk of 256 KiB. Here a block of the blob (4 KiB,
//! unless it was made otherwise) is the chunk, it is local as a whole or not at all, and its state is one byte: a write
//! of whole blocks fetches nothing, one of a part fetches that block. Nothing is lost by a death: the state of blocks
//! is written with each write, where the seed wrote its own on close.
//!
//! **Opening to read needs no daemon; opening to write, COMMIT and CLONE do**, because only the daemon writes the
//! store. They wait at the [`Desk`], not in a worker, until the daemon has fetched and answered them.
//!
//! Nodes and handles are on record in `<live>/tree.log`, a line for each change, so that a mirror that takes over
//! serves them. An open version is kept in the store by the daemon: before it deletes one it *bars* it here, so that
//! nobody opens it any more, and pins those that are open.

mod desk;
mod record;
mod serve;

pub(crate) use desk::{Asker, Desk, For};

use crate::control::{FilePlace, OpenVersion, Opens};
use crate::home::{Home, read_json_or_default, replace_json};
use record::{Entry, Record};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Mutex;

/// Inodes of the tree begin here; ids of objects stay below.
pub(crate) const FIRST: u64 = 1 << 62;

/// What an inode of the tree is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Node {
    /// A blob: a directory.
    Blob(String),
    /// A link to a version.
    Link { blob: String, name: String },
    /// A version: a file.
    Version(VersionNode),
}

/// A version, as an inode stands for it: another blob made later under the name has other inodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct VersionNode {
    pub(crate) blob: String,
    pub(crate) number: u64,
    /// In text.
    pub(crate) version: String,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) time_ms: u64,
}

/// What a handle leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// The version of this inode, as it is in the store.
    Version(u64),
    /// A mirrored file.
    Overlay(u64),
}

/// The tree.
pub(crate) struct Tree {
    home: Home,
    state: Mutex<State>,
    pub(crate) desk: Desk,
}

struct State {
    record: Record,
    nodes: HashMap<u64, Known>,
    ids: HashMap<Node, u64>,
    next: u64,
    handles: HashMap<u64, Target>,
    files: HashMap<(String, u64), u64>,
    /// Versions about to be deleted; no number: the whole blob.
    barred: HashSet<(String, Option<u64>)>,
}

struct Known {
    node: Node,
    /// How often the kernel looked it up and did not forget it. Of those that an earlier mirror handed out this is not
    /// known: they stay.
    lookups: u64,
}

/// How an opening went.
pub(crate) enum Opened {
    /// The handle is good.
    Done,
    /// There is no mirrored file yet, and one is needed.
    Needs(VersionNode),
    /// It is no version, or one about to be deleted.
    Gone,
}

impl Tree {
    /// Recalls what an earlier mirror of this session knew; of another session nothing is of use.
    pub(crate) fn open(home: Home, taken_over: bool) -> io::Result<Self> {
        let mut nodes: HashMap<u64, Known> = HashMap::new();
        let mut handles = HashMap::new();
        let path = home.live().join("tree.log");
        let entries = if taken_over { Record::read(&path)? } else { Vec::new() };
        for entry in entries {
            match entry {
                Entry::Node { id, node } => drop(nodes.insert(id, Known { node, lookups: u64::MAX / 2 })),
                Entry::Forget { id } => drop(nodes.remove(&id)),
                Entry::Open { handle, target } => drop(handles.insert(handle, target)),
                Entry::Close { handle } => drop(handles.remove(&handle)),
            }
        }
        let ids = nodes.iter().map(|(&id, known)| (known.node.clone(), id)).collect();
        let next = nodes.keys().max().map_or(Some(FIRST), |last| last.checked_add(1));
        let next = next.ok_or_else(|| io::Error::other(format!("{}: no inode has the last number", path.display())))?;
        let record = Record::create(path, &kept(&nodes, &handles))?;
        let places: Vec<FilePlace> = read_json_or_default(&home.live().join("files.json"))?;
        let files = places.into_iter().map(|p| ((p.blob, p.number), p.overlay)).collect();
        let barred = HashSet::new();
        let state = Mutex::new(State { record, nodes, ids, next, handles, files, barred });
        Ok(Self { home, state, desk: Desk::default() })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// The inode of `node`, which the kernel is about to be told.
    pub(crate) fn enter(&self, node: Node) -> io::Result<u64> {
        let mut state = self.state();
        if let Some(&id) = state.ids.get(&node) {
            let known = state.nodes.get_mut(&id).expect("both tables have it");
            known.lookups = known.lookups.saturating_add(1);
            return Ok(id);
        }
        let id = state.next;
        state.note(&Entry::Node { id, node: node.clone() })?;
        state.next += 1;
        state.ids.insert(node.clone(), id);
        state.nodes.insert(id, Known { node, lookups: 1 });
        Ok(id)
    }

    /// What an inode is.
    pub(crate) fn node(&self, id: u64) -> Option<Node> {
        self.state().nodes.get(&id).map(|known| known.node.clone())
    }

    /// The version of an inode.
    pub(crate) fn version(&self, id: u64) -> Option<VersionNode> {
        match self.state().nodes.get(&id).map(|known| &known.node) {
            Some(Node::Version(version)) => Some(version.clone()),
            _ => None,
        }
    }

    /// The kernel has forgotten an inode `times` times.
    pub(crate) fn forget(&self, id: u64, times: u64) {
        let mut state = self.state();
        let Some(known) = state.nodes.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(times);
        if known.lookups > 0 {
            return;
        }
        if state.note(&Entry::Forget { id }).is_ok() {
            let known = state.nodes.remove(&id).expect("found above");
            state.ids.remove(&known.node);
        }
    }

    /// Opens an inode as `handle`, where that needs nobody else. Asked again, it does the same again.
    pub(crate) fn open_as(&self, handle: u64, id: u64, write: bool) -> io::Result<Opened> {
        let mut state = self.state();
        let Some(Known { node: Node::Version(version), .. }) = state.nodes.get(&id) else { return Ok(Opened::Gone) };
        let place = (version.blob.clone(), version.number);
        if state.barred.contains(&(place.0.clone(), None)) || state.barred.contains(&(place.0.clone(), Some(place.1))) {
            return Ok(Opened::Gone);
        }
        let target = match state.files.get(&place) {
            Some(&overlay) => Target::Overlay(overlay),
            None if write => return Ok(Opened::Needs(version.clone())),
            None => Target::Version(id),
        };
        state.open(handle, target)?;
        Ok(Opened::Done)
    }

    /// Opens a mirrored file as `handle`; false: it is no longer one.
    pub(crate) fn open_file(&self, handle: u64, overlay: u64) -> io::Result<bool> {
        let mut state = self.state();
        if !state.files.values().any(|&o| o == overlay) {
            return Ok(false);
        }
        state.open(handle, Target::Overlay(overlay)).map(|()| true)
    }

    /// Where a handle leads.
    pub(crate) fn target(&self, handle: u64) -> Option<Target> {
        self.state().handles.get(&handle).copied()
    }

    /// A handle is closed.
    pub(crate) fn close(&self, handle: u64) {
        let mut state = self.state();
        if state.handles.remove(&handle).is_some()
            && let Err(e) = state.note(&Entry::Close { handle })
        {
            log::warn!("handle {handle:x} stays on record though it is closed: {e}");
        }
    }

    /// From now on these are the mirrored files.
    pub(crate) fn set_files(&self, places: Vec<FilePlace>) -> io::Result<()> {
        let mut state = self.state();
        self.write_files(&places)?;
        state.files = places.into_iter().map(|p| ((p.blob, p.number), p.overlay)).collect();
        Ok(())
    }

    fn write_files(&self, places: &[FilePlace]) -> io::Result<()> {
        replace_json(&self.home.live().join("files.json"), &places)
    }

    /// What is open: versions as they are in the store, and mirrored files with how often.
    pub(crate) fn opens(&self) -> Opens {
        let state = self.state();
        let mut opens = Opens::default();
        let mut overlays: BTreeMap<u64, u64> = BTreeMap::new();
        let mut versions: BTreeMap<u64, OpenVersion> = BTreeMap::new();
        for target in state.handles.values() {
            match target {
                Target::Overlay(overlay) => *overlays.entry(*overlay).or_default() += 1,
                Target::Version(id) => {
                    if let Some(Known { node: Node::Version(v), .. }) = state.nodes.get(id) {
                        let (blob, number, version) = (v.blob.clone(), v.number, v.version.clone());
                        versions.insert(*id, OpenVersion { node: *id, blob, number, version });
                    }
                }
            }
        }
        opens.overlays = overlays.into_iter().collect();
        opens.versions = versions.into_values().collect();
        opens
    }

    /// Lets nobody open a version, or any of a blob, any more; what is open now.
    pub(crate) fn bar(&self, blob: &str, number: Option<u64>) -> Opens {
        self.state().barred.insert((blob.to_owned(), number));
        self.opens()
    }

    /// Lifts one bar, or all.
    pub(crate) fn lift(&self, bar: Option<(String, Option<u64>)>) {
        let mut state = self.state();
        match bar {
            Some(bar) => drop(state.barred.remove(&bar)),
            None => state.barred.clear(),
        }
    }

    /// Withdraws a mirrored file that nobody has open, and which `unchanged` finds of no use; whether that was so. The
    /// daemon removes its overlay then, so that a mirror that takes over must not find it either.
    pub(crate) fn retire(&self, overlay: u64, unchanged: impl FnOnce() -> bool) -> io::Result<bool> {
        let mut state = self.state();
        if state.handles.values().any(|t| *t == Target::Overlay(overlay)) || !unchanged() {
            return Ok(false);
        }
        if state.files.values().any(|&o| o == overlay) {
            let place = |((blob, number), &overlay): (&(String, u64), &u64)| FilePlace {
                overlay,
                blob: blob.clone(),
                number: *number,
            };
            let left: Vec<FilePlace> = state.files.iter().filter(|(_, o)| **o != overlay).map(place).collect();
            self.write_files(&left)?;
            state.files.retain(|_, o| *o != overlay);
        }
        Ok(true)
    }
}

impl State {
    fn open(&mut self, handle: u64, target: Target) -> io::Result<()> {
        if self.handles.get(&handle) != Some(&target) {
            self.note(&Entry::Open { handle, target })?;
            self.handles.insert(handle, target);
        }
        Ok(())
    }

    /// Writes down a change, before it is made.
    fn note(&mut self, entry: &Entry) -> io::Result<()> {
        if self.record.is_long(self.nodes.len() + self.handles.len()) {
            self.record.rewrite(&kept(&self.nodes, &self.handles))?;
        }
        self.record.append(entry)
    }
}

/// All that is, as entries.
fn kept(nodes: &HashMap<u64, Known>, handles: &HashMap<u64, Target>) -> Vec<Entry> {
    let nodes = nodes.iter().map(|(&id, known)| Entry::Node { id, node: known.node.clone() });
    let handles = handles.iter().map(|(&handle, &target)| Entry::Open { handle, target });
    nodes.chain(handles).collect()
}

/// A blob's name as a directory's.
pub(crate) fn directory_of(blob: &str) -> String {
    blob.replace('/', "%2F")
}

/// The blob whose directory this is; none: no blob has such a one.
pub(crate) fn blob_of(directory: &str) -> Option<String> {
    let name = directory.replace("%2F", "/");
    (!name.contains('%') && directory_of(&name) == directory).then_some(name)
}

#[cfg(test)]
mod tests;
