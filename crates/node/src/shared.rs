//! What a node that shares its store can say of it and do for it: how it does, what is warm, who else is there.

use crate::error::{Error, Result};
use crate::node::Node;
use crate::place::NodeMeta;
use api::{GcNode, StoreReport, WarmReply, WarmRequest};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use store::Store;

/// How often somebody who waits is told how far the fetching is.
const EVERY: Duration = Duration::from_millis(250);
/// After so long without a byte, whoever waits is told why.
const STUCK: Duration = Duration::from_secs(60);

impl Node {
    /// How the store does. Asks it, so that the answer is of now.
    ///
    /// # Errors
    /// Where the mirror does not answer.
    pub fn store_report(&self) -> Result<StoreReport> {
        let shared = &self.shared;
        let Some(place) = &shared.place else {
            return Ok(StoreReport {
                url: shared.home.path("store").display().to_string(),
                reachable: true,
                ..StoreReport::default()
            });
        };
        let asked = shared.store.head(place.prefix().trim_end_matches('/'));
        let away = asked.err().filter(store::Error::is_away).map(|error| Error::from(error).whole());
        let mirror = shared.mirror.store()?;
        let health = shared.store.health();
        let condition = shared.cache.as_ref().map(|cache| cache.condition()).unwrap_or_default();
        let number = |of: &Option<Value>, key: &str| of.as_ref().and_then(|v| v[key].as_u64()).unwrap_or(0);
        let (hits, misses) = (number(&mirror.cache, "hits"), number(&mirror.cache, "misses"));
        let chunk = number(&mirror.cache, "chunk_bytes");
        Ok(StoreReport {
            url: place.url.clone(),
            node: Some(place.node.clone()),
            reachable: away.is_none(),
            away_ms: condition.away_ms.filter(|_| away.is_some()),
            last_failure: away.or(health.last_failure.clone()),
            circuit: serde_json::to_value(health.circuit).ok().and_then(|c| Some(c.as_str()?.to_owned())),
            cache_bytes: place.cache_bytes,
            cache_filled_bytes: number(&mirror.cache, "chunks") * chunk + number(&mirror.cache, "small_bytes"),
            hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
            mirror_trouble: mirror.trouble.clone(),
            waiting_commits: shared.pending.lock().expect("no holder panics").len() as u64,
            daemon: serde_json::json!({
                "health": health,
                "cache": shared.cache.as_ref().map(|cache| cache.stats()),
                "condition": condition,
            }),
            mirror: serde_json::to_value(mirror).expect("counters serialise"),
        })
    }

    /// Fetches images, snapshots and blobs into the node's cache, or lets go what was pinned there.
    ///
    /// # Errors
    /// One is not there, the cache has no room for it, or the store does not answer for a minute.
    pub fn warm(&self, request: &WarmRequest, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<Vec<WarmReply>> {
        if !self.shared.is_shared() {
            return Err(Error::Invalid(
                "this node's store is on its own disk: there is nothing to fetch ahead".to_owned(),
            ));
        }
        request.names.iter().map(|name| self.warm_one(name, request, progress)).collect()
    }

    fn warm_one(
        &self,
        name: &str,
        request: &WarmRequest,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<WarmReply> {
        let mirror = &self.shared.mirror;
        let mut reply = WarmReply { name: name.to_owned(), pinned: request.pin, ..WarmReply::default() };
        if request.unpin {
            if !mirror.unpin(name)? {
                return Err(Error::NotFound(format!("{name} is not pinned in the cache")));
            }
            return Ok(reply);
        }
        let versions = self.versions_of(name)?;
        let began = mirror.warm(name, &versions, true, request.pin)?;
        if began.bytes > began.room_bytes {
            return Err(Error::Host(format!(
                "{name} takes {} of the cache, which has room for {}; give it more (`offshoot serve --cache-size`)",
                base::units::human(began.bytes),
                base::units::human(began.room_bytes)
            )));
        }
        (reply.bytes, reply.fetched_bytes) = (began.bytes, began.missing_bytes);
        let (mut left, mut since) = (began.missing_bytes, Instant::now());
        while left > 0 {
            progress(name, began.bytes - left.min(began.bytes), began.bytes);
            std::thread::sleep(EVERY);
            let now = mirror.warm(name, &versions, false, false)?;
            if now.missing_bytes < left {
                since = Instant::now();
            } else if since.elapsed() > STUCK {
                let why = now.away.unwrap_or_else(|| "what is fetched does not stay in the cache".to_owned());
                return Err(Error::Host(format!("{} of {name} are missing: {why}", base::units::human(left))));
            } else if now.idle {
                // Refused, evicted or failed meanwhile: once more.
                mirror.warm(name, &versions, true, false)?;
            }
            left = now.missing_bytes;
        }
        progress(name, began.bytes, began.bytes);
        Ok(reply)
    }

    /// The versions that a name stands for, in text. Of a blob only the latest.
    fn versions_of(&self, name: &str) -> Result<Vec<String>> {
        if let Some(blob) = name.strip_prefix("blob:") {
            return Ok(vec![self.blob_version(blob)?.version.to_string()]);
        }
        let head = self.head_of(&self.shared.store, name)?;
        let found = self.shared.store.head(&head)?;
        let (manifest, _) = found.ok_or_else(|| Error::NotFound(format!("{name} is gone")))?;
        Ok(manifest.versions.values().map(ToString::to_string).collect())
    }
}

/// The nodes that a store knows, and the heads that each keeps for itself.
pub(crate) fn nodes(store: &Store, own: Option<&str>) -> Result<Vec<GcNode>> {
    let mut out: BTreeMap<String, GcNode> = BTreeMap::new();
    for head in store.heads("node/")? {
        let rest = head.strip_prefix("node/").unwrap_or(&head);
        let (id, kept) = rest.split_once('/').map_or((rest, false), |(id, _)| (id, true));
        let node = out.entry(id.to_owned()).or_insert_with(|| GcNode { id: id.to_owned(), ..GcNode::default() });
        node.heads += u64::from(kept);
        node.this = own == Some(id);
        if !kept
            && let Some((manifest, _)) = store.head(&head)?
            && let Ok(meta) = serde_json::from_str::<NodeMeta>(&manifest.meta)
        {
            (node.host, node.home, node.seen) = (meta.host, meta.home, meta.seen);
        }
    }
    Ok(out.into_values().collect())
}

/// The heads that a node keeps, for somebody who says that it is gone.
pub(crate) fn heads_of_gone(store: &Store, id: &str, own: Option<&str>) -> Result<Vec<String>> {
    if own == Some(id) {
        return Err(Error::Conflict(format!("{id} is this node; it drops by itself what it does not need")));
    }
    let (name, below) = (format!("node/{id}"), format!("node/{id}/"));
    let mut heads: Vec<String> =
        store.heads("node/")?.into_iter().filter(|head| *head == name || head.starts_with(&below)).collect();
    // The node itself last: as long as it is listed, this can be done again.
    heads.sort_by_key(|head| *head == name);
    if heads.is_empty() {
        return Err(Error::NotFound(format!("the store knows no node {id}; `offshoot gc --dry-run` lists them")));
    }
    Ok(heads)
}
