//! A layer: what one overlay wrote or fetched between two marks. A sparse data file, and a state for each block.
//!
//! Order of writes, so that a kill at any instant leaves either the old block or the new one:
//! - *absent or zero to data*: the whole block's data first, then its state (a stale byte never shows);
//! - *clean to dirty*: the state first, then the data (a block called clean always equals what lies below);
//! - *to zero*: the state first, then the hole.
//!
//! A power loss goes back to the durable states of the last flush, which were written after the data they speak
//! of was made durable. They call clean blocks absent: one might have become dirty since, unflushed.
//!
//! Long writes go past the page cache: they would be copied once more, wait for each other, and be written back while
//! the guest goes on. Short ones are gathered in it until they are flushed. The two kinds exclude each other in one
//! layer: a page that is made dirty beside a direct write, in one folio with what that writes, cannot be dropped when
//! the write ends, and would show old bytes.

use super::states::{CHUNK, State, StateMap};
use crate::home::{Home, at, sync_dir};
use base::ByteRange;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::ReadWriteFlags;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock};

/// Blocks under one lock, and how many locks: a request of 1 MiB takes a handful.
const REGION_BLOCKS: u64 = 64;
const LOCKS: usize = 128;

/// What reads and writes past the page cache must be aligned to: enough for every block device there is.
const DIRECT_ALIGN: u64 = 4096;
/// The shortest write that goes past the page cache.
const DIRECT_WRITE_MIN: usize = 128 << 10;
/// States made durable at a time, in chunks.
const FLUSH_CHUNKS: usize = 4096;

/// One layer's files, open.
pub(crate) struct Layer {
    id: u64,
    block_size: u64,
    states: StateMap,
    data: File,
    /// The same file with O_DIRECT, where the file system has that.
    direct: Option<File>,
    live: File,
    durable_path: PathBuf,
    data_path: PathBuf,
    /// Held by a flush, so that an older one never overwrites a newer one's states. Holds the durable file.
    durable: Mutex<Option<File>>,
    /// Data written since the last flush.
    unsynced: AtomicBool,
    locks: Box<[Mutex<()>]>,
    /// Held alone by whoever writes data through the page cache, and together by those who write past it. (File systems
    /// let one buffered write of a file in at a time, and threads that wait for that in the kernel spin, which costs the
    /// one that works its processor.)
    writing: RwLock<()>,
}

/// Exclusive hold of some blocks of a layer.
pub(crate) struct Hold<'a> {
    layer: &'a Layer,
    blocks: Range<u64>,
    _guards: Vec<MutexGuard<'a, ()>>,
}

/// A data file that no layer has written to yet.
#[derive(Debug)]
pub(crate) struct Blank {
    id: u64,
    data: File,
    direct: Option<File>,
}

