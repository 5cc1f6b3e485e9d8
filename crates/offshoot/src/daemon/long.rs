//! Long operations: a stream of lines, progress first and the outcome last.

use api::{ErrorBody, Line, Progress};
use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

/// How often progress within one step is sent.
const EVERY: Duration = Duration::from_millis(100);

/// Tells the client how far an operation is.
pub(super) struct Reporter {
    tx: mpsc::UnboundedSender<Vec<u8>>,
    last: Option<(String, Instant)>,
}

impl Reporter {
    /// Reports `done` of `total` units of `step`; within a step not more often than a person can see.
    pub(super) fn report(&mut self, step: &str, done: u64, total: u64) {
        if let Some((last, at)) = &self.last
            && last == step
            && at.elapsed() < EVERY
            && done < total
        {
            return;
        }
        self.last = Some((step.to_owned(), Instant::now()));
        self.send(&Line::<()>::Progress(Progress { step: step.to_owned(), done, total }));
    }

    fn send<T: Serialize>(&self, line: &Line<T>) {
        let mut bytes = serde_json::to_vec(line).expect("wire types serialise");
        bytes.push(b'\n');
        // A client that went away does not stop the operation: half a fork would be worse than an unseen one.
        let _ = self.tx.send(bytes);
    }
}

/// Answers with the lines of `operation`, which runs on a thread that may block.
pub(super) fn respond<T: Serialize + Send + 'static>(
    operation: impl FnOnce(&mut Reporter) -> node::Result<T> + Send + 'static,
) -> Response {
    let (tx, rx) = mpsc::unbounded_channel();
    tokio::task::spawn_blocking(move || {
        let mut reporter = Reporter { tx, last: None };
        let outcome = operation(&mut reporter);
        reporter.send(&match outcome {
            Ok(value) => Line::Result(value),
            Err(error) => Line::Error(error.body()),
        });
    });
    stream(rx)
}

/// A response whose body is what arrives.
pub(super) fn stream(rx: mpsc::UnboundedReceiver<Vec<u8>>) -> Response {
    let body = Body::from_stream(UnboundedReceiverStream::new(rx).map(Ok::<_, std::convert::Infallible>));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// An error as a response of its own.
pub(super) struct Failure(pub(super) ErrorBody);

impl From<node::Error> for Failure {
    fn from(error: node::Error) -> Self {
        Self(error.body())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = axum::http::StatusCode::from_u16(self.0.kind.status())
            .unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(self.0)).into_response()
    }
}
