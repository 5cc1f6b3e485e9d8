//! A blocking client over the daemon's unix socket.

use crate::types::{ErrorBody, Line, Progress};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon answers at the socket.
    #[error("no daemon answers at {socket}: {source}")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon answered with an error.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The connection broke off or carried what this client does not understand.
    #[error("the daemon's answer to {request} broke off or makes no sense: {reason}")]
    Broken {
        /// Method and path.
        request: String,
        /// Why.
        reason: String,
    },
}

/// A connection that has become a raw byte stream.
#[derive(Debug)]
pub struct Upgraded {
    /// What came right behind the daemon's answer, and is to be read first.
    pub early: Vec<u8>,
    /// The stream, in blocking form.
    pub stream: std::os::unix::net::UnixStream,
}

/// A client; every request uses a connection of its own.
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// A client of the daemon at `socket`; connects at the first request.
    ///
    /// # Errors
    /// Where the process cannot have another event loop (out of descriptors).
    pub fn new(socket: &Path) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.once(Method::GET, path, Bytes::new())
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.once(Method::DELETE, path, Bytes::new())
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.once(Method::POST, path, json(body))
    }

    /// `PUT path` with a JSON body.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.once(Method::PUT, path, json(body))
    }

    /// Sends all that `source` gives as the body of a request, and tells `progress` how many bytes have gone.
    ///
    /// # Errors
    /// As [`ClientError`] says; a source that fails breaks the request off, and nothing of it takes effect.
    pub fn upload<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        mut source: impl Read + Send + 'static,
        mut progress: impl FnMut(u64) + Send + 'static,
    ) -> Result<T, ClientError> {
        let name = format!("{method} {path}");
        let method = method.parse().map_err(|e| broken(&name, &e))?;
        let (tx, rx) = tokio::sync::mpsc::channel(4);
        // Reading blocks, and would keep the event loop from sending.
        let reader = std::thread::spawn(move || {
            let mut sent = 0;
            loop {
                let mut buffer = vec![0; 1 << 20];
                let chunk = source.read(&mut buffer).map(|n| {
                    buffer.truncate(n);
                    Bytes::from(buffer)
                });
                let over = chunk.as_ref().map_or(true, Bytes::is_empty);
                sent += chunk.as_ref().map_or(0, |c| c.len() as u64);
                if chunk.as_ref().is_ok_and(Bytes::is_empty) || tx.blocking_send(chunk).is_err() || over {
                    return;
                }
                progress(sent);
            }
        });
        let answer = self.runtime.block_on(async {
            let response = self.send(method, path, UnsyncBoxBody::new(Chunks(rx)), false).await?;
            answer(&name, response).await
        });
        // One that waits for more input, though nobody wants it any more, must not be waited for.
        if answer.is_ok() {
            let _ = reader.join();
        }
        answer
    }

    /// Writes the body that `GET path` is answered with to `sink`, as it comes; says how many bytes it had.
    ///
    /// # Errors
    /// As [`ClientError`] says, a body that ends early included; what the sink meets is `Broken`.
    pub fn download(
        &self,
        path: &str,
        sink: &mut dyn Write,
        progress: &mut dyn FnMut(u64),
    ) -> Result<u64, ClientError> {
        let name = format!("GET {path}");
        self.runtime.block_on(async {
            let response = self.send(Method::GET, path, full(Bytes::new()), false).await?;
            if !response.status().is_success() {
                return Err(refusal(&name, response).await);
            }
            let (mut body, mut done) = (response.into_body(), 0);
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| broken(&name, &e))?;
                let Some(data) = frame.data_ref() else { continue };
                sink.write_all(data).map_err(|e| broken(&name, &format!("writing what came: {e}")))?;
                done += data.len() as u64;
                progress(done);
            }
            Ok(done)
        })
    }

    /// `POST path` of a long operation: calls `progress` for each step and returns the result.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn post_long<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut progress: impl FnMut(&Progress),
    ) -> Result<T, ClientError> {
        let name = format!("POST {path}");
        let mut result = None;
        self.stream(Method::POST, path, json(body), |bytes| {
            match serde_json::from_slice::<Line<T>>(bytes) {
                Ok(Line::Progress(p)) => progress(&p),
                Ok(Line::Result(value)) => result = Some(Ok(value)),
                Ok(Line::Error(error)) => result = Some(Err(ClientError::Refused(error))),
                Err(e) => result = Some(Err(broken(&name, &e))),
            }
            Ok(())
        })?;
        result.unwrap_or_else(|| Err(broken(&name, &"no result came")))
    }

    /// `GET path` of a stream of lines: calls `line` with each, without its newline, until the end.
    ///
    /// # Errors
    /// As [`ClientError`] says; what `line` returns ends the stream.
    pub fn get_lines(&self, path: &str, line: impl FnMut(&[u8]) -> Result<(), ClientError>) -> Result<(), ClientError> {
        self.stream(Method::GET, path, Bytes::new(), line)
    }

    /// `GET path` with an upgrade to a raw byte stream.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn upgrade(&self, path: &str) -> Result<Upgraded, ClientError> {
        let name = format!("GET {path}");
        self.runtime.block_on(async {
            let response = self.send(Method::GET, path, full(Bytes::new()), true).await?;
            if response.status() != hyper::StatusCode::SWITCHING_PROTOCOLS {
                return Err(refusal(&name, response).await);
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(|e| broken(&name, &e))?;
            let parts = upgraded.downcast::<TokioIo<UnixStream>>().map_err(|_| broken(&name, &"foreign stream"))?;
            let stream = parts.io.into_inner().into_std().map_err(|e| broken(&name, &e))?;
            stream.set_nonblocking(false).map_err(|e| broken(&name, &e))?;
            Ok(Upgraded { early: parts.read_buf.to_vec(), stream })
        })
    }

    fn once<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let name = format!("{method} {path}");
        self.runtime.block_on(async {
            let response = self.send(method, path, full(body), false).await?;
            answer(&name, response).await
        })
    }

    fn stream(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        mut line: impl FnMut(&[u8]) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        let name = format!("{method} {path}");
        self.runtime.block_on(async {
            let response = self.send(method, path, full(body), false).await?;
            if !response.status().is_success() {
                return Err(refusal(&name, response).await);
            }
            let mut body = response.into_body();
            let mut rest: Vec<u8> = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| broken(&name, &e))?;
                let Some(data) = frame.data_ref() else { continue };
                rest.extend_from_slice(data);
                while let Some(end) = rest.iter().position(|&b| b == b'\n') {
                    let whole: Vec<u8> = rest.drain(..=end).collect();
                    line(&whole[..end])?;
                }
            }
            if rest.is_empty() { Ok(()) } else { line(&rest) }
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
        upgrade: bool,
    ) -> Result<Response<Incoming>, ClientError> {
        let name = format!("{method} {path}");
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&name, &e))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "offshoot")
            .header("content-type", "application/json");
        if upgrade {
            request = request.header("connection", "upgrade").header("upgrade", "offshoot-console");
        }
        let request = request.body(body).map_err(|e| broken(&name, &e))?;
        sender.send_request(request).await.map_err(|e| broken(&name, &e))
    }
}

