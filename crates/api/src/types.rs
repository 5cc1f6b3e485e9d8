//! Requests and replies.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the API, in every path.
pub const VERSION: u32 = 1;

/// Reply of `GET /v1/version`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// Version of the program.
    pub program: String,
    /// Version of the API.
    pub api: u32,
    /// Pid of the daemon.
    pub pid: u32,
    /// Directory that holds everything.
    pub home: String,
}

/// An error on the wire.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What the caller can do next.
    pub kind: ErrorKind,
    /// What happened, to what, and what to do.
    pub message: String,
}

/// Errors by what the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense: change it.
    Invalid,
    /// What it names is not there.
    NotFound,
    /// What it makes is there already, or is busy in a way that excludes this.
    Conflict,
    /// The host lacks something: disk, memory, a program.
    Host,
    /// A defect or an unforeseen failure.
    Internal,
}

impl ErrorKind {
    /// Its HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Host => 507,
            Self::Internal => 500,
        }
    }
}

/// One line of a long operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<T> {
    /// It goes on.
    Progress(Progress),
    /// It is done.
    Result(T),
    /// It failed.
    Error(ErrorBody),
}

/// How far a long operation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub step: String,
    /// Units done.
    pub done: u64,
    /// Units in all; 0 where unknown.
    pub total: u64,
}

/// `POST /v1/vms`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRequest {
    /// Name of the VM; chosen where absent.
    pub name: Option<String>,
    /// What to start from.
    pub from: From,
    /// Bytes of RAM; only when booting an image.
    pub memory_bytes: Option<u64>,
    /// Virtual CPUs; only when booting an image.
    pub cpus: Option<u32>,
    /// Published ports, as `ADDRESS:HOST:GUEST`.
    #[serde(default)]
    pub publish: Vec<String>,
    /// `auto`, `kvm` or `tcg`; only when booting an image.
    pub accelerator: Option<String>,
    /// Added to the image's kernel command line; only when booting an image.
    pub append: Option<String>,
    /// What is fetched ahead of the guest: RAM and disks from a snapshot, the disk of an image.
    #[serde(default)]
    pub prefetch: Option<String>,
    /// How much of it, from 0 to 1.
    #[serde(default)]
    pub eager: Option<f32>,
    /// Whether what it touches is added to the access profiles, as it is where this is absent.
    #[serde(default)]
    pub learn: Option<bool>,
}

/// What a VM starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// A cold boot of an image.
    Image(String),
    /// A snapshot, `vm@tag`.
    Snapshot(String),
}

/// `POST /v1/vms/{name}/fork`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkRequest {
    /// How many offshoots.
    pub count: u32,
    /// Their names are this, a dash and a number; the parent's name where absent.
    pub name_prefix: Option<String>,
    /// Offshoot number i publishes the parent's published guest ports from this host port on.
    pub publish_base: Option<u16>,
}

/// What a fork brought.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkReply {
    /// How long the parent stood still, in milliseconds, drain included.
    pub pause_ms: f64,
    /// The parts of the pause, in milliseconds: stop, device state, RAM, disks, continue.
    pub pause_parts_ms: BTreeMap<String, f64>,
    /// Bytes of RAM that changed since the parent's last freeze.
    pub changed_bytes: u64,
    /// Those that were started, in order, with the time from the request until each ran.
    pub offshoots: Vec<Offshoot>,
    /// Those that were not, and why.
    pub failed: Vec<FailedOffshoot>,
}

/// A started offshoot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offshoot {
    /// Its name.
    pub name: String,
    /// From the request's arrival to the guest running, in milliseconds.
    pub running_ms: f64,
    /// Its published ports.
    pub publish: Vec<String>,
}

/// An offshoot that could not be started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailedOffshoot {
    /// The name it was to have.
    pub name: String,
    /// Why.
    pub error: ErrorBody,
}

/// `POST /v1/vms/{name}/snapshot`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The tag; a number is chosen where absent.
    pub tag: Option<String>,
}

