//! Where a node's store is: in its home, or somewhere that it shares with other nodes, behind a cache.
//!
//! A home that runs from a shared store says so in `<home>/store.json`, written when the store was first named. The
//! record holds no secrets: credentials come from the environment or `~/.aws`, each time.
//!
//! **Two caches.** A cache directory has one owner (its index is in memory), and the node has two processes that read:
//! the mirror, which serves guests while no daemon runs, and the daemon, which writes while mirrors are replaced. So
//! each has a directory of its own: `cache/mirror` takes nearly all, since what guests read goes through it;
//! `cache/daemon` holds tree nodes and small blobs. `cache/near` stands under both ([`store::engine::Near`]): what the
//! daemon has just written is taken from there by the mirror, and an index that one has read is read by the other.
//!
//! **Names.** Heads of images, snapshots and blobs are everybody's. What is kept for this node alone (pins, freezes)
//! is named `node/<id>/…`; `node/<id>` itself says who that is. Ids of RAM files and disk views, which snapshots carry,
//! begin with the node's number, so that they mean the same on every node.

use crate::error::{Error, Result};
use crate::home::{self, write_atomically};
use crate::record;
use mirror::{Opened, StoreVersions};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::engine::cached::CacheOptions;
use store::engine::object::Limits;
use store::engine::{Cached, Engine, Near, S3};
use store::{Expect, Manifest, Mode, Store};

/// What a cache takes where nobody says: a tenth of the home's file system, within these bounds.
const CACHE_DEFAULT: std::ops::RangeInclusive<u64> = 1 << 30..=100 << 30;
/// The least a cache may have.
pub const CACHE_MIN: u64 = 64 << 20;
/// The number of a node: 30 bits, so that ids stay below those that the mirror gives to files of the tree of blobs, which
/// begin at 2^62.
const NUMBER_MAX: u32 = 0x3fff_ffff;

/// What a home knows of its shared store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// `s3://BUCKET/PREFIX?endpoint=URL`, or the path of a directory.
    pub url: String,
    /// This node's number, in hexadecimal.
    pub node: String,
    /// Proves that the number is this home's.
    token: String,
    /// Bytes of the node's disk that its caches take together.
    pub cache_bytes: u64,
    /// Whether the number is known to the store.
    #[serde(default)]
    claimed: bool,
}

/// What the store says of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeMeta {
    token: String,
    /// Name of its host.
    pub(crate) host: String,
    /// Its home there.
    pub(crate) home: String,
    /// When its daemon last started, RFC 3339 in UTC.
    pub(crate) seen: String,
}

/// A store as the daemon uses it.
pub(crate) struct DaemonStore {
    pub(crate) store: Arc<Store>,
    pub(crate) cache: Option<Arc<Cached>>,
}

fn file(home: &Path) -> PathBuf {
    home.join("store.json")
}

