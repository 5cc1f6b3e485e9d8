//! What is fetched ahead of those who read disks, and what is learnt from each for the next.
//!
//! The profiles of an image's or a snapshot's disks are one head beside it (`disk-profile/image/NAME`,
//! `disk-profile/snap/VM@TAG`), which says for each disk of which version its profile is: where an image was imported
//! anew under its name, or a snapshot's tag taken again, it does not count. Recordings are added by a swap of the head,
//! as those of RAM are. Only disks in blocks of 4 KiB have profiles.

use super::{LEARN_TRIES, LOOK, RECORD_LEAST_MS, RECORD_MAX_MS, RECORD_MIN_MS, RECORDINGS_ENOUGH};
use crate::error::{Error, Result};
use crate::node::Shared;
use base::PAGE;
use base::units::human;
use guest::plan::{Eager, Policy, Profile, Touch};
use mirror::control::{ForeseeDisk, OfDisk, Recording};
use std::collections::BTreeMap;
use std::sync::Arc;
use store::{Expect, Manifest, Store, Version};

/// What is known of the disks of an image or a snapshot, by their names in its head.
pub(crate) type Profiles = BTreeMap<String, Profile>;

/// A disk whose readers teach.
#[derive(Clone, Debug)]
pub(crate) struct Lesson {
    /// The head of the image or snapshot that it stands on.
    pub(crate) of: String,
    /// Its name there.
    name: String,
    version: Version,
}

/// What is wanted for readers of disks.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// What is fetched ahead.
    pub(crate) policy: (Policy, Eager),
    /// Whether what they read is added to the profile.
    pub(crate) learns: bool,
}

/// What is wanted, as far as somebody said so; nothing of it where nobody asks and nothing is far away.
pub(crate) fn wanted(
    shared: &Shared,
    prefetch: Option<&str>,
    eager: Option<f32>,
    learn: Option<bool>,
) -> Result<Option<Wanted>> {
    let policy = super::chosen(shared, prefetch, eager)?;
    let asked = prefetch.is_some() || shared.is_shared();
    Ok(asked.then_some(Wanted { policy, learns: learn != Some(false) }))
}

