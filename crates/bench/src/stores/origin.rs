//! A real S3 server to measure against, SeaweedFS, and a line to it that can be made longer.

use crate::Outcome;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::engine::object::{Credentials, Limits};
use store::engine::{Engine as _, S3};
use store::{Mode, Store};

const KEY_ID: &str = "OFFSHOOTBENCHKEY";
const SECRET: &str = "the-secret-of-the-benchmarks-0123456789";
const BUCKET: &str = "offshoot";

/// The server; ends when dropped.
pub(super) struct Origin {
    child: Child,
    port: u16,
}

impl Drop for Origin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn credentials() -> Credentials {
    Credentials { key_id: KEY_ID.to_owned(), secret: SECRET.to_owned(), token: None }
}

impl Origin {
    /// Starts the server with its data in `dir`.
    pub(super) fn start(dir: &Path) -> Outcome<Self> {
        let program = program()?;
        let config = dir.join("s3.json");
        let actions = ["Admin", "Read", "List", "Tagging", "Write"];
        let keys = serde_json::json!([{"accessKey": KEY_ID, "secretKey": SECRET}]);
        let identities = serde_json::json!([{"name": "bench", "actions": actions, "credentials": keys}]);
        std::fs::write(&config, serde_json::json!({ "identities": identities }).to_string())?;
        let ports = [(); 8].map(|()| TcpListener::bind(("127.0.0.1", 0)));
        let ports = ports.into_iter().map(|l| Ok(l?.local_addr()?.port())).collect::<Outcome<Vec<u16>>>()?;
        let data = dir.join("data");
        std::fs::create_dir_all(&data)?;
        let log = std::fs::File::create(dir.join("log"))?;
        let names =
            ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"];
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-master.telemetry=false"])
            .args(["-volume.max=64", "-master.volumeSizeLimitMB=1024", "-s3.port.iceberg=0", "-s3.port.lance=0"])
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-s3.config={}", config.display()))
            .args(names.iter().zip(&ports).map(|(name, port)| format!("-{name}={port}")))
            .args([format!("-s3.port={}", ports[6]), format!("-s3.port.grpc={}", ports[7])])
            .arg(format!("-filer.localSocket={}", data.join("filer.sock").display()))
            .arg(format!("-s3.localSocket={}", data.join("s3.sock").display()))
            .current_dir(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|e| format!("setpriv: {e}"))?;
        let origin = Self { child, port: ports[6] };
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            match origin.open("ready", Duration::ZERO) {
                Ok(_) => return Ok(origin),
                Err(error) if Instant::now() > end => {
                    return Err(format!("the S3 server does not serve: {error}").into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(300)),
            }
        }
    }

    /// Opens the store under a prefix, over a line that adds `delay` to each request.
    pub(super) fn open(&self, prefix: &str, delay: Duration) -> Outcome<Arc<Store>> {
        let port = if delay.is_zero() { self.port } else { longer(self.port, delay)? };
        let url = format!("s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port}");
        let engine = S3::open_with(&url, credentials(), Limits::default())?;
        // This server makes a bucket with its first object; to be asked what is in one that is not there is an error.
        engine.prove()?;
        Ok(Arc::new(Store::open_engine(Arc::new(engine), Mode::Shared)?))
    }
}

/// Where `weed` is; installed below the build directory where it is not there.
pub(super) fn program() -> Outcome<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/weed");
    let out = Command::new(script).stdin(Stdio::null()).output()?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).trim().into());
    }
    Ok(String::from_utf8(out.stdout)?.trim().into())
}

/// A port of this machine that leads to `port`, where whatever is sent arrives `delay` later. Lives as long as the
/// process.
fn longer(port: u16, delay: Duration) -> Outcome<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let here = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            let (Ok(from), Ok(to)) = (server.try_clone(), client.try_clone()) else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            std::thread::spawn(move || pass(client, server, delay));
            std::thread::spawn(move || pass(from, to, Duration::ZERO));
        }
    });
    Ok(here)
}

/// Passes bytes on, each `delay` after it came, however many are under way.
fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (tx, rx) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let sender = std::thread::spawn(move || {
        for (at, bytes) in rx {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; 256 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if tx.send((Instant::now() + delay, buffer[..n].to_vec())).is_err() {
            break;
        }
    }
    drop(tx);
    let _ = sender.join();
}
