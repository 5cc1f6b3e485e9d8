//! The system calls of the local engine, recorded: what `local.rs` uses of the standard library, under the same
//! names, for the tests of this crate alone. From a record every state is made that a crash of the machine may
//! leave.
//!
//! What a disk keeps is modelled as POSIX promises it and no better: bytes of a file are there for certain only
//! after `fsync` of that file, names only after `fsync` of their folder. Until then any part may be there, writes in
//! pieces. A rename is one step, made durable by the `fsync` of either folder (as on every journaling file system).

use base::ByteRange;
use rustix::fs::FallocateFlags;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs as real;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub(crate) use std::fs::{create_dir_all, metadata, read, read_dir, read_to_string};

/// One call that changes something. Files are told apart by numbers, as by inodes.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Create(PathBuf, usize),
    Write(usize, u64, Vec<u8>),
    SetLen(usize, u64),
    Punch(usize, ByteRange),
    Sync(usize),
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
    SyncDir(PathBuf),
}

#[derive(Default)]
struct Record {
    ops: Vec<Op>,
    names: BTreeMap<PathBuf, usize>,
    files: usize,
}

/// Records by the directory they are of: tests run beside one another.
static RECORDS: Mutex<Vec<(PathBuf, Arc<Mutex<Record>>)>> = Mutex::new(Vec::new());

/// Records what happens below a directory for as long as it lives. Folders that are made are there at once.
pub(crate) struct Recorder(PathBuf, Arc<Mutex<Record>>);

impl Recorder {
    pub(crate) fn of(dir: &Path) -> Self {
        let record = Arc::<Mutex<Record>>::default();
        RECORDS.lock().unwrap().push((dir.to_owned(), Arc::clone(&record)));
        Self(dir.to_owned(), record)
    }

    pub(crate) fn ops(&self) -> Vec<Op> {
        self.1.lock().unwrap().ops.clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.1.lock().unwrap().ops.len()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        RECORDS.lock().unwrap().retain(|(dir, _)| *dir != self.0);
    }
}

/// Runs a call that changes something and records it where it succeeded, as one step.
fn recorded<T>(path: &Path, run: impl FnOnce() -> io::Result<T>, note: impl FnOnce(&mut Record)) -> io::Result<T> {
    let found = RECORDS.lock().unwrap().iter().find(|(dir, _)| path.starts_with(dir)).map(|(_, r)| Arc::clone(r));
    let Some(record) = found else { return run() };
    let mut record = record.lock().unwrap();
    let done = run()?;
    note(&mut record);
    Ok(done)
}

pub(crate) fn rename(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    recorded(
        from,
        || real::rename(from, to),
        |record| {
            if let Some(file) = record.names.remove(from) {
                record.names.insert(to.to_owned(), file);
            }
            record.ops.push(Op::Rename(from.to_owned(), to.to_owned()));
        },
    )
}

pub(crate) fn remove_file(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    recorded(
        path,
        || real::remove_file(path),
        |record| {
            record.names.remove(path);
            record.ops.push(Op::Unlink(path.to_owned()));
        },
    )
}

/// `std::fs::OpenOptions`, as far as it is used.
pub(crate) struct OpenOptions(real::OpenOptions);

impl OpenOptions {
    pub(crate) fn new() -> Self {
        Self(real::OpenOptions::new())
    }
    pub(crate) fn read(&mut self, yes: bool) -> &mut Self {
        self.0.read(yes);
        self
    }
    pub(crate) fn write(&mut self, yes: bool) -> &mut Self {
        self.0.write(yes);
        self
    }
    pub(crate) fn create(&mut self, yes: bool) -> &mut Self {
        self.0.create(yes);
        self
    }
    pub(crate) fn create_new(&mut self, yes: bool) -> &mut Self {
        self.0.create_new(yes);
        self
    }
    pub(crate) fn truncate(&mut self, yes: bool) -> &mut Self {
        self.0.truncate(yes);
        self
    }
    pub(crate) fn mode(&mut self, mode: u32) -> &mut Self {
        self.0.mode(mode);
        self
    }
    pub(crate) fn open(&self, path: impl AsRef<Path>) -> io::Result<File> {
        File::opened(path.as_ref(), |path| self.0.open(path))
    }
}

