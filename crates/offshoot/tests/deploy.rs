//! An image that was deployed once comes to the next node in the order in which it was read then.

use crate::common::nodes::{self, done, refused};
use crate::common::tiny::{DISK, disk_bytes};
use crate::common::{TestHost, eventually, halting_kernel, host};
use crate::weed;
use bench::Outcome;
use mirror::nbd::NbdClient;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Stands before the server and counts what is read of packs.
struct Counter {
    port: u16,
    requests: Arc<AtomicU64>,
}

impl Counter {
    fn new(server: u16) -> Outcome<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let counter = Self { port: listener.local_addr()?.port(), requests: Arc::default() };
        let requests = counter.requests.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(below) = TcpStream::connect(("127.0.0.1", server)) else { continue };
                let (Ok(c), Ok(b)) = (client.try_clone(), below.try_clone()) else { continue };
                let counted = requests.clone();
                std::thread::spawn(move || {
                    // A client sends a request when the answer before is whole: each begins what is read at once.
                    pass(c, b, &|bytes| {
                        let line = bytes.split(|b| *b == b'\r').next().unwrap_or_default();
                        let of_pack = line.starts_with(b"GET ") && line.windows(7).any(|part| part == b"/packs/");
                        counted.fetch_add(u64::from(of_pack), Ordering::AcqRel);
                    });
                });
                std::thread::spawn(move || pass(below, client, &|_| {}));
            }
        });
        Ok(counter)
    }

    fn now(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    fn url(&self, prefix: &str) -> String {
        weed::url_at(&format!("http://127.0.0.1:{}", self.port), prefix)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, see: &dyn Fn(&[u8])) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buf) {
        see(&buf[..len]);
        if to.write_all(&buf[..len]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn node(name: &str, url: &str) -> TestHost {
    nodes::node(name, url, "256M")
}

fn said(host: &TestHost, words: &str) -> Outcome<bool> {
    Ok(std::fs::read_to_string(host.home.join("run/daemon.log"))?.contains(words))
}

/// What something that boots reads: here and there, some blocks at a time.
fn boot(host: &TestHost, export: &str, disk: &[u8]) -> Outcome {
    let socket = host.home.join(format!("run/nbd/{export}.sock"));
    let mut client = NbdClient::connect(&socket)?;
    assert_eq!(client.size(), DISK);
    let mut buf = vec![0; 16 << 10];
    for n in 0..400 {
        let len = (1 + n % 4) << 12;
        let at = (n * 613 % 4090) << 12;
        client.read_at(at as u64, &mut buf[..len])?;
        assert!(buf[..len] == disk[at..at + len], "bytes at {at} of {export}");
    }
    Ok(())
}

/// Every byte, as a copy reads it.
fn whole(host: &TestHost, export: &str, disk: &[u8]) -> Outcome {
    let mut client = NbdClient::connect(&host.home.join(format!("run/nbd/{export}.sock")))?;
    let mut buf = vec![0; 1 << 20];
    for at in (0..disk.len()).step_by(buf.len()) {
        client.read_at(at as u64, &mut buf)?;
        assert!(buf == disk[at..at + buf.len()], "bytes at {at} of {export}");
    }
    Ok(())
}

#[test]
fn a_deployment_teaches_the_next_ones_what_is_read() -> Outcome {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let disk = disk_bytes();
    std::fs::write(at("disk"), &disk)?;
    std::fs::write(at("halt"), halting_kernel())?;
    let counter = Counter::new(weed::weed().port)?;
    let url = counter.url(&weed::fresh_prefix());
    let publisher = node("dep-p", &url);
    let import = ["image", "import", &at("disk"), "--name", "tiny", "--kernel", &at("halt"), "--cmdline", "quiet"];
    done(&publisher, &import);
    refused(&publisher, &["image", "arrange", "tiny"], "nothing is known of what is read of tiny");

    // One that teaches nothing, and one that does: a scratch disk over the image.
    let shy = node("dep-s", &url);
    done(&shy, &["nbd", "serve", "tiny", "--name", "t", "--no-learn"]);
    let before = counter.now();
    boot(&shy, "t", &disk)?;
    let alone = counter.now() - before;
    std::thread::sleep(Duration::from_millis(600));
    done(&shy, &["nbd", "stop", "t"]);
    let first = node("dep-1", &url);
    done(&first, &["nbd", "serve", "tiny", "--writable", "--name", "t"]);
    boot(&first, "t", &disk)?;
    std::thread::sleep(Duration::from_millis(600));
    done(&first, &["nbd", "stop", "t", "--discard"]);
    eventually("what was read is laid down in order", || said(&first, "blocks moved; fetching what is known"))?;
    assert!(said(&first, "read in 1 recordings")? && !said(&shy, " read in ")?);

    // The next node has it fetched ahead: few requests, and every byte is right.
    let second = node("dep-2", &url);
    let before = counter.now();
    done(&second, &["nbd", "serve", "tiny", "--name", "t"]);
    boot(&second, "t", &disk)?;
    let taught = counter.now() - before;
    assert!(taught * 4 < alone, "{taught} requests for packs, {alone} by the first");
    whole(&second, "t", &disk)?;
    // It is read-only, and teaches as well, when it ends; not one that ended at once.
    std::thread::sleep(Duration::from_millis(600));
    done(&second, &["nbd", "stop", "t"]);
    eventually("a version that is served teaches too", || said(&second, "read in 2 recordings"))?;
    // Nothing is fetched ahead where nobody wants it.
    let third = node("dep-3", &url);
    done(&third, &["nbd", "serve", "tiny", "--name", "t", "--prefetch", "none", "--no-learn"]);
    let before = counter.now();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(counter.now(), before, "it fetches by itself");
    boot(&third, "t", &disk)?;
    refused(&third, &["nbd", "serve", "tiny", "--prefetch", "magic"], "not a prefetch policy");

    // What is known goes along with the image, and goes with it.
    let between = at("between");
    done(&second, &["push", "--to", &between, "tiny"]);
    let told: api::SnapshotArranged = serde_json::from_str(&done(&second, &["image", "arrange", "tiny", "--json"]))?;
    assert!(told.pages > 900 && told.after.requests <= 24, "{told:?}");
    let there = host("dep-there");
    refused(&there, &["image", "arrange", "tiny"], "no image `tiny`");
    done(&there, &["pull", "--from", &between, "tiny"]);
    done(&there, &["image", "arrange", "tiny"]);
    let verified: serde_json::Value = serde_json::from_str(&done(&there, &["fsck", "--json"]))?;
    assert_eq!(verified["faults"].as_array().map(Vec::len), Some(0), "{verified}");
    done(&there, &["image", "rm", "tiny"]);
    // Another image under the name begins anew.
    let mut other = disk.clone();
    other[8192..12288].fill(1);
    std::fs::write(at("disk"), &other)?;
    done(&there, &import);
    refused(&there, &["image", "arrange", "tiny"], "nothing is known of what is read of tiny");
    Ok(())
}
