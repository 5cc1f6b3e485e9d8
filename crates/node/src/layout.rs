//! Laying a template's memory down in the order in which its offshoots touch it, so that what is fetched ahead of the
//! next one is a few large reads.
//!
//! The node that learns does so, behind the recordings after which the profile changes most, and never in the way of
//! guests: one snapshot at a time, at the lowest priority. Where the order in place is good enough nothing is written.
//! Only what was recorded is moved; the rest lies as its commit laid it down.

use crate::error::{Error, Result};
use crate::foresight;
use crate::foresight::disk::{self, Profiles};
use crate::image;
use crate::node::{Node, Shared};
use crate::record::SnapshotMeta;
use crate::snapshots::snapshot_named;
use crate::sys;
use api::{FetchCost, SnapshotArranged};
use base::RamMap;
use guest::plan::{Planner, Profile};
use std::sync::{Mutex, mpsc};
use store::{ArrangeOptions, Arranged, Manifest, ReadCost, Version};

/// The recordings behind which a template is laid down anew.
const AFTER: [u32; 3] = [1, 3, 8];
/// More pages than this (16 GiB) are not laid down in order: a profile of so many says little.
const PAGES_MAX: usize = 1 << 22;

impl Node {
    /// Lays the blocks of an image that its readers are known to read down in the order in which they do, also where
    /// their order is good.
    ///
    /// # Errors
    /// As [`Node::arrange_snapshot`].
    pub fn arrange_image(&self, name: &str, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<SnapshotArranged> {
        let image = image::load(&self.shared.store, name)?;
        let profiles = disk::carried(&self.shared.store, &image::head(name))?;
        let Some(profile) = profiles.get(image::DISK).filter(|profile| !profile.is_empty()) else {
            return Err(Error::Conflict(format!(
                "nothing is known of what is read of {name}; boot it, or serve it and read (`offshoot nbd serve {name} --prefetch auto`)"
            )));
        };
        reporting(progress, |tell| arrange_disk(&self.shared, &image.disk(), profile, true, tell))
            .map(|done| listed(name, &done))
    }

    /// Lays the pages of a snapshot that its offshoots are known to touch down in the order in which they do, also where
    /// their order is good.
    ///
    /// # Errors
    /// Where there is no such snapshot, nothing was recorded of it yet, or the store fails or is full: then all is as it
    /// was.
    pub fn arrange_snapshot(&self, name: &str, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<SnapshotArranged> {
        reporting(progress, |tell| arrange(&self.shared, name, true, tell))
    }
}

/// Does the work in a thread of the lowest priority, and tells of it meanwhile.
fn reporting<T: Send>(
    progress: &mut dyn FnMut(&str, u64, u64),
    work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> Result<T> + Send,
) -> Result<T> {
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        let work = scope.spawn(move || {
            sys::lowest_priority();
            let tell = Mutex::new(tell);
            work(&move |done, all| {
                // Whoever asked may have gone; the work goes on.
                let _ = tell.lock().expect("no teller panics").send((done, all));
            })
        });
        for (done, all) in told {
            progress("arranging", done, all);
        }
        work.join().unwrap_or(Err(Error::ShuttingDown))
    })
}

/// A recording was added to the profile of a snapshot.
pub(crate) fn learnt(shared: &Shared, snapshot: &str, profile: &Profile) {
    if !AFTER.contains(&profile.recordings()) {
        return;
    }
    sys::lowest_priority();
    match arrange(shared, snapshot, false, &|_, _| {}) {
        Ok(done) if done.moved == 0 => log::info!("{snapshot}: {} pages lie well as they are", done.pages),
        Ok(done) => log::info!(
            "{snapshot}: {} pages moved; fetching what is known to be touched takes {} in {} requests, {} in {} before",
            done.moved,
            base::units::human(done.after.fetched_bytes),
            done.after.requests,
            base::units::human(done.before.fetched_bytes),
            done.before.requests
        ),
        // It may have been removed meanwhile; and whatever it is, only speed is lost.
        Err(error) => log::warn!("{snapshot} is not laid down in order: {}", error.whole()),
    }
}

