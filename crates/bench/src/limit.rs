//! What no fork can beat: QEMU started by hand from files that are there already.
//!
//! The *bare limit* is the shape of a running offshoot, argument by argument, without anything of ours: no preloaded
//! library, no mirror, no daemon. Its RAM is a plain local file, copied out of the snapshot, warm in the page cache
//! and mapped privately (`share=off`); its disk is a fresh qcow2 file over a plain local raw copy, through the page
//! cache; its network a passt of its own, started in the same way. It loads the snapshot's device state by
//! `migrate-incoming` (with `x-ignore-shared`, so that no RAM is in the stream), asks `query-status` every
//! millisecond, and says `cont`. As with an offshoot, passt starts right behind QEMU, in the shadow of its start; the
//! clock begins before both and ends when `cont` is answered.
//!
//! The *full copy* is what stock QEMU offers for the same end: one migration stream with all of RAM in a local file,
//! warm in the page cache, loaded into anonymous memory.

use crate::guest::Guest;
use crate::host::{Host, PORTS};
use crate::{Failure, Outcome};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmm::passt::{self, Publish};
use vmm::process::{self, ProcessId};
use vmm::qmp::Qmp;

/// How long a machine may take to load before the run is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// Where a machine's RAM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ram {
    /// A plain file, mapped privately.
    File,
    /// The migration stream, into anonymous memory.
    Stream,
}

/// A snapshot in plain files, and the command line of its machine.
pub struct Limit {
    dir: PathBuf,
    arguments: Vec<String>,
    mac: String,
}

/// A running machine; ends when dropped.
pub struct Machine {
    /// Where its guest answers.
    pub guest: Guest,
    /// When it was asked for.
    pub asked: Instant,
    /// When its guest ran.
    pub running: Instant,
    qmp: Qmp,
    _processes: Processes,
}

/// Processes that end with it.
struct Processes(Vec<ProcessId>);