impl Blank {
    /// Opens or makes the data file of layer `id`. It is as long as what was written to it.
    pub(crate) fn open(home: &Home, id: u64) -> io::Result<Self> {
        let path = home.layer_data(id);
        let data = open_or_create(&path)?;
        let direct = options().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(&path);
        let direct = direct.inspect_err(|e| log::debug!("{}: no O_DIRECT: {e}", path.display())).ok();
        Ok(Self { id, data, direct })
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

fn open_or_create(path: &Path) -> io::Result<File> {
    options().open(path).map_err(|e| at(path, e))
}

/// Whether these bytes of a file can be read or written past the page cache.
pub(crate) fn is_direct(offset: u64, len: u64) -> bool {
    offset.is_multiple_of(DIRECT_ALIGN) && len.is_multiple_of(DIRECT_ALIGN)
}

impl Layer {
    /// Makes a layer of `blocks` blocks around an empty data file.
    pub(crate) fn create(home: &Home, blank: Blank, blocks: u64, block_size: u64) -> io::Result<Self> {
        Self::open_files(home, blank, blocks, block_size)
    }

    /// Opens a layer in the boot that made it.
    pub(crate) fn open_live(home: &Home, id: u64, blocks: u64, block_size: u64) -> io::Result<Self> {
        let layer = Self::open_files(home, Blank::open(home, id)?, blocks, block_size)?;
        layer.load(&layer.live, |state| state)?;
        Ok(layer)
    }

    /// Opens a layer after a power loss: as of its last flush, without what was only cached.
    pub(crate) fn open_durable(home: &Home, id: u64, blocks: u64, block_size: u64) -> io::Result<Self> {
        let layer = Self::open_files(home, Blank::open(home, id)?, blocks, block_size)?;
        match File::open(&layer.durable_path) {
            Ok(file) => layer.load(&file, |state| if state.is_dirty() { state } else { State::Absent })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at(&layer.durable_path, e)),
        }
        for (state, run) in layer.states.runs() {
            layer.record_live(&run, state)?;
        }
        Ok(layer)
    }

    fn open_files(home: &Home, blank: Blank, blocks: u64, block_size: u64) -> io::Result<Self> {
        let Blank { id, data, direct } = blank;
        let live_path = home.layer_live_states(id);
        Ok(Self {
            id,
            block_size,
            states: StateMap::new(blocks),
            data,
            direct,
            live: open_or_create(&live_path)?,
            durable_path: home.layer_durable_states(id),
            data_path: home.layer_data(id),
            durable: Mutex::new(None),
            unsynced: AtomicBool::new(true),
            locks: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            writing: RwLock::new(()),
        })
    }

    /// Reads a file of states, skipping its holes.
    fn load(&self, file: &File, keep: impl Fn(State) -> State) -> io::Result<()> {
        let mut codes = [0; CHUNK as usize];
        let mut offset = 0;
        loop {
            offset = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
                Ok(next) => next,
                Err(rustix::io::Errno::NXIO) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let got = file.read_at(&mut codes, offset)?;
            if got == 0 {
                return Ok(());
            }
            for (block, &code) in (offset..).zip(&codes[..got]) {
                let wrong = || io::Error::other(format!("layer {:016x}: block {block} has no state {code}", self.id));
                let state = keep(State::from_code(code).ok_or_else(wrong)?);
                if state == State::Absent {
                    continue;
                }
                if block >= self.states.blocks() {
                    return Err(io::Error::other(format!("layer {:016x} has no block {block}", self.id)));
                }
                self.states.set(block..block + 1, state);
            }
            offset += got as u64;
        }
    }

    /// Its name.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Where its data lies.
    pub(crate) fn data_path(&self) -> &PathBuf {
        &self.data_path
    }

    /// The state of `block`, and the end of its run, at most `limit`.
    pub(crate) fn run(&self, block: u64, limit: u64) -> (State, u64) {
        self.states.run(block, limit)
    }

    /// Reads data bytes; meaningful only where the state says so.
    pub(crate) fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    /// The data file through the page cache.
    pub(crate) fn data(&self) -> &File {
        &self.data
    }

    /// The data file past the page cache: offsets, lengths and addresses must be aligned.
    pub(crate) fn direct(&self) -> Option<&File> {
        self.direct.as_ref()
    }

    /// As [`Layer::read_data`], but only where no disk has to be waited for; false: it would be.
    pub(crate) fn read_data_now(&self, offset: u64, buf: &mut [u8]) -> bool {
        let mut parts = [IoSliceMut::new(buf)];
        let len = parts[0].len();
        rustix::io::preadv2(&self.data, &mut parts, offset, ReadWriteFlags::NOWAIT).is_ok_and(|got| got == len)
    }

    /// The ranges of bytes that the guest wrote, and those it zeroed.
    pub(crate) fn changes(&self) -> (Vec<ByteRange>, Vec<ByteRange>) {
        let (mut written, mut zeroed) = (Vec::new(), Vec::new());
        for (state, run) in self.states.runs() {
            let bytes = ByteRange::new(run.start * self.block_size, run.end * self.block_size);
            match state {
                State::Dirty => written.push(bytes),
                State::DirtyZero => zeroed.push(bytes),
                State::Absent | State::Clean | State::CleanZero => {}
            }
        }
        (written, zeroed)
    }

    /// Waits until nobody else changes `blocks`, and keeps others out.
    pub(crate) fn hold(&self, blocks: Range<u64>) -> Hold<'_> {
        let first = blocks.start / REGION_BLOCKS;
        let last = (blocks.end - 1) / REGION_BLOCKS;
        let mut which: Vec<usize> = (first..=last).take(LOCKS).map(|r| (r % LOCKS as u64) as usize).collect();
        // One order for all, or two wide requests could each wait for the other.
        which.sort_unstable();
        let guards = which.into_iter().map(|i| self.locks[i].lock().expect("no holder panics")).collect();
        Hold { layer: self, blocks, _guards: guards }
    }

    /// Makes durable all that was written before the call.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let mut durable = self.durable.lock().expect("no flusher panics");
        let mut first = 0;
        loop {
            // The states before the data that they speak of, whoever writes meanwhile.
            let (taken, next) = self.states.take_touched(first, FLUSH_CHUNKS);
            let unsynced = self.unsynced.swap(false, Ordering::AcqRel);
            let done = self.sync_taken(&mut durable, &taken, unsynced);
            if done.is_err() {
                self.states.touch_again(&taken);
                self.unsynced.store(true, Ordering::Release);
            }
            done?;
            first = match next {
                Some(next) => next,
                None => return Ok(()),
            };
        }
    }

    fn sync_taken(&self, durable: &mut Option<File>, taken: &[(u64, Vec<u8>)], unsynced: bool) -> io::Result<()> {
        if unsynced {
            self.data.sync_data()?;
        }
        if taken.is_empty() && durable.is_some() {
            return Ok(());
        }
        let fresh = durable.is_none();
        let file = match durable.take() {
            Some(file) => file,
            None => open_or_create(&self.durable_path)?,
        };
        let file = durable.insert(file);
        for (number, codes) in taken {
            file.write_all_at(codes, number * CHUNK)?;
        }
        file.sync_data()?;
        if fresh { sync_dir(&self.durable_path) } else { Ok(()) }
    }

    /// Writes states where they survive this process, then says them to readers.
    fn record(&self, run: Range<u64>, state: State) -> io::Result<()> {
        if self.states.run(run.start, run.end) == (state, run.end) {
            return Ok(());
        }
        self.record_live(&run, state)?;
        self.states.set(run, state);
        Ok(())
    }

    fn record_live(&self, run: &Range<u64>, state: State) -> io::Result<()> {
        self.live.write_all_at(&vec![state as u8; (run.end - run.start) as usize], run.start)
    }

    fn write_data(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let long = data.len() >= DIRECT_WRITE_MIN && is_direct(offset | data.as_ptr().addr() as u64, data.len() as u64);
        let direct = self.direct.as_ref().filter(|_| long).map(|file| {
            let _turn = self.writing.read().expect("no writer panics");
            file.write_all_at(data, offset)
        });
        let written = match direct {
            Some(Ok(())) => Ok(()),
            // The error, if it is one, comes again; some file systems take O_DIRECT and refuse single requests.
            Some(Err(_)) | None => {
                let _turn = self.writing.write().expect("no writer panics");
                self.data.write_all_at(data, offset)
            }
        };
        self.unsynced.store(true, Ordering::Release);
        written
    }
}

