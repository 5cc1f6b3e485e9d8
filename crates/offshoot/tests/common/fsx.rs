//! Random operations on a file of fixed size against a model: what `fsx` of the file systems' test suites does, which
//! no package carries.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The longest a single operation reaches, in bytes.
const REACH: u64 = 200_000;

/// A file, what it must hold, and chance.
pub(crate) struct Fsx {
    file: File,
    model: Vec<u8>,
    state: u64,
    done: Vec<String>,
}

impl Fsx {
    /// Of the file at `path`, as it is. The seed is printed, so that a failure can be had again.
    pub(crate) fn of(path: &Path, seed: u64) -> Self {
        eprintln!("fsx of {} from seed {seed}", path.display());
        let file = open(path);
        let mut model = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut model, 0).unwrap();
        Self { file, model, state: seed | 1, done: Vec::new() }
    }

    /// Chance below `most`.
    pub(crate) fn chance(&mut self, most: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % most
    }

    /// What the file must hold.
    pub(crate) fn model(&self) -> &[u8] {
        &self.model
    }

    /// The file, open for reading and writing.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Opens another path from now on, which must hold the same.
    pub(crate) fn reopen(&mut self, path: &Path) {
        self.file = open(path);
        self.done.push(format!("open {}", path.display()));
    }

    /// A place: often at the edges of blocks, often small.
    fn place(&mut self) -> (u64, usize) {
        let size = self.model.len() as u64;
        let mut at = self.chance(size);
        if self.chance(3) == 0 {
            at -= at % 4096;
        }
        let reach = if self.chance(2) == 0 { 5000 } else { REACH };
        let mut len = 1 + self.chance(reach).min(size - at - 1);
        if self.chance(3) == 0 && len > 4096 {
            len -= len % 4096;
        }
        (at, len as usize)
    }

    /// One operation.
    pub(crate) fn step(&mut self) {
        use rustix::fs::{FallocateFlags, fallocate};
        let (at, len) = self.place();
        let range = at as usize..at as usize + len;
        let what = self.chance(20);
        self.done.push(format!("{what} {at} {len}"));
        match what {
            0..=6 => {
                let fill = self.chance(255) as u8;
                let bytes: Vec<u8> = (0..len).map(|n| fill ^ (n as u8) ^ ((n >> 8) as u8)).collect();
                self.file.write_all_at(&bytes, at).unwrap();
                self.model[range].copy_from_slice(&bytes);
            }
            7..=14 => {
                let mut bytes = vec![0xee; len];
                self.file.read_exact_at(&mut bytes, at).unwrap();
                self.same(&bytes, range.start);
            }
            15 | 16 => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, punch, at, len as u64).unwrap();
                self.model[range].fill(0);
            }
            17 => {
                fallocate(&self.file, FallocateFlags::ZERO_RANGE, at, len as u64).unwrap();
                self.model[range].fill(0);
            }
            18 => self.file.sync_data().unwrap(),
            _ => self.seek(at),
        }
    }

    /// What is said to be a hole is zero.
    fn seek(&mut self, at: u64) {
        use rustix::fs::{SeekFrom, seek};
        let end = self.model.len() as u64;
        let data = seek(&self.file, SeekFrom::Data(at)).unwrap_or(end);
        assert!(
            data >= at && self.model[at as usize..data as usize].iter().all(|&b| b == 0),
            "{at}..{data} is no hole"
        );
        assert!(seek(&self.file, SeekFrom::Hole(at)).unwrap() >= at);
    }

    /// Somebody else wrote.
    pub(crate) fn written(&mut self, at: u64, bytes: &[u8]) {
        self.done.push(format!("written {at} {}", bytes.len()));
        self.model[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// The whole file is what it must be.
    pub(crate) fn check(&self) {
        let mut bytes = vec![0xee; self.model.len()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.same(&bytes, 0);
    }

    fn same(&self, bytes: &[u8], from: usize) {
        let Some(wrong) = bytes.iter().zip(&self.model[from..]).position(|(a, b)| a != b) else { return };
        let last = &self.done[self.done.len().saturating_sub(30)..];
        panic!("byte {} is wrong; operation {}, the last: {last:?}", from + wrong, self.done.len());
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
