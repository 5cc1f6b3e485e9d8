//! Sixteen instances deploy one image at once, from one S3 server, each behind a link of 1 Gbit/s.
//!
//! A node has its services running and nothing of the image. From the command on until the last request of a boot's
//! recorded trace is answered is its *boot*; until everything that the image holds was read once, its *full read*.
//! An image is deployed many times: what is measured of Offshoot is a deployment after an earlier one, which taught the
//! store what a boot reads; the first ones, of which nobody knows anything, are measured besides. What is measured
//! teaches nothing: it is to be the same each time, and it reads the whole disk.
//! The trace is replayed without the guest's own time between requests, so that only the disk is measured. Nodes,
//! origin and clients share this machine's processors: [`Round`] says how busy they and the origin's link were.

pub(crate) mod net;
mod replay;
pub(crate) mod server;
mod system;
mod trace;

use super::{Bench, COMMAND, drop_caches, unmount_below};
use crate::report::{Figure, median};
use crate::{Failure, Outcome};
use net::{Network, Place, RATE};
use serde::Serialize;
use server::{Files, IMAGE, Server};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use system::Node;
pub(super) use system::System;
use trace::Trace;

/// Instances that deploy at once for the figures.
const INSTANCES: usize = 16;
/// Environment: where it is there, only boots are measured, and of the copies only the common one.
const BOOT_ALONE: &str = "BENCH_BOOT";
/// How long what a deployment taught may take to be known.
const TEACH: Duration = Duration::from_secs(30);
/// Bytes of one read of those that read everything.
const PIECE: u64 = 1 << 20;

/// One deployment by some instances at once.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Round {
    pub(super) system: &'static str,
    pub(super) instances: usize,
    /// Seconds until each had booted.
    pub(super) boot_s: Vec<f64>,
    /// Seconds until each had read everything; all had booted before one began to read.
    pub(super) full_s: Vec<f64>,
    /// Bytes that had left the origin when all had booted.
    pub(super) boot_origin_bytes: u64,
    /// Bytes that had left the origin at the end.
    pub(super) full_origin_bytes: u64,
    /// How busy the processors were until all had booted, of one.
    pub(super) boot_busy: f64,
    /// Processor time that the origin's servers took of that, of one.
    pub(super) boot_busy_origin: f64,
    /// How busy the origin's link was until all had booted, of one.
    pub(super) boot_link: f64,
}

impl Round {
    /// Seconds until the last had booted.
    pub(super) fn boot(&self) -> f64 {
        self.boot_s.iter().copied().fold(0.0, f64::max)
    }

    /// Seconds until the last had read everything.
    pub(super) fn full(&self) -> f64 {
        self.full_s.iter().copied().fold(0.0, f64::max)
    }
}

/// Everything that rounds need: the network, the origin, the trace.
pub(super) struct World<'a> {
    bench: &'a Bench<'a>,
    dir: PathBuf,
    files: Files,
    boot: Trace,
    whole: Trace,
    /// Whether everything is read behind a boot.
    full: bool,
    // In this order: servers end before the network goes.
    server: Server,
    network: Network,
}

impl<'a> World<'a> {
    pub(super) fn new(bench: &'a Bench<'a>, nodes: usize) -> Outcome<Self> {
        // First, so that what an earlier run left is gone before its files are.
        let network = Network::up(nodes)?;
        let dir = bench.fresh("deploy")?;
        let files = Files::of_default_guest(bench.program, &dir)?;
        let boot = boot_trace(&files, &dir, bench)?;
        let data = trace::data_ranges(&File::open(&files.disk)?)?;
        let whole = Trace::whole(&data, PIECE);
        let content = whole.bytes_read();
        println!("image: {} MiB of data in {} MiB", content >> 20, files.disk.metadata()?.len() >> 20);
        println!(
            "boot: {} requests, {:.1} MiB read, {:.1} MiB written, each counted once",
            boot.requests(),
            boot.bytes_read() as f64 / 1048576.0,
            boot.bytes_written() as f64 / 1048576.0
        );
        let server = Server::start(&network, bench.program, &files.guest(), &dir)?;
        let full = std::env::var_os(BOOT_ALONE).is_none();
        let world = Self { bench, dir, files, boot, whole, full, server, network };
        // Once with an eye on every byte, out of the measurement.
        for system in [System::OffshootFirst, System::CopyQcow2, System::CopyRaw, System::QemuNbd] {
            world.round(system, 1, true)?;
        }
        Ok(world)
    }

