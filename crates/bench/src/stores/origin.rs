//! A real S3 server to measure against, SeaweedFS, and a line to it that can be made longer.

#[path = "../../../store/tests/common/seaweed.rs"]
mod seaweed;

use crate::Outcome;
use seaweed::Seaweed;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::engine::object::{Credentials, Limits};
use store::engine::{Engine as _, S3};
use store::{Mode, Store};

const KEY_ID: &str = "OFFSHOOTBENCHKEY";
const SECRET: &str = "the-secret-of-the-benchmarks-0123456789";
const BUCKET: &str = "offshoot";

/// The server; ends when dropped.
pub(super) struct Origin(Seaweed);

impl Drop for Origin {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn credentials() -> Credentials {
    Credentials { key_id: KEY_ID.to_owned(), secret: SECRET.to_owned(), token: None }
}

fn engine(port: u16, prefix: &str) -> Outcome<S3> {
    let url = format!("s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port}");
    let engine = S3::open_with(&url, credentials(), Limits::default())?;
    // This server makes a bucket with its first object; to be asked what is in one that is not there is an error.
    engine.prove()?;
    Ok(engine)
}

/// Where `weed` is; installed below the build directory where it is not there.
pub(super) fn program() -> Outcome<PathBuf> {
    Ok(seaweed::program(&crate::build_directory())?)
}

impl Origin {
    /// Starts the server with its data in `dir`.
    pub(super) fn start(dir: &Path) -> Outcome<Self> {
        let serves = |port| {
            let opened = engine(port, "ready").and_then(|e| Ok(Store::open_engine(Arc::new(e), Mode::Shared)?));
            opened.map(drop).map_err(|error| error.to_string())
        };
        Ok(Self(Seaweed::start(&crate::build_directory(), dir, (KEY_ID, SECRET), &serves)?))
    }

    /// The server under a prefix, over a line that adds `delay` to each request.
    pub(super) fn engine(&self, prefix: &str, delay: Duration) -> Outcome<S3> {
        engine(if delay.is_zero() { self.0.port } else { longer(self.0.port, delay)? }, prefix)
    }

    /// Opens the store under a prefix, over a line that adds `delay` to each request.
    pub(super) fn open(&self, prefix: &str, delay: Duration) -> Outcome<Arc<Store>> {
        Ok(Arc::new(Store::open_engine(Arc::new(self.engine(prefix, delay)?), Mode::Shared)?))
    }
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
pub(crate) fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
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
