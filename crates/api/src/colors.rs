//! What guest memory is for, where its pages are, and what snapshots share of it.

use serde::{Deserialize, Serialize};

/// Where a page is. A VM's are all but `Stored`; a snapshot's are `Stored`, or `Absent` where they are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageState {
    /// Not in this host's memory: to be fetched when it is touched, or nothing but zeros.
    Absent,
    /// In the host's memory, fetched ahead or for another offshoot; this VM has not touched it.
    Ready,
    /// Mapped by the VM, as its snapshot has it: shared with whoever maps the same.
    Local,
    /// Written by the VM: its own.
    Dirty,
    /// Of a snapshot: stored.
    Stored,
}

impl PageState {
    /// All of them, in the order in which runs number them.
    pub const ALL: [Self; 5] = [Self::Absent, Self::Ready, Self::Local, Self::Dirty, Self::Stored];

    /// Its name, as commands and documents write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["absent", "ready", "local", "dirty", "stored"][self as usize]
    }
}

/// `GET /v1/vms/{name}/colors` and `GET /v1/snapshots/{vm}/{tag}/colors`: the memory of a guest, page by page.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Colors {
    /// Name of the VM or of the snapshot.
    pub name: String,
    /// Whether it is a snapshot.
    pub snapshot: bool,
    /// Of when the states are, RFC 3339 in UTC; of a snapshot, when it was taken.
    pub taken: String,
    /// Bytes in a page.
    pub page_bytes: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// Where the pages stand in the guest's physical memory.
    pub regions: Vec<Region>,
    /// How the colors were found.
    pub account: Account,
    /// The colors, with what there is of each, in the order of their numbers.
    pub legend: Vec<ColorCount>,
    /// Names of the states, in the order of their numbers.
    pub states: Vec<PageState>,
    /// Runs of pages of one color, in order: pages, number of the color.
    pub color_runs: Vec<(u64, u8)>,
    /// Runs of pages of one state, in order: pages, number of the state.
    pub state_runs: Vec<(u64, u8)>,
}

/// One run of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its first guest-physical address.
    pub physical: u64,
    /// Its first page.
    pub page: u64,
    /// How many pages it has.
    pub pages: u64,
}

/// How colors were found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Where they come from: `memory` (read now), `kept` (a snapshot's, found when it was stored), `none`.
    pub source: String,
    /// What they rest on: `descriptors`, `page tables` or `nothing`.
    pub basis: String,
    /// The kernel's release, where it is Linux.
    pub kernel: Option<String>,
    /// How this kernel writes down what a page is.
    pub encoding: Option<String>,
    /// Levels of its page tables; 0 where they were not found.
    pub levels: u8,
    /// Roots of processes' page tables.
    pub roots: u32,
    /// Why free pages have to be kept, where they have.
    pub free_kept: Option<String>,
    /// What could not be told, and why.
    pub notes: Vec<String>,
    /// Bytes of the guest's memory that were read for it.
    pub bytes_read: u64,
    /// How long ago the colors were found, in milliseconds.
    pub age_ms: u64,
    /// How long that took, in milliseconds.
    pub took_ms: f64,
}

/// A color: how it is drawn, and how many pages it has, in all and by state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorCount {
    /// Its name.
    pub color: String,
    /// Its hue, in degrees.
    pub degrees: u16,
    /// How strong it is, in percent; 0 is grey.
    pub saturation: u8,
    /// Pages of this color.
    pub pages: u64,
    /// Of these, by state, in the order of [`PageState::ALL`].
    pub by_state: [u64; 5],
}

/// What a VM has and was brought, of one color, in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorUse {
    /// The color's name; of all together, `all`.
    pub color: String,
    /// In the VM's memory.
    pub resident: u64,
    /// Of these, its own.
    pub private: u64,
    /// Fetched because the VM waited for them.
    pub fetched: u64,
    /// Fetched ahead for the offshoots of its template, and touched by this one without waiting.
    pub ahead_used: u64,
    /// Fetched ahead, and so far not touched by this one.
    pub ahead_wasted: u64,
}

/// `POST /v1/dedup`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DedupRequest {
    /// Snapshots, as in `web@1`.
    pub snapshots: Vec<String>,
}

/// What snapshots share.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DedupReport {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// The snapshots, as they were named.
    pub snapshots: Vec<DedupPart>,
    /// All of them together.
    pub all: DedupPart,
    /// By color, over all of them, the one whose pages repeat most likely first.
    pub colors: Vec<DedupPart>,
    /// Different contents over all of them, zeros aside: pages that have to be kept once.
    pub distinct: u64,
    /// What could not be told.
    pub notes: Vec<String>,
}

/// Pages of one snapshot, or of one color.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DedupPart {
    /// Name of the snapshot or of the color.
    pub name: String,
    /// Its pages.
    pub pages: u64,
    /// Of these, zero: they take no space.
    pub zero: u64,
    /// Of the others, those whose content another of the snapshots has as well.
    pub shared: u64,
    /// Those whose content stands more than once within their own snapshot.
    pub repeated: u64,
    /// Those of which either holds.
    pub either: u64,
}

impl DedupPart {
    /// How likely a page that is not zero is found elsewhere, from 0 to 1.
    #[must_use]
    pub fn likelihood(&self) -> f64 {
        let stored = self.pages - self.zero;
        if stored == 0 { 0.0 } else { self.either as f64 / stored as f64 }
    }
}
