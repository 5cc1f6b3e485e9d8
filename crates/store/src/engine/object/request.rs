//! One request after another to one server, each with its time limit, repeats and the circuit breaker.

use super::address::{Address, Credentials};
use super::circuit::{Breaker, Limits, random_u64};
use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{
    Attribute, AttributeValue, Attributes, GetOptions, ObjectStore, PutMode, PutOptions, PutPayload, UpdateVersion,
};
use std::future::Future;
use std::io;
use std::time::Duration;

/// The header, after `x-amz-meta-`, by which a writer knows its own put again.
const PUT_MARK: &str = "offshoot-put";

/// Why a request failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// There is no such object.
    NotFound,
    /// The object is not in the state that the request asked for.
    Refused,
    /// The range starts or ends beyond the object.
    Beyond,
    /// The server will not, and asking again will not help.
    Denied(String),
    /// No answer, or none that makes sense; it may pass.
    Away(String),
    /// Not sent: the server is taken to be away.
    NotSent(String),
}

impl Failure {
    /// What an error of the client means. The server's words are kept, credentials are not.
    fn of(error: &object_store::Error, credentials: Option<&Credentials>) -> Self {
        use object_store::Error as E;
        let text = describe(error, credentials);
        match error {
            E::NotFound { .. } => Self::NotFound,
            E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => Self::Refused,
            E::Generic { .. } => match status(&text) {
                Some(416) => Self::Beyond,
                Some(408 | 425 | 429) | None => Self::Away(text),
                Some(status) if (400..500).contains(&status) => Self::Denied(text),
                Some(_) => Self::Away(text),
            },
            _ => Self::Denied(text),
        }
    }

    /// As an IO error of `what` on `object`.
    pub(crate) fn to_io(&self, server: &str, what: &str, object: &str) -> io::Error {
        let (kind, why) = match self {
            Self::NotFound => (io::ErrorKind::NotFound, "there is no such object"),
            Self::Refused => (io::ErrorKind::AlreadyExists, "the object is not in the state asked for"),
            Self::Beyond => (io::ErrorKind::UnexpectedEof, "the object is shorter"),
            Self::Denied(why) => (io::ErrorKind::PermissionDenied, why.as_str()),
            Self::Away(why) => (io::ErrorKind::TimedOut, why.as_str()),
            Self::NotSent(why) => (io::ErrorKind::NotConnected, why.as_str()),
        };
        io::Error::new(kind, format!("cannot {what} {object} of {server}: {why}"))
    }
}

/// The status in the client's message.
fn status(text: &str) -> Option<u16> {
    let at = text.find("status code: ")? + "status code: ".len();
    text.get(at..at + 3)?.parse().ok()
}

/// An error and its sources on one line, without credentials, not too long.
fn describe(error: &object_store::Error, credentials: Option<&Credentials>) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    let text = credentials.map_or(text.clone(), |credentials| credentials.hide(&text));
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(400).collect()
}

/// What a put did to an object that others may put as well.
pub(crate) enum Swapped {
    /// It is ours, in the state of this tag.
    Done(String),
    /// It was in another state: that of this tag, or absent.
    Other(Option<String>),
}

/// A whole object.
pub(crate) struct Whole {
    pub(crate) bytes: Vec<u8>,
    pub(crate) etag: Option<String>,
    mark: Option<String>,
}

/// The way to one server. Shared with the tasks that run on the engine's runtime.
pub(crate) struct Link {
    pub(crate) s3: AmazonS3,
    pub(crate) address: Address,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) limits: Limits,
    pub(crate) breaker: Breaker,
}

impl Link {
    pub(crate) fn path(&self, name: &str) -> Path {
        Path::from(self.address.key(name))
    }

    /// One attempt, within its time limit and if the circuit lets it through.
    pub(crate) async fn attempt<T>(
        &self,
        is_repeat: bool,
        limit: Duration,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Failure> {
        self.breaker.admit(is_repeat).map_err(Failure::NotSent)?;
        let done = match tokio::time::timeout(limit, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Failure::of(&error, self.credentials.as_ref())),
            Err(_) => Err(Failure::Away(format!("no answer within {limit:?}"))),
        };
        self.breaker.record(match &done {
            Err(Failure::Away(what)) => Some(what),
            _ => None,
        });
        done
    }

    /// Repeats a request, which must do no harm when done twice, until it succeeds, is answered, or its attempts
    /// are used up. `bytes` is what it carries.
    pub(crate) async fn repeat<T, F>(&self, bytes: usize, request: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let mut number = 0;
        loop {
            match self.attempt(number > 0, self.limits.attempt_for(bytes), request()).await {
                Err(Failure::Away(why)) if number + 1 >= self.limits.attempts => {
                    return Err(Failure::Away(format!("{why} ({} attempts)", number + 1)));
                }
                Err(Failure::Away(_)) => {
                    number += 1;
                    tokio::time::sleep(self.limits.pause(number)).await;
                }
                done => return done,
            }
        }
    }

    pub(crate) async fn put(&self, path: &Path, bytes: PutPayload) -> Result<(), Failure> {
        let len = bytes.content_length();
        self.repeat(len, || self.s3.put_opts(path, bytes.clone(), PutOptions::default())).await.map(|_| ())
    }

