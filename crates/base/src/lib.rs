//! The vocabulary every Offshoot crate shares: page units, byte ranges, bitmaps, the RAM map and the
//! wire protocol of the resident library.
//!
//! This crate uses the standard library alone and does no IO: it knows no file, socket or thread.

#[cfg(test)]
#[macro_use]
#[path = "../fuzz/edits.rs"]
mod edits;

pub mod bitmap;
#[cfg(test)]
mod fuzz;
pub mod ram_map;
pub mod range;
pub mod resident;
pub mod units;

pub use bitmap::Bitmap;
pub use ram_map::{RamFileId, RamMap, Source};
pub use range::ByteRange;
pub use units::PAGE;
