//! Plans: which pages to fetch ahead of an offshoot, and in which order.
//!
//! A [`Planner`] is a pure function in steps. It is told of faults ([`Planner::fault`]) and of prefetched pages that
//! turned out to be used ([`Planner::used`]), and asked for the next pages whenever the link has room
//! ([`Planner::next`]). Whoever asks sets the pace ([`Pace`]); demand never passes through here.
//!
//! Everything that it knows about a page is a *likelihood*: from the recordings of earlier offshoots where there are
//! some ([`Profile`]), else from the page's color. The dial [`Eager`] is a threshold on it, from the least that
//! works (0) to a full copy (1).
//!
//! The policies are those of the literature, and `auto`, which joins them:
//! - Twinkle (Zhu, Jiang, Xiao, INFOCOM 2011): the working set first, then segments of N pages with P faults;
//! - REAP (Ustiugov et al., ASPLOS 2021): the last recording, in its order; and the pages common to the last two;
//! - Kaleidoscope (Bryant et al., EuroSys 2011): a fault brings the next pages of its color, in color order.

mod blocks;
pub(crate) mod leb;
mod pace;
mod planner;
mod policy;
mod profile;
mod space;
mod template;
#[cfg(test)]
mod tests;
mod window;

pub use pace::Pace;
pub use planner::{Planner, Tally};
pub use policy::{Eager, Policy, Windows};
pub use profile::{Profile, ProfileError, Touch, settled};
pub use space::{Key, Space};
pub use template::{COLORS, Template, Traits, traits};

/// The number of a page of guest RAM, in the order of the RAM file.
pub type Page = u32;
