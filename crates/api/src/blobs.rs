//! Blobs: versioned arrays of bytes, beside the disks and memories of VMs.
//!
//! Where a version is asked for, it is given as `NAME` (the latest), `NAME@NUMBER` or `NAME@TAG`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Body of `POST /v1/blobs`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobCreate {
    /// Its name: letters, digits and `._-+@:` in parts divided by `/`.
    pub name: String,
    /// Its size; all of it zero.
    pub size_bytes: u64,
    /// Bytes in a block, a power of two; 4096 where absent.
    #[serde(default)]
    pub block_bytes: Option<u32>,
}

/// A blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its name.
    pub name: String,
    /// Number of its latest version.
    pub latest: u64,
    /// Size of that.
    pub size_bytes: u64,
    /// Bytes in a block.
    pub block_bytes: u32,
    /// When it was made, RFC 3339.
    pub created: String,
    /// What it was cloned from, as `NAME@NUMBER`.
    pub origin: Option<String>,
    /// Numbers of versions by tag.
    pub tags: BTreeMap<String, u64>,
}

/// One version of a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobVersion {
    /// Its number.
    pub number: u64,
    /// When it was published, RFC 3339.
    pub time: String,
    /// Its size.
    pub size_bytes: u64,
    /// The version that its writer saw.
    pub parent: u64,
    /// `create`, `clone`, `write`, `append` or `resize`.
    pub change: String,
    /// Bytes written, added, made zero or cut off.
    pub bytes: u64,
    /// It was deleted and cannot be read.
    pub deleted: bool,
}

/// What a change of a blob published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobChanged {
    /// Number of the version.
    pub number: u64,
    /// Bytes that came.
    pub bytes: u64,
}

/// Body of `POST /v1/blobs/NAME/resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobResize {
    /// The new size.
    pub size_bytes: u64,
}

/// Body of `POST /v1/blobs/NAME/clone`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobClone {
    /// Number or tag of the version; the latest where absent.
    #[serde(default)]
    pub version: Option<String>,
    /// Names of the clones.
    pub names: Vec<String>,
}

/// Body of `PUT /v1/blobs/NAME/tags/TAG`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobTag {
    /// Number of the version; the latest where absent.
    #[serde(default)]
    pub number: Option<u64>,
}

/// A version of a blob as a file of the node's tree of blobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobFile {
    /// Its path.
    pub path: String,
    /// The blob.
    pub blob: String,
    /// The version that it is, or stands on.
    pub number: u64,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes of its local changes, which are no version yet.
    pub changed_bytes: u64,
    /// How often it is open, where it was opened for writing.
    pub opened: u64,
}

/// Body of `POST /v1/blob-files/open`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobFileOpen {
    /// As `NAME`, `NAME@NUMBER` or `NAME@TAG`.
    pub version: String,
}

/// Body of `POST /v1/blob-files/{commit,clone,discard}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobFileChange {
    /// The blob.
    pub blob: String,
    /// The version that the file stands on.
    pub number: u64,
    /// For a clone: the name of the new blob.
    #[serde(default)]
    pub name: Option<String>,
}

/// What differs between two versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobDiff {
    /// The versions, as `NAME@NUMBER`.
    pub versions: [String; 2],
    /// Ranges that differ: first byte and end, ascending.
    pub ranges: Vec<(u64, u64)>,
    /// Their bytes.
    pub bytes: u64,
}

/// Body of `POST /v1/blob-snapshots`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobSnapshotRequest {
    /// Name of the snapshot.
    pub name: String,
    /// The blobs, as `NAME`, `NAME@NUMBER` or `NAME@TAG`.
    pub blobs: Vec<String>,
}

/// Versions of several blobs at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobSnapshot {
    /// Its name.
    pub name: String,
    /// Numbers of the versions by blob.
    pub versions: BTreeMap<String, u64>,
}

/// The part of a path that stands for a name, which may hold slashes.
#[must_use]
pub fn path_segment(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~@:+".contains(&b);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