    /// Deploys and boots the image once, as somebody does in every fleet: from then on the store knows what a boot
    /// reads, and has laid it down in that order.
    pub(super) fn teach(&self) -> Outcome {
        let node = self.node(0)?;
        let taught = node.prepare(System::Offshoot).and_then(|()| {
            let served = node.deploy(System::Offshoot, true)?;
            replay::replay(&served.socket, IMAGE, &self.boot, None)?;
            node.offshoot(&["nbd", "stop", IMAGE, "--discard"])?;
            // What was read is added behind the answer; the order that is asked for here is made then in any case.
            let until = Instant::now() + TEACH;
            loop {
                match node.offshoot(&["image", "arrange", IMAGE, "--json"]) {
                    Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(100)),
                    done => break done,
                }
            }
        });
        self.leave(&node);
        println!("taught: {}", taught?.trim());
        self.round(System::Offshoot, 1, true).map(drop)
    }

    fn leave(&self, node: &Node<'_>) {
        self.network.clear(node.place);
        unmount_below(&node.dir);
        let _ = std::fs::remove_dir_all(&node.dir);
    }

    /// Deploys by one system on so many instances at once; `checked` compares what is read with the image.
    pub(super) fn round(&self, system: System, instances: usize, checked: bool) -> Outcome<Round> {
        let nodes = (0..instances).map(|n| self.node(n)).collect::<Outcome<Vec<_>>>()?;
        let done = self.measured(system, &nodes, checked);
        nodes.iter().for_each(|node| self.leave(node));
        let round = done.map_err(|error| Failure::from(format!("{}: {error}", system.name())))?;
        println!(
            "{:>2} x {:<24} boot {:6.2} s, full read {:6.2} s; origin sent {:4} MiB, {:4} MiB; processors {:3.0} % busy \
             ({:.0} % origin), link {:3.0} %",
            instances,
            system.name(),
            round.boot(),
            round.full(),
            round.boot_origin_bytes >> 20,
            round.full_origin_bytes >> 20,
            round.boot_busy * 1e2,
            round.boot_busy_origin * 1e2,
            round.boot_link * 1e2
        );
        Ok(round)
    }

    fn node(&self, number: usize) -> Outcome<Node<'_>> {
        let dir = self.dir.join(format!("n{number:02}"));
        std::fs::create_dir_all(&dir)?;
        Ok(Node { network: &self.network, program: self.bench.program, place: Place::Node(number), dir })
    }

    fn measured(&self, system: System, nodes: &[Node<'_>], checked: bool) -> Outcome<Round> {
        for node in nodes {
            node.prepare(system)?;
        }
        let reference = File::open(&self.files.disk)?;
        let reference = checked.then_some(&reference);
        drop_caches()?;
        let step = Barrier::new(nodes.len() + 1);
        let times = || -> Outcome<_> { Ok((self.network.left_origin()?, Load::now(&self.server)?)) };
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                nodes.iter().map(|node| scope.spawn(|| self.instance(system, node, reference, &step))).collect();
            let (sent, before) = match times() {
                Ok(found) => found,
                Err(error) => {
                    // Whoever waits must not wait for ever.
                    for _ in 0..3 {
                        step.wait();
                    }
                    return Err(error);
                }
            };
            step.wait();
            let began = Instant::now();
            step.wait();
            let took = began.elapsed().as_secs_f64();
            let booted = times();
            step.wait();
            let each = threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Outcome<Vec<_>>>();
            let (each, (sent_boot, after), sent_full) = (each?, booted?, self.network.left_origin()?);
            Ok(Round {
                system: system.name(),
                instances: nodes.len(),
                boot_s: each.iter().map(|(boot, _)| *boot).collect(),
                full_s: each.iter().map(|(_, full)| *full).collect(),
                boot_origin_bytes: sent_boot - sent,
                full_origin_bytes: sent_full - sent,
                boot_busy: (after.busy_s - before.busy_s) / took / after.processors,
                boot_busy_origin: (after.origin_s - before.origin_s) / took / after.processors,
                boot_link: (sent_boot - sent) as f64 * 8.0 / took / RATE,
            })
        })
    }

    /// What one instance does: seconds until it had booted, and until it had read everything.
    fn instance(&self, system: System, node: &Node<'_>, check: Option<&File>, step: &Barrier) -> Outcome<(f64, f64)> {
        step.wait();
        let began = Instant::now();
        let booted = node.deploy(system, false).and_then(|served| {
            replay::replay(&served.socket, IMAGE, &self.boot, check)?;
            Ok((served, began.elapsed().as_secs_f64()))
        });
        step.wait();
        step.wait();
        let (served, boot) = booted?;
        if self.full {
            // What the boot wrote reads otherwise than the image: that was checked as it booted.
            replay::replay(&served.socket, IMAGE, &self.whole, None)?;
        }
        Ok((boot, began.elapsed().as_secs_f64()))
    }
}

/// The trace of a boot of this disk: recorded once, and kept with the guest.
fn boot_trace(files: &Files, dir: &Path, bench: &Bench<'_>) -> Outcome<Trace> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(files.cmdline.as_bytes());
    for path in [&files.disk, &files.kernel, &files.initrd] {
        hasher.update_reader(File::open(path)?)?;
    }
    let cache = std::env::var_os("OFFSHOOT_CACHE").map_or_else(|| bench.dir.with_file_name("guest"), PathBuf::from);
    let path = cache.join(format!("boot-{}.trace", &hasher.finalize().to_hex()[..16]));
    if let Ok(log) = std::fs::read_to_string(&path) {
        return Trace::parse(&log);
    }
    println!("recording what a boot asks of its disk");
    let log = trace::record(&files.guest(), dir)?;
    let trace = Trace::parse(&log)?;
    std::fs::create_dir_all(&cache)?;
    let new = path.with_extension("new");
    std::fs::write(&new, log)?;
    std::fs::rename(&new, &path)?;
    Ok(trace)
}

