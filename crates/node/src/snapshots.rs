//! Snapshots: taking them, listing them, starting from them.

use crate::error::{Error, Result};
use crate::foresight::disk::{self, Wanted};
use crate::foresight::{self, Ahead, Known};
use crate::node::{Node, Shared, Started, new_uuid};
use crate::record::{self, Life, SnapshotMeta, VmRecord};
use crate::vm::{DisksAhead, Source, Starting};
use crate::{image, names, sweep, sys};
use api::RunRequest;
use base::{RamFileId, RamMap};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};
use vmm::passt::Publish;

/// A VM that has lived for so long may boot again one day, when the store may be away; most end sooner and never do.
const KERNEL_LATER: Duration = Duration::from_secs(300);

impl Node {
    /// Takes a snapshot of a running VM and returns when it is durable.
    ///
    /// # Errors
    /// Where the tag is taken or the VM cannot be frozen; where the store is full, the snapshot is not visible.
    pub fn take_snapshot(
        &self,
        name: &str,
        tag: Option<&str>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<api::Snapshot> {
        let vm = self.vm(name)?;
        let Tagging { tag, .. } = &self.reserve_tag(name, tag)?;
        progress("freezing", 0, 1);
        let id = {
            let _making = self.shared.making.read().expect("no holder panics");
            let id = self.shared.home.new_id()?;
            let frozen = vm.freeze(id, Some(tag.clone()))?;
            self.shared.pending.lock().expect("no holder panics").insert(id, frozen.record);
            id
        };
        self.committer.submit(id);
        self.committer.await_done(id, progress)?;
        let (manifest, meta) = self.snapshot(&format!("{name}@{tag}"))?;
        if meta.id != id {
            return Err(Error::Conflict(format!(
                "another node took {name}@{tag} at the same time; take the snapshot again, under another --tag"
            )));
        }
        Ok(listed(&manifest, &meta))
    }

    /// The snapshots in the store.
    ///
    /// # Errors
    /// Where a head is damaged.
    pub fn snapshots(&self) -> Result<Vec<api::Snapshot>> {
        let mut out = Vec::new();
        for head in self.shared.store.heads("snap/")? {
            if let Some((manifest, _)) = self.shared.store.head(&head)? {
                out.push(listed(&manifest, &meta(&head, &manifest)?));
            }
        }
        Ok(out)
    }

    /// Removes a snapshot; VMs started from it go on.
    ///
    /// # Errors
    /// Where there is none.
    pub fn remove_snapshot(&self, name: &str) -> Result<()> {
        let (vm, tag) = split_snapshot(name)?;
        if !self.shared.store.delete_head(&snapshot_head(vm, tag))? {
            return Err(no_snapshot(name));
        }
        // What was learnt of it is of no use to anybody else. A crash in between leaves some bytes that the next snapshot
        // of that name takes over.
        self.shared.store.delete_head(&foresight::profile_head(name))?;
        self.shared.store.delete_head(&disk::profile_head(&snapshot_head(vm, tag)))?;
        sweep::sweep(&self.shared)
    }

    fn snapshot(&self, name: &str) -> Result<(store::Manifest, SnapshotMeta)> {
        snapshot_named(&self.shared, name)
    }

    /// Keeps a tag, or the next number, for one snapshot of `name`, until it is dropped; from the freeze on the tag
    /// is on record. Of two that ask for one tag exactly one gets it.
    fn reserve_tag(&self, name: &str, tag: Option<&str>) -> Result<Tagging<'_>> {
        let mut tagging = self.shared.tagging.lock().expect("no holder panics");
        let mut taken: BTreeSet<String> = tagging.clone();
        let pending = self.shared.pending.lock().expect("no holder panics");
        taken.extend(pending.values().filter_map(|r| Some(snapshot_head(&r.vm, r.tag.as_deref()?))));
        drop(pending);
        // After the list of those under way: one that leaves it is in the store by then.
        taken.extend(self.shared.store.heads(&format!("snap/{name}@"))?);
        let is_free = |tag: &String| !taken.contains(&snapshot_head(name, tag));
        let tag = match tag {
            Some(tag) => {
                names::check_tag(tag)?;
                Some(tag.to_owned()).filter(is_free).ok_or_else(|| {
                    Error::Conflict(format!(
                        "{name}@{tag} is there already; choose another --tag or `offshoot snapshot rm` it"
                    ))
                })?
            }
            None => (1..).map(|n: u32| n.to_string()).find(is_free).expect("numbers do not end"),
        };
        let head = snapshot_head(name, &tag);
        tagging.insert(head.clone());
        Ok(Tagging { shared: &self.shared, tag, head })
    }

