//! Versions of the store itself.
//!
//! A store on this disk is opened before anything is served. One behind a network is opened in the background and
//! tried again for ever: a mirror that takes over while it is away serves at once what needs no store (holders,
//! layers), and what its cache holds as soon as the copies that this keeps have been read.

use crate::control::{StoreState, Warmth};
use crate::home::{read_json_or_default, replace_json_durably};
use crate::resolve::{BlobEntry, BlobVersionEntry, VersionError, Versions, neighbours, read_each};
use base::{ByteRange, PAGE};
use std::collections::BTreeMap;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;
use store::blob::BlobInfo;
use store::engine::Cached;
use store::engine::cached::Pin;
use store::{Error, Mode, Store, Version};

/// How long after a failure a store is opened again.
const OPEN_AGAIN: Duration = Duration::from_secs(1);
/// How long a reader waits for the first attempt.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// A store that was opened.
pub struct Opened {
    /// Read-only.
    pub store: Store,
    /// The cache that it reads through, where there is one.
    pub cache: Option<Arc<Cached>>,
}

/// A store, opened read-only beside the daemon that writes it.
pub struct StoreVersions {
    opened: OnceLock<Opened>,
    /// Why it is not open, once the first attempt has failed.
    trouble: Mutex<Option<String>>,
    tried: Condvar,
    /// Chunks kept in the cache, by the name that they were asked for under.
    pins: Mutex<BTreeMap<String, (Vec<String>, Pin)>>,
    pins_file: Option<PathBuf>,
}

impl StoreVersions {
    /// Opens the store in `dir`.
    ///
    /// # Errors
    /// There is no store, or this release cannot read it.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let versions = Self::closed();
        let _ = versions.opened.set(Opened { store: Store::open(dir, Mode::ReadOnly)?, cache: None });
        Ok(versions)
    }

    /// Opens a store in the background; until that succeeds, everything of it is unavailable.
    ///
    /// # Errors
    /// No thread can be had.
    /// `pins` is a file in which it is kept what is pinned in the cache.
    pub fn open_in_background(
        pins: PathBuf,
        open: impl Fn() -> Result<Opened, String> + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let versions = Arc::new(Self { pins_file: Some(pins), ..Self::closed() });
        let mine = Arc::clone(&versions);
        std::thread::Builder::new().name("mirror-store".to_owned()).spawn(move || {
            loop {
                match open() {
                    Ok(opened) => {
                        let _ = mine.opened.set(opened);
                        // A reader is before its look or in its wait, not between.
                        drop(mine.trouble.lock().expect("no holder panics"));
                        mine.tried.notify_all();
                        mine.pin_again();
                        return;
                    }
                    Err(why) => {
                        let mut trouble = mine.trouble.lock().expect("no holder panics");
                        if trouble.as_ref() != Some(&why) {
                            log::error!("the store is not open yet: {why}");
                        }
                        *trouble = Some(why);
                    }
                }
                mine.tried.notify_all();
                std::thread::sleep(OPEN_AGAIN);
            }
        })?;
        Ok(versions)
    }

    fn closed() -> Self {
        Self {
            opened: OnceLock::new(),
            trouble: Mutex::default(),
            tried: Condvar::new(),
            pins: Mutex::default(),
            pins_file: None,
        }
    }

    /// Whoever comes while it is opened for the first time waits a while: a mirror just started is no fault.
    fn opened(&self) -> Result<&Opened, String> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let trouble = self.trouble.lock().expect("no holder panics");
        let tried = |trouble: &mut Option<String>| trouble.is_none() && self.opened.get().is_none();
        let (trouble, _) = self.tried.wait_timeout_while(trouble, OPEN_WAIT, tried).expect("no holder panics");
        let why = trouble.as_deref().unwrap_or("its medium does not answer");
        self.opened.get().ok_or_else(|| format!("the store is not open yet: {why}"))
    }

    /// Notes what is pinned, for the next mirror.
    fn keep_pins(&self, pins: &BTreeMap<String, (Vec<String>, Pin)>) -> Result<(), String> {
        let Some(file) = &self.pins_file else { return Ok(()) };
        let named: BTreeMap<&String, &Vec<String>> =
            pins.iter().map(|(name, (versions, _))| (name, versions)).collect();
        replace_json_durably(file, &named).map_err(|e| format!("keeping the list of what is pinned: {e}"))
    }

    /// Pins what the last mirror had pinned.
    fn pin_again(&self) {
        let Some(file) = &self.pins_file else { return };
        let named: BTreeMap<String, Vec<String>> = read_json_or_default(file).unwrap_or_else(|error| {
            log::error!("what was pinned in the cache is not known any more: {error}");
            BTreeMap::new()
        });
        for (name, versions) in named {
            if let Err(error) = self.warm(&name, &versions, true, true) {
                log::error!("{name} is not pinned in the cache any more: {error}");
            }
        }
    }

    /// The store, for what is asked of it by name.
    fn store(&self, what: &str) -> Result<&Store, VersionError> {
        let unavailable = |why| VersionError::Unavailable { version: what.to_owned(), offset: 0, why };
        Ok(&self.opened().map_err(unavailable)?.store)
    }

    /// The store and a version of it.
    fn of(&self, version: &str, offset: u64) -> Result<(&Store, Version), VersionError> {
        let unavailable = |why: String| VersionError::Unavailable { version: version.to_owned(), offset, why };
        let parsed = version.parse().map_err(|e| unavailable(format!("not a version: {e}")))?;
        Ok((&self.opened().map_err(unavailable)?.store, parsed))
    }
}

