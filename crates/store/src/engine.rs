//! Where objects live: a narrow trait, so that a crash test can hold every state a medium may be found in.
//!
//! An engine keeps *objects* (immutable once visible, though parts may be given up) and *heads* (small, swapped
//! by compare-and-swap). Its promises, on which the store's crash safety stands:
//!
//! 1. What `Upload::finish`, `put`, `swap_head`, `remove` and `remove_head` did is durable when they return.
//! 2. Each of them is atomic: after a crash an object or head is there as a whole, old or new, or not at all.
//! 3. An upload that was not finished is invisible and vanishes with its process.

pub mod cached;
pub mod local;
pub mod memory;
pub mod near;
pub mod object;

pub use cached::Cached;
pub use local::Local;
pub use memory::Memory;
pub use near::Near;
pub use object::Object as S3;

use base::ByteRange;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// The state a head was seen in. Opaque; only compared by the engine that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Etag(pub(crate) String);

impl Etag {
    /// The tag of a head by its content, for engines without one of their own.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().to_string())
    }
}

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a publication expects to find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No head of that name.
    Absent,
    /// Anything; the last writer wins.
    Any,
    /// The head as it was read.
    Etag(Etag),
}

impl Expect {
    /// Why a head in state `found` is not what is expected.
    pub(crate) fn refuses(&self, found: Option<&Etag>) -> Option<&'static str> {
        match (self, found) {
            (Self::Absent, Some(_)) => Some("it exists already"),
            (Self::Etag(_), None) => Some("it was removed"),
            (Self::Etag(expected), Some(found)) if expected != found => Some("another writer published first"),
            _ => None,
        }
    }
}

/// The bytes of a head in a file of their own, durable and not yet visible. Removed when it is not used.
#[derive(Debug)]
pub struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // Gone where it was used. What cannot be removed goes when a writer opens next.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A compare-and-swap asked for together with others.
#[derive(Debug)]
pub struct HeadSwap {
    /// The head.
    pub name: String,
    /// The state it must be in.
    pub expect: Expect,
    /// Its new bytes.
    pub bytes: Vec<u8>,
    /// These bytes, made durable already.
    pub staged: Option<Staged>,
}

/// What became of a compare-and-swap: the new state, or what was found instead.
pub type Swapped = Result<Etag, &'static str>;

/// An object open for reading.
pub trait Object: Send + Sync {
    /// Fills `buf` from `offset`; fewer bytes are an `UnexpectedEof` error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Its length.
    fn size(&self) -> io::Result<u64>;
    /// Says that the bytes of `range` were not what they should be: copies that are kept of them must go. Whether
    /// there may be any, so that another read is worth while.
    fn distrust(&self, range: ByteRange) -> bool {
        let _ = range;
        false
    }
}

/// An object being written. Dropping it unfinished removes it.
pub trait Upload: Send {
    /// Adds bytes at the end. After an error nothing was added, and a later attempt may succeed.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// What was appended so far, for reading; stays good after `finish`.
    fn object(&self) -> Arc<dyn Object>;
    /// Makes what was appended durable and not yet visible, so that finishing has less to do. Never needed.
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// As `finish`, then `then`, which makes another object of the same folder visible. Both are durable when this
    /// returns, and at no instant is the other one visible without this.
    fn finish_before(&mut self, then: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.finish()?;
        then()
    }
    /// Makes it durable, then visible. May be repeated after an error, but once the medium reported that it
    /// could not make data durable, every later attempt fails as well: nobody knows what it dropped.
    fn finish(&mut self) -> io::Result<()>;
}

