//! Looking at guest memory from outside: what each page is for, and where it is.
//!
//! A look changes nothing of what it shows. The states come from the kernel's account of the hypervisor's page table
//! and of the host's page cache, which touch no page. The colors are read from the memory itself, but never where that
//! would bring a page that the VM does not have: such a page is as its snapshot has it, and is read there (`scene`).
//! Where the snapshot is in a store far away nothing is read from it for a look either: the colors are then those that
//! were found when the snapshot was stored, or, where those are not known, unknown.

mod scene;
mod template;

pub(crate) use scene::{Scene, State};

use crate::colors;
use crate::error::{Error, Result};
use crate::node::{Node, Shared};
use crate::record::{self, SnapshotMeta};
use crate::snapshots;
use crate::vm::{RamPlace, Vm};
use api::{Account, ColorCount, Colors, PageState};
use base::{ByteRange, PAGE};
use guest::{Basis, Color, Coloring, FreePages, Hint, Memory, Region};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use store::{Manifest, Store, Version};
use vmm::MachineShape;

/// Why colors are not read from memory.
const FAR: &str = "colors are those of the snapshot that it started from, and nothing is known of what it wrote since: \
                   the rest of its memory lies in a store far away, and nothing is fetched for a look";

/// What was found of the VMs that were looked at, by id.
#[derive(Default)]
pub(crate) struct Looks(Mutex<HashMap<u64, Arc<Look>>>);

/// What one look found.
pub(crate) struct Look {
    /// The process that was looked into: another one is another boot.
    pid: u32,
    at: Instant,
    took: Duration,
    source: &'static str,
    pub(crate) coloring: Coloring,
}

impl Looks {
    fn get(&self, vm: u64, pid: u32) -> Option<Arc<Look>> {
        let looks = self.0.lock().expect("no holder panics");
        looks.get(&vm).filter(|look| look.pid == pid).cloned()
    }

    fn keep(&self, shared: &Shared, vm: u64, look: &Arc<Look>) {
        let known: Vec<u64> = shared.vms().iter().map(|vm| vm.id).collect();
        let mut looks = self.0.lock().expect("no holder panics");
        looks.retain(|id, _| known.contains(id));
        looks.insert(vm, look.clone());
    }
}

impl Node {
    /// The memory of a running VM, page by page. Colors that are not older than `age` are not looked for anew.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn vm_colors(&self, vm: &Arc<Vm>, age: Duration) -> Result<Colors> {
        let place = vm.resident()?.1;
        let scene = running(vm, place, Scene::of(&self.shared, vm, place, true))?;
        let look = running(vm, place, colored(&self.shared, vm, &scene, age))?;
        let states = scene.states.iter().map(|state| match state {
            State::Absent => PageState::Absent,
            State::Ready => PageState::Ready,
            State::Zero | State::Local => PageState::Local,
            State::Dirty => PageState::Dirty,
        });
        let mut colors = described(&vm.name, &look.coloring, states, scene.regions());
        colors.taken = record::now();
        colors.account.source = look.source.into();
        colors.account.age_ms = u64::try_from(look.at.elapsed().as_millis()).unwrap_or(u64::MAX);
        colors.account.took_ms = look.took.as_secs_f64() * 1e3;
        Ok(colors)
    }

    /// The memory of a snapshot, page by page.
    ///
    /// # Errors
    /// Where there is none, or the store does not answer.
    pub fn snapshot_colors(&self, name: &str) -> Result<Colors> {
        let (manifest, meta) = snapshots::snapshot_named(&self.shared, name)?;
        let ram = snapshots::ram_of(name, &manifest, &meta)?;
        let began = Instant::now();
        let (coloring, source) = snapshot_coloring(&self.shared, name, &manifest, &meta)?;
        let took = began.elapsed();
        let mut stored = vec![PageState::Absent; (ram.size / PAGE) as usize];
        for range in self.shared.store.data_ranges(&ram)? {
            stored[(range.start / PAGE) as usize..(range.end / PAGE) as usize].fill(PageState::Stored);
        }
        let mut colors = described(name, &coloring, stored.into_iter(), &regions(&meta.shape));
        (colors.snapshot, colors.taken) = (true, meta.created);
        colors.account.source = source.into();
        colors.account.took_ms = took.as_secs_f64() * 1e3;
        Ok(colors)
    }
}

