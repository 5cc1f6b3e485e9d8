//! A disk through the mirror's fronts, all of it local, beside a plain file on the same file system and beside
//! `qemu-nbd`; and the memory that the mirror takes for a very large one.
//!
//! `BENCH_DISKS` chooses among the loads by the beginnings of their names, with commas between them:
//! `BENCH_DISKS=fuse_rand_read_d32,nbd_seq,mirror` measures three things. A figure that is the worst of several loads
//! is then the worst of those measured.

use super::{Bench, COMMAND, drop_caches, unmount_below};
use crate::Outcome;
use crate::report::{Figure, median};
use mirror::{Below, Client, ExportSource, ExportSpec, OverlaySpec};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use store::{Mode, Store};

const DISK: u64 = 100;
const SPARSE: u64 = 101;

/// What `fio` is asked to do, and how the result is called.
const LOADS: [(&str, &[&str], f64); 6] = [
    ("seq_read", &["--rw=read", "--bs=1M", "--iodepth=4"], 0.9),
    ("seq_write", &["--rw=write", "--bs=1M", "--iodepth=4"], 0.7),
    ("rand_read_d1", &["--rw=randread", "--bs=4k", "--iodepth=1"], 0.6),
    ("rand_write_d1", &["--rw=randwrite", "--bs=4k", "--iodepth=1"], 0.6),
    ("rand_read_d32", &["--rw=randread", "--bs=4k", "--iodepth=32"], 0.6),
    ("rand_write_d32", &["--rw=randwrite", "--bs=4k", "--iodepth=32"], 0.6),
];

/// Processes that end with it.
pub(super) struct Running(Vec<Child>, Option<PathBuf>);

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(home) = &self.1 {
            unmount_below(home);
        }
    }
}

