//! `kill -9` of our own processes, at any point of what they do: guests go on, no byte of theirs is wrong, and the
//! next command finds everything in order or puts it so.
//!
//! Points are drawn from a seed, which is printed; `OFFSHOOT_TEST_SEED` repeats a run as far as time repeats.

use crate::common;

use api::{ForkReply, ForkRequest, From, RunRequest, SnapshotRequest, Vm, VmState};
use bench::Outcome;
use bench::guest::Guest;
use bench::host::free_ports;
use common::{MINUTES, TestHost, console_ready, eventually, host, kill, mounts, processes};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmm::qmp::Qmp;

/// Memory of the guest.
const MEMORY: u64 = 256 << 20;
/// Bytes in its redis.
const LOAD: u64 = 64 << 20;
const NONCE: &str = "before-any-kill";

/// One test at a time: two cores carry one family of guests.
static TURN: Mutex<()> = Mutex::new(());

/// Repetitions: as given, or six times that in the long tier.
fn rounds(fast: u32) -> u32 {
    if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { fast * 6 } else { fast }
}

/// Numbers from a seed (Marsaglia's xorshift).
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let given = std::env::var("OFFSHOOT_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_millis() as u64);
        let seed = given.unwrap_or(now) | 1;
        println!("OFFSHOOT_TEST_SEED={seed}");
        Self(seed)
    }

    /// A number in `0.0..1.0`.
    fn share(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A point in the `part`th of `parts` equal parts of `span`.
    fn within(&mut self, span: Duration, part: u32, parts: u32) -> Duration {
        span.mul_f64((f64::from(part) + self.share()) / f64::from(parts))
    }
}

/// A home with one guest, whose data is known.
struct Scene {
    host: TestHost,
    web: Guest,
    digest: String,
    mounts: Vec<PathBuf>,
    /// Ports that forks and starts of this file publish.
    base: u16,
}

impl Scene {
    fn new(name: &str) -> Outcome<Self> {
        let host = host(name);
        let web = host.booted("web", MEMORY)?;
        console_ready(&host, &web)?;
        web.load(LOAD, NONCE)?;
        let digest = digest(&web)?;
        let mounts = mounts(&host.home);
        let base = free_ports(16)?;
        Ok(Self { host, web, digest, mounts, base })
    }

    fn vms(&self) -> Outcome<Vec<Vm>> {
        // The command line, not the client: it is what starts a daemon.
        Ok(serde_json::from_str(&self.host.command(&["ps", "--json"])?)?)
    }

    fn fork_request(&self, count: u32) -> ForkRequest {
        ForkRequest { count, name_prefix: None, publish_base: Some(self.base) }
    }

    fn fork(&self, count: u32) -> Outcome<Vec<Guest>> {
        let reply: ForkReply = self.host.client.post_long("/v1/vms/web/fork", &self.fork_request(count), |_| {})?;
        assert!(reply.failed.is_empty(), "{:?}", reply.failed);
        reply.offshoots.iter().map(|o| Guest::of(&o.name, &o.publish)).collect()
    }

