//! The daemon's side of the tests: starts a process with the library preloaded, talks to it, reads holders.

#![allow(dead_code, reason = "each test file uses a part of it")]

use base::resident::{ENV_FUSE, ENV_RAM_DIR, ENV_RAM_MAP, ENV_RAM_PATH, ENV_SOCKET, fields};
use base::{ByteRange, RamMap};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub(crate) const PAGE: u64 = 4096;

/// A folder of the test's own, removed at the end.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let path = std::env::temp_dir().join(format!("offshoot-resident-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a RAM file: page `i` is filled with the byte `i % 251 + 1`, so never zero.
    pub(crate) fn ram_file(&self, id: u64, pages: u64) -> PathBuf {
        let path = self.0.join(format!("{id:016x}"));
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| pattern(at / PAGE)).collect();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(crate) fn map_file(&self, map: &RamMap) -> PathBuf {
        let path = self.0.join("ram.map");
        std::fs::write(&path, map.encode()).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn pattern(page: u64) -> u8 {
    (page % 251 + 1) as u8
}

pub(crate) fn pages(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start * PAGE, end * PAGE)
}

/// The directory cargo builds into: this test lies in its `deps`.
fn built() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned()
}

pub(crate) fn library() -> PathBuf {
    let path = built().join("deps/libresident.so");
    assert!(path.exists(), "{} is not built", path.display());
    path
}

