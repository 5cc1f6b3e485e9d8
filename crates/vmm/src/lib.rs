//! Drivers for unmodified hypervisors.
//!
//! A *driver* starts a hypervisor from a [`shape::MachineShape`], freezes it, lets it go on and starts copies from
//! what was frozen. The command line is generated from the shape and the backends alone, so that a snapshot
//! can be started wherever the same hypervisor is, from its record alone.
//!
//! This crate knows nothing of stores, mirrors, snapshots or names of VMs: RAM is a map in a file, a disk is a
//! path, and the network is a connected socket.

#[cfg(test)]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

pub mod accelerator;
mod error;
pub mod passt;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod resident;
pub mod shape;

pub use accelerator::Accelerator;
pub use error::Error;
pub use shape::MachineShape;
