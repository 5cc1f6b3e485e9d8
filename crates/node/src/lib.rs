//! A node: the life of its VMs, its images and snapshots.
//!
//! [`Node`] is everything the daemon can do, as blocking functions; the binary puts HTTP and a command line around
//! it. Each VM is owned by one thread ([`vm`]); the mirror is a process of its own ([`mirror_link`]); what is frozen
//! reaches the store behind the guests' backs ([`commit`]).

#[cfg(test)]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

mod blobs;
mod colors;
mod commit;
mod dedup;
pub mod doctor;
mod error;
mod exports;
mod foresight;
pub mod home;
pub mod image;
mod images;
mod layout;
pub mod lineage;
mod look;
pub mod mirror_link;
mod mirrored;
pub mod names;
mod node;
mod observe;
pub mod place;
pub mod record;
mod recover;
mod shared;
mod snapshots;
mod sweep;
pub mod sys;
mod transfer;
pub mod vm;

pub use blobs::Named;
pub use error::{Error, Result};
pub use home::Home;
pub use images::ENV_CACHE;
pub use node::{FORK_MAX, Node, Shared};
pub use place::Place;
