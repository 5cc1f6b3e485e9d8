//! A blocking client of the control socket.
//!
//! A mirror may be killed and replaced at any time. A call that loses its connection connects again and repeats
//! its request, which is harmless (see [`crate::control`]), until its time is up.

use crate::control::{
    ExportSpec, Foresee, ForeseeDisk, Hello, Listing, OfDisk, OverlaySpec, Queued, RamPages, RamSpec, Recording,
    Removed, Reply, Request, Stats, StoreState, ViewChanges, Warmth,
};
use base::ByteRange;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

mod tree;

/// Time a call may take, unless told otherwise.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Time that a call may take which waits for a disk, if that is more.
pub const DISK_TIME_LIMIT: Duration = Duration::from_secs(120);
const CONNECT_PAUSE: Duration = Duration::from_millis(2);

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No mirror answered in time.
    #[error("the mirror at {} did not answer `{op}` within {limit:?}; is it running?", socket.display())]
    Unreachable {
        /// The control socket.
        socket: PathBuf,
        /// The request.
        op: String,
        /// The time it had.
        limit: Duration,
        /// What happened last.
        source: io::Error,
    },
    /// The mirror refused.
    #[error("the mirror: {0}")]
    Refused(String),
}

/// A connection to a mirror, made anew whenever need be.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    limit: Duration,
    stream: Option<BufReader<UnixStream>>,
}

type Answer<T> = Result<T, ClientError>;

