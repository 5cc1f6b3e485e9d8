//! Routes of other stores, and of cleaning up.

use super::Daemon;
use super::long::respond;
use super::routes::{Answer, Shared, blocking};
use api::{GcReply, GcRequest, RemoteRequest, StoreReport, Stored, TransferRequest, WarmRequest};
use axum::extract::State;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use std::sync::Arc;

pub(super) fn router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/push", post(push))
        .route("/v1/pull", post(pull))
        .route("/v1/remote", post(remote))
        .route("/v1/gc", post(gc))
        .route("/v1/warm", post(warm))
        .route("/v1/store", get(store))
}

async fn push(State(daemon): Shared, Json(request): Json<TransferRequest>) -> Response {
    respond(move |reporter| daemon.node.push(&request, &mut |step, done, total| reporter.report(step, done, total)))
}

async fn pull(State(daemon): Shared, Json(request): Json<TransferRequest>) -> Response {
    respond(move |reporter| daemon.node.pull(&request, &mut |step, done, total| reporter.report(step, done, total)))
}

async fn remote(State(daemon): Shared, Json(request): Json<RemoteRequest>) -> Answer<Vec<Stored>> {
    blocking(daemon, move |d| d.node.remote(&request)).await.map(Json)
}

async fn warm(State(daemon): Shared, Json(request): Json<WarmRequest>) -> Response {
    respond(move |reporter| daemon.node.warm(&request, &mut |step, done, total| reporter.report(step, done, total)))
}

async fn store(State(daemon): Shared) -> Answer<StoreReport> {
    blocking(daemon, |d| d.node.store_report()).await.map(Json)
}

async fn gc(State(daemon): Shared, Json(request): Json<GcRequest>) -> Answer<GcReply> {
    blocking(daemon, move |d| d.node.gc(&request)).await.map(Json)
}
