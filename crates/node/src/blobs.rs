//! Blobs, as the daemon offers them. The store does the work; here names become versions and errors get their kind.

use crate::error::{Error, Result};
use crate::node::Node;
use crate::{mirrored, sweep};
use api::{Blob, BlobChanged, BlobClone, BlobCreate, BlobDiff, BlobSnapshot, BlobSnapshotRequest, BlobVersion};
use base::ByteRange;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, UNIX_EPOCH};
use store::BlockSource;
use store::blob::{At, BlobInfo};

/// Block size of a blob that asks for none.
const BLOCK: u32 = 4096;

/// A version of a blob that somebody named.
pub struct Named {
    /// Name of the blob.
    pub blob: String,
    /// Number of the version.
    pub number: u64,
    /// Its size.
    pub size: u64,
    /// The version.
    pub version: store::Version,
}

impl Node {
    fn blob(&self, name: &str) -> Result<store::blob::Blob<'_>> {
        match self.shared.store.blob(name) {
            Err(store::Error::NotFound { .. }) => Err(absent(name)),
            other => Ok(other?),
        }
    }

    /// The blobs, by name.
    ///
    /// # Errors
    /// Where one is damaged.
    pub fn blobs(&self) -> Result<Vec<Blob>> {
        self.shared.store.blobs()?.iter().map(|name| self.blob_info(name)).collect()
    }

    /// One blob.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn blob_info(&self, name: &str) -> Result<Blob> {
        Ok(listed(self.blob(name)?.info()?))
    }

    /// Makes a blob of zeros.
    ///
    /// # Errors
    /// Where the name is taken or cannot be, or the sizes make no sense.
    pub fn create_blob(&self, request: &BlobCreate) -> Result<Blob> {
        let block = request.block_bytes.unwrap_or(BLOCK);
        let made = self.shared.store.create_blob(&request.name, request.size_bytes, block);
        Ok(listed(taken(made, &request.name)?.info()?))
    }

    /// Deletes a blob and all its versions.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn delete_blob(&self, name: &str) -> Result<()> {
        mirrored::deleting(&self.shared, name, None, || Ok(self.blob(name)?.delete()?))?;
        sweep::sweep(&self.shared)
    }

    /// The version that `text` names: `NAME`, `NAME@NUMBER` or `NAME@TAG`. What is before the last `@` counts as the
    /// name only where no blob is named by the whole.
    ///
    /// # Errors
    /// Where there is no such blob or version.
    pub fn blob_version(&self, text: &str) -> Result<Named> {
        let (blob, version) = match (self.blob(text), text.rsplit_once('@')) {
            (Ok(blob), _) => (blob, None),
            (Err(_), Some((name, version))) => (self.blob(name)?, Some(version)),
            (Err(error), None) => return Err(error),
        };
        let at = match version {
            None => At::Latest,
            Some(version) => self.at(&blob, version)?,
        };
        let (number, found) = blob.version(at)?;
        Ok(Named { blob: blob.name().to_owned(), number, size: found.size, version: found })
    }

    fn at(&self, blob: &store::blob::Blob<'_>, version: &str) -> Result<At> {
        if let Ok(number) = version.parse() {
            return Ok(At::Number(number));
        }
        match blob.info()?.tags.get(version) {
            Some(&number) => Ok(At::Number(number)),
            None => Err(Error::NotFound(format!(
                "{} has no version tagged {version}; `offshoot blob info {}` shows its tags",
                blob.name(),
                blob.name()
            ))),
        }
    }

    /// Versions with numbers in `range`, oldest first.
    ///
    /// # Errors
    /// Where there is no such blob.
    pub fn blob_log(&self, name: &str, range: std::ops::Range<u64>) -> Result<Vec<BlobVersion>> {
        let entries = self.blob(name)?.log(range)?;
        let line = |e: store::blob::LogEntry| BlobVersion {
            number: e.number,
            time: time(e.time_ms),
            size_bytes: e.size,
            parent: e.parent,
            change: serde_json::to_value(e.change).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default(),
            bytes: e.bytes,
            deleted: e.deleted,
        };
        Ok(entries.into_iter().map(line).collect())
    }

    /// What differs between two versions of a blob.
    ///
    /// # Errors
    /// Where there is no such blob or version.
    pub fn blob_diff(&self, name: &str, from: &str, to: &str) -> Result<BlobDiff> {
        let blob = self.blob(name)?;
        let number = |text: &str| -> Result<u64> { Ok(blob.version(self.at(&blob, text)?)?.0) };
        let (a, b) = (number(from)?, number(to)?);
        let ranges = blob.diff(a, b)?;
        Ok(BlobDiff {
            versions: [a, b].map(|n| format!("{name}@{n}")),
            bytes: ranges.iter().map(ByteRange::len).sum(),
            ranges: ranges.iter().map(|r| (r.start, r.end)).collect(),
        })
    }

    /// Reads bytes of a version.
    ///
    /// # Errors
    /// Where it is not there any more, or damaged.
    pub fn read_blob(&self, named: &Named, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blob(&named.blob)?.read(named.number, offset, buffer)?;
        Ok(())
    }

    /// Writes the first `bytes` of `file` into a blob at `offset`, or at its end where none is given; as one version.
    ///
    /// # Errors
    /// Where there is no such blob, they reach beyond its end, or the host is full.
    pub fn write_blob(&self, name: &str, offset: Option<u64>, file: &File, bytes: u64) -> Result<BlobChanged> {
        let blob = self.blob(name)?;
        let number = match offset {
            Some(offset) => {
                let source = Spooled { file, at: offset };
                blob.write_from(&[ByteRange::new(offset, offset.saturating_add(bytes))], &source, 2)?.0
            }
            None => {
                let mut data = vec![0; usize::try_from(bytes).map_err(|_| Error::Invalid("too much at once".into()))?];
                file.read_exact_at(&mut data, 0).map_err(Error::io("read", "what came to be appended"))?;
                blob.append(&data)?
            }
        };
        self.committer.note_commit();
        Ok(BlobChanged { number, bytes })
    }

    /// Makes a range of a blob zero.
    ///
    /// # Errors
    /// Where there is no such blob, or the range reaches beyond its end.
    pub fn zero_blob(&self, name: &str, range: ByteRange) -> Result<BlobChanged> {
        let number = self.blob(name)?.zero(range)?;
        self.committer.note_commit();
        Ok(BlobChanged { number, bytes: range.len() })
    }

    /// Cuts a blob, or makes it grow with zeros.
    ///
    /// # Errors
    /// Where there is no such blob, or the size cannot be.
    pub fn resize_blob(&self, name: &str, size: u64) -> Result<BlobChanged> {
        let blob = self.blob(name)?;
        let before = blob.latest()?.1.size;
        let number = blob.resize(size)?;
        self.committer.note_commit();
        Ok(BlobChanged { number, bytes: before.abs_diff(size) })
    }

    /// Makes clones of a version.
    ///
    /// # Errors
    /// Where there is no such version, or a name is taken: the clones before it are made then, and said to be.
    pub fn clone_blob(&self, name: &str, request: &BlobClone) -> Result<Vec<Blob>> {
        let blob = self.blob(name)?;
        let at = request.version.as_deref().map_or(Ok(At::Latest), |version| self.at(&blob, version))?;
        let names: Vec<&str> = request.names.iter().map(String::as_str).collect();
        if names.is_empty() {
            return Err(Error::Invalid("a clone needs a name".into()));
        }
        let (mut made, mut failed) = (Vec::new(), Vec::new());
        for (name, clone) in names.iter().zip(blob.clone_each(at, &names)?) {
            match taken(clone, name) {
                Ok(clone) => made.push(listed(clone.info()?)),
                Err(error) => failed.push(error),
            }
        }
        match failed.into_iter().next() {
            None => Ok(made),
            Some(first) if made.is_empty() => Err(first),
            Some(first) => {
                let done: Vec<&str> = made.iter().map(|b| b.name.as_str()).collect();
                Err(Error::Conflict(format!("{}; made all the same: {}", first.whole(), done.join(" "))))
            }
        }
    }

    /// Tags a version, the latest where no number is given.
    ///
    /// # Errors
    /// Where there is no such version, or the tag cannot be one.
    pub fn tag_blob(&self, name: &str, tag: &str, number: Option<u64>) -> Result<BlobChanged> {
        let blob = self.blob(name)?;
        let number = number.map_or_else(|| blob.latest().map(|(number, _)| number), Ok)?;
        if tag.parse::<u64>().is_ok() {
            return Err(Error::Invalid(format!("`{tag}` cannot be a tag: numbers stand for versions")));
        }
        Ok(BlobChanged { number: blob.tag(number, tag)?, bytes: 0 })
    }

    /// Removes a tag.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn untag_blob(&self, name: &str, tag: &str) -> Result<BlobChanged> {
        Ok(BlobChanged { number: self.blob(name)?.untag(tag)?, bytes: 0 })
    }

    /// Deletes one version of a blob.
    ///
    /// # Errors
    /// Where it is the latest, tagged, or not there.
    pub fn delete_blob_version(&self, name: &str, number: u64) -> Result<()> {
        mirrored::deleting(&self.shared, name, Some(number), || Ok(self.blob(name)?.delete_version(number)?))?;
        sweep::sweep(&self.shared)
    }

    /// The snapshots of blobs.
    ///
    /// # Errors
    /// Where one is damaged.
    pub fn blob_snapshots(&self) -> Result<Vec<BlobSnapshot>> {
        let store = &self.shared.store;
        store.blob_snapshots()?.iter().map(|name| Ok(shown(&store.blob_snapshot(name)?))).collect()
    }

    /// Makes a snapshot of several blobs, as they are at one instant.
    ///
    /// # Errors
    /// Where the name is taken, or a blob or version is not there.
    pub fn snapshot_blobs(&self, request: &BlobSnapshotRequest) -> Result<BlobSnapshot> {
        let mut blobs = Vec::new();
        for text in &request.blobs {
            // The latest are all read at one instant, later: here only what was named is resolved.
            match self.blob(text) {
                Ok(_) => blobs.push((text.clone(), At::Latest)),
                Err(_) => {
                    let named = self.blob_version(text)?;
                    blobs.push((named.blob, At::Number(named.number)));
                }
            }
        }
        let blobs: Vec<(&str, At)> = blobs.iter().map(|(name, at)| (name.as_str(), *at)).collect();
        Ok(shown(&taken(self.shared.store.snapshot_blobs(&request.name, &blobs), &request.name)?))
    }

    /// Removes a snapshot of blobs.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn delete_blob_snapshot(&self, name: &str) -> Result<()> {
        if !self.shared.store.delete_blob_snapshot(name)? {
            return Err(Error::NotFound(format!("no snapshot of blobs is named {name}")));
        }
        sweep::sweep(&self.shared)
    }
}

