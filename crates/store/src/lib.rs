//! The versioned blob store: every disk and every memory is a version.
//!
//! A *version* of a blob is named by the root of a copy-on-write tree over its blocks. Blocks and nodes are
//! named by keyed hashes of their content; equal content is kept once. They lie in compressed *frames*, many to
//! a *pack*; an index beside each pack says where. *Heads* name the versions that are to be kept.
//!
//! The order of writing is what makes it safe: blocks and nodes go into packs; packs and indexes are made
//! durable; only then does a compare-and-swap of a head make the versions visible. A writer that dies leaves
//! garbage and nothing else. Whatever is read is checked against its name, so a wrong byte is never served.
//!
//! `tree` is pure. The engines (`engine`) are the only modules that touch a medium. `docs/store-format.md`
//! gives every byte of the format.

#[cfg(test)]
#[macro_use]
#[path = "../../base/fuzz/edits.rs"]
mod edits;

mod arrange;
pub mod blob;
mod cache;
mod catalog;
mod chunks;
mod collect;
mod commit;
mod compact;
pub mod engine;
mod error;
mod frame;
#[cfg(test)]
mod fuzz;
mod group;
mod head;
mod layout;
mod ledger;
mod name;
mod nodes;
mod pack;
mod places;
mod publish;
mod read;
mod retention;
mod scatter;
mod shared;
mod store;
mod sweep;
mod transaction;
pub mod transfer;
mod tree;
mod verify;
mod waits;

pub use collect::Collected;
pub use commit::{BlockSource, Changes, CommitStat};
pub use engine::{Etag, Expect};
pub use error::Error;
pub use head::Manifest;
pub use layout::{ArrangeOptions, Arranged, ReadCost};
pub use name::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, Name, Version};
pub use read::ReadStat;
pub use retention::{Member, Retention};
pub use scatter::Span;
pub use store::{Mode, Stats, Store};
pub use sweep::{Explanation, Fate, HeadShare, PackFate};
pub use transaction::Transaction;
pub use verify::{Fault, Report};
pub use waits::{telling, waits};
