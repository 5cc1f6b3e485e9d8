//! A real S3 server for a test program: SeaweedFS, started when first wanted, gone when the program is.

#![allow(dead_code, missing_docs, unreachable_pub)]

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use store::engine::object::{Credentials, Limits};
use store::engine::{Engine as _, S3};

const KEY_ID: &str = "OFFSHOOTTESTKEY";
pub const SECRET: &str = "the-secret-of-the-tests-0123456789";
const BUCKET: &str = "offshoot";

/// One running server.
pub struct Weed {
    /// `http://127.0.0.1:port`.
    pub endpoint: String,
    pub port: u16,
}

/// The server of this test program.
pub fn weed() -> &'static Weed {
    static WEED: OnceLock<Weed> = OnceLock::new();
    WEED.get_or_init(start)
}

pub fn credentials() -> Credentials {
    Credentials { key_id: KEY_ID.to_owned(), secret: SECRET.to_owned(), token: None }
}

/// A place of its own in the server's bucket, reached by `endpoint`.
pub fn url_at(endpoint: &str, prefix: &str) -> String {
    format!("s3://{BUCKET}/{prefix}?endpoint={endpoint}")
}

/// A prefix that nobody else uses.
pub fn fresh_prefix() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// An engine on a place of its own.
pub fn engine() -> S3 {
    let url = url_at(&weed().endpoint, &fresh_prefix());
    S3::open_with(&url, credentials(), Limits::default()).unwrap()
}

/// A path under the build directory, cleared of what test programs that are gone left there.
fn directory() -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("weed");
    fs::create_dir_all(&root).unwrap();
    for entry in fs::read_dir(&root).unwrap().flatten() {
        if !Path::new("/proc").join(entry.file_name()).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let dir = root.join(std::process::id().to_string());
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn program() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/weed");
    // The build directory, wherever cargo put it: its folder for tests' files is one below.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let out = Command::new(script).env("CARGO_TARGET_DIR", target).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "no S3 server to test against: {}", String::from_utf8_lossy(&out.stderr));
    PathBuf::from(String::from_utf8(out.stdout).unwrap().trim())
}

/// Ports that nobody listens on.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn start() -> Weed {
    // A port may be taken between its choice and its use.
    let mut why = String::new();
    for _ in 0..3 {
        match try_start() {
            Ok(weed) => return weed,
            Err(error) => why = error,
        }
    }
    panic!("the S3 server does not start: {why}");
}

fn try_start() -> Result<Weed, String> {
    let dir = directory();
    let config = dir.join("s3.json");
    let identity = format!(
        r#"{{"identities": [{{"name": "test", "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            "credentials": [{{"accessKey": "{KEY_ID}", "secretKey": "{SECRET}"}}]}}]}}"#
    );
    fs::write(&config, identity).unwrap();
    let [master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc] = free_ports();
    let data = dir.join(format!("data-{s3}"));
    fs::create_dir_all(&data).unwrap();
    let log = dir.join("log");
    let output = fs::File::create(&log).unwrap();
    // It dies with the thread that starts it, so that thread lives as long as the program.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(program())
        .args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-master.telemetry=false"])
        .args(["-volume.max=64", "-master.volumeSizeLimitMB=512", "-s3.port.iceberg=0", "-s3.port.lance=0"])
        .arg(format!("-dir={}", data.display()))
        .arg(format!("-s3.config={}", config.display()))
        .args([format!("-master.port={master}"), format!("-master.port.grpc={master_grpc}")])
        .args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_grpc}")])
        .args([format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_grpc}")])
        .args([format!("-s3.port={s3}"), format!("-s3.port.grpc={s3_grpc}")])
        .arg(format!("-filer.localSocket={}", data.join("filer.sock").display()))
        .arg(format!("-s3.localSocket={}", data.join("s3.sock").display()))
        .current_dir(&data)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        tell.send(command.spawn()).unwrap();
        loop {
            std::thread::park();
        }
    });
    let mut child: Child = told.recv().unwrap().expect("setpriv is there");
    let weed = Weed { endpoint: format!("http://127.0.0.1:{s3}"), port: s3 };
    let limits =
        Limits { attempts: 1, attempt: Duration::from_secs(5), circuit_failures: u32::MAX, ..Limits::default() };
    let engine = S3::open_with(&url_at(&weed.endpoint, "ready"), credentials(), limits).unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let mut why = "it does not listen".to_owned();
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        if TcpStream::connect(("127.0.0.1", s3)).is_ok() {
            match engine.put("ready", b"x").and_then(|()| engine.prove()) {
                Ok(()) => return Ok(weed),
                Err(error) => why = error.to_string(),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = child.kill();
    let _ = child.wait();
    let mut text = String::new();
    let _ = fs::File::open(&log).and_then(|mut file| file.read_to_string(&mut text));
    let end: Vec<&str> = text.lines().rev().take(15).collect();
    Err(format!("{why}\n{}", end.into_iter().rev().collect::<Vec<_>>().join("\n")))
}
