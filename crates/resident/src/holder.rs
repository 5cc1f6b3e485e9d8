//! Fork-hold: a child of the stopped hypervisor whose memory is the frozen image.
//!
//! The kernel's copy-on-write keeps the image while the parent runs on. The daemon reads it with
//! `process_vm_readv` and ends it by `release`. A holder ends by SIGKILL alone and has **no parent-death signal**:
//! offshoots may fetch pages out of it after the parent is gone. A daemon finds forgotten ones by their name.

use crate::error::Error;
use crate::sys;
use base::resident::HOLDER_COMM;
use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const HOLDER_NAME: &CStr = c"offshoot-hold";
const CONTROL_NAME: &CStr = c"offshoot-ctl";
const _: () = assert!(HOLDER_COMM.len() == HOLDER_NAME.count_bytes(), "the thread's name is the protocol's");

/// The hypervisor's argument strings, which a holder overwrites in its own copy.
static ARGUMENTS: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static ARGUMENTS_LEN: AtomicUsize = AtomicUsize::new(0);

/// The holders of this hypervisor that were not released yet.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    pids: Vec<libc::pid_t>,
}

/// Notes where the argument strings lie, from the first byte of the first to the NUL of the last.
pub(crate) fn note_arguments(first: *mut u8, len: usize) {
    ARGUMENTS.store(first, Ordering::Relaxed);
    ARGUMENTS_LEN.store(len, Ordering::Relaxed);
}

/// Names the control thread.
pub(crate) fn name_control_thread() {
    sys::set_thread_name(CONTROL_NAME);
}

impl Holders {
    /// Forks the calling process, which must be the stopped hypervisor with its RAM made forkable.
    pub(crate) fn hold(&mut self) -> Result<libc::pid_t, Error> {
        // A forked task inherits its name, so the holder is never seen under the hypervisor's.
        sys::set_thread_name(HOLDER_NAME);
        // SAFETY: exit signal 0, so that the hypervisor's handling of its children never sees this one. A null
        // stack shares the address by copy-on-write. The child runs `stay` alone, which makes system calls only.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: this is the child that was just made, single-threaded in its own memory.
            unsafe { stay() }
        }
        let failed = (pid < 0).then(|| Error::last_os("forking the holder"));
        sys::set_thread_name(CONTROL_NAME);
        match failed {
            Some(error) => Err(error),
            None => {
                self.pids.push(pid as libc::pid_t);
                Ok(pid as libc::pid_t)
            }
        }
    }

    /// Ends a holder and reaps it.
    pub(crate) fn release(&mut self, pid: &str) -> Result<(), Error> {
        let unknown = || Error::NoHolder { pid: pid.to_owned() };
        let number: libc::pid_t = pid.parse().map_err(|_| unknown())?;
        let index = self.pids.iter().position(|&held| held == number).ok_or_else(unknown)?;
        // SAFETY: the pid is of an unreaped child of this process, so it names no other process.
        unsafe { libc::syscall(libc::SYS_kill, number, libc::SIGKILL) };
        while wait(number, 0) == Waited::Interrupted {}
        self.pids.swap_remove(index);
        Ok(())
    }

    /// Reaps the holders that somebody else has ended.
    pub(crate) fn reap(&mut self) {
        self.pids.retain(|&pid| wait(pid, libc::WNOHANG) == Waited::Alive);
    }

    /// Those alive, as the protocol lists them.
    pub(crate) fn list(&self) -> String {
        self.pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }
}

#[derive(PartialEq, Eq)]
enum Waited {
    Alive,
    Gone,
    Interrupted,
}

fn wait(pid: libc::pid_t, flags: libc::c_int) -> Waited {
    // SAFETY: no status is asked for; a null pointer is allowed.
    let done = unsafe { libc::syscall(libc::SYS_wait4, pid, 0usize, flags | libc::__WALL, 0usize) };
    match done {
        0 => Waited::Alive,
        -1 if sys::errno() == libc::EINTR => Waited::Interrupted,
        _ => Waited::Gone,
    }
}

/// When a process started, in clock ticks since boot: with its pid, its name for ever.
pub(crate) fn start_ticks(pid: libc::pid_t) -> Option<u64> {
    let stat = sys::read_text(std::path::Path::new(&format!("/proc/{pid}/stat"))).ok()?;
    // Field 22 (proc_pid_stat(5)); the second field is a name in parentheses and may hold anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The life of a holder. All signals are blocked, as in the control thread it is a copy of, so none of the
/// hypervisor's handlers can run in it.
///
/// # Safety
/// Only for the child of a raw `clone`: it closes every descriptor and overwrites the arguments.
unsafe fn stay() -> ! {
    // SAFETY: system calls alone, on this process alone; the argument strings are in this process's own copy of
    // the hypervisor's stack, and their length was measured when the library was loaded.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) != 0 {
            for fd in 0..65_536 {
                libc::syscall(libc::SYS_close, fd);
            }
        }
        // A session of its own: signals to the hypervisor's group or terminal are not meant for the image.
        libc::syscall(libc::SYS_setsid);
        libc::syscall(libc::SYS_chdir, c"/".as_ptr());
        // The hypervisor may have dropped privileges, after which only root could read its memory.
        libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
        // Tools that look for a hypervisor by its command line must not find the image.
        let arguments = ARGUMENTS.load(Ordering::Relaxed);
        for i in 0..ARGUMENTS_LEN.load(Ordering::Relaxed) {
            let byte = HOLDER_NAME.to_bytes_with_nul().get(i).copied().unwrap_or(0);
            arguments.add(i).write_volatile(byte);
        }
        loop {
            libc::syscall(libc::SYS_pause);
        }
    }
}
