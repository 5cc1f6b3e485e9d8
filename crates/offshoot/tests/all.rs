//! All tests of whole machines in one program: linking one takes as long as linking each of twenty. A file is a module,
//! and `scripts/run-tests` runs each as a process of its own.

mod common;
#[path = "../../store/tests/common/weed.rs"]
mod weed;

mod blobs;
mod cli;
mod colors;
mod deploy;
mod family;
mod foresight;
mod free;
mod full;
mod kills;
mod leaks;
mod nbd;
mod seeing;
mod shared;
mod stores;
mod tree;