impl Versions for StoreVersions {
    fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError> {
        let (store, parsed) = self.of(version, offset)?;
        let len = buf.len().min(usize::try_from(parsed.size.saturating_sub(offset)).unwrap_or(usize::MAX));
        let (inside, beyond) = buf.split_at_mut(len);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(0);
        }
        let read = store.read_at(&parsed, offset, inside);
        read.map(|stat| stat.stored_bytes).map_err(|e| failed(version, offset, &e))
    }

    fn together(&self, version: &str, pages: &[u64]) -> Result<Vec<Vec<u64>>, VersionError> {
        let (store, parsed) = self.of(version, pages.first().copied().unwrap_or(0))?;
        if !is_by_page(&parsed, pages) {
            return Ok(neighbours(pages));
        }
        let blocks: Vec<u64> = pages.iter().map(|page| page / PAGE).collect();
        let spans = store.spans(&parsed, &blocks).map_err(|e| failed(version, pages[0], &e))?;
        Ok(spans.into_iter().map(|span| span.blocks.iter().map(|block| block * PAGE).collect()).collect())
    }

    fn away(&self, version: &str, pages: &[u64]) -> Result<Vec<Vec<u64>>, VersionError> {
        let (store, parsed) = self.of(version, pages.first().copied().unwrap_or(0))?;
        let opened = self.opened.get().and_then(|opened| opened.cache.as_ref());
        let Some(cache) = opened.filter(|_| is_by_page(&parsed, pages)) else { return self.together(version, pages) };
        let blocks: Vec<u64> = pages.iter().map(|page| page / PAGE).collect();
        let spans = store.spans(&parsed, &blocks).map_err(|e| failed(version, pages[0], &e))?;
        let away = spans.into_iter().filter(|span| cache.holds(std::slice::from_ref(&span.place)).1 > 0);
        Ok(away.map(|span| span.blocks.iter().map(|block| block * PAGE).collect()).collect())
    }

    fn look_again(&self) {
        if let Ok(opened) = self.opened()
            && let Err(error) = opened.store.look_for_packs()
        {
            log::debug!("looking for new packs: {}", with_sources(&error));
        }
    }

    fn read_pages(&self, version: &str, pages: &[u64], sink: &mut dyn FnMut(u64, &[u8])) -> Result<u64, VersionError> {
        let (store, parsed) = self.of(version, pages.first().copied().unwrap_or(0))?;
        if !is_by_page(&parsed, pages) {
            return read_each(self, version, pages, sink);
        }
        let blocks: Vec<u64> = pages.iter().map(|page| page / PAGE).collect();
        let read = store.read_blocks(&parsed, &blocks, &mut |block, bytes| sink(block * PAGE, bytes));
        read.map(|stat| stat.stored_bytes).map_err(|e| failed(version, pages[0], &e))
    }

    fn data_ranges(&self, version: &str, range: ByteRange, most: usize) -> Result<(Vec<ByteRange>, u64), VersionError> {
        let (store, parsed) = self.of(version, range.start)?;
        let inside = ByteRange::new(range.start.min(parsed.size), range.end.min(parsed.size));
        let found = store.data_ranges_in(&parsed, inside, most).map_err(|e| failed(version, range.start, &e))?;
        Ok(if found.1 == inside.end { (found.0, range.end) } else { found })
    }

    fn state(&self) -> StoreState {
        let json = |value: serde_json::Result<serde_json::Value>| value.expect("counters serialise");
        match self.opened() {
            Err(why) => StoreState { trouble: Some(why), ..StoreState::default() },
            Ok(opened) => StoreState {
                open: true,
                trouble: None,
                health: json(serde_json::to_value(opened.store.health())),
                cache: opened.cache.as_ref().map(|cache| json(serde_json::to_value(cache.stats()))),
                condition: opened.cache.as_ref().map(|cache| json(serde_json::to_value(cache.condition()))),
            },
        }
    }

    fn warm(&self, name: &str, versions: &[String], begin: bool, pin: bool) -> Result<Warmth, String> {
        let opened = self.opened()?;
        let Some(cache) = &opened.cache else {
            return Err("this node's store is on its own disk: there is nothing to fetch ahead".to_owned());
        };
        let mut places = Vec::new();
        for version in versions {
            let parsed: Version = version.parse().map_err(|e| format!("{version}: not a version: {e}"))?;
            places.extend(opened.store.places(&parsed).map_err(|e| with_sources(&e))?);
        }
        if begin && pin {
            let pin = cache.pin(&places).map_err(|e| e.to_string())?;
            let mut pins = self.pins.lock().expect("no holder panics");
            pins.insert(name.to_owned(), (versions.to_vec(), pin));
            self.keep_pins(&pins)?;
        } else if begin {
            cache.prefetch(&places);
        }
        let (bytes, missing) = cache.holds(&places);
        let stats = cache.stats();
        let away = cache.condition().away;
        Ok(Warmth {
            bytes,
            missing_bytes: missing,
            room_bytes: stats.chunks_max * stats.chunk_bytes,
            idle: cache.wait_for_prefetch(Duration::ZERO),
            away,
        })
    }

    fn unpin(&self, name: &str) -> bool {
        let mut pins = self.pins.lock().expect("no holder panics");
        let removed = pins.remove(name).is_some();
        if let Err(error) = self.keep_pins(&pins) {
            log::warn!("{error}");
        }
        removed
    }

    fn blobs(&self) -> Result<Vec<String>, VersionError> {
        self.store("of any blob")?.blobs().map_err(|e| failed("of any blob", 0, &e))
    }

    fn blob(&self, name: &str) -> Result<Option<BlobEntry>, VersionError> {
        let info = self.store(name)?.blob(name).and_then(|blob| blob.info());
        let entry = |info: BlobInfo| BlobEntry { latest: info.latest, tags: info.tags, created_ms: info.created_ms };
        there(name, info.map(entry))
    }

    fn blob_version(&self, name: &str, number: u64) -> Result<Option<BlobVersionEntry>, VersionError> {
        let found = self.store(name)?.blob(name).and_then(|blob| {
            let (_, version) = blob.version(number)?;
            let logged = blob.log(number..number + 1)?;
            let time_ms = logged.first().map_or(0, |entry| entry.time_ms);
            Ok(BlobVersionEntry { version: version.to_string(), size: version.size, time_ms })
        });
        there(name, found)
    }

    fn blob_versions(&self, name: &str, from: u64, most: usize) -> Result<Vec<u64>, VersionError> {
        let store = self.store(name)?;
        let mut found = Vec::new();
        let mut at = from;
        while found.len() < most {
            let entries = store.blob(name).and_then(|blob| blob.log(at..at.saturating_add(most as u64)));
            let Some(entries) = there(name, entries)? else { break };
            let Some(last) = entries.last() else { break };
            at = last.number + 1;
            found.extend(entries.iter().filter(|entry| !entry.deleted).map(|entry| entry.number));
        }
        found.truncate(most);
        Ok(found)
    }
}

/// Whether each of these pages is a block of the version.
fn is_by_page(version: &Version, pages: &[u64]) -> bool {
    u64::from(version.block_size) == PAGE && pages.iter().all(|page| page + PAGE <= version.size)
}

/// What is not there is no error.
fn there<T>(name: &str, found: Result<T, Error>) -> Result<Option<T>, VersionError> {
    match found {
        Ok(found) => Ok(Some(found)),
        // A name that cannot be one names nothing.
        Err(Error::NotFound { .. } | Error::Invalid(_)) => Ok(None),
        Err(e) => Err(failed(&format!("of blob {name}"), 0, &e)),
    }
}

fn failed(version: &str, offset: u64, error: &Error) -> VersionError {
    let (version, why) = (version.to_owned(), with_sources(error));
    match error {
        Error::Corrupt { .. } => VersionError::Corrupt { version, offset, why },
        _ => VersionError::Unavailable { version, offset, why },
    }
}

/// An error with what caused it, on one line.
fn with_sources(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
