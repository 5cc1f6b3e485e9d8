//! What is said over the control socket `<home>/run/mirror.sock`: one JSON object a line, one line in answer,
//! `{"ok": …}` or `{"error": "…"}`.
//!
//! Every request may be sent again after a lost answer: what is done already is answered as if done now. So a
//! client whose mirror was killed and replaced repeats its last request and goes on.
//!
//! The answer to `fuse_fd` carries the FUSE descriptor as ancillary data of its first byte.

use crate::ram::Holder;
use crate::stats::VmStats;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;

/// Smallest id an object may have: those below are the mount's directories.
pub const ID_MIN: u64 = 16;

/// What lies below an overlay or a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Below {
    /// Zeros.
    Zero,
    /// A version of the store, in text.
    Version(String),
    /// A view, by id.
    View(u64),
}

/// Where a RAM file's own pages come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RamSource {
    /// From a process that holds them, until they are committed.
    Pending(Holder),
    /// From a version of the store, in text.
    Committed(String),
    /// They are zero.
    Blank,
}

/// A RAM file to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSpec {
    /// Its id: its name in the mount and its inode number.
    pub id: u64,
    /// How it is put together: `base::RamMap` in text. The map's size is the file's.
    pub map: String,
    /// Where the pages come from that the map gives to `id` itself.
    pub source: RamSource,
}

/// A writable disk to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlaySpec {
    /// Its id: its name in the mount and its inode number.
    pub id: u64,
    /// The VM whose counters its requests go to.
    pub vm: String,
    /// Bytes.
    pub size: u64,
    /// Bytes in a block, a power of two; that of what lies below.
    pub block_size: u64,
    /// What it shows where nothing was written.
    pub below: Below,
}

/// A disk to serve over NBD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// Its name, also in the protocol; clients that name none get it as well.
    pub name: String,
    /// For people.
    pub description: String,
    /// Absolute path of its socket, mode 0600.
    pub socket: PathBuf,
    /// What is served.
    pub source: ExportSource,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it ends with its last connection, or when nobody connects for ten seconds.
    pub ephemeral: bool,
}

/// What an export serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportSource {
    /// A disk, by id. It cannot be removed while it is served.
    Overlay(u64),
    /// A version of the store, in text, of so many bytes; never writable.
    Version {
        /// The version.
        version: String,
        /// Bytes.
        size: u64,
        /// Bytes in a block.
        block_size: u64,
    },
}

/// What to do for a VM's RAM beyond answering its faults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Foresee {
    /// The VM; registered, where its RAM has an address.
    pub vm: String,
    /// The RAM file that equals the RAM it started with: VMs that name the same one share their prefetch.
    pub ram: u64,
    /// The map it started with: `base::RamMap` in text.
    pub map: String,
    /// Address of its RAM in its process. None: its hypervisor is yet to start, and what it will touch is fetched
    /// meanwhile; the same is said again, with the address, before the guest runs.
    pub address: Option<u64>,
    /// File with what is known of its template, as `guest::plan::Template` encodes it; none: nothing is fetched.
    pub template: Option<PathBuf>,
    /// As `guest::plan::Policy` writes it.
    pub policy: String,
    /// From 0 to 1.
    pub eager: f32,
    /// Whether to record what it touches.
    pub record: bool,
}

/// What to do for the readers of a disk beyond answering them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeseeDisk {
    /// The disk.
    pub disk: OfDisk,
    /// The version that it shows where nothing was written, in text.
    pub version: String,
    /// Blocks of 4 KiB of that to fetch ahead, by number and in this order; not again while they are on their way.
    pub blocks: Vec<u32>,
    /// Whether to record which blocks of what it shows are read, from now on; where that was begun it goes on.
    pub record: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OfDisk {
    /// One that may be written, by id.
    Overlay(u64),
    /// A version that is served as it is, by the name of its export.
    Export(String),
}

/// What a VM touched, or what was read of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    /// Pages, or blocks, in the order of their first touch, each with milliseconds since its start; only at the end.
    pub touches: Vec<(u32, u32)>,
    /// When its working set had settled, in milliseconds; none: not yet.
    pub settled_ms: Option<u32>,
    /// For how long it has been looked at.
    pub seen_ms: u32,
}

/// The pages of a VM's RAM that the mirror brought, as runs of page numbers: first and end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamPages {
    /// Those that it waited for.
    pub faulted: Vec<(u64, u64)>,
    /// Those that were brought ahead of it and of the other offshoots of its template, used or not.
    pub brought: Vec<(u64, u64)>,
}

/// What is fetched ahead for the VMs of one template.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStats {
    /// The RAM file that they started from.
    pub ram: u64,
    /// Bytes brought.
    pub fetched_bytes: u64,
    /// Bytes asked for and not here.
    pub flying_bytes: u64,
    /// Runs of pages that could not be had.
    pub failed: u64,
    /// Whether nothing is wanted now.
    pub idle: bool,
    /// By color: pages that a guest waited for, pages asked for ahead, and of these those touched.
    pub by_color: std::collections::BTreeMap<u8, (u64, u64, u64)>,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[expect(missing_docs, reason = "fields are named as in the structures above and documented at the client's methods")]
