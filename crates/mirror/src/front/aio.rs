//! Reads of layers that nobody waits for: many in flight at the device, ended by whoever listens for it.
//!
//! Linux AIO (`io_submit(2)`) on files opened with O_DIRECT, and not io_uring: there the end of a request is worked
//! by the thread that began it, which is then torn out of its wait for the next request; here it goes from the
//! device's interrupt to the listener. Containers that forbid io_uring permit it, too.
//!
//! A flight owns its buffer and keeps its layer's file open until the kernel says that it has ended.

#![expect(unsafe_code, reason = "no safe wrapper of these four system calls is in the standard library or in rustix")]

use super::buffer::{ALIGN, Buffer};
use crate::disk::Layer;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// The most that one flight reads.
pub(crate) const ROOM: usize = 64 << 10;
/// Bytes before those read: a reply's head goes there.
pub(crate) const HEAD: usize = ALIGN;
/// Ends told of at a time.
const EVENTS: usize = 32;
/// Names the event that only wakes the listener.
const WAKE: u64 = u64::MAX;
/// `IOCB_CMD_PREAD`.
const PREAD: u16 = 0;

/// `struct iocb`, little endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: u64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<Event>() == 32);

/// Reads in flight, each with a ticket that says what it is for.
pub(crate) struct Aio<T> {
    context: u64,
    slots: Mutex<Slots<T>>,
    in_flight: AtomicUsize,
    closing: AtomicBool,
    /// Read to wake the listener.
    null: File,
}

struct Slots<T> {
    free: Vec<usize>,
    flights: Vec<Option<Flight<T>>>,
    buffers: Vec<Buffer>,
    /// To be handed to the kernel.
    waiting: Vec<Iocb>,
}

struct Flight<T> {
    ticket: T,
    buffer: Buffer,
    len: usize,
    /// Keeps the file open.
    _layer: Arc<Layer>,
}

/// A read that has ended.
pub(crate) struct Landed<T> {
    pub(crate) ticket: T,
    buffer: Buffer,
    len: usize,
    /// Whether all bytes are there.
    pub(crate) whole: bool,
}

impl<T> Landed<T> {
    /// The bytes read.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[HEAD..HEAD + self.len]
    }

    /// The bytes read, and `before` bytes in front of them to put a head into.
    pub(crate) fn with_head(&mut self, before: usize) -> &mut [u8] {
        &mut self.buffer[HEAD - before..HEAD + self.len]
    }
}

/// `cachestat(2)`, Linux 6.5; one number on all machines.
const CACHESTAT: libc::c_long = 451;

/// Whether the page cache holds all of these bytes of a file. (A read that must not wait would tell as well, but it
/// has the kernel begin to read what is not there.)
pub(crate) fn is_cached(file: &File, offset: u64, len: usize) -> bool {
    let range = [offset, len as u64];
    // Pages in the cache, dirty ones, and three numbers more.
    let mut found = [0u64; 5];
    let (range, into) = (range.as_ptr().expose_provenance(), found.as_mut_ptr().expose_provenance());
    // SAFETY: the kernel reads two words and writes five; both arrays live through the call.
    let asked = unsafe { call(CACHESTAT, [file.as_raw_fd() as u64, range as u64, into as u64, 0, 0]) };
    asked.is_ok() && found[0] * ALIGN as u64 >= len as u64
}

