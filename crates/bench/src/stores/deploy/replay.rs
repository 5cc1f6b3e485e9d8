//! One client for every system measured: replays a trace on a disk that is served over NBD on a unix socket.
//!
//! Fixed newstyle with simple replies, which every server knows. One thread asks, another takes the answers.

#[cfg(test)]
mod tests;

use super::trace::{Ask, Step, Trace};
use crate::Outcome;
use base::ByteRange;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

// Numbers of the NBD protocol (doc/proto.md of NetworkBlockDevice/nbd).
const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const GO: u32 = 7;
const ACK: u32 = 1;
const FIXED_NO_ZEROES: u32 = 3;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
/// How long a server may keep silent.
const SILENCE: Duration = Duration::from_secs(120);
/// Requests are whole sectors.
const SECTOR: u64 = 512;

/// Replays a trace on the export `name` at `socket`. With a reference, every byte read is compared with it, where the
/// trace did not write before.
pub(super) fn replay(socket: &Path, name: &str, trace: &Trace, reference: Option<&File>) -> Outcome {
    let mut stream = UnixStream::connect(socket).map_err(|e| format!("{}: {e}", socket.display()))?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    shake(&mut stream, name)?;
    let answers = Answers::default();
    let reader = BufReader::with_capacity(64 << 10, stream.try_clone()?);
    let done = std::thread::scope(|scope| {
        scope.spawn(|| answers.take_all(reader));
        let mut client = Client { stream: &stream, answers: &answers, reference, written: HashSet::new() };
        let done = client.run(trace);
        let _ = client.send(DISCONNECT, u64::MAX, ByteRange::new(0, 0), &[]);
        let _ = stream.shutdown(Shutdown::Both);
        done
    });
    done.map_err(|e| format!("{}: {e}", socket.display()).into())
}

fn shake(stream: &mut UnixStream, name: &str) -> Outcome {
    let greeting: [u8; 18] = take(stream)?;
    if number(&greeting[..8]) != GREETING || number(&greeting[8..16]) != OPTION {
        return Err("it does not greet as an NBD server does".into());
    }
    let mut out = FIXED_NO_ZEROES.to_be_bytes().to_vec();
    out.extend(OPTION.to_be_bytes());
    out.extend(GO.to_be_bytes());
    out.extend((name.len() as u32 + 6).to_be_bytes());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    out.extend(0u16.to_be_bytes());
    stream.write_all(&out)?;
    loop {
        let head: [u8; 20] = take(stream)?;
        let (kind, len) = (number(&head[12..16]) as u32, number(&head[16..20]));
        if number(&head[..8]) != OPTION_REPLY || len > 1 << 16 {
            return Err("its answer to an option makes no sense".into());
        }
        let mut body = vec![0; len as usize];
        stream.read_exact(&mut body)?;
        match kind {
            ACK => return Ok(()),
            refused if refused >> 31 != 0 => {
                return Err(format!("export `{name}` is refused: {}", String::from_utf8_lossy(&body)).into());
            }
            _ => {}
        }
    }
}

/// What has been asked and answered.
#[derive(Default)]
struct Answers {
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes that the answer to a request brings.
    asked: HashMap<u64, usize>,
    answered: HashMap<u64, Vec<u8>>,
    failed: Option<String>,
    /// Whether answers are to be kept until they were looked at.
    keep: bool,
}

impl Answers {
    /// Takes answers until the server or the client ends.
    fn take_all(&self, mut from: BufReader<UnixStream>) {
        let mut buffer = Vec::new();
        loop {
            if let Err(error) = self.take_one(&mut from, &mut buffer) {
                self.state.lock().expect("not poisoned").failed = Some(error.to_string());
                self.came.notify_all();
                return;
            }
        }
    }

