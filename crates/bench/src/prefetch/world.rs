//! What is measured in: an origin behind a long line, a node that knows nothing, a guest with servers.
//!
//! Origin and node are network namespaces of this machine, each behind a link of 1 Gbit/s; the node's store is the
//! origin's S3 server over a [`Line`]. One guest runs all three servers and the programs, warm; each has a snapshot of
//! its own, and thereby a profile of its own.

use super::line::{FAR, Line};
use super::servers::{FILES, Server, Session, Set, Work, fill_postgres, fill_redis, get};
use crate::guest::Guest;
use crate::host::{Host, free_ports};
use crate::stores::deploy::net::{Network, Place};
use crate::stores::deploy::server::{BUCKET, KEY_ID, S3_PORT, SECRET, finish, signed, url, weed};
use crate::stores::unmount_below;
use crate::{Failure, Outcome};
use api::{From, RunRequest, Snapshot, SnapshotRequest, Vm};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of RAM of the guest, and of one with more servers.
const MEMORY: u64 = 512 << 20;
const MEMORY_FULL: u64 = 768 << 20;
const LINE_PORT: u16 = 8334;
const PREFIX: &str = "fleet";
/// The VM whose snapshots are the templates.
const TEMPLATE: &str = "shop";
/// The tag that the programs start from.
pub(super) const PROGRAMS: &str = "programs";
/// Longest that a guest boots.
const BOOT: Duration = Duration::from_secs(900);

const PREPARE: &str = include_str!("../../../node/src/image/recipe/prepare.sh");
const CUSTOMIZE: &str = include_str!("../../../node/src/image/recipe/customize.sh");
/// Files from which the guest is built.
const RECIPE: [(&str, &str); 8] = [
    ("prepare.sh", PREPARE),
    ("customize.sh", CUSTOMIZE),
    ("build.sh", include_str!("guest/build.sh")),
    ("servers.sh", include_str!("guest/servers.sh")),
    ("app.py", include_str!("guest/app.py")),
    ("Shop.java", include_str!("guest/Shop.java")),
    ("programs.sh", include_str!("guest/programs.sh")),
    ("chase.c", include_str!("guest/chase.c")),
];
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 rootflags=noatime";

/// Everything that runs need.
pub(super) struct World {
    program: PathBuf,
    dir: PathBuf,
    /// Short and few.
    pub(super) quick: bool,
    /// Those of the guest.
    pub(super) servers: &'static [Server],
    /// Repetitions of what is repeated.
    pub(super) rounds: u64,
    /// Where raw measurements go.
    pub(super) raw: PathBuf,
    /// Where templates are kept.
    kept: Option<PathBuf>,
    // In this order: servers end before the network goes.
    line: Option<Line>,
    weed: Child,
    pub(super) network: Network,
}

impl Drop for World {
    fn drop(&mut self) {
        self.network.clear(Place::Node(0));
        let _ = self.weed.kill();
        let _ = self.weed.wait();
        unmount_below(&self.dir);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A node: its daemon and mirror run. They end with it, and nothing is left.
pub(super) struct Node<'a> {
    pub(super) world: &'a World,
    pub(super) host: Host,
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.host.close() {
            eprintln!("{error}");
        }
        self.world.network.clear(Place::Node(0));
        unmount_below(&self.host.home);
        let _ = std::fs::remove_dir_all(&self.host.home);
    }
}

/// An access profile, as it lies in the store.
#[derive(Clone)]
pub(super) struct Profile(Vec<u8>);