pub enum Request {
    /// Who are you? Answer: [`Hello`].
    Hello,
    /// Adds a RAM file.
    AddRam(RamSpec),
    /// From now on the file's own pages come from a version; the holder may end once this is answered.
    SetRamCommitted { id: u64, version: String },
    /// Adds a writable disk.
    AddOverlay(OverlaySpec),
    /// Freezes what an overlay shows now into a new view.
    Mark { overlay: u64, view: u64 },
    /// What a view changed. Answer: [`ViewChanges`].
    View { id: u64 },
    /// From now on what the view's layer lacks comes from a version.
    SetViewCommitted { id: u64, version: String },
    /// Makes durable all that was written to an overlay.
    Flush { id: u64 },
    /// Removes objects; those that others stand on go when the last of these goes. Answer: [`Removed`].
    Remove { ids: Vec<u64> },
    /// Serves a disk over NBD, until it is told not to or, where it is ephemeral, until nobody uses it.
    AddExport(ExportSpec),
    /// Ends an export; what was written is durable when this is answered. Answer: whether it was there.
    RemoveExport { name: String },
    /// Every object. Answer: [`Listing`].
    List,
    /// Counts the faults of a process for a VM.
    RegisterVm { vm: String, pid: u32 },
    /// Forgets a VM's counters.
    UnregisterVm { vm: String },
    /// Counters. Answer: [`Stats`].
    Stats {
        #[serde(default)]
        vm: Option<String>,
    },
    /// Fetches ranges (first byte and end) of an object in order, behind all demand. Answer: [`Queued`].
    Prefetch {
        object: u64,
        ranges: Vec<(u64, u64)>,
        #[serde(default)]
        vm: Option<String>,
    },
    /// Begins to read what a VM of these versions needs first: where blocks lie, and the first of each disk.
    Approach { ram: String, disks: Vec<String> },
    /// Fetches RAM ahead of a VM that is registered, records what it touches, or both.
    Foresee(Foresee),
    /// Whether a VM's working set has settled; with `end`, also what it touched, and nothing more is recorded.
    /// Answer: [`Recording`].
    Recording { vm: String, end: bool },
    /// Fetches blocks ahead of a disk's readers, records what they read, or both.
    ForeseeDisk(ForeseeDisk),
    /// As `recording`, of a disk. Answer: [`Recording`].
    DiskRecording { disk: OfDisk, end: bool },
    /// Which pages of a VM's RAM were brought. Answer: [`RamPages`].
    RamPages { vm: String },
    /// How the store does. Answer: [`StoreState`].
    Store,
    /// How much of these versions is in the node's cache. Answer: [`Warmth`].
    Warm { name: String, versions: Vec<String>, begin: bool, pin: bool },
    /// Lets the cache evict what was pinned under a name. Answer: whether something was.
    Unpin { name: String },
    /// About the tree of blobs.
    Tree(TreeRequest),
    /// Passes the FUSE descriptor.
    FuseFd,
    /// Ends the mirror; VMs wait for the next one, unless it is to unmount.
    Shutdown { unmount: bool },
}

/// A request about the tree of blobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "tree", rename_all = "snake_case")]
#[expect(missing_docs, reason = "as of `Request`")]
pub enum TreeRequest {
    /// The next request of the kernel's that is for the daemon and none of `known`, on which it works; waits for one
    /// up to `wait_ms`. Answer: an [`Ask`], or null.
    Next { known: Vec<String>, wait_ms: u64 },
    /// What became of one. Answer: whether somebody waited for it.
    Answer { token: String, answer: AskAnswer },
    /// From now on these are the mirrored files.
    SetFiles { files: Vec<FilePlace> },
    /// What is open. Answer: [`Opens`].
    Opens,
    /// Lets nobody open a version, or any of a blob, any more. Answer: [`Opens`].
    Bar { blob: String, number: Option<u64> },
    /// Takes a bar back, or all.
    Lift { bar: Option<(String, Option<u64>)> },
    /// Withdraws a mirrored file if nobody has it open and it has no local changes, or with `changed` if it has.
    /// Answer: whether it did.
    Retire { overlay: u64, changed: bool },
    /// Bytes of a mirrored file's local changes. Answer: a number.
    Changed { overlay: u64 },
}

/// Something that only the daemon can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Names it: the same when the kernel asks again because a mirror died.
    pub token: String,
    /// What.
    pub asked: AskedOf,
}

/// What a daemon is asked for. It is answered with a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskedOf {
    /// A mirrored file for a version: its overlay.
    Open {
        /// Name of the blob.
        blob: String,
        /// Number of the version.
        number: u64,
    },
    /// To make a mirrored file's local changes the next version: its number.
    Commit {
        /// The file.
        overlay: u64,
    },
    /// To make a mirrored file one of a new blob: the number of the version it then stands on.
    Clone {
        /// The file.
        overlay: u64,
        /// Name of the new blob.
        name: String,
    },
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskAnswer {
    /// Done, durably.
    Done(u64),
    /// Not done.
    Failed {
        /// What the asking program is told.
        errno: i32,
        /// What people are told.
        why: String,
    },
}