    /// Runs `work` and kills the daemon `delay` after its begin; says whether `work` had ended well before.
    fn killed(&self, delay: Duration, work: impl FnOnce() -> Outcome + Send) -> Outcome<bool> {
        let daemon = self.host.daemon_pid()?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(work);
            std::thread::sleep(delay);
            kill(daemon);
            Ok(worker.join().expect("the request does not panic").is_ok())
        })
    }

    /// The parent goes on without a daemon, unless it was killed within the pause, which the next one ends.
    fn goes_on_alone(&self) -> Outcome {
        if self.web.await_response(Some(NONCE), Duration::from_secs(5)).is_ok() {
            return Ok(());
        }
        let dirs = std::fs::read_dir(self.host.home.join("vms"))?.flatten();
        let first = dirs.map(|d| d.path()).min().ok_or("no VM has a directory")?;
        let state = Qmp::connect(&first.join("qmp.sock"), || {})?.execute("query-status", serde_json::json!({}))?;
        println!("  web does not answer; its hypervisor says {state}");
        assert_ne!(state["status"], "running", "a running guest must answer");
        Ok(())
    }

    /// What holds after a new daemon has taken over: nothing half done, nobody nameless, the parent as it was.
    /// Returns the VMs that there are.
    fn in_order(&self) -> Outcome<Vec<Vm>> {
        let vms = self.vms()?;
        for vm in &vms {
            assert_eq!(vm.state, VmState::Running, "{} is {}: {:?}", vm.name, vm.state, vm.detail);
        }
        self.web.await_response(Some(NONCE), MINUTES)?;
        assert_eq!(mounts(&self.host.home), self.mounts, "mounts");
        let named: BTreeSet<u32> = vms.iter().filter_map(|vm| vm.pid).collect();
        let running = processes(&self.host.home);
        let of =
            |name: &str| running.iter().filter(|p| p.name.starts_with(name)).map(|p| p.pid).collect::<BTreeSet<u32>>();
        assert_eq!(of("qemu"), named, "hypervisors, and those that ps shows");
        assert_eq!(of("passt").len(), vms.len(), "one network helper for each VM: {running:?}");
        let ids: BTreeSet<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let dirs = std::fs::read_dir(self.host.home.join("vms"))?.flatten();
        assert_eq!(
            dirs.map(|d| d.file_name().to_string_lossy().into_owned()).collect::<BTreeSet<_>>(),
            ids,
            "directories of VMs"
        );
        Ok(vms)
    }

    /// Waits until everything frozen is in the store: no holder is left, and no file of one.
    fn settled(&self) -> Outcome {
        eventually("everything frozen is in the store", || {
            let files = std::fs::read_dir(self.host.home.join("pending"))?.count();
            let holders = processes(&self.host.home).iter().filter(|p| p.name == base::resident::HOLDER_COMM).count();
            Ok(files == 0 && holders == 0)
        })
    }

    /// Checks the offshoots and removes them.
    fn check_and_remove(&self, vms: &[Vm]) -> Outcome {
        for vm in vms.iter().filter(|vm| vm.name != "web") {
            if vm.parent.as_deref().is_some_and(|p| p.starts_with("web")) {
                let guest = Guest::of(&vm.name, &vm.publish)?;
                guest.await_response(Some(NONCE), MINUTES)?;
            }
            self.host.remove(&vm.name)?;
        }
        Ok(())
    }

    /// The store has no fault, and a fork works, under the names that the killed one was to use, with right contents.
    fn works(&self) -> Outcome {
        let said = self.host.command(&["verify"])?;
        assert!(said.contains(" 0 faults"), "{said}");
        let children = self.fork(1)?;
        assert_eq!(children[0].name, "web-1");
        children[0].await_response(Some(NONCE), MINUTES)?;
        assert_eq!(digest(&children[0])?, self.digest, "the data of a fork");
        children[0].set("probe", "child")?;
        assert_eq!(self.web.get("probe")?, None, "what a fork writes");
        self.host.remove("web-1")
    }

    fn snapshots(&self) -> Outcome<Vec<String>> {
        let list: Vec<api::Snapshot> = self.host.client.get("/v1/snapshots")?;
        Ok(list.into_iter().map(|s| s.name).collect())
    }
}

/// A checksum over all keys, made within the guest: every page of them is touched.
fn digest(guest: &Guest) -> Outcome<String> {
    const SCRIPT: &str = "local h = '' \
        for i = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do h = redis.sha1hex(h .. redis.call('GET', 'load:' .. i)) end \
        return h";
    let keys = LOAD / (16 << 10);
    let parts = (0..keys).step_by(256).map(|from| {
        let (from, to) = (from.to_string(), (from + 256).min(keys).to_string());
        Ok(guest.eval(SCRIPT, &[&from, &to])?.unwrap_or_default())
    });
    Ok(parts.collect::<Outcome<Vec<_>>>()?.concat())
}

#[test]
fn a_daemon_killed_at_any_point_leaves_guests_running_and_nothing_half_done() -> Outcome {
    let _turn = TURN.lock();
    let mut random = Random::seeded();
    let scene = Scene::new("kd")?;
    forks(&scene, &mut random)?;
    snapshots(&scene, &mut random)?;
    starts(&scene, &mut random)
}

