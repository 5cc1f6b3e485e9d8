//! What the node shows of itself.

use crate::error::{Error, Result};
use crate::node::Node;
use crate::record::Life;
use crate::sys;
use crate::vm::{View, Vm};
use api::{NodeStats, VmDetail, VmState, VmStats};
use std::sync::Arc;

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

    /// The counters of a running VM.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn stats(&self, vm: &Arc<Vm>) -> Result<VmStats> {
        let (resident, place) = vm.resident()?;
        let pages =
            sys::pages(place.pid, place.address, place.size).map_err(Error::io("read the pages of", &vm.name))?;
        let mirror = self.shared.mirror.stats(Some(&vm.name))?;
        let start = vm.view().record.start_ram;
        let stream = mirror.streams.iter().find(|stream| Some(stream.ram) == start);
        let prefetch = stream.map(|s| serde_json::to_value(s).expect("counters serialise"));
        let mirror = mirror.vms.get(&vm.name).map(|s| serde_json::to_value(s).expect("counters serialise"));
        Ok(VmStats {
            name: vm.name.clone(),
            private_bytes: pages.private.count() * base::PAGE,
            shared_bytes: pages.shared.count() * base::PAGE,
            mirror: mirror.unwrap_or_default(),
            prefetch,
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