    /// Starts a VM from a snapshot. What is read of it is read side by side, while its hypervisor starts and waits: a
    /// store may be far away.
    pub(crate) fn start_from(
        &self,
        name: &str,
        from: &str,
        request: &RunRequest,
        publish: Vec<Publish>,
        since: Instant,
    ) -> Result<Started> {
        if request.memory_bytes.is_some()
            || request.cpus.is_some()
            || request.accelerator.is_some()
            || request.append.is_some()
        {
            return Err(Error::Invalid(format!(
                "the machine of {from} is fixed: leave out --memory, --cpus, --accelerator and --append"
            )));
        }
        // Where nobody asks for it and nothing is far away, a VM is not even watched.
        let wanted = disk::wanted(&self.shared, request.prefetch.as_deref(), request.eager, request.learn)?;
        // Beside the snapshot itself, since its name says where that is.
        let known = wanted.as_ref().map(|_| foresight::begin_to_know(&self.shared, from)).transpose()?;
        let (manifest, meta) = self.snapshot(from)?;
        if wanted.is_some() {
            // While the daemon reads what it needs itself.
            let disks = meta.shape.disks.iter().filter_map(|disk| manifest.versions.get(&disk.id));
            self.shared.mirror.approach(&ram_of(from, &manifest, &meta)?, disks);
        }
        let mut origin = meta.origin.clone();
        if let Some(files) = image::carried_files(&manifest, &self.shared.home.path("kernels")) {
            (origin.kernel, origin.initrd) = files;
        }
        let record = VmRecord {
            id: self.shared.home.new_id()?,
            name: name.to_owned(),
            created: record::now(),
            origin,
            parent: Some(from.to_owned()),
            generation: meta.generation + 1,
            overlays: meta.shape.disks.iter().map(|_| self.shared.home.new_id()).collect::<Result<_>>()?,
            shape: meta.shape.clone(),
            publish,
            start_ram: Some(meta.id),
            generation_id: new_uuid()?,
            life: Life::Starting,
        };
        let (here, coming) = sync_channel(1);
        let started = std::thread::scope(|scope| {
            let launching = scope.spawn(|| self.launch(record.clone(), Starting::Meanwhile(coming), since));
            let source = self.source_from(&record, from, (&manifest, meta), wanted.zip(known));
            // One that waits learns of a failure from the end of its channel.
            let failed = match source {
                // Where it has ended meanwhile, it says why.
                Ok(source) => {
                    let _ = here.send(source);
                    None
                }
                Err(error) => Some(error),
            };
            drop(here);
            let launched = launching.join().unwrap_or(Err(Error::ShuttingDown));
            failed.map_or(launched, Err)
        });
        match &started {
            Ok(_) => self.bring_kernel(&record),
            // Either may have left something after the other had cleared it away.
            Err(_) => self.clear(&record),
        }
        started
    }

