//! Blobs: arrays of bytes with numbered versions, written by many at once. BlobSeer's interface.
//!
//! ```text
//! head blob/NAME ── latest ──────► version n          the tree of its blocks
//!                ├─ history.00 ──► slots of versions 0 … n-1, each a subtree
//!                └─ log ─────────► a record of 64 bytes for each version
//! ```
//!
//! A version is numbered by its place in the order of publication: 0 is the blob as it was made, all zero or a clone,
//! and each write, append and resize publishes the next number. Every version can be read until it is deleted, at a
//! cost that does not depend on how many there are (`history`).
//!
//! **Many writers.** A writer takes the latest version, and makes of it, on its own and without a lock, the version
//! that it would become: blocks are hashed, compressed and stored, nodes are made. Then it asks for publication. Those
//! who ask at the same time are published together by one of them: their work is applied one after the other to the
//! newest version (`edit::rebase`: names move, bytes do not), each result is a version of its own, and one swap of the
//! head publishes all. Whoever publishes from elsewhere first makes the swap fail; then it is done again on the newer
//! version, which takes time with the paths changed and not with the bytes. A writer that stalls or dies has not asked
//! yet, or is not needed any more: nobody waits for it.
//!
//! What a write covers is what it covers in the version that it publishes: a later number wins, byte by byte. An append
//! starts at the end of the version before it.
//!
//! **Several blobs.** A snapshot of blobs is one head that names versions of them all as they were at one instant
//! (`snapshot`). Publications under several heads are not made atomic: it would take a transaction record that every
//! reader of a blob had to resolve, and what asks for it, the disks and memory of a machine, is one head already.

mod edit;
pub(crate) mod history;
mod publish;
mod snapshot;

pub use history::{Change, LogEntry, Origin};
pub(crate) use publish::Writers;
pub use snapshot::BlobSnapshot;

use crate::commit::{BlockSource, Changes, CommitStat};
use crate::engine::{Etag, Expect};
use crate::error::Error;
use crate::head::Manifest;
use crate::name::Version;
use crate::read::ReadStat;
use crate::store::Store;
use crate::transaction::Transaction;
use base::ByteRange;
use edit::{Slice, Work, Zeros};
use history::State;
use publish::Op;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// The heads of blobs.
pub(crate) const PREFIX: &str = "blob/";
/// No blob is larger, in bytes, so that its history has room for many versions.
pub const BLOB_BYTES_MAX: u64 = 1 << 50;

/// Which version of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// The one published last.
    Latest,
    /// The one of this number.
    Number(u64),
}

impl From<u64> for At {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

/// A blob of a store. Holds nothing open: cheap to make, and good until the blob is deleted.
pub struct Blob<'a> {
    store: &'a Store,
    name: String,
    id: String,
    block_size: u32,
}

impl fmt::Debug for Blob<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blob `{}`", self.name)
    }
}

/// What a blob's head says of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BlobInfo {
    /// Its name.
    pub name: String,
    /// The number of its latest version.
    pub latest: u64,
    /// The size of its latest version, in bytes.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u32,
    /// When it was created or cloned, in milliseconds since 1970.
    pub created_ms: u64,
    /// What it was cloned from.
    pub origin: Option<Origin>,
    /// Versions by tag.
    pub tags: BTreeMap<String, u64>,
}

/// The head of the blob `name`.
fn head(name: &str) -> String {
    format!("{PREFIX}{name}")
}

