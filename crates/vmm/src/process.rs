//! Processes that outlive the daemon: named by pid and start time, watched through a pidfd.

use crate::error::Error;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, pidfd_open, pidfd_send_signal, waitid, waitpid,
};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A process, named so that a reused pid is never taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat` field 22).
    pub start: u64,
}

/// Credentials of stores, which programs that run or serve guests must not be given.
const SECRETS: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

/// Takes what is secret out of a command's environment.
pub fn without_secrets(command: &mut Command) {
    for name in SECRETS {
        command.env_remove(name);
    }
}

/// Field 22 of `/proc/PID/stat`, where the process exists and is no zombie.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command's name in parentheses and may itself hold spaces and parentheses.
    let rest = &stat[stat.rfind(')')? + 2..];
    let mut fields = rest.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl ProcessId {
    /// Names the living process `pid`.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        start_time(pid).map(|start| Self { pid, start })
    }

    /// Whether this very process lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// A descriptor that becomes readable when it ends; none when it is gone already.
    #[must_use]
    pub fn pidfd(&self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid.cast_signed())?, PidfdFlags::empty()).ok()?;
        self.alive().then_some(fd)
    }

    /// Sends SIGTERM, then SIGKILL after `grace`; returns when it is gone (or cannot be killed within 10 s more).
    pub fn end(&self, grace: Duration) {
        let Some(fd) = self.pidfd() else {
            // It ended by itself: where it was our child, its last trace goes too.
            let _ = Pid::from_raw(self.pid.cast_signed()).map(|pid| waitpid(Some(pid), WaitOptions::NOHANG));
            return;
        };
        if !grace.is_zero() {
            let _ = pidfd_send_signal(&fd, Signal::TERM);
            if wait_readable(&fd, grace) {
                reap(&fd);
                return;
            }
        }
        let _ = pidfd_send_signal(&fd, Signal::KILL);
        if wait_readable(&fd, Duration::from_secs(10)) {
            reap(&fd);
        } else {
            log::error!("process {} does not die", self.pid);
        }
    }
}

/// Waits until the descriptor is readable; false when `limit` passed first.
pub fn wait_readable(fd: &impl AsFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut set = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
        let timeout =
            rustix::event::Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut set, Some(&timeout)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

/// Collects the exit status where the process is our child; says how it ended.
pub fn reap(pidfd: &OwnedFd) -> Option<String> {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    Some(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "unknown end".into(),
    })
}

/// The end of a log file, for an error message: at most eight lines and 1,500 bytes.
#[must_use]
pub fn last_words(log: &Path) -> String {
    last_words_from(log, 0)
}

/// The same of what a log file has from byte `from` on: of one process, where others wrote to it before.
#[must_use]
pub fn last_words_from(log: &Path, from: u64) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(bytes.len());
    let tail = String::from_utf8_lossy(&bytes[from.max(bytes.len().saturating_sub(1500))..]).into_owned();
    let lines: Vec<&str> = tail.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let words = lines[lines.len().saturating_sub(8)..].join(" | ");
    if words.is_empty() { "it said nothing".into() } else { words }
}

/// Spawns `command` in a session of its own (a Ctrl-C at the terminal must not reach guests), with `pass` inherited
/// under their own numbers, `stdin` as its standard input (none: nothing to read), and output appended to `log`.
///
/// By `posix_spawn`, which shares the daemon's memory until the program is loaded: a fork would copy the page
/// tables of a daemon that holds an index of the store, for every hypervisor of a fork at once.
///
/// # Errors
/// [`Error::Spawn`] where the program is missing, [`Error::Io`] where the log cannot be opened.
pub fn spawn(
    command: &Command,
    pass: &[BorrowedFd<'_>],
    stdin: Option<OwnedFd>,
    log: &Path,
) -> Result<ProcessId, Error> {
    let output = File::options().create(true).append(true).open(log).map_err(Error::io("open", log))?;
    let input = match stdin {
        Some(fd) => fd,
        None => File::open("/dev/null").map_err(Error::io("open", "/dev/null"))?.into(),
    };
    let program = command.get_program().to_string_lossy().into_owned();
    let pid = posix_spawn(command, pass, &input, &output).map_err(|source| Error::Spawn { program, source })?;
    // The child is watched through its pidfd, by this daemon or by the one that replaces it.
    ProcessId::of(pid).ok_or_else(|| {
        let _ = Pid::from_raw(pid.cast_signed()).map(|pid| waitpid(Some(pid), WaitOptions::NOHANG));
        Error::Died { what: "a new process", pid, last_words: last_words(log) }
    })
}

/// The strings of a command, as the kernel takes them.
struct Strings {
    _owned: Vec<CString>,
    pointers: Vec<*mut libc::c_char>,
}

impl Strings {
    fn new<'a>(words: impl Iterator<Item = std::borrow::Cow<'a, OsStr>>) -> io::Result<Self> {
        let owned = words.map(|w| CString::new(w.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let pointers = owned.iter().map(|s| s.as_ptr().cast_mut()).chain([std::ptr::null_mut()]).collect();
        Ok(Self { _owned: owned, pointers })
    }
}

fn posix_spawn(command: &Command, pass: &[BorrowedFd<'_>], input: &OwnedFd, output: &File) -> io::Result<u32> {
    let program = CString::new(command.get_program().as_bytes())?;
    let arguments = Strings::new(std::iter::once(command.get_program()).chain(command.get_args()).map(Cow::Borrowed))?;
    let changed: Vec<_> = command.get_envs().collect();
    let kept = std::env::vars_os().filter(|(name, _)| !changed.iter().any(|(n, _)| *n == name));
    let set = changed.iter().filter_map(|(name, value)| Some((name.to_os_string(), (*value)?.to_os_string())));
    let environment = Strings::new(kept.chain(set).map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        Cow::Owned(name)
    }))?;
    let check = |rc: libc::c_int| if rc == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(rc)) };
    let mut actions = MaybeUninit::uninit();
    let mut attributes = MaybeUninit::uninit();
    let mut none = MaybeUninit::uninit();
    let mut all = MaybeUninit::uninit();
    let mut pid = 0;
    // SAFETY: the four objects are initialised by the calls made for that before any other use, and the first two
    // destroyed once; all pointers passed live until `posix_spawnp` returns, which does not keep them.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigfillset(all.as_mut_ptr());
        check(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        check(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
        let (actions, attributes) = (actions.as_mut_ptr(), attributes.as_mut_ptr());
        let spawned = (|| {
            check(libc::posix_spawn_file_actions_adddup2(actions, input.as_raw_fd(), 0))?;
            check(libc::posix_spawn_file_actions_adddup2(actions, output.as_raw_fd(), 1))?;
            check(libc::posix_spawn_file_actions_adddup2(actions, output.as_raw_fd(), 2))?;
            for fd in pass {
                // A descriptor onto itself: glibc then only clears its close-on-exec flag.
                check(libc::posix_spawn_file_actions_adddup2(actions, fd.as_raw_fd(), fd.as_raw_fd()))?;
            }
            if pass.is_empty() {
                // What our own parent let us inherit must not live as long as a daemon does: a lock, a pipe.
                check(libc::posix_spawn_file_actions_addclosefrom_np(actions, 3))?;
            }
            check(libc::posix_spawn_file_actions_addchdir_np(actions, c"/".as_ptr()))?;
            check(libc::posix_spawnattr_setsigmask(attributes, none.as_ptr()))?;
            check(libc::posix_spawnattr_setsigdefault(attributes, all.as_ptr()))?;
            let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID;
            check(libc::posix_spawnattr_setflags(attributes, flags as libc::c_short))?;
            check(libc::posix_spawnp(
                &raw mut pid,
                program.as_ptr(),
                actions,
                attributes,
                arguments.pointers.as_ptr(),
                environment.pointers.as_ptr(),
            ))
        })();
        libc::posix_spawn_file_actions_destroy(actions);
        libc::posix_spawnattr_destroy(attributes);
        spawned?;
    }
    Ok(pid.cast_unsigned())
}

/// `spawn.h` of glibc 2.26 and later; not among the `libc` crate's constants.
const POSIX_SPAWN_SETSID: libc::c_int = 0x80;