/// Where a mirrored file is in the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePlace {
    /// Its overlay.
    pub overlay: u64,
    /// Name of the blob.
    pub blob: String,
    /// Number of the version that it stands on.
    pub number: u64,
}

/// What is open in the tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opens {
    /// Versions as they are in the store.
    pub versions: Vec<OpenVersion>,
    /// Mirrored files, and how often.
    pub overlays: Vec<(u64, u64)>,
}

/// An open version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenVersion {
    /// Its inode.
    pub node: u64,
    /// Name of the blob.
    pub blob: String,
    /// Its number.
    pub number: u64,
    /// The version, in text.
    pub version: String,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// Done.
    Ok(T),
    /// Not done, and why.
    Error(String),
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its process.
    pub pid: u32,
    /// The FUSE session it serves: stays the same when one mirror takes over from another.
    pub session: String,
}

/// What a view changed against what lies below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewChanges {
    /// File with the written blocks' data, at their offsets in the disk. It no longer changes there.
    pub data_path: PathBuf,
    /// Written blocks: first byte and end. The last may pass the end of a disk that is not whole blocks.
    pub dirty: Vec<(u64, u64)>,
    /// Zeroed blocks, likewise; the file's bytes there mean nothing.
    pub zeroed: Vec<(u64, u64)>,
    /// What lies below: by its version, where that is known. The version the view itself became, once committed.
    pub below: Below,
    /// Whether it was committed.
    pub committed: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u64,
}

/// What became of objects to be removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Gone, with those that had been deferred for their sake.
    pub removed: Vec<u64>,
    /// Still stood on, by the objects named; they go with the last of these.
    pub deferred: Vec<(u64, Vec<u64>)>,
    /// Were not there.
    pub missing: Vec<u64>,
}

/// All objects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// RAM files: id, bytes, source.
    pub ram: Vec<RamEntry>,
    /// Overlays.
    pub overlays: Vec<OverlaySpec>,
    /// Views: id, what lies below, whether committed.
    pub views: Vec<ViewEntry>,
    /// Ids to be removed with the last object that stands on them.
    pub deferred: Vec<u64>,
    /// VMs and their processes.
    pub vms: HashMap<String, u32>,
    /// What is served over NBD.
    #[serde(default)]
    pub exports: Vec<ExportEntry>,
}

/// An export, listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportEntry {
    /// As it was added.
    pub spec: ExportSpec,
    /// Clients connected now.
    pub connections: u64,
}

/// A RAM file, listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamEntry {
    /// Its id.
    pub id: u64,
    /// Bytes.
    pub size: u64,
    /// Where its own pages come from.
    pub source: RamSource,
    /// Why its holder cannot be read.
    pub lost: Option<String>,
}

/// A view, listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewEntry {
    /// Its id.
    pub id: u64,
    /// What its layer lacks comes from here.
    pub below: Below,
    /// Whether it was committed.
    pub committed: bool,
}

/// Counters, since this mirror process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Each VM's.
    pub vms: HashMap<String, VmStats>,
    /// Those of processes that belong to no VM.
    pub others: VmStats,
    /// Reads of RAM that wait, and why.
    pub waiting: Vec<Waiting>,
    /// Objects that failed last, and how: bounded.
    pub problems: Vec<Problem>,
    /// Prefetch requests not yet done.
    pub prefetch_queued: u64,
    /// What is fetched ahead by plan.
    #[serde(default)]
    pub streams: Vec<StreamStats>,
    /// Versions of disks of which blocks are being fetched ahead.
    #[serde(default)]
    pub disk_streams: u64,
    /// Worker threads now.
    pub threads: u64,
}

/// How the store does, as the mirror sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreState {
    /// Whether it is open.
    pub open: bool,
    /// Why not.
    pub trouble: Option<String>,
    /// How its medium answers: `store::engine::Health`.
    pub health: serde_json::Value,
    /// Counters of the cache, where there is one: `store::engine::cached::CacheStats`.
    pub cache: Option<serde_json::Value>,
    /// What is wrong with it: `store::engine::cached::CacheHealth`.
    pub condition: Option<serde_json::Value>,
}

/// How much of something is in the node's cache.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warmth {
    /// Bytes of the chunks that hold it.
    pub bytes: u64,
    /// Of these, bytes that are not here.
    pub missing_bytes: u64,
    /// Bytes that the cache has room for.
    pub room_bytes: u64,
    /// Whether nothing is being fetched ahead.
    pub idle: bool,
    /// Why the store does not answer, where it does not.
    pub away: Option<String>,
}

/// A read of RAM that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The RAM file.
    pub object: u64,
    /// The VM whose thread waits.
    pub vm: Option<String>,
    /// Where in the file.
    pub offset: u64,
    /// Since when, in milliseconds.
    pub waited_ms: u64,
    /// Why.
    pub why: String,
}

/// What went wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The object.
    pub object: u64,
    /// What happened last.
    pub what: String,
    /// How often something did.
    pub times: u64,
}

/// A prefetch was taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    /// Bytes taken on; fewer than asked where the queue is full.
    pub bytes: u64,
}
