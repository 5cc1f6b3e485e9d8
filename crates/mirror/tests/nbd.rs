//! The NBD front, spoken to by other people's clients: libnbd, nbdkit, QEMU, fio. Needs root, /dev/fuse and the Debian
//! packages that `scripts/setup` installs.

mod common;

use common::{Mirror, PAGE, bytes};
use mirror::{Below, ExportSource, ExportSpec, OverlaySpec};
use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const MIB: usize = 1 << 20;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

#[test]
#[ignore = "is the mirror of the other tests"]
fn mirror_process() {
    common::mirror_process();
}

fn socket(mirror: &Mirror, name: &str) -> PathBuf {
    mirror.home.join(format!("run/{name}.sock"))
}

fn uri(mirror: &Mirror, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", socket(mirror, name).display())
}

fn spec(mirror: &Mirror, name: &str, source: ExportSource, read_only: bool) -> ExportSpec {
    let (name, description) = (name.to_owned(), format!("the disk {name}"));
    ExportSpec { socket: socket(mirror, &name), name, description, source, read_only, ephemeral: false }
}

/// Serves a fresh writable disk over `below`.
fn serve_disk(mirror: &Mirror, name: &str, id: u64, size: u64, below: Below) {
    let mut client = mirror.client();
    client.add_overlay(OverlaySpec { id, vm: format!("nbd:{name}"), size, block_size: 4096, below }).unwrap();
    client.add_export(spec(mirror, name, ExportSource::Overlay(id), false)).unwrap();
}

/// Serves a version of these bytes, read-only.
fn serve_version(mirror: &Mirror, name: &str, content: &[u8]) {
    mirror.put_version(name, content);
    let source = ExportSource::Version { version: name.to_owned(), size: content.len() as u64, block_size: 4096 };
    mirror.client().add_export(spec(mirror, name, source, true)).unwrap();
}

fn attempt(words: &[&str]) -> Output {
    Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", words[0]))
}

