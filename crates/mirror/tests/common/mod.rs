//! A mirror in a process of its own, a real mount, and readers that live in child processes.

#![allow(dead_code, reason = "each test file uses a part of it")]

use base::ByteRange;
use mirror::{Client, Config, VersionError, Versions, disk_path, ram_path, socket_path};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const PAGE: usize = 4096;

/// Versions that are files of a directory. `slow` holds a number of microseconds that each read takes; `down` makes
/// all reads fail; names that begin with `corrupt` never verify.
pub(crate) struct FileVersions(PathBuf);

impl Versions for FileVersions {
    fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError> {
        let unavailable = |why: String| VersionError::Unavailable { version: version.to_owned(), offset, why };
        if let Ok(slow) = fs::read_to_string(self.0.join("slow")) {
            std::thread::sleep(Duration::from_micros(slow.trim().parse().unwrap()));
        }
        if self.0.join("down").exists() {
            return Err(unavailable("the store is down".to_owned()));
        }
        if version.starts_with("corrupt") {
            return Err(VersionError::Corrupt { version: version.to_owned(), offset, why: "bad hash".to_owned() });
        }
        let file = File::open(self.0.join(version)).map_err(|e| unavailable(e.to_string()))?;
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset + done as u64).map_err(|e| unavailable(e.to_string()))? {
                0 => break,
                n => done += n,
            }
        }
        buf[done..].fill(0);
        Ok(done as u64)
    }

    fn data_ranges(&self, version: &str, range: ByteRange, most: usize) -> Result<(Vec<ByteRange>, u64), VersionError> {
        let mut found: Vec<ByteRange> = Vec::new();
        let mut page = [0; PAGE];
        for at in (range.start - range.start % PAGE as u64..range.end).step_by(PAGE) {
            self.read_at(version, at, &mut page)?;
            let Some(here) = ByteRange::at(at, PAGE as u64).intersect(&range) else { continue };
            let full = found.len() == most;
            match found.last_mut() {
                _ if page == [0; PAGE] => {}
                Some(last) if last.end == here.start => last.end = here.end,
                _ if full => return Ok((found, here.start)),
                _ => found.push(here),
            }
        }
        Ok((found, range.end))
    }
}

/// A mirror with its home. Dropping it ends and unmounts it.
pub(crate) struct Mirror {
    pub(crate) home: PathBuf,
    pub(crate) store: PathBuf,
    _dir: tempfile::TempDir,
    child: Option<Child>,
}

const PROCESS: &str = "mirror_process";

impl Mirror {
    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    pub(crate) fn start_in(dir: tempfile::TempDir) -> Self {
        let (home, store) = (dir.path().join("home"), dir.path().join("store"));
        fs::create_dir_all(&store).unwrap();
        fs::create_dir_all(&home).unwrap();
        let mut mirror = Self { home, store, _dir: dir, child: None };
        mirror.spawn(None);
        mirror
    }

