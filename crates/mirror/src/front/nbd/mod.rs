//! The NBD front: exports, each on a unix socket of its own, spoken to as the NBD project's `doc/proto.md` says (fixed
//! newstyle handshake, structured replies, block status).
//!
//! Exports are described by a file beside the objects' descriptions: a mirror that replaces another serves the same
//! ones on the same sockets, and clients connect again. Every connection sees one disk, and a flush on one covers
//! what was answered on all.

mod connection;
mod disk;
#[cfg(test)]
mod fuzz;
mod handshake;
pub(crate) mod wire;

use crate::control::{ExportEntry, ExportSource, ExportSpec};
use crate::core::Core;
use crate::foresight::disk::Reads;
use crate::front::buffer::Pool;
use crate::home::{Home, read_json, remove_if_there, replace_json};
use connection::Connection;
use disk::Disk;
use handshake::{Offer, shake};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use wire::can;

/// Connections of all exports together.
const CONNECTIONS_MAX: usize = 256;
/// Connections of one export.
const CONNECTIONS_OF_ONE: usize = 64;
/// Workers of all connections, the first of each not counted.
const WORKERS_MAX: usize = 128;
/// Buffers kept for long requests: what one fast client has under way.
const LONG_KEPT: usize = 8;
/// A client must have agreed after so long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// An export that ends with its last connection ends as well when none came for so long.
const UNUSED: Duration = Duration::from_secs(10);
/// How long the end of an export waits for requests in hand.
const LAST_REQUESTS: Duration = Duration::from_secs(20);
/// Room for the name a socket has before it is ready.
const SOCKET_PATH_MAX: usize = 100;
/// Bytes on their way to a client; root may have more than others.
const SEND_BUFFER: usize = 2 << 20;

/// All exports.
pub(crate) struct Exports {
    home: Home,
    map: Mutex<BTreeMap<String, Arc<Export>>>,
    /// One change of the list at a time.
    admin: Mutex<()>,
    connections: AtomicUsize,
    workers: AtomicUsize,
    /// Buffers for long requests.
    long: Pool,
}

/// One export.
pub(crate) struct Export {
    spec: ExportSpec,
    disk: Disk,
    listener: UnixListener,
    clients: Mutex<BTreeMap<u64, UnixStream>>,
    gone: Condvar,
    next: AtomicU64,
    stopped: AtomicBool,
}

impl Export {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn offer(&self) -> Offer<'_> {
        let writable = if self.spec.read_only {
            can::READ_ONLY
        } else {
            can::FUA | can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO
        };
        Offer {
            name: &self.spec.name,
            description: &self.spec.description,
            size: self.disk.size(),
            block_size: self.disk.block_size(),
            flags: can::FLAGS | can::FLUSH | can::MULTI_CONN | can::CACHE | writable,
            changes: self.disk.overlay().is_some(),
        }
    }

    /// Ends all connections and waits until their requests are done.
    fn end(&self) {
        self.stopped.store(true, Ordering::Release);
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let clients = self.clients.lock().expect("no holder panics");
        for stream in clients.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let waited = self.gone.wait_timeout_while(clients, LAST_REQUESTS, |clients| !clients.is_empty());
        if waited.expect("no holder panics").1.timed_out() {
            log::warn!("export {}: requests still in hand after {LAST_REQUESTS:?}", self.spec.name);
        }
    }
}

impl Exports {
    /// None yet.
    pub(crate) fn new(home: Home) -> Self {
        Self {
            home,
            map: Mutex::default(),
            admin: Mutex::default(),
            connections: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            long: Pool::new(LONG_KEPT),
        }
    }

