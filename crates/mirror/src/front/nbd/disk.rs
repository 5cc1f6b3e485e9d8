//! What an export serves: a disk of this mirror, or a version of the store as it is.

use crate::core::Core;
use crate::disk::{DiskError, Extent, Layer, Overlay, of_version};
use crate::foresight::disk::{Reads, blocks_of};
use crate::objects::ObjectError;
use crate::stats::add;
use base::ByteRange;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// The disk behind an export.
pub(crate) enum Disk {
    /// A disk that may be written.
    Overlay(Arc<Overlay>),
    /// A version. Nothing of it is kept here: the store has a cache of its own.
    Version { version: Arc<str>, size: u64, block_size: u64, reads: Reads },
}

impl Disk {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Overlay(overlay) => overlay.size,
            Self::Version { size, .. } => *size,
        }
    }

    /// Bytes in a block.
    pub(crate) fn block_size(&self) -> u64 {
        match self {
            Self::Overlay(overlay) => overlay.block_size,
            Self::Version { block_size, .. } => *block_size,
        }
    }

    /// The overlay's id.
    pub(crate) fn overlay(&self) -> Option<u64> {
        match self {
            Self::Overlay(overlay) => Some(overlay.id),
            Self::Version { .. } => None,
        }
    }

    /// Reads where nobody has to be waited for; see [`Overlay::read_now`].
    pub(super) fn read_now(&self, core: &Core, offset: u64, buf: &mut [u8]) -> bool {
        let Self::Overlay(overlay) = self else { return false };
        let began = Instant::now();
        let here = overlay.read_now(offset, buf);
        if here {
            count_read(core, overlay, buf.len(), began);
        }
        here
    }

    /// The layer that a read past the page cache goes to; see [`Overlay::holds_directly`].
    pub(super) fn holds_directly(&self, offset: u64, len: u64) -> Option<Arc<Layer>> {
        match self {
            Self::Overlay(overlay) => overlay.holds_directly(offset, len),
            Self::Version { .. } => None,
        }
    }

    /// Counts such a read.
    pub(super) fn count_direct(&self, core: &Core, len: usize, began: Instant) {
        let Self::Overlay(overlay) = self else { return };
        count_read(core, overlay, len, began);
    }

    /// Reads; the caller keeps within the size.
    pub(super) fn read(&self, core: &Core, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let versions = core.objects.versions();
        match self {
            Self::Overlay(overlay) => {
                let began = Instant::now();
                let tally = core.ask_again(|| overlay.read(versions, offset, buf))?;
                let counters = core.vms.known(&overlay.vm);
                add(&counters.disk_reads, 1);
                add(&counters.disk_read_bytes, buf.len() as u64);
                add(&counters.disk_hits, u64::from(tally.fetched_bytes == 0));
                add(&counters.disk_fetched_bytes, tally.fetched_bytes);
                add(&counters.store_read_bytes, tally.store_bytes);
                counters.disk_read_latency.add(began.elapsed());
            }
            Self::Version { version, block_size, reads, .. } => {
                if reads.is_on() {
                    reads.note(blocks_of(ByteRange::at(offset, buf.len() as u64), *block_size));
                }
                let stored = core.ask_again(|| versions.read_at(version, offset, buf).map_err(Into::into))?;
                add(&core.vms.others.store_read_bytes, stored);
            }
        }
        Ok(())
    }

    /// Whether a write asks the store for nothing.
    pub(super) fn writes_locally(&self, offset: u64, len: u64) -> bool {
        matches!(self, Self::Overlay(overlay) if overlay.writes_locally(offset, len))
    }

    /// Writes; the caller keeps within the size.
    pub(super) fn write(&self, core: &Core, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let overlay = self.writable()?;
        let tally = core.ask_again(|| overlay.write(core.objects.versions(), offset, data))?;
        let counters = core.vms.known(&overlay.vm);
        add(&counters.disk_written_bytes, data.len() as u64);
        add(&counters.disk_fetched_bytes, tally.fetched_bytes);
        add(&counters.store_read_bytes, tally.store_bytes);
        Ok(())
    }

    /// Zeroes; with `keep_space` the room stays taken.
    pub(super) fn zero(&self, core: &Core, offset: u64, len: u64, keep_space: bool) -> Result<(), DiskError> {
        let overlay = self.writable()?;
        core.ask_again(|| overlay.zero(core.objects.versions(), offset, len, keep_space))
    }

    /// Gives whole blocks back.
    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.writable()?.discard(offset, len)
    }

    /// Makes durable what was answered, over whatever connection it came.
    pub(super) fn flush(&self, core: &Core) -> Result<(), DiskError> {
        let Self::Overlay(overlay) = self else { return Ok(()) };
        core.objects.flush(overlay.id).map_err(|e| match e {
            ObjectError::Io { source, .. } => DiskError::Local(source),
            other => DiskError::Local(io::Error::other(other.to_string())),
        })?;
        add(&core.vms.known(&overlay.vm).disk_flushes, 1);
        Ok(())
    }

    /// The extents of a range, as [`Overlay::extents`].
    pub(super) fn extents(&self, core: &Core, range: ByteRange, most: usize) -> Result<Vec<Extent>, DiskError> {
        let versions = core.objects.versions();
        core.ask_again(|| match self {
            Self::Overlay(overlay) => overlay.extents(versions, range, most),
            Self::Version { version, .. } => of_version(version, versions, range, most),
        })
    }

    /// What went wrong, where it is listed, for the daemon and for people.
    pub(super) fn note(&self, core: &Core, error: &DiskError) -> String {
        let id = self.overlay().unwrap_or(0);
        let what = error.describe(id);
        core.problems.note(id, &what);
        what
    }

    fn writable(&self) -> Result<&Overlay, DiskError> {
        match self {
            Self::Overlay(overlay) => Ok(overlay),
            Self::Version { .. } => Err(DiskError::Local(io::ErrorKind::ReadOnlyFilesystem.into())),
        }
    }
}

/// Counts a read for which the store was not asked.
fn count_read(core: &Core, overlay: &Overlay, len: usize, began: Instant) {
    let counters = core.vms.known(&overlay.vm);
    add(&counters.disk_reads, 1);
    add(&counters.disk_read_bytes, len as u64);
    add(&counters.disk_hits, 1);
    counters.disk_read_latency.add(began.elapsed());
}