/// `std::fs::File`, as far as it is used.
pub(crate) struct File {
    file: real::File,
    path: PathBuf,
    number: usize,
    /// Where the next `write` goes.
    at: u64,
}

impl File {
    pub(crate) fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::opened(path.as_ref(), |path| real::File::open(path))
    }

    fn opened(path: &Path, open: impl FnOnce(&Path) -> io::Result<real::File>) -> io::Result<Self> {
        let mut number = usize::MAX;
        let file = recorded(
            path,
            || open(path),
            |record| {
                if path.is_file() {
                    number = *record.names.entry(path.to_owned()).or_insert_with(|| {
                        record.ops.push(Op::Create(path.to_owned(), record.files));
                        record.files += 1;
                        record.files - 1
                    });
                }
            },
        )?;
        Ok(Self { file, path: path.to_owned(), number, at: 0 })
    }

    fn change(&self, run: impl FnOnce(&real::File) -> io::Result<()>, op: Op) -> io::Result<()> {
        recorded(&self.path, || run(&self.file), |record| record.ops.push(op))
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(|file| file.write_all_at(bytes, offset), Op::Write(self.number, offset, bytes.to_vec()))
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|file| file.set_len(len), Op::SetLen(self.number, len))
    }

    pub(crate) fn sync_all(&self) -> io::Result<()> {
        let op = if self.path.is_dir() { Op::SyncDir(self.path.clone()) } else { Op::Sync(self.number) };
        self.change(real::File::sync_all, op)
    }

    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    pub(crate) fn metadata(&self) -> io::Result<real::Metadata> {
        self.file.metadata()
    }
}

impl io::Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `rustix::fs::fallocate` for holes.
pub(crate) fn fallocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> rustix::io::Result<()> {
    assert!(mode.contains(FallocateFlags::PUNCH_HOLE), "no other use is recorded");
    let punch = |real: &real::File| Ok(rustix::fs::fallocate(real, mode, offset, len)?);
    let done = file.change(punch, Op::Punch(file.number, ByteRange::at(offset, len)));
    done.map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))
}

/// What becomes of what was not made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Kept,
    Dropped,
    /// Names arrived, bytes did not: what a missing `fsync` of a file does.
    NamesOnly,
    /// Bytes arrived, names did not: what a missing `fsync` of a folder does.
    BytesOnly,
    /// Any part, by this seed; the last write of a file may be torn.
    Mixed(u64),
}

/// Steps through a record and makes states of the disk.
pub(crate) struct Disk {
    /// What every file has for certain, and what it may have.
    durable: HashMap<usize, Vec<u8>>,
    pending_bytes: BTreeMap<usize, Vec<Op>>,
    names: BTreeMap<PathBuf, usize>,
    pending_names: Vec<Op>,
}

fn apply_bytes(content: &mut Vec<u8>, op: &Op, torn: Option<usize>) {
    match op {
        Op::Write(_, offset, bytes) => {
            let bytes = &bytes[..torn.unwrap_or(bytes.len()).min(bytes.len())];
            let end = *offset as usize + bytes.len();
            content.resize(content.len().max(end), 0);
            content[*offset as usize..end].copy_from_slice(bytes);
        }
        Op::SetLen(_, len) => content.resize(*len as usize, 0),
        Op::Punch(_, range) => {
            let end = (range.end as usize).min(content.len());
            content[(range.start as usize).min(end)..end].fill(0);
        }
        other => panic!("{other:?} changes no bytes"),
    }
}

