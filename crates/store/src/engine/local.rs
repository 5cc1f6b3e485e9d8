//! Objects as files of one local directory.
//!
//! ```text
//! key                    the store's key
//! lock                   held (flock) by the one writing process, whose pid it shows
//! packs/<id>.pack .idx   packs and their indexes
//! heads/<name>           heads, `/` written as %2F
//! tmp/                   what is being written or removed; emptied when a writer opens
//! ```
//!
//! A file becomes visible by: write under `tmp/`, fsync, rename, fsync of the folder. A pack and its index share the
//! last step, as do heads swapped together. It goes by: rename into `tmp/`, fsync of the folder, truncate, unlink; the
//! truncation gives its space back even while a reader in another process has it open. The compare-and-swap of heads
//! needs no more than a mutex, because the lock file admits one writing process.

use super::{Engine, Etag, Expect, HeadSwap, Object, Staged, Swapped, Upload};
use base::ByteRange;
#[cfg(test)]
use recorded::{self as fs, File, OpenOptions, fallocate};
#[cfg(not(test))]
use rustix::fs::fallocate;
use rustix::fs::{Advice, FallocateFlags, FlockOperation, fadvise, flock};
#[cfg(not(test))]
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
#[cfg(not(test))]
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The tests of this crate record the system calls: what is imported from there has the names and meanings of the
/// standard library.
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod tests;

const FOLDERS: [&str; 3] = ["packs", "heads", "tmp"];
/// A thread more for so many heads that are swapped together.
const SWAPS_PER_THREAD: usize = 4;
/// The file system writes out together what is asked of it at the same time, so that waiting threads pay.
const CONCURRENCY: usize = 16;

/// The engine.
pub struct Local {
    dir: PathBuf,
    /// Present in the writing process.
    _lock: Option<File>,
    heads: Mutex<()>,
    next_tmp: Arc<AtomicU64>,
}