    /// Serves again what the last mirror of this boot served.
    pub(crate) fn restore(&self, core: &Arc<Core>) {
        if !self.path().exists() {
            return;
        }
        let specs: Vec<ExportSpec> = read_json(&self.path()).unwrap_or_else(|e| {
            log::error!("the list of exports cannot be read, none is served again: {e}");
            Vec::new()
        });
        for spec in specs {
            let name = spec.name.clone();
            if let Err(why) = self.start(core, spec) {
                log::error!("export {name} is not served again: {why}");
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.home.live().join("exports.json")
    }

    fn save(&self) -> Result<(), String> {
        let specs: Vec<ExportSpec> = self.all().iter().map(|e| e.spec.clone()).collect();
        replace_json(&self.path(), &specs).map_err(|e| format!("the list of exports cannot be kept: {e}"))
    }

    fn all(&self) -> Vec<Arc<Export>> {
        self.map.lock().expect("no holder panics").values().cloned().collect()
    }

    /// Adds an export, and serves it.
    pub(crate) fn add(&self, core: &Arc<Core>, spec: ExportSpec) -> Result<(), String> {
        let _admin = self.admin.lock().expect("no admin panics");
        if let Some(there) = self.map.lock().expect("no holder panics").get(&spec.name) {
            return if there.spec == spec { Ok(()) } else { Err(format!("export {} is there already", spec.name)) };
        }
        let name = spec.name.clone();
        self.start(core, spec)?;
        self.save().inspect_err(|_| {
            if let Some(export) = self.map.lock().expect("no holder panics").remove(&name) {
                export.end();
                let _ = remove_if_there(&export.spec.socket);
            }
        })
    }

    fn start(&self, core: &Arc<Core>, spec: ExportSpec) -> Result<(), String> {
        if spec.name.is_empty() || spec.name.len() > 255 {
            return Err("an export's name has 1 to 255 bytes".to_owned());
        }
        let disk = match &spec.source {
            ExportSource::Overlay(id) => {
                Disk::Overlay(core.objects.overlay(*id).ok_or_else(|| format!("there is no overlay {id:016x}"))?)
            }
            ExportSource::Version { version, size, block_size } => {
                if !block_size.is_power_of_two() || *block_size > 1 << 20 || *size > i64::MAX as u64 {
                    return Err(format!("a disk of {size} bytes in blocks of {block_size} cannot be"));
                }
                if !spec.read_only {
                    return Err("a version cannot be written; export an overlay over it".to_owned());
                }
                let version = version.as_str().into();
                Disk::Version { version, size: *size, block_size: *block_size, reads: Reads::default() }
            }
        };
        let listener = bind(&spec.socket).map_err(|e| format!("{}: {e}", spec.socket.display()))?;
        let (clients, gone) = (Mutex::default(), Condvar::new());
        let stopped = AtomicBool::new(false);
        let export = Arc::new(Export { spec, disk, listener, clients, gone, next: AtomicU64::new(0), stopped });
        let (theirs, mine) = (core.clone(), export.clone());
        std::thread::Builder::new()
            .name("mirror-nbd".to_owned())
            .spawn(move || accept(&theirs, &mine))
            .map_err(|e| format!("no thread for it: {e}"))?;
        self.map.lock().expect("no holder panics").insert(export.spec.name.clone(), export);
        Ok(())
    }

    /// Ends an export: its socket goes, its connections end, what was written is made durable. Whether it was there.
    pub(crate) fn remove(&self, core: &Core, name: &str) -> Result<bool, String> {
        let _admin = self.admin.lock().expect("no admin panics");
        let Some(export) = self.map.lock().expect("no holder panics").remove(name) else { return Ok(false) };
        // Forgotten first: a mirror that dies from here on is not replaced by one that serves it again.
        let saved = self.save();
        let removed = remove_if_there(&export.spec.socket).map_err(|e| e.to_string());
        export.end();
        let flushed = match export.disk.overlay().filter(|_| !export.spec.read_only) {
            Some(id) => core.objects.flush(id).map_err(|e| e.to_string()),
            None => Ok(()),
        };
        saved.and(removed).and(flushed).map(|()| true)
    }

    /// Ends all, for good.
    pub(crate) fn remove_all(&self, core: &Core) {
        for export in self.all() {
            if let Err(why) = self.remove(core, &export.spec.name) {
                log::error!("ending export {}: {why}", export.spec.name);
            }
        }
    }

    /// Every export.
    pub(crate) fn list(&self) -> Vec<ExportEntry> {
        let entry = |export: &Arc<Export>| ExportEntry {
            spec: export.spec.clone(),
            connections: export.clients.lock().expect("no holder panics").len() as u64,
        };
        self.all().iter().map(entry).collect()
    }

    /// The export that serves an overlay.
    pub(crate) fn of_overlay(&self, id: u64) -> Option<String> {
        self.all().iter().find(|e| e.disk.overlay() == Some(id)).map(|e| e.spec.name.clone())
    }

    /// Looks at what was read of a version that is served, and how many blocks it has.
    pub(crate) fn reads_of<T>(
        &self,
        name: &str,
        see: impl FnOnce(&Reads, u64) -> Result<T, String>,
    ) -> Result<T, String> {
        let export = self.map.lock().expect("no holder panics").get(name).cloned();
        match export.as_ref().map(|export| &export.disk) {
            Some(Disk::Version { size, block_size, reads, .. }) => see(reads, size.div_ceil(*block_size)),
            Some(Disk::Overlay(overlay)) => see(&overlay.reads, overlay.size.div_ceil(overlay.block_size)),
            None => Err(format!("there is no export {name}")),
        }
    }

    /// Whether there may be another worker, who then counts.
    fn may_hire(&self) -> bool {
        let hired = self.workers.fetch_add(1, Ordering::AcqRel) < WORKERS_MAX;
        if !hired {
            self.dismiss();
        }
        hired
    }

    /// A worker has ended.
    fn dismiss(&self) {
        self.workers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Opens a listening socket that only we may connect to, in place of one that nobody listens at.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if !path.is_absolute() || path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(io::Error::other(format!("write an absolute path of at most {SOCKET_PATH_MAX} bytes")));
    }
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::other("something that is no socket is there already; choose another path"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::Error::other("somebody listens there already; choose another path"));
        }
        _ => {}
    }
    // Bound under another name and then renamed, so that the name never leads to a socket of another mode.
    let hidden = PathBuf::from(format!("{}.new", path.display()));
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    let placed = fs::set_permissions(&hidden, Permissions::from_mode(0o600)).and_then(|()| fs::rename(&hidden, path));
    placed.inspect_err(|_| drop(fs::remove_file(&hidden)))?;
    Ok(listener)
}

