//! An engine that fails as a seed says: errors before or after the effect, a full medium, death.
//!
//! It breaks no promise of the trait: what returned `Ok` is durable, every step is atomic, unfinished uploads vanish.
//! A step that returns an error may have happened all the same, as on a network.

#![allow(missing_docs, unreachable_pub)]

use crate::common::Rng;
use base::ByteRange;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use store::engine::{Engine, Memory, Object, Upload};
use store::{Etag, Expect};

/// What is to go wrong. Chances are out of 10,000 calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub error: u64,
    pub full: u64,
    pub death: u64,
}

pub struct State {
    rng: Rng,
    faults: Faults,
    pub dead: bool,
    /// Faults so far.
    pub injected: u64,
    /// A running hash of every call and what became of it.
    pub trace: u64,
    pub calls: u64,
}

#[derive(Clone)]
pub struct Faulty {
    pub memory: Memory,
    state: Arc<Mutex<State>>,
}

enum Fate {
    Works,
    /// The error, and whether the step happens all the same.
    Fails(io::Error, bool),
}

impl Faulty {
    pub fn new(seed: u64) -> Self {
        let state = State { rng: Rng(seed), faults: Faults::default(), dead: false, injected: 0, trace: 0, calls: 0 };
        Self { memory: Memory::default(), state: Arc::new(Mutex::new(state)) }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// From now on fails like this; alive again.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        (state.faults, state.dead) = (faults, false);
    }

    /// Runs `work` with nothing going wrong.
    pub fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = {
            let mut state = self.state();
            let before = (state.faults, state.dead);
            (state.faults, state.dead) = (Faults::default(), false);
            before
        };
        let out = work();
        let mut state = self.state();
        (state.faults, state.dead) = before;
        out
    }

    fn fate(&self, call: &str, name: &str, writes: bool) -> Fate {
        let mut state = self.state();
        state.calls += 1;
        // Random bits of pack names are no part of what a seed decides.
        let name = name.split('-').next().unwrap_or_default();
        let note = |state: &mut State, outcome: u64| {
            let text = format!("{call} {name} {outcome}");
            state.trace = text.bytes().fold(state.trace, |t, b| (t ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        };
        if state.dead {
            note(&mut state, 9);
            return Fate::Fails(io::Error::new(io::ErrorKind::NotConnected, "the machine died"), false);
        }
        let draw = state.rng.below(10_000);
        let after = writes && state.rng.below(2) == 0;
        let Faults { error, full, death } = state.faults;
        let fate = if draw < death {
            state.dead = true;
            Fate::Fails(io::Error::new(io::ErrorKind::NotConnected, "the machine dies"), after)
        } else if draw < death + full && writes {
            Fate::Fails(io::ErrorKind::StorageFull.into(), false)
        } else if draw < death + full + error {
            Fate::Fails(io::Error::new(io::ErrorKind::ConnectionReset, "the connection broke"), after)
        } else {
            Fate::Works
        };
        let outcome = match &fate {
            Fate::Works => 0,
            Fate::Fails(_, after) => 1 + u64::from(*after),
        };
        state.injected += u64::from(outcome > 0);
        note(&mut state, outcome);
        fate
    }

    fn run<T>(&self, call: &str, name: &str, writes: bool, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.fate(call, name, writes) {
            Fate::Works => run(),
            Fate::Fails(error, false) => Err(error),
            Fate::Fails(error, true) => {
                run()?;
                Err(error)
            }
        }
    }
}

struct FaultyObject(Arc<dyn Object>, Faulty);

impl Object for FaultyObject {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1.run("read", "", false, || self.0.read_at(offset, buf))
    }
    fn size(&self) -> io::Result<u64> {
        self.1.run("size", "", false, || self.0.size())
    }
}

struct FaultyUpload(Box<dyn Upload>, Faulty);

impl Upload for FaultyUpload {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // After an error nothing was added, as the trait has it.
        match self.1.fate("append", "", true) {
            Fate::Works => self.0.append(bytes),
            Fate::Fails(error, _) => Err(error),
        }
    }
    fn object(&self) -> Arc<dyn Object> {
        Arc::new(FaultyObject(self.0.object(), self.1.clone()))
    }
    fn finish(&mut self) -> io::Result<()> {
        let Self(upload, engine) = self;
        engine.run("finish", "", true, || upload.finish())
    }
}

impl Engine for Faulty {
    fn describe(&self) -> String {
        "faulty memory".to_owned()
    }
    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        // An upload that nobody was told of is as good as none.
        match self.fate("upload", name, true) {
            Fate::Works => Ok(Box::new(FaultyUpload(self.memory.upload(name)?, self.clone()))),
            Fate::Fails(error, _) => Err(error),
        }
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn Object>> {
        let object = self.run("open", name, false, || self.memory.open(name))?;
        Ok(Arc::new(FaultyObject(object, self.clone())))
    }
    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.run("get", name, false, || self.memory.get(name))
    }
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.run("put", name, true, || self.memory.put(name, bytes))
    }
    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.run("list", folder, false, || self.memory.list(folder))
    }
    fn remove(&self, names: &[String]) -> io::Result<()> {
        // In order: some first ones may be gone when it fails.
        names
            .iter()
            .try_for_each(|name| self.run("remove", name, true, || self.memory.remove(std::slice::from_ref(name))))
    }
    fn punch(&self, name: &str, ranges: &[ByteRange]) -> io::Result<()> {
        ranges.iter().try_for_each(|range| {
            self.run("punch", name, true, || self.memory.punch(name, std::slice::from_ref(range)))
        })
    }
    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.run("footprint", name, false, || self.memory.footprint(name))
    }
    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        self.run("head", name, false, || self.memory.head(name))
    }
    fn heads(&self) -> io::Result<Vec<String>> {
        self.run("heads", "", false, || self.memory.heads())
    }
    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Result<Etag, &'static str>> {
        self.run("swap", name, true, || self.memory.swap_head(name, expect, bytes))
    }
    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        self.run("put_new", name, true, || self.memory.put_new(name, bytes))
    }
    fn can_share(&self) -> bool {
        self.memory.can_share()
    }
    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        self.run("made", name, false, || self.memory.made_ms(name))
    }
    fn remove_head(&self, name: &str) -> io::Result<bool> {
        self.run("unhead", name, true, || self.memory.remove_head(name))
    }
}
