//! A VM's console: what it showed, and a line to it.

use super::Daemon;
use super::long::{self, Failure};
use super::routes::blocking;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::io::{Read, Seek};
use std::sync::Arc;
use std::time::Duration;
use vmm::qemu::Files;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
pub(super) struct Logs {
    #[serde(default)]
    follow: bool,
    #[serde(default)]
    which: Option<String>,
}

/// `GET …/logs`: the console's log or the hypervisor's.
pub(super) async fn logs(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Query(how): Query<Logs>,
) -> Result<Response, Failure> {
    let (vm, path) = blocking(daemon, move |d| {
        let vm = d.node.vm(&name)?;
        let files = Files { dir: d.node.shared.home.vm_dir(vm.id) };
        let path = match how.which.as_deref().unwrap_or("console") {
            "console" => files.console_log(),
            "hypervisor" => files.hypervisor_log(),
            other => return Err(node::Error::Invalid(format!("which={other}: console or hypervisor"))),
        };
        Ok((vm, path))
    })
    .await?;
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
    tokio::task::spawn_blocking(move || {
        let mut at = 0;
        loop {
            let ended = vm.wait(Duration::ZERO).is_some();
            let mut bytes = Vec::new();
            if let Ok(mut file) = std::fs::File::open(&path)
                && file.seek(std::io::SeekFrom::Start(at)).is_ok()
                && file.take(1 << 20).read_to_end(&mut bytes).is_ok()
                && !bytes.is_empty()
            {
                at += bytes.len() as u64;
                if tx.send(bytes).is_err() {
                    return;
                }
                continue;
            }
            if !how.follow || ended || tx.is_closed() {
                return;
            }
            std::thread::sleep(LOOK);
        }
    });
    Ok(long::stream(rx))
}

/// `GET …/console`: upgrades to a stream that is the guest's serial line.
pub(super) async fn console(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, Failure> {
    let path = blocking(daemon, move |d| {
        let vm = d.node.vm(&name)?;
        match vm.wait(Duration::ZERO) {
            Some(detail) => Err(node::Error::Conflict(format!("{name} is not running: {detail}"))),
            None => Ok(Files { dir: d.node.shared.home.vm_dir(vm.id) }.console()),
        }
    })
    .await?;
    let conflict = |message: String| Failure(api::ErrorBody { kind: api::ErrorKind::Conflict, message });
    let mut guest = tokio::net::UnixStream::connect(&path)
        .await
        .map_err(|e| conflict(format!("connect to {}: {e}", path.display())))?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => drop(tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut guest).await),
            Err(error) => log::warn!("console: {error}"),
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "offshoot-console")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}
