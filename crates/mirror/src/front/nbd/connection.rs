//! One connection after its handshake: requests in, replies out.
//!
//! One worker has the *lead*: it reads requests and answers at once those that wait for nobody. Before it takes on
//! anything slow (the store, a disk that is not in the page cache, a flush) it gives the lead to another worker,
//! started if none is free, so that a slow request delays nobody behind it. A client that asks one thing at a time
//! thus costs one thread and no switch between threads; one that asks many at once has them worked in parallel, and
//! answered in the order in which they are done.
//!
//! Short reads that have to wait for the device alone are handed to it by the leader, all that are at hand in one
//! system call, and answered by a thread that listens for them, all that have landed in one as well.

mod input;
mod reply;

use super::Export;
use super::handshake::Agreed;
use super::wire::{Request, chunk, chunk_head, cmd, err, flag, simple_reply};
use crate::core::Core;
use crate::disk::{DiskError, Extent};
use crate::front::aio::{Aio, is_cached};
use crate::front::buffer::Buffer;
use base::ByteRange;
use input::Input;
use reply::{Failure, Gathered, allocation, data_and_holes, joined, part_head};
use std::io::{self, IoSlice, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Workers of one connection at most.
const WORKERS_MAX: usize = 32;
/// Free workers that a connection keeps.
const FREE_MAX: usize = 16;
/// What is moved at a time; a longer request takes several.
const PIECE: usize = 1 << 20;
/// A worker keeps a buffer of this length.
const SHORT: usize = PIECE / 4;
/// Requests of this length are worth another worker when more are waiting.
const LONG: u32 = 64 << 10;
/// The most that a zeroing may cover and still be answered by the leader.
const ZERO_QUICK: u32 = 32 << 20;
/// Reads at the device at most; more are read by waiting workers.
const FLIGHTS: usize = 64;
/// Extents in one reply, and bytes that they may cover.
const EXTENTS_MAX: usize = 4096;
const EXTENTS_SPAN: u64 = 1 << 30;

/// One client's connection.
pub(super) struct Connection {
    core: Arc<Core>,
    export: Arc<Export>,
    agreed: Agreed,
    stream: UnixStream,
    /// Whoever holds it has the lead.
    input: Mutex<Input>,
    /// Held while a reply is sent.
    output: Mutex<()>,
    workers: AtomicUsize,
    /// Workers that wait for the lead.
    free: AtomicUsize,
    /// Reads that the device works on, where there is somebody to listen for them.
    direct: Option<Aio<Flight>>,
}

/// A request that the device works on.
struct Flight {
    request: Request,
    began: Instant,
}

impl Connection {
    /// A connection that has agreed with its client.
    pub(super) fn new(core: Arc<Core>, export: Arc<Export>, agreed: Agreed, stream: UnixStream) -> Self {
        let (workers, free) = (AtomicUsize::new(1), AtomicUsize::new(0));
        // One worker more, who listens.
        let queue = || {
            Aio::new(FLIGHTS, false).inspect_err(|e| {
                core.exports.dismiss();
                log::warn!("export {} is read by waiting threads: {e}", export.spec.name);
            })
        };
        let direct = export.disk.overlay().filter(|_| core.exports.may_hire()).and_then(|_| queue().ok());
        let (input, output) = (Mutex::new(Input::new()), Mutex::default());
        Self { core, export, agreed, stream, input, output, workers, free, direct }
    }

    /// Serves on the calling thread, the first worker. The last of them to end calls `over`.
    pub(super) fn serve(self: &Arc<Self>, over: impl FnOnce() + Clone + Send + 'static) {
        if let Err(e) = self.start_listening(&over) {
            return self.give_up(&e, over);
        }
        self.serve_on(over);
    }

    fn serve_on(self: &Arc<Self>, over: impl FnOnce() + Clone + Send + 'static) {
        self.work(&over);
        self.leave(over);
    }

    fn leave(&self, over: impl FnOnce()) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 {
            over();
        }
    }

    fn give_up(&self, why: &io::Error, over: impl FnOnce()) {
        self.core.exports.dismiss();
        self.hang_up(why);
        self.leave(over);
    }

    /// Starts the worker who answers what the device has read.
    fn start_listening(self: &Arc<Self>, over: &(impl FnOnce() + Clone + Send + 'static)) -> io::Result<()> {
        if self.direct.is_none() {
            return Ok(());
        }
        let (mine, theirs) = (self.clone(), over.clone());
        self.workers.fetch_add(1, Ordering::AcqRel);
        let spawned = std::thread::Builder::new().name("mirror-nbd".to_owned()).spawn(move || {
            if let Some(direct) = &mine.direct
                && let Err(e) = mine.listen(direct)
            {
                mine.hang_up(&e);
            }
            mine.core.exports.dismiss();
            mine.leave(theirs);
        });
        if spawned.is_err() {
            self.workers.fetch_sub(1, Ordering::AcqRel);
        }
        spawned.map(drop)
    }

    /// Answers what has landed until the connection is over.
    fn listen(&self, direct: &Aio<Flight>) -> io::Result<()> {
        let (mut landed, mut gathered, mut buf) = (Vec::new(), Gathered::default(), Buffer::default());
        let mut sent = Ok(());
        while direct.wait(&mut landed)? {
            for read in &landed {
                let Flight { request, began } = &read.ticket;
                // What is in flight lands all the same once the client is gone.
                if sent.is_ok() && read.whole {
                    sent = gathered.data(self, request, read.bytes());
                    self.export.disk.count_direct(&self.core, read.bytes().len(), *began);
                } else if sent.is_ok() {
                    sent = self.slow(request, &mut buf);
                }
                self.core.demand.leave();
            }
            direct.give_back(&mut landed);
            sent = sent.and_then(|()| gathered.send(self));
            if let Err(e) = &sent {
                self.hang_up(e);
            }
        }
        Ok(())
    }

    /// Hands reads taken on to the device.
    fn kick(&self, buf: &mut Buffer) -> io::Result<()> {
        let Some(direct) = &self.direct else { return Ok(()) };
        for refused in direct.kick() {
            self.core.demand.leave();
            self.slow(&refused.request, buf)?;
        }
        Ok(())
    }

    /// Takes on a read that has to wait for the device alone; false: this one does not, or there is no room.
    fn take_on(&self, request: &Request) -> bool {
        let Some(direct) = &self.direct else { return false };
        let len = request.len as usize;
        let Some(layer) = self.export.disk.holds_directly(request.offset, len as u64) else { return false };
        if is_cached(layer.data(), request.offset, len) {
            return false;
        }
        self.core.demand.arrive();
        let taken = direct.add(layer, request.offset, len, Flight { request: *request, began: Instant::now() });
        taken.inspect_err(|_| self.core.demand.leave()).is_ok()
    }

    fn work<F: FnOnce() + Clone + Send + 'static>(self: &Arc<Self>, over: &F) {
        let (mut buf, mut gathered, mut spare) = (Buffer::default(), Gathered::default(), Buffer::default());
        loop {
            self.free.fetch_add(1, Ordering::AcqRel);
            let mut input = self.input.lock().expect("no leader panics");
            self.free.fetch_sub(1, Ordering::AcqRel);
            if input.over {
                return;
            }
            let led = self.lead(&mut input, &mut buf, &mut gathered);
            match led {
                Ok(Some(request)) => {
                    self.follow(over);
                    drop(input);
                    let kicked = gathered.send(self).and_then(|()| self.kick(&mut spare));
                    let served = kicked.and_then(|()| self.slow(&request, &mut buf));
                    if let Err(e) = served {
                        self.hang_up(&e);
                    }
                    if buf.len() > SHORT {
                        self.core.exports.long.give(std::mem::take(&mut buf));
                    }
                    if self.free.load(Ordering::Acquire) >= FREE_MAX {
                        return;
                    }
                }
                ended => {
                    input.over = true;
                    let kicked = ended.map(drop).and(self.kick(&mut spare));
                    if let Err(e) = kicked.and_then(|()| gathered.send(self)) {
                        self.hang_up(&e);
                    }
                    if let Some(direct) = &self.direct {
                        direct.close();
                    }
                    return;
                }
            }
        }
    }

    /// Reads requests and answers those that are quick; returns one that is not, with its payload in `buf`, or none
    /// at the end of the connection.
    fn lead(&self, input: &mut Input, buf: &mut Buffer, gathered: &mut Gathered) -> io::Result<Option<Request>> {
        loop {
            if !input.has_more() {
                gathered.send(self)?;
                self.kick(buf)?;
            }
            let Some(request) = input.next(&self.stream)?.filter(|r| r.command != cmd::DISC) else { return Ok(None) };
            if request.command == cmd::WRITE {
                if request.len > super::wire::PAYLOAD_MAX {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("the client would write {} bytes at once", request.len),
                    ));
                }
                if request.len as usize > PIECE {
                    gathered.send(self)?;
                    self.kick(buf)?;
                    self.write_long(&request, input, buf)?;
                    continue;
                }
                self.make_room(buf, request.len as usize);
                input.payload(&self.stream, &mut buf[..request.len as usize])?;
            }
            // A client that writes much at a time is still sending the next request when this one is whole: it is received
            // while this one is written.
            let worth_sharing = request.len >= LONG && input.is_followed(&self.stream);
            if worth_sharing || !self.quick(&request, buf, gathered)? {
                return Ok(Some(request));
            }
        }
    }

    /// Sees to it that `buf` has `len` bytes. Long buffers are everybody's: a worker has one while it needs it.
    fn make_room(&self, buf: &mut Buffer, len: usize) {
        if len > SHORT && buf.len() < len {
            *buf = self.core.exports.long.take();
        }
        buf.grow(if len > SHORT { PIECE } else { len });
    }

    /// Sees to it that somebody takes the lead when it is given up, unless all that may be are at work: then the first
    /// to be done does.
    fn follow<F: FnOnce() + Clone + Send + 'static>(self: &Arc<Self>, over: &F) {
        let most = self.workers.load(Ordering::Acquire) >= WORKERS_MAX;
        if self.free.load(Ordering::Acquire) > 0 || most || !self.core.exports.may_hire() {
            return;
        }
        self.workers.fetch_add(1, Ordering::AcqRel);
        let (mine, theirs) = (self.clone(), over.clone());
        let spawned = std::thread::Builder::new().name("mirror-nbd".to_owned()).spawn(move || {
            mine.serve_on(theirs);
            mine.core.exports.dismiss();
        });
        if let Err(e) = spawned {
            log::warn!("no further worker for export {}: {e}", self.export.spec.name);
            self.core.exports.dismiss();
            self.workers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Ends the connection from our side.
    fn hang_up(&self, why: &io::Error) {
        if !self.export.is_stopped() && why.kind() != io::ErrorKind::BrokenPipe {
            log::info!("a connection to export {} ends: {why}", self.export.spec.name);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// What is wrong with a request by itself.
    fn check(&self, request: &Request) -> Result<(), Failure> {
        let allowed = match request.command {
            cmd::READ => flag::DF,
            cmd::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            cmd::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        } | flag::FUA;
        let changes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let inside = request.command == cmd::FLUSH
            || request.end().is_some_and(|end| end <= self.export.disk.size()) && request.offset < i64::MAX as u64;
        let one_chunk = request.flags & flag::DF != 0;
        let number = match request.command {
            cmd::READ..=cmd::BLOCK_STATUS if request.flags & !allowed != 0 => err::INVAL,
            _ if changes && self.export.spec.read_only => err::PERM,
            cmd::WRITE | cmd::WRITE_ZEROES if !inside => err::NOSPC,
            cmd::READ | cmd::BLOCK_STATUS if request.len == 0 => err::INVAL,
            cmd::READ if request.len > super::wire::PAYLOAD_MAX || one_chunk && !self.agreed.structured => err::INVAL,
            cmd::READ if one_chunk && request.len as usize > PIECE => err::OVERFLOW,
            cmd::BLOCK_STATUS if self.agreed.allocation.or(self.agreed.changes).is_none() => err::INVAL,
            cmd::READ..=cmd::BLOCK_STATUS if inside => return Ok(()),
            _ => err::INVAL,
        };
        Err(number.into())
    }

    /// Answers a request that waits for nobody; false: it would wait.
    fn quick(&self, request: &Request, buf: &mut Buffer, gathered: &mut Gathered) -> io::Result<bool> {
        if let Err(failure) = self.check(request) {
            gathered.refuse(self, request, &failure)?;
            return Ok(true);
        }
        let (disk, len) = (&self.export.disk, request.len as usize);
        let durable = request.flags & flag::FUA != 0;
        let done = match request.command {
            cmd::READ if len <= PIECE => {
                let _serving = self.core.demand.serve();
                if self.take_on(request) {
                    return Ok(true);
                }
                self.make_room(buf, len);
                if !disk.read_now(&self.core, request.offset, &mut buf[..len]) {
                    return Ok(false);
                }
                gathered.data(self, request, &buf[..len])?;
                return Ok(true);
            }
            cmd::WRITE if !durable && (len == 0 || disk.writes_locally(request.offset, len as u64)) => {
                let _serving = self.core.demand.serve();
                disk.write(&self.core, request.offset, &buf[..len])
            }
            cmd::TRIM if !durable && request.len <= ZERO_QUICK => disk.discard(request.offset, len as u64),
            cmd::WRITE_ZEROES
                if !durable && request.len <= ZERO_QUICK && disk.writes_locally(request.offset, len as u64) =>
            {
                disk.zero(&self.core, request.offset, len as u64, request.flags & flag::NO_HOLE != 0)
            }
            _ => return Ok(false),
        };
        match done {
            Ok(()) => gathered.done(self, request)?,
            Err(e) => gathered.refuse(self, request, &self.failed(&e))?,
        }
        Ok(true)
    }

    /// Answers any request; the payload of a write is in `buf`.
    fn slow(&self, request: &Request, buf: &mut Buffer) -> io::Result<()> {
        let mut out = Gathered::default();
        if let Err(failure) = self.check(request) {
            out.refuse(self, request, &failure)?;
            return out.send(self);
        }
        let _serving = self.core.demand.serve();
        let (disk, len) = (&self.export.disk, u64::from(request.len));
        let done = match request.command {
            cmd::READ => return self.read(request, buf),
            cmd::BLOCK_STATUS => return self.block_status(request),
            cmd::WRITE => disk.write(&self.core, request.offset, &buf[..request.len as usize]),
            cmd::TRIM => disk.discard(request.offset, len),
            cmd::WRITE_ZEROES => disk.zero(&self.core, request.offset, len, request.flags & flag::NO_HOLE != 0),
            cmd::FLUSH => disk.flush(&self.core),
            _ => {
                // CACHE: a hint, worked behind all demand.
                if let Some(id) = disk.overlay() {
                    self.core.prefetch.add(id, None, [ByteRange::at(request.offset, len)]);
                }
                Ok(())
            }
        };
        let changes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let durable = changes && request.flags & flag::FUA != 0;
        match done.and_then(|()| if durable { disk.flush(&self.core) } else { Ok(()) }) {
            Ok(()) => out.done(self, request)?,
            Err(e) => out.refuse(self, request, &self.failed(&e))?,
        }
        out.send(self)
    }

    /// Reads in pieces, so that a long request needs no more memory than a short one.
    fn read(&self, request: &Request, buf: &mut Buffer) -> io::Result<()> {
        let (len, mut done) = (request.len as usize, 0);
        self.make_room(buf, len.min(PIECE));
        // The pieces of a simple reply must not be divided by other replies.
        let mut whole = None;
        while done < len {
            let piece = (len - done).min(PIECE);
            let at = request.offset + done as u64;
            if let Err(e) = self.export.disk.read(&self.core, at, &mut buf[..piece]) {
                let failure = self.failed(&e);
                if !self.agreed.structured && done > 0 {
                    // The reply has promised the rest: there is no other way to take that back.
                    return Err(io::Error::other(failure.1));
                }
                let mut out = Gathered::default();
                out.refuse(self, request, &failure)?;
                return out.send(self);
            }
            let bytes = &buf[..piece];
            if self.agreed.structured {
                self.send_chunks(request, at, bytes, done + piece == len)?;
            } else {
                if done == 0 {
                    whole = Some(self.output.lock().expect("no sender panics"));
                    self.write_all(&mut [IoSlice::new(&simple_reply(0, request.cookie)), IoSlice::new(bytes)])?;
                } else {
                    self.write_all(&mut [IoSlice::new(bytes)])?;
                }
            }
            done += piece;
        }
        drop(whole);
        Ok(())
    }

    /// Sends a piece of a structured reply as data and holes.
    fn send_chunks(&self, request: &Request, offset: u64, bytes: &[u8], last: bool) -> io::Result<()> {
        let parts = if request.flags & flag::DF != 0 { vec![(bytes, false)] } else { data_and_holes(bytes) };
        let mut at = offset;
        let mut heads = Vec::with_capacity(parts.len());
        for (index, (part, hole)) in parts.iter().enumerate() {
            heads.push(part_head(request.cookie, at, part.len(), *hole, last && index + 1 == parts.len()));
            at += part.len() as u64;
        }
        let mut slices = Vec::with_capacity(2 * parts.len());
        for (head, (part, hole)) in heads.iter().zip(&parts) {
            slices.push(IoSlice::new(head));
            if !hole {
                slices.push(IoSlice::new(part));
            }
        }
        let _turn = self.output.lock().expect("no sender panics");
        self.write_all(&mut slices)
    }

    fn block_status(&self, request: &Request) -> io::Result<()> {
        let end = request.offset + u64::from(request.len).min(EXTENTS_SPAN);
        let range = ByteRange::new(request.offset, end);
        let one = request.flags & flag::REQ_ONE != 0;
        // One extent of a context may be several of ours, which tell more.
        let most = if one { 64 } else { EXTENTS_MAX };
        let mut out = Gathered::default();
        match self.export.disk.extents(&self.core, range, most) {
            Ok(extents) => {
                let contexts = [
                    (self.agreed.allocation, allocation as fn(&Extent) -> u32),
                    (self.agreed.changes, |e: &Extent| u32::from(e.kind.changed)),
                ];
                let mut contexts = contexts.into_iter().filter_map(|(id, of)| Some((id?, of))).peekable();
                while let Some((id, of)) = contexts.next() {
                    let mut body = id.to_be_bytes().to_vec();
                    for (len, flags) in joined(&extents, range.start, of).into_iter().take(if one { 1 } else { most }) {
                        body.extend(len.to_be_bytes());
                        body.extend(flags.to_be_bytes());
                    }
                    let last = contexts.peek().is_none();
                    out.0.extend(chunk_head(last, chunk::BLOCK_STATUS, request.cookie, body.len()));
                    out.0.extend(body);
                }
            }
            Err(e) => out.refuse(self, request, &self.failed(&e))?,
        }
        out.send(self)
    }

    /// Takes and writes a payload that is longer than a piece. After a failure the rest is taken all the same.
    fn write_long(&self, request: &Request, input: &mut Input, buf: &mut Buffer) -> io::Result<()> {
        let mut outcome = self.check(request);
        let _serving = self.core.demand.serve();
        let (len, mut done) = (request.len as usize, 0);
        self.make_room(buf, PIECE);
        while done < len {
            let piece = &mut buf[..(len - done).min(PIECE)];
            input.payload(&self.stream, piece)?;
            if outcome.is_ok() {
                let written = self.export.disk.write(&self.core, request.offset + done as u64, piece);
                outcome = written.map_err(|e| self.failed(&e));
            }
            done += piece.len();
        }
        if outcome.is_ok() && request.flags & flag::FUA != 0 {
            outcome = self.export.disk.flush(&self.core).map_err(|e| self.failed(&e));
        }
        let mut out = Gathered::default();
        match outcome {
            Ok(()) => out.done(self, request)?,
            Err(failure) => out.refuse(self, request, &failure)?,
        }
        out.send(self)
    }

    fn failed(&self, error: &DiskError) -> Failure {
        let number = match error {
            DiskError::Version(_) => err::IO,
            DiskError::Local(e) => match e.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => err::NOSPC,
                Some(libc::EROFS | libc::EPERM) => err::PERM,
                _ if self.export.is_stopped() => err::SHUTDOWN,
                _ => err::IO,
            },
        };
        Failure(number, self.export.disk.note(&self.core, error))
    }

    /// Sends all of `slices`; the caller holds the turn.
    fn write_all(&self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        while !slices.is_empty() {
            match (&self.stream).write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