    /// Starts the process, to take over the session given or to mount afresh.
    pub(crate) fn spawn(&mut self, fuse_fd: Option<&OwnedFd>) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", PROCESS, "--nocapture"]);
        command.env("MIRROR_HOME", &self.home).env("MIRROR_STORE", &self.store);
        command.stdout(Stdio::null());
        if let Some(fd) = fuse_fd {
            let fd = fd.as_raw_fd();
            command.env("MIRROR_FUSE_FD", "100");
            // SAFETY: dup2 is async-signal-safe, and 100 is no descriptor that the child has another use for.
            unsafe {
                command.pre_exec(
                    move || if libc::dup2(fd, 100) == 100 { Ok(()) } else { Err(io::Error::last_os_error()) },
                );
            }
        }
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// As nothing else would end it: no thread gets to do anything more.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(socket_path(&self.home))
    }

    pub(crate) fn ram(&self, id: u64) -> PathBuf {
        ram_path(&self.home, id)
    }

    pub(crate) fn disk(&self, id: u64) -> PathBuf {
        disk_path(&self.home, id)
    }

    pub(crate) fn put_version(&self, name: &str, bytes: &[u8]) {
        fs::write(self.store.join(name), bytes).unwrap();
    }

    /// Drops what the host's page cache holds of the disks' layers, and returns their data files.
    pub(crate) fn drop_layers(&self) -> Vec<File> {
        let files = fs::read_dir(self.home.join("mirror/layers")).unwrap().map(|entry| entry.unwrap().path());
        let drop = |path| {
            let file = File::open(path).unwrap();
            file.sync_all().unwrap();
            // SAFETY: an open descriptor and plain numbers.
            assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
            file
        };
        files.filter(|path| path.extension().is_some_and(|e| e == "data")).map(drop).collect()
    }

    pub(crate) fn open_disk(&self, id: u64) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(self.disk(id)).unwrap()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        let _ = Client::new(socket_path(&self.home)).with_time_limit(Duration::from_secs(5)).shutdown(true);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(5) && child.try_wait().is_ok_and(|s| s.is_none()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        unmount(&self.home.join("mnt"));
        for entry in fs::read_dir(self.home.join("mirror")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("live-") {
                unmount(&entry.path());
            }
        }
    }
}

pub(crate) fn unmount(path: &Path) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the string ends in a zero byte and lives through the call.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
}

/// What the mirror process of a test does; called from an ignored test of that file.
pub(crate) fn mirror_process() {
    let Some(home) = std::env::var_os("MIRROR_HOME") else { return };
    let _ = env_logger::Builder::new().parse_env("MIRROR_LOG").try_init();
    let store = PathBuf::from(std::env::var_os("MIRROR_STORE").unwrap());
    let mut config = Config::new(home);
    if std::env::var_os("MIRROR_FUSE_FD").is_some() {
        use std::os::fd::FromRawFd;
        // SAFETY: the parent put the session's descriptor there, and nothing else owns it.
        config.fuse_fd = Some(unsafe { OwnedFd::from_raw_fd(100) });
    }
    let ended = mirror::run(config, Arc::new(FileVersions(store)));
    if let Err(e) = &ended {
        eprintln!("mirror: {e}");
    }
    std::process::exit(i32::from(ended.is_err()));
}

/// A file mapped privately, as a hypervisor's RAM.
pub(crate) struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory; tests read it from several threads and write it from none.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn of(path: &Path, len: usize) -> Self {
        let file = File::open(path).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of an open file, at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { at: at.cast(), len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable over its whole length for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    pub(crate) fn page(&self, page: usize) -> &[u8] {
        &self.bytes()[page * PAGE..(page + 1) * PAGE]
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this length, and no slice of it is left.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Runs `work` in a forked child, which exits 0 if it returns and 101 if it panics.
///
/// Only for children that touch memory and make system calls: other threads' locks are not theirs.
pub(crate) fn in_child(work: impl FnOnce() + std::panic::UnwindSafe) -> libc::pid_t {
    // SAFETY: the child runs `work` and leaves by `_exit`; what it may call is said above.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        0 => {
            let code = if std::panic::catch_unwind(work).is_ok() { 0 } else { 101 };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        pid => pid,
    }
}

/// Waits for a child and says how it ended: exit code, or minus the signal.
pub(crate) fn reap(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is writable and the child is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { -libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

pub(crate) fn kill(pid: libc::pid_t) {
    // SAFETY: a child of ours that was not reaped yet.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// A buffer that O_DIRECT takes: aligned to a page.
pub(crate) struct Aligned(Vec<u8>, usize);

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let space = vec![0u8; len + PAGE];
        let skip = space.as_ptr().align_offset(PAGE);
        Self(space, skip)
    }

    pub(crate) fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

/// Pseudo-random bytes that depend on the seed alone; never zero.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8 | 1
    };
    (0..len).map(|_| next()).collect()
}
