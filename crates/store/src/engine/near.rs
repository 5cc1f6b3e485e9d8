//! What one process of a node just wrote or read, laid where the others of the node find it.
//!
//! A node has two processes with a cache of their own each: the daemon, which writes, and the mirror, which reads
//! what the daemon wrote a moment ago. This directory stands under both caches and over the slow engine: packs are
//! laid in it while they are uploaded, indexes when they are written or first read, and whoever opens one takes it
//! from here, so that nothing that this node made travels twice. Files are whole once they have their name, never
//! change, and may go at any time: what is not here is asked for below. Nothing here is made durable, so what an
//! earlier boot left, which a power loss may have torn, is removed; nor is it trusted: readers check what they read,
//! and drop ([`Object::distrust`]) what is not as it should be.
//!
//! Only for stores whose packs and indexes never change once they are visible, as shared ones.

use super::{Engine, Etag, Expect, HeadSwap, Health, Object, Swapped, Upload};
use crate::pack::PackId;
use base::ByteRange;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

/// Bytes of a checksum behind an index.
const SUM: usize = 32;
/// Files that are being written begin so.
const PART: &str = ".part-";

/// The engine.
pub struct Near {
    origin: Arc<dyn Engine>,
    shelf: Arc<Shelf>,
}

/// The directory.
struct Shelf {
    dir: PathBuf,
    /// Bytes of packs and indexes kept.
    bytes: u64,
    next: AtomicU64,
    taken: AtomicU64,
}

impl Near {
    /// Puts the directory `dir` in front of `origin`, for packs and indexes of up to `bytes` in all.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(origin: Arc<dyn Engine>, dir: &Path, bytes: u64) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Self::open_in_boot(origin, dir, bytes, boot.trim())
    }

    fn open_in_boot(origin: Arc<dyn Engine>, dir: &Path, bytes: u64, boot: &str) -> io::Result<Self> {
        let (root, dir) = (dir, &dir.join(boot));
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            // The other process of the node may be at the same.
            match if path == *dir { Ok(()) } else { fs::remove_dir_all(path) } {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let shelf = Shelf { dir: dir.to_owned(), bytes, next: AtomicU64::default(), taken: AtomicU64::default() };
        Ok(Self { origin, shelf: Arc::new(shelf) })
    }

    /// Bytes of packs and indexes that were found here and not asked for below, since it was opened.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        self.shelf.taken.load(Ordering::Relaxed)
    }
}

/// The file of a pack or an index.
fn file_of(object: &str) -> Option<(&str, bool)> {
    let file = object.strip_prefix("packs/")?;
    PackId::parse(file).map(|(_, is_index)| (file, is_index))
}

impl Shelf {
    fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// A file under no name yet. Names of parts carry the process: two write here.
    fn part(&self) -> io::Result<(File, PathBuf)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path(&format!("{PART}{}-{number}", std::process::id()));
        Ok((File::options().read(true).write(true).create(true).truncate(true).open(&path)?, path))
    }

    fn index(&self, file: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(file)).ok()?;
        let at = bytes.len().checked_sub(SUM)?;
        if blake3::hash(&bytes[..at]).as_bytes()[..] != bytes[at..] {
            self.forget(file);
            return None;
        }
        bytes.truncate(at);
        self.taken.fetch_add(at as u64, Ordering::Relaxed);
        Some(bytes)
    }

    fn keep_index(&self, file: &str, bytes: &[u8]) {
        let kept = self.part().and_then(|(mut part, path)| {
            part.write_all(bytes)?;
            part.write_all(blake3::hash(bytes).as_bytes())?;
            fs::rename(&path, self.path(file))
        });
        self.settle(kept);
    }

    /// What the directory does not take is served without it.
    fn settle(&self, kept: io::Result<()>) {
        if let Err(error) = kept.and_then(|()| self.trim()) {
            log::debug!("{} does not take what it is given: {error}", self.dir.display());
        }
    }

    fn forget(&self, file: &str) {
        let _ = fs::remove_file(self.path(file));
    }

    /// Lets the oldest go. Parts of processes that died go by age as well, those under way are never so old.
    fn trim(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            let made = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let is_part = entry.file_name().to_string_lossy().starts_with(PART);
            let is_old = made.elapsed().is_ok_and(|age| age.as_secs() > 3600);
            match (is_part, is_old) {
                (true, true) => drop(fs::remove_file(entry.path())),
                (true, false) => {}
                (false, _) => files.push((made, meta.len(), entry.path())),
            }
        }
        files.sort();
        let mut sum: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if sum <= self.bytes {
                break;
            }
            let _ = fs::remove_file(path);
            sum -= bytes;
        }
        Ok(())
    }
}

/// A pack that is laid here while it is uploaded.
struct NearUpload {
    below: Box<dyn Upload>,
    shelf: Arc<Shelf>,
    file: String,
    /// None once it failed, or was laid down.
    part: Option<(File, PathBuf)>,
}

impl NearUpload {
    fn lay_down(&mut self) {
        if let Some((_, path)) = self.part.take() {
            self.shelf.settle(fs::rename(&path, self.shelf.path(&self.file)));
        }
    }
}

