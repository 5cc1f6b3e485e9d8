//! What is fetched ahead for VMs that start from snapshots, and what is learnt from each for the next.
//!
//! The profile of a snapshot is a head of its own beside it (`profile/VM/TAG`), because the snapshot never changes and
//! the profile does. Several nodes may learn at once: each adds its recording by a swap of the head, and does so again
//! where another was faster. A profile says which snapshot it is of; where a tag was taken anew, it does not count.

pub(crate) mod disk;

use crate::error::{Error, Result};
use crate::node::Shared;
use crate::record::SnapshotMeta;
use base::{Bitmap, PAGE, RamMap, Source};
use guest::Coloring;
use guest::plan::{Eager, Policy, Profile, Space, Template, Touch, traits};
use mirror::control::Foresee;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use store::{Expect, Manifest, Store};

/// Recordings after which a profile is good enough: recording costs a VM a little.
const RECORDINGS_ENOUGH: u32 = 8;
/// How often a recording is looked at, and the longest that one takes; the least, where the VM lives so long: servers
/// whose requests differ go on touching what no window of a few seconds shows, however well it seemed to settle.
const LOOK: Duration = Duration::from_millis(500);
const RECORD_MAX_MS: u32 = 60_000;
const RECORD_LEAST_MS: u32 = 20_000;
/// A VM that ended before it ran so long taught nothing.
const RECORD_MIN_MS: u32 = 500;
/// Tries to add a recording where others add theirs.
const LEARN_TRIES: u32 = 8;

/// What is wanted for one VM.
#[derive(Clone, Debug)]
pub struct Ahead {
    policy: Policy,
    eager: Eager,
    /// Name of the snapshot, as in `web@1`.
    pub(crate) snapshot: String,
    /// Its id, also of its RAM file.
    id: u64,
    template: Option<PathBuf>,
    pub(crate) record: bool,
    learns: bool,
}

impl Ahead {
    /// Finds out what is known of the snapshot, and writes it where the mirror reads it.
    pub(crate) fn prepare(
        shared: &Shared,
        (snapshot, manifest, meta): (&str, &Manifest, &SnapshotMeta),
        (map, known): (&RamMap, Known),
        dir: &Path,
        (policy, eager): (Policy, Eager),
    ) -> Self {
        let name = snapshot.to_owned();
        let ahead = Self { policy, eager, snapshot: name, id: meta.id, template: None, record: false, learns: true };
        // Whatever fails here costs speed and nothing else. Beside the profile, which comes meanwhile:
        let coloring = match ahead.policy {
            Policy::None => None,
            _ => crate::colors::of_manifest(shared, snapshot, manifest).unwrap_or_else(|error| {
                log::warn!("the colors of {snapshot}: {}", error.whole());
                None
            }),
        };
        let profile = match known.join().unwrap_or(Err(Error::ShuttingDown)) {
            Ok(kept) => of_snapshot(kept, snapshot, meta.id).0,
            Err(error) => {
                log::warn!("the access profile of {snapshot}: {}", error.whole());
                return ahead;
            }
        };
        let record = profile.recordings() < RECORDINGS_ENOUGH;
        if ahead.policy == Policy::None {
            return Self { record, ..ahead };
        }
        let path = dir.join("template");
        match crate::home::write_atomically(&path, &template(map, profile, coloring.as_ref()).encode(), false) {
            Ok(()) => Self { template: Some(path), record, ..ahead },
            Err(error) => {
                log::warn!("what is known of {snapshot}: {}", error.whole());
                Self { record, ..ahead }
            }
        }
    }

    /// Whether what the VM touches is added to the profile. It is watched in any case, so that what it touches is seen.
    pub(crate) fn learning(self, learns: bool) -> Self {
        Self { learns, ..self }
    }

    /// Whether anything is fetched ahead.
    pub(crate) fn fetches(&self) -> bool {
        self.template.is_some()
    }

    /// What the mirror is told, of a VM whose RAM lies at `address` once its hypervisor runs.
    pub(crate) fn spec(&self, vm: &str, map: &RamMap, address: Option<u64>) -> Foresee {
        Foresee {
            vm: vm.to_owned(),
            ram: self.id,
            map: map.encode(),
            address,
            template: self.template.clone(),
            policy: self.policy.to_string(),
            eager: self.eager.dial(),
            record: self.record,
        }
    }

