//! A client of the NBD front: reads disks, and what of them is data, from another process.
//!
//! One request at a time on a connection; who wants more speed opens several.

use crate::front::nbd::wire::{
    ALLOCATION, CHUNK_LEN, GREETING, OPTION, OPTION_REPLY, PAYLOAD_MAX, Request, STATE_ZERO, chunk, cmd, hello, info,
    opt, rep, u16_at, u32_at, u64_at,
};
use base::ByteRange;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The most that one read may ask for.
pub const READ_MAX: usize = PAYLOAD_MAX as usize;
/// How long a mirror may be away: it is replaced in milliseconds where a daemon runs.
const AWAY: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// A connection to an export.
#[derive(Debug)]
pub struct NbdClient {
    socket: std::path::PathBuf,
    stream: UnixStream,
    size: u64,
}

impl NbdClient {
    /// Connects to the export at `socket`.
    ///
    /// # Errors
    /// Nobody serves there, or something that does not tell what is data.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let mut client = Self { socket: socket.to_owned(), stream, size: 0 };
        client.shake()?;
        Ok(client)
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf`, of at most [`READ_MAX`] bytes, from `offset`.
    ///
    /// # Errors
    /// What the server said, or nobody serves any more.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.again(|client| client.try_read(offset, buf))
    }

    /// The ranges of the disk that are not zero, ascending.
    ///
    /// # Errors
    /// As [`NbdClient::read_at`].
    pub fn data_ranges(&mut self) -> io::Result<Vec<ByteRange>> {
        let (mut found, mut at): (Vec<ByteRange>, u64) = (Vec::new(), 0);
        while at < self.size {
            for (len, flags) in self.again(|client| client.try_status(at))? {
                let range = ByteRange::new(at, (at + u64::from(len)).min(self.size));
                at = range.end;
                match found.last_mut() {
                    _ if flags & STATE_ZERO != 0 => {}
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => found.push(range),
                }
            }
        }
        Ok(found)
    }

    /// Asks again after the mirror was replaced: reads do no harm twice.
    fn again<T>(&mut self, mut ask: impl FnMut(&mut Self) -> io::Result<T>) -> io::Result<T> {
        let until = Instant::now() + AWAY;
        loop {
            let broken = match ask(self) {
                Err(e) if lost(&e) && Instant::now() < until => e,
                done => return done,
            };
            std::thread::sleep(PAUSE);
            match Self::connect(&self.socket) {
                Ok(fresh) if fresh.size == self.size => self.stream = fresh.stream,
                Ok(_) => return Err(io::Error::other("another disk is served now")),
                Err(_) if Instant::now() < until => {}
                Err(_) => return Err(broken),
            }
        }
    }

    fn shake(&mut self) -> io::Result<()> {
        let greeting: [u8; 18] = self.take()?;
        if u64_at(&greeting, 0) != GREETING || u64_at(&greeting, 8) != OPTION {
            return Err(odd("it does not greet as an NBD server does"));
        }
        self.stream.write_all(&u32::from(hello::FIXED | hello::NO_ZEROES).to_be_bytes())?;
        self.option(opt::STRUCTURED_REPLY, &[], |_, _| {})?;
        let mut contexts = vec![0; 4];
        contexts.extend(1u32.to_be_bytes());
        contexts.extend((ALLOCATION.len() as u32).to_be_bytes());
        contexts.extend(ALLOCATION.as_bytes());
        let mut told = false;
        self.option(opt::SET_META_CONTEXT, &contexts, |kind, _| told |= kind == rep::META_CONTEXT)?;
        if !told {
            return Err(odd("it does not tell what is data"));
        }
        let mut size = None;
        self.option(opt::GO, &[0; 6], |kind, body| {
            if kind == rep::INFO && body.len() >= 12 && u16_at(body, 0) == info::EXPORT {
                size = Some(u64_at(body, 2));
            }
        })?;
        self.size = size.ok_or_else(|| odd("it does not tell the size"))?;
        Ok(())
    }

    fn option(&mut self, option: u32, body: &[u8], mut see: impl FnMut(u32, &[u8])) -> io::Result<()> {
        let mut out = OPTION.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((body.len() as u32).to_be_bytes());
        out.extend(body);
        self.stream.write_all(&out)?;
        loop {
            let head: [u8; 20] = self.take()?;
            let (kind, len) = (u32_at(&head, 12), u32_at(&head, 16) as usize);
            if u64_at(&head, 0) != OPTION_REPLY || len > 1 << 16 {
                return Err(odd("its answer to an option makes no sense"));
            }
            let mut body = vec![0; len];
            self.stream.read_exact(&mut body)?;
            match kind {
                rep::ACK => return Ok(()),
                refused if refused & 1 << 31 != 0 => {
                    return Err(io::Error::other(format!("refused: {}", String::from_utf8_lossy(&body))));
                }
                _ => see(kind, &body),
            }
        }
    }

    fn send(&mut self, command: u16, offset: u64, len: u32) -> io::Result<()> {
        self.stream.write_all(&Request { flags: 0, command, cookie: 1, offset, len }.encode())
    }

    fn try_read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(buf.len() <= READ_MAX, "a read of {} bytes", buf.len());
        self.send(cmd::READ, offset, u32::try_from(buf.len()).expect("checked"))?;
        let mut filled = 0;
        loop {
            let (last, kind, len) = self.chunk()?;
            let inside = |at: u64, len: usize| {
                let start = usize::try_from(at.checked_sub(offset)?).ok()?;
                (start.checked_add(len)? <= buf.len()).then_some(start)
            };
            match kind {
                chunk::DATA if len >= 8 => {
                    let at = u64::from_be_bytes(self.take()?);
                    let start = inside(at, len - 8).ok_or_else(|| odd("data that were not asked for"))?;
                    self.stream.read_exact(&mut buf[start..start + len - 8])?;
                    filled += len - 8;
                }
                chunk::HOLE if len == 12 => {
                    let head: [u8; 12] = self.take()?;
                    let len = u32_at(&head, 8) as usize;
                    let start = inside(u64_at(&head, 0), len).ok_or_else(|| odd("a hole that was not asked for"))?;
                    buf[start..start + len].fill(0);
                    filled += len;
                }
                _ => self.other(kind, len)?,
            }
            if last {
                return if filled == buf.len() { Ok(()) } else { Err(odd("fewer bytes than asked for")) };
            }
        }
    }

    fn try_status(&mut self, offset: u64) -> io::Result<Vec<(u32, u32)>> {
        let len = (self.size - offset).min(1 << 30);
        self.send(cmd::BLOCK_STATUS, offset, u32::try_from(len).expect("at most 1 GiB"))?;
        let mut extents = Vec::new();
        loop {
            let (last, kind, len) = self.chunk()?;
            if kind == chunk::BLOCK_STATUS && (12..=1 << 20).contains(&len) {
                let mut body = vec![0; len];
                self.stream.read_exact(&mut body)?;
                extents.extend(body[4..].chunks_exact(8).map(|e| (u32_at(e, 0), u32_at(e, 4))));
            } else {
                self.other(kind, len)?;
            }
            if last {
                let none = extents.iter().all(|(len, _)| *len == 0);
                return if none { Err(odd("no extents")) } else { Ok(extents) };
            }
        }
    }

    /// The head of a chunk: whether it is the last, its kind, the bytes that follow.
    fn chunk(&mut self) -> io::Result<(bool, u16, usize)> {
        let head: [u8; CHUNK_LEN] = self.take()?;
        if u32_at(&head, 0) != crate::front::nbd::wire::CHUNK {
            return Err(odd("no chunk where one must be"));
        }
        Ok((u16_at(&head, 4) & chunk::DONE != 0, u16_at(&head, 6), u32_at(&head, 16) as usize))
    }

    /// A chunk that is none of those expected.
    fn other(&mut self, kind: u16, len: usize) -> io::Result<()> {
        if len > 1 << 16 {
            return Err(odd("a chunk of unreasonable length"));
        }
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body)?;
        if kind & 1 << 15 == 0 {
            return Ok(());
        }
        let number = body.get(..4).map_or(0, |_| u32_at(&body, 0));
        let words = body.get(6..).map(String::from_utf8_lossy).unwrap_or_default();
        Err(io::Error::other(format!("the server answers error {number}: {words}")))
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.stream.read_exact(&mut out)?;
        Ok(out)
    }
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server: {what}"))
}

/// Whether the other side is gone, as opposed to having said no.
fn lost(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
mod fuzz;