fn apply_name(names: &mut BTreeMap<PathBuf, usize>, op: &Op) {
    match op {
        Op::Create(path, file) => _ = names.insert(path.clone(), *file),
        Op::Rename(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Op::Unlink(path) => _ = names.remove(path),
        other => panic!("{other:?} changes no name"),
    }
}

fn paths(op: &Op) -> Vec<&PathBuf> {
    match op {
        Op::Create(path, _) | Op::Unlink(path) => vec![path],
        Op::Rename(from, to) => vec![from, to],
        _ => Vec::new(),
    }
}

fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self {
            durable: HashMap::new(),
            pending_bytes: BTreeMap::new(),
            names: BTreeMap::new(),
            pending_names: Vec::new(),
        }
    }

    /// The next call happened.
    pub(crate) fn step(&mut self, op: &Op) {
        match op {
            Op::Create(..) | Op::Rename(..) | Op::Unlink(_) => self.pending_names.push(op.clone()),
            Op::Write(file, ..) | Op::SetLen(file, _) | Op::Punch(file, _) => {
                self.pending_bytes.entry(*file).or_default().push(op.clone());
            }
            Op::Sync(file) => {
                let content = self.durable.entry(*file).or_default();
                for op in self.pending_bytes.remove(file).unwrap_or_default() {
                    apply_bytes(content, &op, None);
                }
            }
            Op::SyncDir(dir) => {
                // Everything of that folder, and whatever a path of it needs from before.
                let within = |op: &Op| paths(op).iter().any(|path| path.parent() == Some(dir));
                let mut needed: HashSet<PathBuf> = HashSet::new();
                let mut keep = vec![false; self.pending_names.len()];
                for (at, op) in self.pending_names.iter().enumerate().rev() {
                    if within(op) || paths(op).iter().any(|path| needed.contains(*path)) {
                        keep[at] = true;
                        needed.extend(paths(op).into_iter().cloned());
                    }
                }
                let mut at = 0;
                let names = &mut self.names;
                self.pending_names.retain(|op| {
                    at += 1;
                    if keep[at - 1] {
                        apply_name(names, op);
                    }
                    !keep[at - 1]
                });
            }
        }
    }

    /// How much is not durable: one state is enough where nothing is.
    pub(crate) fn is_durable(&self) -> bool {
        self.pending_bytes.is_empty() && self.pending_names.is_empty()
    }

    /// The files a crash now may leave.
    pub(crate) fn crashed(&self, fate: Fate) -> BTreeMap<PathBuf, Vec<u8>> {
        let (mut names, mut contents) = (self.names.clone(), self.durable.clone());
        let mut seed = if let Fate::Mixed(seed) = fate { seed } else { 0 };
        let mut lost: HashSet<&PathBuf> = HashSet::new();
        for op in &self.pending_names {
            let kept = match fate {
                Fate::Kept | Fate::NamesOnly => true,
                Fate::Dropped | Fate::BytesOnly => false,
                // What builds on something lost is lost as well.
                Fate::Mixed(_) => !next(&mut seed).is_multiple_of(3) && !paths(op).iter().any(|p| lost.contains(*p)),
            };
            if kept {
                apply_name(&mut names, op);
            } else {
                lost.extend(paths(op));
            }
        }
        for (file, ops) in &self.pending_bytes {
            let content = contents.entry(*file).or_default();
            for op in ops {
                let part = match fate {
                    Fate::Kept | Fate::BytesOnly => None,
                    Fate::Dropped | Fate::NamesOnly => continue,
                    Fate::Mixed(_) => match next(&mut seed) % 4 {
                        0 => continue,
                        1 => Some(next(&mut seed) as usize % 5000),
                        _ => None,
                    },
                };
                apply_bytes(content, op, part);
            }
        }
        names.into_iter().map(|(path, file)| (path, contents.get(&file).cloned().unwrap_or_default())).collect()
    }
}
