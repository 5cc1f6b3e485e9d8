//! Moving images, snapshots and blobs between this node's store and others, and cleaning up.

use crate::error::{Error, Result};
use crate::node::Node;
use crate::record::SnapshotMeta;
use crate::shared::{heads_of_gone, nodes};
use crate::snapshots::meta;
use crate::{foresight, layout, sweep};
use api::{Credentials, GcPack, GcReply, GcRequest, Moved, RemoteRequest, Stored, TransferRequest};
use base::{RamFileId, RamMap, Source};
use guest::plan::Profile;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use store::engine::{S3, object};
use store::transfer::{Options, Progress as Sent, transfer};
use store::{Expect, Fate, Manifest, Member, Mode, Retention, Store};

/// Sees how far a long operation is.
type Progress<'a> = &'a mut (dyn FnMut(&str, u64, u64) + Send);

/// Kinds of heads that are moved, and how their names begin for people.
const KINDS: [(&str, &str); 3] = [("snap/", ""), ("image/", "image:"), ("blob/", "blob:")];

impl Node {
    /// Sends images, snapshots and blobs to another store.
    ///
    /// # Errors
    /// Where one is not there, or is there already on the other side; where the other store does not answer. What was
    /// sent before stays, and shortens the next attempt.
    pub fn push(&self, request: &TransferRequest, progress: Progress<'_>) -> Result<Vec<Moved>> {
        let there = open(&request.store, request.credentials.as_ref(), true)?;
        let heads =
            request.names.iter().map(|name| self.head_of(&self.shared.store, name)).collect::<Result<Vec<_>>>()?;
        let mut out = Vec::new();
        for (name, head) in request.names.iter().zip(heads) {
            refuse_taken(&there, &head, name, request.force)?;
            out.push(self.moved(&self.shared.store, &there, &head, name, None, progress)?);
        }
        Ok(out)
    }

    /// Fetches images, snapshots and blobs from another store.
    ///
    /// # Errors
    /// As [`Node::push`], the sides changed.
    pub fn pull(&self, request: &TransferRequest, progress: Progress<'_>) -> Result<Vec<Moved>> {
        let there = open(&request.store, request.credentials.as_ref(), false)?;
        let heads = request.names.iter().map(|name| self.head_of(&there, name)).collect::<Result<Vec<_>>>()?;
        let mut out = Vec::new();
        for (name, head) in request.names.iter().zip(heads) {
            refuse_taken(&self.shared.store, &head, name, request.force)?;
            let fresh = match there.head(&head)? {
                Some((manifest, _)) if head.starts_with("snap/") => Some(self.renamed(&head, &manifest)?),
                _ => None,
            };
            let done = self.moved(&there, &self.shared.store, &head, name, fresh.as_ref(), progress)?;
            if let Some(meta) = &fresh
                && let Some((manifest, _)) = self.shared.store.head(&head)?
            {
                self.shared.learn(&manifest, meta);
            }
            out.push(done);
        }
        Ok(out)
    }