    fn take_one(&self, from: &mut BufReader<UnixStream>, buffer: &mut Vec<u8>) -> Outcome {
        let head: [u8; 16] = take(from)?;
        let (magic, error, cookie) = (number(&head[..4]) as u32, number(&head[4..8]), number(&head[8..16]));
        if magic != REPLY {
            return Err("no simple reply where one must be".into());
        }
        let expected = self.state.lock().expect("not poisoned").asked.remove(&cookie);
        let bytes = expected.ok_or("an answer to what was not asked")?;
        if error != 0 {
            return Err(format!("the server answers error {error}").into());
        }
        buffer.resize(bytes, 0);
        from.read_exact(buffer)?;
        let mut state = self.state.lock().expect("not poisoned");
        let kept = if state.keep { std::mem::take(buffer) } else { Vec::new() };
        state.answered.insert(cookie, kept);
        drop(state);
        self.came.notify_one();
        Ok(())
    }

    /// Waits for an answer.
    fn wait(&self, cookie: u64) -> Outcome<Vec<u8>> {
        let mut state = self.state.lock().expect("not poisoned");
        loop {
            if let Some(bytes) = state.answered.remove(&cookie) {
                return Ok(bytes);
            }
            if let Some(failed) = &state.failed {
                return Err(failed.clone().into());
            }
            state = self.came.wait(state).expect("not poisoned");
        }
    }
}

struct Client<'a> {
    stream: &'a UnixStream,
    answers: &'a Answers,
    reference: Option<&'a File>,
    /// Sectors whose content the reference does not tell any more.
    written: HashSet<u64>,
}

impl Client<'_> {
    fn run(&mut self, trace: &Trace) -> Outcome {
        self.answers.state.lock().expect("not poisoned").keep = self.reference.is_some();
        let (mut asked, mut open) = (0, HashMap::new());
        for step in &trace.steps {
            match *step {
                Step::Ask(ask) => {
                    self.ask(asked, ask)?;
                    open.insert(asked, ask);
                    asked += 1;
                }
                Step::Await(number) => {
                    if let Some(ask) = open.remove(&number) {
                        self.answered(number, ask)?;
                    }
                }
            }
        }
        for (number, ask) in open {
            self.answered(number, ask)?;
        }
        Ok(())
    }

    fn ask(&mut self, cookie: u64, ask: Ask) -> Outcome {
        if self.reference.is_some()
            && let Ask::Write(range) | Ask::Zero(range) | Ask::Trim(range) = ask
        {
            self.written.extend(range.start / SECTOR..range.end.div_ceil(SECTOR));
        }
        match ask {
            Ask::Read(range) => self.send(READ, cookie, range, &[])?,
            Ask::Write(range) => {
                let content: Vec<u8> = (range.start / 8..range.end / 8).flat_map(u64::to_be_bytes).collect();
                self.send(WRITE, cookie, range, &content)?;
            }
            Ask::Zero(range) => self.send(WRITE_ZEROES, cookie, range, &[])?,
            Ask::Trim(range) => self.send(TRIM, cookie, range, &[])?,
            Ask::Flush => self.send(FLUSH, cookie, ByteRange::new(0, 0), &[])?,
        }
        Ok(())
    }

    fn send(&self, command: u16, cookie: u64, range: ByteRange, content: &[u8]) -> io::Result<()> {
        let bytes = if command == READ { (range.end - range.start) as usize } else { 0 };
        self.answers.state.lock().expect("not poisoned").asked.insert(cookie, bytes);
        let mut out = Vec::with_capacity(28 + content.len());
        out.extend(REQUEST.to_be_bytes());
        out.extend(0u16.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(range.start.to_be_bytes());
        out.extend(((range.end - range.start) as u32).to_be_bytes());
        out.extend(content);
        let mut stream = self.stream;
        stream.write_all(&out)
    }

    /// Waits for an answer, and looks at what it brings.
    fn answered(&self, number: u64, ask: Ask) -> Outcome {
        let came = self.answers.wait(number)?;
        let (Some(reference), Ask::Read(range)) = (self.reference, ask) else { return Ok(()) };
        let mut expected = vec![0; came.len()];
        reference.read_exact_at(&mut expected, range.start)?;
        for (i, (came, expected)) in came.chunks(512).zip(expected.chunks(512)).enumerate() {
            let sector = range.start / SECTOR + i as u64;
            if came != expected && !self.written.contains(&sector) {
                return Err(format!("sector {sector} holds other bytes than the image").into());
            }
        }
        Ok(())
    }
}

fn take<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    from.read_exact(&mut out)?;
    Ok(out)
}

/// A number of up to eight bytes, the highest first.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}
