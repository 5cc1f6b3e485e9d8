//! The default guest, really built, broken off, imported again as a foreign disk, and booted.

use node::image::{BuildOptions, ImportOptions, Parts, build_default, import};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Set for the process that builds in order to be killed.
const VICTIM: &str = "OFFSHOOT_TEST_BUILD_IN";

/// The build that all tests share.
fn cache() -> PathBuf {
    let given = std::env::var_os(node::ENV_CACHE).map(PathBuf::from);
    given.unwrap_or_else(|| {
        let exe = std::env::current_exe().unwrap();
        exe.ancestors().nth(3).unwrap().join("guest")
    })
}

fn guest() -> Parts {
    build_default(&cache(), &BuildOptions::default(), &mut |step| eprintln!("{step}")).unwrap()
}

fn tool(name: &str, args: &[&str]) {
    let out = Command::new(name).args(args).output().unwrap();
    assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_build_is_sound_and_a_second_one_is_the_first() {
    let parts = guest();
    tool("e2fsck", &["-fn", text(&parts.disk)]);
    let made = parts.disk.metadata().unwrap().modified().unwrap();
    let began = Instant::now();
    let again = guest();
    assert_eq!((again.disk.metadata().unwrap().modified().unwrap(), &again.kernel), (made, &parts.kernel));
    assert!(began.elapsed() < Duration::from_secs(10), "a cached build takes no time");
    let left: Vec<_> = fs::read_dir(cache()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.starts_with("building.")), "{left:?}");
}

#[test]
fn a_killed_build_leaves_a_directory_that_the_next_one_removes() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        let parts = build_default(Path::new(&dir), &BuildOptions::default(), &mut |step| println!("step {step}"));
        panic!("the build was to be killed, and ended: {parts:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_build_leaves_a_directory_that_the_next_one_removes", "--nocapture"])
        .env(VICTIM, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .map(Killed)
        .unwrap();
    let mut out = victim.0.stdout.take().unwrap();
    let mut seen = String::new();
    let mut buf = [0; 4096];
    // From here on mmdebstrap has mounts and children of its own.
    while !seen.contains("step installing") {
        let len = out.read(&mut buf).unwrap();
        assert!(len > 0, "the build ended early: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buf[..len]));
    }
    drop(victim);
    let processes = || {
        let list = fs::read_dir("/proc").unwrap().filter_map(|e| fs::read(e.unwrap().path().join("cmdline")).ok());
        list.filter(|line| String::from_utf8_lossy(line).contains(text(dir.path()))).count()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while processes() > 0 {
        assert!(Instant::now() < deadline, "the killed build's children live on");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(text(dir.path())), "{mounts}");
    let names = || -> Vec<String> {
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert!(names().iter().any(|name| name.starts_with("building.")), "{:?}", names());
    // With a finished build in its place, the next one has nothing to do but to clear.
    let built = guest().disk.parent().unwrap().to_owned();
    tool("cp", &["-r", "--sparse=always", "--reflink=auto", text(&built), text(dir.path())]);
    build_default(dir.path(), &BuildOptions::default(), &mut |_| ()).unwrap();
    assert!(!names().iter().any(|name| name.starts_with("building.")), "{:?}", names());
}

#[test]
fn the_guest_boots_from_a_foreign_partitioned_disk() {
    let parts = guest();
    let dir = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    partitioned(&parts.disk, &raw);
    tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&qcow2)]);
    fs::remove_file(&raw).unwrap();
    let work = dir.path().join("work");
    let found = import(&qcow2, &ImportOptions::default(), &work, &mut |step| eprintln!("{step}")).unwrap();
    assert_eq!(found.cmdline, "console=ttyS0 root=/dev/vda1 rw quiet");
    assert_eq!(fs::read(&found.kernel).unwrap(), fs::read(&parts.kernel).unwrap());
    assert_eq!(fs::read(found.initrd.as_ref().unwrap()).unwrap(), fs::read(parts.initrd.as_ref().unwrap()).unwrap());
    let (http, redis) = (free_port(), free_port());
    let began = Instant::now();
    let _vm = boot(&found, http, redis);
    until_answered(http, b"GET / HTTP/1.0\r\n\r\n", "200 OK");
    eprintln!("nginx answered after {:.1} s", began.elapsed().as_secs_f32());
    until_answered(redis, b"PING\r\n", "PONG");
    eprintln!("redis answered after {:.1} s", began.elapsed().as_secs_f32());
    // A test of isolation writes files through redis: it must be allowed to.
    until_answered(redis, b"CONFIG SET dbfilename probe.rdb\r\n", "+OK");
    until_answered(redis, b"SAVE\r\n", "+OK");
}

/// Writes `disk` into partition 1 of the new disk `to`.
fn partitioned(disk: &Path, to: &Path) {
    let mut head = vec![0; 1 << 20];
    let sectors = u32::try_from(disk.metadata().unwrap().len() / 512).unwrap();
    head[446 + 4] = 0x83;
    head[446 + 8..][..4].copy_from_slice(&2048u32.to_le_bytes());
    head[446 + 12..][..4].copy_from_slice(&sectors.to_le_bytes());
    head[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(to, head).unwrap();
    let (from, to) = (format!("if={}", disk.display()), format!("of={}", to.display()));
    tool("dd", &[&from, &to, "bs=1M", "seek=1", "conv=sparse,notrunc"]);
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn boot(parts: &Parts, http: u16, redis: u16) -> Killed {
    let forwards = format!("user,id=n0,hostfwd=tcp:127.0.0.1:{http}-:80,hostfwd=tcp:127.0.0.1:{redis}-:6379");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-machine", "q35", "-nodefaults"])
        .args(["-display", "none", "-netdev", &forwards, "-device", "virtio-net-pci,netdev=n0"])
        .args(["-drive", &format!("file={},format=raw,if=none,id=d0", parts.disk.display())])
        .args(["-device", "virtio-blk-pci,drive=d0", "-append", &parts.cmdline])
        .arg("-kernel")
        .arg(&parts.kernel)
        .arg("-initrd")
        .arg(parts.initrd.as_ref().unwrap());
    qemu.spawn().map(Killed).unwrap()
}

fn until_answered(port: u16, request: &[u8], expected: &str) {
    let deadline = Instant::now() + Duration::from_secs(240);
    while !answered(port, request, expected).unwrap_or(false) {
        assert!(Instant::now() < deadline, "port {port} of the guest did not answer `{expected}`");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn answered(port: u16, request: &[u8], expected: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request)?;
    let mut reply = [0; 512];
    let len = stream.read(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply[..len]).contains(expected))
}
