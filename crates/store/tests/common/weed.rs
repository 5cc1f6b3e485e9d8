//! A real S3 server for a test program: SeaweedFS, started when first wanted, gone when the program is.

#![allow(dead_code, missing_docs, unreachable_pub)]

#[path = "seaweed.rs"]
mod seaweed;

use seaweed::Seaweed;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
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

fn start() -> Weed {
    // The build directory, wherever cargo put it: its folder for tests' files is one below.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let limits =
        Limits { attempts: 1, attempt: Duration::from_secs(5), circuit_failures: u32::MAX, ..Limits::default() };
    let serves = |port: u16| {
        let url = url_at(&format!("http://127.0.0.1:{port}"), "ready");
        let engine = S3::open_with(&url, credentials(), limits).map_err(|error| error.to_string())?;
        engine.put("ready", b"x").and_then(|()| engine.prove()).map_err(|error| error.to_string())
    };
    let server = Seaweed::start(target, &directory(), (KEY_ID, SECRET), &serves).unwrap_or_else(|why| panic!("{why}"));
    Weed { endpoint: format!("http://127.0.0.1:{}", server.port), port: server.port }
}
