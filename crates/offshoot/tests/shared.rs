//! Nodes that share one store on a real S3 server: what one makes the others use, and what happens while processes
//! die, the server is silent, or the cache is full.

use crate::common;
use crate::weed;

use bench::Outcome;
use common::nodes::{command, done, node, refused, url};
use common::tiny::disk_bytes;
use common::{TestHost, eventually, halting_kernel, host, kill};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What stands between nodes and the server, to take it away from one node alone: it lets bytes through, holds them
/// (a server that is silent), or hangs up (one that is gone).
struct Gate {
    port: u16,
    mode: Arc<AtomicU8>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

const THROUGH: u8 = 0;
const SILENT: u8 = 1;
const GONE: u8 = 2;

impl Gate {
    fn new(server: u16) -> Outcome<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let gate = Self { port: listener.local_addr()?.port(), mode: Arc::default(), open: Arc::default() };
        let (mode, open) = (gate.mode.clone(), gate.open.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(below) = TcpStream::connect(("127.0.0.1", server)) else { continue };
                if mode.load(Ordering::Acquire) == GONE {
                    continue;
                }
                let copies = (client.try_clone(), below.try_clone(), client.try_clone(), below.try_clone());
                let (Ok(c1), Ok(b1), Ok(c2), Ok(b2)) = copies else { continue };
                open.lock().expect("no holder panics").extend([client, below]);
                for (from, to) in [(c1, b1), (b2, c2)] {
                    let mode = mode.clone();
                    std::thread::spawn(move || pass(from, to, &mode));
                }
            }
        });
        Ok(gate)
    }

    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::Release);
        if mode == GONE {
            for stream in self.open.lock().expect("no holder panics").drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mode: &AtomicU8) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buf) {
        while mode.load(Ordering::Acquire) == SILENT {
            std::thread::sleep(Duration::from_millis(5));
        }
        if to.write_all(&buf[..len]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn report(host: &TestHost) -> Outcome<api::StoreReport> {
    Ok(host.client.get("/v1/store")?)
}

fn running(host: &TestHost) -> usize {
    let listed: serde_json::Value = serde_json::from_str(&done(host, &["ps", "--json"])).expect("a list");
    listed.as_array().map_or(0, |all| all.iter().filter(|vm| vm["state"] == "running").count())
}

fn import(host: &TestHost) -> Outcome {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("halt"), halting_kernel())?;
    std::fs::write(dir.path().join("disk"), disk_bytes())?;
    let at = |file: &str| dir.path().join(file).display().to_string();
    done(host, &["image", "import", &at("disk"), "--name", "tiny", "--kernel", &at("halt"), "--cmdline", "quiet"]);
    Ok(())
}

fn disk_is_right(host: &TestHost, source: &str) -> Outcome {
    let file = host.home.join("disk.raw");
    done(host, &["export", source, &file.to_string_lossy(), "--force"]);
    assert!(std::fs::read(&file)? == disk_bytes(), "the disk of {source} is what it was");
    Ok(())
}

#[test]
fn what_one_node_makes_the_other_runs_and_keeps() -> Outcome {
    let at = url(weed::weed().port, "two");
    let (a, b) = (node("ha", &at, "256M"), node("hb", &at, "256M"));
    import(&a)?;
    done(&a, &["run", "tiny", "--name", "t", "--memory", "64M"]);
    done(&a, &["snapshot", "t", "--tag", "one"]);
    // What the daemon had just stored, the mirror took from the node's own disk: the export read it all.
    disk_is_right(&a, "tiny")?;
    let fetched = report(&a)?.mirror["health"]["requests"].as_u64().unwrap_or(u64::MAX);
    let packs = done(&a, &["gc", "--dry-run", "--json"]);
    assert!(fetched < 40, "{fetched} requests of the mirror, packs: {packs}");

    disk_is_right(&b, "tiny")?;
    disk_is_right(&b, "t@one")?;
    done(&b, &["run", "--from", "t@one", "--name", "back"]);
    done(&b, &["fork", "back", "-n", "2"]);
    assert_eq!(running(&b), 3);
    refused(&a, &["snapshot", "t", "--tag", "one"], "t@one is there already");
    let any = b.home.join("store.json").display().to_string();
    refused(&b, &["image", "import", &any, "--name", "tiny"], "tiny is there already");
    // The snapshot goes where it was made; what was started from it elsewhere stays, and can be frozen again.
    done(&a, &["rm", "--force", "t"]);
    done(&a, &["snapshot", "rm", "t@one"]);
    done(&a, &["gc"]);
    done(&b, &["snapshot", "back-1", "--tag", "again"]);
    done(&a, &["run", "--from", "back-1@again", "--name", "home"]);
    assert_eq!((running(&a), running(&b)), (1, 3));
    let verified: serde_json::Value = serde_json::from_str(&done(&b, &["fsck", "--json"]))?;
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");

    let plan: api::GcReply = serde_json::from_str(&done(&b, &["gc", "--dry-run", "--json"]))?;
    let other = plan.nodes.iter().find(|node| !node.this).ok_or("the dry run names both nodes")?;
    assert!(other.heads > 0 && other.home == a.home.display().to_string(), "{plan:?}");
    let own = plan.nodes.iter().find(|node| node.this).ok_or("this node is named")?;
    refused(&b, &["gc", "--drop-node", &own.id], "is this node");
    refused(&b, &["gc", "--drop-node", "ffffffff"], "knows no node ffffffff");
    done(&a, &["rm", "--force", "home"]);
    done(&b, &["gc", "--drop-node", &other.id]);
    let plan: api::GcReply = serde_json::from_str(&done(&b, &["gc", "--dry-run", "--json"]))?;
    assert_eq!(plan.nodes.len(), 1, "{plan:?}");
    // It was not gone: it makes itself known again.
    done(&a, &["shutdown"]);
    assert!(done(&a, &["image", "ls"]).contains("tiny"));
    Ok(())
}

#[test]
fn a_node_lives_through_a_store_that_is_silent_or_gone_and_through_kills_meanwhile() -> Outcome {
    let server = weed::weed().port;
    let gate = Gate::new(server)?;
    let (a, b) = (node("hc", &url(server, "away"), "256M"), node("hd", &url(gate.port, "away"), "256M"));
    import(&a)?;
    done(&a, &["run", "tiny", "--name", "t", "--memory", "64M"]);
    done(&a, &["snapshot", "t", "--tag", "one"]);
    done(&b, &["warm", "tiny", "t@one", "--pin"]);
    done(&b, &["run", "--from", "t@one", "--name", "back"]);
    done(&b, &["nbd", "serve", "tiny", "--name", "disk"]);
    for mode in [SILENT, GONE] {
        gate.set(mode);
        refused(&b, &["image", "ls"], &format!("127.0.0.1:{}", gate.port));
        let said = report(&b)?;
        assert!(!said.reachable && said.last_failure.is_some(), "{said:?}");
        // Both at once; the next command finds a daemon that starts without the store, and a mirror with its cache.
        kill(b.mirror_pid()?);
        kill(b.daemon_pid()?);
        assert!(running(&b) >= 1);
        let made = format!("m{mode}");
        done(&b, &["fork", "back", "--name-prefix", &made]);
        eventually("what is cached is served", || {
            let out = Command::new("qemu-img")
                .args(["compare", "-f", "raw", "-F", "raw"])
                .arg(format!("nbd+unix:///disk?socket={}/run/nbd/disk.sock", b.home.display()))
                .arg(b.home.join("disk.raw"))
                .output()?;
            Ok(b.home.join("disk.raw").exists() && out.status.success() || {
                std::fs::write(b.home.join("disk.raw"), disk_bytes())?;
                false
            })
        })?;
        assert!(report(&b)?.waiting_commits >= 1, "the fork's freeze waits");
        gate.set(THROUGH);
        eventually("what waited is stored", || Ok(report(&b)?.waiting_commits == 0))?;
        eventually("the store answers again", || Ok(report(&b)?.reachable))?;
        done(&b, &["snapshot", &format!("{made}-1"), "--tag", "after"]);
        assert!(done(&a, &["snapshot", "ls"]).contains(&format!("{made}-1@after")));
    }
    let verified: serde_json::Value = serde_json::from_str(&done(&a, &["fsck", "--json"]))?;
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");
    Ok(())
}

#[test]
fn a_store_is_said_once_and_a_cache_too_small_for_all_serves_all() -> Outcome {
    let at = url(weed::weed().port, "once");
    let small = node("he", &at, "64M");
    import(&small)?;
    let other = url(weed::weed().port, "other");
    done(&small, &["shutdown"]);
    let home = small.home.clone();
    let output = command(&home, &["ps"]).env("OFFSHOOT_STORE", &other).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(&at) && said.contains(&other), "{said}");
    let record = std::fs::read_to_string(home.join("store.json"))?;
    assert!(!record.contains(weed::SECRET) && !record.contains(&weed::credentials().key_id), "{record}");
    // More than the cache holds, in and out, without a word about it.
    let big = home.join("big");
    let bytes: Vec<u8> = (0..8).flat_map(|round: u8| disk_bytes().into_iter().map(move |b| b ^ (round * 31))).collect();
    std::fs::write(&big, &bytes)?;
    done(&small, &["blob", "create", "big", "128M"]);
    done(&small, &["blob", "write", "big", &big.to_string_lossy()]);
    let out = home.join("out");
    for _ in 0..2 {
        done(&small, &["export", "blob:big", &out.to_string_lossy(), "--force"]);
        assert!(std::fs::read(&out)? == bytes, "what comes out of a full cache is right");
    }
    refused(&small, &["warm", "blob:big", "--pin"], "more than the cache has room for");
    let own = host("hf");
    refused(&own, &["warm", "tiny"], "on its own disk");
    Ok(())
}