/// Runs a command that must succeed, and says what it printed.
fn run(words: &[&str]) -> String {
    let output = attempt(words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs commands of qemu-io, each of which must succeed.
fn qemu_io(target: &str, commands: &[&str]) -> String {
    let words = commands.iter().flat_map(|c| ["-c", c]);
    let text = run(&["qemu-io", "-f", "raw", target].into_iter().chain(words).collect::<Vec<_>>());
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    text
}

/// Data, zeros and data that only look like zeros.
fn mixed(seed: u64, len: usize) -> Vec<u8> {
    let mut content = bytes(seed, len);
    for (index, piece) in content.chunks_mut(64 << 10).enumerate() {
        match index % 4 {
            1 => piece.fill(0),
            2 => piece[..3 * PAGE].fill(0),
            _ => {}
        }
    }
    content
}

#[test]
fn a_version_is_told_of_mapped_and_copied_by_libnbd_and_qemu() {
    let mirror = Mirror::start();
    let content = mixed(1, 9 * MIB + 512);
    serve_version(&mirror, "web", &content);
    let (uri, dir) = (uri(&mirror, "web"), tempfile::tempdir().unwrap());
    assert_eq!(socket(&mirror, "web").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let told = run(&["nbdinfo", &uri]);
    for part in [
        "newstyle-fixed",
        "structured packets",
        "export-size: 9437696",
        "base:allocation",
        "is_read_only: true",
        "can_multi_conn: true",
        "can_df: true",
        "block_size_maximum: 33554432",
        "block_size_preferred: 4096",
        "description: the disk web",
    ] {
        assert!(told.contains(part), "{part} is missing: {told}");
    }
    assert!(run(&["nbdinfo", "--list", &uri]).contains("export=\"web\""));
    // The map tells exactly the blocks that are zero.
    let map: serde_json::Value = serde_json::from_str(&run(&["nbdinfo", "--map", "--json", &uri])).unwrap();
    let mut mapped = 0;
    for extent in map.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap() as usize;
        let (at, len, kind) = (number("offset"), number("length"), number("type"));
        assert_eq!(at, mapped);
        mapped += len;
        for block in content[at..at + len].chunks(PAGE) {
            assert_eq!(block.iter().all(|&b| b == 0), kind == 3, "at {at}: {kind}");
        }
    }
    assert_eq!(mapped, content.len());
    let (copy, image) = (dir.path().join("copy"), dir.path().join("image"));
    run(&["nbdcopy", &uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == content, "nbdcopy");
    fs::write(&image, &content).unwrap();
    run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", &uri, image.to_str().unwrap()]);
    let refused = attempt(&["qemu-io", "-f", "raw", "-c", "write 0 4k", &uri]);
    assert!(!refused.status.success(), "a read-only export takes no writes");
    assert!(!attempt(&["nbdinfo", &uri.replace("///web", "///other")]).status.success(), "another name");
    // Old clients choose by the oldest option, and have replies in one piece.
    for (structured, by_name) in [(false, false), (false, true), (true, true)] {
        let mut raw = Raw::connect(&socket(&mirror, "web"), structured, by_name);
        let at = 3 * MIB + 100;
        let (number, data) = raw.request(READ, 0, at as u64, 5 * MIB as u32, &[]);
        assert!(number == 0 && data == content[at..at + 5 * MIB], "structured: {structured}, by name: {by_name}");
        assert_eq!(raw.request(READ, 0, 0, 33 << 20, &[]).0, 22);
    }
}

#[test]
fn a_disk_is_written_zeroed_trimmed_and_compared() {
    let mirror = Mirror::start();
    let below = mixed(2, 8 * MIB);
    mirror.put_version("below", &below);
    serve_disk(&mirror, "d", 0x100, 8 * MIB as u64, Below::Version("below".to_owned()));
    let uri = uri(&mirror, "d");
    let mut model = below;
    qemu_io(
        &uri,
        &[
            "write -P 7 0 64k",
            "write -P 9 1000000 123457",
            "write -f -P 5 4M 4096",
            "write -z 2M 300k",
            "write -z -u 3M 100k",
            "discard 5M 1M",
            "aio_write -P 3 6M 1M",
            "aio_write -P 4 7M 512k",
            "aio_flush",
            "flush",
            "read -P 7 0 64k",
            "read -P 9 1000000 123457",
            "read -P 0 2M 300k",
        ],
    );
    model[..64 << 10].fill(7);
    model[1_000_000..1_123_457].fill(9);
    model[4 * MIB..4 * MIB + 4096].fill(5);
    model[2 * MIB..2 * MIB + (300 << 10)].fill(0);
    model[3 * MIB..3 * MIB + (100 << 10)].fill(0);
    model[5 * MIB..6 * MIB].fill(0);
    model[6 * MIB..7 * MIB].fill(3);
    model[7 * MIB..7 * MIB + (512 << 10)].fill(4);
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("image"), dir.path().join("copy"));
    fs::write(&image, &model).unwrap();
    run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", &uri, image.to_str().unwrap()]);
    // What changed since it began is told under QEMU's name for such maps.
    let map = run(&["nbdinfo", "--map=qemu:dirty-bitmap:changes", &uri]);
    let fields = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let changed: u64 = fields.filter(|f| f[2] == "1").map(|f| f[1].parse::<u64>().unwrap()).sum();
    assert!(changed >= 3 * MIB as u64 && changed < 5 * MIB as u64, "{map}");
    // The same disk, seen as a file in the mount: sparse to those who ask.
    let seen = mirror.open_disk(0x100);
    let data_at = |from: u64| rustix::fs::seek(&seen, rustix::fs::SeekFrom::Data(from)).ok();
    let hole_at = |from: u64| rustix::fs::seek(&seen, rustix::fs::SeekFrom::Hole(from)).ok();
    assert_eq!(data_at(5 * MIB as u64), Some(6 * MIB as u64), "the discarded MiB is a hole");
    assert_eq!(hole_at(6 * MIB as u64).map(|at| at >= 7 * MIB as u64), Some(true));
    let file = mirror.disk(0x100);
    run(&["qemu-img", "convert", "-f", "raw", "-O", "raw", file.to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == model, "through the mount");
    // In again, over four connections.
    let other = bytes(3, 8 * MIB);
    fs::write(&image, &other).unwrap();
    run(&["nbdcopy", "--flush", image.to_str().unwrap(), &uri]);
    run(&["nbdcopy", "--connections=1", "--requests=64", &uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == other, "nbdcopy there and back");
    let stats = mirror.client().stats(Some("nbd:d")).unwrap();
    assert!(stats.vms["nbd:d"].disk_written_bytes >= 8 * MIB as u64 && stats.vms["nbd:d"].disk_flushes > 0);
}

#[test]
fn requests_out_of_bounds_are_refused_by_number() {
    let mirror = Mirror::start();
    serve_disk(&mirror, "d", 0x100, MIB as u64, Below::Zero);
    let mut raw = Raw::connect(&socket(&mirror, "d"), true, false);
    let size = MIB as u64;
    let cases: &[(u16, u16, u64, u32, u32)] = &[
        (READ, 0, size - 1, 2, 22),
        (READ, 0, u64::MAX, 4096, 22),
        (READ, 0, 0, 0, 22),
        (READ, 0, 0, u32::MAX, 22),
        (READ, 1 << 9, 0, 4096, 22),
        (WRITE, 0, size, 4096, 28),
        (WRITE, 0, u64::MAX - 10, 4096, 28),
        (ZEROES, 0, 4096, u32::MAX, 28),
        (TRIM, 0, size, 1, 22),
        (STATUS, 0, 0, 4096, 22),
        (FLUSH, 0, 0, 0, 0),
        (99, 0, 0, 4096, 22),
        (WRITE, 0, 0, 4096, 0),
        (READ, 0, 0, 4096, 0),
        (TRIM, 0, 0, 4096, 0),
        (ZEROES, 1 << 4, 1, 4096, 0),
    ];
    for &(command, flags, offset, len, wanted) in cases {
        let payload = vec![1; if command == WRITE { len as usize } else { 0 }];
        let (number, data) = raw.request(command, flags, offset, len, &payload);
        assert_eq!(number, wanted, "command {command} with {flags} at {offset}, {len} bytes");
        assert_eq!(data.len() as u32, if command == READ && number == 0 { len } else { 0 });
    }
}

#[test]
fn a_slow_request_delays_nobody_behind_it() {
    let mirror = Mirror::start();
    mirror.put_version("below", &bytes(4, MIB));
    serve_disk(&mirror, "d", 0x100, MIB as u64, Below::Version("below".to_owned()));
    let mut raw = Raw::connect(&socket(&mirror, "d"), true, false);
    assert_eq!(raw.request(WRITE, 0, 0, 4096, &[7; 4096]).0, 0);
    fs::write(mirror.store.join("slow"), "700000").unwrap();
    raw.send(READ, 0, 1, 512 << 10, 4096, &[]);
    for cookie in 2..12 {
        raw.send(READ, 0, cookie, 0, 4096, &[]);
    }
    let order: Vec<u64> = (0..11).map(|_| raw.reply().0).collect();
    assert_eq!(order.last(), Some(&1), "{order:?}");
    fs::remove_file(mirror.store.join("slow")).unwrap();
}

#[test]
fn a_store_that_is_down_is_an_error_and_a_full_disk_another() {
    let small = tempfile::tempdir().unwrap();
    run(&["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small.path().to_str().unwrap()]);
    let mirror = Mirror::start_in(tempfile::tempdir_in(small.path()).unwrap());
    let outcome = std::panic::catch_unwind(|| {
        mirror.put_version("below", &bytes(5, 64 << 10));
        serve_disk(&mirror, "d", 0x100, 16 * MIB as u64, Below::Version("below".to_owned()));
        let mut raw = Raw::connect(&socket(&mirror, "d"), true, false);
        fs::write(mirror.store.join("down"), "").unwrap();
        assert_eq!(raw.request(READ, 0, 0, 4096, &[]).0, 5);
        assert_eq!(raw.request(STATUS, 0, 0, 4096, &[]).0, 22, "no context was agreed on");
        fs::remove_file(mirror.store.join("down")).unwrap();
        assert!(raw.request(READ, 0, 0, 64 << 10, &[]).1 == bytes(5, 64 << 10));
        let numbers: Vec<u32> =
            (0..8).map(|n| raw.request(WRITE, 0, n * MIB as u64, MIB as u32, &vec![n as u8 + 1; MIB]).0).collect();
        assert_eq!((numbers[0], numbers[7]), (0, 28), "{numbers:?}");
        assert_eq!(raw.request(ZEROES, 1 << 1, 8 << 20, 4 << 20, &[]).0, 28, "room for zeros that must keep it");
        // Space given back can be written again, and nothing that was answered is lost.
        assert_eq!(raw.request(READ, 0, 0, 4096, &[]).1, [1; 4096]);
        assert_eq!(raw.request(TRIM, 0, 0, MIB as u32, &[]).0, 0);
        assert_eq!(raw.request(WRITE, 1, 9 << 20, 128 << 10, &vec![9; 128 << 10]).0, 0);
        assert_eq!(raw.request(READ, 0, 9 << 20, 4096, &[]).1, [9; 4096]);
    });
    drop(mirror);
    run(&["umount", "--lazy", small.path().to_str().unwrap()]);
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn a_chain_of_nbdkit_filters_stands_on_it() {
    let mirror = Mirror::start();
    let content = mixed(6, 5 * MIB);
    serve_version(&mirror, "web", &content);
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let script = format!(
        "qemu-io -f raw -c 'write -P 6 1M 64k' -c 'read -P 6 1M 64k' \"$uri\" && nbdcopy \"$uri\" {}",
        copy.display()
    );
    let path = format!("socket={}", socket(&mirror, "web").display());
    run(&["nbdkit", "--unix", "-", "--filter=cow", "--filter=readahead", "nbd", &path, "export=web", "--run", &script]);
    let mut model = content.clone();
    model[MIB..MIB + (64 << 10)].fill(6);
    assert!(fs::read(&copy).unwrap() == model, "written above, read from below");
    assert!(Raw::connect(&socket(&mirror, "web"), true, false).request(READ, 0, 0, 4096, &[]).1 == content[..4096]);
}

#[test]
fn what_was_answered_outlives_killed_mirrors() {
    let mut mirror = Mirror::start();
    serve_disk(&mirror, "d", 0x100, 64 * MIB as u64, Below::Zero);
    let session: OwnedFd = mirror.client().fuse_fd().unwrap();
    let uri = uri(&mirror, "d");
    let fio = |more: &[&str]| {
        let (uri, common) = (format!("--uri={uri}"), ["--name=v", "--ioengine=nbd", "--rw=randwrite", "--size=48M"]);
        let words = [
            &["fio"][..],
            &common,
            &["--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", &uri],
            more,
        ];
        run(&words.concat());
    };
    fio(&["--do_verify=0"]);
    mirror.kill();
    mirror.spawn(Some(&session));
    mirror.client().hello().unwrap();
    fio(&["--verify_only"]);
    // Under load, with a client that connects again: each write is answered once, by this mirror or by the next.
    let socket = socket(&mirror, "d");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=d,reconnect-delay=60,open-timeout=60",
        socket.display()
    );
    let place = |n: usize| format!("{} 60k", 48 * MIB + (n % 200) * (64 << 10));
    let writes = (0..2000).flat_map(|n| ["-c".to_owned(), format!("write -P {} {}", 1 + n / 200, place(n))]);
    let mut child = Command::new("qemu-io")
        .args(["--image-opts", &image])
        .args(writes)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        said.read_to_string(&mut text).map(|_| text)
    });
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(40));
        mirror.kill();
        mirror.spawn(Some(&session));
        mirror.client().hello().unwrap();
    }
    assert!(child.wait().unwrap().success());
    let text = reader.join().unwrap().unwrap();
    assert!(text.matches("wrote 61440/61440").count() == 2000, "{} of 2000 writes", text.matches("wrote").count());
    let reads: Vec<String> = (0..200).map(|n| format!("read -P 10 {}", place(n))).collect();
    let text = qemu_io(&uri, &reads.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!text.contains("Pattern verification failed"), "{text}");
    // From the device, many at once.
    mirror.drop_layers();
    fio(&["--verify_only"]);
    assert!(mirror.client().remove(&[0x100]).unwrap_err().to_string().contains("export d"));
    assert!(mirror.client().remove_export("d").unwrap() && !mirror.client().remove_export("d").unwrap());
    assert!(!socket.exists());
    assert_eq!(mirror.client().remove(&[0x100]).unwrap().removed, [0x100]);
}

#[test]
fn hostile_clients_are_hung_up_on_and_cost_little() {
    let mirror = Mirror::start();
    serve_disk(&mirror, "d", 0x100, MIB as u64, Below::Zero);
    let path = socket(&mirror, "d");
    let mut good = Raw::connect(&path, true, false);
    assert_eq!(good.request(WRITE, 0, 0, 4096, &[3; 4096]).0, 0);
    let hung_up = |stream: &mut UnixStream| {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    };
    // Noise instead of a handshake, and instead of requests.
    for seed in 0..20 {
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(&bytes(seed, 4096));
        assert!(hung_up(&mut stream), "noise {seed} in the handshake");
        let mut raw = Raw::connect(&path, seed % 2 == 0, false);
        let _ = raw.stream.write_all(&bytes(seed, 100_000));
        assert!(hung_up(&mut raw.stream), "noise {seed} for requests");
    }
    // Lengths that nobody has memory for.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let mut option = b"IHAVEOPT".to_vec();
    option.extend([7u32.to_be_bytes(), u32::MAX.to_be_bytes()].concat());
    stream.write_all(&option).unwrap();
    assert!(hung_up(&mut stream), "an option of 4 GiB");
    let mut raw = Raw::connect(&path, true, false);
    raw.send(WRITE, 0, 1, 0, u32::MAX, &[]);
    assert!(hung_up(&mut raw.stream), "a write of 4 GiB");
    // Names and queries longer than what holds them.
    for option in [6u32, 7, 9, 10] {
        let mut raw = Raw::greet(&path);
        let body = [0xffff_fff0u32.to_be_bytes(), [0; 4]].concat();
        assert_eq!(raw.option(option, &body), 1 << 31 | 3, "option {option}");
    }
    // Many who say half a word, and many who ask and do not listen.
    let half: Vec<UnixStream> = (0..100)
        .map(|_| UnixStream::connect(&path).unwrap())
        .inspect(|mut stream| drop(stream.write_all(&[0, 0])))
        .collect();
    assert!(good.request(READ, 0, 0, 4096, &[]).1 == [3; 4096], "others are served meanwhile");
    drop(half);
    std::thread::sleep(Duration::from_millis(200));
    let mut deaf: Vec<Raw> = (0..40).map(|_| Raw::connect(&path, true, false)).collect();
    for raw in &mut deaf {
        raw.stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let request = encode(READ, 0, 1, 0, MIB as u32);
        let _ = raw.stream.write_all(&request.repeat(200));
    }
    assert!(good.request(READ, 0, 0, 4096, &[]).1 == [3; 4096], "others are served meanwhile");
    let status = fs::read_to_string(format!("/proc/{}/status", mirror.pid())).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse::<u64>().ok());
    assert!(rss.unwrap() < 400 << 10, "{rss:?} KiB");
    assert!(mirror.client().remove_export("d").unwrap(), "ends in the midst of it");
    assert!(good.stream.read(&mut [0; 1]).is_ok_and(|n| n == 0));
}

#[test]
fn a_file_system_inside_outlives_killed_mirrors() {
    let mut mirror = Mirror::start();
    serve_disk(&mirror, "d", 0x100, 64 * MIB as u64, Below::Zero);
    let session = mirror.client().fuse_fd().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (tree, copy) = (dir.path().join("tree"), dir.path().join("copy"));
    for n in 0..40 {
        fs::create_dir_all(tree.join(format!("d{}", n % 7))).unwrap();
        fs::write(tree.join(format!("d{}/f{n}", n % 7)), bytes(n, 3000 + 5000 * n as usize)).unwrap();
    }
    let disk = mirror.disk(0x100);
    let disk = disk.to_str().unwrap();
    run(&["mke2fs", "-q", "-t", "ext4", "-d", tree.to_str().unwrap(), disk]);
    run(&["e2fsck", "-fn", disk]);
    // A killed mirror in the middle of more files: whoever writes waits for the next one.
    let more = dir.path().join("more");
    fs::write(&more, bytes(99, 8 * MIB)).unwrap();
    let commands: String = (0..4).map(|n| format!("write {} more{n}\n", more.display())).collect();
    let script = dir.path().join("script");
    fs::write(&script, commands).unwrap();
    let mut child = Command::new("debugfs").args(["-w", "-f", script.to_str().unwrap(), disk]).spawn().unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(20));
        mirror.kill();
        mirror.spawn(Some(&session));
        mirror.client().hello().unwrap();
    }
    assert!(child.wait().unwrap().success());
    run(&["e2fsck", "-fn", disk]);
    // The other front shows the same file system.
    run(&["nbdcopy", &uri(&mirror, "d"), copy.to_str().unwrap()]);
    run(&["e2fsck", "-fn", copy.to_str().unwrap()]);
    for (inside, wanted) in [("d3/f17", bytes(17, 3000 + 5000 * 17)), ("more3", bytes(99, 8 * MIB))] {
        let out = dir.path().join("out");
        run(&["debugfs", "-R", &format!("dump {inside} {}", out.display()), copy.to_str().unwrap()]);
        assert!(fs::read(&out).unwrap() == wanted, "{inside}");
    }
}

