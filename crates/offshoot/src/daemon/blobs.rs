//! Routes of blobs. Bytes come and go as they are, in the bodies of requests and replies.

use super::Daemon;
use super::long::Failure;
use super::routes::{Answer, Shared, blocking};
use api::{
    BlobClone, BlobCreate, BlobFileChange, BlobFileOpen, BlobResize, BlobSnapshotRequest, BlobTag, ErrorBody, ErrorKind,
};
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use base::ByteRange;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Bytes read at a time for a reply.
const CHUNK: u64 = 1 << 20;

pub(super) fn router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/blobs", get(list).post(create))
        .route("/v1/blobs/{name}", get(info).delete(remove))
        .route("/v1/blobs/{name}/data", get(read).put(write).delete(zero))
        .route("/v1/blobs/{name}/append", post(append))
        .route("/v1/blobs/{name}/resize", post(resize))
        .route("/v1/blobs/{name}/log", get(log))
        .route("/v1/blobs/{name}/diff", get(diff))
        .route("/v1/blobs/{name}/clone", post(clone))
        .route("/v1/blobs/{name}/tags/{tag}", put(tag).delete(untag))
        .route("/v1/blobs/{name}/versions/{number}", delete(remove_version))
        .route("/v1/blob-files", get(files))
        .route("/v1/blob-files/open", post(open))
        .route("/v1/blob-files/commit", post(commit_file))
        .route("/v1/blob-files/clone", post(clone_file))
        .route("/v1/blob-files/discard", post(discard_file))
        .route("/v1/blob-snapshots", get(snapshots).post(snapshot))
        .route("/v1/blob-snapshots/{name}", delete(remove_snapshot))
        // What is written is streamed to a file, whatever its size.
        .layer(DefaultBodyLimit::disable())
}

async fn list(State(daemon): Shared) -> Answer<Vec<api::Blob>> {
    blocking(daemon, |d| d.node.blobs()).await.map(Json)
}

async fn create(State(daemon): Shared, Json(request): Json<BlobCreate>) -> Answer<api::Blob> {
    blocking(daemon, move |d| d.node.create_blob(&request)).await.map(Json)
}

async fn info(State(daemon): Shared, Path(name): Path<String>) -> Answer<api::Blob> {
    blocking(daemon, move |d| d.node.blob_info(&name)).await.map(Json)
}

async fn remove(State(daemon): Shared, Path(name): Path<String>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.delete_blob(&name)).await.map(|()| Json(json!({})))
}

#[derive(Deserialize)]
struct Part {
    version: Option<String>,
    #[serde(default)]
    offset: u64,
    length: Option<u64>,
}

