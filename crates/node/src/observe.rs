//! What the node shows of itself.

use crate::error::Result;
use crate::look::{self, Scene, State};
use crate::node::Node;
use crate::record::Life;
use crate::sys;
use crate::vm::{View, Vm};
use api::{Ahead, ColorUse, NodeStats, VmDetail, VmState, VmStats};
use base::{Bitmap, PAGE};
use guest::Color;
use mirror::control::RamPages;
use std::sync::Arc;
use std::time::Duration;

/// Colors that are so old are good enough to count by.
const COLORS_AGE: Duration = Duration::from_secs(10);

impl Node {
    /// A VM as lists show it.
    #[must_use]
    pub fn listed(&self, vm: &Arc<Vm>) -> api::Vm {
        let view = vm.view();
        let (state, detail, pid) = self.state(&view);
        let record = view.record;
        api::Vm {
            name: record.name,
            id: format!("{:016x}", record.id),
            state,
            detail,
            image: record.origin.image,
            parent: record.parent,
            generation: record.generation,
            created: record.created,
            publish: record.publish.iter().map(ToString::to_string).collect(),
            memory_bytes: record.shape.memory_bytes(),
            cpus: record.shape.cpus,
            pid,
        }
    }

    fn state(&self, view: &View) -> (VmState, Option<String>, Option<u32>) {
        match &view.record.life {
            Life::Starting => (VmState::Starting, None, None),
            Life::Stopped { detail } => (VmState::Stopped, Some(detail.clone()), None),
            Life::Running { hypervisor, .. } => {
                let pid = Some(hypervisor.pid);
                if let Some(why) = &view.paused {
                    return (VmState::Paused, Some(why.clone()), pid);
                }
                match self.shared.mirror.waits(&view.record.name) {
                    Ok(Some(why)) => (VmState::Waiting, Some(why), pid),
                    _ => (VmState::Running, None, pid),
                }
            }
        }
    }

    /// Everything about a VM.
    #[must_use]
    pub fn detail(&self, vm: &Arc<Vm>) -> VmDetail {
        let view = vm.view();
        VmDetail {
            vm: self.listed(vm),
            shape: serde_json::to_value(&view.record.shape).expect("shapes serialise"),
            directory: self.shared.home.vm_dir(view.record.id).display().to_string(),
            network_pid: match view.record.life {
                Life::Running { passt, .. } => Some(passt.pid),
                _ => None,
            },
            ram_extents: view.ram_extents,
            ram_files: view.ram_files.iter().map(|id| format!("{id:016x}")).collect(),
            freezes: view.freezes,
            pending: self.pending_of(view.record.id),
        }
    }

    /// The counters of a running VM; with `by_color`, also what they are for.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn stats(&self, vm: &Arc<Vm>, by_color: bool) -> Result<VmStats> {
        let (resident, place) = vm.resident()?;
        let scene = look::running(vm, place, Scene::of(&self.shared, vm, place, false))?;
        // A mirror that an earlier release started does not know.
        let brought = self.shared.mirror.ram_pages(&vm.name).unwrap_or_else(|error| {
            log::debug!("{}: {}", vm.name, error.whole());
            RamPages::default()
        });
        let uses = match by_color {
            true => {
                let look = look::running(vm, place, look::colored(&self.shared, vm, &scene, COLORS_AGE))?;
                uses(&scene, &brought, |page| look.coloring.get(page) as usize, Color::ALL.map(Color::name))
            }
            false => uses(&scene, &brought, |_| 0, []),
        };
        let all = uses.last().cloned().unwrap_or_default();
        let mirror = self.shared.mirror.stats(Some(&vm.name))?;
        let start = vm.view().record.start_ram;
        let stream = mirror.streams.iter().find(|stream| Some(stream.ram) == start);
        let prefetch = stream.map(|s| serde_json::to_value(s).expect("counters serialise"));
        let mirror = mirror.vms.get(&vm.name).map(|s| serde_json::to_value(s).expect("counters serialise"));
        Ok(VmStats {
            name: vm.name.clone(),
            private_bytes: all.private * PAGE,
            shared_bytes: scene.count(|state| state == State::Local) * PAGE,
            mirror: mirror.unwrap_or_default(),
            prefetch,
            ahead: Ahead {
                fetched_bytes: brought.brought.iter().map(|(start, end)| end - start).sum::<u64>() * PAGE,
                used_bytes: all.ahead_used * PAGE,
                wasted_bytes: all.ahead_wasted * PAGE,
            },
            by_color: if by_color { uses } else { Vec::new() },
            resident,
            cpu_s: sys::cpu_seconds(place.pid),
        })
    }

    /// The counters of the node.
    ///
    /// # Errors
    /// Where the mirror is away.
    pub fn node_stats(&self) -> Result<NodeStats> {
        let store = self.shared.store.stats();
        let running = self.vms().iter().filter(|v| matches!(v.view().record.life, Life::Running { .. })).count();
        Ok(NodeStats {
            running: running as u64,
            store_logical_bytes: store.logical_bytes,
            store_stored_bytes: store.stored_bytes,
            store: serde_json::to_value(store).expect("counters serialise"),
            mirror: serde_json::to_value(self.shared.mirror.stats(None)?).expect("counters serialise"),
        })
    }

    /// Reads and checks everything in the store.
    ///
    /// # Errors
    /// Where it cannot be read at all; what is wrong in it is in the reply.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<api::VerifyReply> {
        let report = self.shared.store.verify(progress)?;
        Ok(api::VerifyReply { faults: report.faults.iter().map(ToString::to_string).collect(), blocks: report.blocks })
    }
}

/// Counts a VM's pages: one row for each of `names`, in the order in which `color` numbers them, and one for all.
fn uses<const N: usize>(
    scene: &Scene<'_>,
    brought: &RamPages,
    color: impl Fn(u64) -> usize,
    names: [&str; N],
) -> Vec<ColorUse> {
    let named = |name: &str| ColorUse { color: name.to_owned(), ..ColorUse::default() };
    let mut out: Vec<ColorUse> = names.into_iter().map(named).collect();
    let mut all = named("all");
    let (faulted, ahead) = (bitmap(scene, &brought.faulted), bitmap(scene, &brought.brought));
    for (page, state) in (0..).zip(&scene.states) {
        let (here, waited, ahead) = (state.is_resident(), faulted.get(page), ahead.get(page));
        let one = ColorUse {
            color: String::new(),
            resident: here.into(),
            private: (*state == State::Dirty).into(),
            fetched: waited.into(),
            ahead_used: (ahead && here && !waited).into(),
            ahead_wasted: (ahead && !here && !waited).into(),
        };
        out.get_mut(color(page)).into_iter().chain([&mut all]).for_each(|row| add(row, &one));
    }
    out.push(all);
    out
}

fn add(row: &mut ColorUse, one: &ColorUse) {
    row.resident += one.resident;
    row.private += one.private;
    row.fetched += one.fetched;
    row.ahead_used += one.ahead_used;
    row.ahead_wasted += one.ahead_wasted;
}

fn bitmap(scene: &Scene<'_>, runs: &[(u64, u64)]) -> Bitmap {
    let mut out = Bitmap::new(scene.states.len() as u64);
    runs.iter().for_each(|&(start, end)| out.set_range(start.min(out.len()), end.min(out.len())));
    out
}
