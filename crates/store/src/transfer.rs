//! Moving a head from one store to another: `push` and `pull` are the same thing, seen from either end.
//!
//! Two stores have different keys, so the names of one mean nothing in the other: blocks are read, checked against
//! the source's names, named anew, looked up in the destination, and stored only where it lacks them.
//!
//! Beside each head it brought, the destination keeps a **note** (`.origin/<head>`): which store it came from, and
//! for each blob the source's root beside the destination's version. A later transfer of the same lineage finds it
//! and reads only what differs between the two. A note is a hint and no root: it counts only while the head beside
//! it still has the versions it names, and losing it costs time and nothing else.
//!
//! A transfer that is killed leaves the packs that it filled, each 64 MiB, with their indexes. The next attempt
//! reads and names everything again, and sends only what is not in them.

use crate::commit::{BlockSource, Changes, CommitStat};
use crate::engine::Expect;
use crate::error::Error;
use crate::head::{self, Manifest};
use crate::name::Version;
use crate::store::Store;
use base::ByteRange;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicBool;

/// Where notes are, among the heads.
const NOTES: &str = ".origin/";
/// Notes read in search of one that fits.
const NOTES_MAX: usize = 64;

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The blob that is being sent.
    pub blob: &'a str,
    /// Bytes of it that were read, named and sent where needed.
    pub done_bytes: u64,
    /// Bytes of it that have to be read.
    pub total_bytes: u64,
}

/// Makes the description of a head that arrives: what [`Manifest::meta`] is to be.
pub type Describe<'a> = dyn Fn(&Manifest) -> Result<String, Error> + Sync + 'a;

/// How to transfer.
pub struct Options<'a> {
    /// The state the destination's head must be in.
    pub expect: Expect,
    /// Threads that read, name and compress; each holds 4 MiB at most, up to 16 MiB in all.
    pub threads: usize,
    /// Heads of the destination that are likely to have much in common with the one that comes.
    pub bases: &'a [String],
    /// Makes the description of the head that arrives out of that of the head that was sent, and its versions as they
    /// are called here. The same where absent.
    pub describe: Option<&'a Describe<'a>>,
    /// By blob: numbers of the blocks that are likely to be read first. They are laid down in this order.
    pub order: BTreeMap<String, Vec<u64>>,
    /// Told after every few MiB.
    pub progress: Option<&'a (dyn Fn(Progress<'_>) + Sync)>,
    /// Looked at all the time: stops the transfer. What was sent by then shortens the next attempt.
    pub cancel: Option<&'a AtomicBool>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            expect: Expect::Any,
            threads: 8,
            bases: &[],
            describe: None,
            order: BTreeMap::new(),
            progress: None,
            cancel: None,
        }
    }
}

/// What a transfer did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Transferred {
    /// Blocks read from the source.
    pub blocks_read: u64,
    /// Blocks that the destination lacked.
    pub blocks_sent: u64,
    /// Bytes that the destination's packs grew by.
    pub stored_bytes: u64,
    /// The head of the destination that a blob was compared with, by blob.
    pub based_on: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    /// The source's [`Store::id`].
    store: String,
    blobs: BTreeMap<String, Pair>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Pair {
    source: Version,
    here: Version,
}

/// A version as a source of blocks, each checked against its name.
struct Source<'a> {
    store: &'a Store,
    version: Version,
}

impl BlockSource for Source<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(&self.version, offset, buf).map(|_| ()).map_err(io::Error::other)
    }
}