impl Store {
    /// Makes a blob of `size` zero bytes (at most [`BLOB_BYTES_MAX`]) in blocks of `block_size`: its version 0.
    ///
    /// # Errors
    /// There is one of that name ([`Error::HeadChanged`]); the name, the size or the block size cannot be.
    pub fn create_blob(&self, name: &str, size: u64, block_size: u32) -> Result<Blob<'_>, Error> {
        if !Version::block_size_is_valid(block_size) {
            return Err(Error::Invalid(format!(
                "blocks of {block_size} bytes cannot be: use a power of two from 512 bytes to 1 MiB"
            )));
        }
        check_size(size)?;
        let made = self.make_blobs(self.empty(size, block_size), None, &[name])?;
        made.into_iter().next().expect("a result for each name")
    }

    /// Makes blobs whose version 0 is `version`.
    fn make_blobs(
        &self,
        version: Version,
        origin: Option<&Origin>,
        names: &[&str],
    ) -> Result<Vec<Result<Blob<'_>, Error>>, Error> {
        let tx = self.begin();
        let mut heads = Vec::with_capacity(names.len());
        let mut blobs = Vec::with_capacity(names.len());
        for name in names {
            let mut state = State::new(self, name, version, origin.cloned())?;
            heads.push((head(name), Expect::Absent, state.manifest(&tx)?));
            blobs.push(Blob::of(self, name, &state));
        }
        let published = self.publish_all(heads);
        Ok(published.into_iter().zip(blobs).map(|(result, blob)| result.map(|_| blob)).collect())
    }

    /// Makes a blob whose version 0 is `version`, which something of this store holds; `origin` says which it was.
    ///
    /// # Errors
    /// There is one of that name ([`Error::HeadChanged`]); the version is not there, or the name cannot be.
    pub fn create_blob_of(&self, name: &str, version: Version, origin: Option<&Origin>) -> Result<Blob<'_>, Error> {
        let tx = self.begin();
        let made = self.make_blobs(tx.held(version)?, origin, &[name])?;
        made.into_iter().next().expect("a result for each name")
    }

    /// The blob of that name.
    ///
    /// # Errors
    /// There is none; its head cannot be read, or is corrupt.
    pub fn blob(&self, name: &str) -> Result<Blob<'_>, Error> {
        let (state, _) = self.blob_state(name)?;
        Ok(Blob::of(self, name, &state))
    }

    /// The names of all blobs, sorted.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn blobs(&self) -> Result<Vec<String>, Error> {
        Ok(self.heads(PREFIX)?.into_iter().map(|head| head[PREFIX.len()..].to_owned()).collect())
    }

    fn blob_state(&self, name: &str) -> Result<(State, Etag), Error> {
        let found = self.head(&head(name))?;
        let (manifest, etag) = found.ok_or_else(|| Error::NotFound { what: format!("blob `{name}`") })?;
        Ok((State::decode(name, &manifest)?, etag))
    }
}

/// Sizes of the versions that a head names, added up: of a blob that of the latest, for its history is slots.
pub(crate) fn logical_bytes(head: &str, manifest: &Manifest) -> u64 {
    let latest = manifest.versions.get(history::LATEST).filter(|_| head.starts_with(PREFIX));
    latest.map_or_else(|| manifest.versions.values().map(|version| version.size).sum(), |version| version.size)
}

/// Whether what `head` calls `called` serves versions that are not the latest: history and log of a blob.
pub(crate) fn is_past(head: &str, called: &str) -> bool {
    head.starts_with(PREFIX) && called != history::LATEST
}

fn check_size(size: u64) -> Result<(), Error> {
    if size <= BLOB_BYTES_MAX {
        return Ok(());
    }
    Err(Error::Invalid(format!("a blob of {size} bytes cannot be: it may have up to {BLOB_BYTES_MAX}")))
}

