//! What one VM touches, and when.
//!
//! Faults come from the front as they happen. Pages that lay in the page cache already, because of prefetch or of
//! another offshoot, are found by looking at the hypervisor's page table: often at first, then ever more rarely. Both
//! are first touches; a page's second one is nobody's business.

use super::{Bell, Stream, look_after};
use crate::control::{Foresee, Recording};
use crate::front::pagemap::Pagemap;
use base::{Bitmap, PAGE};
use guest::plan::{Page, settled};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// One VM.
pub(crate) struct Member {
    pub(crate) vm: String,
    stream: Option<Arc<Stream>>,
    bell: Arc<Bell>,
    pagemap: Pagemap,
    address: u64,
    pages: u32,
    began: Instant,
    touched: Mutex<Touched>,
}

struct Touched {
    seen: Bitmap,
    /// First touches in order, in milliseconds; while it is recorded.
    touches: Vec<(Page, u32)>,
    recording: bool,
    looked: Duration,
    fresh: Vec<Page>,
}

impl Member {
    /// One whose RAM lies at `address` and has so many pages.
    pub(crate) fn new(
        spec: &Foresee,
        (address, pages): (u64, u32),
        pagemap: Pagemap,
        (stream, bell): (Option<Arc<Stream>>, Arc<Bell>),
    ) -> Self {
        let touched = Touched {
            seen: Bitmap::new(pages.into()),
            touches: Vec::new(),
            recording: spec.record,
            looked: Duration::ZERO,
            fresh: Vec::new(),
        };
        Self {
            vm: spec.vm.clone(),
            stream,
            bell,
            pagemap,
            address,
            pages,
            began: Instant::now(),
            touched: Mutex::new(touched),
        }
    }

    /// What is fetched ahead for it.
    pub(crate) fn stream(&self) -> Option<&Arc<Stream>> {
        self.stream.as_ref()
    }

    /// What is to be told when the guest begins to wait for bytes of its RAM: what it waits for says what is next, and
    /// that is then asked for beside it.
    pub(crate) fn hears_of(self: Arc<Self>, offset: u64, len: usize) -> Box<dyn FnOnce()> {
        Box::new(move || {
            let pages = self.note(offset, len);
            let Some(stream) = &self.stream else { return };
            let more = pages.fold(false, |more, page| more | stream.waits(page));
            if more {
                self.bell.ring();
            }
        })
    }

    /// The guest has waited for bytes of its RAM.
    pub(crate) fn fault(&self, offset: u64, len: usize, took: Duration, far: bool) {
        let pages = self.note(offset, len);
        let Some(stream) = &self.stream else { return };
        let more = pages.fold(false, |more, page| more | stream.fault(page, took, far));
        if more {
            self.bell.ring();
        }
    }

    /// Notes that the guest touches these bytes, and says which pages they are.
    fn note(&self, offset: u64, len: usize) -> Range<Page> {
        let pages = (offset / PAGE) as Page..((offset + len as u64).div_ceil(PAGE) as Page).min(self.pages);
        let ms = millis(self.began.elapsed());
        let mut touched = self.touched.lock().expect("no holder panics");
        for page in pages.clone() {
            touched.note(page, ms);
        }
        pages
    }

    /// When it is to be looked at next; none: nobody wants to know.
    pub(crate) fn due(&self) -> Option<Instant> {
        let touched = self.touched.lock().expect("no holder panics");
        let wanted = touched.recording || self.stream.as_ref().is_some_and(|s| !s.is_idle());
        wanted.then(|| self.began + touched.looked + look_after(touched.looked))
    }

    /// Looks for pages touched since the last time; says whether there were any.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) fn look(&self) -> io::Result<bool> {
        let mut touched = self.touched.lock().expect("no holder panics");
        touched.looked = self.began.elapsed();
        let ms = millis(touched.looked);
        let address = self.address;
        self.pagemap.present(address, u64::from(self.pages) * PAGE, |range| {
            for page in (range.start - address) / PAGE..(range.end - address) / PAGE {
                if touched.note(page as Page, ms) {
                    touched.fresh.push(page as Page);
                }
            }
        })?;
        let fresh = std::mem::take(&mut touched.fresh);
        drop(touched);
        if let Some(stream) = &self.stream {
            stream.used(&fresh, true);
        }
        Ok(!fresh.is_empty())
    }

    /// Whether its working set has settled; with `end`, what was recorded, and nothing more is.
    pub(crate) fn recording(&self, end: bool) -> Recording {
        let mut touched = self.touched.lock().expect("no holder panics");
        let seen_ms = millis(self.began.elapsed());
        let times: Vec<u32> = touched.touches.iter().map(|(_, ms)| *ms).collect();
        let settled_ms = settled(&times, seen_ms);
        if !end {
            return Recording { touches: Vec::new(), settled_ms, seen_ms };
        }
        touched.recording = false;
        Recording { touches: std::mem::take(&mut touched.touches), settled_ms, seen_ms }
    }
}

impl Touched {
    /// Says whether it is new.
    fn note(&mut self, page: Page, ms: u32) -> bool {
        let new = self.seen.set(page.into());
        if new && self.recording {
            self.touches.push((page, ms));
        }
        new
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