/// The body of a request.
type Body = UnsyncBoxBody<Bytes, std::io::Error>;

fn full(body: Bytes) -> Body {
    UnsyncBoxBody::new(Full::new(body).map_err(|never| match never {}))
}

/// A body that comes in pieces; an error breaks the request off.
struct Chunks(tokio::sync::mpsc::Receiver<std::io::Result<Bytes>>);

impl hyper::body::Body for Chunks {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

async fn answer<T: DeserializeOwned>(name: &str, response: Response<Incoming>) -> Result<T, ClientError> {
    if !response.status().is_success() {
        return Err(refusal(name, response).await);
    }
    let bytes = response.into_body().collect().await.map_err(|e| broken(name, &e))?.to_bytes();
    serde_json::from_slice(&bytes).map_err(|e| broken(name, &e))
}

fn json(body: &impl Serialize) -> Bytes {
    Bytes::from(serde_json::to_vec(body).expect("wire types serialise"))
}

fn broken(request: &str, reason: &dyn std::fmt::Display) -> ClientError {
    ClientError::Broken { request: request.to_owned(), reason: reason.to_string() }
}

async fn refusal(name: &str, response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let bytes = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(e) => return broken(name, &e),
    };
    match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(error) => ClientError::Refused(error),
        Err(_) => broken(name, &format!("status {status}: {}", String::from_utf8_lossy(&bytes))),
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