/// A recording was added to the profile of a disk of what is at the head `of`.
pub(crate) fn learnt_disk(shared: &Shared, of: &str, disk: &Version, profile: &Profile) {
    if !AFTER.contains(&profile.recordings()) {
        return;
    }
    sys::lowest_priority();
    match arrange_disk(shared, disk, profile, false, &|_, _| {}) {
        Ok(done) if done.moved == 0 => log::info!("{of}: {} blocks lie well as they are", done.blocks),
        Ok(done) => log::info!(
            "{of}: {} blocks moved; fetching what is known to be read takes {} in {} requests, {} in {} before",
            done.moved,
            base::units::human(done.after.fetched_bytes),
            done.after.requests,
            base::units::human(done.before.fetched_bytes),
            done.before.requests
        ),
        Err(error) => log::warn!("{of} is not laid down in order: {}", error.whole()),
    }
}

fn arrange_disk(
    shared: &Shared,
    disk: &Version,
    profile: &Profile,
    always: bool,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Arranged> {
    let _one = shared.arranging.lock().expect("no holder panics");
    let order: Vec<u64> = block_order(profile).into_iter().filter(|block| *block < disk.blocks()).collect();
    Ok(shared.store.arrange(disk, &order, &ArrangeOptions { always, progress: Some(progress), cancel: None })?)
}

fn block_order(profile: &Profile) -> Vec<u64> {
    let mut blocks = profile.block_layout();
    blocks.truncate(PAGES_MAX);
    blocks.into_iter().map(u64::from).collect()
}

/// The orders in which disks are to be laid down elsewhere, by their names.
pub(crate) fn disk_orders(profiles: &Profiles) -> impl Iterator<Item = (String, Vec<u64>)> {
    profiles.iter().map(|(disk, profile)| (disk.clone(), block_order(profile)))
}

fn arrange(
    shared: &Shared,
    name: &str,
    always: bool,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<SnapshotArranged> {
    let _one = shared.arranging.lock().expect("no holder panics");
    let (manifest, meta) = snapshot_named(shared, name)?;
    let (profile, _) = foresight::profile_of(shared, name, meta.id)?;
    if profile.is_empty() {
        return Err(Error::Conflict(format!(
            "nothing is known of what offshoots of {name} touch; start one and let it run for some seconds (`offshoot run --from {name} --prefetch auto`)"
        )));
    }
    let (ram, order) = order(&manifest, &meta, profile)?;
    let done =
        shared.store.arrange(&ram, &order, &ArrangeOptions { always, progress: Some(progress), cancel: None })?;
    Ok(listed(name, &done))
}

/// The RAM of a snapshot, and the pages that its offshoots touch in the order in which they are to lie.
pub(crate) fn order(manifest: &Manifest, meta: &SnapshotMeta, profile: Profile) -> Result<(Version, Vec<u64>)> {
    let id = &meta.shape.ram[0].id;
    let ram = manifest.versions.get(id).copied();
    let ram = ram.ok_or_else(|| Error::Damaged { path: id.into(), reason: "the snapshot has no such RAM".into() })?;
    let map = RamMap::decode(&meta.map).map_err(Error::Invalid)?;
    let mut pages = Planner::layout(&foresight::template(&map, profile, None));
    pages.truncate(PAGES_MAX);
    Ok((ram, pages.into_iter().map(u64::from).filter(|page| *page < ram.blocks()).collect()))
}

fn listed(name: &str, done: &Arranged) -> SnapshotArranged {
    let cost =
        |cost: &ReadCost| FetchCost { bytes: cost.bytes, fetched_bytes: cost.fetched_bytes, requests: cost.requests };
    SnapshotArranged {
        name: name.to_owned(),
        pages: done.blocks,
        moved: done.moved,
        left: done.left,
        written_bytes: done.written_bytes,
        before: cost(&done.before),
        after: cost(&done.after),
    }
}
