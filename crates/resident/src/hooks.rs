//! The interposed functions, the constructor, and the state they share.
//!
//! What is not guest RAM goes to the kernel by a plain system call: no lock, no allocation, errno as glibc leaves
//! it. Rust cannot define C's variadic functions, but on x86-64 a variadic integer argument lies where a named
//! one would (System V ABI, section 3.2.3); a mode that the caller left out is garbage which the kernel ignores
//! without `O_CREAT`.

use crate::control;
use crate::error::Error;
use crate::holder;
use crate::ram::Ram;
use crate::sys;
use base::ByteRange;
use base::resident::{ENV_FUSE, ENV_GATE, ENV_RAM_DIR, ENV_RAM_MAP, ENV_RAM_PATH, ENV_SOCKET};
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What the environment said, once.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) socket: RawFd,
    pub(crate) fuse: Option<RawFd>,
    gate: Option<Gate>,
    pub(crate) ram_dir: Option<PathBuf>,
    ram_path: Option<OsString>,
    ram_map: Option<PathBuf>,
}

/// What the hypervisor waits for before it opens the first of the mirror's files.
#[derive(Debug)]
struct Gate {
    fd: RawFd,
    /// The mirror's mount point: where RAM files and disks are.
    below: PathBuf,
    open: Mutex<bool>,
}

impl Gate {
    /// Waits until the daemon lets the hypervisor have `path`; returns at once where it is no file of the mirror.
    fn pass(&self, path: &[u8]) {
        let below = self.below.as_os_str().as_bytes();
        if !path.strip_prefix(below).is_some_and(|rest| rest.starts_with(b"/")) {
            return;
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            let mut byte = 0_u8;
            // SAFETY: the buffer is one byte and lives through the call.
            match unsafe { libc::syscall(libc::SYS_read, self.fd, &raw mut byte, 1_usize) } {
                1 => *open = true,
                0 => fail("what this machine was to start from did not come to be"),
                _ if sys::errno() == libc::EINTR => {}
                _ => fail(&format!("descriptor {} is not the gate it was said to be", self.fd)),
            }
        }
    }
}

/// What the interposed functions and the control thread share.
#[derive(Default)]
pub(crate) struct Shared {
    /// Device and inode of the file at the RAM path, once the hypervisor has opened it.
    ram_file: Option<(u64, u64)>,
    pub(crate) ram: Option<Ram>,
}

static CONFIG: OnceLock<Config> = OnceLock::new();
static SHARED: Mutex<Shared> = Mutex::new(Shared { ram_file: None, ram: None });
/// Where RAM lies, to tell other addresses without the lock. Both zero before it is mapped.
static RAM_START: AtomicUsize = AtomicUsize::new(0);
static RAM_END: AtomicUsize = AtomicUsize::new(0);
/// The process whose control thread runs: a hypervisor that daemonizes goes on as another.
static CONTROL_PID: AtomicI32 = AtomicI32::new(0);

/// The state, locked. Poison is ignored: a panic in an interposed function ends the process at its C boundary, and
/// one in the control thread leaves a state that every operation checks against the kernel's answers.
pub(crate) fn shared() -> MutexGuard<'static, Shared> {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *mut c_char, *const *const c_char) = construct;

/// glibc passes `main`'s arguments to constructors.
extern "C" fn construct(argc: c_int, argv: *const *mut c_char, _: *const *const c_char) {
    let Some(config) = Config::from_environment() else { return };
    for fd in [Some(config.socket), config.fuse, config.gate.as_ref().map(|g| g.fd)].into_iter().flatten() {
        // SAFETY: the call changes a flag of a descriptor that was handed to this library.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            fail(&format!("descriptor {fd} handed over in the environment is not open"));
        }
    }
    if argc > 0 {
        // SAFETY: `argv` holds `argc` pointers to strings, which the kernel laid out one after another.
        unsafe {
            let first = *argv;
            let last = *argv.add(argc as usize - 1);
            let len = (last as usize + CStr::from_ptr(last).count_bytes() + 1).saturating_sub(first as usize);
            holder::note_arguments(first.cast(), len);
        }
    }
    if CONFIG.set(config).is_ok() {
        start_control();
    }
}

fn start_control() {
    // SAFETY: asks for a number.
    let pid = unsafe { libc::getpid() };
    if let Some(config) = CONFIG.get()
        && CONTROL_PID.swap(pid, Ordering::Relaxed) != pid
        && let Err(error) = control::start(config)
    {
        fail(&format!("starting the control thread: {error}"));
    }
}