/// A snapshot with RAM, as lists show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// `vm@tag`.
    pub name: String,
    /// When it was taken, RFC 3339 in UTC.
    pub created: String,
    /// Bytes of RAM of its machine.
    pub memory_bytes: u64,
    /// Bytes of its disks.
    pub disk_bytes: u64,
    /// Bytes the store grew by when it was committed.
    pub stored_bytes: u64,
    /// Bytes that its VM had written and that are not stored, because the guest had freed them.
    #[serde(default)]
    pub free_bytes: u64,
    /// How long its VM stood still, in milliseconds.
    pub pause_ms: f64,
    /// Generation of the VM it was taken of.
    pub generation: u32,
}

/// `POST /v1/snapshots/{name}/arrange`, `POST /v1/images/{name}/arrange`: where what offshoots of a snapshot touch, or
/// what is read of an image as it boots, lies in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotArranged {
    /// `vm@tag`, or the image's name.
    pub name: String,
    /// Pages with content that its recorded offshoots touched, or blocks that were read.
    pub pages: u64,
    /// Pages that were moved; none where their order was good.
    pub moved: u64,
    /// Pages left where they lie in the order of another snapshot.
    pub left: u64,
    /// Bytes written to the store.
    pub written_bytes: u64,
    /// What fetching them took before, from a store far away.
    pub before: FetchCost,
    /// What it takes now.
    pub after: FetchCost,
}

/// What fetching some pages takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchCost {
    /// Compressed bytes of the pages, and of what says where they lie, alone.
    pub bytes: u64,
    /// Bytes that come with them.
    pub fetched_bytes: u64,
    /// Requests.
    pub requests: u64,
}

/// The life of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its hypervisor is being started.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest stands still: a disk error or a full host (`detail` says which).
    Paused,
    /// A page it needs cannot be had now; it goes on when it arrives.
    Waiting,
    /// Its hypervisor has ended.
    Stopped,
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Waiting => "waiting",
            Self::Stopped => "stopped",
        })
    }
}

/// A VM, as lists show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its id, unique on the node for ever.
    pub id: String,
    /// What it is doing.
    pub state: VmState,
    /// Why, where the state alone does not say.
    pub detail: Option<String>,
    /// Name of the image at the root of its family.
    pub image: String,
    /// Name of the VM or snapshot it was started from; none for a cold boot.
    pub parent: Option<String>,
    /// Forks between it and the cold boot.
    pub generation: u32,
    /// When it was started, RFC 3339 in UTC.
    pub created: String,
    /// Published ports.
    pub publish: Vec<String>,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Pid of its hypervisor.
    pub pid: Option<u32>,
}

/// `GET /v1/vms/{name}`: everything about a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmDetail {
    /// The list's part.
    #[serde(flatten)]
    pub vm: Vm,
    /// The machine shape, as stored.
    pub shape: serde_json::Value,
    /// Its directory on the host, with sockets and logs.
    pub directory: String,
    /// Pid of its network helper.
    pub network_pid: Option<u32>,
    /// Extents of the RAM map it started with.
    pub ram_extents: usize,
    /// RAM files of ancestors that the map names.
    pub ram_files: Vec<String>,
    /// Forks and snapshots taken of it since this daemon knows it.
    pub freezes: u32,
    /// Snapshots of it that are not yet in the store, with the reason where one is stuck.
    pub pending: Vec<String>,
}

/// `GET /v1/vms/{name}/stats`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStats {
    /// Name of the VM.
    pub name: String,
    /// Bytes of guest RAM that are its own: anonymous or swapped pages.
    pub private_bytes: u64,
    /// Bytes of guest RAM present that it shares with others through RAM files.
    pub shared_bytes: u64,
    /// What the mirror counted for it.
    pub mirror: serde_json::Value,
    /// What was fetched ahead for the offshoots of its template on this node, where something is.
    #[serde(default)]
    pub prefetch: Option<serde_json::Value>,
    /// What was fetched ahead for the offshoots of its template, as far as this one goes.
    #[serde(default)]
    pub ahead: Ahead,
    /// All of that by color, and `all` together; only where it is asked for.
    #[serde(default)]
    pub by_color: Vec<crate::ColorUse>,
    /// What the resident library counted.
    pub resident: BTreeMap<String, u64>,
    /// CPU time of its hypervisor, in seconds.
    pub cpu_s: f64,
}