/// Records what is read of the disks of the image or snapshot at the head `of` from now on, and has what earlier readers
/// read fetched ahead; whatever fails costs speed and nothing else.
pub(crate) fn begin(shared: &Arc<Shared>, of: &str, disks: &[(String, Version, OfDisk)], wanted: Wanted) {
    let whole = |version: &Version| u64::from(version.block_size) == PAGE && u32::try_from(version.blocks()).is_ok();
    let disks: Vec<_> = disks.iter().filter(|(_, version, _)| whole(version)).cloned().collect();
    if disks.is_empty() || !wanted.learns && wanted.policy.0 == Policy::None {
        return;
    }
    if wanted.learns {
        for (name, version, disk) in &disks {
            if let Err(error) = foresee(shared, disk, version, Vec::new(), true) {
                log::warn!("{of}: what is read of {name} is not recorded: {}", error.whole());
                continue;
            }
            let lesson = Lesson { of: of.to_owned(), name: name.clone(), version: *version };
            shared.lessons.lock().expect("no holder panics").insert(disk.clone(), lesson);
        }
    }
    let (weak, of, name) = (Arc::downgrade(shared), of.to_owned(), of.to_owned());
    let follow = move || {
        let Some(shared) = weak.upgrade() else { return };
        if let Err(error) = look_ahead(&shared, &of, &disks, &wanted) {
            log::warn!("{of}: nothing is fetched ahead: {}", error.whole());
        }
        drop(shared);
        while wanted.learns && disks.iter().any(|(_, _, disk)| weak.upgrade().is_some_and(|s| is_learning(&s, disk))) {
            std::thread::sleep(LOOK);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("disk-learn".into()).spawn(follow) {
        log::warn!("{name}: nothing is fetched ahead: {error}");
    }
}

/// Hands what is known to the mirror; what is known well enough is recorded no more.
fn look_ahead(shared: &Shared, of: &str, disks: &[(String, Version, OfDisk)], wanted: &Wanted) -> Result<()> {
    let versions = disks.iter().map(|(name, version, _)| (name.clone(), *version)).collect();
    let (profiles, _) = profiles_in(&shared.store, of, &versions)?;
    let (policy, eager) = &wanted.policy;
    for (name, version, disk) in disks {
        let Some(profile) = profiles.get(name) else { continue };
        if *policy != Policy::None && !profile.is_empty() {
            foresee(shared, disk, version, profile.blocks(*eager), false)?;
        }
        if profile.recordings() >= RECORDINGS_ENOUGH && shared.forget_lesson(disk).is_some() {
            let _ = shared.mirror.disk_recording(disk, true);
        }
    }
    Ok(())
}

fn foresee(shared: &Shared, disk: &OfDisk, version: &Version, blocks: Vec<u32>, record: bool) -> Result<()> {
    shared.mirror.foresee_disk(ForeseeDisk { disk: disk.clone(), version: version.to_string(), blocks, record })
}

/// Looks at a recording, and ends it when it is time; whether it goes on.
fn is_learning(shared: &Arc<Shared>, disk: &OfDisk) -> bool {
    if !shared.lessons.lock().expect("no holder panics").contains_key(disk) {
        return false;
    }
    // Another mirror has come, which did not see it begin.
    let Ok(seen) = shared.mirror.disk_recording(disk, false) else {
        shared.forget_lesson(disk);
        return false;
    };
    let settled = seen.settled_ms.is_some() && seen.seen_ms >= RECORD_LEAST_MS;
    if !settled && seen.seen_ms < RECORD_MAX_MS {
        return true;
    }
    if let Some((lesson, recording)) = recorded(shared, disk) {
        lesson.teach(shared, &recording);
    }
    false
}

/// Takes what was recorded of a disk, once.
fn recorded(shared: &Shared, disk: &OfDisk) -> Option<(Lesson, Recording)> {
    let lesson = shared.forget_lesson(disk)?;
    match shared.mirror.disk_recording(disk, true) {
        Ok(recording) => Some((lesson, recording)),
        Err(error) => {
            log::debug!("what was read of {} is not known: {}", lesson.of, error.whole());
            None
        }
    }
}

/// A disk's readers have ended, and the mirror still knows it: what they have read is added to the profile, in a thread
/// of its own.
pub(crate) fn ended(shared: &Arc<Shared>, disks: impl IntoIterator<Item = OfDisk>) {
    for disk in disks {
        let Some((lesson, recording)) = recorded(shared, &disk) else { continue };
        if recording.seen_ms < RECORD_MIN_MS {
            continue;
        }
        let weak = Arc::downgrade(shared);
        let taught = std::thread::Builder::new().name("disk-learn".into()).spawn(move || {
            if let Some(shared) = weak.upgrade() {
                lesson.teach(&shared, &recording);
            }
        });
        if let Err(error) = taught {
            log::warn!("what was read of a disk is not kept: {error}");
        }
    }
}

impl Lesson {
    fn teach(&self, shared: &Arc<Shared>, recording: &Recording) {
        // Nobody came to read.
        if recording.touches.is_empty() {
            return;
        }
        match self.add(&shared.store, recording) {
            Ok(profile) => {
                let (read, times) = (human(profile.len() as u64 * PAGE), profile.recordings());
                log::info!("{} of {}: {read} read in {times} recordings", self.name, self.of);
                crate::layout::learnt_disk(shared, &self.of, &self.version, &profile);
            }
            Err(error) => log::warn!("what was read of {} is not kept: {}", self.of, error.whole()),
        }
    }

    fn add(&self, store: &Store, recording: &Recording) -> Result<Profile> {
        let touches: Vec<Touch> = recording.touches.iter().map(|&(page, ms)| Touch { page, ms }).collect();
        let found = store.head(&self.of)?.map(|(manifest, _)| manifest.versions);
        // Removed meanwhile, or made anew: a profile of what is not there would stay for ever.
        let Some(versions) = found.filter(|versions| versions.get(&self.name) == Some(&self.version)) else {
            return Err(Error::NotFound(format!("{} is not what it was", self.of)));
        };
        let mut tries = 1;
        loop {
            let (mut profiles, expect) = profiles_in(store, &self.of, &versions)?;
            let profile = profiles.entry(self.name.clone()).or_default();
            profile.add(&touches, recording.seen_ms);
            let profile = profile.clone();
            match publish(store, &self.of, &versions, expect, &profiles) {
                Ok(()) => return Ok(profile),
                Err(store::Error::HeadChanged { .. }) if tries < LEARN_TRIES => tries += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The head of the profiles of what is at the head `of`.
pub(crate) fn profile_head(of: &str) -> String {
    format!("disk-profile/{of}")
}

/// What is known of the disks of these versions at the head `of`, and how the profiles' head is to be swapped.
pub(crate) fn profiles_in(store: &Store, of: &str, versions: &BTreeMap<String, Version>) -> Result<(Profiles, Expect)> {
    let Some((manifest, etag)) = store.head(&profile_head(of))? else { return Ok((Profiles::new(), Expect::Absent)) };
    let known: BTreeMap<String, Version> = serde_json::from_str(&manifest.meta).unwrap_or_default();
    let mut out = Profiles::new();
    for (disk, version) in &manifest.versions {
        if known.get(disk).is_none_or(|of| versions.get(disk) != Some(of)) {
            continue;
        }
        match Profile::decode(&store.read_whole(version)?) {
            Ok(profile) => drop(out.insert(disk.clone(), profile)),
            Err(error) => log::warn!("{of}: {error}; what is read of {disk} is learnt anew"),
        }
    }
    Ok((out, Expect::Etag(etag)))
}

fn publish(
    store: &Store,
    of: &str,
    versions: &BTreeMap<String, Version>,
    expect: Expect,
    profiles: &Profiles,
) -> std::result::Result<(), store::Error> {
    let transaction = store.begin();
    let put = profiles.iter().map(|(disk, profile)| Ok((disk.clone(), transaction.put_bytes(&profile.encode())?)));
    let put = put.collect::<std::result::Result<BTreeMap<String, Version>, store::Error>>()?;
    let known: BTreeMap<&String, &Version> = versions.iter().filter(|(disk, _)| profiles.contains_key(*disk)).collect();
    let meta = serde_json::to_string(&known).expect("versions serialise");
    transaction.publish(&profile_head(of), expect, &Manifest { versions: put, meta }).map(drop)
}

/// The profiles of what is at a head, none where nothing is known.
pub(crate) fn carried(store: &Store, of: &str) -> Result<Profiles> {
    match store.head(of)? {
        Some((manifest, _)) => profiles_in(store, of, &manifest.versions).map(|(profiles, _)| profiles),
        None => Ok(Profiles::new()),
    }
}

/// Leaves profiles beside what was moved to another store, but for disks of which as much is known there.
pub(crate) fn carry(store: &Store, of: &str, profiles: &Profiles) -> Result<()> {
    let Some((manifest, _)) = store.head(of)? else { return Ok(()) };
    let mut tries = 1;
    loop {
        let (mut known, expect) = profiles_in(store, of, &manifest.versions)?;
        let knows = |disk: &String| known.get(disk).map_or(0, Profile::recordings);
        let better = |(disk, profile): &(&String, &Profile)| {
            profile.recordings() > knows(disk) && manifest.versions.contains_key(*disk)
        };
        let better: Vec<(String, Profile)> =
            profiles.iter().filter(better).map(|(disk, profile)| (disk.clone(), profile.clone())).collect();
        if better.is_empty() {
            return Ok(());
        }
        known.extend(better);
        match publish(store, of, &manifest.versions, expect, &known) {
            Ok(()) => return Ok(()),
            Err(store::Error::HeadChanged { .. }) if tries < LEARN_TRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

impl Shared {
    fn forget_lesson(&self, disk: &OfDisk) -> Option<Lesson> {
        self.lessons.lock().expect("no holder panics").remove(disk)
    }
}