/// Whatever fails of a VM that ends meanwhile, that is why.
pub(crate) fn running<T>(vm: &Vm, place: RamPlace, outcome: Result<T>) -> Result<T> {
    // Of a process that is dead and not yet reaped the file is there, and empty.
    let alive = || std::fs::read(format!("/proc/{}/maps", place.pid)).is_ok_and(|maps| !maps.is_empty());
    match outcome {
        Err(_) if !alive() => Err(Error::Conflict(format!("{} is not running", vm.name))),
        outcome => outcome,
    }
}

/// The colors of a running VM, at most so old.
pub(crate) fn colored(shared: &Shared, vm: &Arc<Vm>, scene: &Scene<'_>, age: Duration) -> Result<Arc<Look>> {
    let before = shared.looks.get(vm.id, scene.place.pid);
    if let Some(look) = before.as_ref().filter(|look| look.at.elapsed() < age) {
        return Ok(look.clone());
    }
    let start = vm.view().record.start_ram;
    let note = start.and_then(|id| shared.notes.lock().expect("no holder panics").get(&id).copied());
    let hint = before.as_ref().and_then(|look| look.coloring.account.hint).or(note.map(|note| Hint { note }));
    let began = Instant::now();
    let (coloring, source) = match guest::color(scene, None, hint) {
        Ok(coloring) => (coloring, "memory"),
        Err(error) => (elsewhere(shared, vm, scene, &error)?, "kept"),
    };
    let (pid, took) = (scene.place.pid, began.elapsed());
    let look = Arc::new(Look { pid, at: Instant::now(), took, source, coloring });
    shared.looks.keep(shared, vm.id, &look);
    Ok(look)
}

/// The colors of a VM whose memory cannot be read without fetching it: those of what it started from, where they were
/// kept.
fn elsewhere(shared: &Shared, vm: &Arc<Vm>, scene: &Scene<'_>, error: &guest::Error) -> Result<Coloring> {
    if !scene::is_far(error) {
        return Err(failed(&vm.name, error));
    }
    let start = vm.view().record.start_ram;
    let head = start.and_then(|id| shared.store.head(&shared.own_head("freeze", id)).transpose()).transpose()?;
    let kept = head.map(|(manifest, _)| colors::of_manifest(shared, &vm.name, &manifest)).transpose()?.flatten();
    let kept = kept.filter(|coloring| coloring.len() == scene.states.len() as u64);
    let coloring = kept.map_or_else(|| guest::color(&Blank(scene), None, None), Ok);
    let mut coloring = coloring.map_err(|error| failed(&vm.name, &error))?;
    coloring.account.notes.push(FAR.into());
    Ok(coloring)
}

/// The colors of a snapshot.
pub(crate) fn of_snapshot(shared: &Shared, name: &str, manifest: &Manifest, meta: &SnapshotMeta) -> Result<Coloring> {
    Ok(snapshot_coloring(shared, name, manifest, meta)?.0)
}

/// The colors of a snapshot, and where they come from: those that were kept with it, or, of one that has none, read from
/// the store now.
fn snapshot_coloring(
    shared: &Shared,
    name: &str,
    manifest: &Manifest,
    meta: &SnapshotMeta,
) -> Result<(Coloring, &'static str)> {
    if let Some(coloring) = colors::of_manifest(shared, name, manifest)? {
        return Ok((coloring, "kept"));
    }
    let (store, ram) = (&*shared.store, &snapshots::ram_of(name, manifest, meta)?);
    let frozen = Frozen { store, ram, regions: regions(&meta.shape), zeros: zeros(store, ram)? };
    let coloring = guest::color(&frozen, None, meta.note.map(|note| Hint { note }));
    Ok((coloring.map_err(|error| failed(name, &error))?, "memory"))
}

