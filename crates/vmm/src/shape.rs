//! The machine shape: everything about a VM that must be the same wherever its snapshots start.

use crate::accelerator::Accelerator;
use serde::{Deserialize, Serialize};

/// The exact shape of a machine. The command line is generated from it alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// Machine type with its version, for example `pc-q35-7.2`: an alias would move with the hypervisor.
    pub machine: String,
    /// Who executes guest instructions; device state does not move between accelerators.
    pub accelerator: Accelerator,
    /// Named CPU model with its version, for example `Westmere-v1`.
    pub cpu_model: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The RAM regions, in order. One, named `ram`, for every machine built today.
    pub ram: Vec<RamRegion>,
    /// The disks, in order: the first is `/dev/vda`.
    pub disks: Vec<DiskShape>,
    /// The network interface.
    pub nic: Nic,
}

/// A RAM region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// Name of the memory backend and of the blob.
    pub id: String,
    /// Bytes, whole pages.
    pub bytes: u64,
}

/// A disk's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// Name of the drive and of the blob.
    pub id: String,
    /// Bytes, a multiple of the block size.
    pub bytes: u64,
    /// Bytes in a block of identity.
    pub block_bytes: u32,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its hardware address: the same in all copies, each of which has a network of its own.
    pub mac: String,
}

impl MachineShape {
    /// A machine of today's default kind.
    #[must_use]
    pub fn new(accelerator: Accelerator, cpus: u32, memory_bytes: u64, disks: Vec<DiskShape>) -> Self {
        Self {
            machine: "pc-q35-7.2".into(),
            accelerator,
            // A model that software emulation implements whole, with the instructions that guests' TLS stacks
            // and entropy pools ask for. KVM hosts of different generations all have it.
            cpu_model: "Westmere-v1,+rdrand".into(),
            cpus,
            ram: vec![RamRegion { id: "ram".into(), bytes: memory_bytes }],
            disks,
            nic: Nic { mac: "52:54:00:0f:f5:01".into() },
        }
    }

    /// Bytes of RAM below the hole for devices; what is more lies from 4 GiB on (QEMU's q35, `pc_q35_init`).
    #[must_use]
    pub fn ram_below_hole(&self) -> u64 {
        if self.memory_bytes() >= 0xb000_0000 { 0x8000_0000 } else { 0xb000_0000 }
    }

    /// Bytes of RAM in all regions.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.ram.iter().map(|r| r.bytes).sum()
    }
}