impl World {
    /// Sets all up and makes the templates of these servers; files go to `dir`.
    pub(super) fn new(program: &Path, dir: &Path, raw: &Path, servers: &'static [Server]) -> Outcome<Self> {
        let asked = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty() && v != "0");
        let rounds = asked("BENCH_ROUNDS").and_then(|n| n.parse().ok()).unwrap_or(1);
        // First, so that what an earlier run left is gone before its files are.
        let network = Network::up(1)?;
        unmount_below(dir);
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir)?;
        for place in [Place::Origin, Place::Node(0)] {
            network.default_route(place)?;
        }
        // Templates take minutes: a directory named for it keeps them, as they are before anybody has learnt, for the
        // next run.
        let origin = dir.join("origin");
        let kept = std::env::var_os("BENCH_TEMPLATES").map(PathBuf::from);
        let kept = kept.map(|kept| if is_full(servers) { kept.join("full") } else { kept });
        let complete = kept.as_ref().map(|kept| kept.join("complete"));
        let are_kept = complete.as_ref().is_some_and(|complete| complete.exists());
        match &kept {
            Some(kept) if are_kept => copy_tree(&kept.join("origin"), &origin)?,
            _ => std::fs::create_dir_all(&origin)?,
        }
        let server = weed(&network, &origin)?;
        let line = Some(Line::start(&network, LINE_PORT, S3_PORT, FAR)?);
        let (quick, raw) = (asked("BENCH_QUICK").is_some(), raw.to_owned());
        let (program, dir) = (program.to_owned(), dir.to_owned());
        let mut world = Self { program, dir, quick, servers, rounds, raw, kept: None, line, weed: server, network };
        if !are_kept {
            let guest = world.build()?;
            let began = Instant::now();
            world.network.within(Place::Origin, || world.make_templates(&guest))?;
            println!("templates made in {:.0} s", began.elapsed().as_secs_f64());
        }
        if let (Some(kept), Some(complete), false) = (&kept, complete, are_kept) {
            let _ = std::fs::remove_dir_all(kept);
            std::fs::create_dir_all(kept)?;
            world.without_server(|| copy_tree(&origin, &kept.join("origin")))?;
            std::fs::write(complete, "")?;
        }
        world.kept = kept;
        Ok(world)
    }

    /// Those of the servers that `BENCH_SERVERS` names.
    pub(super) fn chosen(&self) -> Vec<Server> {
        self.servers.iter().copied().filter(|server| super::is_chosen("SERVERS", server.name())).collect()
    }

    pub(super) fn is_full(&self) -> bool {
        is_full(self.servers)
    }

    fn memory_bytes(&self) -> u64 {
        if self.is_full() { MEMORY_FULL } else { MEMORY }
    }

    /// Makes round trips to the origin longer by so much.
    pub(super) fn set_line(&mut self, longer: Duration) -> Outcome {
        self.line = None;
        self.line = Some(Line::start(&self.network, LINE_PORT, S3_PORT, longer)?);
        Ok(())
    }

    /// Does something with the origin's files, under no server that writes them.
    fn without_server(&mut self, act: impl FnOnce() -> Outcome) -> Outcome {
        self.weed.kill()?;
        self.weed.wait()?;
        act()?;
        self.weed = weed(&self.network, &self.dir.join("origin"))?;
        Ok(())
    }

    /// What offshoots teach of a server's snapshot; where templates are kept, so is the origin as it is then, for the
    /// next run.
    pub(super) fn trained(&mut self, server: Server, offshoots: u64) -> Outcome<Profile> {
        let kept = self.kept.as_ref().map(|kept| kept.join(format!("trained-{}", server.name())));
        let origin = self.dir.join("origin");
        if let Some(profile) = kept.as_ref().and_then(|kept| std::fs::read(kept.join("profile")).ok()) {
            println!("{}: as it was taught before", server.name());
            let from = kept.unwrap_or_default().join("origin");
            self.without_server(|| {
                std::fs::remove_dir_all(&origin)?;
                copy_tree(&from, &origin)
            })?;
            return Ok(Profile(profile));
        }
        let profile = self.train(server, offshoots)?;
        let profile = profile.ok_or_else(|| Failure::from(format!("{}: nothing was learnt", server.name())))?;
        if let Some(kept) = kept {
            std::fs::create_dir_all(&kept)?;
            self.without_server(|| copy_tree(&origin, &kept.join("origin")))?;
            std::fs::write(kept.join("profile"), &profile.0)?;
        }
        Ok(profile)
    }

    /// Builds the guest, or finds it where guests are kept.
    fn build(&self) -> Outcome<PathBuf> {
        let mut hash = blake3::Hasher::new();
        for (name, text) in RECIPE {
            hash.update(name.as_bytes()).update(text.as_bytes());
        }
        let cache = std::env::var_os("OFFSHOOT_CACHE").map_or_else(|| self.dir.with_file_name("guest"), PathBuf::from);
        let more = if self.is_full() { "more" } else { "" };
        let place = cache.join(format!("shop{more}-{}", &hash.finalize().to_hex()[..16]));
        let recipe = self.dir.join("recipe");
        for dir in [&cache, &recipe] {
            std::fs::create_dir_all(dir)?;
        }
        for (name, text) in RECIPE {
            std::fs::write(recipe.join(name), text)?;
        }
        if !place.join("complete").exists() {
            let names: Vec<&str> = self.servers.iter().map(|server| server.name()).collect();
            println!("building the guest of {}", names.join(", "));
        }
        let mut build = Command::new("sh");
        build.arg(recipe.join("build.sh")).arg(&place);
        build.args([recipe.join("prepare.sh"), recipe.join("customize.sh"), recipe]).arg(more).stdin(Stdio::null());
        finish(&mut build)?;
        Ok(place)
    }

    /// The store, seen through a port of the origin.
    fn node_of(&self, home: &Path, port: u16) -> Outcome<Host> {
        std::fs::create_dir_all(home)?;
        let store = format!("s3://{BUCKET}/{PREFIX}?endpoint=http://{}:{port}", Place::Origin.address());
        let mut first = Command::new(&self.program);
        first.arg("--home").arg(home).arg("ps").env("OFFSHOOT_STORE", store).env("OFFSHOOT_CACHE_SIZE", "4G");
        finish(first.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET).stdin(Stdio::null()))?;
        Host::open(&self.program, home)
    }

    /// Boots the guest beside the origin, fills and warms its servers, and takes the snapshots.
    fn make_templates(&self, guest: &Path) -> Outcome {
        let home = self.dir.join("t");
        let host = self.node_of(&home, S3_PORT)?;
        let made = self.templates_on(&host, guest);
        let closed = host.close();
        unmount_below(&home);
        std::fs::remove_dir_all(&home)?;
        made.and(closed)
    }

    fn templates_on(&self, host: &Host, guest: &Path) -> Outcome {
        let part = |name: &str| guest.join(name).to_string_lossy().into_owned();
        let (kernel, initrd) = (part("kernel"), part("initrd"));
        let boot = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", CMDLINE];
        host.command(&[&["image", "import", &part("disk.raw"), "--name", TEMPLATE][..], &boot].concat())?;
        let request = request(TEMPLATE, From::Image(TEMPLATE.into()), self.servers)?;
        // Nobody is to know how the image boots ([`super::boot`]).
        let (memory_bytes, cpus, learn) = (Some(self.memory_bytes()), Some(1), Some(false));
        let request = RunRequest { memory_bytes, cpus, learn, ..request };
        let vm: Vm = host.client.post("/v1/vms", &request)?;
        let began = Instant::now();
        let address = |server: Server| published(&vm, server.port());
        await_all(&vm, self.servers, BOOT)?;
        println!("the guest serves after {:.0} s", began.elapsed().as_secs_f64());
        fill_redis(address(Server::Redis)?)?;
        fill_postgres(address(Server::Postgres)?)?;
        println!("filled after {:.0} s", began.elapsed().as_secs_f64());
        let console = Guest::of(&vm.name, &vm.publish)?;
        let minutes = Duration::from_secs(180);
        console.shell(&host.client, "/srv/programs.sh prepare", minutes)?;
        for program in super::programs::NAMES {
            get(address(Server::Web)?, &format!("/run/{program}/1"), minutes)?;
        }
        println!("programs warmed after {:.0} s", began.elapsed().as_secs_f64());
        self.snapshot(host, PROGRAMS)?;
        if self.is_full() {
            // Into its page cache.
            for file in 0..FILES {
                get(address(Server::Nginx)?, &format!("/{file}"), minutes)?;
            }
        }
        for &server in self.servers {
            let work = Work { busy: Duration::from_secs(5), answers: server.answers() };
            Session::new(server, address(server)?, Set::A, 0).drive(Instant::now(), work, || Ok(()))?;
            self.snapshot(host, server.name())?;
        }
        Ok(())
    }

    fn snapshot(&self, host: &Host, tag: &str) -> Outcome {
        let request = SnapshotRequest { tag: Some(tag.into()) };
        let taken: Snapshot = host.client.post_long(&format!("/v1/vms/{TEMPLATE}/snapshot"), &request, |_| {})?;
        println!("{}: stood still {:.1} ms, stored {} MiB", taken.name, taken.pause_ms, taken.stored_bytes >> 20);
        Ok(())
    }

    /// Does something at a node that has just been set up; what it connects to and starts is at the node.
    pub(super) fn at_node<T: Send>(&self, act: impl FnOnce(&Node<'_>) -> Outcome<T> + Send) -> Outcome<T> {
        let home = self.dir.join("n");
        self.network.within(Place::Node(0), || {
            let node = Node { world: self, host: self.node_of(&home, LINE_PORT)? };
            let done = act(&node);
            // To see what happened, with OFFSHOOT_LOG=mirror=trace: what the last node said.
            if let Some(kept) = std::env::var_os("BENCH_LOGS").map(PathBuf::from) {
                std::fs::create_dir_all(&kept)?;
                let number = std::fs::read_dir(&kept)?.count() / 2;
                for log in ["mirror.log", "daemon.log"] {
                    std::fs::copy(home.join("run").join(log), kept.join(format!("{number:02}-{log}")))?;
                }
            }
            done
        })
    }

    fn profile_url(tag: &str) -> String {
        url(&format!("{PREFIX}/heads/profile%21{TEMPLATE}%21{tag}"))
    }

    /// What is known of a snapshot: none, where nothing is.
    pub(super) fn profile(&self, tag: &str) -> Outcome<Option<Profile>> {
        let mut curl = signed(&self.network);
        let out = curl.arg(Self::profile_url(tag)).output()?;
        Ok(out.status.success().then_some(Profile(out.stdout)))
    }

    /// Makes what is known of a snapshot what it was: what is judged must not teach.
    pub(super) fn set_profile(&self, tag: &str, profile: Option<&Profile>) -> Outcome {
        let mut curl = signed(&self.network);
        match profile {
            None => drop(curl.args(["-X", "DELETE"])),
            Some(Profile(bytes)) => {
                let file = self.dir.join("profile");
                std::fs::write(&file, bytes)?;
                curl.arg("--upload-file").arg(file);
            }
        }
        finish(curl.arg(Self::profile_url(tag))).map(drop)
    }
}