    pub(crate) async fn get(&self, path: &Path) -> Result<Option<Whole>, Failure> {
        let request = || async {
            let result = self.s3.get_opts(path, GetOptions::default()).await?;
            let (etag, size) = (result.meta.e_tag.clone(), result.meta.size);
            let mark = result.attributes.get(&Attribute::Metadata(PUT_MARK.into())).map(|mark| mark.to_string());
            let bytes = result.bytes().await?;
            whole(bytes.len() as u64, size)?;
            Ok(Whole { bytes: bytes.into(), etag, mark })
        };
        match self.repeat(0, request).await {
            Ok(whole) => Ok(Some(whole)),
            Err(Failure::NotFound) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Size, tag, and when it was made in milliseconds since 1970.
    pub(crate) async fn look(&self, path: &Path) -> Result<Option<(u64, u64)>, Failure> {
        let options = || GetOptions { head: true, ..GetOptions::default() };
        match self.repeat(0, || self.s3.get_opts(path, options())).await {
            Ok(found) => Ok(Some((found.meta.size, found.meta.last_modified.timestamp_millis().max(0) as u64))),
            Err(Failure::NotFound) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// One conditional put: `expect` is the tag to find, or `None` for no object.
    pub(crate) async fn put_if(
        &self,
        path: &Path,
        expect: Option<&str>,
        bytes: &[u8],
        mark: &str,
        is_repeat: bool,
    ) -> Result<Option<String>, Failure> {
        let mode = match expect {
            None => PutMode::Create,
            Some(etag) => PutMode::Update(UpdateVersion { e_tag: Some(etag.to_owned()), version: None }),
        };
        let mut attributes = Attributes::new();
        attributes.insert(Attribute::Metadata(PUT_MARK.into()), AttributeValue::from(mark.to_owned()));
        let options = PutOptions { mode, attributes, ..PutOptions::default() };
        let limit = self.limits.attempt_for(bytes.len());
        let payload = PutPayload::from(bytes.to_vec());
        Ok(self.attempt(is_repeat, limit, self.s3.put_opts(path, payload, options)).await?.e_tag)
    }

    /// Compare-and-swap that stays sound when answers are lost: each put carries a mark of its own, and after a
    /// failure that leaves open what happened the object is read back. The inner error is for an outcome that
    /// nobody can tell any more.
    pub(crate) async fn swap(&self, path: &Path, expect: Option<&str>, bytes: &[u8]) -> Result<Swapped, Failure> {
        let mark = format!("{:016x}{:016x}", random_u64(), random_u64());
        let mut in_doubt = false;
        let mut number = 0;
        loop {
            let why = match self.put_if(path, expect, bytes, &mark, number > 0).await {
                Ok(Some(etag)) => return Ok(Swapped::Done(etag)),
                Ok(None) => "the server gave no ETag".to_owned(),
                Err(Failure::Refused | Failure::NotFound) => "the server reports a conflict".to_owned(),
                Err(Failure::Away(why)) => {
                    in_doubt = true;
                    why
                }
                Err(failure) => return Err(failure),
            };
            number += 1;
            if in_doubt {
                tokio::time::sleep(self.limits.pause(number)).await;
            }
            let found = self.get(path).await?;
            let etag = found.as_ref().and_then(|found| found.etag.clone());
            if let Some(found) = &found
                && found.mark.as_deref() == Some(mark.as_str())
                && found.bytes == bytes
            {
                let etag = etag.ok_or(Failure::Denied("the server gives objects no ETag".to_owned()))?;
                return Ok(Swapped::Done(etag));
            }
            if etag.as_deref() != expect && in_doubt {
                return Err(Failure::Denied(format!(
                    "the answer was lost ({why}) and another writer has published since, so it may have been published or not"
                )));
            }
            if etag.as_deref() != expect {
                return Ok(Swapped::Other(etag));
            }
            if number >= self.limits.attempts {
                return Err(Failure::Away(format!("{why} ({number} attempts)")));
            }
            if !in_doubt {
                tokio::time::sleep(self.limits.pause(number)).await;
            }
        }
    }

    pub(crate) async fn delete(&self, path: &Path) -> Result<(), Failure> {
        use object_store::ObjectStoreExt as _;
        match self.repeat(0, || self.s3.delete(path)).await {
            Ok(()) | Err(Failure::NotFound) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Fills `len` bytes from `offset`.
    pub(crate) async fn read(&self, path: &Path, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
        let end = offset + len as u64;
        let request = || async {
            let options = GetOptions { range: Some((offset..end).into()), ..GetOptions::default() };
            let result = self.s3.get_opts(path, options).await?;
            let (range, size) = (result.range.clone(), result.meta.size);
            if range.start == offset && range.end < end && size < end {
                return Ok(None);
            }
            let bytes = result.bytes().await?;
            whole(bytes.len() as u64, end - offset)?;
            if range != (offset..end) {
                return Err(strange(format!("bytes {}-{} instead of {offset}-{end}", range.start, range.end)));
            }
            Ok(Some(Vec::from(bytes)))
        };
        self.repeat(len, request).await?.ok_or(Failure::Beyond)
    }
}

fn strange(what: String) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: what.into() }
}

fn whole(got: u64, said: u64) -> object_store::Result<()> {
    if got == said { Ok(()) } else { Err(strange(format!("the answer has {got} bytes instead of {said}"))) }
}
