//! Which ranges of a disk hold data, which are zero, which changed: from the layers' states and the store's tree, without
//! reading a byte of data.

use super::layer::Layer;
use super::overlay::{DiskError, Lower, Overlay};
use super::states::State;
use crate::resolve::Versions;
use base::ByteRange;

/// What an extent of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    /// It reads as zero and takes no space of its own.
    pub(crate) zero: bool,
    /// It was written or zeroed since what lies below was frozen.
    pub(crate) changed: bool,
}

/// A run of bytes of one kind, ending at `end`; it begins where the one before ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) end: u64,
    pub(crate) kind: Kind,
}

/// Extents in order, neighbours of one kind joined, at most so many.
struct Collector {
    extents: Vec<Extent>,
    most: usize,
}

impl Collector {
    /// Takes the next extent; false: there is no room for it.
    fn push(&mut self, end: u64, kind: Kind) -> bool {
        let full = self.extents.len() == self.most;
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.end = end,
            _ if full => return false,
            _ => self.extents.push(Extent { end, kind }),
        }
        true
    }
}

impl Overlay {
    /// The extents of `range` from its start on, at most `most`; they may end before the range does, and reach at
    /// least one byte.
    pub(crate) fn extents(
        &self,
        versions: &dyn Versions,
        range: ByteRange,
        most: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        assert!(!range.is_empty() && range.end <= self.size && most > 0, "extents of {range:?} of {}", self.size);
        let stack = self.stack();
        let mut out = Collector { extents: Vec::new(), most };
        layered(&stack.top, &stack.lower, self.block_size, versions, range, true, &mut out)?;
        Ok(out.extents)
    }
}

/// The extents of a version of the store, as [`Overlay::extents`].
pub(crate) fn of_version(
    version: &str,
    versions: &dyn Versions,
    range: ByteRange,
    most: usize,
) -> Result<Vec<Extent>, DiskError> {
    let mut out = Collector { extents: Vec::new(), most };
    stored(version, versions, range, &mut out)?;
    Ok(out.extents)
}

/// Collects the extents of `range`; false: no more fit.
fn layered(
    layer: &Layer,
    lower: &Lower,
    size: u64,
    versions: &dyn Versions,
    range: ByteRange,
    top: bool,
    out: &mut Collector,
) -> Result<bool, DiskError> {
    let mut at = range.start;
    while at < range.end {
        let (state, end) = layer.run(at / size, range.end.div_ceil(size));
        let end = (end * size).min(range.end);
        let changed = top && state.is_dirty();
        let fits = match state {
            State::Clean | State::Dirty => out.push(end, Kind { zero: false, changed }),
            State::CleanZero | State::DirtyZero => out.push(end, Kind { zero: true, changed }),
            State::Absent => match lower {
                Lower::Zero => out.push(end, Kind { zero: true, changed }),
                Lower::Version(version) => stored(version, versions, ByteRange::new(at, end), out)?,
                Lower::View(view) => {
                    layered(&view.layer, &view.lower(), size, versions, ByteRange::new(at, end), false, out)?
                }
            },
        };
        if !fits {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

fn stored(version: &str, versions: &dyn Versions, range: ByteRange, out: &mut Collector) -> Result<bool, DiskError> {
    let (data, zero) = (Kind { zero: false, changed: false }, Kind { zero: true, changed: false });
    let (ranges, reached) = versions.data_ranges(version, range, out.most)?;
    let mut at = range.start;
    for found in ranges {
        if found.start > at && !out.push(found.start, zero) || !out.push(found.end, data) {
            return Ok(false);
        }
        at = found.end;
    }
    if at < reached && !out.push(reached, zero) {
        return Ok(false);
    }
    Ok(reached == range.end)
}
