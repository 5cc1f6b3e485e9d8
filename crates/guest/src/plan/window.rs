//! A window that grows where what it brings is used, and shrinks where it is not.

/// Pages judged before a window is changed.
const JUDGED: u32 = 32;
/// Part of the prefetched pages that must be used for a window to grow, and below which it shrinks.
const GROW: f32 = 0.6;
const SHRINK: f32 = 0.3;

/// One class of prefetch, and how it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    /// Pages that a fault brings.
    pub(super) pages: u32,
    first: u32,
    /// Since the last change.
    asked: u32,
    used: u32,
    /// Since ever.
    pub(super) asked_total: u64,
    pub(super) used_total: u64,
}

impl Window {
    pub(super) fn new(pages: u32) -> Self {
        Self { pages, first: pages, asked: 0, used: 0, asked_total: 0, used_total: 0 }
    }

    /// The smallest and the largest that it may become.
    fn bounds(&self) -> (u32, u32) {
        (self.first.min(2), self.first.saturating_mul(16))
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
        self.pages = (self.pages * 2).clamp(self.bounds().0, self.bounds().1);
    }

    /// Looks at what was used since the last change. To be called when what was asked for has had time to be used.
    pub(super) fn judge(&mut self) {
        if self.asked < JUDGED {
            return;
        }
        let (least, most) = self.bounds();
        let rate = self.used as f32 / self.asked as f32;
        if rate >= GROW {
            self.pages = (self.pages * 2).min(most);
        } else if rate < SHRINK {
            self.pages = (self.pages / 2).max(least);
        }
        (self.asked, self.used) = (0, 0);
    }

    /// Of all that it brought, the part that was used; `None` where there is too little to judge by.
    pub(super) fn rate(&self) -> Option<f32> {
        (self.asked_total >= u64::from(JUDGED)).then(|| self.used_total as f32 / self.asked_total as f32)
    }
}