fn forks(scene: &Scene, random: &mut Random) -> Outcome {
    // The first fork of a VM takes longer than those that are killed below.
    scene.fork(2)?;
    scene.settled()?;
    scene.check_and_remove(&scene.vms()?)?;
    let began = Instant::now();
    scene.fork(2)?;
    let forked = began.elapsed();
    scene.settled()?;
    let stored = began.elapsed();
    scene.check_and_remove(&scene.vms()?)?;
    println!("a fork of two takes {forked:?}, until it is stored {stored:?}");
    let (during, after) = (rounds(6), rounds(3));
    for round in 0..during + after {
        let delay = if round < during {
            random.within(forked.mul_f64(1.1), round, during)
        } else {
            forked + random.within(stored.saturating_sub(forked), round - during, after)
        };
        let ended = scene.killed(delay, || scene.fork(2).map(drop))?;
        scene.goes_on_alone()?;
        let vms = scene.in_order()?;
        println!(
            "fork, killed after {delay:?}: {} offshoots, reply {}",
            vms.len() - 1,
            if ended { "came" } else { "lost" }
        );
        assert!(!ended || vms.len() == 3, "offshoots that were reported are there: {vms:?}");
        scene.check_and_remove(&vms)?;
        scene.settled()?;
        if round % 5 == 4 {
            scene.works()?;
        }
    }
    scene.works()
}

fn snapshots(scene: &Scene, random: &mut Random) -> Outcome {
    let take = |tag: String| -> Outcome {
        let request = SnapshotRequest { tag: Some(tag) };
        scene.host.client.post_long::<api::Snapshot>("/v1/vms/web/snapshot", &request, |_| {})?;
        Ok(())
    };
    let began = Instant::now();
    take("whole".into())?;
    let span = began.elapsed();
    println!("a snapshot takes {span:?}");
    let count = rounds(3);
    for round in 0..count {
        let tag = format!("k{round}");
        let delay = random.within(span, round, count);
        let ended = scene.killed(delay, || take(tag.clone()))?;
        scene.goes_on_alone()?;
        scene.in_order()?;
        scene.settled()?;
        let there = scene.snapshots()?.contains(&format!("web@{tag}"));
        println!("snapshot, killed after {delay:?}: {}", if there { "taken" } else { "not taken" });
        assert!(there || !ended, "a snapshot that was reported is there");
        // Taken as a whole or not at all: then its tag is free.
        if !there {
            take(tag)?;
        }
    }
    scene.works()?;
    let last = scene.host.restore("back", &format!("web@k{}", count - 1))?;
    last.await_response(Some(NONCE), MINUTES)?;
    assert_eq!(digest(&last)?, scene.digest, "a VM from a snapshot taken amid kills");
    scene.host.remove("back")
}

fn starts(scene: &Scene, random: &mut Random) -> Outcome {
    let run = |from: From| -> Outcome {
        let publish = vec![format!("{}:80", scene.base), format!("{}:6379", scene.base + 1)];
        let (memory_bytes, cpus, accelerator, append) = (None, None, None, None);
        let request = RunRequest {
            name: Some("next".into()),
            from,
            memory_bytes,
            cpus,
            publish,
            accelerator,
            append,
            prefetch: None,
            eager: None,
            learn: None,
        };
        scene.host.client.post::<Vm>("/v1/vms", &request)?;
        Ok(())
    };
    for (what, from) in [("boot", From::Image("debian".into())), ("restore", From::Snapshot("web@whole".into()))] {
        let began = Instant::now();
        run(from.clone())?;
        let span = began.elapsed();
        scene.host.remove("next")?;
        println!("a {what} takes {span:?}");
        let count = rounds(2);
        for round in 0..count {
            let delay = random.within(span.mul_f64(1.1), round, count);
            let ended = scene.killed(delay, || run(from.clone()))?;
            scene.goes_on_alone()?;
            let vms = scene.in_order()?;
            println!(
                "{what}, killed after {delay:?}: {} VMs, reply {}",
                vms.len(),
                if ended { "came" } else { "lost" }
            );
            assert!(!ended || vms.len() == 2, "a VM that was reported is there");
            scene.check_and_remove(&vms)?;
            // The name is free again.
            run(from.clone())?;
            scene.host.remove("next")?;
        }
    }
    scene.works()
}