impl Limit {
    /// Copies snapshot `snapshot` of `host` into plain files below `dir`, takes the arguments of the offshoot `like`
    /// of the same machine, and makes the full migration stream.
    ///
    /// # Errors
    /// What could not be read, written or started.
    pub fn prepare(host: &Host, snapshot: &str, like: &str, dir: &Path) -> Outcome<Self> {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir)?;
        // Straight from the store: through the mirror it would warm the page cache for offshoots.
        let store = store::Store::open(&host.home.join("store"), store::Mode::ReadOnly)?;
        let (manifest, _) =
            store.head(&format!("snap/{snapshot}"))?.ok_or_else(|| format!("there is no snapshot {snapshot}"))?;
        for (blob, file) in [("ram", "ram"), ("disk0", "disk"), ("device", "device")] {
            let version = manifest.versions.get(blob).ok_or_else(|| format!("{snapshot} has no {blob}"))?;
            copy_out(&store, version, &dir.join(file))?;
        }
        image(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &path(dir, "disk"), &path(dir, "overlay")])?;
        let detail: api::VmDetail = host.client.get(&format!("/v1/vms/{like}"))?;
        let pid = detail.vm.pid.ok_or_else(|| Failure::from(format!("{like} does not run")))?;
        let bytes = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        let arguments = bytes.split(|&b| b == 0).skip(1).filter(|a| !a.is_empty());
        let mac = detail.shape["nic"]["mac"].as_str().ok_or("the shape names no hardware address")?.to_owned();
        let limit = Self {
            dir: dir.to_owned(),
            arguments: arguments.map(|a| String::from_utf8_lossy(a).into_owned()).collect(),
            mac,
        };
        limit.make_stream()?;
        limit.warm()?;
        Ok(limit)
    }

    /// Loads the machine and lets QEMU write all of it, RAM included, to one file.
    fn make_stream(&self) -> Outcome {
        let mut machine = self.load(Ram::File, 0, crate::host::free_ports(PORTS.len() as u16)?)?;
        let file = File::create(self.dir.join("stream"))?;
        let qmp = &mut machine.qmp;
        qmp.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "x-ignore-shared", "state": false}]}),
        )?;
        qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 64u64 << 30}))?;
        qmp.execute_with("getfd", json!({"fdname": "stream"}), Some(file.as_fd()))?;
        qmp.execute("migrate", json!({"uri": "fd:stream"}))?;
        let end = Instant::now() + LIMIT;
        loop {
            let seen = qmp.execute("query-migrate", json!({}))?;
            match seen["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(format!("QEMU could not write its stream: {seen}").into()),
                _ if Instant::now() > end => return Err("QEMU did not write its stream in time".into()),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Reads the files that machines are started from into the page cache.
    ///
    /// # Errors
    /// What could not be read.
    pub fn warm(&self) -> Outcome {
        let mut buffer = vec![0; 1 << 20];
        for file in ["ram", "device", "stream"] {
            let mut file = File::open(self.dir.join(file))?;
            while file.read(&mut buffer)? > 0 {}
        }
        Ok(())
    }

    /// Makes the disk of machine `slot`, before any clock runs.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn ready(&self, slot: u16) -> Outcome {
        std::fs::copy(self.dir.join("overlay"), self.dir.join(format!("overlay-{slot}")))?;
        Ok(())
    }

    /// Starts machine `slot`, which publishes its ports from `port` on, and lets it run.
    ///
    /// # Errors
    /// What kept it from running.
    pub fn start(&self, ram: Ram, slot: u16, port: u16) -> Outcome<Machine> {
        let mut machine = self.load(ram, slot, port)?;
        machine.qmp.execute("cont", json!({}))?;
        machine.running = Instant::now();
        Ok(machine)
    }

    /// The guest of a machine that publishes from `port` on.
    ///
    /// # Errors
    /// Never, for ports of the harness.
    pub fn guest(port: u16) -> Outcome<Guest> {
        Guest::of("limit", &publish(port).iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn load(&self, ram: Ram, slot: u16, port: u16) -> Outcome<Machine> {
        let overlay = self.dir.join(format!("overlay-{slot}"));
        if !overlay.exists() {
            self.ready(slot)?;
        }
        let asked = Instant::now();
        let listen = |name: &str| -> Outcome<(UnixListener, PathBuf)> {
            let path = self.dir.join(format!("{name}-{slot}.sock"));
            let _ = std::fs::remove_file(&path);
            Ok((UnixListener::bind(&path)?, path))
        };
        let log = self.dir.join(format!("log-{slot}"));
        let ((qmp, qmp_path), (console, _)) = (listen("qmp")?, listen("console")?);
        let (net, helper_end) = passt::pair(&self.mac, passt::peer(1))?;
        let mut command = Command::new(vmm::qemu::PROGRAM);
        command.args(self.arguments(ram, &overlay, &log, [net.as_raw_fd(), qmp.as_raw_fd(), console.as_raw_fd()]));
        let mut processes = Processes(Vec::new());
        processes.0.push(process::spawn(&command, &[net.as_fd(), qmp.as_fd(), console.as_fd()], None, &log)?);
        processes.0.push(passt::start(&helper_end, passt::peer(1), &publish(port), &log)?);
        // The ends live in the two processes alone: either learns of the other's death.
        drop((net, helper_end));
        let qmp = Qmp::connect(&qmp_path, || {}).map_err(|error| format!("{error}; {}", process::last_words(&log)))?;
        let mut machine = Machine { guest: Self::guest(port)?, asked, running: asked, qmp, _processes: processes };
        self.incoming(&mut machine.qmp, ram).map_err(|error| format!("{error}; {}", process::last_words(&log)))?;
        Ok(machine)
    }

    fn incoming(&self, qmp: &mut Qmp, ram: Ram) -> Outcome {
        let state = match ram {
            Ram::File => {
                let capability = json!([{"capability": "x-ignore-shared", "state": true}]);
                qmp.execute("migrate-set-capabilities", json!({"capabilities": capability}))?;
                File::open(self.dir.join("device"))?
            }
            Ram::Stream => File::open(self.dir.join("stream"))?,
        };
        qmp.execute_with("getfd", json!({"fdname": "state"}), Some(state.as_fd()))?;
        qmp.execute("migrate-incoming", json!({"uri": "fd:state"}))?;
        let end = Instant::now() + LIMIT;
        while qmp.execute("query-status", json!({}))?["status"] == "inmigrate" {
            if Instant::now() > end {
                return Err("the machine's state did not load in time".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The offshoot's arguments, with what names its own files and descriptors replaced.
    fn arguments(&self, ram: Ram, overlay: &Path, log: &Path, [net, qmp, console]: [i32; 3]) -> Vec<String> {
        let memory = path(&self.dir, "ram");
        let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
        let (overlay, log) = (overlay.to_string_lossy(), log.to_string_lossy());
        let mut flag = "";
        let replaced = self.arguments.iter().map(|argument| {
            let given = Options(argument);
            let new = match (flag, given.get("id").or(given.get("node-name")).unwrap_or_default()) {
                ("-name", _) => given.with(&[("guest", Some("limit"))]),
                ("-object", "ram") if ram == Ram::File => {
                    given.with(&[("mem-path", Some(&memory)), ("share", Some("off"))])
                }
                ("-object", "ram") => given
                    .with(&[("mem-path", None), ("share", None)])
                    .replace("memory-backend-file", "memory-backend-ram"),
                ("-blockdev", "file-disk0") => given.with(&[("filename", Some(&overlay)), ("cache.direct", None)]),
                ("-blockdev", "disk0") => given.with(&[("driver", Some("qcow2")), ("cache.direct", None)]),
                ("-netdev", _) => given.with(&[("addr.str", Some(&net.to_string()))]),
                ("-chardev", "console0") => {
                    given.with(&[("fd", Some(&console.to_string())), ("logfile", Some(&format!("{log}.console")))])
                }
                ("-chardev", "qmp0") => given.with(&[("fd", Some(&qmp.to_string()))]),
                ("-device", "genid0") => given.with(&[("guid", Some(uuid.trim()))]),
                _ => argument.clone(),
            };
            flag = argument;
            new
        });
        replaced.collect()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for process in &self.0 {
            process.end(Duration::ZERO);
        }
    }
}

fn publish(port: u16) -> Vec<Publish> {
    let address = std::net::IpAddr::from([127, 0, 0, 1]);
    PORTS.iter().zip(port..).map(|(&guest, host)| Publish { address, host, guest }).collect()
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_string_lossy().into_owned()
}

fn image(words: &[&str]) -> Outcome {
    let done = Command::new("qemu-img").args(words).output().map_err(|e| format!("qemu-img (`make setup`): {e}"))?;
    if done.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&done.stderr).trim().into()) }
}

/// Writes a version to a sparse file.
fn copy_out(store: &store::Store, version: &store::Version, to: &Path) -> Outcome {
    let mut file = File::create(to)?;
    file.set_len(version.size)?;
    let mut buffer = vec![0; 1 << 20];
    for range in store.data_ranges(version)? {
        let mut at = range.start;
        while at < range.end {
            let piece = &mut buffer[..(range.end - at).min(1 << 20) as usize];
            store.read_at(version, at, piece)?;
            file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
    }
    // Dirty pages that reach the disk later would do so while a clock runs.
    file.flush()?;
    file.sync_all()?;
    Ok(())
}

/// `word,key=value,…` as QEMU takes it; none of our paths holds a comma.
struct Options<'a>(&'a str);

impl Options<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
    }

    /// With other values for some keys, or without them.
    fn with(&self, changes: &[(&str, Option<&str>)]) -> String {
        let parts = self.0.split(',').filter_map(|part| {
            let key = part.split_once('=').map_or(part, |(key, _)| key);
            match changes.iter().find(|(changed, _)| *changed == key) {
                Some((_, Some(value))) => Some(format!("{key}={value}")),
                Some((_, None)) => None,
                None => Some(part.to_owned()),
            }
        });
        parts.collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_replaced_and_left_out_by_key() {
        let given = Options("memory-backend-file,id=ram,mem-path=/a/b,share=on");
        assert_eq!(given.get("id"), Some("ram"));
        assert_eq!(given.get("share-more"), None);
        assert_eq!(given.with(&[("share", Some("off")), ("mem-path", None)]), "memory-backend-file,id=ram,share=off");
    }
}