impl Node<'_> {
    /// Starts an offshoot of a snapshot, which teaches or does not.
    pub(super) fn start(
        &self,
        name: &str,
        tag: &str,
        (prefetch, eager): (&str, Option<f32>),
        learn: bool,
    ) -> Outcome<Vm> {
        let request = request(name, From::Snapshot(format!("{TEMPLATE}@{tag}")), self.world.servers)?;
        let request = RunRequest { prefetch: Some(prefetch.into()), eager, learn: Some(learn), ..request };
        Ok(self.host.client.post("/v1/vms", &request)?)
    }

    /// Boots the image that the templates came from.
    pub(super) fn boot(&self, name: &str, prefetch: &str, learn: bool) -> Outcome<Vm> {
        let request = request(name, From::Image(TEMPLATE.into()), self.world.servers)?;
        let (memory_bytes, cpus) = (Some(self.world.memory_bytes()), Some(1));
        let request = RunRequest { memory_bytes, cpus, prefetch: Some(prefetch.into()), learn: Some(learn), ..request };
        Ok(self.host.client.post("/v1/vms", &request)?)
    }

    /// Waits until all servers of a VM answer something.
    pub(super) fn await_all(&self, vm: &Vm) -> Outcome {
        await_all(vm, self.world.servers, BOOT)
    }

    /// Fetches all of a snapshot into the node's cache.
    pub(super) fn warm(&self, tag: &str) -> Outcome {
        self.host.command(&["warm", &format!("{TEMPLATE}@{tag}")]).map(drop)
    }

    /// Bytes of the origin's packs that the node's mirror has fetched, and its daemon.
    pub(super) fn fetched_bytes(&self) -> Outcome<(u64, u64)> {
        let report: api::StoreReport = self.host.client.get("/v1/store")?;
        let of = |side: &serde_json::Value| side.pointer("/cache/fetched_bytes").and_then(serde_json::Value::as_u64);
        Ok((of(&report.mirror).unwrap_or(0), of(&report.daemon).unwrap_or(0)))
    }

    /// How many recordings the daemon says it has added since it started.
    pub(super) fn taught(&self) -> Outcome<usize> {
        self.said(&[" touched in "])
    }

    /// How often the daemon says it has laid a template down since it started, or found that it lies well.
    pub(super) fn laid_down(&self) -> Outcome<usize> {
        self.said(&[" pages moved; ", " pages lie well", "is not laid down"])
    }

    /// The same of disks.
    pub(super) fn disks_laid_down(&self) -> Outcome<usize> {
        self.said(&[" blocks moved; ", " blocks lie well", "is not laid down", "is not kept"])
    }

    fn said(&self, words: &[&str]) -> Outcome<usize> {
        let log = std::fs::read_to_string(self.host.home.join("run/daemon.log"))?;
        Ok(log.lines().filter(|line| words.iter().any(|word| line.contains(word))).count())
    }
}

