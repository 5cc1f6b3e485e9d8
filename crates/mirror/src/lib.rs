//! The mirror: a process of its own on each node that gives lazy local views of the store's versions, as files.
//!
//! ```text
//! <home>/mnt/ram/<id>     RAM file: zeros, ancestors' pages, and its own from a holder or the store   read-only
//! <home>/mnt/disk/<id>    disk overlay: copy-on-reference, copy-on-write                              writable
//! <home>/mnt/blob/<name>/<number>   a version of a blob; written to, an overlay over it: see `tree`
//! <home>/run/mirror.sock  control: JSON lines, see `control`; `client` speaks it
//! any unix socket         NBD exports of disks and of versions
//! <home>/mirror/          descriptions of the objects, layers of the disks
//! ```
//!
//! **It may die at any instant.** All its state is on disk or in the kernel: objects are described by files, file
//! handles carry nothing, requests in hand stay with the session, whose descriptor the hypervisors keep copies of.
//! A new mirror is started with that descriptor, has the kernel send again what the old one had in hand, and goes
//! on; a guest that waited for a page sees a stall and the right bytes. So ending it needs no ceremony: SIGTERM is
//! left at its default, and unmounts nothing.
//!
//! **It never waits for itself**: it never opens a file of its own mount, and of other processes it reads only
//! holders' memory, only pages that the holder owns itself.

#![deny(unsafe_code)]

#[cfg(test)]
#[allow(unsafe_code, reason = "an allocator that takes notes")]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

pub mod client;
pub mod control;
mod core;
mod disk;
mod foresight;
mod front;
mod home;
pub mod nbd;
mod objects;
mod queue;
mod ram;
pub mod resolve;
mod server;
mod stats;
mod store_versions;
mod tree;

pub use client::{Client, ClientError, fuse_fd_of};
pub use control::{Ask, AskAnswer, AskedOf, FilePlace, OpenVersion, Opens};
pub use control::{Below, ExportSource, ExportSpec, OverlaySpec, RamSource, RamSpec};
pub use front::pagemap::{Kind as PageKind, Pagemap};
pub use ram::{Holder, process_start};
pub use resolve::{BlobEntry, BlobVersionEntry, VersionError, Versions};
pub use stats::{BUCKETS, VmStats};
pub use store_versions::{Opened, StoreVersions};

use crate::core::{Core, Problems};
use crate::front::session::Session;
use crate::front::workers;
use crate::home::Home;
use crate::objects::Objects;
use crate::server::Server;
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a mirror waits for the one before it to die, which may be in the middle of a slow write.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(3);

/// How to run a mirror.
#[derive(Debug)]
pub struct Config {
    /// Directory that holds the mount, the socket and the state.
    pub home: PathBuf,
    /// The session to take over; none: mount afresh.
    pub fuse_fd: Option<OwnedFd>,
    /// Workers at the start; more are added when all are busy.
    pub threads: usize,
    /// Bytes the kernel may read ahead of a fault. Fixed for a session at its mount.
    pub max_readahead: u32,
    /// Whether to lock the mirror's memory, so that a fault never waits for swap.
    pub lock_memory: bool,
}

impl Config {
    /// The usual settings.
    #[must_use]
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into(), fuse_fd: None, threads: 4, max_readahead: 4096, lock_memory: false }
    }
}

/// Why a mirror could not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// Another one runs.
    #[error("another mirror serves {}; end it first", home.display())]
    Busy {
        /// Its home.
        home: PathBuf,
    },
    /// Something of its surroundings failed.
    #[error("the mirror of {} cannot {what}: {source}", home.display())]
    Io {
        /// Its home.
        home: PathBuf,
        /// What it was doing.
        what: &'static str,
        /// What happened.
        source: io::Error,
    },
}

/// The control socket of the mirror at `home`.
#[must_use]
pub fn socket_path(home: &Path) -> PathBuf {
    home.join("run/mirror.sock")
}

/// The directory of RAM files of the mirror at `home`.
#[must_use]
pub fn ram_dir(home: &Path) -> PathBuf {
    home.join("mnt/ram")
}

/// The path of a RAM file of the mirror at `home`.
#[must_use]
pub fn ram_path(home: &Path, id: u64) -> PathBuf {
    ram_dir(home).join(format!("{id:016x}"))
}

/// The path of a disk of the mirror at `home`.
#[must_use]
pub fn disk_path(home: &Path, id: u64) -> PathBuf {
    home.join("mnt/disk").join(format!("{id:016x}"))
}

/// The path of a blob's version in the tree of the mirror at `home`.
#[must_use]
pub fn version_path(home: &Path, blob: &str, number: u64) -> PathBuf {
    home.join("mnt/blob").join(tree::directory_of(blob)).join(number.to_string())
}

/// The COMMIT ioctl on a mirrored file: `_IOR('O', 0x10, u64)`. What was written to it becomes the next version of its
/// blob; the number of that version comes back.
pub const IOCTL_COMMIT: u32 = 0x8008_4f10;
/// The CLONE ioctl on a mirrored file: `_IOW('O', 0x11, char[256])`. The file is one of a new blob from now on, whose
/// name is given, ended by a zero byte.
pub const IOCTL_CLONE: u32 = 0x4100_4f11;