#[test]
fn an_ephemeral_export_ends_with_its_last_connection() {
    let mirror = Mirror::start();
    mirror.put_version("v", &bytes(8, MIB));
    let source = ExportSource::Version { version: "v".to_owned(), size: MIB as u64, block_size: 4096 };
    let spec = ExportSpec { ephemeral: true, ..spec(&mirror, "e", source, true) };
    mirror.client().add_export(spec.clone()).unwrap();
    mirror.client().add_export(spec.clone()).unwrap();
    let other = ExportSpec { description: "another".to_owned(), ..spec };
    assert!(mirror.client().add_export(other).unwrap_err().to_string().contains("is there already"));
    run(&["nbdcopy", &uri(&mirror, "e"), "null:"]);
    let gone = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        mirror.client().list().unwrap().exports.is_empty()
    });
    assert!(gone && !socket(&mirror, "e").exists());
}

#[test]
fn sockets_are_made_only_where_nothing_else_is() {
    let mirror = Mirror::start();
    mirror.put_version("v", &bytes(8, MIB));
    let source = || ExportSource::Version { version: "v".to_owned(), size: MIB as u64, block_size: 4096 };
    let dir = tempfile::tempdir().unwrap();
    let (file, live, dead) = (dir.path().join("file"), dir.path().join("live"), dir.path().join("dead"));
    fs::write(&file, "mine").unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&live).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let add = |path: &Path, read_only| {
        let spec = ExportSpec { socket: path.to_owned(), ..spec(&mirror, "v", source(), read_only) };
        mirror.client().add_export(spec).map_err(|e| e.to_string())
    };
    assert!(add(&file, true).unwrap_err().contains("no socket"));
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert!(add(&live, true).unwrap_err().contains("somebody listens"));
    assert!(add(Path::new("relative"), true).unwrap_err().contains("absolute"));
    assert!(add(&dir.path().join("no/such/dir"), true).is_err());
    assert!(add(&dead, false).unwrap_err().contains("cannot be written"));
    add(&dead, true).unwrap();
    assert_eq!(Raw::connect(&dead, true, false).request(READ, 0, 0, 4096, &[]).1, bytes(8, MIB)[..4096]);
}