/// Accepts clients until the export ends.
fn accept(core: &Arc<Core>, export: &Arc<Export>) {
    let mut since = Instant::now();
    while !export.is_stopped() {
        if export.spec.ephemeral {
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::new(&export.listener, PollFlags::IN)], Some(&wait));
            if !export.clients.lock().expect("no holder panics").is_empty() {
                since = Instant::now();
            } else if since.elapsed() >= UNUSED {
                return end_ephemeral(core, export);
            }
            if export.listener.set_nonblocking(true).is_err() {
                return;
            }
        }
        match export.listener.accept() {
            Ok((stream, _)) => welcome(core, export, stream),
            Err(_) if export.is_stopped() => return,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                log::error!("export {} cannot accept: {e}", export.spec.name);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn end_ephemeral(core: &Core, export: &Export) {
    if let Err(why) = core.exports.remove(core, &export.spec.name) {
        log::error!("ending export {}: {why}", export.spec.name);
    }
}

/// Gives a client a thread, or hangs up on one too many.
fn welcome(core: &Arc<Core>, export: &Arc<Export>, stream: UnixStream) {
    let mut clients = export.clients.lock().expect("no holder panics");
    let many = clients.len() >= CONNECTIONS_OF_ONE;
    if many || core.exports.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
        if !many {
            core.exports.connections.fetch_sub(1, Ordering::AcqRel);
        }
        log::warn!("export {}: too many connections, one is refused", export.spec.name);
        return;
    }
    let id = export.next.fetch_add(1, Ordering::Relaxed);
    let over = {
        let (core, export) = (core.clone(), export.clone());
        move || {
            core.exports.connections.fetch_sub(1, Ordering::AcqRel);
            let mut clients = export.clients.lock().expect("no holder panics");
            clients.remove(&id);
            let last = clients.is_empty();
            export.gone.notify_all();
            drop(clients);
            if last && export.spec.ephemeral && !export.is_stopped() {
                end_ephemeral(&core, &export);
            }
        }
    };
    let handle = stream.try_clone().inspect_err(|e| log::warn!("export {}: {e}", export.spec.name));
    let (mine, theirs, done) = (export.clone(), core.clone(), over.clone());
    let spawned = handle.and_then(|handle| {
        // Under the lock, so that the end of the export misses no client.
        clients.insert(id, handle);
        drop(clients);
        std::thread::Builder::new().name("mirror-nbd".to_owned()).spawn(move || converse(&theirs, &mine, stream, done))
    });
    if let Err(e) = spawned {
        log::error!("export {}: no thread for a connection: {e}", export.spec.name);
        over();
    }
}

fn converse(core: &Arc<Core>, export: &Arc<Export>, stream: UnixStream, over: impl FnOnce() + Clone + Send + 'static) {
    if export.is_stopped() {
        return over();
    }
    let mut patient = Patient { stream: &stream, until: Instant::now() + HANDSHAKE };
    let agreed = shake(&mut patient, &export.offer());
    let ready = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
    match agreed.and_then(|agreed| ready.map(|()| agreed)) {
        Ok(Some(agreed)) => {
            let wide = rustix::net::sockopt::set_socket_send_buffer_size_force(&stream, SEND_BUFFER);
            if wide.is_err() {
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER);
            }
            Arc::new(Connection::new(core.clone(), export.clone(), agreed, stream)).serve(over);
        }
        Ok(None) => over(),
        Err(e) => {
            // A client that looks and leaves is nothing to speak of.
            if !matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe) {
                log::info!("export {}: a handshake failed: {e}", export.spec.name);
            }
            over();
        }
    }
}

/// A stream that gives its client a time by which all must be said.
struct Patient<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Patient<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.read(buf)
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