/// Says why and ends the hypervisor: without control it could neither be frozen nor trusted with its RAM.
fn fail(why: &str) -> ! {
    complain(why);
    // SAFETY: ends the process without running handlers that expect a hypervisor in order.
    unsafe { libc::_exit(126) }
}

fn complain(what: &str) {
    let line = format!("offshoot resident library: {what}\n");
    // SAFETY: the buffer lives through the call. Nothing can be done where stderr is gone.
    unsafe { libc::syscall(libc::SYS_write, libc::STDERR_FILENO, line.as_ptr(), line.len()) };
}

impl Config {
    /// Reads and removes the library's variables. None where it was not asked to do anything.
    fn from_environment() -> Option<Self> {
        let socket = variable(ENV_SOCKET)?;
        // SAFETY: constructors run before `main`, in the only thread.
        unsafe { libc::unsetenv(c"LD_PRELOAD".as_ptr()) };
        let number = |name: &str, text: &OsString| match text.to_str().and_then(|t| t.parse::<RawFd>().ok()) {
            Some(fd) if fd >= 0 => fd,
            _ => fail(&format!("{name}={} is not the number of a descriptor", text.display())),
        };
        let (fuse, ram_path) = (variable(ENV_FUSE), variable(ENV_RAM_PATH));
        let (ram_dir, ram_map) = (variable(ENV_RAM_DIR).map(PathBuf::from), variable(ENV_RAM_MAP));
        let gate = variable(ENV_GATE).map(|text| match ram_dir.as_ref().and_then(|dir| dir.parent()) {
            Some(below) => Gate { fd: number(ENV_GATE, &text), below: below.to_owned(), open: Mutex::new(false) },
            None => fail(&format!("{ENV_GATE} is of no use without {ENV_RAM_DIR}")),
        });
        Some(Self {
            socket: number(ENV_SOCKET, &socket),
            fuse: fuse.map(|text| number(ENV_FUSE, &text)),
            gate,
            ram_dir,
            ram_path,
            ram_map: ram_map.map(PathBuf::from),
        })
    }
}

/// Takes a variable out of the environment: programs that the hypervisor starts must not see it.
fn variable(name: &str) -> Option<OsString> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: constructors run before `main`, in the only thread; the value is copied before it is removed.
    unsafe {
        let value = libc::getenv(name.as_ptr());
        if value.is_null() {
            return None;
        }
        let value = OsString::from_vec(CStr::from_ptr(value).to_bytes().to_vec());
        libc::unsetenv(name.as_ptr());
        Some(value)
    }
}

/// # Safety
/// `path` is what the caller of `open` passed: null or a C string.
unsafe fn do_open(dir: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    let config = CONFIG.get();
    let mut is_ram = false;
    // A null path is left to the kernel to refuse.
    if let Some(config) = config.filter(|_| !path.is_null()) {
        // SAFETY: by `open`'s contract the path is a C string.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        is_ram = config.ram_path.as_ref().is_some_and(|ram| path == ram.as_bytes());
        if let Some(gate) = &config.gate {
            gate.pass(path);
        }
    }
    let flags = if is_ram {
        // RAM files are never writable, and none is ever made here.
        flags & !(libc::O_ACCMODE | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) | libc::O_RDONLY
    } else {
        flags
    };
    // SAFETY: the caller's own arguments, but for the access mode.
    let fd = unsafe { libc::syscall(libc::SYS_openat, dir, path, flags, mode) } as c_int;
    if is_ram
        && fd >= 0
        && let Some((device, inode, _)) = sys::identity(fd)
    {
        shared().ram_file = Some((device, inode));
    }
    fd
}

/// # Safety
/// As `mmap`.
unsafe fn do_mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void {
    let kind = flags & libc::MAP_TYPE;
    let is_shared = kind == libc::MAP_SHARED || kind == libc::MAP_SHARED_VALIDATE;
    if is_shared
        && flags & libc::MAP_ANONYMOUS == 0
        && let Some(config) = CONFIG.get().filter(|c| c.ram_path.is_some())
        && let Some((device, inode, size)) = sys::identity(fd)
        && (prot & libc::PROT_WRITE != 0 || len as u64 >= size)
    {
        let mut state = shared();
        // Once RAM is mapped, a second shared mapping is left to the kernel: it can only read the file.
        if state.ram_file == Some((device, inode)) && state.ram.is_none() {
            return match place_ram(&mut state, config, (at as usize, len, prot, flags), offset) {
                Ok(start) => start as *mut c_void,
                Err(error) => {
                    complain(&error.to_string());
                    sys::set_errno(error.errno());
                    libc::MAP_FAILED
                }
            };
        }
    }
    // SAFETY: the caller's own arguments.
    unsafe { libc::syscall(libc::SYS_mmap, at, len, prot, flags, fd, offset) as *mut c_void }
}