/// A client of our own, which says what no sane one would.
struct Raw {
    stream: UnixStream,
    /// Offset and bytes that each request's reply carries.
    asked: HashMap<u64, (u64, u32)>,
}

fn encode(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

impl Raw {
    /// Connects and says it knows the fixed handshake.
    fn greet(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut raw = Self { stream, asked: HashMap::new() };
        assert_eq!(raw.take(18)[..16], *b"NBDMAGICIHAVEOPT");
        raw.stream.write_all(&3u32.to_be_bytes()).unwrap();
        raw
    }

    fn connect(path: &Path, structured: bool, by_name: bool) -> Self {
        let mut raw = Self::greet(path);
        if structured {
            assert_eq!(raw.option(8, &[]), 1);
        }
        if by_name {
            raw.put_option(1, &[]);
            raw.take(10);
        } else {
            assert_eq!(raw.option(7, &[0; 6]), 1);
        }
        raw
    }

    fn put_option(&mut self, option: u32, body: &[u8]) {
        let mut out = b"IHAVEOPT".to_vec();
        out.extend(option.to_be_bytes());
        out.extend((body.len() as u32).to_be_bytes());
        out.extend(body);
        self.stream.write_all(&out).unwrap();
    }

    /// Sends an option and says how it ends.
    fn option(&mut self, option: u32, body: &[u8]) -> u32 {
        self.put_option(option, body);
        loop {
            let head = self.take(20);
            let (kind, len) = (u32_at(&head, 12), u32_at(&head, 16));
            self.take(len as usize);
            if kind == 1 || kind & 1 << 31 != 0 {
                return kind;
            }
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.stream.read_exact(&mut out).unwrap();
        out
    }

    fn send(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        self.asked.insert(cookie, (offset, if command == READ { len } else { 0 }));
        self.stream.write_all(&encode(command, flags, cookie, offset, len)).unwrap();
        self.stream.write_all(payload).unwrap();
    }

    /// The next reply: its cookie, its error, its data.
    fn reply(&mut self) -> (u64, u32, Vec<u8>) {
        let mut out: Option<Vec<u8>> = None;
        loop {
            let head = self.take(16);
            let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
            let (start, len) = self.asked[&cookie];
            if u32_at(&head, 0) == 0x6744_6698 {
                let number = u32_at(&head, 4);
                let data = if number == 0 { self.take(len as usize) } else { Vec::new() };
                return (cookie, number, data);
            }
            assert_eq!(u32_at(&head, 0), 0x668e_33ef);
            let (last, kind) = (head[5] & 1 == 1, u16::from_be_bytes([head[6], head[7]]));
            let body = self.take(4);
            let body = self.take(u32_at(&body, 0) as usize);
            let data = out.get_or_insert_with(|| vec![0xee; len as usize]);
            let at = |body: &[u8]| (u64::from_be_bytes(body[..8].try_into().unwrap()) - start) as usize;
            match kind {
                0 => {}
                1 => data[at(&body)..at(&body) + body.len() - 8].copy_from_slice(&body[8..]),
                2 => data[at(&body)..at(&body) + u32_at(&body, 8) as usize].fill(0),
                _ => return (cookie, u32_at(&body, 0), Vec::new()),
            }
            if last {
                return (cookie, 0, out.unwrap_or_default());
            }
        }
    }

    fn request(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        self.send(command, flags, 7, offset, len, payload);
        let (cookie, number, data) = self.reply();
        assert_eq!(cookie, 7);
        (number, data)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}
