//! Packs on their way to the server: parts of 8 MiB, several at once.

use super::request::{Failure, Link};
use super::{Core, Remote};
use crate::engine::{Object, Upload};
use object_store::multipart::{MultipartStore as _, PartId};
use object_store::path::Path;
use object_store::{ObjectStore, PutOptions, PutPayload};
use std::io;
use std::sync::{Arc, Mutex};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinHandle;

/// Bytes in a part, but the last.
pub(crate) const PART_BYTES: usize = 8 << 20;

/// What was appended so far, until the server has it all.
#[derive(Default)]
struct Content {
    parts: Vec<Part>,
    tail: Vec<u8>,
    finished: bool,
}

struct Part {
    bytes: bytes::Bytes,
    task: Option<JoinHandle<Result<PartId, Failure>>>,
    id: Option<PartId>,
}

impl Content {
    fn len(&self) -> u64 {
        (self.parts.len() * PART_BYTES + self.tail.len()) as u64
    }
}

/// An object that is being written, read from memory until it is finished.
struct Pending {
    content: Mutex<Content>,
    remote: Remote,
}

impl Object for Pending {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let content = self.content.lock().expect("no panic while the content is locked");
        if content.finished {
            drop(content);
            return self.remote.read_at(offset, buf);
        }
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > content.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset as usize + done;
            let segment = content.parts.get(at / PART_BYTES).map_or(content.tail.as_slice(), |part| &part.bytes);
            let from = &segment[at % PART_BYTES..];
            let len = from.len().min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&from[..len]);
            done += len;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        let content = self.content.lock().expect("no panic while the content is locked");
        if !content.finished {
            return Ok(content.len());
        }
        drop(content);
        self.remote.size()
    }
}

/// The multipart upload, begun by its first part.
struct Multipart {
    link: Arc<Link>,
    path: Path,
    id: OnceCell<String>,
    slots: Arc<Semaphore>,
}

impl Multipart {
    async fn id(&self) -> Result<&String, Failure> {
        self.id.get_or_try_init(|| self.link.repeat(0, || self.link.s3.create_multipart(&self.path))).await
    }

    async fn part(self: Arc<Self>, number: usize, bytes: bytes::Bytes) -> Result<PartId, Failure> {
        let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
        let id = self.id().await?;
        let send = || self.link.s3.put_part(&self.path, id, number, PutPayload::from(bytes.clone()));
        self.link.repeat(bytes.len(), send).await
    }

    /// Puts the parts together. Where the answer is lost, what is there tells.
    async fn complete(&self, ids: Vec<PartId>, len: u64) -> Result<(), Failure> {
        let id = self.id().await?;
        let done = self.link.repeat(0, || self.link.s3.complete_multipart(&self.path, id, ids.clone())).await;
        match done {
            Ok(_) => Ok(()),
            Err(failure) => match self.link.look(&self.path).await {
                Ok(Some((size, _))) if size == len => Ok(()),
                _ => Err(failure),
            },
        }
    }
}

pub(crate) struct ObjectUpload {
    core: Arc<Core>,
    multipart: Arc<Multipart>,
    pending: Arc<Pending>,
    /// For messages.
    name: String,
    /// Something may be visible already.
    attempted: bool,
}

impl ObjectUpload {
    pub(crate) fn new(core: &Arc<Core>, slots: &Arc<Semaphore>, name: &str) -> Self {
        let path = core.link.path(name);
        let remote = Remote { core: Arc::clone(core), path: path.clone(), name: name.to_owned() };
        Self {
            core: Arc::clone(core),
            multipart: Arc::new(Multipart {
                link: Arc::clone(&core.link),
                path,
                id: OnceCell::new(),
                slots: Arc::clone(slots),
            }),
            pending: Arc::new(Pending { content: Mutex::default(), remote }),
            name: name.to_owned(),
            attempted: false,
        }
    }