/// Reads all of a guest's data and writes to its disk, until it is told to end; everything is checked.
fn load(scene: &Scene, guest: &Guest, end: &AtomicBool) -> Outcome<(u32, u32)> {
    std::thread::scope(|scope| {
        let redis = scope.spawn(|| -> Outcome<u32> {
            let mut times = 0;
            while times == 0 || !end.load(Ordering::Acquire) {
                assert_eq!(digest(guest)?, scene.digest, "data of {} while the mirror dies", guest.name);
                times += 1;
            }
            Ok(times)
        });
        let disk = scope.spawn(|| -> Outcome<u32> {
            let mut times = 0;
            while times == 0 || !end.load(Ordering::Acquire) {
                // Written and made durable, then read past the page cache; and what the image has, read likewise.
                let command = format!(
                    "head -c 6000000 /dev/urandom > /dev/shm/f; cp /dev/shm/f /root/f{times}; sync; \
                     echo 3 > /proc/sys/vm/drop_caches; \
                     cmp /dev/shm/f /root/f{times} && echo same; md5sum < /usr/bin/redis-check-rdb; rm /root/f{times}"
                );
                let said = guest.shell(&scene.host.client, &command, MINUTES)?;
                let mut lines = said.lines();
                assert_eq!(lines.next(), Some("same"), "what {} wrote: {said}", guest.name);
                let sum = lines.next().unwrap_or_default().to_owned();
                assert_eq!(sum, scene.web.get("sum")?.unwrap_or_default(), "a file of {}", guest.name);
                times += 1;
            }
            Ok(times)
        });
        Ok((redis.join().expect("checks hold")?, disk.join().expect("checks hold")?))
    })
}

#[test]
fn a_mirror_killed_under_load_costs_no_guest_and_no_byte() -> Outcome {
    let _turn = TURN.lock();
    let mut random = Random::seeded();
    let scene = Scene::new("km")?;
    let sum = scene.web.shell(&scene.host.client, "md5sum < /usr/bin/redis-check-rdb", MINUTES)?;
    scene.web.set("sum", &sum)?;
    for round in 0..rounds(3) {
        // Fresh offshoots each time: theirs are the pages that fault.
        let guests = scene.fork(2)?;
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| -> Outcome {
            let loads: Vec<_> = guests.iter().map(|g| scope.spawn(|| load(&scene, g, &end))).collect();
            for _ in 0..2 {
                let delay = random.within(Duration::from_secs(2), 0, 1);
                std::thread::sleep(delay);
                let before = scene.host.mirror_pid()?;
                kill(before);
                eventually("a new mirror answers", || Ok(scene.host.mirror_pid().is_ok_and(|pid| pid != before)))?;
                println!("round {round}: mirror {before} killed after {delay:?}");
            }
            end.store(true, Ordering::Release);
            for load in loads {
                let (reads, writes) = load.join().expect("checks hold")?;
                println!("round {round}: {reads} reads of all, {writes} writes");
            }
            Ok(())
        })?;
        let vms = scene.in_order()?;
        assert_eq!(vms.len(), 3, "no guest died");
        scene.check_and_remove(&vms)?;
    }
    scene.settled()?;
    scene.works()?;
    all_at_once(&scene, &mut random)
}

/// Daemon and mirror at once, under load and within a fork: what remains is hypervisors, their helpers and holders.
fn all_at_once(scene: &Scene, random: &mut Random) -> Outcome {
    for round in 0..rounds(2) {
        let guests = scene.fork(1)?;
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| -> Outcome {
            // The console goes through the daemon and dies with it, so the load is redis' alone.
            let load = scope.spawn(|| -> Outcome {
                while !end.load(Ordering::Acquire) {
                    assert_eq!(digest(&guests[0])?, scene.digest, "data of {}", guests[0].name);
                }
                Ok(())
            });
            let (daemon, mirror) = (scene.host.daemon_pid()?, scene.host.mirror_pid()?);
            let forking = scope.spawn(|| {
                let request = ForkRequest { publish_base: None, ..scene.fork_request(2) };
                let _ = scene.host.client.post_long::<ForkReply>("/v1/vms/web/fork", &request, |_| {});
            });
            let delay = random.within(Duration::from_millis(900), round, rounds(2));
            std::thread::sleep(delay);
            kill(daemon);
            kill(mirror);
            forking.join().expect("the request does not panic");
            let vms = scene.in_order()?;
            println!("round {round}: all killed after {delay:?}; {} VMs", vms.len());
            assert!(vms.iter().any(|vm| vm.name == guests[0].name), "the offshoot under load lives");
            end.store(true, Ordering::Release);
            load.join().expect("checks hold")
        })?;
        // Those that the killed fork had started have no ports: their consoles show that they live.
        let names: Vec<String> = scene.vms()?.into_iter().map(|vm| vm.name).filter(|n| n != "web").collect();
        for name in &names {
            let guest = Guest { name: name.clone(), ..guests[0].clone() };
            assert_eq!(
                guest.shell(&scene.host.client, "redis-cli get nonce", MINUTES)?,
                format!("\"{NONCE}\""),
                "{name}"
            );
            scene.host.remove(name)?;
        }
        scene.settled()?;
    }
    scene.works()
}