/// What came over the wire and waits in a file; the first byte goes to offset `at` of the blob.
struct Spooled<'a> {
    file: &'a File,
    at: u64,
}

impl BlockSource for Spooled<'_> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, offset - self.at)
    }
}

fn absent(name: &str) -> Error {
    Error::NotFound(format!("no blob is named {name}; `offshoot blob ls` lists them"))
}

/// Says of a name that is taken that it is.
fn taken<T>(made: std::result::Result<T, store::Error>, name: &str) -> Result<T> {
    match made {
        Err(store::Error::HeadChanged { .. }) => Err(Error::Conflict(format!("{name} is there already"))),
        other => Ok(other?),
    }
}

fn listed(info: BlobInfo) -> Blob {
    Blob {
        name: info.name,
        latest: info.latest,
        size_bytes: info.size,
        block_bytes: info.block_size,
        created: time(info.created_ms),
        origin: info.origin.map(|origin| format!("{}@{}", origin.blob, origin.number)),
        tags: info.tags,
    }
}

fn shown(snapshot: &store::blob::BlobSnapshot) -> BlobSnapshot {
    let versions = snapshot.versions.iter().map(|(blob, (number, _))| (blob.clone(), *number)).collect();
    BlobSnapshot { name: snapshot.name.clone(), versions }
}

fn time(ms: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}