impl Hold<'_> {
    fn check(&self, run: &Range<u64>) {
        assert!(self.blocks.start <= run.start && run.end <= self.blocks.end, "{run:?} not held: {:?}", self.blocks);
    }

    /// The guest wrote whole blocks.
    pub(crate) fn write_blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let run = first..first + data.len() as u64 / self.layer.block_size;
        self.check(&run);
        assert!((data.len() as u64).is_multiple_of(self.layer.block_size), "{} bytes are not whole blocks", data.len());
        let mut at = run.start;
        while at < run.end {
            let (state, end) = self.layer.run(at, run.end);
            if state == State::Clean {
                self.layer.record(at..end, State::Dirty)?;
            }
            at = end;
        }
        self.layer.write_data(run.start * self.layer.block_size, data)?;
        self.layer.record(run, State::Dirty)
    }

    /// The guest wrote a part of a block whose data are here.
    pub(crate) fn write_within(&self, block: u64, within: u64, data: &[u8]) -> io::Result<()> {
        self.check(&(block..block + 1));
        assert!(matches!(self.layer.run(block, block + 1).0, State::Clean | State::Dirty), "block {block} has no data");
        self.layer.record(block..block + 1, State::Dirty)?;
        self.layer.write_data(block * self.layer.block_size + within, data)
    }

    /// The guest zeroed or discarded whole blocks. With `keep_space` the room for them is there when they are written
    /// again, or there is an error now; else it is given back.
    pub(crate) fn zero_blocks(&self, run: Range<u64>, keep_space: bool) -> io::Result<()> {
        self.check(&run);
        let (offset, len) = (run.start * self.layer.block_size, (run.end - run.start) * self.layer.block_size);
        if keep_space {
            match rustix::fs::fallocate(&self.layer.data, FallocateFlags::KEEP_SIZE, offset, len) {
                // A file system that cannot promise room has none to keep.
                Err(rustix::io::Errno::OPNOTSUPP) | Ok(()) => {}
                Err(e) => return Err(e.into()),
            }
            return self.layer.record(run, State::DirtyZero);
        }
        self.layer.record(run.clone(), State::DirtyZero)?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Of a page that it divides the file system writes the zeros through the page cache.
        let _turn = (!is_direct(offset, len)).then(|| self.layer.writing.write().expect("no writer panics"));
        match rustix::fs::fallocate(&self.layer.data, punch, offset, len) {
            // The state already says zero; the hole only gives space back.
            Err(rustix::io::Errno::OPNOTSUPP) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Keeps whole blocks fetched from below, where nothing has come to lie meanwhile.
    pub(crate) fn keep(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let size = self.layer.block_size as usize;
        let run = first..first + (data.len() / size) as u64;
        self.check(&run);
        let zero: Vec<bool> = data.chunks(size).map(is_zero).collect();
        let mut at = run.start;
        while at < run.end {
            let (state, mut end) = self.layer.run(at, run.end);
            if state == State::Absent {
                let index = (at - run.start) as usize;
                end = (at..end).find(|b| zero[(b - run.start) as usize] != zero[index]).unwrap_or(end);
                if zero[index] {
                    self.layer.record(at..end, State::CleanZero)?;
                } else {
                    let bytes = &data[index * size..(end - run.start) as usize * size];
                    self.layer.write_data(at * self.layer.block_size, bytes)?;
                    self.layer.record(at..end, State::Clean)?;
                }
            }
            at = end;
        }
        Ok(())
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (head, words, tail) = (bytes.len() % 16, bytes.chunks_exact(16), bytes.len() - bytes.len() % 16);
    words.into_iter().all(|w| u128::from_ne_bytes(w.try_into().expect("16 bytes")) == 0)
        && (head == 0 || bytes[tail..].iter().all(|&b| b == 0))
}
