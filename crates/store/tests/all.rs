//! All integration tests of the store in one program: linking one takes as long as linking each of twenty. A file is a
//! module, and `scripts/run-tests` runs each as a process of its own.

mod common;
#[path = "common/faulty.rs"]
mod faulty;
#[path = "common/watched.rs"]
mod watched;
#[path = "common/weed.rs"]
mod weed;

mod arrange;
mod blob;
mod blob_simulation;
mod blob_writers;
mod cached;
mod conformance;
mod crash;
mod follow;
mod formats;
mod hostile;
mod layout;
mod local;
mod shared;
mod simulation;
mod transfer;
mod versions;
