//! A client of QEMU's machine protocol (`docs/interop/qmp-spec` of QEMU): JSON objects by line over a unix socket.
//!
//! One owner sends commands; a reader thread of each connection sorts what arrives into replies and events and
//! calls `wake` for every event, so that an owner that waits for other things learns of it.

use crate::error::Error;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long a command may take unless its caller knows better.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An event: its name and data.
#[derive(Clone, Debug)]
pub struct Event {
    /// For example `STOP`, `RESUME`, `SHUTDOWN`, `MIGRATION`.
    pub name: String,
    /// Its `data`, or null.
    pub data: Value,
}

/// A connection.
pub struct Qmp {
    path: PathBuf,
    stream: UnixStream,
    replies: Receiver<Value>,
    events: Receiver<Event>,
    kept: VecDeque<Event>,
}

impl Qmp {
    /// Connects to a socket on which the hypervisor listens (or will: the socket may have been bound on its
    /// behalf), and negotiates. `wake` is called from another thread at each event and at the end.
    ///
    /// # Errors
    /// [`Error::Timeout`] where no greeting comes within [`LIMIT`]; [`Error::Io`] where nothing listens.
    pub fn connect(path: &Path, wake: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(Error::io("connect to", path))?;
        let reader = stream.try_clone().map_err(Error::io("connect to", path))?;
        let (reply_tx, replies) = channel();
        let (event_tx, events) = channel();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read_lines(reader, &reply_tx, &event_tx, &wake))
            .map_err(Error::io("start a thread for", path))?;
        let mut qmp = Self { path: path.to_owned(), stream, replies, events, kept: VecDeque::new() };
        let greeting = qmp.next_reply("greeting", LIMIT)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Refused { command: "greeting".into(), reason: greeting.to_string() });
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its `return`.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words, [`Error::Timeout`] after [`LIMIT`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.execute_with(command, arguments, None)
    }

    /// The same, passing a descriptor along (for `getfd`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Error> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.send(line.as_bytes(), fd).map_err(Error::io("write to", &self.path))?;
        let reply = self.next_reply(command, LIMIT)?;
        match (reply.get("return"), reply.get("error")) {
            (Some(value), _) => Ok(value.clone()),
            (_, Some(error)) => Err(Error::Refused {
                command: command.into(),
                reason: error["desc"].as_str().unwrap_or("no reason given").into(),
            }),
            _ => Err(Error::Refused { command: command.into(), reason: format!("unexpected reply {reply}") }),
        }
    }

    /// Waits for an event that `wanted` accepts; keeps the others for [`Qmp::take_event`].
    ///
    /// # Errors
    /// [`Error::Timeout`], or [`Error::Io`] when the hypervisor hung up.
    pub fn wait_event(&mut self, what: &str, limit: Duration, wanted: impl Fn(&Event) -> bool) -> Result<Event, Error> {
        if let Some(at) = self.kept.iter().position(&wanted) {
            return Ok(self.kept.remove(at).expect("just found"));
        }
        let end = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) if wanted(&event) => return Ok(event),
                Ok(event) => self.kept.push_back(event),
                Err(RecvTimeoutError::Timeout) => return Err(Error::Timeout { what: what.into(), limit }),
                Err(RecvTimeoutError::Disconnected) => return Err(self.hung_up()),
            }
        }
    }

    /// The next event that nobody waited for, if one is there.
    pub fn take_event(&mut self) -> Option<Event> {
        self.kept.pop_front().or_else(|| self.events.try_recv().ok())
    }

    fn next_reply(&mut self, what: &str, limit: Duration) -> Result<Value, Error> {
        match self.replies.recv_timeout(limit) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => {
                // The late reply would be taken for the next command's: this connection is of no more use.
                let _ = self.stream.shutdown(std::net::Shutdown::Both);
                Err(Error::Timeout { what: what.into(), limit })
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.hung_up()),
        }
    }

    fn hung_up(&self) -> Error {
        Error::io("read from", &self.path)(std::io::Error::new(
            std::io::ErrorKind::UnexpectedEof,
            "the hypervisor hung up",
        ))
    }

    fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let Some(fd) = fd else { return self.stream.write_all(line) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&self.stream, &[IoSlice::new(line)], &mut control, SendFlags::empty())?;
        self.stream.write_all(&line[sent..])
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn read_lines(stream: UnixStream, replies: &Sender<Value>, events: &Sender<Event>, wake: &impl Fn()) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let Ok(mut value) = serde_json::from_str::<Value>(&line) else {
            log::warn!("QMP line is no JSON: {line}");
            continue;
        };
        if let Some(name) = value.get("event").and_then(Value::as_str) {
            let event = Event { name: name.to_owned(), data: value["data"].take() };
            if events.send(event).is_err() {
                return;
            }
            wake();
        } else if replies.send(value).is_err() {
            return;
        }
    }
    wake();
}

#[cfg(test)]
mod fuzz;