    /// Waits until the VM's working set has settled, in a thread of its own, and adds it to the profile. One that ends
    /// before teaches what it can ([`ended`]).
    pub(crate) fn learn(&self, shared: &Arc<Shared>, vm: &str) {
        if !self.learns {
            return;
        }
        shared.learning.lock().expect("no holder panics").insert(vm.to_owned(), self.clone());
        let (shared, vm, id) = (Arc::downgrade(shared), vm.to_owned(), self.id);
        let name = vm.clone();
        let recorder = move || {
            loop {
                std::thread::sleep(LOOK);
                let Some(shared) = shared.upgrade() else { return };
                if shared.learning.lock().expect("no holder panics").get(&vm).is_none_or(|ahead| ahead.id != id) {
                    return;
                }
                // Another mirror has come, which did not see it start.
                let Ok(seen) = shared.mirror.recording(&vm, false) else { return };
                let settled = seen.settled_ms.is_some() && seen.seen_ms >= RECORD_LEAST_MS;
                if !settled && seen.seen_ms < RECORD_MAX_MS {
                    continue;
                }
                if let Some((ahead, recording)) = recorded(&shared, &vm) {
                    ahead.teach(&shared, &vm, &recording);
                }
                return;
            }
        };
        if let Err(error) = std::thread::Builder::new().name("vm-learn".into()).spawn(recorder) {
            log::warn!("{name} is not recorded: {error}");
        }
    }

    fn teach(&self, shared: &Arc<Shared>, vm: &str, recording: &mirror::control::Recording) {
        match add(shared, &self.snapshot, self.id, recording) {
            Ok(profile) => {
                log::info!("{}: {}", self.snapshot, profile.describe());
                crate::layout::learnt(shared, &self.snapshot, &profile);
            }
            Err(error) => log::warn!("what {vm} touched is not kept: {}", error.whole()),
        }
    }
}

/// Takes what was recorded of a VM, once.
fn recorded(shared: &Shared, vm: &str) -> Option<(Ahead, mirror::control::Recording)> {
    let ahead = shared.learning.lock().expect("no holder panics").remove(vm)?;
    match shared.mirror.recording(vm, true) {
        Ok(recording) => Some((ahead, recording)),
        Err(error) => {
            log::debug!("what {vm} touched is not known: {}", error.whole());
            None
        }
    }
}

/// A VM's hypervisor has ended; the mirror still knows the VM. What it has touched until now is added to the profile, in
/// a thread of its own.
pub(crate) fn ended(shared: &Arc<Shared>, vm: &str) {
    let Some((ahead, recording)) = recorded(shared, vm) else { return };
    if recording.seen_ms < RECORD_MIN_MS {
        return;
    }
    let (shared, vm) = (Arc::downgrade(shared), vm.to_owned());
    let taught = std::thread::Builder::new().name("vm-learn".into()).spawn(move || {
        if let Some(shared) = shared.upgrade() {
            ahead.teach(&shared, &vm, &recording);
        }
    });
    if let Err(error) = taught {
        log::warn!("what a VM touched is not kept: {error}");
    }
}

/// As it is asked for, or what suits the store: from one far away, what is likely to be touched is fetched ahead; from
/// one on this disk a fault costs less than any guess.
pub(crate) fn chosen(shared: &Shared, policy: Option<&str>, eager: Option<f32>) -> Result<(Policy, Eager)> {
    let policy = match policy {
        Some(text) => text.parse().map_err(|why| Error::Invalid(format!("--prefetch {why}")))?,
        None if shared.is_shared() => Policy::Auto,
        None => Policy::None,
    };
    let eager = eager.map_or(Ok(Eager::default()), Eager::new);
    Ok((policy, eager.map_err(|why| Error::Invalid(format!("--eager {why}")))?))
}

pub(crate) fn template(map: &RamMap, profile: Profile, coloring: Option<&Coloring>) -> Template {
    let pages = map.size() / PAGE;
    let mut stored = Bitmap::new(pages);
    for (range, source) in map.extents() {
        if matches!(source, Source::File(_)) {
            stored.set_range(range.start / PAGE, range.end / PAGE);
        }
    }
    // What is free was left out where it is droppable, whatever the map says of short runs.
    for run in coloring.iter().flat_map(|c| c.droppable()) {
        (run.start..run.end.min(pages)).for_each(|page| stored.clear(page));
    }
    let space = match coloring.filter(|c| c.len() == pages) {
        Some(coloring) => coloring.space(),
        None => Space::new(vec![0; pages as usize], |_| (0, 0)),
    };
    Template { space, traits: traits(), stored, profile }
}

