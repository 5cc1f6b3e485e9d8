//! Plans of disks: what a profile says of blocks that are asked for in nearly the same order each time.
//!
//! A guest that boots reads its disk as its programs' code does, so the place of a block in a recording says more than
//! the time, which depends on the host. There are no colors of blocks and no windows: what no recording read is left
//! to demand.

use super::{Eager, Page, Profile};

impl Profile {
    /// The blocks that the next reader wants at least as likely as the dial asks, in the order in which readers do.
    #[must_use]
    pub fn blocks(&self, eager: Eager) -> Vec<Page> {
        if eager.dial() == 0.0 {
            return Vec::new();
        }
        self.by_rank(|likelihood| likelihood >= eager.threshold())
    }

    /// The order in which blocks are best laid down: those that are fetched ahead, and behind them the others.
    #[must_use]
    pub fn block_layout(&self) -> Vec<Page> {
        let likely = Eager::default().threshold();
        [self.by_rank(|likelihood| likelihood >= likely), self.by_rank(|likelihood| likelihood < likely)].concat()
    }

    fn by_rank(&self, wanted: impl Fn(f32) -> bool) -> Vec<Page> {
        let odds = self.odds();
        let known = self.entries().iter().filter(|entry| wanted(odds.likelihood(entry)));
        let mut known: Vec<(u32, Page)> = known.map(|entry| (entry.rank, entry.page)).collect();
        known.sort_unstable();
        known.into_iter().map(|(_, page)| page).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Touch;

    fn recorded(profile: &mut Profile, blocks: &[Page]) {
        let touches = blocks.iter().zip(0..).map(|(&page, ms)| Touch { page, ms });
        profile.add(&touches.collect::<Vec<_>>(), 60_000);
    }

    #[test]
    fn blocks_come_in_the_order_of_the_last_reading_and_rare_ones_last() {
        let mut profile = Profile::default();
        recorded(&mut profile, &[900, 7, 8, 400, 3]);
        assert_eq!(profile.blocks(Eager::default()), [900, 7, 8, 400, 3]);
        assert!(profile.blocks(Eager::new(0.0).unwrap()).is_empty());
        for _ in 0..12 {
            recorded(&mut profile, &[900, 8, 7, 3, 11]);
        }
        // What one of thirteen read is not worth its bytes, and lies behind the rest.
        assert_eq!(profile.blocks(Eager::default()), [900, 8, 7, 3, 11]);
        assert_eq!(profile.block_layout(), [900, 8, 7, 3, 11, 400]);
        assert_eq!(profile.blocks(Eager::new(1.0).unwrap()).len(), 6);
    }
}