impl<'a> Blob<'a> {
    fn of(store: &'a Store, name: &str, state: &State) -> Self {
        let (name, id) = (name.to_owned(), state.id().to_owned());
        Self { store, name, id, block_size: state.latest().block_size }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in a block: the unit of identity; writes of whole blocks read nothing.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What the head says now, and its state; refuses another blob made later under this name.
    fn state(&self) -> Result<(State, Etag), Error> {
        let (state, etag) = self.store.blob_state(&self.name)?;
        if state.id() == self.id {
            return Ok((state, etag));
        }
        Err(Error::NotFound { what: format!("blob `{}`: it was deleted, and another made under its name", self.name) })
    }

    /// What there is to say of it.
    ///
    /// # Errors
    /// It was deleted; its head cannot be read.
    pub fn info(&self) -> Result<BlobInfo, Error> {
        let (state, _) = self.state()?;
        Ok(BlobInfo {
            name: self.name.clone(),
            latest: state.number(),
            size: state.latest().size,
            block_size: self.block_size,
            created_ms: state.created_ms(),
            origin: state.origin().cloned(),
            tags: state.tags().clone(),
        })
    }

    /// The number of the latest version, and the version.
    ///
    /// # Errors
    /// As [`Blob::info`].
    pub fn latest(&self) -> Result<(u64, Version), Error> {
        self.version(At::Latest)
    }

    /// A version by its number, with that number. It can be read through [`Store::read_at`] as long as it is not
    /// deleted.
    ///
    /// # Errors
    /// There is no such version, or it was deleted ([`Error::NotFound`]); or as [`Store::read_at`].
    pub fn version(&self, at: impl Into<At>) -> Result<(u64, Version), Error> {
        self.state()?.0.version(self.store, at.into())
    }

    /// Fills `buf` with the bytes of a version from `offset`.
    ///
    /// # Errors
    /// As [`Blob::version`] and [`Store::read_at`].
    pub fn read(&self, at: impl Into<At>, offset: u64, buf: &mut [u8]) -> Result<ReadStat, Error> {
        self.store.read_at(&self.version(at)?.1, offset, buf)
    }

    /// The log of the versions whose numbers lie in `range`, ascending, deleted ones included; numbers that are not
    /// there yet are left out.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self, range: Range<u64>) -> Result<Vec<LogEntry>, Error> {
        self.state()?.0.entries(self.store, range)
    }

    /// The runs of blocks that differ between two versions, ascending. Bytes beyond the end of the shorter one count
    /// as zero. Visits only what differs.
    ///
    /// # Errors
    /// As [`Blob::version`] and [`Store::diff`].
    pub fn diff(&self, a: impl Into<At>, b: impl Into<At>) -> Result<Vec<ByteRange>, Error> {
        let (state, _) = self.state()?;
        let (_, a) = state.version(self.store, a.into())?;
        let (_, b) = state.version(self.store, b.into())?;
        self.store.diff(&a, &b)
    }

    /// Adds bytes at the end, wherever that is when they are published.
    ///
    /// # Errors
    /// The blob was deleted or would be too large; the medium is full or fails. Nothing was published then.
    pub fn append(&self, bytes: &[u8]) -> Result<u64, Error> {
        let done = self.prepared(Change::Append, |tx, base| {
            let size = base.size.saturating_add(bytes.len() as u64);
            check_size(size)?;
            let ranges = vec![ByteRange::new(base.size, size)];
            let grown = tx.resized(&base, size)?;
            let (ours, stat) = tx.patch(&grown, &ranges, &Slice { at: base.size, bytes }, 1)?;
            Ok((Work { base, ours, ranges, append: true }, stat))
        });
        done.map(|(number, _)| number)
    }