    /// Fetches what a VM starts from.
    fn source_from(
        &self,
        record: &VmRecord,
        from: &str,
        (manifest, meta): (&store::Manifest, SnapshotMeta),
        wanted: Option<(Wanted, Known)>,
    ) -> Result<Source> {
        let shared = &self.shared;
        let disks: Vec<store::Version> =
            meta.shape.disks.iter().filter_map(|d| manifest.versions.get(&d.id).copied()).collect();
        let device_version = manifest.versions["device"];
        let dir = shared.home.vm_dir(record.id);
        std::fs::create_dir_all(&dir).map_err(Error::io("make", &dir))?;
        let bad_map = |reason| Error::Invalid(format!("{from}: {reason}"));
        let frozen_map = RamMap::decode(&meta.map).map_err(bad_map)?;
        std::thread::scope(|scope| {
            let device_state = scope.spawn(|| shared.store.read_whole(&device_version));
            let pinned = scope.spawn(|| {
                let versions = meta.shape.disks.iter().map(|d| d.id.clone()).zip(disks.iter().copied());
                self.pin(record.id, versions.collect())
            });
            let (wanted, known) = wanted.unzip();
            let ahead = wanted.clone().zip(known).map(|(Wanted { policy, learns }, known)| {
                let (meta, map, dir) = (&meta, &frozen_map, &dir);
                let prepare = move || Ahead::prepare(shared, (from, manifest, meta), (map, known), dir, policy);
                scope.spawn(move || prepare().learning(learns))
            });
            let meta = self.adopted(manifest, meta.clone())?;
            let map = RamMap::decode(&meta.map).map_err(bad_map)?;
            if map.files().into_keys().all(|file| file.0 == meta.id) {
                // Known without a look at its tree, which may be far away.
                self.ensure_ram(meta.id, Some(&map), map.size())?;
            } else {
                for id in map.files().into_keys().map(|f| f.0).chain([meta.id]) {
                    self.ensure_ram(id, None, map.size())?;
                }
            }
            let device = dir.join("device");
            let device_state = device_state.join().map_err(|_| Error::ShuttingDown)??;
            std::fs::write(&device, device_state).map_err(Error::io("write", &device))?;
            pinned.join().map_err(|_| Error::ShuttingDown)??;
            let start = crate::lineage::start(&map, RamFileId(meta.id), base::resident::MAPPINGS_MAX * 3 / 4);
            let ahead = ahead.and_then(|ahead| ahead.join().ok());
            let disks = disks.iter().map(ToString::to_string).collect();
            let (vm, tag) = split_snapshot(from)?;
            let disks_ahead = wanted.map(|wanted| DisksAhead { of: snapshot_head(vm, tag), wanted });
            Ok(Source::Snapshot { ram: meta.id, map: start, device, disks, ahead, disks_ahead })
        })
    }