impl Drop for NearUpload {
    fn drop(&mut self) {
        if let Some((_, path)) = self.part.take() {
            let _ = fs::remove_file(path);
        }
    }
}

impl Upload for NearUpload {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.below.append(bytes)?;
        if let Some((part, path)) = &mut self.part
            && let Err(error) = part.write_all(bytes)
        {
            log::debug!("{} is not laid down: {error}", self.file);
            let _ = fs::remove_file(path);
            self.part = None;
        }
        Ok(())
    }

    fn object(&self) -> Arc<dyn Object> {
        self.below.object()
    }

    fn sync(&mut self) -> io::Result<()> {
        self.below.sync()
    }

    fn finish_before(&mut self, then: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.below.finish()?;
        // Before the index shows that there is such a pack.
        self.lay_down();
        then()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.finish_before(&mut || Ok(()))
    }
}

/// A pack open for reading: here, or below once it is not.
struct NearObject {
    origin: Arc<dyn Engine>,
    shelf: Arc<Shelf>,
    name: String,
    file: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    here: Option<Arc<File>>,
    below: Option<Arc<dyn Object>>,
}

impl NearObject {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while an object is locked")
    }

    fn here(&self) -> Option<Arc<File>> {
        self.state().here.clone()
    }

    fn below(&self) -> io::Result<Arc<dyn Object>> {
        if let Some(below) = &self.state().below {
            return Ok(Arc::clone(below));
        }
        let opened = self.origin.open(&self.name)?;
        self.state().below = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn drop_here(&self) -> bool {
        self.shelf.forget(&self.file);
        self.state().here.take().is_some()
    }
}

impl Object for NearObject {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if let Some(file) = self.here() {
            match file.read_exact_at(buf, offset) {
                Ok(()) => {
                    self.shelf.taken.fetch_add(buf.len() as u64, Ordering::Relaxed);
                    return Ok(());
                }
                // Cut short, or its disk fails.
                Err(_) => _ = self.drop_here(),
            }
        }
        self.below()?.read_at(offset, buf)
    }

    fn size(&self) -> io::Result<u64> {
        match self.here() {
            Some(file) => Ok(file.metadata()?.len()),
            None => self.below()?.size(),
        }
    }

    fn distrust(&self, range: ByteRange) -> bool {
        // Both, whatever is found first.
        let was_here = self.drop_here();
        let below = self.state().below.clone();
        below.is_some_and(|below| below.distrust(range)) | was_here
    }
}

impl Engine for Near {
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        let below = self.origin.upload(name)?;
        match file_of(name) {
            Some((file, false)) => {
                let part = self.shelf.part().ok();
                Ok(Box::new(NearUpload { below, shelf: Arc::clone(&self.shelf), file: file.to_owned(), part }))
            }
            _ => Ok(below),
        }
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        let Some((file, false)) = file_of(name) else { return self.origin.open(name) };
        let here = File::open(self.shelf.path(file)).ok().map(Arc::new);
        // Below is asked at once where it is not here, so that what is absent shows as before.
        let below = if here.is_none() { Some(self.origin.open(name)?) } else { None };
        Ok(Arc::new(NearObject {
            origin: Arc::clone(&self.origin),
            shelf: Arc::clone(&self.shelf),
            name: name.to_owned(),
            file: file.to_owned(),
            state: Mutex::new(State { here, below }),
        }))
    }

    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some((file, true)) = file_of(name) else { return self.origin.get(name) };
        if let Some(bytes) = self.shelf.index(file) {
            return Ok(Some(bytes));
        }
        let found = self.origin.get(name)?;
        if let Some(bytes) = &found {
            self.shelf.keep_index(file, bytes);
        }
        Ok(found)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.origin.put(name, bytes)?;
        if let Some((file, true)) = file_of(name) {
            self.shelf.keep_index(file, bytes);
        }
        Ok(())
    }

    fn remove(&self, names: &[String]) -> io::Result<()> {
        self.origin.remove(names)?;
        names.iter().filter_map(|name| file_of(name)).for_each(|(file, _)| self.shelf.forget(file));
        Ok(())
    }

    fn describe(&self) -> String {
        self.origin.describe()
    }
    fn concurrency(&self) -> usize {
        self.origin.concurrency()
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.origin.list(folder)
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        self.origin.punch(name, ranges)
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.origin.footprint(name)
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        self.origin.head(name)
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        self.origin.heads()
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Swapped> {
        self.origin.swap_head(name, expect, bytes)
    }
    fn swap_heads(&self, swaps: &[HeadSwap]) -> Vec<io::Result<Swapped>> {
        self.origin.swap_heads(swaps)
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.origin.remove_head(name)
    }
    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        self.origin.put_new(name, bytes)
    }
    fn can_share(&self) -> bool {
        self.origin.can_share()
    }
    fn can_punch(&self) -> bool {
        self.origin.can_punch()
    }
    fn is_remote(&self) -> bool {
        self.origin.is_remote()
    }
    fn prove(&self) -> io::Result<()> {
        self.origin.prove()
    }
    fn now_ms(&self) -> io::Result<u64> {
        self.origin.now_ms()
    }
    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        self.origin.made_ms(name)
    }
    fn health(&self) -> Health {
        self.origin.health()
    }
}

#[cfg(test)]
mod tests;
