//! Moving images, snapshots and blobs between stores, and cleaning stores up.
//!
//! A store is named by the path of its directory, or as `s3://BUCKET/PREFIX?endpoint=URL&region=NAME`. What lies in
//! one is named `VM@TAG` (a snapshot), `image:NAME` or just `NAME` (an image), or `blob:NAME`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Body of `POST /v1/push` and `POST /v1/pull`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferRequest {
    /// The other store.
    pub store: String,
    /// What to move.
    pub names: Vec<String>,
    /// Replace what is there under these names.
    #[serde(default)]
    pub force: bool,
    /// What requests to the other store are signed with; where absent, the daemon's own environment and files say.
    #[serde(default)]
    pub credentials: Option<Credentials>,
}

/// Body of `POST /v1/remote`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteRequest {
    /// The other store.
    pub store: String,
    /// As in [`TransferRequest`].
    #[serde(default)]
    pub credentials: Option<Credentials>,
}

/// Keys of an S3 server. Shows itself nowhere.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// Which key.
    pub key_id: String,
    /// The secret part.
    pub secret: String,
    /// The token of temporary ones.
    #[serde(default)]
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(hidden)")
    }
}

/// What was moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Its name.
    pub name: String,
    /// Blocks that were read and compared.
    pub blocks_read: u64,
    /// Of these, blocks that the other side lacked.
    pub blocks_sent: u64,
    /// Bytes by which the other side grew.
    pub stored_bytes: u64,
}

/// What lies in a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Its name, as for a push or pull.
    pub name: String,
    /// Bytes of all its disks and memories.
    pub logical_bytes: u64,
}

/// Body of `POST /v1/gc`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Say what would be done, and do nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Keep so many of the newest snapshots of each VM.
    #[serde(default)]
    pub keep_last: Option<usize>,
    /// Keep snapshots not older than so many seconds.
    #[serde(default)]
    pub keep_within_s: Option<u64>,
    /// Drop what this node, which is gone, kept for itself: its id.
    #[serde(default)]
    pub drop_node: Option<String>,
    /// Another store to clean up instead of the node's own.
    #[serde(default)]
    pub store: Option<String>,
    /// As in [`TransferRequest`].
    #[serde(default)]
    pub credentials: Option<Credentials>,
}

/// What a clean-up did or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReply {
    /// Snapshots that the rule drops.
    pub dropped: Vec<String>,
    /// Nodes that share the store, and what each keeps for itself.
    #[serde(default)]
    pub nodes: Vec<GcNode>,
    /// What becomes of each pack, and why; of a dry run only.
    pub packs: Vec<GcPack>,
    /// Bytes that went, or would go at once.
    pub bytes: u64,
    /// Bytes that go later, when a shared store's time of grace is over.
    pub bytes_later: u64,
}

/// A node that shares a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcNode {
    /// Its id.
    pub id: String,
    /// Name of its host.
    pub host: String,
    /// Its home there.
    pub home: String,
    /// When its daemon last started, RFC 3339 in UTC.
    pub seen: String,
    /// Heads that it keeps for itself: of its VMs, exports and freezes.
    pub heads: u64,
    /// Whether it is the one that answers.
    pub this: bool,
}

/// Body of `POST /v1/warm`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    /// What to fetch into the node's cache, named as for a push.
    pub names: Vec<String>,
    /// Keep it there.
    #[serde(default)]
    pub pin: bool,
    /// Keep it there no longer.
    #[serde(default)]
    pub unpin: bool,
}

/// What is warm now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmReply {
    /// Its name.
    pub name: String,
    /// Bytes it takes of the cache.
    pub bytes: u64,
    /// Of these, bytes that had to be fetched.
    pub fetched_bytes: u64,
    /// Whether it was pinned.
    pub pinned: bool,
}

/// `GET /v1/store`: the node's store and its cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreReport {
    /// Where it is.
    pub url: String,
    /// The node's id there, where it is shared.
    pub node: Option<String>,
    /// Whether it answered just now.
    pub reachable: bool,
    /// For how many milliseconds it has not answered.
    pub away_ms: Option<u64>,
    /// What the last failure was.
    pub last_failure: Option<String>,
    /// Whether requests are let through: `closed`, `open` or `half_open`.
    pub circuit: Option<String>,
    /// Bytes that the cache may take.
    pub cache_bytes: u64,
    /// Bytes that it takes.
    pub cache_filled_bytes: u64,
    /// Which part of what the mirror read was in the cache, since it started.
    pub hit_rate: Option<f64>,
    /// Why the mirror has not opened the store.
    pub mirror_trouble: Option<String>,
    /// Freezes that are not in the store yet.
    pub waiting_commits: u64,
    /// Counters of the daemon.
    pub daemon: serde_json::Value,
    /// Counters of the mirror.
    pub mirror: serde_json::Value,
}

/// What becomes of a pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcPack {
    /// Its object.
    pub pack: String,
    /// Its bytes.
    pub bytes: u64,
    /// Of these, bytes that something still reaches.
    pub kept_bytes: u64,
    /// `keep`, `trim`, `compact`, `condemn`, `wait`, `spare` or `remove`.
    pub fate: String,
    /// Why.
    pub why: String,
}
