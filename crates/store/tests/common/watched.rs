//! An engine that counts what it is asked, and fails, spoils or holds back answers when told to.

#![allow(dead_code, missing_docs, unreachable_pub)]

use base::ByteRange;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use store::engine::{Engine, Memory, Object, Upload};
use store::{Etag, Expect};

/// What is asked and told.
#[derive(Default)]
pub struct Control {
    /// Reads of objects.
    pub reads: AtomicU64,
    /// Bytes of these.
    pub bytes: AtomicU64,
    /// Every call fails.
    pub away: AtomicBool,
    /// So many reads from now on bring a flipped bit.
    pub spoil: AtomicU64,
    /// Reads wait while this is true.
    held: Mutex<bool>,
    changed: Condvar,
    /// Reads that wait or have waited.
    pub arrived: AtomicU64,
}

impl Control {
    pub fn hold(&self, hold: bool) {
        *self.held.lock().unwrap() = hold;
        self.changed.notify_all();
    }

    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    pub fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::SeqCst);
    }

    fn ask(&self) -> io::Result<()> {
        if self.away.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "nobody listens there"));
        }
        Ok(())
    }
}

/// The engine: memory, watched.
#[derive(Clone, Default)]
pub struct Watched {
    pub memory: Memory,
    pub control: Arc<Control>,
}

struct WatchedObject {
    below: Arc<dyn Object>,
    control: Arc<Control>,
}

impl Object for WatchedObject {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.control.arrived.fetch_add(1, Ordering::SeqCst);
        let mut held = self.control.held.lock().unwrap();
        while *held {
            held = self.control.changed.wait(held).unwrap();
        }
        drop(held);
        self.control.ask()?;
        self.control.reads.fetch_add(1, Ordering::SeqCst);
        self.control.bytes.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.below.read_at(offset, buf)?;
        let less = |left: u64| left.checked_sub(1);
        if self.control.spoil.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            // In every 4 KiB, so that whatever is asked for is hit.
            buf.iter_mut().step_by(4096).for_each(|byte| *byte ^= 4);
        }
        Ok(())
    }
    fn size(&self) -> io::Result<u64> {
        self.control.ask()?;
        self.below.size()
    }
}

impl Engine for Watched {
    fn describe(&self) -> String {
        "watched memory".to_owned()
    }
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        self.control.ask()?;
        self.memory.upload(name)
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        self.control.ask()?;
        Ok(Arc::new(WatchedObject { below: self.memory.open(name)?, control: Arc::clone(&self.control) }))
    }
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.control.ask()?;
        self.memory.get(name)
    }
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.control.ask()?;
        self.memory.put(name, bytes)
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.control.ask()?;
        self.memory.list(folder)
    }
    fn remove(&self, names: &[String]) -> io::Result<()> {
        self.control.ask()?;
        self.memory.remove(names)
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        self.control.ask()?;
        self.memory.punch(name, ranges)
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.control.ask()?;
        self.memory.footprint(name)
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        self.control.ask()?;
        self.memory.head(name)
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        self.control.ask()?;
        self.memory.heads()
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Result<Etag, &'static str>> {
        self.control.ask()?;
        self.memory.swap_head(name, expect, bytes)
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.control.ask()?;
        self.memory.remove_head(name)
    }
}
