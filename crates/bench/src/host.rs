//! One home with its daemon, driven through the command line and the API.

use crate::guest::Guest;
use crate::{Failure, Outcome};
use api::{BuildRequest, Client, ForkReply, ForkRequest, From, RunRequest, Vm};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Guest ports that every VM of the harness publishes, in this order.
pub const PORTS: [u16; 2] = [80, 6379];

/// A home and the program that serves it.
pub struct Host {
    /// The program.
    pub program: PathBuf,
    /// The home.
    pub home: PathBuf,
    /// A client of the daemon.
    pub client: Client,
}

impl Host {
    /// Starts the daemon of `home`, or finds it.
    ///
    /// # Errors
    /// What the command line said.
    pub fn open(program: &Path, home: &Path) -> Outcome<Self> {
        let client = Client::new(&home.join("run/daemon.sock"))?;
        let host = Self { program: program.to_owned(), home: home.to_owned(), client };
        host.command(&["ps"])?;
        Ok(host)
    }

    /// Runs a command line and returns what it printed.
    ///
    /// # Errors
    /// What it said on stderr, where it failed.
    pub fn command(&self, words: &[&str]) -> Outcome<String> {
        let output = Command::new(&self.program).arg("--home").arg(&self.home).args(words).output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!("offshoot {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim()).into())
    }

    /// Makes sure the default guest is there.
    ///
    /// # Errors
    /// What kept it from being built.
    pub fn image(&self, say: &mut dyn FnMut(&str)) -> Outcome {
        let images: Vec<api::Image> = self.client.get("/v1/images")?;
        if images.iter().any(|i| i.name == "debian") {
            return Ok(());
        }
        let mut last = String::new();
        let request = BuildRequest { name: "debian".into(), force: false };
        self.client.post_long::<api::Image>("/v1/images/build", &request, |p| {
            if p.step != last {
                last.clone_from(&p.step);
                say(&p.step);
            }
        })?;
        Ok(())
    }

    /// Boots the default guest.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn boot(&self, name: &str, memory_bytes: u64) -> Outcome<Guest> {
        let base = free_ports(PORTS.len() as u16)?;
        let publish = PORTS.iter().zip(base..).map(|(guest, host)| format!("127.0.0.1:{host}:{guest}")).collect();
        let request = RunRequest {
            name: Some(name.into()),
            from: From::Image("debian".into()),
            memory_bytes: Some(memory_bytes),
            cpus: Some(1),
            publish,
            accelerator: None,
            append: None,
            prefetch: None,
            eager: None,
            learn: None,
        };
        let vm: Vm = self.client.post("/v1/vms", &request)?;
        Guest::of(&vm.name, &vm.publish)
    }

    /// Starts a VM from a snapshot.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn restore(&self, name: &str, snapshot: &str) -> Outcome<Guest> {
        self.restore_ahead(name, snapshot, None, None)
    }

    /// Starts a VM from a snapshot, with what is to be fetched ahead of it.
    ///
    /// # Errors
    /// What kept it from starting.
    pub fn restore_ahead(
        &self,
        name: &str,
        snapshot: &str,
        prefetch: Option<&str>,
        eager: Option<f32>,
    ) -> Outcome<Guest> {
        let base = free_ports(PORTS.len() as u16)?;
        let publish = PORTS.iter().zip(base..).map(|(guest, host)| format!("127.0.0.1:{host}:{guest}")).collect();
        let request = RunRequest {
            name: Some(name.into()),
            from: From::Snapshot(snapshot.into()),
            memory_bytes: None,
            cpus: None,
            publish,
            accelerator: None,
            append: None,
            prefetch: prefetch.map(str::to_owned),
            eager,
            learn: None,
        };
        let vm: Vm = self.client.post("/v1/vms", &request)?;
        Guest::of(&vm.name, &vm.publish)
    }

    /// Forks a VM; the reply and the offshoots.
    ///
    /// # Errors
    /// What kept any of them from starting.
    pub fn fork(&self, parent: &str, count: u32, prefix: &str, base: u16) -> Outcome<(ForkReply, Vec<Guest>)> {
        let request = ForkRequest { count, name_prefix: Some(prefix.into()), publish_base: Some(base) };
        let reply: ForkReply = self.client.post_long(&format!("/v1/vms/{parent}/fork"), &request, |_| {})?;
        if let Some(failed) = reply.failed.first() {
            return Err(format!("{}: {}", failed.name, failed.error.message).into());
        }
        let guests = reply.offshoots.iter().map(|o| Guest::of(&o.name, &o.publish)).collect::<Outcome<_>>()?;
        Ok((reply, guests))
    }

    /// Removes a VM, running or not.
    ///
    /// # Errors
    /// What the daemon said.
    pub fn remove(&self, name: &str) -> Outcome {
        self.client.delete::<serde_json::Value>(&format!("/v1/vms/{name}?force=true"))?;
        Ok(())
    }

    /// Counters of a VM.
    ///
    /// # Errors
    /// What the daemon said.
    pub fn stats(&self, name: &str) -> Outcome<api::VmStats> {
        Ok(self.client.get(&format!("/v1/vms/{name}/stats"))?)
    }

    /// Waits until nothing frozen of `name` is outside the store.
    ///
    /// # Errors
    /// Where that takes longer than `limit`.
    pub fn settle(&self, name: &str, limit: Duration) -> Outcome {
        let end = Instant::now() + limit;
        loop {
            let detail: api::VmDetail = self.client.get(&format!("/v1/vms/{name}"))?;
            if detail.pending.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("{name} still has {} frozen after {limit:?}", detail.pending.join(", ")).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends every VM, the daemon and the mirror.
    ///
    /// # Errors
    /// What the command line said.
    pub fn close(&self) -> Outcome {
        self.command(&["shutdown", "--stop"]).map(|_| ())
    }
}

/// Ports that one process hands out, below the ephemeral range.
struct Block {
    first: u16,
    /// Where the search goes on: what was given out is not given out again at once, though nobody listens there yet.
    next: u16,
    /// Keeps other processes out; the kernel takes the name back with the process.
    _hold: UnixListener,
}

const PORTS_FIRST: u16 = 10_000;
const BLOCK_PORTS: u16 = 200;
const BLOCKS: u16 = 110;

impl Block {
    fn take() -> Outcome<Self> {
        for number in 0..BLOCKS {
            let name = SocketAddr::from_abstract_name(format!("offshoot-test-ports-{number}"))?;
            if let Ok(_hold) = UnixListener::bind_addr(&name) {
                return Ok(Self { first: PORTS_FIRST + number * BLOCK_PORTS, next: 0, _hold });
            }
        }
        Err("no free ports".into())
    }

    fn give(&mut self, count: u16) -> Option<u16> {
        let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        let starts = (self.next..BLOCK_PORTS).chain(0..self.next).filter(|at| at + count <= BLOCK_PORTS);
        let found = starts.map(|at| self.first + at).find(|&p| (p..p + count).all(free))?;
        self.next = (found - self.first + count) % BLOCK_PORTS;
        Some(found)
    }
}

/// The first of `count` ports in a row that are free now, and that no other process is given.
///
/// # Errors
/// Where there are none.
pub fn free_ports(count: u16) -> Outcome<u16> {
    static BLOCK: Mutex<Option<Block>> = Mutex::new(None);
    let mut block = BLOCK.lock().expect("no holder panics");
    if block.is_none() {
        *block = Some(Block::take()?);
    }
    block.as_mut().and_then(|block| block.give(count)).ok_or_else(|| Failure::from("no free ports"))
}