/// What was fetched ahead, as far as one VM goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ahead {
    /// Bytes of its RAM that were brought ahead.
    pub fetched_bytes: u64,
    /// Of these, bytes that it touched without waiting for them.
    pub used_bytes: u64,
    /// Of these, bytes that it has not touched so far.
    pub wasted_bytes: u64,
}

/// `POST /v1/vms/{name}/stop`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StopRequest {
    /// Seconds the guest gets to power down; 0 ends it at once.
    pub grace_s: u64,
}

/// `GET /v1/vms/{name}/wait`: how a VM ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// Name of the VM.
    pub name: String,
    /// What ended it.
    pub detail: String,
}

/// `POST /v1/vms/{name}/balloon`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BalloonRequest {
    /// Bytes the guest shall keep.
    pub bytes: u64,
}

/// An image, as lists show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// When it was made, RFC 3339 in UTC.
    pub created: String,
    /// Bytes of its disk.
    pub disk_bytes: u64,
    /// Bytes of it that are stored.
    pub stored_bytes: u64,
    /// Its kernel's version, where known.
    pub kernel: Option<String>,
    /// Its kernel command line.
    pub cmdline: String,
}

/// `POST /v1/images/build`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BuildRequest {
    /// Name of the image.
    pub name: String,
    /// Builds it anew even where the cache has it.
    pub force: bool,
}

/// `POST /v1/images/import`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImportRequest {
    /// Absolute path on the daemon's host.
    pub path: String,
    /// Name of the image.
    pub name: String,
    /// Kernel, where not found inside.
    pub kernel: Option<String>,
    /// Initial RAM disk, where not found inside.
    pub initrd: Option<String>,
    /// Kernel command line, where not found inside.
    pub cmdline: Option<String>,
    /// Bytes of the disk made of a root file system.
    pub size: Option<u64>,
}

/// `POST /v1/nbd`: a disk to serve.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NbdRequest {
    /// An image, a snapshot `vm@tag`, or a kept scratch disk `scratch:NAME`.
    pub source: String,
    /// Name of the export; made of the source where absent.
    pub name: Option<String>,
    /// Whether it is a scratch disk over the source, which may be written.
    #[serde(default)]
    pub writable: bool,
    /// Absolute path of its socket; in the home where absent.
    pub socket: Option<String>,
    /// Whether it ends with its last connection; lists do not show such.
    #[serde(default)]
    pub ephemeral: bool,
    /// What is fetched ahead of its readers, as of a VM: what earlier readers of the image or snapshot read.
    #[serde(default)]
    pub prefetch: Option<String>,
    /// Whether what they read is added to its access profile, as it is where this is absent.
    #[serde(default)]
    pub learn: Option<bool>,
}

/// What an export is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NbdState {
    /// Clients can connect.
    Serving,
    /// A scratch disk that is kept and not served.
    Stopped,
    /// It should be served and is not; the daemon's log says why.
    Failed,
}

impl std::fmt::Display for NbdState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Serving => "serving",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// A disk served over NBD, or a scratch disk that is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NbdExport {
    /// Its name.
    pub name: String,
    /// What it shows, or showed before it was written.
    pub source: String,
    /// Whether it is a scratch disk.
    pub writable: bool,
    /// What it is doing.
    pub state: NbdState,
    /// Path of its socket, while it is served.
    pub socket: Option<String>,
    /// NBD URI, while it is served.
    pub uri: Option<String>,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Clients connected now.
    pub connections: u64,
    /// When it was made, RFC 3339 in UTC.
    pub created: String,
}

/// `GET /v1/stats`: the node and its store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStats {
    /// VMs that run.
    pub running: u64,
    /// Bytes of all versions as their users see them.
    pub store_logical_bytes: u64,
    /// Bytes they take on disk.
    pub store_stored_bytes: u64,
    /// Everything the store counts.
    pub store: serde_json::Value,
    /// Everything the mirror counts.
    pub mirror: serde_json::Value,
}

/// One line of `offshoot doctor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether Offshoot cannot work without it.
    pub needed: bool,
    /// What was found, and what to do.
    pub detail: String,
}

/// Reply of `POST /v1/verify`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyReply {
    /// What is wrong, each by name; empty when nothing is.
    pub faults: Vec<String>,
    /// Blocks read and checked.
    pub blocks: u64,
}