    /// What lies in another store.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn remote(&self, request: &RemoteRequest) -> Result<Vec<Stored>> {
        let there = open(&request.store, request.credentials.as_ref(), false)?;
        let mut out = Vec::new();
        for (prefix, shown) in KINDS {
            for head in there.heads(prefix)? {
                let Some((manifest, _)) = there.head(&head)? else { continue };
                let name = format!("{shown}{}", head.trim_start_matches(prefix));
                // A blob's history is as large as all its versions: what counts is the latest.
                let counted = manifest.versions.iter().filter(|(blob, _)| prefix != "blob/" || *blob == "latest");
                out.push(Stored { name, logical_bytes: counted.map(|(_, version)| version.size).sum() });
            }
        }
        Ok(out)
    }

    /// Drops snapshots that a rule lets go, and gives back what nothing reaches.
    ///
    /// # Errors
    /// Where a store is damaged: nothing is removed then; or does not answer.
    pub fn gc(&self, request: &GcRequest) -> Result<GcReply> {
        let other = match &request.store {
            Some(name) => Some(open(name, request.credentials.as_ref(), true)?),
            None => None,
        };
        let store = other.as_deref().unwrap_or(&self.shared.store);
        let rule = Retention {
            keep_last: request.keep_last.unwrap_or(0),
            keep_within: Duration::from_secs(request.keep_within_s.unwrap_or(0)),
        };
        let mut drops = snapshots_to_drop(store, &rule)?;
        let own = self.shared.place.as_ref().filter(|_| other.is_none()).map(|place| place.node.as_str());
        if let Some(id) = &request.drop_node {
            drops.extend(heads_of_gone(store, id, own)?);
        }
        let mut reply = GcReply {
            dropped: drops.iter().map(|h| shown(h)).collect(),
            nodes: nodes(store, own)?,
            ..GcReply::default()
        };
        if request.dry_run {
            let explained = store.explain_collection(&drops)?;
            (reply.bytes, reply.bytes_later) = (explained.bytes_now, explained.bytes_later);
            reply.packs = explained
                .packs
                .into_iter()
                .map(|p| GcPack {
                    pack: p.pack,
                    bytes: p.bytes,
                    kept_bytes: p.kept_bytes,
                    fate: fate(p.fate).into(),
                    why: p.why,
                })
                .collect();
            return Ok(reply);
        }
        for head in &drops {
            store.delete_head(head)?;
            if let Some(snapshot) = head.strip_prefix("snap/") {
                store.delete_head(&foresight::profile_head(snapshot))?;
                store.delete_head(&foresight::disk::profile_head(head))?;
            }
        }
        if other.is_some() || self.shared.is_shared() {
            if other.is_none() {
                sweep::sweep(&self.shared)?;
            }
            reply.bytes = store.collect()?.bytes;
        } else {
            let before = store.stats().stored_bytes;
            sweep::sweep(&self.shared)?;
            reply.bytes = before.saturating_sub(store.stats().stored_bytes);
        }
        Ok(reply)
    }

    /// The head that a name stands for in `store`.
    pub(crate) fn head_of(&self, store: &Store, name: &str) -> Result<String> {
        let there = |head: &str| -> Result<bool> { Ok(store.head(head)?.is_some()) };
        let kind = KINDS
            .iter()
            .filter(|(_, shown)| !shown.is_empty())
            .find_map(|(prefix, shown)| name.strip_prefix(shown).map(|rest| format!("{prefix}{rest}")));
        let head = match kind {
            Some(head) => head,
            None if name.contains('@') => format!("snap/{name}"),
            None => format!("image/{name}"),
        };
        if there(&head)? {
            return Ok(head);
        }
        Err(Error::NotFound(format!(
            "{name} is not there; name a snapshot as VM@TAG, an image as NAME, a blob as blob:NAME (`offshoot remote` lists what another store has)"
        )))
    }

    fn moved(
        &self,
        from: &Store,
        to: &Store,
        head: &str,
        name: &str,
        fresh: Option<&SnapshotMeta>,
        progress: Progress<'_>,
    ) -> Result<Moved> {
        let told = Mutex::new(progress);
        let step = |sent: Sent<'_>| {
            let mut told = told.lock().expect("no panic while progress is told");
            told(&format!("{name}: {}", sent.blob), sent.done_bytes, sent.total_bytes);
        };
        let describe = |arrived: &Manifest| match fresh {
            None => Ok(arrived.meta.clone()),
            Some(meta) => described(to, arrived, meta),
        };
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(8);
        let learnt = learnt(from, head);
        let disks = foresight::disk::carried(from, head).unwrap_or_else(|error| {
            log::warn!("what is known of the disks of {name} stays behind: {}", error.whole());
            foresight::disk::Profiles::new()
        });
        let order = learnt.iter().map(|l| (l.ram.clone(), l.order.clone()));
        let order: BTreeMap<String, Vec<u64>> = order.chain(layout::disk_orders(&disks)).collect();
        let options = Options {
            expect: Expect::Any,
            threads,
            describe: Some(&describe),
            order,
            progress: Some(&step),
            ..Options::default()
        };
        let done = transfer(from, head, to, head, &options)?;
        if let Some(learnt) = learnt {
            let id = fresh.map_or(learnt.id, |meta| meta.id);
            if let Err(error) = foresight::carry(to, name, id, &learnt.profile) {
                log::warn!("what is known of {name} stays behind: {}", error.whole());
            }
        }
        if let Err(error) = foresight::disk::carry(to, head, &disks) {
            log::warn!("what is known of the disks of {name} stays behind: {}", error.whole());
        }
        Ok(Moved {
            name: name.to_owned(),
            blocks_read: done.blocks_read,
            blocks_sent: done.blocks_sent,
            stored_bytes: done.stored_bytes,
        })
    }

    /// The description of a snapshot from elsewhere with ids of this node: those it came with mean other things here.
    fn renamed(&self, head: &str, manifest: &Manifest) -> Result<SnapshotMeta> {
        let mut meta = meta(head, manifest)?;
        meta.id = self.shared.home.new_id()?;
        meta.views = meta.views.iter().map(|_| self.shared.home.new_id()).collect::<Result<_>>()?;
        Ok(meta)
    }
}

/// What is known of a snapshot, to go with it.
struct Learnt {
    id: u64,
    profile: Profile,
    /// The blob of its RAM, and the blocks of it that are to lie first.
    ram: String,
    order: Vec<u64>,
}

