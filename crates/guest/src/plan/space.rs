//! Color space: pages of one color side by side, in the order in which the guest thinks of them.
//!
//! Guest-physical order says little after a day of running: a file's pages lie anywhere. Where the page descriptors
//! were read, pages of a color stand by what they belong to (the file, the mapping) and by their place in it, so that
//! the next page in color space is the next page of the same file or heap.

use super::Page;

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
    pub(super) fn in_order(colors: Vec<u8>, order: Vec<Page>) -> Option<Self> {
        let mut place = vec![u32::MAX; colors.len()];
        for (at, &page) in order.iter().enumerate() {
            let place = place.get_mut(page as usize).filter(|p| **p == u32::MAX)?;
            *place = at as u32;
        }
        (order.len() == colors.len()).then_some(Self { order, place, colors })
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