/// Why a directory could not be opened.
#[derive(Debug)]
pub enum OpenError {
    /// The process of this pid writes to it.
    Locked(String),
    /// The system refused.
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Local {
    /// Opens the directory for this process to write; makes it where it is absent, clears what a dead writer
    /// left half done.
    ///
    /// # Errors
    /// Another process holds it, or the file system refuses.
    pub fn open_writer(dir: &Path) -> Result<Self, OpenError> {
        fs::create_dir_all(dir)?;
        let lock_path = dir.join("lock");
        let mut lock =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&lock_path)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(&lock_path).unwrap_or_default().trim().to_owned();
                return Err(OpenError::Locked(if pid.is_empty() { "unknown".to_owned() } else { pid }));
            }
            Err(error) => return Err(OpenError::Io(error.into())),
        }
        lock.set_len(0)?;
        // Only for the message of whoever comes next: a full disk must not keep anyone from freeing space.
        let _ = lock.write_all(format!("{}\n", std::process::id()).as_bytes());
        for folder in FOLDERS {
            fs::create_dir_all(dir.join(folder))?;
        }
        sync_dir(dir)?;
        if let Some(parent) = dir.canonicalize()?.parent() {
            sync_dir(parent)?;
        }
        for entry in fs::read_dir(dir.join("tmp"))? {
            fs::remove_file(entry?.path())?;
        }
        Ok(Self::new(dir, Some(lock)))
    }

    /// Opens the directory beside the writer.
    #[must_use]
    pub fn open_reader(dir: &Path) -> Self {
        Self::new(dir, None)
    }

    fn new(dir: &Path, lock: Option<File>) -> Self {
        Self { dir: dir.to_owned(), _lock: lock, heads: Mutex::new(()), next_tmp: Arc::default() }
    }

    fn tmp(&self) -> PathBuf {
        self.dir.join("tmp").join(self.next_tmp.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn head_path(&self, name: &str) -> PathBuf {
        self.dir.join("heads").join(name.replace('/', "%2F"))
    }

    /// Makes bytes durable in a file of `tmp/`.
    fn write_tmp(&self, bytes: &[u8]) -> io::Result<PathBuf> {
        let tmp = self.tmp();
        let written = (|| {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
            file.write_all_at(bytes, 0)?;
            file.sync_all()
        })();
        discard_on_error(written, &tmp)?;
        Ok(tmp)
    }

    fn write_whole(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let tmp = self.write_tmp(bytes)?;
        discard_on_error(fs::rename(&tmp, path), &tmp)?;
        sync_dir(path.parent().expect("a file in a folder of the store"))
    }

    /// Writes each head that is in the state expected; those written still want their folder synced.
    fn swap_each(&self, swaps: &[HeadSwap]) -> Vec<io::Result<Swapped>> {
        let one = |swap: &HeadSwap| {
            let found = self.head(&swap.name)?.map(|(_, etag)| etag);
            if let Some(why) = swap.expect.refuses(found.as_ref()) {
                return Ok(Err(why));
            }
            let staged =
                swap.staged.as_ref().map_or_else(|| self.write_tmp(&swap.bytes), |staged| Ok(staged.0.clone()));
            let tmp = staged?;
            discard_on_error(fs::rename(&tmp, self.head_path(&swap.name)), &tmp)?;
            Ok(Ok(Etag::of(&swap.bytes)))
        };
        let threads = swaps.len().div_ceil(SWAPS_PER_THREAD).min(CONCURRENCY);
        if threads <= 1 {
            return swaps.iter().map(one).collect();
        }
        let part = swaps.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let parts: Vec<_> =
                swaps.chunks(part).map(|part| scope.spawn(move || part.iter().map(one).collect::<Vec<_>>())).collect();
            parts.into_iter().flat_map(|part| part.join().expect("a swap does not panic")).collect()
        })
    }

    /// Removes files of one folder after another so that none comes back after a crash.
    fn remove_paths(&self, paths: &[PathBuf]) -> io::Result<usize> {
        let mut moved = Vec::new();
        for path in paths {
            let tmp = self.tmp();
            match fs::rename(path, &tmp) {
                Ok(()) => moved.push(tmp),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let mut folders: Vec<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
        folders.sort_unstable();
        folders.dedup();
        folders.into_iter().try_for_each(sync_dir)?;
        for path in &moved {
            OpenOptions::new().write(true).open(path)?.set_len(0)?;
            fs::remove_file(path)?;
        }
        Ok(moved.len())
    }
}

/// The first error is the one to report; what stays behind goes when a writer opens next.
fn discard_on_error<T>(result: io::Result<T>, tmp: &Path) -> io::Result<T> {
    result.inspect_err(|_| _ = fs::remove_file(tmp))
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn not_found_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

struct OpenFile(File);

impl Object for OpenFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        crate::waits::note();
        self.0.read_exact_at(buf, offset)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

fn file_names(dir: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

struct LocalUpload {
    file: Arc<OpenFile>,
    tmp: PathBuf,
    target: PathBuf,
    at: u64,
    /// How much of it is durable.
    synced: Option<u64>,
    sync_failed: bool,
    /// It has its name; whether that is durable is another matter.
    visible: bool,
}

impl Upload for LocalUpload {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.0.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn object(&self) -> Arc<dyn Object> {
        Arc::clone(&self.file) as Arc<dyn Object>
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.sync_failed {
            return Err(io::Error::other(
                "the file system failed to write this file out earlier and may have lost parts",
            ));
        }
        if self.synced != Some(self.at) {
            // An append that failed half way may have left bytes beyond the end.
            self.file.0.set_len(self.at)?;
            self.file.0.sync_all().inspect_err(|_| self.sync_failed = true)?;
            self.synced = Some(self.at);
        }
        Ok(())
    }

    fn finish_before(&mut self, then: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.sync()?;
        if !self.visible {
            fs::rename(&self.tmp, &self.target)?;
            self.visible = true;
        }
        then()?;
        sync_dir(self.target.parent().expect("a file in a folder of the store"))
            .inspect_err(|_| self.sync_failed = true)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finish_before(&mut || Ok(()))
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        if !self.visible {
            // Others may still have the descriptor for a moment; the space comes back at once all the same.
            // Errors leave a file in `tmp/` that the next writer to open removes.
            let _ = self.file.0.set_len(0);
            let _ = fs::remove_file(&self.tmp);
        }
    }
}

impl Engine for Local {
    fn describe(&self) -> String {
        self.dir.display().to_string()
    }

    fn concurrency(&self) -> usize {
        CONCURRENCY
    }

    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        let tmp = self.tmp();
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&tmp)?;
        fadvise(&file, 0, None, Advice::Random)?;
        let target = self.dir.join(name);
        let file = Arc::new(OpenFile(file));
        Ok(Box::new(LocalUpload { file, tmp, target, at: 0, synced: None, sync_failed: false, visible: false }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        let file = File::open(self.dir.join(name))?;
        // A frame is all that is wanted: readahead around it would read what nobody asked for.
        fadvise(&file, 0, None, Advice::Random)?;
        Ok(Arc::new(OpenFile(file)))
    }

    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        not_found_is_none(fs::read(self.dir.join(name)))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.write_whole(&self.dir.join(name), bytes)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        file_names(&self.dir.join(folder))
    }

    fn remove(&self, names: &[String]) -> io::Result<()> {
        let paths: Vec<PathBuf> = names.iter().map(|name| self.dir.join(name)).collect();
        self.remove_paths(&paths).map(|_| ())
    }

    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        for range in ranges {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&file, mode, range.start, range.len()) {
                // A file system without holes keeps the space until the whole pack goes.
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn footprint(&self, name: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.dir.join(name))?.blocks() * 512)
    }

    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        Ok(not_found_is_none(fs::read(self.head_path(name)))?.map(|bytes| {
            let etag = Etag::of(&bytes);
            (bytes, etag)
        }))
    }

    fn heads(&self) -> io::Result<Vec<String>> {
        Ok(file_names(&self.dir.join("heads"))?.into_iter().map(|name| name.replace("%2F", "/")).collect())
    }

    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Swapped> {
        let swap = HeadSwap { name: name.to_owned(), expect: expect.clone(), bytes: bytes.to_vec(), staged: None };
        self.swap_heads(&[swap]).pop().expect("a result for each swap")
    }

    fn finish_with(&self, upload: &mut dyn Upload, name: &str, bytes: &[u8]) -> io::Result<()> {
        // Both are written out at the same time, and their folder once.
        let (synced, written) = std::thread::scope(|scope| {
            let writing = scope.spawn(|| self.write_tmp(bytes));
            (upload.sync(), writing.join().expect("writing a file does not panic"))
        });
        let tmp = written?;
        let path = self.dir.join(name);
        discard_on_error(synced.and_then(|()| upload.finish_before(&mut || fs::rename(&tmp, &path))), &tmp)
    }

    fn stage_head(&self, bytes: &[u8]) -> Option<Staged> {
        // The swap meets the same trouble and reports it.
        self.write_tmp(bytes).ok().map(Staged)
    }

    fn swap_heads(&self, swaps: &[HeadSwap]) -> Vec<io::Result<Swapped>> {
        let _guard = self.heads.lock().expect("no panic while heads are locked");
        let mut results = self.swap_each(swaps);
        if results.iter().any(|result| matches!(result, Ok(Ok(_))))
            && let Err(error) = sync_dir(&self.dir.join("heads"))
        {
            for result in results.iter_mut().filter(|result| matches!(result, Ok(Ok(_)))) {
                *result = Err(io::Error::new(error.kind(), error.to_string()));
            }
        }
        results
    }

    fn remove_head(&self, name: &str) -> io::Result<bool> {
        let _guard = self.heads.lock().expect("no panic while heads are locked");
        Ok(self.remove_paths(&[self.head_path(name)])? > 0)
    }

    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        let made = not_found_is_none(fs::metadata(self.dir.join(name)))?;
        Ok(made.map(|made| (made.mtime().max(0) as u64) * 1000 + made.mtime_nsec() as u64 / 1_000_000))
    }
}
