//! The routes of the HTTP API; `docs/api.md` describes them.

use super::Daemon;
use super::long::{Failure, respond};
use super::{blobs, colors, console, long, stores};
use api::{
    BalloonRequest, BuildRequest, Ended, ForkRequest, ImportRequest, NbdRequest, RunRequest, SnapshotRequest,
    StopRequest, Version,
};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub(super) type Shared = State<Arc<Daemon>>;
pub(super) type Answer<T> = Result<Json<T>, Failure>;

/// All routes.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/stats", get(stats))
        .route("/v1/verify", post(verify))
        .route("/v1/shutdown", post(shutdown))
        .route("/v1/vms", get(list_vms).post(run))
        .route("/v1/vms/{name}", get(inspect).delete(remove))
        .route("/v1/vms/{name}/fork", post(fork))
        .route("/v1/vms/{name}/snapshot", post(snapshot))
        .route("/v1/vms/{name}/stats", get(vm_stats))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/wait", get(wait))
        .route("/v1/vms/{name}/balloon", post(balloon))
        .route("/v1/vms/{name}/logs", get(console::logs))
        .route("/v1/vms/{name}/console", get(console::console))
        .route("/v1/snapshots", get(snapshots))
        .route("/v1/snapshots/{name}", axum::routing::delete(remove_snapshot))
        .route("/v1/snapshots/{name}/arrange", post(arrange_snapshot))
        .route("/v1/images/{name}/arrange", post(arrange_image))
        .route("/v1/images", get(images))
        .route("/v1/images/build", post(build_image))
        .route("/v1/images/import", post(import_image))
        .route("/v1/images/{name}", get(inspect_image).delete(remove_image))
        .merge(blobs::router())
        .merge(colors::router())
        .merge(stores::router())
        .route("/v1/nbd", get(nbd_exports).post(serve_nbd))
        .route("/v1/nbd/{name}", axum::routing::delete(stop_nbd))
        .fallback(unknown)
        .with_state(daemon)
}

/// Runs a blocking function of the node.
pub(super) async fn blocking<T: Send + 'static>(
    daemon: Arc<Daemon>,
    work: impl FnOnce(&Daemon) -> node::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(move || work(&daemon)).await {
        Ok(outcome) => Ok(outcome?),
        Err(panic) => Err(Failure(api::ErrorBody {
            kind: api::ErrorKind::Internal,
            message: format!("a defect in the daemon: {panic}; its log says where"),
        })),
    }
}

async fn unknown(request: axum::extract::Request) -> Failure {
    let message = format!("there is no {} {}; docs/api.md lists the routes", request.method(), request.uri().path());
    Failure(api::ErrorBody { kind: api::ErrorKind::NotFound, message })
}

async fn version(State(daemon): Shared) -> Json<Version> {
    Json(Version {
        program: env!("CARGO_PKG_VERSION").into(),
        api: api::VERSION,
        pid: std::process::id(),
        home: daemon.node.shared.home.root().display().to_string(),
    })
}

async fn stats(State(daemon): Shared) -> Answer<api::NodeStats> {
    blocking(daemon, |d| d.node.node_stats()).await.map(Json)
}

async fn verify(State(daemon): Shared) -> Response {
    respond(move |reporter| daemon.node.verify(&mut |done, total| reporter.report("verifying", done, total)))
}

#[derive(Deserialize)]
struct Shutdown {
    #[serde(default)]
    stop: bool,
}

async fn shutdown(State(daemon): Shared, Query(how): Query<Shutdown>) -> Json<Value> {
    daemon.stop_vms.store(how.stop, Ordering::Release);
    daemon.shutdown.notify_one();
    Json(json!({}))
}

async fn list_vms(State(daemon): Shared) -> Answer<Vec<api::Vm>> {
    blocking(daemon, |d| Ok(d.node.vms().iter().map(|vm| d.node.listed(vm)).collect())).await.map(Json)
}

async fn run(State(daemon): Shared, Json(request): Json<RunRequest>) -> Answer<api::Vm> {
    blocking(daemon, move |d| d.node.run(&request).map(|vm| d.node.listed(&vm))).await.map(Json)
}

async fn inspect(State(daemon): Shared, Path(name): Path<String>) -> Answer<api::VmDetail> {
    blocking(daemon, move |d| d.node.vm(&name).map(|vm| d.node.detail(&vm))).await.map(Json)
}

#[derive(Deserialize)]
struct Remove {
    #[serde(default)]
    force: bool,
}

async fn remove(State(daemon): Shared, Path(name): Path<String>, Query(how): Query<Remove>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.remove(&name, how.force)).await.map(|()| Json(json!({})))
}

