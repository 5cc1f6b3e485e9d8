//! Whether a page that is free at the freeze may be zero in an offshoot.
//!
//! A kernel that hands out a free page either does not care what is in it or fills it first. Three settings differ:
//!
//! - *Page poisoning* (`page_poison=1`) fills pages as they are freed and complains at allocation where the filling was
//!   changed: zeros would be reported as corruption. All free pages hold the pattern then, which is how it is told,
//!   whatever the release and whatever the pattern.
//! - `init_on_free=1` leaves out the zeroing at allocation, as free pages are zero already: an offshoot's are too.
//!   `init_on_alloc=1` relies on nothing.
//! - A guest that encrypts its memory would decrypt zeros to noise. Its memory cannot be read either.
//!
//! `debug_pagealloc=on` unmaps free pages, and the sanitizers keep what they know of free pages elsewhere; neither looks
//! into them. Broken pages (`hwpoison`) and those lent to the host (balloon) are not free.

use crate::color::{Color, Coloring};
use crate::kernel::Kernel;
use crate::reader::{Reader, Stop};
use base::PAGE;

/// Whether free pages may be dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FreePages {
    /// The guest does not look into free pages: they need be neither stored nor fetched, and may be zero.
    Droppable,
    /// They are to be kept like any other.
    Kept {
        /// For what reason.
        why: String,
    },
}

/// Free pages looked into.
const SAMPLES: u64 = 128;
/// How many of those that are not zero must hold one byte throughout. Pages that were never used are poisoned as the
/// allocator gets them, so in truth all are; a few may have been zeroed by the host since.
const FILLED_PERCENT: u64 = 50;

/// Looks into some of the free pages, evenly spread.
pub(crate) fn judge(reader: &mut Reader, kernel: &Kernel, coloring: &Coloring) -> Result<FreePages, Stop> {
    let kept = |why: String| Ok(FreePages::Kept { why });
    if kernel.encrypted {
        return kept("the guest encrypts its memory".into());
    }
    let free = coloring.counts()[Color::Free as usize];
    let step = (free / SAMPLES).max(1);
    let (mut seen, mut filled, mut content) = (0u64, 0u64, 0u64);
    let mut pattern = 0;
    let mut bytes = vec![0; PAGE as usize];
    for region in reader.regions().to_vec() {
        for physical in (region.physical.start..region.physical.end).step_by(PAGE as usize) {
            let page = (physical - region.physical.start + region.offset) / PAGE;
            if coloring.get(page) != Color::Free {
                continue;
            }
            seen += 1;
            if seen % step != 0 {
                continue;
            }
            match reader.read(physical, &mut bytes) {
                Ok(()) => {}
                Err(Stop::Host(error)) => return Err(Stop::Host(error)),
                Err(stop) => return kept(format!("they could not be looked into: {stop}")),
            }
            let first = bytes[0];
            let same = bytes.iter().all(|&byte| byte == first);
            if !same || first != 0 {
                content += 1;
            }
            if same && first != 0 {
                (filled, pattern) = (filled + 1, first);
            }
        }
    }
    // A single page filled with one byte may be a process' that ended; poisoning fills all.
    if filled > 1 && filled * 100 >= content * FILLED_PERCENT {
        return kept(format!("they hold the pattern {pattern:#04x}: the guest poisons its free pages and checks them"));
    }
    Ok(FreePages::Droppable)
}