impl Place {
    /// What the home has on record.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn of(home: &Path) -> Result<Option<Self>> {
        let path = file(home);
        if !path.exists() {
            return Ok(None);
        }
        record::load(&path).map(Some)
    }

    /// What the home has on record, after what the user says: the first time it is written down, later it must agree.
    ///
    /// # Errors
    /// Another store is on record, the home has one of its own, or what is said makes no sense.
    pub fn settle(home: &Path, url: Option<&str>, cache_bytes: Option<u64>) -> Result<Option<Self>> {
        if let Some(bytes) = cache_bytes.filter(|bytes| *bytes < CACHE_MIN) {
            return Err(Error::Invalid(format!(
                "--cache-size {}: give at least {}",
                base::units::human(bytes),
                base::units::human(CACHE_MIN)
            )));
        }
        match (Self::of(home)?, url) {
            (Some(place), url) => place.agree(home, url, cache_bytes).map(Some),
            (None, Some(url)) => Self::begin(home, url, cache_bytes).map(Some),
            (None, None) if cache_bytes.is_some() => Err(Error::Invalid(
                "--cache-size is for a node that runs from a shared store; name that with --store".into(),
            )),
            (None, None) => Ok(None),
        }
    }

    fn agree(mut self, home: &Path, url: Option<&str>, cache_bytes: Option<u64>) -> Result<Self> {
        if let Some(url) = url.map(normal).transpose()?.filter(|url| *url != self.url) {
            return Err(Error::Conflict(format!(
                "{} runs from the store {}, not from {url}: leave --store (OFFSHOOT_STORE) out, or choose another --home for the other store",
                home.display(),
                self.url
            )));
        }
        if let Some(bytes) = cache_bytes.filter(|bytes| *bytes != self.cache_bytes) {
            self.cache_bytes = bytes;
            self.save(home)?;
        }
        Ok(self)
    }

    fn begin(home: &Path, url: &str, cache_bytes: Option<u64>) -> Result<Self> {
        let url = normal(url)?;
        if has_entries(&home.join("store/heads")) || has_entries(&home.join("vms")) {
            return Err(Error::Conflict(format!(
                "{} has images, snapshots or VMs in a store of its own: choose another --home for {url}, and `offshoot push` there what it should have",
                home.display()
            )));
        }
        // What is asked for is checked before it is written down: a slip must not stay.
        engine(&url, patient())?;
        let place = Self {
            url,
            node: new_number()?,
            token: crate::node::new_uuid()?,
            cache_bytes: cache_bytes.unwrap_or_else(|| default_cache(home)),
            claimed: false,
        };
        place.save(home)?;
        Ok(place)
    }

    fn save(&self, home: &Path) -> Result<()> {
        std::fs::create_dir_all(home).map_err(Error::io("make", home))?;
        write_atomically(&file(home), &serde_json::to_vec_pretty(self).expect("records serialise"), true)
    }

    /// What begins the names of this node's own heads.
    pub(crate) fn prefix(&self) -> String {
        format!("node/{}/", self.node)
    }

    /// The first id of this node; none of another node's is among those that follow.
    fn first_id(&self) -> u64 {
        (u64::from_str_radix(&self.node, 16).unwrap_or(0) << 32) + home::FIRST_ID
    }

    fn cache_dir(home: &Path, of: &str) -> PathBuf {
        home.join("cache").join(of)
    }

    /// A sixteenth each, within bounds, for what is laid near and for the daemon.
    fn part(&self) -> u64 {
        (self.cache_bytes / 16).clamp(8 << 20, 1 << 30)
    }

    fn behind(&self, home: &Path, limits: Limits) -> Result<Arc<dyn Engine>> {
        let dir = Self::cache_dir(home, "near");
        let near = Near::open(engine(&self.url, limits)?, &dir, self.part()).map_err(Error::io("open", dir))?;
        Ok(Arc::new(near))
    }

    /// Opens the store for the daemon, and makes the node known to it. While the store is away it is opened all the
    /// same, as long as it was opened before.
    pub(crate) fn open(&mut self, home: &Path) -> Result<DaemonStore> {
        let dir = Self::cache_dir(home, "daemon");
        let options = CacheOptions { prefetchers: 0, ..CacheOptions::new(self.part()) };
        let cache = Cached::open(self.behind(home, patient())?, &dir, &options).map_err(Error::io("open", dir))?;
        let cache = Arc::new(cache);
        let opened = Store::open_shared_patiently(Arc::clone(&cache) as Arc<dyn Engine>);
        let store = Arc::new(opened.map_err(|error| self.explain(error))?);
        match self.claim(home, &store) {
            Ok(()) => {}
            Err(Error::Store(error)) if error.is_away() && self.claimed => {
                log::warn!("the store is away, going on with what is cached: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(DaemonStore { store, cache: Some(cache) })
    }

    fn explain(&self, error: store::Error) -> Error {
        if error.is_away() {
            return Error::Host(format!(
                "the store {} does not answer, and this node never used it before: {}",
                self.url,
                Error::from(error).whole()
            ));
        }
        error.into()
    }

    /// Makes the number this node's in the store; another is chosen where somebody has it and nothing was made yet.
    fn claim(&mut self, home: &Path, store: &Store) -> Result<()> {
        for _ in 0..16 {
            let name = format!("node/{}", self.node);
            let meta = NodeMeta {
                token: self.token.clone(),
                host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
                home: home.display().to_string(),
                seen: record::now(),
            };
            let expect = match store.head(&name)? {
                None if self.claimed => {
                    log::warn!(
                        "{} does not know this node any more: somebody dropped it; making it known again",
                        self.url
                    );
                    Expect::Absent
                }
                None => Expect::Absent,
                Some((manifest, etag)) => match serde_json::from_str::<NodeMeta>(&manifest.meta) {
                    Ok(found) if found.token == self.token => Expect::Etag(etag),
                    _ if self.claimed => {
                        return Err(Error::Conflict(format!(
                            "{} says that node {} is another home's, {}; is this a copy of that home?",
                            self.url, self.node, manifest.meta
                        )));
                    }
                    _ => {
                        self.node = new_number()?;
                        self.save(home)?;
                        continue;
                    }
                },
            };
            let meta = serde_json::to_string(&meta).expect("records serialise");
            let manifest = Manifest { meta, ..Manifest::default() };
            match store.begin().publish(&name, expect, &manifest) {
                Ok(_) => {}
                Err(store::Error::HeadChanged { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
            if !self.claimed {
                let ids = format!("{}\n", self.first_id());
                write_atomically(&home.join("next-id"), ids.as_bytes(), true)?;
                self.claimed = true;
                self.save(home)?;
            }
            return Ok(());
        }
        Err(Error::Conflict(format!("no number for this node can be had from {}", self.url)))
    }

    /// What the mirror reads versions from. It opens in the background.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn versions(self, home: &Path) -> Result<Arc<StoreVersions>> {
        let home = home.to_owned();
        let pins = home.join("mirror/pins.json");
        let open = move || -> std::result::Result<Opened, String> {
            let dir = Self::cache_dir(&home, "mirror");
            let behind = self.behind(&home, patient()).map_err(|e| e.whole())?;
            let bytes = self.cache_bytes - 2 * self.part();
            let options = CacheOptions { stale_reads: true, ..CacheOptions::new(bytes) };
            let cache = Cached::open(behind, &dir, &options).map_err(|e| format!("{}: {e}", dir.display()))?;
            let cache = Arc::new(cache);
            let store = Store::open_engine(Arc::clone(&cache) as Arc<dyn Engine>, Mode::ReadOnly);
            Ok(Opened { store: store.map_err(|e| Error::from(e).whole())?, cache: Some(cache) })
        };
        StoreVersions::open_in_background(pins, open).map_err(Error::io("start a thread for", "the store"))
    }
}

/// Limits of requests of a node: whoever waits for one is a person or a guest.
fn patient() -> Limits {
    Limits {
        attempt: Duration::from_secs(4),
        attempts: 2,
        circuit_failures: 3,
        circuit_open: Duration::from_secs(2),
        ..Limits::default()
    }
}

fn engine(url: &str, limits: Limits) -> Result<Arc<dyn Engine>> {
    if url.starts_with("s3://") {
        let opened = S3::open_limited(url, limits);
        return Ok(Arc::new(opened.map_err(|e| Error::Invalid(format!("{url}: {e}")))?));
    }
    Err(Error::Invalid(format!("`{url}` names no store that nodes can share: give s3://BUCKET/PREFIX?endpoint=URL")))
}

/// A store's name as it is compared and kept.
fn normal(url: &str) -> Result<String> {
    if url.contains("://") {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let path = std::path::absolute(url).map_err(Error::io("find", url))?;
    path.into_os_string().into_string().map_err(|_| Error::Invalid(format!("{url}: not UTF-8")))
}

fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

fn default_cache(home: &Path) -> u64 {
    let existing = home.ancestors().find(|path| path.exists()).unwrap_or(home);
    let all = rustix::fs::statvfs(existing).map_or(0, |fs| fs.f_blocks * fs.f_frsize);
    (all / 10).clamp(*CACHE_DEFAULT.start(), *CACHE_DEFAULT.end())
}

/// A number that most likely nobody has.
fn new_number() -> Result<String> {
    let uuid = crate::node::new_uuid()?;
    let number = u32::from_str_radix(&uuid[..8], 16).map_err(|e| Error::Host(format!("{uuid}: {e}")))?;
    Ok(format!("{:08x}", (number & NUMBER_MAX).max(1)))
}
