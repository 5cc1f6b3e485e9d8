//! Writing a disk to a file: raw, with its holes, or qcow2.
//!
//! The disk is read over an NBD export that lives as long as this command. What of it is data is known before the
//! first byte is read; so the whole file is laid out at once, and several connections fill it in parallel.
//!
//! The file has no name until it is whole and durable: a command that ends early, however it ends, leaves nothing.

mod qcow2;

use base::ByteRange;
use mirror::nbd::NbdClient;
use qcow2::Layout;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, mpsc};

/// Connections at once.
const CONNECTIONS: usize = 4;
/// Bytes read at a time.
const PIECE: u64 = 2 << 20;

/// How a disk is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// As it is, with holes where it is zero
    Raw,
    /// QEMU's format, version 3, not compressed
    Qcow2,
}

/// Some bytes of the disk, and their place in the file.
struct Piece {
    from: ByteRange,
    to: u64,
}

/// What is removed when the user ends the command: the file, where it must have a name from the start.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Writes the disk served at `socket` to `file`. `progress` is told bytes done and in all.
///
/// # Errors
/// The disk cannot be read, or the file not written; it is then not there, or as it was.
pub(crate) fn to_file(
    socket: &Path,
    file: &Path,
    format: Format,
    force: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, String> {
    let nbd = |e: io::Error| format!("reading the disk: {e}");
    let write = |e: io::Error| format!("writing {}: {e}", file.display());
    clean_up_when_interrupted();
    let mut client = NbdClient::connect(socket).map_err(nbd)?;
    let (size, data) = (client.size(), client.data_ranges().map_err(nbd)?);
    let target = Target::make(file, force).map_err(write)?;
    let pieces = match format {
        Format::Raw => {
            target.out.set_len(size).map_err(write)?;
            cut(data.iter().map(|range| (*range, range.start)), size)
        }
        Format::Qcow2 => {
            let layout = Layout::new(size, &data);
            target.out.set_len(layout.file_size()).map_err(write)?;
            for (at, bytes) in layout.metadata() {
                target.out.write_all_at(&bytes, at).map_err(write)?;
            }
            cut(layout.data(), size)
        }
    };
    let total = pieces.iter().map(|piece| piece.from.len()).sum();
    copy(socket, client, &target.out, pieces, &mut |done| progress(done, total))?;
    target.settle().map_err(write)?;
    Ok(size)
}

/// Streams the disk served at `socket`, raw, holes as zeros.
///
/// # Errors
/// The disk cannot be read, or `out` not be written.
pub(crate) fn to_stream(socket: &Path, out: &mut dyn Write, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, String> {
    let nbd = |e: io::Error| format!("reading the disk: {e}");
    let mut client = NbdClient::connect(socket).map_err(nbd)?;
    let (size, data) = (client.size(), client.data_ranges().map_err(nbd)?);
    let stdout = |e: io::Error| format!("writing to the standard output: {e}");
    let (mut at, mut buf, zeros) = (0, vec![0; PIECE as usize], vec![0; PIECE as usize]);
    // An empty range at the end, so that a last hole comes before a range as all others do.
    for range in data.into_iter().chain([ByteRange::new(size, size)]) {
        while at < range.end {
            let hole = at < range.start;
            let end = if hole { range.start } else { range.end }.min(at + PIECE);
            let len = (end - at) as usize;
            if !hole {
                client.read_at(at, &mut buf[..len]).map_err(nbd)?;
            }
            out.write_all(if hole { &zeros[..len] } else { &buf[..len] }).map_err(stdout)?;
            at = end;
            progress(at, size);
        }
    }
    out.flush().map_err(stdout)?;
    Ok(size)
}

/// Cuts runs into pieces, and off what lies past the disk's end.
fn cut(runs: impl Iterator<Item = (ByteRange, u64)>, size: u64) -> Vec<Piece> {
    let mut out = Vec::new();
    for (run, to) in runs {
        let mut at = run.start;
        while at < run.end.min(size) {
            let end = (at + PIECE).min(run.end).min(size);
            out.push(Piece { from: ByteRange::new(at, end), to: to + at - run.start });
            at = end;
        }
    }
    out
}

/// Copies all pieces, over several connections.
fn copy(
    socket: &Path,
    first: NbdClient,
    out: &File,
    pieces: Vec<Piece>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), String> {
    let mut clients = vec![first];
    while clients.len() < CONNECTIONS.min(pieces.len()) {
        clients.push(NbdClient::connect(socket).map_err(|e| format!("reading the disk: {e}"))?);
    }
    let queue = Mutex::new(pieces.into_iter());
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        for mut client in clients {
            let (tell, queue) = (tell.clone(), &queue);
            scope.spawn(move || {
                let mut buf = vec![0; PIECE as usize];
                let next = || queue.lock().expect("no holder panics").next();
                while let Some(piece) = next() {
                    let bytes = &mut buf[..piece.from.len() as usize];
                    let copied = client
                        .read_at(piece.from.start, bytes)
                        .map_err(|e| format!("reading the disk at {}: {e}", piece.from.start))
                        .and_then(|()| out.write_all_at(bytes, piece.to).map_err(|e| format!("writing: {e}")));
                    let failed = copied.is_err();
                    if tell.send(copied.map(|()| piece.from.len())).is_err() || failed {
                        return;
                    }
                }
            });
        }
        drop(tell);
        let mut done = 0;
        let mut outcome = Ok(());
        loop {
            match told.recv() {
                Ok(Ok(bytes)) => {
                    done += bytes;
                    progress(done);
                }
                Ok(Err(why)) => outcome = Err(why),
                Err(mpsc::RecvError) => return outcome,
            }
            if outcome.is_err() {
                // Whoever is at work finds the queue empty.
                queue.lock().expect("no holder panics").by_ref().for_each(drop);
            }
        }
    })
}

