//! A small network of this machine's own: an origin and nodes, each behind a link of 1 Gbit/s, at one switch.
//!
//! Every one is a network namespace, the switch too, so nothing of the machine's own network changes. A link is a
//! pair of virtual Ethernet ends, each of which sends through a token bucket. Everything is named by [`PREFIX`], and
//! what an earlier run left is taken away first: the processes within those namespaces are that run's.

use crate::Outcome;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::LinkNameSpaceType;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

const PREFIX: &str = "offshoot-bench-";
/// Bits a second of every link, each way.
pub(crate) const RATE: f64 = 1e9;
/// What may leave at once: more than the largest packet that the kernel passes on undivided.
const BURST: &str = "256kb";
/// How long a packet waits at most: what a switch's buffers hold.
const QUEUE: &str = "20ms";

/// Who is in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Origin,
    Node(usize),
}

impl Place {
    fn port(self) -> String {
        match self {
            Self::Origin => "origin".into(),
            Self::Node(n) => format!("node-{n:02}"),
        }
    }

    fn namespace(self) -> String {
        format!("{PREFIX}{}", self.port())
    }

    /// Its address.
    pub(crate) fn address(self) -> String {
        match self {
            Self::Origin => "10.77.0.1".into(),
            Self::Node(n) => format!("10.77.0.{}", n + 2),
        }
    }
}

/// The network; gone when dropped.
pub(crate) struct Network {
    _one: File,
}

impl Network {
    /// Makes an origin and `nodes` nodes.
    pub(crate) fn up(nodes: usize) -> Outcome<Self> {
        let one = File::create("/run/offshoot-bench.lock")
            .map_err(|e| format!("making network namespaces (as root): {e}"))?;
        flock(&one, FlockOperation::NonBlockingLockExclusive).map_err(|_| "another benchmark has its network up")?;
        down();
        let network = Self { _one: one };
        let switch = format!("{PREFIX}switch");
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "up", "type", "bridge"])?;
        for place in (0..nodes).map(Place::Node).chain([Place::Origin]) {
            let (name, port) = (place.namespace(), place.port());
            ip(&["netns", "add", &name])?;
            ip(&["link", "add", &port, "netns", &switch, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "address", "add", &format!("{}/24", place.address()), "dev", "eth0"])?;
            for (namespace, device) in [(&switch, port.as_str()), (&name, "eth0")] {
                let rate = format!("{RATE}bit");
                let shape =
                    ["qdisc", "add", "dev", device, "root", "tbf", "rate", &rate, "burst", BURST, "latency", QUEUE];
                tool("tc", &[&["-n", namespace.as_str()], &shape[..]].concat())?;
            }
        }
        Ok(network)
    }

    /// A program that runs at a place and ends with this process; it has nothing to read.
    pub(crate) fn command(&self, place: Place, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", place.namespace()));
        command.args(["setpriv", "--pdeathsig", "KILL"]).arg(program).stdin(Stdio::null());
        command
    }

    /// Does something in a thread of its own at a place: what it connects to, and the programs that it starts, are
    /// there. Programs outlive it.
    pub(crate) fn within<T: Send>(&self, place: Place, act: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
        let space = File::open(format!("/run/netns/{}", place.namespace()))?;
        let inside = || -> Outcome<T> {
            rustix::thread::move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
            act()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().expect("no panic at a place"))
    }

    /// Gives a place a way out, which guests' network helpers want to see; nothing answers there.
    pub(crate) fn default_route(&self, place: Place) -> Outcome {
        let space = place.namespace();
        ip(&["-n", &space, "route", "add", "default", "via", &Place::Node(250).address(), "dev", "eth0"])
    }

    /// Bytes that have left the origin, headers included.
    pub(crate) fn left_origin(&self) -> Outcome<u64> {
        let shown = tool("tc", &["-n", &Place::Origin.namespace(), "-s", "-j", "qdisc", "show", "dev", "eth0"])?;
        let found: serde_json::Value = serde_json::from_str(&shown)?;
        Ok(found[0]["bytes"].as_u64().ok_or("tc tells no number of bytes")?)
    }

    /// Ends every process at a place.
    pub(crate) fn clear(&self, place: Place) {
        end_all(&place.namespace());
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        down();
    }
}

/// Takes everything away that is named as ours.
fn down() {
    let listed = tool("ip", &["netns", "list"]).unwrap_or_default();
    let names = listed.lines().filter_map(|line| line.split_whitespace().next());
    for name in names.filter(|name| name.starts_with(PREFIX)) {
        end_all(name);
        if let Err(error) = ip(&["netns", "delete", name]) {
            let _ = writeln!(std::io::stderr(), "{error}");
        }
    }
}

/// Ends the processes within a namespace; they may be starting others meanwhile.
fn end_all(namespace: &str) {
    for _ in 0..50 {
        let listed = tool("ip", &["netns", "pids", namespace]).unwrap_or_default();
        let pids: Vec<i32> = listed.lines().filter_map(|line| line.trim().parse().ok()).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ip(words: &[&str]) -> Outcome {
    tool("ip", words).map(drop)
}

fn tool(program: &str, words: &[&str]) -> Outcome<String> {
    let out = Command::new(program).args(words).stdin(Stdio::null()).output();
    let out = out.map_err(|e| format!("{program} (`make setup`): {e}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{program} {}: {}", words.join(" "), said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