/// The head of a snapshot's profile.
pub(crate) fn profile_head(snapshot: &str) -> String {
    format!("profile/{}", snapshot.replacen('@', "/", 1))
}

/// The profile of a snapshot, empty where there is none, and how its head is to be swapped.
pub(crate) fn profile_of(shared: &Shared, snapshot: &str, id: u64) -> Result<(Profile, Expect)> {
    profile_in(&shared.store, snapshot, id)
}

fn profile_in(store: &Store, snapshot: &str, id: u64) -> Result<(Profile, Expect)> {
    Ok(of_snapshot(kept_in(store, snapshot)?, snapshot, id))
}

/// What is being read at the head of a snapshot's profile.
pub(crate) type Known = JoinHandle<Result<Option<Kept>>>;

/// What lies at the head of a snapshot's profile.
pub(crate) struct Kept {
    /// The id of the snapshot that it is of: the name may be another's by now.
    of: String,
    encoded: Option<Vec<u8>>,
    etag: store::Etag,
}

/// Begins to read what is known of a snapshot, before anything but its name is.
pub(crate) fn begin_to_know(shared: &Arc<Shared>, snapshot: &str) -> Result<Known> {
    let (shared, name) = (shared.clone(), snapshot.to_owned());
    let read = move || kept_in(&shared.store, &name);
    std::thread::Builder::new().name("vm-profile".into()).spawn(read).map_err(Error::io("start a thread for", snapshot))
}

fn kept_in(store: &Store, snapshot: &str) -> Result<Option<Kept>> {
    let Some((manifest, etag)) = store.head(&profile_head(snapshot))? else { return Ok(None) };
    let encoded = manifest.versions.get("profile").map(|version| store.read_whole(version)).transpose()?;
    Ok(Some(Kept { of: manifest.meta, encoded, etag }))
}

/// The profile of the snapshot that has this id, empty where there is none, and how its head is to be swapped.
fn of_snapshot(kept: Option<Kept>, snapshot: &str, id: u64) -> (Profile, Expect) {
    let Some(Kept { of, encoded, etag }) = kept else { return (Profile::default(), Expect::Absent) };
    let encoded = encoded.filter(|_| of == format!("{id:016x}"));
    let profile = encoded.map(|bytes| Profile::decode(&bytes)).transpose().unwrap_or_else(|error| {
        log::warn!("{snapshot}: {error}; it is learnt anew");
        None
    });
    (profile.unwrap_or_default(), Expect::Etag(etag))
}

/// Adds a recording to the profile of a snapshot.
fn add(shared: &Shared, snapshot: &str, id: u64, recording: &mirror::control::Recording) -> Result<Profile> {
    let touches: Vec<Touch> = recording.touches.iter().map(|&(page, ms)| Touch { page, ms }).collect();
    let mut tries = 1;
    loop {
        let (mut profile, expect) = profile_of(shared, snapshot, id)?;
        profile.add(&touches, recording.seen_ms);
        match publish(&shared.store, snapshot, id, expect, &profile) {
            Ok(()) => return Ok(profile),
            Err(store::Error::HeadChanged { .. }) if tries < LEARN_TRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn publish(
    store: &Store,
    snapshot: &str,
    id: u64,
    expect: Expect,
    profile: &Profile,
) -> std::result::Result<(), store::Error> {
    let transaction = store.begin();
    let version = transaction.put_bytes(&profile.encode())?;
    let manifest = Manifest { versions: [("profile".to_owned(), version)].into(), meta: format!("{id:016x}") };
    transaction.publish(&profile_head(snapshot), expect, &manifest).map(drop)
}

/// The profile of a snapshot in a store, `id` being its id there; empty where there is none.
pub(crate) fn carried(store: &Store, snapshot: &str, id: u64) -> Result<Profile> {
    profile_in(store, snapshot, id).map(|(profile, _)| profile)
}

/// Leaves a profile beside a snapshot that was moved to another store and has `id` there, unless as much is known of it.
pub(crate) fn carry(store: &Store, snapshot: &str, id: u64, profile: &Profile) -> Result<()> {
    let mut tries = 1;
    loop {
        let (known, expect) = profile_in(store, snapshot, id)?;
        if known.recordings() >= profile.recordings() {
            return Ok(());
        }
        match publish(store, snapshot, id, expect, profile) {
            Ok(()) => return Ok(()),
            Err(store::Error::HeadChanged { .. }) if tries < LEARN_TRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}