/// Gives `command` the library and what its environment says; returns the socket's path.
pub(crate) fn preload(
    command: &mut Command,
    scratch: &Scratch,
    ram_path: &Path,
    map: Option<&Path>,
    fuse: Option<RawFd>,
) -> PathBuf {
    let path = scratch.0.join("resident.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let socket = listener.as_raw_fd();
    command
        // What those who run the tests set for other crates' sake.
        .env_remove("OFFSHOOT_CACHE")
        .env_remove("OFFSHOOT_TEST_FULL")
        .env("LD_PRELOAD", library())
        .env(ENV_SOCKET, socket.to_string())
        .env(ENV_RAM_PATH, ram_path)
        .env(ENV_RAM_DIR, &scratch.0);
    if let Some(map) = map {
        command.env(ENV_RAM_MAP, map);
    }
    if let Some(fd) = fuse {
        command.env(ENV_FUSE, fd.to_string());
    }
    // SAFETY: between fork and exec this makes a system call only; `listener` lives in the closure.
    unsafe {
        command.pre_exec(move || {
            for fd in std::iter::once(listener.as_raw_fd()).chain(fuse) {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            Ok(())
        });
    }
    path
}

/// The driver under the library.
pub(crate) struct Driver {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub(crate) socket: PathBuf,
}

impl Driver {
    pub(crate) fn start(scratch: &Scratch, ram_path: &Path, map: Option<&Path>, fuse: Option<RawFd>) -> Self {
        let mut command = Command::new(built().join("examples/driver"));
        let socket = preload(&mut command, scratch, ram_path, map, fuse);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        drop(command);
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdin, stdout, socket }
    }

    /// Opens and maps the RAM file as QEMU does.
    pub(crate) fn with_ram(scratch: &Scratch, size: u64, map: Option<&RamMap>) -> Self {
        let placeholder = scratch.0.join("placeholder");
        std::fs::File::create(&placeholder).unwrap().set_len(size).unwrap();
        let map = map.map(|map| scratch.map_file(map));
        let mut driver = Self::start(scratch, &placeholder, map.as_deref(), None);
        assert_eq!(driver.ask(&format!("open {}", placeholder.display())), "0");
        let answer = driver.ask(&format!("mmap {size}"));
        assert!(!answer.starts_with("errno"), "mmap of RAM: {answer}");
        driver
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    pub(crate) fn get(&mut self, at: u64) -> u8 {
        self.ask(&format!("get {at}")).parse().unwrap()
    }

    pub(crate) fn fill(&mut self, range: ByteRange, byte: u8) {
        self.ask(&format!("fill {} {} {byte}", range.start, range.len()));
    }

    pub(crate) fn touch(&mut self, range: ByteRange) {
        self.ask(&format!("touch {} {}", range.start, range.end));
    }

    pub(crate) fn advise(&mut self, range: ByteRange, advice: i32) -> String {
        self.ask(&format!("advise {} {} {advice}", range.start, range.len()))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn connect(&self) -> Resident {
        Resident::connect(&self.socket)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the library.
pub(crate) struct Resident(pub(crate) BufReader<UnixStream>);

/// A reply to `freeze`.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) holder: i32,
    pub(crate) start: u64,
    pub(crate) ram: u64,
    pub(crate) tracked: bool,
    pub(crate) written: Vec<ByteRange>,
    pub(crate) zeroed: Vec<ByteRange>,
    pub(crate) fork_us: u64,
    pub(crate) scan_us: u64,
}

impl Resident {
    pub(crate) fn connect(path: &Path) -> Self {
        Self(BufReader::new(UnixStream::connect(path).unwrap()))
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.0.get_ref(), "{line}").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer
    }

    /// The fields of a reply that must be `ok`.
    pub(crate) fn ok(&mut self, line: &str) -> HashMap<String, String> {
        let answer = self.ask(line);
        let found = fields(&answer).unwrap_or_else(|error| panic!("`{line}`: {error}"));
        found.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    pub(crate) fn error(&mut self, line: &str) -> String {
        let answer = self.ask(line);
        fields(&answer).expect_err("this request must fail")
    }

    pub(crate) fn freeze(&mut self) -> Frozen {
        self.freeze_as("freeze")
    }

    pub(crate) fn freeze_as(&mut self, request: &str) -> Frozen {
        let found = self.ok(request);
        let number = |name: &str| found[name].parse::<u64>().unwrap();
        let mut bytes = vec![0; number("ranges") as usize * 16];
        self.0.read_exact(&mut bytes).unwrap();
        let all: Vec<ByteRange> = bytes
            .chunks(16)
            .map(|pair| {
                let word = |i: usize| u64::from_le_bytes(pair[i..i + 8].try_into().unwrap());
                ByteRange::new(word(0), word(8))
            })
            .collect();
        let (written, zeroed) = all.split_at(number("written") as usize);
        assert_eq!(zeroed.len() as u64, number("zeroed"));
        for list in [written, zeroed] {
            assert!(list.windows(2).all(|w| w[0].end < w[1].start), "ascending and joined: {list:?}");
        }
        Frozen {
            holder: number("holder") as i32,
            start: number("start"),
            ram: u64::from_str_radix(&found["ram"], 16).unwrap(),
            tracked: number("tracked") == 1,
            written: written.to_vec(),
            zeroed: zeroed.to_vec(),
            fork_us: number("fork_us"),
            scan_us: number("scan_us"),
        }
    }
}

impl Frozen {
    /// A byte of the frozen image, by `process_vm_readv` as the daemon reads it.
    pub(crate) fn byte(&self, at: u64) -> u8 {
        let mut byte = 0u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: (self.ram + at) as *mut libc::c_void, iov_len: 1 };
        // SAFETY: one local byte, which is live.
        let got = unsafe { libc::process_vm_readv(self.holder, &raw const local, 1, &raw const remote, 1, 0) };
        assert_eq!(got, 1, "reading holder {} at {at:#x}: {}", self.holder, std::io::Error::last_os_error());
        byte
    }
}

/// A holder outlives the process it was forked from, and so would this test.
impl Drop for Frozen {
    fn drop(&mut self) {
        let ours = status(self.holder, "stat").is_some_and(|stat| stat.contains(&format!(" {} ", self.start)));
        if ours && status(self.holder, "comm").is_some_and(|name| name == "offshoot-hold\n") {
            // SAFETY: a signal to the holder that this reply named.
            unsafe { libc::kill(self.holder, libc::SIGKILL) };
        }
    }
}

pub(crate) fn status(pid: i32, file: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()
}

/// The lines of `/proc/PID/maps` inside RAM.
pub(crate) fn mappings(pid: u32, start: u64, size: u64) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let inside = |line: &&str| {
        let at = u64::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap();
        (start..start + size).contains(&at)
    };
    maps.lines().filter(inside).map(str::to_owned).collect()
}
