//! The node daemon: HTTP over a unix socket around [`node::Node`], and the entry of the mirror process.
//!
//! The node's functions block, so each request runs on a blocking thread; the event loop only moves bytes.

mod blobs;
mod colors;
mod console;
mod long;
mod routes;
mod stores;

use node::{Home, Node, Place};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The resident library, carried inside.
const LIBRARY: &[u8] = include_bytes!(env!("RESIDENT_LIBRARY"));

/// What every request can reach.
pub(crate) struct Daemon {
    node: Node,
    stop_vms: AtomicBool,
    shutdown: tokio::sync::Notify,
}

/// The lock that one daemon of a home holds; it is free again when the file is dropped.
fn lock_file(home: &Path) -> Result<File, String> {
    let path = home.join("run/daemon.lock");
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| format!("open {}: {e}", path.display()))
}

/// Whether some daemon holds the lock of `home`. Whoever asks shares the lock for a moment, which only a daemon's
/// own hold of it refuses: many may ask at once, and are not taken for a daemon.
pub(crate) fn held(home: &Path) -> bool {
    let shared = |file: &File| rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).is_ok();
    !lock_file(home).is_ok_and(|file| shared(&file))
}

/// Takes the lock. Those who ask whether it is [`held`] are waited for; a daemon that holds it is not, or this one
/// would come to serve when that one has just been told to end.
fn lock(home: &Path) -> Result<File, String> {
    let file = lock_file(home)?;
    for _ in 0..1000 {
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        if held(home) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Err(format!("another daemon runs for {}", home.display()))
}

/// Each VM takes some descriptors, each pack of the store one: the usual limit of 1024 would end at some hundred VMs.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum }) {
        log::warn!("the limit of open files stays at {:?}: {error}", now.current);
    }
}

/// Runs the daemon until it is told to end.
pub(crate) fn serve(
    home: &Path,
    store: Option<&str>,
    cache_bytes: Option<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    log_to_stderr();
    raise_descriptor_limit();
    let directories = Home::open(home)?;
    let _lock = lock(directories.root())?;
    let socket = directories.daemon_socket();
    let library = install_library(&directories)?;
    let root = directories.root().to_owned();
    drop(directories);
    Place::settle(&root, store, cache_bytes).map_err(|error| error.whole())?;
    let node = Node::open(&root, library).map_err(|error| error.whole())?;
    let daemon = Arc::new(Daemon { node, stop_vms: AtomicBool::new(false), shutdown: tokio::sync::Notify::new() });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(512).enable_all().build()?;
    log::info!("serving {} on {}", root.display(), socket.display());
    let served = runtime.block_on(listen(&socket, daemon.clone()));
    let _ = std::fs::remove_file(&socket);
    daemon.node.close(daemon.stop_vms.load(Ordering::Acquire));
    // Requests that wait for a VM's end must not keep the daemon.
    runtime.shutdown_background();
    served.map_err(Into::into)
}

async fn listen(socket: &Path, daemon: Arc<Daemon>) -> std::io::Result<()> {
    let _ = std::fs::remove_file(socket);
    // Nobody may connect between bind and chmod: the directory is ours alone, and so is the socket from the start.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = tokio::net::UnixListener::bind(socket);
    rustix::process::umask(before);
    let listener = bound?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    let app = routes::router(daemon.clone());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    tokio::select! {
        served = axum::serve(listener, app).into_future() => served,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = daemon.shutdown.notified() => Ok(()),
    }
}

/// Runs the mirror process; with `take_over`, on the FUSE session whose descriptor is the standard input.
pub(crate) fn mirror(home: &Path, take_over: bool) -> Result<(), Box<dyn std::error::Error>> {
    log_to_stderr();
    // It was started through /proc/self/exe, and would show as `exe`.
    let _ = rustix::thread::set_name(c"offshoot-mirror");
    let mut config = mirror::Config::new(home);
    if take_over {
        config.fuse_fd = Some(std::io::stdin().as_fd().try_clone_to_owned()?);
    }
    let versions = match Place::of(home)? {
        Some(place) => place.versions(home)?,
        None => Arc::new(mirror::StoreVersions::open(&home.join("store"))?),
    };
    mirror::run(config, versions)?;
    Ok(())
}

/// Puts the library where hypervisors can load it, under a name that changes with its content: those that run keep
/// theirs.
fn install_library(home: &Home) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let hash = blake3::hash(LIBRARY).to_hex();
    let path = home.path(&format!("run/libresident-{}.so", &hash[..16]));
    if std::fs::read(&path).is_ok_and(|found| found == LIBRARY) {
        return Ok(path);
    }
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(LIBRARY)?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)?;
    Ok(path)
}

fn log_to_stderr() {
    let environment = env_logger::Env::default().filter_or("OFFSHOOT_LOG", "info");
    let _ = env_logger::Builder::from_env(environment).format_target(false).format_timestamp_millis().try_init();
}