/// A file that gets its name when it is whole.
struct Target {
    out: File,
    path: PathBuf,
    /// Its name until then, where it must have one.
    named: Option<PathBuf>,
    force: bool,
}

impl Target {
    fn make(path: &Path, force: bool) -> io::Result<Self> {
        match path.symlink_metadata() {
            Ok(there) if !there.is_file() => {
                return Err(io::Error::other("something that is no plain file is there; choose another name"));
            }
            Ok(_) if !force => return Err(io::Error::other("it is there already; --force replaces it")),
            _ => {}
        }
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let mode = Mode::from_raw_mode(0o666);
        let nameless = rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode);
        let (out, named) = match nameless {
            Ok(fd) => (File::from(fd), None),
            // A file system that knows no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let named = hidden(path);
                *UNFINISHED.lock().expect("no holder panics") = Some(named.clone());
                (File::options().read(true).write(true).create_new(true).open(&named)?, Some(named))
            }
            Err(e) => return Err(e.into()),
        };
        Ok(Self { out, path: path.to_owned(), named, force })
    }

    /// Makes it durable, and gives it its name.
    fn settle(mut self) -> io::Result<()> {
        self.out.sync_all()?;
        let unnamed = PathBuf::from(format!("/proc/self/fd/{}", self.out.as_raw_fd()));
        let from = self.named.clone().unwrap_or(unnamed);
        let link = |to: &Path| rustix::fs::linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW);
        match link(&self.path) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) if self.force => {
                let named = match self.named.take() {
                    Some(named) => named,
                    None => {
                        let named = hidden(&self.path);
                        link(&named)?;
                        named
                    }
                };
                std::fs::rename(&named, &self.path).inspect_err(|_| drop(std::fs::remove_file(&named)))
            }
            Err(Errno::EXIST) => Err(io::Error::other("it has come to be there meanwhile; --force replaces it")),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(named) = &self.named {
            let _ = std::fs::remove_file(named);
        }
    }
}

/// A name beside `path` that nobody else chooses.
fn hidden(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}", std::process::id()))
}

/// From now on ^C and SIGTERM end the command only after what was begun is removed; the export ends with its
/// connections.
fn clean_up_when_interrupted() {
    let watch = || -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
            let code = tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
            };
            if let Some(named) = UNFINISHED.lock().expect("no holder panics").take() {
                let _ = std::fs::remove_file(named);
            }
            std::process::exit(code)
        })
    };
    // Without it the command ends at once, which leaves nothing on file systems with nameless files.
    let _ = std::thread::Builder::new().name("signals".to_owned()).spawn(watch);
}

#[cfg(test)]
mod tests;
