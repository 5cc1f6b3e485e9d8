//! Objects on a server that speaks S3.
//!
//! ```text
//! <prefix>/key, clock            the store's key; an object whose age tells the server's time
//! <prefix>/packs/<id>.pack .idx  packs and their indexes
//! <prefix>/heads/<name>          heads, `/` written as !
//! <prefix>/probe/<random>        for a moment, when a writer opens
//! ```
//!
//! An object is visible as a whole or not at all, as S3 has it; packs above 8 MiB go in parts, several at once. Heads
//! are swapped by conditional put, on the condition of their ETag. **PROOF**: some servers and proxies ignore the
//! conditions (`If-None-Match`, `If-Match`) silently, and then writers destroy each other's work; so before anything
//! is written, the engine puts probe objects whose putting must be refused, alone and in a race, and refuses a
//! server that lets them through.
//!
//! Calls block the caller; the requests run on a small runtime that the engine owns, so they may be made from any
//! thread. No call waits for ever: each attempt has a time limit, their number is bounded, and a server that
//! answers nothing is soon not asked any more (`circuit`).
//!
//! A writer that is killed in the middle of a large pack leaves parts of an upload on the server, which are invisible
//! and belong to no object; give the bucket a life-cycle rule that ends incomplete uploads after a day.

mod address;
mod circuit;
mod request;
mod upload;

pub use address::Credentials;
pub use circuit::Limits;

use super::{Engine, Etag, Expect, Health, Object as OpenObject, Upload};
use address::Address;
use base::ByteRange;
use circuit::{Breaker, random_u64};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore as _, PutPayload, RetryConfig};
use request::{Failure, Link, Swapped};
use std::fmt;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Parts on their way at once, over all uploads of an engine.
const PARTS_AT_ONCE: usize = 8;
/// Threads of the runtime; they wait, copy, and sign.
const THREADS: usize = 2;
/// How often a swap that expects nothing particular is tried against others.
const SWAP_ROUNDS: usize = 64;

/// The engine.
pub struct Object {
    core: Arc<Core>,
    slots: Arc<Semaphore>,
    proved: Mutex<bool>,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object({})", self.core.server)
    }
}

/// What the engine and the objects it opened share.
struct Core {
    link: Arc<Link>,
    /// For messages.
    server: String,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

impl Drop for Core {
    fn drop(&mut self) {
        // Dropping a runtime waits for it, which is forbidden where another runtime runs.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Core {
    fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.as_ref().expect("there until it is dropped").spawn(task)
    }

    /// Runs a request on the runtime and waits for it.
    fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = mpsc::sync_channel(1);
        drop(self.spawn(async move {
            // The receiver only goes with the caller's thread.
            let _ = tell.send(task.await);
        }));
        told.recv().unwrap_or_else(|_| Err(Failure::Away("the request ended without an answer".to_owned())))
    }

    fn wait<T: Send + 'static>(
        &self,
        what: &str,
        name: &str,
        task: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> io::Result<T> {
        let began = Instant::now();
        let done = self.run(task);
        // What a cold start or a fault waits for is read off these lines.
        log::trace!(
            "{what} {name}: {:.1} ms, {}",
            began.elapsed().as_secs_f64() * 1e3,
            std::thread::current().name().unwrap_or("unnamed")
        );
        done.map_err(|failure| failure.to_io(&self.server, what, name))
    }

    /// As [`Core::wait`], for tasks that need the link.
    fn ask<T: Send + 'static, F: Future<Output = Result<T, Failure>> + Send + 'static>(
        &self,
        what: &str,
        name: &str,
        task: impl FnOnce(Arc<Link>, Path) -> F,
    ) -> io::Result<T> {
        self.wait(what, name, task(Arc::clone(&self.link), self.link.path(name)))
    }
}

/// A visible object.
struct Remote {
    core: Arc<Core>,
    path: Path,
    name: String,
}

impl OpenObject for Remote {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let (link, path, len) = (Arc::clone(&self.core.link), self.path.clone(), buf.len());
        let bytes = self.core.wait("read", &self.name, async move { link.read(&path, offset, len).await })?;
        buf.copy_from_slice(&bytes);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        let (link, path) = (Arc::clone(&self.core.link), self.path.clone());
        let task = async move { link.look(&path).await?.ok_or(Failure::NotFound) };
        Ok(self.core.wait("ask for the size of", &self.name, task)?.0)
    }
}

