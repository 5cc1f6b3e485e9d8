//! A home of its own for each file of tests, with the real daemon, mirror, hypervisors and guests, and nothing left
//! of it afterwards, whether the tests passed or not.

#![allow(dead_code, reason = "each file of tests uses its part")]

pub(crate) mod fsx;
pub(crate) mod nodes;
pub(crate) mod tiny;

use bench::Outcome;
use bench::guest::Guest;
use bench::host::Host;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Limits of waiting that only a hang reaches.
pub(crate) const MINUTES: Duration = Duration::from_secs(300);

/// The program under test.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_offshoot"))
}

/// A home with its daemon. All that belongs to it ends with this value.
pub(crate) struct TestHost {
    host: Host,
}

impl Deref for TestHost {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// A fresh home under `/tmp`, where sockets' paths are short enough, with its daemon.
///
/// The default guest comes out of the cache that `make` uses, unless `OFFSHOOT_CACHE` names another.
pub(crate) fn host(name: &str) -> TestHost {
    let home = PathBuf::from(format!("/tmp/os-{name}-{}", std::process::id()));
    let target = program().ancestors().nth(2).expect("cargo builds in <target>/<profile>");
    let mut first = Command::new(program());
    first.arg("--home").arg(&home).arg("ps");
    if std::env::var_os("OFFSHOOT_CACHE").is_none() {
        first.env("OFFSHOOT_CACHE", target.join("guest"));
    }
    let output = first.output().expect("the program starts");
    assert!(output.status.success(), "no daemon for {}: {}", home.display(), String::from_utf8_lossy(&output.stderr));
    let home = home.canonicalize().expect("the daemon made its home");
    TestHost { host: Host::open(program(), &home).expect("the daemon answers") }
}

impl TestHost {
    /// Boots the default guest and waits until its web server and its redis answer.
    pub(crate) fn booted(&self, name: &str, memory_bytes: u64) -> Outcome<Guest> {
        self.host.image(&mut |step| eprintln!("  {step}"))?;
        let guest = self.host.boot(name, memory_bytes)?;
        ready(&guest)?;
        Ok(guest)
    }

    /// Everything about a VM.
    pub(crate) fn detail(&self, name: &str) -> Outcome<api::VmDetail> {
        Ok(self.client.get(&format!("/v1/vms/{name}"))?)
    }

    /// Pid of the daemon.
    pub(crate) fn daemon_pid(&self) -> Outcome<u32> {
        Ok(self.client.get::<api::Version>("/v1/version")?.pid)
    }

    /// Pid of the mirror.
    pub(crate) fn mirror_pid(&self) -> Outcome<u32> {
        Ok(mirror::client::Client::new(self.home.join("run/mirror.sock")).hello()?.pid)
    }

    /// Ends the daemon in good order, guests running on, and starts another.
    pub(crate) fn restart_daemon(&self) -> Outcome {
        self.command(&["shutdown"])?;
        self.command(&["ps"]).map(|_| ())
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(&self.home);
        }
        // A test may have killed the daemon; then there is nothing to ask, and the rest is done by hand.
        if let Err(error) = self.host.close() {
            eprintln!("{}: {error}", self.home.display());
        }
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let left = processes(&self.home);
            if left.is_empty() || Instant::now() > end {
                break;
            }
            left.iter().for_each(Process::kill);
            std::thread::sleep(Duration::from_millis(20));
        }
        for place in mounts(&self.home) {
            let _ = Command::new("umount").arg("--lazy").arg(place).status();
        }
        if let Err(error) = std::fs::remove_dir_all(&self.home) {
            eprintln!("remove {}: {error}", self.home.display());
        }
    }
}

/// A kernel in the boot protocol's form (Linux, Documentation/arch/x86/boot.rst) that halts for ever.
pub(crate) fn halting_kernel() -> Vec<u8> {
    let mut bytes = vec![0; 2048];
    bytes[0x1f1] = 1; // sectors of setup code
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]); // jmp 0x26c
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x0202u16.to_le_bytes());
    bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    bytes[0x211] = 1; // loaded high
    bytes[0x26c..0x26f].copy_from_slice(&[0xf4, 0xeb, 0xfd]); // hlt; jmp back
    bytes[0x300..0x304].copy_from_slice(b"halt");
    bytes
}

