//! Whole small objects, each a file with a checksum at its end, within a budget of bytes.
//!
//! A file comes by a rename, so that a crash leaves the old one, the new one or none; what does not match its
//! checksum counts as absent.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const SUM: usize = 32;
/// What even an empty file takes.
const FILE_BYTES: u64 = 4096;

struct Kept {
    /// Start of the checksum, so that what did not change is not written again; 0 when it was not read yet.
    mark: u64,
    taken: u64,
}

/// What is there, and what it takes in all.
#[derive(Default)]
struct Entries {
    by_name: HashMap<String, Kept>,
    taken: u64,
}

impl Entries {
    fn insert(&mut self, name: &str, kept: Kept) {
        self.remove(name);
        self.taken += kept.taken;
        self.by_name.insert(name.to_owned(), kept);
    }

    fn remove(&mut self, name: &str) {
        self.taken -= self.by_name.remove(name).map_or(0, |kept| kept.taken);
    }
}

/// The folder.
pub(crate) struct Small {
    dir: PathBuf,
    budget: AtomicU64,
    kept: Mutex<Entries>,
    next: AtomicU64,
}

fn taken(len: u64) -> u64 {
    len.next_multiple_of(FILE_BYTES).max(FILE_BYTES)
}

impl Small {
    /// Opens or makes the folder.
    pub(crate) fn open(dir: &Path, budget: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut kept = Entries::default();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                fs::remove_file(entry.path())?;
                continue;
            }
            kept.insert(&name.replace("%2F", "/"), Kept { mark: 0, taken: taken(entry.metadata()?.len()) });
        }
        let small = Self {
            dir: dir.to_owned(),
            budget: AtomicU64::new(budget),
            kept: Mutex::new(kept),
            next: AtomicU64::new(0),
        };
        small.set_budget(budget)?;
        Ok(small)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name.replace('/', "%2F"))
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.kept.lock().expect("no panic while small objects are locked")
    }

    /// From now on keeps no more than this many bytes.
    pub(crate) fn set_budget(&self, bytes: u64) -> io::Result<()> {
        self.budget.store(bytes, Ordering::Relaxed);
        let mut kept = self.kept();
        // The key goes last: without it nothing can be opened.
        let mut names: Vec<String> = kept.by_name.keys().cloned().collect();
        names.sort_unstable_by_key(|name| (name == "key", name.clone()));
        for name in names {
            if kept.taken <= bytes {
                break;
            }
            not_found_is_fine(fs::remove_file(self.path(&name)))?;
            kept.remove(&name);
        }
        Ok(())
    }

    /// Bytes taken.
    pub(crate) fn taken(&self) -> u64 {
        self.kept().taken
    }

    /// Keeps an object where there is room for it; an older one of that name goes in any case.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let sum = blake3::hash(bytes);
        let mark = u64::from_le_bytes(sum.as_bytes()[..8].try_into().expect("eight bytes")).max(1);
        let mut kept = self.kept();
        if kept.by_name.get(name).is_some_and(|kept| kept.mark == mark) {
            return Ok(());
        }
        let new = taken((bytes.len() + SUM) as u64);
        let others = kept.taken - kept.by_name.get(name).map_or(0, |kept| kept.taken);
        if others + new > self.budget.load(Ordering::Relaxed) {
            kept.remove(name);
            return not_found_is_fine(fs::remove_file(self.path(name)));
        }
        let tmp = self.dir.join(format!(".{}", self.next.fetch_add(1, Ordering::Relaxed)));
        let written =
            fs::write(&tmp, [bytes, sum.as_bytes()].concat()).and_then(|()| fs::rename(&tmp, self.path(name)));
        if let Err(error) = written {
            // What is there is old now; both may go.
            kept.remove(name);
            let _ = fs::remove_file(&tmp);
            let _ = fs::remove_file(self.path(name));
            return Err(error);
        }
        kept.insert(name, Kept { mark, taken: new });
        Ok(())
    }

    /// An object that is kept and whole.
    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(name)).ok()?;
        let at = bytes.len().checked_sub(SUM)?;
        let fits = blake3::hash(&bytes[..at]).as_bytes() == &bytes[at..];
        bytes.truncate(at);
        fits.then_some(bytes)
    }

    /// Forgets an object.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.kept().remove(name);
        not_found_is_fine(fs::remove_file(self.path(name)))
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let budget = self.budget.load(Ordering::Relaxed);
        self.set_budget(0)?;
        self.set_budget(budget)
    }

    /// Names that start with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        self.kept().by_name.keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }
}

fn not_found_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
