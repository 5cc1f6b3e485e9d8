//! The thread that answers the daemon, by the protocol of [`base::resident`].
//!
//! Requests run one after another; several connections may be open, so that a daemon that hangs or died without
//! closing does not keep its successor out. Nothing a client does ends the thread: a line that is no request is
//! answered with an error, one that never ends closes the connection, and a client that does not read its reply
//! is dropped.

use crate::error::Error;
use crate::holder::{self, Holders};
use crate::hooks::{Config, shared};
use crate::ram::Changes;
use crate::sys;
use base::ByteRange;
use base::resident::VERSION;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest request: a word and a path.
const LINE_MAX: usize = 8192;
/// Connections served at once; the oldest gives way.
const CLIENTS_MAX: usize = 8;
/// How long a client may take to read its reply.
const SEND_TIMEOUT_S: i64 = 5;
/// Stack of the control thread, in bytes.
const STACK: usize = 256 << 10;

struct Client {
    socket: OwnedFd,
    /// What came and is no whole line yet.
    pending: Vec<u8>,
}

/// What is sent back: a line, the ranges behind it, a descriptor along with it.
#[derive(Default)]
struct Reply {
    line: String,
    ranges: Vec<u8>,
    descriptor: Option<RawFd>,
}

/// Starts the control thread, with all signals blocked in it: the hypervisor's handlers must not run there.
pub(crate) fn start(config: &'static Config) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid signal set, which is then filled.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: the sets are live; the mask is that of the calling thread, which gets it back below.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || serve(config));
    // SAFETY: `before` is what the thread had.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    thread.map(drop)
}

fn serve(config: &'static Config) {
    holder::name_control_thread();
    let mut holders = Holders::default();
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut polled: Vec<libc::pollfd> = std::iter::once(config.socket)
            .chain(clients.iter().map(|c| c.socket.as_raw_fd()))
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: the array is live and its length is the one passed.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        if ready < 0 || polled[0].revents & libc::POLLNVAL != 0 {
            // Only where the hypervisor has closed what is not its own. Wait, do not spin.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        let mut answered = polled[1..].iter();
        clients.retain_mut(|client| match answered.next() {
            Some(poll) if poll.revents != 0 => {
                // A defect met by one request must cost that connection, not the control of a running guest.
                let served = catch_unwind(AssertUnwindSafe(|| client.serve(config, &mut holders)));
                matches!(served, Ok(Ok(())))
            }
            _ => true,
        });
        if polled[0].revents != 0
            && let Some(client) = Client::accept(config.socket)
        {
            if clients.len() == CLIENTS_MAX {
                clients.remove(0);
            }
            clients.push(client);
        }
    }
}

impl Client {
    fn accept(listener: RawFd) -> Option<Self> {
        let timeout = libc::timeval { tv_sec: SEND_TIMEOUT_S, tv_usec: 0 };
        // SAFETY: a null address is allowed; the descriptor accepted is new, and `timeout` outlives its call.
        unsafe {
            let fd = libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC);
            if fd < 0 {
                return None;
            }
            let socket = OwnedFd::from_raw_fd(fd);
            let size = size_of::<libc::timeval>() as libc::socklen_t;
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, (&raw const timeout).cast(), size);
            Some(Self { socket, pending: Vec::new() })
        }
    }

    /// Reads what is there and answers every whole line of it. An error ends the connection.
    fn serve(&mut self, config: &Config, holders: &mut Holders) -> io::Result<()> {
        let mut chunk = [0u8; 4096];
        // SAFETY: the buffer is live and its length is the one passed.
        let got =
            unsafe { libc::recv(self.socket.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len(), libc::MSG_DONTWAIT) };
        match got {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            -1 if matches!(sys::errno(), libc::EAGAIN | libc::EINTR) => return Ok(()),
            -1 => return Err(io::Error::last_os_error()),
            _ => self.pending.extend_from_slice(&chunk[..got as usize]),
        }
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]);
            holders.reap();
            let reply = answer(line.trim_end(), config, holders)
                .unwrap_or_else(|error| Reply::line(format!("error {}", one_line(&error.to_string()))));
            self.send(reply)?;
        }
        if self.pending.len() > LINE_MAX {
            self.send(Reply::line(format!("error a request has at most {LINE_MAX} bytes")))?;
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    fn send(&self, reply: Reply) -> io::Result<()> {
        let mut bytes = reply.line.into_bytes();
        bytes.push(b'\n');
        bytes.extend_from_slice(&reply.ranges);
        let mut sent = 0;
        let mut descriptor = reply.descriptor;
        while sent < bytes.len() {
            let done = send_some(self.socket.as_raw_fd(), &bytes[sent..], descriptor)?;
            if done > 0 {
                descriptor = None;
            }
            sent += done;
        }
        Ok(())
    }
}