/// One system call; the kernel reads and writes what the pointers among `args` lead to.
///
/// # Safety
/// As the call asks.
unsafe fn call(number: libc::c_long, args: [u64; 5]) -> io::Result<usize> {
    // SAFETY: the caller's promise.
    let done = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

impl<T> Aio<T> {
    /// Room for `flights` at a time. With `touched`, their buffers are all in memory from the start.
    pub(crate) fn new(flights: usize, touched: bool) -> io::Result<Self> {
        let null = File::open("/dev/null")?;
        let buffer = || Buffer::new(HEAD + ROOM, HEAD);
        let buffers = if touched { (0..flights).map(|_| buffer().touch()).collect() } else { Vec::new() };
        let mut context = 0u64;
        // One more for waking.
        // SAFETY: the kernel writes a word to `context`, which lives through the call.
        unsafe { call(libc::SYS_io_setup, [flights as u64 + 1, (&raw mut context).addr() as u64, 0, 0, 0])? };
        let (free, flying) = ((0..flights).collect(), (0..flights).map(|_| None).collect());
        let slots = Mutex::new(Slots { free, flights: flying, buffers, waiting: Vec::new() });
        Ok(Self { context, slots, in_flight: AtomicUsize::new(0), closing: AtomicBool::new(false), null })
    }

    /// Takes on a read of whole aligned blocks; [`Aio::kick`] hands it to the kernel. The ticket comes back where
    /// there is no room, or no file for it.
    pub(crate) fn add(&self, layer: Arc<Layer>, offset: u64, len: usize, ticket: T) -> Result<(), T> {
        let Some(file) = layer.direct().filter(|_| len <= ROOM) else { return Err(ticket) };
        let mut slots = self.slots.lock().expect("no holder panics");
        let Some(index) = slots.free.pop() else { return Err(ticket) };
        let mut buffer = slots.buffers.pop().unwrap_or_else(|| Buffer::new(HEAD + ROOM, HEAD));
        let iocb = Iocb {
            data: index as u64,
            opcode: PREAD,
            fd: file.as_raw_fd().cast_unsigned(),
            buf: buffer[HEAD..].as_mut_ptr().expose_provenance() as u64,
            len: len as u64,
            offset,
            ..Iocb::default()
        };
        slots.flights[index] = Some(Flight { ticket, buffer, len, _layer: layer });
        slots.waiting.push(iocb);
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Hands all that was taken on to the kernel, and returns what it refuses.
    pub(crate) fn kick(&self) -> Vec<T> {
        let mut waiting = std::mem::take(&mut self.slots.lock().expect("no holder panics").waiting);
        let mut refused = Vec::new();
        let mut at = 0;
        while at < waiting.len() {
            match self.submit(&mut waiting[at..]) {
                Ok(taken) => at += taken,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::debug!("a direct read is refused: {e}");
                    let landed = self.land(&mut self.slots.lock().expect("no holder panics"), waiting[at].data, -1);
                    refused.extend(landed.map(|landed| landed.ticket));
                    at += 1;
                }
            }
        }
        refused
    }

    fn submit(&self, iocbs: &mut [Iocb]) -> io::Result<usize> {
        let mut pointers = [0; EVENTS];
        let mut count = 0;
        for (pointer, iocb) in pointers.iter_mut().zip(iocbs) {
            *pointer = (&raw mut *iocb).expose_provenance() as u64;
            count += 1;
        }
        // SAFETY: `count` pointers to requests that live through the call (the kernel copies them, and writes a key
        // into each). What they read into belongs to a flight, which is given up only once it has ended or was refused.
        unsafe { call(libc::SYS_io_submit, [self.context, count, pointers.as_ptr().expose_provenance() as u64, 0, 0]) }
    }

    /// Waits until some have ended. False: the end was asked for, and none is in flight.
    pub(crate) fn wait(&self, landed: &mut Vec<Landed<T>>) -> io::Result<bool> {
        let mut events = [Event::default(); EVENTS];
        let buf = events.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: room for EVENTS events, which live through the call; no time limit.
        let count = match unsafe { call(libc::SYS_io_getevents, [self.context, 1, EVENTS as u64, buf, 0]) } {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            counted => counted?,
        };
        {
            let mut slots = self.slots.lock().expect("no holder panics");
            landed.extend(events[..count].iter().filter_map(|e| self.land(&mut slots, e.data, e.result)));
        }
        let idle = self.in_flight.load(Ordering::Acquire) == 0 && landed.is_empty();
        Ok(!(idle && self.closing.load(Ordering::Acquire)))
    }

    fn land(&self, slots: &mut Slots<T>, data: u64, result: i64) -> Option<Landed<T>> {
        if data == WAKE {
            return None;
        }
        let index = data as usize;
        let Flight { ticket, buffer, len, _layer } = slots.flights[index].take().expect("it was in flight");
        slots.free.push(index);
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(Landed { ticket, buffer, len, whole: result == len as i64 })
    }

    /// Takes buffers back.
    pub(crate) fn give_back(&self, landed: &mut Vec<Landed<T>>) {
        let mut slots = self.slots.lock().expect("no holder panics");
        slots.buffers.extend(landed.drain(..).map(|l| l.buffer));
    }

    /// Lets the listener end, once nothing is in flight.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        let wake = Iocb { data: WAKE, opcode: PREAD, fd: self.null.as_raw_fd().cast_unsigned(), ..Iocb::default() };
        while let Err(e) = self.submit(&mut [wake]) {
            if e.kind() != io::ErrorKind::Interrupted {
                log::error!("a thread that listens for reads cannot be ended: {e}");
                return;
            }
        }
    }
}

impl<T> Drop for Aio<T> {
    fn drop(&mut self) {
        // Waits for all in flight: only then may their buffers go.
        // SAFETY: the context is ours, and nobody else knows it any more.
        if let Err(e) = unsafe { call(libc::SYS_io_destroy, [self.context, 0, 0, 0, 0]) } {
            log::error!("a queue of reads cannot be ended: {e}");
            // What may still be written to must never be used for anything else.
            let slots = self.slots.get_mut().expect("no holder panics");
            std::mem::forget(std::mem::take(&mut slots.flights));
        }
    }
}
