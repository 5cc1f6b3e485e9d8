//! Objects in memory, with a log of every durable step.
//!
//! The log is the crash model: a crash leaves exactly the effects of some prefix of it, because every step is
//! atomic and durable by the engine's contract, and unfinished uploads leave nothing. [`Memory::crashed_after`]
//! rebuilds any such state.

use super::{Engine, Etag, Expect, Object, Swapped, Upload};
use base::ByteRange;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// One durable step.
#[derive(Clone, Debug)]
pub enum Step {
    /// An object became visible, or was replaced.
    Put(String, Vec<u8>),
    /// An object went.
    Remove(String),
    /// A part of an object went.
    Punch(String, ByteRange),
    /// A head changed.
    Head(String, Vec<u8>),
    /// A head went.
    RemoveHead(String),
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    heads: BTreeMap<String, Vec<u8>>,
    log: Vec<Step>,
    /// When each object became visible, in milliseconds since 1970.
    made: BTreeMap<String, u64>,
    /// Bytes in unfinished uploads.
    pending: u64,
    capacity: Option<u64>,
}

impl State {
    fn apply(&mut self, step: Step) {
        match step.clone() {
            Step::Put(name, bytes) => {
                self.made.insert(name.clone(), now_ms());
                self.objects.insert(name, bytes);
            }
            Step::Remove(name) => drop(self.objects.remove(&name)),
            Step::Punch(name, range) => {
                if let Some(object) = self.objects.get_mut(&name) {
                    let end = (range.end as usize).min(object.len());
                    object[(range.start as usize).min(end)..end].fill(0);
                }
            }
            Step::Head(name, bytes) => drop(self.heads.insert(name, bytes)),
            Step::RemoveHead(name) => drop(self.heads.remove(&name)),
        }
        self.log.push(step);
    }

    fn admit(&self, more: usize) -> io::Result<()> {
        let used: usize = self.objects.values().chain(self.heads.values()).map(Vec::len).sum();
        match self.capacity {
            Some(capacity) if used as u64 + self.pending + more as u64 > capacity => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }
}

fn now_ms() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64)
}

/// The engine. Clones share one state.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while the state is locked")
    }

    /// The steps so far.
    #[must_use]
    pub fn log(&self) -> Vec<Step> {
        self.state().log.clone()
    }

    /// The medium as a crash after `log` would leave it.
    #[must_use]
    pub fn crashed_after(log: &[Step]) -> Self {
        let memory = Self::default();
        log.iter().for_each(|step| memory.state().apply(step.clone()));
        memory
    }

    /// From now on holds no more than this many bytes.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Every object and head by name.
    #[must_use]
    pub fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        let heads = state.heads.iter().map(|(name, bytes)| (format!("heads/{name}"), bytes.clone()));
        state.objects.clone().into_iter().chain(heads).collect()
    }
}

struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Object for Bytes {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().expect("no panic while the bytes are locked");
        copy_at(&bytes, offset, buf)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no panic while the bytes are locked").len() as u64)
    }
}

/// An object by name, so that what is punched reads as punched.
struct Named(Memory, String);

impl Object for Named {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.0.state();
        copy_at(state.objects.get(&self.1).ok_or(io::ErrorKind::NotFound)?, offset, buf)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.state().objects.get(&self.1).ok_or(io::ErrorKind::NotFound)?.len() as u64)
    }
}

fn copy_at(bytes: &[u8], offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let part = bytes.get(offset as usize..).and_then(|rest| rest.get(..buf.len()));
    buf.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

struct Pending {
    memory: Memory,
    name: String,
    bytes: Arc<Mutex<Vec<u8>>>,
    finished: bool,
}

impl Upload for Pending {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.memory.state();
        state.admit(bytes.len())?;
        state.pending += bytes.len() as u64;
        self.bytes.lock().expect("no panic while the bytes are locked").extend_from_slice(bytes);
        Ok(())
    }
    fn object(&self) -> Arc<dyn Object> {
        if self.finished {
            Arc::new(Named(self.memory.clone(), self.name.clone()))
        } else {
            Arc::new(Bytes(Arc::clone(&self.bytes)))
        }
    }
    fn finish(&mut self) -> io::Result<()> {
        if !self.finished {
            let bytes = self.bytes.lock().expect("no panic while the bytes are locked").clone();
            let mut state = self.memory.state();
            state.pending -= bytes.len() as u64;
            state.apply(Step::Put(self.name.clone(), bytes));
            self.finished = true;
        }
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.finished {
            let len = self.bytes.lock().expect("no panic while the bytes are locked").len() as u64;
            self.memory.state().pending -= len;
        }
    }
}

impl Engine for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        let bytes = Arc::default();
        Ok(Box::new(Pending { memory: self.clone(), name: name.to_owned(), bytes, finished: false }))
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        self.state().objects.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Named(self.clone(), name.to_owned())))
    }
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.state().objects.get(name).cloned())
    }
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.admit(bytes.len())?;
        state.apply(Step::Put(name.to_owned(), bytes.to_vec()));
        Ok(())
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{folder}/");
        Ok(self.state().objects.keys().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect())
    }
    fn remove(&self, names: &[String]) -> io::Result<()> {
        let mut state = self.state();
        names.iter().for_each(|name| state.apply(Step::Remove(name.clone())));
        Ok(())
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        let mut state = self.state();
        ranges.iter().for_each(|range| state.apply(Step::Punch(name.to_owned(), *range)));
        Ok(())
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        Ok(self.state().objects.get(name).ok_or(io::ErrorKind::NotFound)?.len() as u64)
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        Ok(self.state().heads.get(name).map(|bytes| (bytes.clone(), Etag::of(bytes))))
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        Ok(self.state().heads.keys().cloned().collect())
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Swapped> {
        let mut state = self.state();
        state.admit(bytes.len())?;
        if let Some(why) = expect.refuses(state.heads.get(name).map(|old| Etag::of(old)).as_ref()) {
            return Ok(Err(why));
        }
        state.apply(Step::Head(name.to_owned(), bytes.to_vec()));
        Ok(Ok(Etag::of(bytes)))
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        let mut state = self.state();
        let there = state.heads.contains_key(name);
        if there {
            state.apply(Step::RemoveHead(name.to_owned()));
        }
        Ok(there)
    }
    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        let mut state = self.state();
        state.admit(bytes.len())?;
        let absent = !state.objects.contains_key(name);
        if absent {
            state.apply(Step::Put(name.to_owned(), bytes.to_vec()));
        }
        Ok(absent)
    }
    fn can_share(&self) -> bool {
        true
    }
    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        let state = self.state();
        Ok(state.objects.contains_key(name).then(|| state.made.get(name).copied().unwrap_or(0)))
    }
}