/// One `sendmsg`, without SIGPIPE; the descriptor travels with the first byte.
fn send_some(socket: RawFd, bytes: &[u8], descriptor: Option<RawFd>) -> io::Result<usize> {
    // `u64` aligns it as a control message header must be.
    let mut control = [0u64; 4];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero bytes are a valid `msghdr`; the pointers put into it outlive the call, and the control
    // buffer (32 bytes) holds one message with one descriptor (CMSG_SPACE(4) = 24).
    let done = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        if let Some(fd) = descriptor {
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        }
        libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL)
    };
    match done {
        -1 if sys::errno() == libc::EINTR => Ok(0),
        -1 => Err(io::Error::last_os_error()),
        done => Ok(done as usize),
    }
}

impl Reply {
    fn line(line: impl Into<String>) -> Self {
        Self { line: line.into(), ..Self::default() }
    }
}

fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

fn answer(line: &str, config: &Config, holders: &mut Holders) -> Result<Reply, Error> {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("hello", "") => Ok(hello(holders)),
        ("map", path) if !path.is_empty() => {
            let extents =
                shared().ram.as_mut().ok_or(Error::NoRam)?.install(Path::new(path), config.ram_dir.as_deref())?;
            Ok(Reply::line(format!("ok extents={extents}")))
        }
        ("watch", "") => {
            shared().ram.as_mut().ok_or(Error::NoRam)?.watch()?;
            Ok(Reply::line("ok"))
        }
        ("prepare", "") => {
            shared().ram.as_mut().ok_or(Error::NoRam)?.prepare();
            Ok(Reply::line("ok"))
        }
        ("freeze", how @ ("" | "all")) => freeze(how == "all", holders),
        ("release", pid) => holders.release(pid).map(|()| Reply::line("ok")),
        ("fuse", "") => {
            let descriptor = Some(config.fuse.ok_or(Error::NoFuse)?);
            Ok(Reply { line: "ok".to_owned(), descriptor, ..Reply::default() })
        }
        ("stat", "") => stat(),
        _ => Err(Error::UnknownRequest { line: line.chars().take(80).collect() }),
    }
}

fn hello(holders: &Holders) -> Reply {
    let state = shared();
    let (start, size, mapped) =
        state.ram.as_ref().map_or((0, 0, false), |ram| (ram.start(), ram.size(), ram.installed()));
    Reply::line(format!(
        "ok version={VERSION} pid={} ram={start:x} size={size} mapped={} holders={}",
        std::process::id(),
        u8::from(mapped),
        holders.list()
    ))
}

fn stat() -> Result<Reply, Error> {
    let state = shared();
    let ram = state.ram.as_ref().ok_or(Error::NoRam)?;
    let counters = ram.counters();
    Ok(Reply::line(format!(
        "ok extents={} discards={} discarded_bytes={} refused_advice={}",
        ram.extents(),
        counters.discards,
        counters.discarded_bytes,
        counters.refused_advice
    )))
}

/// Fork first, then scan: what the scan marks as clean is what the holder holds. The lock keeps discards out.
fn freeze(all: bool, holders: &mut Holders) -> Result<Reply, Error> {
    let mut state = shared();
    let ram = state.ram.as_mut().ok_or(Error::NoRam)?;
    let begun = Instant::now();
    ram.set_forkable(true)?;
    let held = holders.hold();
    ram.set_forkable(false)?;
    let pid = held?;
    let forked = Instant::now();
    let Changes { tracked, written, zeroed } = ram.take_changes(all);
    let scanned = forked.elapsed();
    let line = format!(
        "ok holder={pid} start={} ram={:x} tracked={} written={} zeroed={} ranges={} fork_us={} scan_us={}",
        holder::start_ticks(pid).unwrap_or(0),
        ram.start(),
        u8::from(tracked),
        written.len(),
        zeroed.len(),
        written.len() + zeroed.len(),
        (forked - begun).as_micros(),
        scanned.as_micros()
    );
    Ok(Reply { line, ranges: encode(written.iter().chain(&zeroed)), descriptor: None })
}

fn encode<'a>(ranges: impl Iterator<Item = &'a ByteRange>) -> Vec<u8> {
    ranges.flat_map(|range| [range.start, range.end]).flat_map(u64::to_le_bytes).collect()
}
