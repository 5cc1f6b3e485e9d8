//! Routes that show what memory is for.

use super::Daemon;
use super::routes::{Answer, Shared, blocking};
use api::{Colors, DedupReport, DedupRequest};
use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/vms/{name}/colors", get(of_vm))
        .route("/v1/snapshots/{vm}/{tag}/colors", get(of_snapshot))
        .route("/v1/dedup", post(dedup))
}

#[derive(Deserialize)]
struct Age {
    #[serde(default)]
    age_ms: u64,
}

async fn of_vm(State(daemon): Shared, Path(name): Path<String>, Query(at_most): Query<Age>) -> Answer<Colors> {
    blocking(daemon, move |d| {
        let vm = d.node.vm(&name)?;
        d.node.vm_colors(&vm, Duration::from_millis(at_most.age_ms))
    })
    .await
    .map(Json)
}

async fn of_snapshot(State(daemon): Shared, Path((vm, tag)): Path<(String, String)>) -> Answer<Colors> {
    blocking(daemon, move |d| d.node.snapshot_colors(&format!("{vm}@{tag}"))).await.map(Json)
}

async fn dedup(State(daemon): Shared, Json(request): Json<DedupRequest>) -> Answer<DedupReport> {
    blocking(daemon, move |d| d.node.dedup(&request)).await.map(Json)
}