/// Processor time that was used up to now.
struct Load {
    busy_s: f64,
    origin_s: f64,
    processors: f64,
}

impl Load {
    fn now(server: &Server) -> Outcome<Self> {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let stat = std::fs::read_to_string("/proc/stat")?;
        let all: Vec<f64> =
            stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
        if all.len() < 8 {
            return Err("/proc/stat does not tell how busy the processors were".into());
        }
        // user nice system idle iowait irq softirq steal: waiting is not work.
        let busy = all[..8].iter().sum::<f64>() - all[3] - all[4];
        let of = |pid: u32| -> Outcome<f64> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
            Ok(fields.get(11..13).ok_or("/proc/PID/stat is short")?.iter().filter_map(|n| n.parse::<f64>().ok()).sum())
        };
        let origin = of(server.s3_pid())? + of(server.nbd_pid())?;
        let processors = std::thread::available_parallelism()?.get() as f64;
        Ok(Self { busy_s: busy / ticks, origin_s: origin / ticks, processors })
    }
}

/// The figures: sixteen instances at once.
pub(super) fn run(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let instances = bench.either(4, INSTANCES);
    let world = World::new(bench, instances)?;
    let mut rounds: Vec<Round> = Vec::new();
    for _ in 0..bench.either(1, 3) {
        rounds.push(world.round(System::OffshootFirst, instances, false)?);
    }
    world.teach()?;
    let boots = [System::Offshoot, System::CopyQcow2, System::QemuNbd];
    let systems = if world.full { &System::ALL[..] } else { &boots[..] };
    for _ in 0..bench.either(1, 3) {
        for &system in systems {
            rounds.push(world.round(system, instances, false)?);
        }
    }
    save(bench, "deploy", &rounds)?;
    let of = |system: System, value: fn(&Round) -> f64| -> Vec<f64> {
        rounds.iter().filter(|round| round.system == system.name()).map(value).collect()
    };
    // The better of two ways to copy.
    let copy = |value: fn(&Round) -> f64| {
        let (qcow2, raw) = (of(System::CopyQcow2, value), of(System::CopyRaw, value));
        if raw.is_empty() || median(&qcow2) <= median(&raw) {
            (System::CopyQcow2, qcow2)
        } else {
            (System::CopyRaw, raw)
        }
    };
    let ratio_of = |system: System, peer: &[f64], value: fn(&Round) -> f64| -> Vec<f64> {
        peer.iter().zip(of(system, value)).map(|(peer, ours)| peer / ours).collect()
    };
    let ratio = |peer: &[f64], value: fn(&Round) -> f64| ratio_of(System::Offshoot, peer, value);
    let peer = |system: System| format!("{}, s", system.name());
    let (boot_copy, boot) = copy(Round::boot);
    let (full_copy, full) = copy(Round::full);
    let nbd = of(System::QemuNbd, Round::boot);
    let read = world.boot.bytes_read() as f64;
    let copies = of(System::Offshoot, |round| round.boot_origin_bytes as f64).into_iter().map(|b| b / read).collect();
    let nbd_copies: Vec<f64> =
        of(System::QemuNbd, |round| round.boot_origin_bytes as f64).into_iter().map(|b| b / read).collect();
    let figure = |name: &str, unit: &str, runs: Vec<f64>| Figure::new(name, unit, runs, COMMAND);
    let mut figures = vec![
        figure("deploy_boot_speedup", "x", ratio(&boot, Round::boot))
            .asked(">=", 5.0)
            .against(&peer(boot_copy), median(&boot)),
        figure("deploy_first_boot_speedup", "x", ratio_of(System::OffshootFirst, &boot, Round::boot))
            .against(&peer(boot_copy), median(&boot)),
        figure("deploy_vs_qemu_nbd", "x", ratio(&nbd, Round::boot)).against(&peer(System::QemuNbd), median(&nbd)),
        figure("deploy_origin_copies", "x", copies)
            .asked("<=", 16.0)
            .against("qemu-nbd, qcow2 overlay", median(&nbd_copies)),
        figure("deploy_boot_s", "s", of(System::Offshoot, Round::boot)),
        figure("deploy_first_boot_s", "s", of(System::OffshootFirst, Round::boot)),
    ];
    if world.full {
        figures.extend([
            figure("deploy_full_read", "x", ratio(&full, Round::full)).against(&peer(full_copy), median(&full)),
            figure("deploy_full_s", "s", of(System::Offshoot, Round::full)),
        ]);
    }
    Ok(figures)
}

/// Keeps raw measurements beside the figures.
pub(super) fn save(bench: &Bench<'_>, name: &str, found: &impl Serialize) -> Outcome {
    let dir = bench.dir.with_file_name("bench");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(found)?)?;
    Ok(())
}
