//! The real hypervisor under the library: an unmodified `qemu-system-x86_64` that runs its firmware.

mod common;

use base::{RamFileId, RamMap, Source};
use common::{PAGE, Resident, Scratch, mappings, pages, preload};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SIZE: u64 = 128 << 20;

struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    resident: Resident,
}

impl Qemu {
    fn start(scratch: &Scratch, map: Option<&Path>, extra: &[&str]) -> Self {
        let ram = scratch.0.join("ram");
        std::fs::File::create(&ram).unwrap().set_len(SIZE).unwrap();
        let qmp = scratch.0.join("qmp.sock");
        let mut command = Command::new("qemu-system-x86_64");
        let socket = preload(&mut command, scratch, &ram, map, None);
        command
            .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", "128", "-S"])
            .args(["-display", "none", "-nodefaults", "-object"])
            .arg(format!("memory-backend-file,id=ram,size=128M,share=on,mem-path={}", ram.display()))
            .args(["-qmp", &format!("unix:{},server,nowait", qmp.display())])
            .args(extra)
            .stdin(Stdio::null());
        let child = command.spawn().unwrap();
        drop(command);
        let limit = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(&qmp) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < limit, "QMP did not open: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut qemu = Self { child, qmp: BufReader::new(stream), resident: Resident::connect(&socket) };
        qemu.qmp.read_line(&mut String::new()).unwrap();
        qemu.command("qmp_capabilities");
        qemu
    }

    fn command(&mut self, name: &str) -> String {
        writeln!(self.qmp.get_ref(), "{{\"execute\":\"{name}\"}}").unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.qmp.read_line(&mut line).unwrap(), 0, "the hypervisor is gone");
            if line.starts_with("{\"return\"") || line.starts_with("{\"error\"") {
                assert!(line.starts_with("{\"return\""), "{name}: {line}");
                return line;
            }
        }
    }

    fn run_for(&mut self, ms: u64) {
        self.command("cont");
        std::thread::sleep(Duration::from_millis(ms));
        self.command("stop");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn firmware_runs_in_private_ram_and_is_frozen_twice() {
    let scratch = Scratch::new("qemu");
    let mut qemu = Qemu::start(&scratch, None, &[]);
    let hello = qemu.resident.ok("hello");
    let start = u64::from_str_radix(&hello["ram"], 16).unwrap();
    assert_eq!(hello["size"], SIZE.to_string());
    let maps = mappings(qemu.child.id(), start, SIZE);
    assert!(maps.len() == 1 && maps[0].contains(" rw-p ") && !maps[0].contains('/'), "{maps:?}");
    assert!(qemu.resident.ok("stat")["refused_advice"] != "0", "QEMU asks for huge pages");
    qemu.run_for(1000);
    let first = qemu.resident.freeze();
    assert!(!first.tracked);
    // SeaBIOS leaves its identity in the F segment, copied from ROM to shadow RAM.
    let segment: Vec<u8> = (0xF_0000..0x10_0000).map(|at| first.byte(at)).collect();
    let found = segment.windows(7).any(|w| w == b"SeaBIOS");
    assert!(found, "the firmware is in the frozen image");
    qemu.run_for(50);
    let _ = qemu.resident.freeze();
    // A reset starts the firmware anew, which writes much of the low memory again.
    qemu.command("system_reset");
    qemu.run_for(1000);
    let second = qemu.resident.freeze();
    assert!(second.tracked && !second.written.is_empty());
    let written: u64 = second.written.iter().map(|r| r.len()).sum();
    assert!((PAGE..SIZE / 4).contains(&written), "{written} bytes written by a reset");
    let is_written = |at: u64| second.written.iter().chain(&second.zeroed).any(|r| r.start <= at && at < r.end);
    for at in (0..SIZE).step_by(PAGE as usize) {
        if !is_written(at) {
            for byte in [at, at + 1000, at + 4095] {
                assert_eq!(first.byte(byte), second.byte(byte), "{byte:#x} changed unreported");
            }
        }
    }
    println!("fork {} us, scan {} us", second.fork_us, second.scan_us);
    for holder in [first.holder, second.holder] {
        qemu.resident.ok(&format!("release {holder}"));
    }
    assert!(qemu.command("query-status").contains("paused"));
    assert!(std::fs::read(scratch.0.join("ram")).unwrap().iter().all(|&byte| byte == 0), "the file is unchanged");
}

#[test]
fn qemu_starts_from_a_ram_map_and_under_its_sandbox() {
    let scratch = Scratch::new("qemu-map");
    scratch.ram_file(7, SIZE / PAGE);
    let before = digest(&scratch.0.join("0000000000000007"));
    let mut map = RamMap::zero(SIZE);
    map.set(pages(4096, 16_384), Source::File(RamFileId(7)));
    let path = scratch.map_file(&map);
    let mut qemu = Qemu::start(&scratch, Some(&path), &["-sandbox", "on", "-device", "virtio-balloon-pci"]);
    let hello = qemu.resident.ok("hello");
    assert_eq!(hello["mapped"], "1");
    qemu.run_for(300);
    let first = qemu.resident.freeze();
    for page in [4096, 9000, 16_383] {
        assert_eq!(first.byte(page * PAGE), common::pattern(page), "page {page}");
    }
    assert_eq!(first.byte(16_384 * PAGE), 0);
    qemu.run_for(100);
    let second = qemu.resident.freeze();
    assert!(second.tracked, "tracking works under the sandbox");
    assert!(second.written.iter().all(|r| r.end <= 4096 * PAGE || r.start >= 16_384 * PAGE), "{:?}", second.written);
    assert_eq!(digest(&scratch.0.join("0000000000000007")), before, "the RAM file is unchanged");
}

#[test]
fn a_ram_map_that_cannot_be_read_keeps_qemu_from_starting() {
    let scratch = Scratch::new("qemu-bad");
    let ram = scratch.0.join("ram");
    std::fs::File::create(&ram).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    preload(&mut command, &scratch, &ram, Some(&scratch.0.join("absent.map")), None);
    let output = command
        .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", "128", "-S", "-display", "none"])
        .arg("-nodefaults")
        .arg("-object")
        .arg(format!("memory-backend-file,id=ram,size=128M,share=on,mem-path={}", ram.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("reading the RAM map") && said.contains("absent.map: No such file"), "{said}");
}

#[test]
fn a_hypervisor_that_daemonizes_is_still_served() {
    let scratch = Scratch::new("qemu-daemon");
    let ram = scratch.0.join("ram");
    std::fs::File::create(&ram).unwrap().set_len(SIZE).unwrap();
    let pid_file = scratch.0.join("pid");
    let mut command = Command::new("qemu-system-x86_64");
    let socket = preload(&mut command, &scratch, &ram, None, None);
    let status = command
        .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", "128", "-S", "-display", "none"])
        .args(["-nodefaults", "-daemonize", "-pidfile"])
        .arg(&pid_file)
        .arg("-object")
        .arg(format!("memory-backend-file,id=ram,size=128M,share=on,mem-path={}", ram.display()))
        .status()
        .unwrap();
    assert!(status.success());
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let mut resident = Resident::connect(&socket);
    let hello = resident.ok("hello");
    assert_eq!((hello["pid"].as_str(), hello["size"].as_str()), (pid.to_string().as_str(), SIZE.to_string().as_str()));
    let frozen = resident.freeze();
    resident.ok(&format!("release {}", frozen.holder));
    // SAFETY: the hypervisor of this test.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// A digest good enough to see a changed file.
fn digest(path: &Path) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(&std::fs::read(path).unwrap());
    hasher.finish()
}