/// Nothing where `head` is no snapshot, or where it cannot be read: that costs speed and nothing else.
fn learnt(from: &Store, head: &str) -> Option<Learnt> {
    let name = head.strip_prefix("snap/")?;
    let found = || -> Result<Option<Learnt>> {
        let Some((manifest, _)) = from.head(head)? else { return Ok(None) };
        let meta = meta(head, &manifest)?;
        let profile = foresight::carried(from, name, meta.id)?;
        let (_, order) = layout::order(&manifest, &meta, profile.clone())?;
        Ok(Some(Learnt { id: meta.id, profile, ram: meta.shape.ram[0].id.clone(), order }))
    };
    found().unwrap_or_else(|error| {
        log::warn!("what is known of {name} stays behind: {}", error.whole());
        None
    })
}

/// The description of a snapshot that arrives: its RAM is one file, that of its id.
fn described(store: &Store, arrived: &Manifest, fresh: &SnapshotMeta) -> std::result::Result<String, store::Error> {
    let mut meta = fresh.clone();
    let mut map = RamMap::zero(meta.shape.memory_bytes());
    if let Some(ram) = arrived.versions.get(&meta.shape.ram[0].id) {
        for range in store.data_ranges(ram)? {
            map.set(range, Source::File(RamFileId(meta.id)));
        }
    }
    meta.map = map.encode();
    Ok(serde_json::to_string(&meta).expect("records serialise"))
}

/// Opens another store.
fn open(name: &str, credentials: Option<&Credentials>, write: bool) -> Result<Arc<Store>> {
    if name.starts_with("s3://") {
        let opened = match credentials {
            Some(c) => {
                let keys =
                    object::Credentials { key_id: c.key_id.clone(), secret: c.secret.clone(), token: c.token.clone() };
                S3::open_with(name, keys, object::Limits::default())
            }
            None => S3::open(name),
        };
        let engine = opened.map_err(|e| Error::Invalid(format!("{name}: {e}")))?;
        let mode = if write { Mode::Shared } else { Mode::ReadOnly };
        return Ok(Arc::new(Store::open_engine(Arc::new(engine), mode)?));
    }
    let path = Path::new(name.strip_prefix("file://").unwrap_or(name));
    if !path.is_absolute() {
        return Err(Error::Invalid(format!(
            "`{name}` names no store: give the absolute path of a directory, or s3://BUCKET/PREFIX?endpoint=URL"
        )));
    }
    let mode = if write { Mode::ReadWrite } else { Mode::ReadOnly };
    Ok(Arc::new(Store::open(path, mode)?))
}

fn refuse_taken(store: &Store, head: &str, name: &str, force: bool) -> Result<()> {
    if force || store.head(head)?.is_none() {
        return Ok(());
    }
    Err(Error::Conflict(format!("{name} is there already; --force replaces it, and sends only what differs")))
}

/// The snapshots that a rule lets go, VM by VM.
fn snapshots_to_drop(store: &Store, rule: &Retention) -> Result<Vec<String>> {
    let mut series: BTreeMap<String, Vec<(u64, u64, String)>> = BTreeMap::new();
    for head in store.heads("snap/")? {
        let Some((manifest, _)) = store.head(&head)? else { continue };
        let meta = meta(&head, &manifest)?;
        let made = humantime::parse_rfc3339_weak(&meta.created).ok();
        let made = made.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let made_ms = made.map_or(u64::MAX, |d| d.as_millis() as u64);
        series.entry(meta.vm).or_default().push((made_ms, meta.id, head));
    }
    let members = |mut of: Vec<(u64, u64, String)>| -> Vec<Member> {
        // Times are whole seconds: of one second the order of the ids counts, which are given out in ascending order.
        of.sort();
        let member = |(place, (made_ms, _, head)): (usize, (u64, u64, String))| Member {
            head,
            made_ms: made_ms.saturating_add(place as u64 % 1000),
            held: false,
        };
        of.into_iter().enumerate().map(member).collect()
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(series.into_values().flat_map(|of| rule.drops(&members(of), now.as_millis() as u64)).collect())
}

/// A head as people name it.
fn shown(head: &str) -> String {
    let kind = KINDS.iter().find_map(|(prefix, shown)| Some(format!("{shown}{}", head.strip_prefix(prefix)?)));
    kind.unwrap_or_else(|| head.to_owned())
}

fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Keep => "keep",
        Fate::Trim => "trim",
        Fate::Compact => "compact",
        Fate::Condemn => "condemn",
        Fate::Wait => "wait",
        Fate::Spare => "spare",
        Fate::Remove => "remove",
    }
}
