//! The control socket: clients that come, go, babble and hang; what the hypervisor's children inherit.

mod common;

use common::{Driver, PAGE, Resident, Scratch};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const SIZE: u64 = 1024 * PAGE;

#[test]
fn junk_is_answered_and_the_next_client_served() {
    let scratch = Scratch::new("junk");
    let driver = Driver::with_ram(&scratch, SIZE, None);
    let mut client = driver.connect();
    for junk in ["", "hello there", "freeze!", "map", "map ", "release", "\u{1}\u{7f}", "GET / HTTP/1.1\r"] {
        let error = client.error(junk);
        assert!(!error.is_empty() && !error.contains('\u{1}'), "{junk:?}: {error}");
    }
    client.0.get_ref().write_all(b"\xff\xfe\n").unwrap();
    assert!(client.error("nonsense").contains("unknown request"));
    let mut overlong = driver.connect();
    overlong.0.get_ref().write_all(&[b'x'; 20_000]).unwrap();
    let mut rest = String::new();
    let _ = overlong.0.read_to_string(&mut rest);
    assert!(rest.starts_with("error a request has at most"), "{rest}");
    assert_eq!(driver.connect().ok("hello")["version"], base::resident::VERSION.to_string());
}

#[test]
fn clients_that_vanish_or_hang_keep_nobody_out() {
    let scratch = Scratch::new("vanish");
    let driver = Driver::with_ram(&scratch, SIZE, None);
    for _ in 0..50 {
        let client = driver.connect();
        client.0.get_ref().write_all(b"hel").unwrap();
        drop(client);
        let client = driver.connect();
        client.0.get_ref().write_all(b"hello\nhello\nstat\nhello\n").unwrap();
        drop(client);
    }
    let silent: Vec<Resident> = (0..20).map(|_| driver.connect()).collect();
    let mut client = driver.connect();
    assert_eq!(client.ok("hello")["pid"], driver.pid().to_string());
    drop(silent);
    client.0.get_ref().write_all(b"hello\nst").unwrap();
    client.0.get_ref().write_all(b"at\n").unwrap();
    assert!(client.ask("hello").starts_with("ok version"), "several requests in a piece, one in two");
}

#[test]
fn a_request_before_ram_is_mapped_says_so() {
    let scratch = Scratch::new("early");
    let driver = Driver::start(&scratch, &scratch.0.join("placeholder"), None, None);
    let mut client = driver.connect();
    let hello = client.ok("hello");
    assert_eq!((hello["ram"].as_str(), hello["size"].as_str(), hello["mapped"].as_str()), ("0", "0", "0"));
    assert!(client.error("freeze").contains("not mapped its RAM yet"));
    assert!(client.error("map /x").contains("not mapped its RAM yet"));
    assert!(client.error("fuse").contains("no FUSE descriptor"));
}

#[test]
fn the_fuse_descriptor_is_handed_over_again_and_again() {
    let scratch = Scratch::new("fuse");
    let path = scratch.0.join("session");
    std::fs::write(&path, "the session").unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let driver = Driver::start(&scratch, &scratch.0.join("placeholder"), None, Some(file.as_raw_fd()));
    for _ in 0..3 {
        let client = driver.connect();
        client.0.get_ref().write_all(b"fuse\n").unwrap();
        let (line, got) = receive(client.0.get_ref().as_raw_fd());
        assert_eq!(line, "ok\n");
        let got = std::fs::File::from(got);
        let link = std::fs::read_link(format!("/proc/self/fd/{}", got.as_raw_fd())).unwrap();
        assert_eq!(link, path);
    }
}

#[test]
fn children_of_the_hypervisor_inherit_nothing() {
    let scratch = Scratch::new("inherit");
    let mut driver = Driver::with_ram(&scratch, SIZE, None);
    assert_eq!(driver.ask("environment"), "");
    // No variable, no socket, no mapping of the library.
    assert_eq!(driver.ask("fork"), ":0:0");
    assert_eq!(driver.connect().ok("hello")["pid"], driver.pid().to_string());
}

#[test]
fn without_its_socket_the_library_does_nothing() {
    let scratch = Scratch::new("inert");
    let path = scratch.0.join("file");
    std::fs::write(&path, "x").unwrap();
    let script = "printf changed > \"$1\"; cat \"$1\"; grep -c resident /proc/self/maps; ls /proc/self/task | wc -l";
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(&path)
        .env("LD_PRELOAD", common::library())
        .env(base::resident::ENV_RAM_PATH, &path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("changed"), "the file was opened to write: {said}");
    assert!(said.ends_with("\n1\n"), "the library is loaded and has no thread: {said}");
    assert_ne!(said, "changed0\n1\n", "the library was not loaded at all");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_wrong_environment_ends_the_process_with_a_reason() {
    for value in ["", "x", "-1", "987"] {
        let output = std::process::Command::new("true")
            .env("LD_PRELOAD", common::library())
            .env(base::resident::ENV_SOCKET, value)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(126), "{value}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("descriptor"), "{value}");
    }
}

/// A line with the descriptor that comes with it.
fn receive(socket: i32) -> (String, OwnedFd) {
    let mut bytes = [0u8; 64];
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero bytes are a valid `msghdr`; its pointers outlive the call; a control message is read only
    // where the kernel wrote one.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        let got = libc::recvmsg(socket, &raw mut message, 0);
        assert!(got > 0, "recvmsg: {}", std::io::Error::last_os_error());
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null(), "no descriptor came with the line");
        let fd = OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned());
        (String::from_utf8_lossy(&bytes[..got as usize]).into_owned(), fd)
    }
}