/// Coloring ended because the host could not read.
fn failed(name: &str, error: &guest::Error) -> Error {
    let source = std::error::Error::source(error).map_or(String::new(), |source| format!(": {source}"));
    Error::Host(format!("the colors of {name} cannot be read: {error}{source}"))
}

/// Where the blob's bytes stand in the guest's memory.
fn regions(shape: &MachineShape) -> Vec<Region> {
    Region::of_pc(shape.memory_bytes(), shape.ram_below_hole())
}

fn zeros(store: &Store, ram: &Version) -> Result<Vec<ByteRange>> {
    let mut out = Vec::new();
    let mut at = 0;
    for range in store.data_ranges(ram)? {
        if range.start > at {
            out.push(ByteRange::new(at, range.start));
        }
        at = range.end;
    }
    if at < ram.size {
        out.push(ByteRange::new(at, ram.size));
    }
    Ok(out)
}

/// What can be said of a guest without reading it: which pages are zero.
struct Blank<'a>(&'a Scene<'a>);

impl Memory for Blank<'_> {
    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn read(&self, _offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(0);
        Ok(())
    }

    fn zeros(&self) -> &[ByteRange] {
        self.0.zeros()
    }
}

/// A guest's RAM in the store.
struct Frozen<'a> {
    store: &'a Store,
    ram: &'a Version,
    regions: Vec<Region>,
    zeros: Vec<ByteRange>,
}

impl Memory for Frozen<'_> {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.store.read_at(self.ram, offset, into).map(drop).map_err(std::io::Error::other)
    }

    fn read_heads(&self, offset: u64, each: usize, into: &mut [u8]) -> std::io::Result<()> {
        let mut pages = vec![0; into.len() / each * PAGE as usize];
        self.read(offset, &mut pages)?;
        let heads = into.chunks_mut(each).zip(pages.chunks(PAGE as usize));
        heads.for_each(|(head, page)| head.copy_from_slice(&page[..head.len()]));
        Ok(())
    }

    fn zeros(&self) -> &[ByteRange] {
        &self.zeros
    }
}

/// Puts colors and states together; `states` has one for each page.
fn described(name: &str, coloring: &Coloring, states: impl Iterator<Item = PageState>, regions: &[Region]) -> Colors {
    let mut legend: Vec<ColorCount> = Color::ALL
        .iter()
        .map(|color| ColorCount {
            color: color.name().into(),
            degrees: color.hue().degrees,
            saturation: color.hue().saturation,
            ..ColorCount::default()
        })
        .collect();
    let mut state_runs: Vec<(u64, u8)> = Vec::new();
    for (color, state) in coloring.iter().zip(states) {
        let count = &mut legend[color as usize];
        count.pages += 1;
        count.by_state[state as usize] += 1;
        match state_runs.last_mut() {
            Some((pages, last)) if *last == state as u8 => *pages += 1,
            _ => state_runs.push((1, state as u8)),
        }
    }
    let regions = regions.iter().map(|region| api::Region {
        physical: region.physical.start,
        page: region.offset / PAGE,
        pages: region.physical.len() / PAGE,
    });
    Colors {
        name: name.to_owned(),
        page_bytes: PAGE,
        pages: coloring.len(),
        regions: regions.collect(),
        account: account(coloring),
        legend,
        states: PageState::ALL.to_vec(),
        color_runs: coloring.runs().map(|(run, color)| (run.end - run.start, color as u8)).collect(),
        state_runs,
        ..Colors::default()
    }
}

fn account(coloring: &Coloring) -> Account {
    let account = &coloring.account;
    Account {
        basis: match account.basis {
            Basis::Descriptors => "descriptors",
            Basis::PageTables => "page tables",
            Basis::Nothing => "nothing",
        }
        .into(),
        kernel: account.release.clone(),
        encoding: account.encoding.map(str::to_owned),
        levels: account.levels,
        roots: account.roots,
        free_kept: match &account.free {
            FreePages::Droppable => None,
            FreePages::Kept { why } => Some(why.clone()),
        },
        notes: account.notes.clone(),
        bytes_read: account.bytes_read,
        ..Account::default()
    }
}
