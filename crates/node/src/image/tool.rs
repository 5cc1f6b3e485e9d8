//! Running the distribution's own tools.
//!
//! Every tool is started through `setpriv --pdeathsig KILL`, so that none outlives a daemon that was killed
//! and goes on writing into a directory that the next one clears. Standard input is empty; standard error is
//! read line by line as it comes, and its end is kept for the error message.

use super::Error;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Lines of a failed tool that its error repeats.
const LAST_WORDS: usize = 6;

/// The Debian package of each program used.
fn package(tool: &str) -> &'static str {
    match tool {
        "mmdebstrap" => "mmdebstrap",
        "qemu-img" => "qemu-utils",
        "mke2fs" | "debugfs" | "e2fsck" => "e2fsprogs",
        "gzip" => "gzip",
        "xz" => "xz-utils",
        "zstd" => "zstd",
        _ => "util-linux",
    }
}

/// A call of one program.
pub(super) struct Tool {
    name: &'static str,
    doing: String,
    command: Command,
    accepted: &'static [i32],
}

impl Tool {
    /// `name`, to be run for `doing` (a present participle: `making the file system`).
    pub(super) fn new(name: &'static str, doing: impl Into<String>) -> Result<Self, Error> {
        Self::within(&[], name, doing)
    }

    /// The same, started by `wrapper`, a program and its arguments that end by running theirs.
    pub(super) fn within(
        wrapper: &[&'static str],
        name: &'static str,
        doing: impl Into<String>,
    ) -> Result<Self, Error> {
        for &program in [name].iter().chain(wrapper.first()).chain(&["setpriv"]) {
            if !installed(program) {
                return Err(Error::NoTool { tool: program, package: package(program) });
            }
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(wrapper).arg(name);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("LC_ALL", "C.UTF-8");
        command.env("PATH", std::env::join_paths(search_path()).expect("it was split"));
        Ok(Self { name, doing: doing.into(), command, accepted: &[0] })
    }

    pub(super) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(super) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(super) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Runs it to its end and returns its standard output.
    pub(super) fn run(self) -> Result<Vec<u8>, Error> {
        self.run_watched(&mut |_| ())
    }

    /// The same, where more exit codes than 0 come with a usable answer.
    pub(super) fn run_accepting(mut self, codes: &'static [i32]) -> Result<Vec<u8>, Error> {
        self.accepted = codes;
        self.run()
    }

    /// Runs it to its end; `line` sees each line of its standard error at once.
    pub(super) fn run_watched(mut self, line: &mut dyn FnMut(&str)) -> Result<Vec<u8>, Error> {
        let mut child =
            self.command.spawn().map_err(|source| Error::Io { doing: "start", path: self.name.into(), source })?;
        let mut stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let (out, words) = std::thread::scope(|scope| {
            let out = scope.spawn(move || {
                let mut bytes = Vec::new();
                stdout.read_to_end(&mut bytes).map(|_| bytes)
            });
            let words = last_words(stderr, line);
            (out.join().expect("reading a pipe does not panic"), words)
        });
        let status = child.wait().map_err(|e| Error::io("wait for", self.name.as_ref(), e))?;
        if !status.code().is_some_and(|code| self.accepted.contains(&code)) {
            return Err(Error::Tool { tool: self.name, doing: self.doing, status, words });
        }
        out.map_err(|e| Error::io("read the output of", self.name.as_ref(), e))
    }

    /// Starts it with `stdin`, for its standard output to be read as a stream.
    pub(super) fn stream(mut self, stdin: std::fs::File) -> Result<Stream, Error> {
        self.command.stdin(stdin);
        let child = self.command.spawn().map_err(|e| Error::io("start", self.name.as_ref(), e))?;
        Ok(Stream { name: self.name, doing: self.doing, child })
    }
}

/// A running tool whose standard output is being read.
pub(super) struct Stream {
    name: &'static str,
    doing: String,
    child: Child,
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.child.stdout.as_mut().expect("stdout is piped").read(buf)
    }
}

impl Stream {
    /// Waits for its end, after the last byte was read.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        drop(self.child.stdout.take());
        let words = last_words(self.child.stderr.take().expect("stderr is piped"), &mut |_| ());
        let status = self.child.wait().map_err(|e| Error::io("wait for", self.name.as_ref(), e))?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Tool { tool: self.name, doing: std::mem::take(&mut self.doing), status, words })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where programs are looked for: also where those for root lie, which a user's path may leave out.
fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.into_iter().chain(["/usr/sbin".into(), "/sbin".into()])
}

fn installed(program: &str) -> bool {
    search_path().any(|dir| dir.join(program).is_file())
}

fn last_words(from: impl Read, line: &mut dyn FnMut(&str)) -> String {
    let mut kept: VecDeque<String> = VecDeque::new();
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match (&mut reader).take(4096).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        if text.is_empty() {
            continue;
        }
        line(&text);
        if kept.len() == LAST_WORDS {
            kept.pop_front();
        }
        kept.push_back(text);
    }
    Vec::from(kept).join("; ")
}