/// Brings `head` of `from` to `to`, where it is called `to_head`.
///
/// # Errors
/// There is no such head; something of it cannot be read; `to` cannot be written, is full, or its head is not as
/// expected; the caller cancelled. Nothing is published then.
pub fn transfer(
    from: &Store,
    head: &str,
    to: &Store,
    to_head: &str,
    options: &Options<'_>,
) -> Result<Transferred, Error> {
    to.writable("transfer a head to it")?;
    head::check_name(to_head)?;
    let (manifest, _) = from.head(head)?.ok_or_else(|| {
        Error::Invalid(format!("there is no head `{head}` in {}; list its heads", from.engine.describe()))
    })?;
    let source_id = from.id();
    let notes = read_notes(to, to_head, &source_id, options.bases)?;
    let mut done = Transferred::default();
    let mut note = Note { store: source_id, blobs: BTreeMap::new() };
    let mut arrived = Manifest { versions: BTreeMap::new(), meta: manifest.meta.clone() };
    let tx = to.begin();
    tx.seal_when_full();
    for (blob, version) in &manifest.versions {
        let base = notes.iter().find_map(|(head, note)| {
            let pair = note.blobs.get(blob).filter(|pair| fits(pair, version))?;
            // The source may have forgotten what it once sent.
            let ranges = from.diff(&pair.source, version).ok()?;
            Some((head, pair.here, ranges))
        });
        let (base, ranges) = match base {
            Some((head, here, ranges)) => {
                done.based_on.insert(blob.clone(), head.clone());
                (here, ranges)
            }
            None => (to.empty(version.size, version.block_size), from.data_ranges(version)?),
        };
        let (here, stat) = copy(&tx, from, blob, version, &base, &ranges, options)?;
        done.blocks_read += stat.blocks;
        done.blocks_sent += stat.stored;
        done.stored_bytes += stat.stored_bytes;
        note.blobs.insert(blob.clone(), Pair { source: *version, here });
        arrived.versions.insert(blob.clone(), here);
    }
    if let Some(describe) = options.describe {
        arrived.meta = describe(&arrived)?;
    }
    tx.publish(to_head, options.expect.clone(), &arrived)?;
    if let Err(error) = write_note(to, to_head, &note) {
        log::warn!("cannot note where `{to_head}` came from; the next transfer will read all of it: {error}");
    }
    Ok(done)
}

/// Whether a version can be made from a pair by changing blocks.
fn fits(pair: &Pair, version: &Version) -> bool {
    [pair.source, pair.here].iter().all(|v| (v.size, v.block_size) == (version.size, version.block_size))
}

fn copy(
    tx: &crate::Transaction<'_>,
    from: &Store,
    blob: &str,
    version: &Version,
    base: &Version,
    ranges: &[ByteRange],
    options: &Options<'_>,
) -> Result<(Version, CommitStat), Error> {
    let tell = |done_bytes, total_bytes| {
        if let Some(progress) = options.progress {
            progress(Progress { blob, done_bytes, total_bytes });
        }
    };
    let changes = Changes {
        written: ranges,
        zeroed: &[],
        source: &Source { store: from, version: *version },
        threads: options.threads.max(1),
        progress: Some(&tell),
        cancel: options.cancel,
    };
    tx.commit_in_order(base, &changes, options.order.get(blob).map_or(&[], Vec::as_slice))
}

fn note_name(head: &str) -> String {
    format!("{NOTES}{head}")
}

fn write_note(to: &Store, head: &str, note: &Note) -> Result<(), Error> {
    let name = note_name(head);
    let meta = serde_json::to_string(note).expect("strings and versions always serialize");
    let bytes = Manifest { versions: BTreeMap::new(), meta }.encode(&name, &to.keys);
    let written = to.engine.swap_head(&name, &Expect::Any, &bytes);
    written.map(|_| ()).map_err(|error| Error::io("write", name, error))
}

/// Notes on what came from that store and is still there, the likeliest first.
fn read_notes(to: &Store, to_head: &str, source_id: &str, bases: &[String]) -> Result<Vec<(String, Note)>, Error> {
    let names = to.engine.heads().map_err(|error| Error::io("list", "heads", error))?;
    let mut heads: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix(NOTES)).collect();
    let rank = |head: &str| match bases.iter().position(|base| base == head) {
        _ if head == to_head => 0,
        Some(place) => 1 + place,
        None => usize::MAX,
    };
    // Of the others those with the last names: series are often numbered or dated.
    heads.sort_unstable_by(|a, b| (rank(a), *b).cmp(&(rank(b), *a)));
    let mut found = Vec::new();
    for head in heads.into_iter().take(NOTES_MAX) {
        let Some(note) = read_note(to, head)? else { continue };
        let current = to.head(head)?.map(|(manifest, _)| manifest.versions);
        let stands = |versions: &BTreeMap<String, Version>| {
            note.blobs.iter().all(|(blob, pair)| versions.get(blob) == Some(&pair.here))
        };
        match current {
            Some(versions) if note.store == source_id && stands(&versions) => found.push((head.to_owned(), note)),
            Some(_) => {}
            None => {
                let name = note_name(head);
                to.engine.remove_head(&name).map_err(|error| Error::io("remove", name, error))?;
            }
        }
    }
    Ok(found)
}

/// A note that cannot be read is none.
fn read_note(to: &Store, head: &str) -> Result<Option<Note>, Error> {
    let name = note_name(head);
    let found = to.engine.head(&name).map_err(|error| Error::io("read", name.clone(), error))?;
    let Some((bytes, _)) = found else { return Ok(None) };
    let manifest = Manifest::decode(&bytes, &name, &to.keys).ok();
    Ok(manifest.and_then(|manifest| serde_json::from_str(&manifest.meta).ok()))
}
