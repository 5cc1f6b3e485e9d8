//! What a client sends: read ahead as far as it is short, and long payloads straight to where they are wanted.

use super::super::wire::{REQUEST_LEN, Request};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// Bytes read ahead from the socket.
const AHEAD: usize = 32 << 10;

/// What was read ahead.
pub(super) struct Input {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    pub(super) over: bool,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { buf: vec![0; AHEAD].into(), start: 0, end: 0, over: false }
    }

    /// Makes `len` bytes be there; false: the client has ended the connection.
    fn fill(&mut self, mut stream: &UnixStream, len: usize) -> io::Result<bool> {
        while self.end - self.start < len {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.start + len > self.buf.len() {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match stream.read(&mut self.buf[self.end..]) {
                Ok(0) if self.start == self.end => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.end += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    pub(super) fn next(&mut self, stream: &UnixStream) -> io::Result<Option<Request>> {
        if !self.fill(stream, REQUEST_LEN)? {
            return Ok(None);
        }
        let bytes = self.buf[self.start..self.start + REQUEST_LEN].try_into().expect("as long");
        self.start += REQUEST_LEN;
        let garbage = || io::Error::new(io::ErrorKind::InvalidData, "the client sent no request where one must be");
        Request::decode(bytes).map(Some).ok_or_else(garbage)
    }

    pub(super) fn payload(&mut self, mut stream: &UnixStream, out: &mut [u8]) -> io::Result<()> {
        let here = out.len().min(self.end - self.start);
        out[..here].copy_from_slice(&self.buf[self.start..self.start + here]);
        self.start += here;
        stream.read_exact(&mut out[here..])
    }

    /// Whether a whole request is at hand, but for its payload.
    pub(super) fn has_more(&self) -> bool {
        self.end - self.start >= REQUEST_LEN
    }

    /// Whether anything more is here, be it still with the kernel: behind a long payload nothing has been read ahead.
    pub(super) fn is_followed(&self, stream: &UnixStream) -> bool {
        self.end > self.start || rustix::io::ioctl_fionread(stream).is_ok_and(|bytes| bytes > 0)
    }
}