/// Runs a mirror until it is told to end or its mount is gone. The caller then exits the process: threads that wait
/// for requests end with it, and with them nothing that a next mirror would miss.
///
/// The control socket answers before the first request of the kernel does.
///
/// # Errors
/// It cannot start, or the session broke.
pub fn run(config: Config, versions: Arc<dyn Versions>) -> Result<(), RunError> {
    let root = config.home.clone();
    let failed = |what| {
        let home = root.clone();
        move |source: io::Error| RunError::Io { home, what, source }
    };
    let home = Home::prepare(&config.home).map_err(failed("make its directories"))?;
    let _lock = lock(&home).map_err(failed("lock its home"))?.ok_or_else(|| RunError::Busy { home: root.clone() })?;
    raise_descriptor_limit();
    home.mount_live().map_err(failed("mount a tmpfs for its live state"))?;
    let objects = Objects::open(home.clone(), versions).map_err(failed("recall its objects"))?;
    let taken_over = config.fuse_fd.is_some();
    let session = match config.fuse_fd {
        Some(fd) => Session::take_over(fd),
        None => Session::mount(&home.mnt()),
    };
    let session = session.map_err(failed("open its FUSE session"))?;
    let session_name = name_session(&home, taken_over).map_err(failed("name its session"))?;
    if config.lock_memory {
        use rustix::mm::{MlockAllFlags, mlockall};
        let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        mlockall(all).map_err(|e| failed("lock its memory")(e.into()))?;
    }
    let (done, end) = mpsc::channel();
    let tree = tree::Tree::open(home.clone(), taken_over).map_err(failed("recall its tree of blobs"))?;
    let core = Arc::new(assemble(home.clone(), objects, tree, (session, session_name), config.max_readahead, done));
    let (server, listener) = Server::bind(core.clone(), home).map_err(failed("open its control socket"))?;
    core.exports.restore(&core);
    let started = spawn("mirror-accept", move || server.serve(&listener))
        .and_then(|()| start_helpers(&core))
        .and_then(|()| workers::start(&core, config.threads.max(1)));
    started.map_err(failed("start its threads"))?;
    end.recv().unwrap_or_else(|_| Err(io::Error::other("all threads are gone"))).map_err(failed("serve its session"))
}

/// A core that nobody works for yet.
fn assemble(
    home: Home,
    objects: Objects,
    tree: tree::Tree,
    (session, session_name): (Session, String),
    max_readahead: u32,
    done: mpsc::Sender<io::Result<()>>,
) -> Core {
    Core {
        exports: front::nbd::Exports::new(home),
        objects,
        tree,
        session,
        session_name,
        vms: stats::Vms::default(),
        demand: queue::Demand::default(),
        prefetch: queue::Prefetch::default(),
        foresight: foresight::Foresight::default(),
        waiting: front::waiting::WaitingRoom::default(),
        problems: Problems::default(),
        crew: workers::Crew::default(),
        direct: front::direct::queue(),
        max_readahead,
        removed: std::sync::Mutex::default(),
        ending: std::sync::atomic::AtomicBool::new(false),
        done,
    }
}

/// The threads behind the workers: reads that wait, and prefetch.
fn start_helpers(core: &Arc<Core>) -> io::Result<()> {
    let waiting = core.clone();
    spawn("mirror-waiting", move || {
        let mut buf = workers::buffer();
        waiting.waiting.work(|read| waiting.try_again(read, &mut buf));
    })?;
    let pool = core.objects.pool.clone();
    spawn("mirror-layers", move || pool.work())?;
    foresight::start(core, spawn)?;
    let asked = core.clone();
    spawn("mirror-asked", move || asked.watch_desk())?;
    let landing = core.clone();
    if core.direct.is_some() {
        spawn("mirror-direct", move || landing.direct.iter().for_each(|aio| landing.answer_landed(aio)))?;
    }
    let ahead = core.clone();
    spawn("mirror-prefetch", move || {
        // Linux gives each thread its own niceness.
        if let Err(e) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10) {
            log::warn!("prefetch runs at full priority: {e}");
        }
        let mut buf = vec![0; Core::PREFETCH_BUFFER];
        ahead.prefetch.work(&ahead.demand, |id, piece, vm| ahead.prefetch_piece(id, piece, vm, &mut buf));
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Each object has a descriptor or three; the usual limit of 1024 would end at some hundred VMs.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 1 << 20;
    let now = getrlimit(Resource::Nofile);
    let hard = now.maximum.map(|m| m.max(WANTED));
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(WANTED), maximum: hard })
        .or_else(|_| setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum }));
    if let Err(e) = raised {
        log::warn!("the limit of open files stays at {:?}: {e}", now.current);
    }
}

/// Holds the home for as long as the process lives; none: another mirror does.
fn lock(home: &Home) -> io::Result<Option<File>> {
    let file = File::create(home.run().join("mirror.lock"))?;
    let began = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < PREDECESSOR_WAIT => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// A name that a session keeps over all its mirrors.
fn name_session(home: &Home, taken_over: bool) -> io::Result<String> {
    let path = home.live().join("session");
    if let (true, Ok(name)) = (taken_over, fs::read_to_string(&path)) {
        return Ok(name);
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let name = format!("{:x}-{}", since.as_nanos(), std::process::id());
    fs::write(&path, &name)?;
    Ok(name)
}
