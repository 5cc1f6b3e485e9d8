//! The threads that read requests from the session and answer them.
//!
//! When the last idle worker takes a request, another worker is started, up to a bound. Of these only a part may work
//! on disks at a time; what comes beyond is handed to a few threads that do nothing else. So page faults, which come
//! by the same descriptor, never stand behind guests' flushes.

use super::abi::{Header, IN_HEADER, OUT_HEADER, WRITE_IN, op, put_header};
use super::buffer::Buffer;
use super::files::{Answer, MAX_WRITE};
use crate::core::Core;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// One request with its data, or one reply.
pub(crate) const BUFFER: usize = MAX_WRITE as usize + 4096;
/// Workers at most, as a multiple of those at the start.
const GROWTH: usize = 8;
/// Threads for disk requests beyond what the workers may take on.
const DISK_THREADS: usize = 4;

/// A request and its length, taken out of a worker's buffer.
type Handed = (Header, Vec<u8>);

/// How many workers there are, and what they do.
#[derive(Default)]
pub(crate) struct Crew {
    pub(crate) total: AtomicUsize,
    idle: AtomicUsize,
    most: AtomicUsize,
    /// Workers that work on disks.
    on_disks: AtomicUsize,
    /// No longer than what the kernel has in flight.
    handed: Mutex<VecDeque<Handed>>,
    came: Condvar,
}

impl Crew {
    /// Hands a request to the threads for disks.
    pub(crate) fn hand(&self, header: Header, request: Vec<u8>) {
        self.handed.lock().expect("no holder panics").push_back((header, request));
        self.came.notify_one();
    }
}

/// Starts `count` workers.
pub(crate) fn start(core: &Arc<Core>, count: usize) -> io::Result<()> {
    core.crew.most.store(count * GROWTH, Ordering::Relaxed);
    for _ in 0..DISK_THREADS {
        let mine = core.clone();
        std::thread::Builder::new().name("mirror-disk".to_owned()).spawn(move || work_on_disks(&mine))?;
    }
    (0..count).try_for_each(|_| start_one(core))
}

fn start_one(core: &Arc<Core>) -> io::Result<()> {
    let mine = core.clone();
    core.crew.total.fetch_add(1, Ordering::AcqRel);
    // Idle from before it runs, or each of two requests at once would start another.
    core.crew.idle.fetch_add(1, Ordering::AcqRel);
    std::thread::Builder::new().name("mirror-worker".to_owned()).spawn(move || work(&mine)).map(drop)
}

fn work(core: &Arc<Core>) {
    let crew = &core.crew;
    let mut buf = buffer();
    while let Some(len) = next_request(core, &mut buf) {
        let last = crew.idle.fetch_sub(1, Ordering::AcqRel) == 1;
        let room = crew.total.load(Ordering::Acquire) < crew.most.load(Ordering::Relaxed);
        if last
            && room
            && let Err(e) = start_one(core)
        {
            log::warn!("no further worker could be started: {e}");
        }
        let header = Header::parse(&buf);
        if !core.is_disk_work(&header) {
            serve(core, header, &mut buf, len);
        } else if header.opcode == op::READ && core.read_directly(&header, &buf[..len]) {
            // On its way.
        } else if crew.on_disks.fetch_add(1, Ordering::AcqRel) < crew.most.load(Ordering::Relaxed) * 3 / 4 {
            serve(core, header, &mut buf, len);
            crew.on_disks.fetch_sub(1, Ordering::AcqRel);
        } else {
            crew.on_disks.fetch_sub(1, Ordering::AcqRel);
            crew.hand(header, buf[..len].to_vec());
        }
        crew.idle.fetch_add(1, Ordering::AcqRel);
    }
}

fn work_on_disks(core: &Core) {
    let mut buf = buffer();
    loop {
        let queue = core.crew.handed.lock().expect("no holder panics");
        let mut queue = core.crew.came.wait_while(queue, |q| q.is_empty()).expect("no holder panics");
        let Some((header, request)) = queue.pop_front() else { continue };
        drop(queue);
        buf[..request.len()].copy_from_slice(&request);
        serve(core, header, &mut buf, request.len());
    }
}

/// Reads the next request; none: the session is over.
fn next_request(core: &Core, buf: &mut [u8]) -> Option<usize> {
    loop {
        match rustix::io::read(core.session.fd(), &mut *buf) {
            Ok(len) if len >= IN_HEADER => return Some(len),
            Ok(len) => core.stop(Err(io::Error::other(format!("the kernel sent a FUSE request of {len} bytes")))),
            // The request was withdrawn, or a signal came.
            Err(Errno::NOENT | Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(core.session.fd(), PollFlags::IN)], None);
                continue;
            }
            Err(Errno::NODEV) => core.unmounted(),
            Err(e) => core.stop(Err(e.into())),
        }
        return None;
    }
}

fn serve(core: &Core, header: Header, buf: &mut [u8], len: usize) {
    let _serving = core.demand.serve();
    let answer = core.answer(header, buf, len);
    reply(core, header.unique, answer, buf);
}

/// A buffer in which the data of a WRITE lie so that they can go past the page cache.
pub(crate) fn buffer() -> Buffer {
    Buffer::new(BUFFER, IN_HEADER + WRITE_IN).touch()
}

/// Sends an answer to the kernel.
pub(crate) fn reply(core: &Core, unique: u64, answer: Answer, buf: &mut [u8]) {
    let (error, body) = match answer {
        Answer::Nothing => return,
        Answer::Error(errno) => (-errno.raw_os_error(), 0),
        Answer::InPlace(len) => (0, len),
        Answer::Body(body) => {
            buf[OUT_HEADER..OUT_HEADER + body.len()].copy_from_slice(&body);
            (0, body.len())
        }
    };
    put_header(buf, unique, error, body);
    match rustix::io::write(core.session.fd(), &buf[..OUT_HEADER + body]) {
        // No such request any more: withdrawn, or answered by the mirror before this one.
        Ok(_) | Err(Errno::NOENT) => {}
        Err(Errno::NODEV) => core.unmounted(),
        Err(e) => log::error!("an answer of {body} bytes to request {unique:#x} failed: {e}"),
    }
}