    /// Brings what a VM would boot from again, where it lives for long. Where it boots sooner, it is brought then.
    fn bring_kernel(&self, record: &VmRecord) {
        let files = [Some(record.origin.kernel.clone()), record.origin.initrd.clone()];
        let missing: Vec<_> = files.into_iter().flatten().filter(|file| !file.exists()).collect();
        if missing.is_empty() {
            return;
        }
        let (shared, id) = (Arc::downgrade(&self.shared), record.id);
        let bring = move || {
            sys::lowest_priority();
            std::thread::sleep(KERNEL_LATER);
            let Some(shared) = shared.upgrade().filter(|shared| shared.home.vm_dir(id).exists()) else { return };
            for file in missing {
                if let Err(error) = image::ensure_file(&shared.store, &file) {
                    log::warn!("{} is fetched when a VM boots from it: {error}", file.display());
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("vm-kernel".into()).spawn(bring) {
            log::warn!("the kernel of {} is fetched when it boots again: {error}", record.name);
        }
    }

    /// Makes a snapshot that was not frozen on this node one of its own freezes, so that its memory is kept for what
    /// is started from it, whatever becomes of the snapshot. Its RAM is one file then: the files that it is made of
    /// where it was frozen are kept there, and for as long as that node likes.
    fn adopted(&self, manifest: &store::Manifest, mut meta: SnapshotMeta) -> Result<SnapshotMeta> {
        self.shared.recall()?;
        let head = self.shared.own_head("freeze", meta.id);
        let known = || -> Result<Option<SnapshotMeta>> {
            self.shared.store.head(&head)?.map(|(manifest, _)| crate::snapshots::meta(&head, &manifest)).transpose()
        };
        if let Some(known) = known()? {
            return Ok(known);
        }
        let id = RamFileId(meta.id);
        let mut map = RamMap::decode(&meta.map).map_err(Error::Invalid)?;
        map = crate::lineage::whole(&map, id);
        meta.map = map.encode();
        let text = serde_json::to_string(&meta).expect("records serialise");
        let own = store::Manifest { versions: manifest.versions.clone(), meta: text };
        match self.shared.store.begin().publish(&head, store::Expect::Absent, &own) {
            // Another VM of the same snapshot, started at once, was faster.
            Err(store::Error::HeadChanged { .. }) => known()?.ok_or_else(|| no_snapshot(&head)),
            published => {
                published?;
                self.shared.learn(&own, &meta);
                Ok(meta)
            }
        }
    }

    /// Makes sure the mirror has the RAM file of a snapshot in the store; `map` says where it is other than zero.
    fn ensure_ram(&self, id: u64, map: Option<&RamMap>, size: u64) -> Result<()> {
        if self.shared.mirror.has_ram(id)? {
            return Ok(());
        }
        let version = self.shared.versions.lock().expect("no holder panics").get(&id).copied();
        let version = version.ok_or_else(|| Error::NotFound(format!("the store has no RAM {id:016x}")))?;
        if let Some(map) = map {
            return self.shared.mirror.add_ram_committed(id, map, &version.to_string());
        }
        let mut map = RamMap::zero(size);
        for range in self.shared.store.data_ranges(&version)? {
            map.set(range, base::Source::File(RamFileId(id)));
        }
        self.shared.mirror.add_ram_committed(id, &map, &version.to_string())
    }
}

/// A snapshot by name.
pub(crate) fn snapshot_named(shared: &Shared, name: &str) -> Result<(store::Manifest, SnapshotMeta)> {
    let (vm, tag) = split_snapshot(name)?;
    let head = snapshot_head(vm, tag);
    let (manifest, _) = shared.store.head(&head)?.ok_or_else(|| no_snapshot(name))?;
    let meta = meta(&head, &manifest)?;
    Ok((manifest, meta))
}

/// The RAM of a snapshot.
pub(crate) fn ram_of(name: &str, manifest: &store::Manifest, meta: &SnapshotMeta) -> Result<store::Version> {
    let ram = meta.shape.ram.first().and_then(|region| manifest.versions.get(&region.id).copied());
    ram.ok_or_else(|| Error::NotFound(format!("{name} has no RAM")))
}

/// The disk of a snapshot, of several the first: the head, the disk's name there, its version.
pub(crate) fn disk_of(shared: &Shared, name: &str) -> Result<(String, String, store::Version)> {
    let (vm, tag) = split_snapshot(name)?;
    let (manifest, meta) = snapshot_named(shared, name)?;
    let mut disks = meta.shape.disks.into_iter().map(|disk| disk.id);
    let disk = disks.find_map(|id| manifest.versions.get(&id).map(|version| (id.clone(), *version)));
    let (id, version) = disk.ok_or_else(|| Error::NotFound(format!("the machine of {name} has no disk")))?;
    Ok((snapshot_head(vm, tag), id, version))
}

fn split_snapshot(name: &str) -> Result<(&str, &str)> {
    let bad = || Error::Invalid(format!("`{name}` names no snapshot; write VM@TAG, as in web@1"));
    let (vm, tag) = name.split_once('@').ok_or_else(bad)?;
    names::check("VM", vm)?;
    names::check_tag(tag)?;
    Ok((vm, tag))
}

pub(crate) fn snapshot_head(vm: &str, tag: &str) -> String {
    format!("snap/{vm}@{tag}")
}

fn no_snapshot(name: &str) -> Error {
    Error::NotFound(format!("no snapshot is named {name}; `offshoot snapshot ls` lists them"))
}

pub(crate) fn meta(head: &str, manifest: &store::Manifest) -> Result<SnapshotMeta> {
    serde_json::from_str(&manifest.meta).map_err(|e| Error::Damaged { path: head.into(), reason: e.to_string() })
}

fn listed(manifest: &store::Manifest, meta: &SnapshotMeta) -> api::Snapshot {
    let disks = meta.shape.disks.iter().filter_map(|d| manifest.versions.get(&d.id)).map(|v| v.size).sum();
    api::Snapshot {
        name: format!("{}@{}", meta.vm, meta.tag.as_deref().unwrap_or("-")),
        created: meta.created.clone(),
        memory_bytes: meta.shape.memory_bytes(),
        disk_bytes: disks,
        stored_bytes: meta.stored_bytes,
        free_bytes: meta.dropped_bytes,
        pause_ms: meta.pause_ms,
        generation: meta.generation,
    }
}

/// A tag kept for a snapshot under way.
struct Tagging<'a> {
    shared: &'a Shared,
    tag: String,
    head: String,
}

impl Drop for Tagging<'_> {
    fn drop(&mut self) {
        self.shared.tagging.lock().expect("no holder panics").remove(&self.head);
    }
}