    fn send(&self, number: usize, bytes: bytes::Bytes) -> JoinHandle<Result<PartId, Failure>> {
        self.core.spawn(Arc::clone(&self.multipart).part(number, bytes))
    }

    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.pending.content.lock().expect("no panic while the content is locked")
    }

    /// A small object goes as a whole.
    fn put_whole(&self) -> io::Result<()> {
        let bytes = bytes::Bytes::from(self.content().tail.clone());
        let (link, path) = (Arc::clone(&self.core.link), self.multipart.path.clone());
        self.core.wait("write", &self.name, async move {
            let put = || link.s3.put_opts(&path, PutPayload::from(bytes.clone()), PutOptions::default());
            link.repeat(bytes.len(), put).await.map(|_| ())
        })
    }

    /// Waits for the parts, sends again those that failed, and puts all together.
    fn put_parts(&self) -> io::Result<()> {
        let (mut tasks, len) = {
            let mut content = self.content();
            let len = content.len();
            // The tail stays where it is: this may fail, and more may then be appended.
            let tail = (!content.tail.is_empty()).then(|| bytes::Bytes::from(content.tail.clone()));
            let mut tasks = Vec::new();
            for (number, part) in content.parts.iter_mut().enumerate() {
                let task = match (&part.id, part.task.take()) {
                    (Some(id), _) => Ok(id.clone()),
                    (None, Some(task)) => Err((task, part.bytes.clone())),
                    (None, None) => Err((self.send(number, part.bytes.clone()), part.bytes.clone())),
                };
                tasks.push(task);
            }
            let last = content.parts.len();
            tasks.extend(tail.map(|bytes| Err((self.send(last, bytes.clone()), bytes))));
            (tasks, len)
        };
        let multipart = Arc::clone(&self.multipart);
        let pending = Arc::clone(&self.pending);
        self.core.wait("write", &self.name, async move {
            let mut ids = Vec::with_capacity(tasks.len());
            let mut failed = None;
            for (number, task) in tasks.drain(..).enumerate() {
                let sent = match task {
                    Ok(id) => Ok(id),
                    Err((task, bytes)) => match task.await {
                        Ok(Ok(id)) => Ok(id),
                        // It was given up while the server was away: once more, now that somebody waits.
                        Ok(Err(_)) if failed.is_none() => Arc::clone(&multipart).part(number, bytes).await,
                        Ok(Err(failure)) => Err(failure),
                        Err(error) => Err(Failure::Away(format!("the sending of a part ended early: {error}"))),
                    },
                };
                match sent {
                    Ok(id) => {
                        let mut content = pending.content.lock().expect("no panic while the content is locked");
                        if let Some(part) = content.parts.get_mut(number) {
                            part.id = Some(id.clone());
                        }
                        ids.push(id);
                    }
                    Err(failure) => failed = failed.or(Some(failure)),
                }
            }
            match failed {
                Some(failure) => Err(failure),
                None => multipart.complete(ids, len).await,
            }
        })
    }
}

impl Upload for ObjectUpload {
    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut content = self.content();
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PART_BYTES - content.tail.len()));
            content.tail.extend_from_slice(now);
            bytes = later;
            if content.tail.len() == PART_BYTES {
                let part = bytes::Bytes::from(std::mem::take(&mut content.tail));
                let task = self.send(content.parts.len(), part.clone());
                content.parts.push(Part { bytes: part, task: Some(task), id: None });
            }
        }
        Ok(())
    }

    fn object(&self) -> Arc<dyn Object> {
        Arc::clone(&self.pending) as Arc<dyn Object>
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.content().finished {
            return Ok(());
        }
        self.attempted = true;
        let small = self.content().parts.is_empty();
        if small { self.put_whole() } else { self.put_parts() }?;
        let mut content = self.content();
        *content = Content { finished: true, ..Content::default() };
        Ok(())
    }
}

impl Drop for ObjectUpload {
    fn drop(&mut self) {
        let mut content = self.content();
        if content.finished {
            return;
        }
        content.parts.iter().filter_map(|part| part.task.as_ref()).for_each(JoinHandle::abort);
        content.parts.clear();
        drop(content);
        // Nobody waits for it. What cannot be removed now is invisible (parts), or garbage that a collection finds.
        let (multipart, attempted) = (Arc::clone(&self.multipart), self.attempted);
        self.core.spawn(async move {
            let link = &multipart.link;
            if let Some(id) = multipart.id.get() {
                let _ = link.repeat(0, || link.s3.abort_multipart(&multipart.path, id)).await;
            }
            if attempted {
                let _ = link.delete(&multipart.path).await;
            }
        });
    }
}