/// The bytes of a version. A part that cannot be read breaks the reply off short of its announced length.
async fn read(State(daemon): Shared, Path(name): Path<String>, Query(part): Query<Part>) -> Result<Response, Failure> {
    let named = blocking(daemon.clone(), move |d| {
        d.node.blob_version(&part.version.map_or_else(|| name.clone(), |version| format!("{name}@{version}")))
    })
    .await?;
    let end = part.length.map_or(named.size, |length| part.offset.saturating_add(length));
    if end > named.size || part.offset > end {
        return Err(Failure(ErrorBody {
            kind: ErrorKind::Invalid,
            message: format!(
                "{}@{} has {} bytes: {} to {end} are not in it",
                named.blob, named.number, named.size, part.offset
            ),
        }));
    }
    let (tx, rx) = mpsc::channel::<std::io::Result<Bytes>>(4);
    let number = named.number;
    tokio::task::spawn_blocking(move || {
        let mut at = part.offset;
        while at < end {
            let mut buffer = vec![0; (end - at).min(CHUNK - at % CHUNK) as usize];
            at += buffer.len() as u64;
            let start = at - buffer.len() as u64;
            let read = daemon.node.read_blob(&named, start, &mut buffer);
            let failed = read.is_err();
            let chunk = read.map(|()| Bytes::from(buffer)).map_err(|error| {
                log::error!("reading {}@{} at {start}: {}", named.blob, named.number, error.whole());
                std::io::Error::other(error.whole())
            });
            if tx.blocking_send(chunk).is_err() || failed {
                return;
            }
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, (end - part.offset).to_string()),
        (header::ETAG, format!("\"{number}\"")),
    ];
    Ok((headers, Body::from_stream(ReceiverStream::new(rx))).into_response())
}

#[derive(Deserialize)]
struct Offset {
    #[serde(default)]
    offset: u64,
}

async fn write(
    State(daemon): Shared,
    Path(name): Path<String>,
    Query(at): Query<Offset>,
    body: Body,
) -> Answer<api::BlobChanged> {
    store(daemon, name, Some(at.offset), body).await
}

async fn append(State(daemon): Shared, Path(name): Path<String>, body: Body) -> Answer<api::BlobChanged> {
    store(daemon, name, None, body).await
}

/// Keeps the body in a file without a name until all of it is there: it becomes one version, or none.
async fn store(daemon: Arc<Daemon>, name: String, offset: Option<u64>, body: Body) -> Answer<api::BlobChanged> {
    let mut body = body.into_data_stream();
    let (tx, mut rx) = mpsc::channel::<Bytes>(8);
    let spool = tokio::task::spawn_blocking({
        let daemon = daemon.clone();
        move || -> node::Result<(File, u64)> {
            let home = daemon.node.shared.home.root();
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::CLOEXEC;
            let opened = rustix::fs::open(home, flags, rustix::fs::Mode::from_raw_mode(0o600));
            let mut file = File::from(opened.map_err(|e| node::Error::io("make a file in", home)(e.into()))?);
            let mut bytes = 0;
            while let Some(chunk) = rx.blocking_recv() {
                file.write_all(&chunk).map_err(node::Error::io("keep what comes in", home))?;
                bytes += chunk.len() as u64;
            }
            Ok((file, bytes))
        }
    });
    let mut broken = None;
    while let Some(chunk) = body.next().await {
        match chunk {
            Ok(chunk) => {
                // Where the host is full, the spool says so.
                if tx.send(chunk).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(tx);
    let spooled = spool.await;
    if let Some(error) = broken {
        let message = format!("the bytes for {name} broke off, and nothing was written: {error}");
        return Err(Failure(ErrorBody { kind: ErrorKind::Invalid, message }));
    }
    let (file, bytes) = spooled.map_err(|e| {
        Failure(ErrorBody { kind: ErrorKind::Internal, message: format!("a defect in the daemon: {e}") })
    })??;
    blocking(daemon, move |d| d.node.write_blob(&name, offset, &file, bytes)).await.map(Json)
}

#[derive(Deserialize)]
struct Zero {
    offset: u64,
    length: u64,
}

async fn zero(State(daemon): Shared, Path(name): Path<String>, Query(zero): Query<Zero>) -> Answer<api::BlobChanged> {
    let range = ByteRange::new(zero.offset, zero.offset.saturating_add(zero.length));
    blocking(daemon, move |d| d.node.zero_blob(&name, range)).await.map(Json)
}

async fn resize(
    State(daemon): Shared,
    Path(name): Path<String>,
    Json(request): Json<BlobResize>,
) -> Answer<api::BlobChanged> {
    blocking(daemon, move |d| d.node.resize_blob(&name, request.size_bytes)).await.map(Json)
}

#[derive(Deserialize)]
struct Span {
    #[serde(default)]
    from: u64,
    to: Option<u64>,
}

async fn log(
    State(daemon): Shared,
    Path(name): Path<String>,
    Query(span): Query<Span>,
) -> Answer<Vec<api::BlobVersion>> {
    blocking(daemon, move |d| d.node.blob_log(&name, span.from..span.to.unwrap_or(u64::MAX))).await.map(Json)
}

#[derive(Deserialize)]
struct Two {
    from: String,
    to: String,
}

async fn diff(State(daemon): Shared, Path(name): Path<String>, Query(two): Query<Two>) -> Answer<api::BlobDiff> {
    blocking(daemon, move |d| d.node.blob_diff(&name, &two.from, &two.to)).await.map(Json)
}

async fn clone(
    State(daemon): Shared,
    Path(name): Path<String>,
    Json(request): Json<BlobClone>,
) -> Answer<Vec<api::Blob>> {
    blocking(daemon, move |d| d.node.clone_blob(&name, &request)).await.map(Json)
}

async fn tag(
    State(daemon): Shared,
    Path((name, tag)): Path<(String, String)>,
    Json(request): Json<BlobTag>,
) -> Answer<api::BlobChanged> {
    blocking(daemon, move |d| d.node.tag_blob(&name, &tag, request.number)).await.map(Json)
}

async fn untag(State(daemon): Shared, Path((name, tag)): Path<(String, String)>) -> Answer<api::BlobChanged> {
    blocking(daemon, move |d| d.node.untag_blob(&name, &tag)).await.map(Json)
}

async fn remove_version(State(daemon): Shared, Path((name, number)): Path<(String, u64)>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.delete_blob_version(&name, number)).await.map(|()| Json(json!({})))
}

async fn files(State(daemon): Shared) -> Answer<Vec<api::BlobFile>> {
    blocking(daemon, |d| d.node.blob_files()).await.map(Json)
}

async fn open(State(daemon): Shared, Json(request): Json<BlobFileOpen>) -> Answer<api::BlobFile> {
    blocking(daemon, move |d| d.node.blob_path(&request.version)).await.map(Json)
}

async fn commit_file(State(daemon): Shared, Json(file): Json<BlobFileChange>) -> Answer<api::BlobFile> {
    blocking(daemon, move |d| {
        let number = d.node.commit_blob_file(&file.blob, file.number)?;
        d.node.blob_path(&format!("{}@{number}", file.blob))
    })
    .await
    .map(Json)
}

async fn clone_file(State(daemon): Shared, Json(file): Json<BlobFileChange>) -> Answer<api::BlobFile> {
    blocking(daemon, move |d| {
        let name = file.name.ok_or_else(|| node::Error::Invalid("a clone needs a name".into()))?;
        let number = d.node.clone_blob_file(&file.blob, file.number, &name)?;
        d.node.blob_path(&format!("{name}@{number}"))
    })
    .await
    .map(Json)
}

async fn discard_file(State(daemon): Shared, Json(file): Json<BlobFileChange>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.discard_blob_file(&file.blob, file.number)).await.map(|()| Json(json!({})))
}

async fn snapshots(State(daemon): Shared) -> Answer<Vec<api::BlobSnapshot>> {
    blocking(daemon, |d| d.node.blob_snapshots()).await.map(Json)
}

async fn snapshot(State(daemon): Shared, Json(request): Json<BlobSnapshotRequest>) -> Answer<api::BlobSnapshot> {
    blocking(daemon, move |d| d.node.snapshot_blobs(&request)).await.map(Json)
}

async fn remove_snapshot(State(daemon): Shared, Path(name): Path<String>) -> Answer<Value> {
    blocking(daemon, move |d| d.node.delete_blob_snapshot(&name)).await.map(|()| Json(json!({})))
}