fn copy_tree(from: &Path, to: &Path) -> Outcome {
    finish(Command::new("cp").args(["--archive", "--reflink=auto"]).arg(from).arg(to)).map(drop)
}

/// What is asked for where nothing else is said.
fn request(name: &str, from: From, servers: &[Server]) -> Outcome<RunRequest> {
    Ok(RunRequest {
        name: Some(name.into()),
        from,
        memory_bytes: None,
        cpus: None,
        publish: publish(servers)?,
        accelerator: None,
        append: None,
        prefetch: None,
        eager: None,
        learn: None,
    })
}

fn publish(servers: &[Server]) -> Outcome<Vec<String>> {
    let base = free_ports(servers.len() as u16)?;
    Ok(servers.iter().zip(base..).map(|(server, port)| format!("127.0.0.1:{port}:{}", server.port())).collect())
}

fn is_full(servers: &[Server]) -> bool {
    servers.len() > Server::USUAL.len()
}

/// Where a port of a VM's is published.
pub(super) fn published(vm: &Vm, port: u16) -> Outcome<SocketAddr> {
    let ends = format!(":{port}");
    let found = vm.publish.iter().find_map(|p| p.strip_suffix(ends.as_str()));
    Ok(found.ok_or_else(|| Failure::from(format!("{} publishes no port {port}", vm.name)))?.parse()?)
}

/// Waits until all servers answer something.
fn await_all(vm: &Vm, servers: &[Server], limit: Duration) -> Outcome {
    let end = Instant::now() + limit;
    let answers = || -> Outcome {
        let patience = Duration::from_secs(5);
        for server in servers {
            let address = published(vm, server.port())?;
            match server {
                Server::Postgres => super::servers::reach_postgres(address)?,
                Server::Nginx => drop(get(address, "/0", patience)?),
                Server::Web | Server::Jvm => drop(get(address, "/", patience)?),
                // It is there long before these.
                Server::Redis => {}
            }
        }
        Ok(())
    };
    while let Err(error) = answers() {
        if Instant::now() > end {
            return Err(format!("the guest does not serve after {limit:?}: {error}").into());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}