async fn fork(State(daemon): Shared, Path(name): Path<String>, Json(request): Json<ForkRequest>) -> Response {
    respond(move |reporter| {
        daemon.node.fork(&name, &request, &mut |step, done, total| reporter.report(step, done, total))
    })
}

async fn snapshot(State(daemon): Shared, Path(name): Path<String>, Json(request): Json<SnapshotRequest>) -> Response {
    respond(move |reporter| {
        daemon
            .node
            .take_snapshot(&name, request.tag.as_deref(), &mut |step, done, total| reporter.report(step, done, total))
    })
}

#[derive(Deserialize)]
struct StatsOf {
    #[serde(default)]
    by_color: bool,
}

async fn vm_stats(State(daemon): Shared, Path(name): Path<String>, Query(of): Query<StatsOf>) -> Answer<api::VmStats> {
    blocking(daemon, move |d| d.node.vm(&name).and_then(|vm| d.node.stats(&vm, of.by_color))).await.map(Json)
}

async fn stop(State(daemon): Shared, Path(name): Path<String>, Json(request): Json<StopRequest>) -> Answer<Value> {
    blocking(daemon, move |d| {
        let vm = d.node.vm(&name)?;
        if vm.wait(Duration::ZERO).is_some() {
            return Ok(());
        }
        vm.stop(Duration::from_secs(request.grace_s))
    })
    .await
    .map(|()| Json(json!({})))
}

async fn wait(State(daemon): Shared, Path(name): Path<String>) -> Answer<Ended> {
    blocking(daemon, move |d| {
        let vm = d.node.vm(&name)?;
        let detail = vm.wait(Duration::from_secs(365 * 86_400)).unwrap_or_else(|| "still running".into());
        Ok(Ended { name, detail })
    })
    .await
    .map(Json)
}

async fn balloon(
    State(daemon): Shared,
    Path(name): Path<String>,
    Json(request): Json<BalloonRequest>,
) -> Answer<Value> {
    blocking(daemon, move |d| d.node.vm(&name)?.balloon(request.bytes)).await.map(|()| Json(json!({})))
}

async fn snapshots(State(daemon): Shared) -> Answer<Vec<api::Snapshot>> {
    blocking(daemon, |d| d.node.snapshots()).await.map(Json)
}

async fn remove_snapshot(State(daemon): Shared, Path(name): Path<String>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.remove_snapshot(&name)).await.map(|()| Json(json!({})))
}

async fn arrange_snapshot(State(daemon): Shared, Path(name): Path<String>) -> Response {
    respond(move |reporter| {
        daemon.node.arrange_snapshot(&name, &mut |step, done, total| reporter.report(step, done, total))
    })
}

async fn arrange_image(State(daemon): Shared, Path(name): Path<String>) -> Response {
    respond(move |reporter| {
        daemon.node.arrange_image(&name, &mut |step, done, total| reporter.report(step, done, total))
    })
}

async fn images(State(daemon): Shared) -> Answer<Vec<api::Image>> {
    blocking(daemon, |d| d.node.images()).await.map(Json)
}

async fn build_image(State(daemon): Shared, Json(request): Json<BuildRequest>) -> Response {
    long::respond(move |reporter| {
        daemon.node.build_image(&request, &mut |step, done, total| reporter.report(step, done, total))
    })
}

async fn import_image(State(daemon): Shared, Json(request): Json<ImportRequest>) -> Response {
    long::respond(move |reporter| {
        daemon.node.import_image(&request, &mut |step, done, total| reporter.report(step, done, total))
    })
}

async fn inspect_image(State(daemon): Shared, Path(name): Path<String>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.image(&name)).await.map(Json)
}

async fn remove_image(State(daemon): Shared, Path(name): Path<String>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.remove_image(&name)).await.map(|()| Json(json!({})))
}

async fn nbd_exports(State(daemon): Shared) -> Answer<Vec<api::NbdExport>> {
    blocking(daemon, |d| d.node.nbd_exports()).await.map(Json)
}

async fn serve_nbd(State(daemon): Shared, Json(request): Json<NbdRequest>) -> Answer<api::NbdExport> {
    blocking(daemon, move |d| d.node.serve_nbd(&request)).await.map(Json)
}

#[derive(Deserialize)]
struct StopNbd {
    #[serde(default)]
    discard: bool,
}

async fn stop_nbd(State(daemon): Shared, Path(name): Path<String>, Query(how): Query<StopNbd>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.stop_nbd(&name, how.discard)).await.map(|()| Json(json!({})))
}