impl Object {
    /// Opens `s3://bucket/prefix?endpoint=http://host:port&region=name&profile=name`. Credentials come from
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`, else from the profile in
    /// `~/.aws/credentials`; on AWS itself also from the machine's or container's role. Sends no request yet.
    ///
    /// # Errors
    /// The address makes no sense, or there are no credentials.
    pub fn open(url: &str) -> io::Result<Self> {
        Self::open_limited(url, Limits::default())
    }

    /// As [`Object::open`], with limits of the caller's choice.
    ///
    /// # Errors
    /// As [`Object::open`].
    pub fn open_limited(url: &str, limits: Limits) -> io::Result<Self> {
        let address = Address::parse(url).map_err(invalid)?;
        let env = |name: &str| std::env::var(name).ok();
        let read = |path| std::fs::read_to_string(path).ok();
        let credentials = Credentials::find(address.profile.as_deref(), &env, &read).map_err(invalid)?;
        Self::connect(address, credentials, limits)
    }

    /// Opens an address with credentials and limits of the caller's choice.
    ///
    /// # Errors
    /// As [`Object::open`].
    pub fn open_with(url: &str, credentials: Credentials, limits: Limits) -> io::Result<Self> {
        Self::connect(Address::parse(url).map_err(invalid)?, Some(credentials), limits)
    }

    fn connect(address: Address, credentials: Option<Credentials>, limits: Limits) -> io::Result<Self> {
        // Whoever was first installed one; any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let server = address.to_string();
        let aws_itself = address.endpoint.is_none();
        let builder = match &credentials {
            Some(found) => {
                let builder =
                    AmazonS3Builder::new().with_access_key_id(&found.key_id).with_secret_access_key(&found.secret);
                found.token.iter().fold(builder, |builder, token| builder.with_token(token))
            }
            None if aws_itself => AmazonS3Builder::from_env(),
            None => {
                return Err(invalid(format!(
                    "there are no credentials for {server}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them to ~/.aws/credentials"
                )));
            }
        };
        let env_region = || ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(|name| std::env::var(name).ok());
        let region = address.region.clone().or_else(env_region).unwrap_or_else(|| "us-east-1".to_owned());
        let plain = address.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let client = ClientOptions::new()
            .with_allow_http(plain)
            .with_connect_timeout(limits.attempt.min(Duration::from_secs(5)))
            // Each attempt has its own, shorter limit; this one ends what the runtime has let go of.
            .with_timeout(limits.attempt * 2 + Duration::from_secs(120));
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let builder = builder
            .with_bucket_name(&address.bucket)
            .with_region(region)
            .with_virtual_hosted_style_request(aws_itself)
            .with_config(AmazonS3ConfigKey::ConditionalPut, "etag")
            .with_disable_tagging(true)
            .with_client_options(client)
            .with_retry(retry);
        let builder = address.endpoint.iter().fold(builder, |builder, endpoint| builder.with_endpoint(endpoint));
        let built = builder.build();
        let hide = |text: String| credentials.as_ref().map_or(text.clone(), |c| c.hide(&text));
        let s3 = built.map_err(|error| invalid(format!("cannot use {server}: {}", hide(error.to_string()))))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("store-s3")
            .enable_all()
            .build()?;
        let link = Arc::new(Link { s3, address, credentials, limits, breaker: Breaker::new(limits) });
        let core = Arc::new(Core { link, server, runtime: Some(runtime) });
        Ok(Self { core, slots: Arc::new(Semaphore::new(PARTS_AT_ONCE)), proved: Mutex::new(false) })
    }

    fn names_in(&self, folder: &str) -> io::Result<Vec<String>> {
        self.core.ask("list", folder, |link, path| async move {
            let mut number = 0;
            let found = loop {
                // A long list takes long; whether anybody is there at all shows sooner.
                let limit = match number {
                    0 => link.limits.attempt,
                    _ => {
                        link.look(&link.path("key")).await?;
                        link.limits.attempt_for(64 << 20)
                    }
                };
                match link.attempt(number > 0, limit, link.s3.list_with_delimiter(Some(&path))).await {
                    Err(Failure::Away(_)) if number + 1 < link.limits.attempts => {
                        number += 1;
                        tokio::time::sleep(link.limits.pause(number)).await;
                    }
                    done => break done,
                }
            }?;
            // Some servers list an empty folder as an object of its own.
            let name = |meta: &object_store::ObjectMeta| {
                meta.location.filename().filter(|_| meta.location != path).map(str::to_owned)
            };
            Ok(found.objects.iter().filter_map(name).collect())
        })
    }

    /// Swaps an object; the tag or what was found instead.
    fn swap(&self, name: &str, expect: Option<&str>, bytes: &[u8]) -> io::Result<Swapped> {
        let (expect, bytes) = (expect.map(str::to_owned), bytes.to_vec());
        self.core.ask("publish", name, |link, path| async move { link.swap(&path, expect.as_deref(), &bytes).await })
    }
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.into())
}

fn head_key(name: &str) -> String {
    format!("heads/{}", name.replace('/', "!"))
}

impl Engine for Object {
    fn describe(&self) -> String {
        self.core.server.clone()
    }

    fn concurrency(&self) -> usize {
        PARTS_AT_ONCE
    }

    fn upload(&self, name: &str) -> io::Result<Box<dyn Upload>> {
        Ok(Box::new(upload::ObjectUpload::new(&self.core, &self.slots, name)))
    }

    /// Asks nobody: an object that is not there shows itself when it is read.
    fn open(&self, name: &str) -> io::Result<Arc<dyn OpenObject>> {
        Ok(Arc::new(Remote { core: Arc::clone(&self.core), path: self.core.link.path(name), name: name.to_owned() }))
    }

    fn get(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let found = self.core.ask("read", name, |link, path| async move { link.get(&path).await })?;
        Ok(found.map(|whole| whole.bytes))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let payload = PutPayload::from(bytes.to_vec());
        self.core.ask("write", name, |link, path| async move { link.put(&path, payload).await })
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        self.names_in(folder)
    }

    fn remove(&self, names: &[String]) -> io::Result<()> {
        names
            .iter()
            .try_for_each(|name| self.core.ask("remove", name, |link, path| async move { link.delete(&path).await }))
    }

    /// Gives nothing back: objects cannot be changed. See [`Engine::can_punch`].
    fn punch(&self, _name: &str, _ranges: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn footprint(&self, name: &str) -> io::Result<u64> {
        self.open(name)?.size()
    }

    fn head(&self, name: &str) -> io::Result<Option<(Vec<u8>, Etag)>> {
        let key = head_key(name);
        let found = self.core.ask("read", &key, |link, path| async move { link.get(&path).await })?;
        let Some(whole) = found else { return Ok(None) };
        let etag = whole.etag.ok_or_else(|| {
            Failure::Denied("the server gives objects no ETag".to_owned()).to_io(&self.core.server, "read", &key)
        })?;
        Ok(Some((whole.bytes, Etag(etag))))
    }

    fn heads(&self) -> io::Result<Vec<String>> {
        Ok(self.names_in("heads")?.into_iter().map(|name| name.replace('!', "/")).collect())
    }

    fn swap_head(&self, name: &str, expect: &Expect, bytes: &[u8]) -> io::Result<Result<Etag, &'static str>> {
        let key = head_key(name);
        for _ in 0..SWAP_ROUNDS {
            let tag = match expect {
                Expect::Absent => None,
                Expect::Etag(etag) => Some(etag.0.clone()),
                // An unconditional put that was taken for lost could undo a later one when it arrives.
                Expect::Any => self.head(name)?.map(|(_, etag)| etag.0),
            };
            match self.swap(&key, tag.as_deref(), bytes)? {
                Swapped::Done(etag) => return Ok(Ok(Etag(etag))),
                Swapped::Other(_) if *expect == Expect::Any => {}
                Swapped::Other(found) => {
                    let why = expect.refuses(found.map(Etag).as_ref());
                    return Ok(Err(why.unwrap_or("another writer published first")));
                }
            }
        }
        Err(Failure::Away("others publish all the time".to_owned()).to_io(&self.core.server, "publish", &key))
    }

    fn remove_head(&self, name: &str) -> io::Result<bool> {
        let key = head_key(name);
        self.core.ask("remove", &key, |link, path| async move {
            let there = link.look(&path).await?.is_some();
            if there {
                link.delete(&path).await?;
            }
            Ok(there)
        })
    }

    fn put_new(&self, name: &str, bytes: &[u8]) -> io::Result<bool> {
        Ok(matches!(self.swap(name, None, bytes)?, Swapped::Done(_)))
    }

    fn can_share(&self) -> bool {
        true
    }

    fn can_punch(&self) -> bool {
        false
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn prove(&self) -> io::Result<()> {
        let mut proved = self.proved.lock().expect("no panic while a server is proved");
        if *proved {
            return Ok(());
        }
        let probes = [format!("probe/{:016x}", random_u64()), format!("probe/{:016x}", random_u64())];
        let [one, raced] = probes.clone().map(|probe| self.core.link.path(&probe));
        let link = Arc::clone(&self.core.link);
        let done = self.core.wait("use", "probe objects", async move {
            let answer = prove(&link, &one, &raced).await;
            for probe in [&one, &raced] {
                if let Err(failure) = link.delete(probe).await {
                    log::debug!("a probe object stays behind: {failure:?}");
                }
            }
            answer
        });
        done?.map_err(|ignored| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "{} {ignored}, so writers would overwrite each other's heads unseen; use a server that honours conditional puts, and no proxy that drops the headers",
                    self.core.server
                ),
            )
        })?;
        *proved = true;
        Ok(())
    }

    fn now_ms(&self) -> io::Result<u64> {
        self.core.ask("write", "clock", |link, path| async move {
            link.put(&path, PutPayload::from_static(b"its age tells the time\n")).await?;
            Ok(link.look(&path).await?.ok_or(Failure::NotFound)?.1)
        })
    }

    fn made_ms(&self, name: &str) -> io::Result<Option<u64>> {
        let found = self.core.ask("ask for the age of", name, |link, path| async move { link.look(&path).await })?;
        Ok(found.map(|(_, made)| made))
    }

    fn health(&self) -> Health {
        self.core.link.breaker.health()
    }
}

/// Puts what must be refused; the inner error says what the server did instead.
async fn prove(link: &Arc<Link>, one: &Path, raced: &Path) -> Result<Result<(), String>, Failure> {
    let first = match link.swap(one, None, b"a").await? {
        Swapped::Done(etag) => etag,
        Swapped::Other(_) => return Ok(Err("refuses to create an object that is not there".to_owned())),
    };
    let ignores = |header: &str| Ok(Err(format!("ignores the header {header} of a put")));
    if !refuses(link, one, None).await? {
        return ignores("If-None-Match: *");
    }
    if !refuses(link, one, Some("\"00000000000000000000000000000000\"")).await? {
        return ignores("If-Match");
    }
    let second = match link.swap(one, Some(&first), b"b").await? {
        Swapped::Done(etag) => etag,
        Swapped::Other(_) => return Ok(Err("refuses a put whose If-Match holds the right ETag".to_owned())),
    };
    if second == first || !refuses(link, one, Some(&first)).await? {
        return Ok(Err("gives different contents the same ETag".to_owned()));
    }
    // Both races at once: some servers let the losers wait for whole seconds.
    let races = [(raced, None), (one, Some(second.as_str()))].map(|(path, expect)| {
        [0u8, 1].map(|number| {
            let (link, path, expect) = (Arc::clone(link), path.clone(), expect.map(str::to_owned));
            tokio::spawn(async move { link.swap(&path, expect.as_deref(), &[b'r', number]).await })
        })
    });
    for race in races {
        let mut winners = 0;
        for racer in race {
            let swapped = racer.await.map_err(|error| Failure::Away(error.to_string()))?;
            winners += usize::from(matches!(swapped?, Swapped::Done(_)));
        }
        if winners != 1 {
            return Ok(Err(format!("lets {winners} of 2 conditional puts through that exclude each other")));
        }
    }
    Ok(Ok(()))
}

/// Whether a put under a condition that does not hold is refused.
async fn refuses(link: &Link, path: &Path, expect: Option<&str>) -> Result<bool, Failure> {
    let mut number = 0;
    loop {
        match link.put_if(path, expect, b"x", "probe", number > 0).await {
            Ok(_) => return Ok(false),
            Err(Failure::Refused | Failure::NotFound) => return Ok(true),
            Err(Failure::Away(_)) if number + 1 < link.limits.attempts => {
                number += 1;
                tokio::time::sleep(link.limits.pause(number)).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}
