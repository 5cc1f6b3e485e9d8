//! Giving back what nothing names: RAM files, disk views, and their content in the store.
//!
//! What is kept is found from the roots each time, never counted: VMs (the files their RAM maps, and what their
//! next freeze builds upon), overlays (the view they stand on), NBD exports and kept scratch disks, versions of blobs
//! that are open or have local changes, freezes not yet stored, and tagged snapshots.

use crate::error::Result;
use crate::mirrored;
use crate::node::Shared;
use crate::snapshots::meta;
use base::RamMap;
use mirror::control::Below;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Removes what nothing names. Of a store that is away nothing is removed now, and it is tried again.
pub(crate) fn sweep(shared: &Arc<Shared>) -> Result<()> {
    let swept = sweep_now(shared);
    let away = swept.as_ref().is_err_and(crate::Error::is_away);
    shared.owed.store(away, Ordering::Release);
    if away { Ok(()) } else { swept }
}

fn sweep_now(shared: &Arc<Shared>) -> Result<()> {
    mirrored::prune(shared)?;
    // Whoever makes objects holds this for reading until they can be reached from a root.
    let _alone = shared.making.write().expect("no holder panics");
    let objects = shared.mirror.list()?;
    let stands_on: Vec<(u64, &Below)> = objects
        .overlays
        .iter()
        .map(|o| (o.id, &o.below))
        .chain(objects.views.iter().map(|v| (v.id, &v.below)))
        .collect();
    let pending: Vec<_> = {
        let pending = shared.pending.lock().expect("no holder panics");
        // Under the lock under which the committer removes them: it cannot miss this.
        shared.sweep_again.store(!pending.is_empty(), Ordering::Release);
        pending.values().cloned().collect()
    };
    let mut keep: BTreeSet<u64> = shared.blank_ids().into_iter().collect();
    for vm in shared.vms() {
        let view = vm.view();
        keep.extend(view.ram_files);
        keep.extend(view.record.overlays);
    }
    let (overlays, _) = shared.export_roots();
    keep.extend(overlays);
    keep.extend(shared.files.roots().0);
    for record in &pending {
        keep.insert(record.id);
        keep.extend(&record.views);
        keep.extend(record.base_ram);
        keep.extend(RamMap::decode(&record.map).map(|m| files(&m)).unwrap_or_default());
    }
    for head in shared.store.heads("snap/")? {
        if let Some((manifest, _)) = shared.store.head(&head)? {
            let meta = meta(&head, &manifest)?;
            keep.insert(meta.id);
            keep.extend(RamMap::decode(&meta.map).map(|m| files(&m)).unwrap_or_default());
        }
    }
    // What an overlay or a view that stays stands on stays.
    loop {
        let below: Vec<u64> = stands_on
            .iter()
            .filter(|(id, _)| keep.contains(id))
            .filter_map(|(_, below)| match below {
                Below::View(id) if !keep.contains(id) => Some(*id),
                _ => None,
            })
            .collect();
        if below.is_empty() {
            break;
        }
        keep.extend(below);
    }
    let all = objects.ram.iter().map(|r| r.id).chain(stands_on.iter().map(|(id, _)| *id));
    let gone: Vec<u64> = all.filter(|id| !keep.contains(id)).collect();
    if !gone.is_empty() {
        shared.mirror.remove(&gone)?;
    }
    unpin(shared)?;
    forget(shared, &keep)
}

/// Deletes the pins of VMs and exports that are no more: a daemon that died may have pinned for one that it never recorded.
fn unpin(shared: &Arc<Shared>) -> Result<()> {
    let (_, exports) = shared.export_roots();
    let (_, files) = shared.files.roots();
    let ids = shared.vms().into_iter().map(|vm| vm.id).chain(exports).chain(files);
    let mut pins: BTreeSet<String> = ids.map(|id| shared.pin_head(id)).collect();
    pins.extend(mirrored::open_pins(shared)?);
    for head in shared.store.heads(&shared.own_heads("pin"))?.into_iter().filter(|head| !pins.contains(head)) {
        shared.store.delete_head(&head)?;
    }
    Ok(())
}

/// Deletes the heads of freezes of which neither RAM nor disks are kept, and collects what they alone named.
fn forget(shared: &Arc<Shared>, keep: &BTreeSet<u64>) -> Result<()> {
    for head in shared.store.heads(&shared.own_heads("freeze"))? {
        let Some((manifest, _)) = shared.store.head(&head)? else { continue };
        let meta = meta(&head, &manifest)?;
        if !keep.contains(&meta.id) && !meta.views.iter().any(|v| keep.contains(v)) {
            shared.store.delete_head(&head)?;
            let mut versions = shared.versions.lock().expect("no holder panics");
            versions.remove(&meta.id);
            for view in &meta.views {
                versions.remove(view);
            }
        }
    }
    // A shared store is collected when somebody asks for it (`gc`): it takes a walk over all that all nodes have.
    if !shared.is_shared() {
        shared.store.collect()?;
    }
    Ok(())
}

fn files(map: &RamMap) -> Vec<u64> {
    map.files().into_keys().map(|f| f.0).collect()
}