/// The machine's page cache, for whoever empties it and counts what comes back: others that do wait for this to be
/// dropped, in whatever process.
pub(crate) struct PageCache {
    _lock: std::fs::File,
}

impl PageCache {
    /// Nobody else has it, and nothing of what can be dropped is in it: pages for `1`, names as well for `3`.
    pub(crate) fn emptied(what: &str) -> Outcome<Self> {
        let _lock = std::fs::File::create("/tmp/offshoot-test-page-cache.lock")?;
        rustix::fs::flock(&_lock, rustix::fs::FlockOperation::LockExclusive)?;
        std::fs::write("/proc/sys/vm/drop_caches", what)?;
        Ok(Self { _lock })
    }
}

/// Waits until a guest's web server and its redis answer.
pub(crate) fn ready(guest: &Guest) -> Outcome {
    guest.await_response(None, MINUTES)?;
    eventually(&format!("redis of {} answers", guest.name), || Ok(guest.get("nonce").is_ok()))
}

/// Waits until a guest's console is a root shell: what is typed before is lost.
pub(crate) fn console_ready(host: &Host, guest: &Guest) -> Outcome {
    let said = || guest.shell(&host.client, "echo here", Duration::from_secs(5)).unwrap_or_default();
    eventually(&format!("the console of {} is a shell", guest.name), || Ok(said() == "here"))
}

/// Waits until `true` is returned.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> Outcome<bool>) -> Outcome {
    let end = Instant::now() + MINUTES;
    while !holds()? {
        if Instant::now() > end {
            return Err(format!("waited {MINUTES:?} in vain: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A process that belongs to a home.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its pid.
    pub(crate) pid: u32,
    /// Its name as the kernel shows it.
    pub(crate) name: String,
    /// Its command line.
    pub(crate) line: String,
}

impl Process {
    /// Ends it at once.
    pub(crate) fn kill(&self) {
        kill(self.pid);
    }
}

/// Ends a process at once, as `kill -9` does.
pub(crate) fn kill(pid: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Kills the mirror (0), the daemon (1) or both, and waits until there are others.
pub(crate) fn kill_some(host: &TestHost, which: u64) -> Outcome {
    let (daemon, mirror) = (host.daemon_pid()?, host.mirror_pid()?);
    if which != 1 {
        kill(mirror);
    }
    if which != 0 {
        kill(daemon);
    }
    // Any command starts a daemon, and that one a mirror.
    eventually("daemon and mirror are there again", || {
        Ok(host.command(&["ps"]).is_ok() && host.mirror_pid().is_ok_and(|pid| which == 1 || pid != mirror))
    })
}

/// The processes that name `home` in their command lines (our own, hypervisors), have a file of it open (network
/// helpers: their logs) or have one mapped (holders: the resident library).
pub(crate) fn processes(home: &Path) -> Vec<Process> {
    let below = format!("{}/", home.display());
    let own = std::process::id();
    let mut out = Vec::new();
    for pid in pids().filter(|&pid| pid != own) {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let read =
            |file: &str| String::from_utf8_lossy(&std::fs::read(dir.join(file)).unwrap_or_default()).replace('\0', " ");
        let line = read("cmdline");
        let names =
            |text: &str| text.contains(&below) || text.split_ascii_whitespace().any(|word| Path::new(word) == home);
        let opened = || {
            let links = std::fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
            links.filter_map(|l| std::fs::read_link(l.path()).ok()).any(|to| to.starts_with(home))
        };
        if names(&line) || opened() || read("maps").contains(&below) {
            out.push(Process { pid, name: read("comm").trim().to_owned(), line });
        }
    }
    out
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// Where something is mounted below `home`.
pub(crate) fn mounts(home: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    places.filter(|place| place.starts_with(home)).collect()
}

fn show_logs(home: &Path) {
    for log in ["daemon", "mirror"] {
        let path = home.join(format!("run/{log}.log"));
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- the end of {}\n{}", path.display(), lines[lines.len().saturating_sub(60)..].join("\n"));
    }
}