/// A medium for one store. Object names are `folder/file`; `folder` is one of a fixed few.
pub trait Engine: Send + Sync {
    /// For messages: the directory or address.
    fn describe(&self) -> String;
    /// How many objects are best made durable at the same time.
    fn concurrency(&self) -> usize {
        1
    }
    /// Starts an object.
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>>;
    /// Opens a visible object.
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>>;
    /// A whole small object.
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Writes or replaces a whole small object.
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// The files in a folder, in no order.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Removes objects, in order. Absent ones are no error. Space is given back even while others read them.
    fn remove(&self, names: &[String]) -> io::Result<()>;
    /// Gives up parts of an object; they read as zero from then on.
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()>;
    /// Bytes an object takes on the medium.
    fn footprint(&self, name: &str) -> io::Result<u64>;
    /// A head's bytes and tag.
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>>;
    /// All heads.
    fn heads(&self) -> io::Result<Vec<String>>;
    /// Compare-and-swap of a head. The inner error says what was found instead.
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Swapped>;
    /// Finishes an upload, then writes the small object `name` of the same folder. May be repeated after an error.
    fn finish_with(&self, upload: &mut dyn Upload, name: &str, bytes: &[u8]) -> io::Result<()> {
        upload.finish_before(&mut || self.put(name, bytes))
    }
    /// Makes a head's bytes durable ahead of its swap, where that makes the swap quicker.
    fn stage_head(&self, bytes: &[u8]) -> Option<Staged> {
        let _ = bytes;
        None
    }
    /// Compare-and-swap of several heads, no two of one name: each by itself, in any order, where doing them together
    /// is cheaper. As many results as swaps.
    fn swap_heads(&self, swaps: &[HeadSwap]) -> Vec<io::Result<Swapped>> {
        swaps.iter().map(|swap| self.swap_head(&swap.name, &swap.expect, &swap.bytes)).collect()
    }
    /// Removes a head; whether it was there.
    fn remove_head(&self, name: &str) -> io::Result<bool>;

    /// Writes a whole small object unless one is there; whether it was written. Where many processes write, at
    /// most one of them is told `true`.
    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        if self.get(name)?.is_some() {
            return Ok(false);
        }
        self.put(name, bytes)?;
        Ok(true)
    }
    /// Whether many processes may write at once: heads are compared and swapped, and `put_new` decided, by the
    /// medium itself.
    fn can_share(&self) -> bool {
        false
    }
    /// Whether `punch` gives space back. Where it does not, packs shrink only by being rewritten.
    fn can_punch(&self) -> bool {
        true
    }
    /// Whether every call is a request over a network: what is uploaded is held in memory until it is finished,
    /// and asking for a size costs as much as reading.
    fn is_remote(&self) -> bool {
        false
    }
    /// Makes sure, before anything is written, that the medium does what the store's safety stands on.
    ///
    /// # Errors
    /// It does not, and what it does instead; or it cannot be reached.
    fn prove(&self) -> io::Result<()> {
        Ok(())
    }
    /// The medium's own time in milliseconds since 1970: the same clock for all that use it, never ahead of it.
    fn now_ms(&self) -> io::Result<u64> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(since.map_or(0, |since| since.as_millis() as u64))
    }
    /// When an object became visible, by the clock of [`Engine::now_ms`]; `None` where there is no such object.
    /// Engines that do not know say 0.
    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        Ok(self.get(name)?.map(|_| 0))
    }
    /// How the medium has been answering.
    fn health(&self) -> Health {
        Health::default()
    }
}

/// How a medium has been answering, for people who look into a fault.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Health {
    /// Whether requests are let through.
    pub circuit: Circuit,
    /// Requests that failed in a row.
    pub failures_in_a_row: u32,
    /// Requests sent since the engine was opened, repeats included.
    pub requests: u64,
    /// Of these, repeats after a failure.
    pub repeats: u64,
    /// What the last failure was, without credentials.
    pub last_failure: Option<String>,
}

/// Whether requests are let through to a medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Circuit {
    /// All of them.
    #[default]
    Closed,
    /// None for now: too many failed in a row.
    Open,
    /// One, to see whether the medium is back.
    HalfOpen,
}
