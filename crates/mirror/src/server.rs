//! The control socket.

use crate::control::{Hello, Queued, Removed, Reply, Request};
use crate::core::Core;
use crate::home::{Home, read_json_or_default, replace_json};
use crate::resolve::{VersionError, Versions};
use base::ByteRange;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// The longest request: a RAM map of some hundred thousand extents.
const LINE_MAX: u64 = 64 << 20;
/// Connections at once.
const CONNECTIONS_MAX: usize = 256;

/// A mirror's control socket.
pub(crate) struct Server {
    core: Arc<Core>,
    home: Home,
    connections: AtomicUsize,
    /// Held while the list of VMs is kept: of two writers the later one must have seen what the earlier one saw.
    keeping: Mutex<()>,
}

impl Server {
    /// Opens the socket, in place of one left by an earlier mirror, and recalls the VMs that were registered.
    pub(crate) fn bind(core: Arc<Core>, home: Home) -> io::Result<(Arc<Self>, UnixListener)> {
        let registered: HashMap<String, u32> = read_json_or_default(&vms_path(&home)).unwrap_or_default();
        for (vm, pid) in registered {
            core.vms.register(&vm, pid);
        }
        for overlay in core.objects.list().overlays {
            core.vms.counters(&overlay.vm);
        }
        // Bound under another name and then renamed, so that the name never leads to a socket of another mode.
        let (path, hidden) = (home.socket(), home.run().join("mirror.sock.new"));
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden)?;
        fs::set_permissions(&hidden, Permissions::from_mode(0o600))?;
        fs::rename(&hidden, &path)?;
        Ok((Arc::new(Self { core, home, connections: AtomicUsize::new(0), keeping: Mutex::default() }), listener))
    }

    /// Serves for ever.
    pub(crate) fn serve(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) => {
                    log::error!("the control socket cannot accept: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            let mine = self.clone();
            if self.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                self.connections.fetch_sub(1, Ordering::AcqRel);
                let _ = send(&stream, &Reply::<()>::Error(format!("more than {CONNECTIONS_MAX} connections")));
                continue;
            }
            let spawned = std::thread::Builder::new().name("mirror-control".to_owned()).spawn(move || {
                if let Err(e) = mine.converse(&stream) {
                    log::warn!("a control connection broke: {e}");
                }
                mine.connections.fetch_sub(1, Ordering::AcqRel);
            });
            if let Err(e) = spawned {
                self.connections.fetch_sub(1, Ordering::AcqRel);
                log::error!("no thread for a control connection: {e}");
            }
        }
    }

    fn converse(&self, stream: &UnixStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut lines).take(LINE_MAX).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(());
            }
            if line.last() != Some(&b'\n') {
                return send(stream, &Reply::<()>::Error("a request must be one line of at most 64 MiB".to_owned()));
            }
            match serde_json::from_slice::<Request>(&line) {
                Ok(Request::FuseFd) => self.pass_descriptor(stream)?,
                Ok(request) => self.answer(stream, request)?,
                Err(e) => send(stream, &Reply::<()>::Error(format!("not a request of the mirror: {e}")))?,
            }
        }
    }

    fn answer(&self, stream: &UnixStream, request: Request) -> io::Result<()> {
        let (core, objects) = (&*self.core, &self.core.objects);
        match request {
            Request::Hello => {
                send(stream, &Reply::Ok(Hello { pid: std::process::id(), session: core.session_name.clone() }))
            }
            Request::AddRam(spec) => send(stream, &reply(objects.add_ram(&spec))),
            Request::SetRamCommitted { id, version } => {
                let done = objects.set_ram_committed(id, &version);
                core.waiting.nudge();
                send(stream, &reply(done))
            }
            Request::AddOverlay(spec) => {
                let done = objects.add_overlay(&spec).map(|()| drop(core.vms.counters(&spec.vm)));
                send(stream, &reply(done))
            }
            Request::Mark { overlay, view } => send(stream, &reply(objects.mark(overlay, view))),
            Request::View { id } => send(stream, &reply(objects.view_changes(id))),
            Request::SetViewCommitted { id, version } => send(stream, &reply(objects.set_view_committed(id, &version))),
            Request::Flush { id } => send(stream, &reply(objects.flush(id))),
            Request::Remove { ids } => send(stream, &reply(self.remove(&ids))),
            Request::AddExport(spec) => send(stream, &reply(core.exports.add(&self.core, spec))),
            Request::RemoveExport { name } => send(stream, &reply(core.exports.remove(core, &name))),
            Request::List => {
                let mut listing = objects.list();
                listing.vms = core.vms.registered();
                listing.exports = core.exports.list();
                send(stream, &Reply::Ok(listing))
            }
            Request::RegisterVm { vm, pid } => {
                core.vms.register(&vm, pid);
                send(stream, &reply(self.keep_registered()))
            }
            Request::UnregisterVm { vm } => {
                core.foresight.forget(core, &vm);
                core.vms.unregister(&vm);
                send(stream, &reply(self.keep_registered()))
            }
            Request::Stats { vm } => send(stream, &Reply::Ok(core.stats(vm.as_deref()))),
            Request::Prefetch { object, ranges, vm } => send(stream, &reply(self.prefetch(object, &ranges, vm))),
            Request::Approach { ram, disks } => {
                // One path, and much of what lies beside it where the version was laid down in order.
                self.read_ahead(move |versions| versions.together(&ram, &[0]).map(drop));
                for disk in disks {
                    self.read_ahead(move |versions| versions.read_pages(&disk, &[0], &mut |_, _| {}).map(drop));
                }
                send(stream, &Reply::Ok(()))
            }
            Request::Foresee(spec) => send(stream, &reply(core.foresight.begin(core, &spec))),
            Request::Recording { vm, end } => send(stream, &reply(core.foresight.recording(&vm, end))),
            Request::ForeseeDisk(spec) => send(stream, &reply(core.foresight.disks.begin(&self.core, &spec))),
            Request::DiskRecording { disk, end } => {
                send(stream, &reply(core.foresight.disks.recording(core, &disk, end)))
            }
            Request::RamPages { vm } => send(stream, &Reply::Ok(core.ram_pages(&vm))),
            Request::Store => send(stream, &Reply::Ok(objects.versions().state())),
            Request::Warm { name, versions, begin, pin } => {
                send(stream, &reply(objects.versions().warm(&name, &versions, begin, pin)))
            }
            Request::Unpin { name } => send(stream, &Reply::Ok(objects.versions().unpin(&name))),
            Request::Tree(request) => send(stream, &core.serve_tree(request)),
            Request::FuseFd => unreachable!("answered where the descriptor is passed"),
            Request::Shutdown { unmount } => {
                let done = if unmount { self.unmount() } else { Ok(()) };
                let ended = done.is_ok();
                let sent = send(stream, &reply(done));
                if ended {
                    core.stop(Ok(()));
                }
                sent
            }
        }
    }

    fn remove(&self, ids: &[u64]) -> Result<Removed, String> {
        if let Some((id, name)) = ids.iter().find_map(|id| Some((id, self.core.exports.of_overlay(*id)?))) {
            return Err(format!("disk {id:016x} is served as NBD export {name}; stop that first"));
        }
        let (report, gone) = self.core.objects.remove(ids).map_err(|e| e.to_string())?;
        self.core.withdraw(&gone);
        Ok(report)
    }

    fn read_ahead(&self, read: impl FnOnce(&dyn Versions) -> Result<(), VersionError> + Send + 'static) {
        let core = self.core.clone();
        let spawned = std::thread::Builder::new().name("mirror-approach".to_owned()).spawn(move || {
            if let Err(e) = read(core.objects.versions()) {
                log::debug!("reading before anybody wants it: {e}");
            }
        });
        if let Err(e) = spawned {
            log::debug!("reading before anybody wants it: {e}");
        }
    }

    fn prefetch(&self, object: u64, ranges: &[(u64, u64)], vm: Option<String>) -> Result<Queued, String> {
        if self.core.objects.ram(object).is_none() && self.core.objects.overlay(object).is_none() {
            return Err(format!("there is no RAM file or overlay {object:016x}"));
        }
        if let Some((start, end)) = ranges.iter().find(|(start, end)| start > end) {
            return Err(format!("range {start}..{end} ends before it starts"));
        }
        // Only whole pages can be put into the page cache.
        let page = |&(start, end): &(u64, u64)| {
            let start = start - start % base::PAGE;
            ByteRange::new(start, end.checked_next_multiple_of(base::PAGE).unwrap_or(end).max(start))
        };
        Ok(self.core.prefetch.add(object, vm, ranges.iter().map(page)))
    }

    /// Leaves nothing behind but what is durable.
    fn unmount(&self) -> Result<(), String> {
        self.core.exports.remove_all(&self.core);
        self.core.objects.flush_all().map_err(|e| e.to_string())?;
        self.core.ending.store(true, Ordering::Release);
        let unmounted = crate::front::session::unmount(&self.home.mnt()).and_then(|()| self.home.unmount_live());
        unmounted.map_err(|e| {
            self.core.ending.store(false, Ordering::Release);
            format!("unmounting: {e}")
        })
    }

    /// So that a mirror that replaces this one counts for the right VMs.
    fn keep_registered(&self) -> io::Result<()> {
        let _keeping = self.keeping.lock().expect("no holder panics");
        replace_json(&vms_path(&self.home), &self.core.vms.registered())
    }

    fn pass_descriptor(&self, stream: &UnixStream) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Reply::Ok(()))?;
        line.push(b'\n');
        let fds = [self.core.session.fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one descriptor");
        let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == line.len() { Ok(()) } else { Err(io::Error::other("the descriptor's line was cut")) }
    }
}

fn vms_path(home: &Home) -> PathBuf {
    home.live().join("vms.json")
}

fn reply<T, E: std::fmt::Display>(done: Result<T, E>) -> Reply<T> {
    done.map_or_else(|e| Reply::Error(e.to_string()), Reply::Ok)
}

fn send<T: Serialize>(mut stream: &UnixStream, reply: &Reply<T>) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}
