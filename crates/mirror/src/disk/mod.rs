//! Disks: writable overlays over frozen views over versions of the store.
//!
//! ```text
//! overlay (a file in the mount)      view V (frozen by `mark`)       view W               store
//!   top layer, written            ->   sealed layer               ->   sealed layer   ->   version
//!   absent blocks: see below           absent blocks: see below        ...
//! ```
//!
//! A read takes each block from the first layer that has it, else from the store, and what came from the store is
//! kept in the top layer (copy-on-reference). Once the daemon has committed a view, what the view's layer lacks is
//! read from the committed version, and no longer from what lay below: the depth stays constant over any number
//! of forks.

mod extents;
mod layer;
mod overlay;
mod pool;
mod states;

pub(crate) use extents::{Extent, of_version};
pub(crate) use layer::{Layer, is_zero};
pub(crate) use overlay::{DiskError, Lower, Overlay, Stack, View};
pub(crate) use pool::Pool;

#[cfg(test)]
mod tests;
