//! A stand-in for the memory side of a hypervisor, for the tests in `tests/`: it maps a RAM file as QEMU's
//! `memory-backend-file` does and then does what its standard input says, one line each, one answer each.

use libc::{c_int, c_void};
use std::ffi::CString;
use std::io::{BufRead, Write};

fn main() {
    let mut ram: *mut u8 = std::ptr::null_mut();
    let mut ram_fd: c_int = -1;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<usize>().expect("a number");
        let at = |i: usize| ram.wrapping_add(number(i));
        let answer = match words[0] {
            "open" => {
                let path = CString::new(words[1]).expect("a path");
                // SAFETY: the path is a C string.
                ram_fd = unsafe { libc::open64(path.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o644) };
                outcome(ram_fd)
            }
            "mmap" => {
                ram = map_like_qemu(number(1), ram_fd);
                if ram as *mut c_void == libc::MAP_FAILED { outcome(-1) } else { format!("{:x}", ram as usize) }
            }
            "advise" => {
                // SAFETY: the tests name ranges of RAM.
                outcome(unsafe { libc::madvise(at(1).cast(), number(2), number(3) as c_int) })
            }
            "punch" => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: numbers alone.
                outcome(unsafe { libc::fallocate64(ram_fd, mode, number(1) as i64, number(2) as i64) })
            }
            "balloon" => {
                balloon(ram, ram_fd, number(1), number(2), number(3));
                "0".to_owned()
            }
            // SAFETY: the tests name ranges of RAM.
            "fill" => unsafe {
                std::ptr::write_bytes(at(1), number(3) as u8, number(2));
                "0".to_owned()
            },
            // SAFETY: the tests name ranges of RAM.
            "touch" => unsafe {
                (number(1)..number(2)).step_by(4096).map(|i| u64::from(ram.add(i).read_volatile())).sum::<u64>()
            }
            .to_string(),
            // SAFETY: the tests name bytes of RAM.
            "get" => unsafe { at(1).read_volatile() }.to_string(),
            "kernel-write" => kernel_write(at(1), number(2)),
            "fork" => fork_and_exec(),
            "environment" => std::env::vars()
                .map(|(name, _)| name)
                .filter(|n| n.starts_with("OFFSHOOT") || n == "LD_PRELOAD")
                .collect(),
            other => panic!("unknown command {other}"),
        };
        writeln!(out, "{answer}").and_then(|()| out.flush()).expect("the test reads the answer");
    }
}

fn outcome(result: c_int) -> String {
    if result >= 0 {
        return "0".to_owned();
    }
    format!("errno {}", std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// `qemu_ram_mmap` and `ram_block_add`: a reservation, the file over it, the advice.
fn map_like_qemu(size: usize, fd: c_int) -> *mut u8 {
    // SAFETY: a fresh reservation, and a mapping inside it.
    unsafe {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let reserved = libc::mmap64(std::ptr::null_mut(), size + (4 << 20), libc::PROT_NONE, private, -1, 0);
        assert_ne!(reserved, libc::MAP_FAILED, "reserving");
        let at = (reserved as usize).next_multiple_of(2 << 20) as *mut c_void;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let ram = libc::mmap64(at, size, prot, libc::MAP_SHARED | libc::MAP_FIXED, fd, 0);
        if ram != libc::MAP_FAILED {
            for advice in [libc::MADV_MERGEABLE, libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
                libc::madvise(ram, size, advice);
            }
        }
        ram.cast()
    }
}

/// `virtio_balloon_handle_output` and `ram_block_discard_range`: pages in descending order, each punched and then
/// advised. Every `step`-th page of `start..end`.
fn balloon(ram: *mut u8, fd: c_int, start: usize, end: usize, step: usize) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for at in (start..end).step_by(4096 * step).rev() {
        // SAFETY: the tests name ranges of RAM.
        unsafe {
            assert_eq!(libc::fallocate64(fd, mode, at as i64, 4096), 0, "punching a hole at {at:#x}");
            assert_eq!(libc::madvise(ram.add(at).cast(), 4096, libc::MADV_DONTNEED), 0, "advising at {at:#x}");
        }
    }
}

/// Lets the kernel write a page, as a disk read by a worker thread does.
fn kernel_write(at: *mut u8, byte: usize) -> String {
    let mut pipe = [0; 2];
    let page = [byte as u8; 4096];
    // SAFETY: a pipe holds a page, and `at` is a page of RAM.
    unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0, "making a pipe");
        assert_eq!(libc::write(pipe[1], page.as_ptr().cast(), page.len()), 4096, "filling the pipe");
        let got = libc::read(pipe[0], at.cast(), page.len());
        libc::close(pipe[0]);
        libc::close(pipe[1]);
        got.to_string()
    }
}

/// A helper program started by fork and exec: what it inherits of the library.
fn fork_and_exec() -> String {
    let script = "echo \"$LD_PRELOAD$OFFSHOOT_RESIDENT_FD:$(ls -l /proc/self/fd | grep -c socket:):$(grep -c resident /proc/self/maps)\"";
    let output = std::process::Command::new("sh").args(["-c", script]).output().expect("sh runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
