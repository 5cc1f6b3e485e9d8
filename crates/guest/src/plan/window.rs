//! A window that grows where what it brings is used, and shrinks where it is not.

/// Pages judged before a window is changed.
const JUDGED: u32 = 32;
/// Part of the prefetched pages below which a window shrinks, where nothing is known of the link; twice as much must be
/// used for it to grow.
const SHRINK: f32 = 0.3;
/// The least of it: however far the store is, bytes that nobody uses are somebody's. The first offshoot of a template
/// that nobody knows spends more of them: what it brings is there for the others, and teaches.
const SHRINK_MIN: f32 = 0.06;
const SHRINK_MIN_UNKNOWN: f32 = 0.02;
/// A window grows to so many times its first size where what it brings is used, because of heaps what lies further on is
/// used ever less; and to so many where faults come one behind the other.
const WIDEST: u32 = 4;
const WIDEST_UNKNOWN: u32 = 8;
const WIDEST_IN_ORDER: u32 = 16;
/// A page may be fetched in vain so much more often than time alone would have it.
const CARE: f32 = 8.0;

/// One class of prefetch, and how it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    /// Pages that a fault brings.
    pub(super) pages: u32,
    first: u32,
    /// Nothing was recorded of what it is for.
    unknown: bool,
    /// Since the last change.
    asked: u32,
    used: u32,
    /// Since ever.
    pub(super) asked_total: u64,
    pub(super) used_total: u64,
}

impl Window {
    /// Of so many pages at first; `unknown`: nothing was recorded of what it is for.
    pub(super) fn new(pages: u32, unknown: bool) -> Self {
        Self { pages, first: pages, unknown, asked: 0, used: 0, asked_total: 0, used_total: 0 }
    }

    /// The smallest that it may become.
    fn least(&self) -> u32 {
        self.first.min(2)
    }

    pub(super) fn asked(&mut self, pages: u32) {
        self.asked += pages;
        self.asked_total += u64::from(pages);
    }

    /// A page that it brought was touched.
    pub(super) fn used(&mut self) {
        self.used += 1;
        self.used_total += 1;
    }

    /// A fault came just behind what it had brought: it was right, and too small.
    pub(super) fn outrun(&mut self) {
        self.pages = (self.pages * 2).min(self.first.saturating_mul(WIDEST_IN_ORDER));
    }

    /// Looks at what was used since the last change. To be called when what was asked for has had time to be used. `cost`:
    /// what a page takes of the link's time, over what a fault waits for.
    pub(super) fn judge(&mut self, cost: Option<f32>) {
        if self.asked < JUDGED {
            return;
        }
        let rate = self.used as f32 / self.asked as f32;
        let (least, widest) = if self.unknown { (SHRINK_MIN_UNKNOWN, WIDEST_UNKNOWN) } else { (SHRINK_MIN, WIDEST) };
        let shrink = cost.map_or(SHRINK, |cost| (cost * CARE).clamp(least, SHRINK));
        if rate >= 2.0 * shrink {
            self.pages = self.pages.max((self.pages * 2).min(self.first.saturating_mul(widest)));
        } else if rate < shrink {
            self.pages = (self.pages / 2).max(self.least());
        }
        (self.asked, self.used) = (0, 0);
    }

    /// Of all that it brought, the part that was used; `None` where there is too little to judge by.
    pub(super) fn rate(&self) -> Option<f32> {
        (self.asked_total >= u64::from(JUDGED)).then(|| self.used_total as f32 / self.asked_total as f32)
    }
}