impl Client {
    /// A client of the mirror with this control socket, which need not be there yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), limit: TIME_LIMIT, stream: None }
    }

    /// Sets the time that each call may take, connecting included.
    #[must_use]
    pub fn with_time_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Asks who serves.
    ///
    /// # Errors
    /// As all calls: see [`ClientError`].
    pub fn hello(&mut self) -> Answer<Hello> {
        self.call(&Request::Hello)
    }

    /// Adds a RAM file; its holder must be alive where it is pending.
    ///
    /// # Errors
    /// The id is taken, an ancestor is missing, or the holder cannot be read.
    pub fn add_ram(&mut self, spec: RamSpec) -> Answer<()> {
        self.call(&Request::AddRam(spec))
    }

    /// Lets a RAM file's own pages come from `version`. Once this returns the holder may be ended.
    ///
    /// # Errors
    /// There is no such file.
    pub fn set_ram_committed(&mut self, id: u64, version: &str) -> Answer<()> {
        self.call(&Request::SetRamCommitted { id, version: version.to_owned() })
    }

    /// Adds a writable disk.
    ///
    /// # Errors
    /// The id is taken, or what lies below is missing or does not fit.
    pub fn add_overlay(&mut self, spec: OverlaySpec) -> Answer<()> {
        self.call(&Request::AddOverlay(spec))
    }

    /// Freezes what `overlay` shows now into the new view `view`. Nothing may be writing to it: the VM is stopped.
    ///
    /// # Errors
    /// There is no such overlay, or the id is taken.
    pub fn mark(&mut self, overlay: u64, view: u64) -> Answer<()> {
        self.call(&Request::Mark { overlay, view })
    }

    /// What a view changed against what lies below it.
    ///
    /// # Errors
    /// There is no such view.
    pub fn view(&mut self, id: u64) -> Answer<ViewChanges> {
        self.call(&Request::View { id })
    }

    /// Lets what a view's layer lacks come from `version`, which is what the view shows.
    ///
    /// # Errors
    /// There is no such view.
    pub fn set_view_committed(&mut self, id: u64, version: &str) -> Answer<()> {
        self.call_slow(&Request::SetViewCommitted { id, version: version.to_owned() })
    }

    /// Makes durable all that was written to an overlay, and what it stands on.
    ///
    /// # Errors
    /// There is no such overlay, or its layers cannot be made durable.
    pub fn flush(&mut self, id: u64) -> Answer<()> {
        self.call_slow(&Request::Flush { id })
    }

    /// Removes objects, at once or with the last object that stands on them.
    ///
    /// # Errors
    /// Files could not be removed.
    pub fn remove(&mut self, ids: &[u64]) -> Answer<Removed> {
        self.call_slow(&Request::Remove { ids: ids.to_vec() })
    }

    /// Serves a disk over NBD; when this returns clients can connect.
    ///
    /// # Errors
    /// The name is taken, there is no such disk, or the socket cannot be made.
    pub fn add_export(&mut self, spec: ExportSpec) -> Answer<()> {
        self.call(&Request::AddExport(spec))
    }

    /// Ends an export; whether it was there. What was written to it is durable then.
    ///
    /// # Errors
    /// What was written cannot be made durable; it is no longer served all the same.
    pub fn remove_export(&mut self, name: &str) -> Answer<bool> {
        self.call_slow(&Request::RemoveExport { name: name.to_owned() })
    }

    /// Every object.
    ///
    /// # Errors
    /// As all calls.
    pub fn list(&mut self) -> Answer<Listing> {
        self.call(&Request::List)
    }

    /// Counts the page faults of process `pid` for `vm`.
    ///
    /// # Errors
    /// As all calls.
    pub fn register_vm(&mut self, vm: &str, pid: u32) -> Answer<()> {
        self.call(&Request::RegisterVm { vm: vm.to_owned(), pid })
    }

    /// Forgets the counters of `vm`.
    ///
    /// # Errors
    /// As all calls.
    pub fn unregister_vm(&mut self, vm: &str) -> Answer<()> {
        self.call(&Request::UnregisterVm { vm: vm.to_owned() })
    }

    /// Counters of all VMs, or of one.
    ///
    /// # Errors
    /// As all calls.
    pub fn stats(&mut self, vm: Option<&str>) -> Answer<Stats> {
        self.call(&Request::Stats { vm: vm.map(str::to_owned) })
    }

    /// Fetches ranges of an object in order, behind all demand; counted for `vm`.
    ///
    /// # Errors
    /// There is no such RAM file or overlay.
    pub fn prefetch(&mut self, object: u64, ranges: &[ByteRange], vm: Option<&str>) -> Answer<Queued> {
        let ranges = ranges.iter().map(|r| (r.start, r.end)).collect();
        self.call(&Request::Prefetch { object, ranges, vm: vm.map(str::to_owned) })
    }

    /// Begins to read what a VM of this RAM and these disks, in the store, needs first.
    ///
    /// # Errors
    /// The mirror is gone.
    pub fn approach(&mut self, ram: &str, disks: Vec<String>) -> Answer<()> {
        self.call(&Request::Approach { ram: ram.to_owned(), disks })
    }

    /// Fetches RAM ahead of a registered VM, records what it touches, or both.
    ///
    /// # Errors
    /// It is not registered, or what is named cannot be read.
    pub fn foresee(&mut self, spec: Foresee) -> Answer<()> {
        self.call_slow(&Request::Foresee(spec))
    }

    /// Whether the working set of `vm` has settled; with `end`, also what it touched, and nothing more is recorded.
    ///
    /// # Errors
    /// It is not recorded: the mirror may be another one now.
    pub fn recording(&mut self, vm: &str, end: bool) -> Answer<Recording> {
        self.call(&Request::Recording { vm: vm.to_owned(), end })
    }

    /// Fetches blocks ahead of a disk's readers, records what they read, or both.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn foresee_disk(&mut self, spec: ForeseeDisk) -> Answer<()> {
        self.call(&Request::ForeseeDisk(spec))
    }

    /// Whether what a disk's readers want has settled; with `end`, also what they read, and nothing more is recorded.
    ///
    /// # Errors
    /// It is not recorded: the mirror may be another one now.
    pub fn disk_recording(&mut self, disk: &OfDisk, end: bool) -> Answer<Recording> {
        self.call(&Request::DiskRecording { disk: disk.clone(), end })
    }

    /// Which pages of a VM's RAM were brought: none of one that is not registered.
    ///
    /// # Errors
    /// As all calls.
    pub fn ram_pages(&mut self, vm: &str) -> Answer<RamPages> {
        self.call(&Request::RamPages { vm: vm.to_owned() })
    }

    /// How the store does.
    ///
    /// # Errors
    /// As all calls.
    pub fn store(&mut self) -> Answer<StoreState> {
        self.call(&Request::Store)
    }

    /// How much of `versions` is in the node's cache; see [`crate::Versions::warm`].
    ///
    /// # Errors
    /// There is no cache, the store does not answer, or there is no room.
    pub fn warm(&mut self, name: &str, versions: &[String], begin: bool, pin: bool) -> Answer<Warmth> {
        self.call_slow(&Request::Warm { name: name.to_owned(), versions: versions.to_vec(), begin, pin })
    }

    /// Lets the cache evict what was pinned under `name`; whether something was.
    ///
    /// # Errors
    /// As all calls.
    pub fn unpin(&mut self, name: &str) -> Answer<bool> {
        self.call(&Request::Unpin { name: name.to_owned() })
    }

    /// Ends the mirror, and unmounts if asked; VMs that still run wait for the next mirror otherwise.
    ///
    /// # Errors
    /// As all calls.
    pub fn shutdown(&mut self, unmount: bool) -> Answer<()> {
        let deadline = Instant::now() + self.limit;
        self.connect(deadline)
            .and_then(|()| self.exchange(&Request::Shutdown { unmount }, deadline))
            .map_or_else(|e| Err(self.unreachable(&Request::Shutdown { unmount }, e)), |line| parse(&line))
    }

    /// A copy of the session's descriptor, for a hypervisor to keep.
    ///
    /// # Errors
    /// As all calls.
    pub fn fuse_fd(&mut self) -> Answer<OwnedFd> {
        let deadline = Instant::now() + self.limit;
        self.connect(deadline).and_then(|()| self.receive_fd()).map_err(|e| self.unreachable(&Request::FuseFd, e))
    }

    pub(crate) fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Answer<T> {
        self.call_within(request, self.limit)
    }

    fn call_slow<T: DeserializeOwned>(&mut self, request: &Request) -> Answer<T> {
        self.call_within(request, self.limit.max(DISK_TIME_LIMIT))
    }

    fn call_within<T: DeserializeOwned>(&mut self, request: &Request, limit: Duration) -> Answer<T> {
        let deadline = Instant::now() + limit;
        loop {
            match self.connect(deadline).and_then(|()| self.exchange(request, deadline)) {
                Ok(line) => return parse(&line),
                Err(e) => {
                    self.stream = None;
                    if Instant::now() >= deadline {
                        return Err(self.unreachable(request, e));
                    }
                    std::thread::sleep(CONNECT_PAUSE);
                }
            }
        }
    }

    fn connect(&mut self, deadline: Instant) -> io::Result<()> {
        while self.stream.is_none() {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => self.stream = Some(BufReader::new(stream)),
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => std::thread::sleep(CONNECT_PAUSE),
            }
        }
        Ok(())
    }

    fn exchange(&mut self, request: &Request, deadline: Instant) -> io::Result<Vec<u8>> {
        let reader = self.stream.as_mut().expect("connected before");
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        reader.get_ref().set_read_timeout(Some(left))?;
        reader.get_ref().set_write_timeout(Some(left))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        reader.get_mut().write_all(&line)?;
        let mut answer = Vec::new();
        reader.read_until(b'\n', &mut answer)?;
        if answer.last() == Some(&b'\n') { Ok(answer) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Asks for the descriptor, which comes with the first byte of the answer.
    fn receive_fd(&mut self) -> io::Result<OwnedFd> {
        let stream = self.stream.take().expect("connected before").into_inner();
        stream.set_read_timeout(Some(self.limit))?;
        let mut line = serde_json::to_vec(&Request::FuseFd)?;
        line.push(b'\n');
        (&stream).write_all(&line)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 256];
        rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let passed = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        passed.ok_or_else(|| io::Error::other("the mirror's answer carried no descriptor"))
    }

    fn unreachable(&mut self, request: &Request, source: io::Error) -> ClientError {
        self.stream = None;
        let op = serde_json::to_value(request).ok().and_then(|v| Some(v.get("op")?.as_str()?.to_owned()));
        let (socket, op) = (self.socket.clone(), op.unwrap_or_default());
        ClientError::Unreachable { socket, op, limit: self.limit, source }
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Answer<T> {
    match serde_json::from_slice(line) {
        Ok(Reply::Ok(answer)) => Ok(answer),
        Ok(Reply::Error(why)) => Err(ClientError::Refused(why)),
        Err(e) => Err(ClientError::Refused(format!("its answer is not understood: {e}"))),
    }
}

/// A copy of the FUSE descriptor of the mirror with this control socket.
///
/// # Errors
/// As all calls of [`Client`].
pub fn fuse_fd_of(socket: &Path) -> Result<OwnedFd, ClientError> {
    Client::new(socket).fuse_fd()
}