fn place_ram(
    state: &mut Shared,
    config: &'static Config,
    (at, len, prot, flags): (usize, usize, c_int, c_int),
    offset: i64,
) -> Result<usize, Error> {
    if offset != 0 {
        return Err(Error::Offset { offset });
    }
    let mut ram = Ram::place(at, len, prot, flags)?;
    if let Some(map) = &config.ram_map {
        ram.install(map, config.ram_dir.as_deref())?;
    }
    let start = ram.start();
    RAM_END.store(start + ram.size() as usize, Ordering::Release);
    RAM_START.store(start, Ordering::Release);
    state.ram = Some(ram);
    start_control();
    Ok(start)
}

/// # Safety
/// As `madvise`.
unsafe fn do_madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int {
    let (start, end) = (RAM_START.load(Ordering::Acquire), RAM_END.load(Ordering::Acquire));
    let from = at as usize;
    let aligned = from.is_multiple_of(base::PAGE as usize);
    let to = len.checked_next_multiple_of(base::PAGE as usize).and_then(|len| from.checked_add(len));
    match to {
        Some(to) if start != 0 && aligned && from >= start && to <= end => {
            let range = ByteRange::new((from - start) as u64, (to - start) as u64);
            let Some(Err(errno)) = shared().ram.as_mut().map(|ram| ram.advised(range, advice)) else { return 0 };
            sys::set_errno(errno);
            -1
        }
        // It reaches over RAM's edge: no hypervisor does that, and advice that drops contents must not pass.
        Some(to) if start != 0 && from < end && to > start => {
            sys::set_errno(libc::EINVAL);
            -1
        }
        _ => {
            // SAFETY: the caller's own arguments.
            let result = unsafe { libc::syscall(libc::SYS_madvise, at, len, advice) as c_int };
            if advice == libc::MADV_HUGEPAGE && result == 0 && CONFIG.get().is_some() {
                // The buffer of translated code (a GiB of address space), or memory that the hypervisor keeps out
                // of forks itself. In a holder it would be dead weight, and every translation after a freeze a
                // copy-on-write fault.
                // SAFETY: this advice changes no contents.
                let _ = unsafe { sys::madvise(from, len, libc::MADV_DONTFORK) };
            }
            result
        }
    }
}

fn do_fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int {
    if mode & libc::FALLOC_FL_PUNCH_HOLE != 0
        && offset >= 0
        && len > 0
        && CONFIG.get().is_some_and(|c| c.ram_path.is_some())
        && let Some((device, inode, _)) = sys::identity(fd)
    {
        let mut state = shared();
        if state.ram_file == Some((device, inode))
            && let Some(ram) = state.ram.as_mut()
        {
            let range = ByteRange::new(offset as u64, (offset as u64).saturating_add(len as u64));
            let Err(error) = ram.discard(range) else { return 0 };
            sys::set_errno(error.errno());
            return -1;
        }
    }
    // SAFETY: numbers alone.
    unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, len) as c_int }
}

macro_rules! interpose {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty = $call:expr;)*) => {$(
        // SAFETY: the name is glibc's on purpose: the dynamic linker takes this definition first.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            // SAFETY: the arguments are the caller's, under the contract of the function of this name.
            #[allow(unused_unsafe)]
            unsafe { $call }
        }
    )*};
}

interpose! {
    open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int
        = do_open(libc::AT_FDCWD, path, flags, mode);
    open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int
        = do_open(libc::AT_FDCWD, path, flags, mode);
    __open_2(path: *const c_char, flags: c_int) -> c_int = do_open(libc::AT_FDCWD, path, flags, 0);
    __open64_2(path: *const c_char, flags: c_int) -> c_int = do_open(libc::AT_FDCWD, path, flags, 0);
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int
        = do_open(dir, path, flags, mode);
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int
        = do_open(dir, path, flags, mode);
    __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int = do_open(dir, path, flags, 0);
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int = do_open(dir, path, flags, 0);
    mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void
        = do_mmap(at, len, prot, flags, fd, offset);
    mmap64(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void
        = do_mmap(at, len, prot, flags, fd, offset);
    madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int = do_madvise(at, len, advice);
    fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int = do_fallocate(fd, mode, offset, len);
    fallocate64(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int = do_fallocate(fd, mode, offset, len);
}