    /// Writes bytes at `offset`, of any alignment, within the blob.
    ///
    /// # Errors
    /// They reach beyond the end, also of a blob that was cut meanwhile; or as [`Blob::append`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        let range = ByteRange::new(offset, offset.saturating_add(bytes.len() as u64));
        self.write_from(&[range], &Slice { at: offset, bytes }, 1).map(|(number, _)| number)
    }

    /// Writes the bytes of `ranges`, which ascend but may start and end anywhere, from `source`, in one version.
    /// Streams; `threads` threads may work on it.
    ///
    /// # Errors
    /// As [`Blob::write`]; or the source fails.
    pub fn write_from(
        &self,
        ranges: &[ByteRange],
        source: &dyn BlockSource,
        threads: usize,
    ) -> Result<(u64, CommitStat), Error> {
        self.prepared(Change::Write, |tx, base| {
            check_ranges(ranges, base.size)?;
            let (ours, stat) = tx.patch(&base, ranges, source, threads)?;
            Ok((Work { base, ours, ranges: ranges.to_vec(), append: false }, stat))
        })
    }

    /// Makes bytes zero; blocks that are zero take no space.
    ///
    /// # Errors
    /// As [`Blob::write`].
    pub fn zero(&self, range: ByteRange) -> Result<u64, Error> {
        let done = self.prepared(Change::Write, |tx, base| {
            check_ranges(&[range], base.size)?;
            let unit = u64::from(base.block_size);
            let end = if range.end == base.size { range.end } else { range.end / unit * unit };
            let whole = range.start.next_multiple_of(unit)..end;
            if whole.is_empty() {
                let (ours, stat) = tx.patch(&base, &[range], &Zeros, 1)?;
                return Ok((Work { base, ours, ranges: vec![range], append: false }, stat));
            }
            let edges = [ByteRange::new(range.start, whole.start), ByteRange::new(whole.end, range.end)];
            let edges: Vec<ByteRange> = edges.into_iter().filter(|edge| !edge.is_empty()).collect();
            let (tidy, _) = tx.patch(&base, &edges, &Zeros, 1)?;
            let zeroed = [ByteRange::new(whole.start, whole.end)];
            let (written, threads, progress, cancel) = (&[], 1, None, None);
            let changes = Changes { written, zeroed: &zeroed, source: &Zeros, threads, progress, cancel };
            let (ours, stat) = tx.commit(&tidy, &changes)?;
            Ok((Work { base, ours, ranges: vec![range], append: false }, stat))
        });
        done.map(|(number, _)| number)
    }

    /// Publishes changes of whole blocks of the latest version, written and zeroed, as one version. Streams.
    ///
    /// # Errors
    /// As [`Transaction::commit`] and [`Blob::write`].
    pub fn commit(&self, changes: &Changes<'_>) -> Result<(u64, CommitStat), Error> {
        self.prepared(Change::Write, |tx, base| {
            let (ours, stat) = tx.commit(&base, changes)?;
            Ok((Work { base, ours, ranges: touched(changes), append: false }, stat))
        })
    }

    /// Publishes changes of whole blocks of version `onto` as the version behind it: nothing is merged with what
    /// others published. The number and the version.
    ///
    /// # Errors
    /// `onto` is not the latest, or no longer when this would be published ([`Error::HeadChanged`]); or as
    /// [`Blob::commit`].
    pub fn commit_onto(&self, onto: u64, changes: &Changes<'_>) -> Result<(u64, Version), Error> {
        self.store.writable("write to a blob")?;
        let tx = self.store.begin();
        let work = self.attempt(|state, tx_base| {
            if state.number() != onto {
                return Err(self.moved_on());
            }
            let base = tx_base(&tx)?;
            let (ours, _) = tx.commit(&base, changes)?;
            Ok(Work { base, ours, ranges: touched(changes), append: false })
        })?;
        let ours = work.ours;
        let number = self.submit(&tx, Op::Follow { work, parent: onto })?;
        Ok((number, ours))
    }

    fn moved_on(&self) -> Error {
        Error::HeadChanged { head: head(&self.name), found: "another version was published behind that one" }
    }

    /// Cuts it, or makes it grow with zeros, in a new version.
    ///
    /// # Errors
    /// As [`Blob::append`].
    pub fn resize(&self, size: u64) -> Result<u64, Error> {
        check_size(size)?;
        self.submit(&self.store.begin(), Op::Resize(size))
    }

    /// Makes a blob that begins with a version of this one as its version 0: a head and nothing else.
    ///
    /// # Errors
    /// There is a blob of that name ([`Error::HeadChanged`]); or as [`Blob::version`].
    pub fn clone(&self, at: impl Into<At>, name: &str) -> Result<Blob<'a>, Error> {
        let made = self.clone_each(at, &[name])?;
        made.into_iter().next().expect("a result for each name")
    }

    /// Makes many clones of one version: as [`Blob::clone`], in less time. As many results as names.
    ///
    /// # Errors
    /// There is no such version; nothing was made then.
    pub fn clone_each(&self, at: impl Into<At>, names: &[&str]) -> Result<Vec<Result<Blob<'a>, Error>>, Error> {
        let at = at.into();
        let tx = self.store.begin();
        let (number, version) = self.attempt(|state, _| {
            let (number, version) = state.version(self.store, at)?;
            Ok((number, tx.held(version)?))
        })?;
        let origin = Origin { blob: self.name.clone(), number };
        self.store.make_blobs(version, Some(&origin), names)
    }

    /// Gives a version a name of its own, and keeps it from being deleted. A tag that stood for another version stands
    /// for this one from now on. Tags are named as heads are.
    ///
    /// # Errors
    /// As [`Blob::version`]; the name cannot be; there are too many.
    pub fn tag(&self, number: u64, tag: &str) -> Result<u64, Error> {
        self.submit(&self.store.begin(), Op::Tag(number, tag.to_owned()))
    }

    /// Removes a tag; the number it stood for.
    ///
    /// # Errors
    /// There is no such tag; the medium fails.
    pub fn untag(&self, tag: &str) -> Result<u64, Error> {
        self.submit(&self.store.begin(), Op::Untag(tag.to_owned()))
    }

    /// Deletes a version; its number is not used again, and what only it reached goes with the next collection.
    ///
    /// # Errors
    /// It is the latest, tagged, or not there (any more).
    pub fn delete_version(&self, number: u64) -> Result<u64, Error> {
        self.submit(&self.store.begin(), Op::Delete(number))
    }

    /// Deletes the blob with all its versions. Clones and snapshots keep what is theirs.
    ///
    /// # Errors
    /// It was deleted before; the medium fails.
    pub fn delete(self) -> Result<(), Error> {
        self.state()?;
        if self.store.delete_head(&head(&self.name))? {
            return Ok(());
        }
        Err(Error::NotFound { what: format!("blob `{}`", self.name) })
    }

    /// Has `make` make something of the latest version, then publishes that.
    fn prepared(
        &self,
        change: Change,
        make: impl Fn(&Transaction<'_>, Version) -> Result<(Work, CommitStat), Error>,
    ) -> Result<(u64, CommitStat), Error> {
        self.store.writable("write to a blob")?;
        let tx = self.store.begin();
        let (parent, work, stat) = self.attempt(|state, tx_base| {
            let base = tx_base(&tx)?;
            let (work, stat) = make(&tx, base)?;
            Ok((state.number(), work, stat))
        })?;
        let number = self.submit(&tx, Op::Apply { work, parent, change })?;
        Ok((number, stat))
    }

    /// Does `work` with the blob's state, again when what it read was deleted and collected under its eyes.
    fn attempt<T>(
        &self,
        work: impl Fn(&State, &dyn Fn(&Transaction<'_>) -> Result<Version, Error>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut seen = None;
        loop {
            let (state, etag) = self.state()?;
            let hold_latest = |tx: &Transaction<'_>| tx.held(state.latest());
            match work(&state, &hold_latest) {
                Err(Error::Unknown { .. }) if seen.as_ref() != Some(&etag) => seen = Some(etag),
                done => return done,
            }
        }
    }
}

/// The ranges that changes touch, ascending and joined.
fn touched(changes: &Changes<'_>) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = [changes.written, changes.zeroed].concat();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        last.end = if joins { last.end.max(next.end) } else { last.end };
        joins
    });
    ranges
}

/// Refuses ranges that do not ascend within a blob of `size` bytes.
fn check_ranges(ranges: &[ByteRange], size: u64) -> Result<(), Error> {
    let mut next = 0;
    for range in ranges {
        if range.end > size {
            return Err(Error::OutOfRange { offset: range.start, len: range.len(), size });
        }
        if range.start < next {
            return Err(Error::Invalid(format!(
                "the range {:#x}..{:#x} does not follow those before it",
                range.start, range.end
            )));
        }
        next = range.end;
    }
    Ok(())
}