/// Starts a mirror at `home`, on an empty store.
pub(super) fn mirror(bench: &Bench<'_>, home: &Path) -> Outcome<(Running, Client)> {
    for dir in ["run", "mnt", "mirror"] {
        std::fs::create_dir_all(home.join(dir))?;
    }
    drop(Store::open(&home.join("store"), Mode::ReadWrite)?);
    let log = File::create(home.join("run/mirror.log"))?;
    let child = Command::new(bench.program)
        .arg("--home")
        .arg(home)
        .arg("mirror")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    let running = Running(vec![child], Some(home.canonicalize()?));
    let mut client = Client::new(mirror::socket_path(home));
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(error) = client.hello() {
        if Instant::now() > end {
            return Err(format!("the mirror does not answer: {error}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((running, client))
}

pub(super) fn overlay(client: &mut Client, id: u64, size: u64) -> Outcome {
    let below = Below::Zero;
    Ok(client.add_overlay(OverlaySpec { id, vm: "bench".into(), size, block_size: 4096, below })?)
}

/// Runs `fio` for some seconds; bytes a second.
fn fio(bench: &Bench<'_>, target: &[&str], size: u64, load: &[&str]) -> Outcome<f64> {
    let seconds = bench.either("1", "3");
    let size = format!("--size={size}");
    let out = Command::new("fio")
        .args(["--name=bench", "--time_based=1", "--runtime", seconds, "--output-format=json", "--randrepeat=0"])
        .arg(size)
        .args(target)
        .args(load)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("fio (`make setup`): {e}"))?;
    if !out.status.success() {
        return Err(format!("fio {target:?}: {}", String::from_utf8_lossy(&out.stderr).trim()).into());
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let start = text.find('{').ok_or("fio printed no result")?;
    let found: Value = serde_json::from_str(&text[start..])?;
    let job = &found["jobs"][0];
    let bytes = |kind: &str| job[kind]["io_bytes"].as_f64().unwrap_or(0.0);
    let millis = |kind: &str| job[kind]["runtime"].as_f64().unwrap_or(0.0);
    let (bytes, millis) = (bytes("read") + bytes("write"), millis("read") + millis("write"));
    if bytes == 0.0 || millis == 0.0 { Err("fio moved nothing".into()) } else { Ok(bytes / millis * 1e3) }
}

/// Fills a file from end to end, so that every block is there.
fn fill(path: &Path, size: u64) -> Outcome {
    let done = Command::new("fio")
        .args(["--name=fill", "--rw=write", "--bs=1M", "--ioengine=psync", "--end_fsync=1", "--output=/dev/null"])
        .args([format!("--size={size}"), format!("--filename={}", path.display())])
        .stdin(Stdio::null())
        .status()?;
    if done.success() { Ok(()) } else { Err(format!("fio could not fill {}", path.display()).into()) }
}

/// Whether a figure was asked for.
fn is_chosen(name: &str) -> bool {
    let chosen = std::env::var("BENCH_DISKS").unwrap_or_default();
    chosen.is_empty() || chosen.split(',').any(|part| name.starts_with(part))
}

pub(super) fn run(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let dir = bench.fresh("disks")?;
    let size: u64 = bench.either(256 << 20, 2 << 30);
    let rounds = bench.either(1, 5);
    let home = dir.join("home");
    let (running, mut client) = mirror(bench, &home)?;
    overlay(&mut client, DISK, size)?;
    let ours = home.join(format!("mnt/disk/{DISK:016x}"));
    let plain = dir.join("plain");
    fill(&plain, size)?;
    fill(&ours, size)?;

    let mut figures = Vec::new();
    let mut worst: [Vec<f64>; 2] = [vec![f64::INFINITY; rounds], vec![f64::INFINITY; rounds]];
    for (name, load, bar) in LOADS.into_iter().filter(|(name, ..)| is_chosen(&format!("fuse_{name}"))) {
        let (mut ratios, mut peer) = (Vec::new(), Vec::new());
        let depth = ["_d1", "_d32"].iter().position(|depth| name.ends_with(depth));
        for round in 0..rounds {
            let measure = |path: &Path| {
                // The plain file is read past the page cache: nothing of the mirror's may lie in it either.
                drop_caches()?;
                let file = format!("--filename={}", path.display());
                fio(bench, &[&file, "--ioengine=libaio", "--direct=1"], size, load)
            };
            // Whoever comes second has the warmer machine: take turns.
            let (a, b) = if round % 2 == 0 {
                let file = measure(&plain)?;
                (file, measure(&ours)?)
            } else {
                let own = measure(&ours)?;
                (measure(&plain)?, own)
            };
            ratios.push(b / a);
            peer.push(a / 1e6);
            if let Some(least) = depth.and_then(|depth| worst[depth].get_mut(round)) {
                *least = least.min(b / a);
            }
        }
        let figure = Figure::new(&format!("fuse_{name}"), "x", ratios, COMMAND);
        let figure = figure.against("a plain file on ext4, MB/s", median(&peer));
        figures.push(if name.starts_with("seq") { figure.asked(">=", bar) } else { figure });
    }
    for (name, values) in ["fuse_rand_d1", "fuse_rand_d32"].into_iter().zip(worst) {
        figures.extend(worst_of(name, values, 0.6));
    }
    for (name, load, _) in LOADS[..4].iter().filter(|(name, ..)| is_chosen(&format!("fuse_buffered_{name}"))) {
        let buffered = |path: &Path| {
            let file = format!("--filename={}", path.display());
            fio(bench, &[&file, "--ioengine=psync", "--direct=0"], size, load)
        };
        let ratio = buffered(&ours)? / buffered(&plain)?;
        figures.push(Figure::new(&format!("fuse_buffered_{name}"), "x", vec![ratio], COMMAND));
    }
    figures.extend(nbd(bench, &mut client, &dir, &plain, size)?);
    drop(running);
    std::fs::remove_file(&plain)?;
    if is_chosen("mirror_rss_bytes") {
        figures.push(memory(bench, &dir)?);
    }
    Ok(figures)
}

/// The same loads through NBD, beside `qemu-nbd` on the plain file.
fn nbd(bench: &Bench<'_>, client: &mut Client, dir: &Path, plain: &Path, size: u64) -> Outcome<Vec<Figure>> {
    let (ours, theirs) = (dir.join("ours.sock"), dir.join("theirs.sock"));
    client.add_export(ExportSpec {
        name: "disk".into(),
        description: "benchmark".into(),
        socket: ours.clone(),
        source: ExportSource::Overlay(DISK),
        read_only: false,
        ephemeral: false,
    })?;
    let peer = Command::new("qemu-nbd")
        .args(["--persistent", "--shared=8", "--format=raw", "--cache=none", "--aio=native", "--export-name=disk"])
        .arg("--socket")
        .arg(&theirs)
        .arg(plain)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("qemu-nbd (`make setup`): {e}"))?;
    let _peer = Running(vec![peer], None);
    let end = Instant::now() + Duration::from_secs(10);
    while !theirs.exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let rounds = bench.either(1, 5);
    let mut worst = vec![f64::INFINITY; rounds];
    let mut figures = Vec::new();
    for (name, load, _) in LOADS.into_iter().filter(|(name, ..)| is_chosen(&format!("nbd_{name}"))) {
        let (mut ratios, mut peers) = (Vec::new(), Vec::new());
        for (round, worst) in worst.iter_mut().enumerate() {
            let measure = |socket: &Path| {
                drop_caches()?;
                let uri = format!("--uri=nbd+unix:///disk?socket={}", socket.display());
                fio(bench, &["--ioengine=nbd", &uri], size, load)
            };
            let (a, b) = if round % 2 == 0 {
                let peer = measure(&theirs)?;
                (peer, measure(&ours)?)
            } else {
                let own = measure(&ours)?;
                (measure(&theirs)?, own)
            };
            ratios.push(b / a);
            peers.push(a / 1e6);
            *worst = worst.min(b / a);
        }
        let figure = Figure::new(&format!("nbd_{name}"), "x", ratios, COMMAND);
        figures.push(figure.against("qemu-nbd on a raw file, MB/s", median(&peers)));
    }
    figures.extend(worst_of("nbd_over_qemu_nbd", worst, 1.0));
    Ok(figures)
}

/// The worst of several loads, by round; none where none of them was measured.
fn worst_of(name: &str, values: Vec<f64>, bar: f64) -> Option<Figure> {
    values.iter().all(|v| v.is_finite()).then(|| Figure::new(name, "x", values, COMMAND).asked(">=", bar))
}

/// Memory of a mirror that serves a sparse disk of 1 TiB under random reads and writes.
fn memory(bench: &Bench<'_>, dir: &Path) -> Outcome<Figure> {
    let home = dir.join("sparse");
    let (running, mut client) = mirror(bench, &home)?;
    let size = 1 << 40;
    overlay(&mut client, SPARSE, size)?;
    let file = format!("--filename={}", home.join(format!("mnt/disk/{SPARSE:016x}")).display());
    let target = [file.as_str(), "--ioengine=libaio", "--direct=1"];
    fio(bench, &target, size, &["--rw=randwrite", "--bs=4k", "--iodepth=32"])?;
    for _ in 0..bench.either(1, 5) {
        fio(bench, &target, size, &["--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap=1"])?;
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.0[0].id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(Figure::new("mirror_rss_bytes", "B", vec![kib * 1024.0], COMMAND).asked("<=", 2e8))
}
