//! Starts SeaweedFS, a real S3 server, with one key that may do everything. Of the standard library alone, so that tests
//! and benchmarks share it by path.

#![allow(dead_code, missing_docs, unreachable_pub)]

use std::fs::{self, File};
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Starts with other ports where one was taken between its choice and its use.
const ATTEMPTS: u32 = 3;
const READY: Duration = Duration::from_secs(90);

/// A running server. It dies with this process; [`Seaweed::stop`] ends it before.
pub struct Seaweed {
    child: Child,
    /// Where S3 is served on 127.0.0.1.
    pub port: u16,
}

/// Where `weed` is; installed below the build directory `target` where it is not there.
pub fn program(target: &Path) -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/weed");
    let run = Command::new(script).env("CARGO_TARGET_DIR", target).stdin(Stdio::null()).output();
    let out = run.map_err(|error| format!("scripts/weed: {error}"))?;
    match out.status.success() {
        true => Ok(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim())),
        false => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
    }
}

impl Seaweed {
    /// Starts the server with its data in `dir`; `serves` says whether it answers at a port.
    pub fn start(
        target: &Path,
        dir: &Path,
        (key_id, secret): (&str, &str),
        serves: &dyn Fn(u16) -> Result<(), String>,
    ) -> Result<Self, String> {
        let program = program(target)?;
        let config = dir.join("s3.json");
        let identity = format!(
            r#"{{"identities": [{{"name": "all", "actions": ["Admin", "Read", "List", "Tagging", "Write"],
                "credentials": [{{"accessKey": "{key_id}", "secretKey": "{secret}"}}]}}]}}"#
        );
        fs::write(&config, identity).map_err(|error| format!("{}: {error}", config.display()))?;
        let mut why = String::new();
        for _ in 0..ATTEMPTS {
            match Self::try_start(&program, dir, &config, serves) {
                Ok(server) => return Ok(server),
                Err(error) => why = error,
            }
        }
        Err(format!("the S3 server does not start: {why}"))
    }

    fn try_start(
        program: &Path,
        dir: &Path,
        config: &Path,
        serves: &dyn Fn(u16) -> Result<(), String>,
    ) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let listeners: Result<Vec<TcpListener>, _> = (0..8).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect();
        let ports: Result<Vec<u16>, _> =
            listeners.map_err(text)?.iter().map(|l| l.local_addr().map(|at| at.port())).collect();
        let ports = ports.map_err(text)?;
        let data = dir.join(format!("data-{}", ports[0]));
        fs::create_dir_all(&data).map_err(text)?;
        let log = dir.join("log");
        let output = File::create(&log).map_err(text)?;
        let names = ["s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc"];
        let names =
            names.map(|name| name.split_once('.').map_or(format!("{name}.port"), |(of, _)| format!("{of}.port.grpc")));
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-master.telemetry=false"])
            .args(["-volume.max=64", "-master.volumeSizeLimitMB=1024", "-s3.port.iceberg=0", "-s3.port.lance=0"])
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-s3.config={}", config.display()))
            .args(names.iter().zip(&ports).map(|(name, port)| format!("-{name}={port}")))
            .arg(format!("-filer.localSocket={}", data.join("filer.sock").display()))
            .arg(format!("-s3.localSocket={}", data.join("s3.sock").display()))
            .current_dir(&data)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(text)?)
            .stderr(output);
        let mut server = Self { child: spawn(command)?, port: ports[0] };
        let end = Instant::now() + READY;
        let mut why = "it does not listen".to_owned();
        while Instant::now() < end && matches!(server.child.try_wait(), Ok(None)) {
            if TcpStream::connect(("127.0.0.1", server.port)).is_ok() {
                match serves(server.port) {
                    Ok(()) => return Ok(server),
                    Err(error) => why = error,
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        server.stop();
        let mut said = String::new();
        let _ = File::open(&log).and_then(|mut file| file.read_to_string(&mut said));
        let end: Vec<&str> = said.lines().rev().take(15).collect();
        Err(format!("{why}\n{}", end.into_iter().rev().collect::<Vec<_>>().join("\n")))
    }

    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it from a thread that lives as long as the process: that is with whom it dies.
fn spawn(mut command: Command) -> Result<Child, String> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        if tell.send(command.spawn()).is_ok() {
            loop {
                std::thread::park();
            }
        }
    });
    let spawned = told.recv().map_err(|error| error.to_string())?;
    spawned.map_err(|error| format!("setpriv: {error}"))
}
