//! The daemon's side of the resident library's protocol ([`base::resident`]).

use crate::error::Error;
use base::resident::fields;
use base::{ByteRange, PAGE};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection to the library inside one hypervisor.
pub struct Resident {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

/// What `hello` says.
#[derive(Debug)]
pub struct Hello {
    /// Address of RAM in the hypervisor.
    pub ram: u64,
    /// Its bytes.
    pub size: u64,
    /// Pids of the holders that live.
    pub holders: Vec<u32>,
}

/// What `freeze` says.
#[derive(Debug)]
pub struct Frozen {
    /// Pid of the holder.
    pub holder: u32,
    /// Start time of the holder, in clock ticks.
    pub start: u64,
    /// Address of RAM in the holder.
    pub ram: u64,
    /// Whether `written` is the truth since the last freeze; otherwise ask the holder's pagemap.
    pub tracked: bool,
    /// Ranges written since the last freeze.
    pub written: Vec<ByteRange>,
    /// Ranges discarded since the last freeze (or since the process began where not tracked).
    pub zeroed: Vec<ByteRange>,
    /// Microseconds the fork took.
    pub fork_us: u64,
    /// Microseconds the scan took.
    pub scan_us: u64,
}

const LIMIT: Duration = Duration::from_secs(20);
/// The longest line: the pids of many holders.
const LINE_MAX: u64 = 1 << 20;

impl Resident {
    /// Connects to the library's socket.
    ///
    /// # Errors
    /// [`Error::Io`] where nothing listens.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(Error::io("connect to", path))?;
        stream.set_read_timeout(Some(LIMIT)).map_err(Error::io("connect to", path))?;
        stream.set_write_timeout(Some(LIMIT)).map_err(Error::io("connect to", path))?;
        let reader = BufReader::new(stream.try_clone().map_err(Error::io("connect to", path))?);
        Ok(Self { stream, reader })
    }

    /// Where RAM lies, and which holders live.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn hello(&mut self) -> Result<Hello, Error> {
        let line = self.ask("hello")?;
        let f = fields(&line).map_err(Error::Resident)?;
        if f.get("version") != Some(&base::resident::VERSION.to_string().as_str()) {
            return Err(Error::Resident(format!("speaks another version: `{}`", line.trim())));
        }
        let holders = f.get("holders").map_or(Vec::new(), |h| h.split(',').filter_map(|p| p.parse().ok()).collect());
        Ok(Hello { ram: hex(&f, "ram")?, size: number(&f, "size")?, holders })
    }

    /// Installs the RAM map kept in `path`.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn map(&mut self, path: &Path) -> Result<(), Error> {
        let line = self.ask(&format!("map {}", path.display()))?;
        fields(&line).map(|_| ()).map_err(Error::Resident)
    }

    /// Takes work out of the pause of the next freeze, while the guest runs.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn prepare(&mut self) -> Result<(), Error> {
        let line = self.ask("prepare")?;
        fields(&line).map(|_| ()).map_err(Error::Resident)
    }

    /// Lets pages of RAM be mapped only when the guest touches them, so that its page table tells what it touches.
    ///
    /// # Errors
    /// [`Error::Resident`] where the kernel cannot.
    pub fn watch(&mut self) -> Result<(), Error> {
        let line = self.ask("watch")?;
        fields(&line).map(|_| ()).map_err(Error::Resident)
    }

    /// Freezes the RAM of the stopped VM. `full` forgets what was tracked.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn freeze(&mut self, full: bool) -> Result<Frozen, Error> {
        let line = self.ask(if full { "freeze all" } else { "freeze" })?;
        let f = fields(&line).map_err(Error::Resident)?;
        let written = self.ranges(number(&f, "written")?)?;
        let zeroed = self.ranges(number(&f, "zeroed")?)?;
        Ok(Frozen {
            holder: number(&f, "holder")? as u32,
            start: number(&f, "start")?,
            ram: hex(&f, "ram")?,
            tracked: f.get("tracked") == Some(&"1"),
            written,
            zeroed,
            fork_us: number(&f, "fork_us")?,
            scan_us: number(&f, "scan_us")?,
        })
    }

    /// Ends and reaps a holder.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn release(&mut self, holder: u32) -> Result<(), Error> {
        let line = self.ask(&format!("release {holder}"))?;
        fields(&line).map(|_| ()).map_err(Error::Resident)
    }

    /// The counters of the library, as it names them.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn stat(&mut self) -> Result<HashMap<String, u64>, Error> {
        let line = self.ask("stat")?;
        let f = fields(&line).map_err(Error::Resident)?;
        Ok(f.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v.parse().ok()?))).collect())
    }

    /// The FUSE descriptor that the library keeps.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn fuse(&mut self) -> Result<OwnedFd, Error> {
        self.send("fuse")?;
        let mut byte = [0u8; 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let failed = |e: rustix::io::Errno| Error::Resident(format!("fuse: {e}"));
        recvmsg(&self.stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(failed)?;
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let mut line = String::from(byte[0] as char);
        self.reader.read_line(&mut line).map_err(|e| Error::Resident(format!("fuse: {e}")))?;
        fields(&line).map_err(Error::Resident)?;
        fd.ok_or_else(|| Error::Resident("sent no FUSE descriptor".into()))
    }

    /// The ranges behind a line. No more is allocated than comes, whatever number of them the line names.
    fn ranges(&mut self, count: u64) -> Result<Vec<ByteRange>, Error> {
        let broken = |why: String| Error::Resident(format!("freeze broke off: {why}"));
        let len = count.checked_mul(16).ok_or_else(|| broken(format!("it names {count} ranges")))?;
        let mut bytes = Vec::new();
        let got = (&mut self.reader).take(len).read_to_end(&mut bytes).map_err(|e| broken(e.to_string()))?;
        if got as u64 != len {
            return Err(broken(format!("{got} of {len} bytes of ranges came")));
        }
        let mut after = 0;
        let range = |words: &[u8]| {
            let word = |at: usize| u64::from_le_bytes(words[at..at + 8].try_into().expect("eight bytes"));
            let (start, end) = (word(0), word(8));
            if start < after || end <= start || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
                return Err(Error::Resident(format!("{start:#x}..{end:#x} is no range of pages behind {after:#x}")));
            }
            after = end;
            Ok(ByteRange::new(start, end))
        };
        bytes.chunks_exact(16).map(range).collect()
    }

    fn send(&mut self, request: &str) -> Result<(), Error> {
        self.stream.write_all(format!("{request}\n").as_bytes()).map_err(|e| Error::Resident(format!("{request}: {e}")))
    }

    fn ask(&mut self, request: &str) -> Result<String, Error> {
        self.send(request)?;
        let mut line = String::new();
        match (&mut self.reader).take(LINE_MAX).read_line(&mut line) {
            Ok(0) => Err(Error::Resident(format!("hung up at `{request}`"))),
            Ok(_) => Ok(line),
            Err(e) => Err(Error::Resident(format!("{request}: {e}"))),
        }
    }
}

fn number(f: &HashMap<&str, &str>, key: &str) -> Result<u64, Error> {
    f.get(key).and_then(|v| v.parse().ok()).ok_or_else(|| Error::Resident(format!("reply lacks `{key}`")))
}

fn hex(f: &HashMap<&str, &str>, key: &str) -> Result<u64, Error> {
    f.get(key)
        .and_then(|v| u64::from_str_radix(v.trim_start_matches("0x"), 16).ok())
        .ok_or_else(|| Error::Resident(format!("reply lacks `{key}`")))
}

#[cfg(test)]
mod fuzz;
