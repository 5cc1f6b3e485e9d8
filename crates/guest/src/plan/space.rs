//! Color space: pages of one color side by side, in the order in which the guest thinks of them.
//!
//! Guest-physical order says little after a day of running: a file's pages lie anywhere. Where the page descriptors
//! were read, pages of a color stand by what they belong to (the file, the mapping) and by their place in it, so that
//! the next page in color space is the next page of the same file or heap.

use super::{Page, ProfileError, leb};

/// What a page belongs to, and where in it: from the descriptor's `mapping` and `index`. Equal keys stand by address.
pub type Key = (u64, u64);

/// An order of all pages.
#[derive(Clone, Debug, Default)]
pub struct Space {
    order: Vec<Page>,
    place: Vec<u32>,
    colors: Vec<u8>,
}

impl Space {
    /// Of pages whose colors are `colors`; `key` says what a page belongs to.
    #[must_use]
    pub fn new(colors: Vec<u8>, key: impl Fn(Page) -> Key) -> Self {
        let pages = u32::try_from(colors.len()).expect("fewer than 2^32 pages");
        let mut keyed: Vec<(u8, Key, Page)> = (0..pages).map(|page| (colors[page as usize], key(page), page)).collect();
        keyed.sort_unstable();
        let order: Vec<Page> = keyed.into_iter().map(|(.., page)| page).collect();
        Self::in_order(colors, order).expect("each page was sorted once")
    }

    /// As it was: `order` must name each page once, or there is none.
    pub(crate) fn in_order(colors: Vec<u8>, order: Vec<Page>) -> Option<Self> {
        let mut place = vec![u32::MAX; colors.len()];
        for (at, &page) in order.iter().enumerate() {
            let place = place.get_mut(page as usize).filter(|p| **p == u32::MAX)?;
            *place = at as u32;
        }
        (order.len() == colors.len()).then_some(Self { order, place, colors })
    }

    /// Colors by page.
    pub(crate) fn colors(&self) -> &[u8] {
        &self.colors
    }

    /// Appends colors and order, all numbers LEB128: runs of one color as (color, length), then the order as
    /// differences of page numbers, zigzag. How many pages there are is not among it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for run in self.colors.chunk_by(|a, b| a == b) {
            leb::put(out, run[0].into());
            leb::put(out, run.len() as u32);
        }
        let mut last = -1_i64;
        for &page in &self.order {
            // What follows the last page is the usual case, and 0.
            let step = i64::from(page) - last - 1;
            leb::put_wide(out, ((step << 1) ^ (step >> 63)).cast_unsigned());
            last = page.into();
        }
    }

    /// Reads from `at` on what [`Space::encode`] appended, as colors and order of so many pages.
    pub(crate) fn decode(bytes: &[u8], at: &mut usize, pages: usize) -> Result<(Vec<u8>, Vec<Page>), ProfileError> {
        // Each page takes a byte at least, in the order.
        if pages > bytes.len() - *at {
            return Err(ProfileError::Damaged(*at));
        }
        let mut colors = Vec::with_capacity(pages);
        while colors.len() < pages {
            let began = ProfileError::Damaged(*at);
            let color = u8::try_from(leb::take(bytes, at)?).map_err(|_| began.clone())?;
            let len = leb::take(bytes, at)? as usize;
            if len == 0 || colors.len() + len > pages {
                return Err(began);
            }
            colors.resize(colors.len() + len, color);
        }
        let mut order = Vec::with_capacity(pages);
        let mut last = -1_i64;
        for _ in 0..pages {
            let began = ProfileError::Damaged(*at);
            let folded = leb::take_wide(bytes, at)?;
            let step = (folded >> 1).cast_signed() ^ -(folded & 1).cast_signed();
            let page = last.checked_add(1).and_then(|p| p.checked_add(step)).ok_or(began.clone())?;
            order.push(Page::try_from(page).map_err(|_| began)?);
            last = page;
        }
        Ok((colors, order))
    }

    /// All pages in this order.
    #[must_use]
    pub fn order(&self) -> &[Page] {
        &self.order
    }

    /// A page's color; 0 for a page that is not here.
    #[must_use]
    pub fn color(&self, page: Page) -> u8 {
        self.colors.get(page as usize).copied().unwrap_or(0)
    }

    /// The pages of the same color that follow `page`.
    pub fn after(&self, page: Page) -> impl Iterator<Item = Page> + '_ {
        let color = self.color(page);
        let from = self.place.get(page as usize).map_or(self.order.len(), |&at| at as usize + 1);
        self.order[from..].iter().copied().take_while(move |&p| self.color(p) == color)
    }

    /// The page of the same color before `page`.
    #[must_use]
    pub fn before(&self, page: Page) -> Option<Page> {
        let at = *self.place.get(page as usize)? as usize;
        let before = *self.order.get(at.checked_sub(1)?)?;
        (self.color(before) == self.color(page)).then_some(before)
    }
}
