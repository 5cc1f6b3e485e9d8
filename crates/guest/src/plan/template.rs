//! What is known of a template's memory, and how it is kept in a file.

use super::leb;
use super::profile::{Profile, ProfileError};
use super::space::Space;
use crate::Color;
use base::Bitmap;

/// Colors that a plan can tell apart.
pub const COLORS: usize = 16;
const MAGIC: &[u8; 8] = b"OFFPLAN1";
/// More pages than this (16 TiB less one page) have no numbers.
const PAGES_MAX: u32 = u32::MAX;

/// What a color means for fetching ahead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traits {
    /// Pages that a fault of this color brings at first.
    pub window: u32,
    /// Whether the pages are executed: which of the two windows of Kaleidoscope counts.
    pub executable: bool,
    /// Part of the color that an offshoot touches, where no recording says better.
    pub prior: f32,
}

/// By color, as [`Color`] numbers them. Priors are what redis and PostgreSQL under Debian 12 touched of each color in
/// their first seconds, rounded.
#[must_use]
pub fn traits() -> [Traits; COLORS] {
    let of = |window, executable, prior| Traits { window, executable, prior };
    let mut out = [of(8, false, 0.1); COLORS];
    for color in Color::ALL {
        out[color as usize] = match color {
            Color::Free | Color::Zero | Color::Device => of(0, false, 0.0),
            Color::KernelText => of(16, true, 0.2),
            Color::KernelData => of(16, false, 0.1),
            Color::Slab => of(16, false, 0.07),
            Color::PageTable => of(16, false, 0.35),
            Color::PageCache => of(16, false, 0.02),
            Color::UserText => of(16, true, 0.12),
            Color::UserData => of(32, false, 0.06),
            Color::Unknown => of(8, false, 0.05),
        };
    }
    out
}

/// What is known of a template's memory.
#[derive(Clone, Debug)]
pub struct Template {
    /// Color space; all pages of one color where colors are not known.
    pub space: Space,
    /// By color.
    pub traits: [Traits; COLORS],
    /// Pages that have content to fetch: neither zero nor free.
    pub stored: Bitmap,
    /// What earlier offshoots touched.
    pub profile: Profile,
}

impl Template {
    /// The same with all colors made one: pages side by side by address.
    #[must_use]
    pub fn plain(&self) -> Self {
        let colors = vec![Color::Unknown as u8; self.space.order().len()];
        Self { space: Space::new(colors, |_| (0, 0)), ..self.clone() }
    }

    /// Bytes to keep. All numbers are LEB128: pages; color space; runs of stored pages as (gap, length), closed by a run
    /// of length 0; the profile.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let pages = self.space.order().len() as u32;
        let mut out = MAGIC.to_vec();
        leb::put(&mut out, pages);
        self.space.encode(&mut out);
        let mut at = 0;
        for run in self.stored.ranges(1) {
            leb::put(&mut out, (run.start - at) as u32);
            leb::put(&mut out, run.len() as u32);
            at = run.end;
        }
        leb::put(&mut out, 0);
        leb::put(&mut out, 0);
        out.extend(self.profile.encode());
        out
    }

    /// Reads what [`Template::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are something else, or damaged.
    pub fn decode(bytes: &[u8], traits: [Traits; COLORS]) -> Result<Self, ProfileError> {
        if !bytes.starts_with(MAGIC) {
            return Err(ProfileError::Unknown);
        }
        let mut at = MAGIC.len();
        let pages = leb::take(bytes, &mut at)?;
        if pages == PAGES_MAX {
            return Err(ProfileError::Damaged(at));
        }
        let (colors, order) = Space::decode(bytes, &mut at, pages as usize)?;
        let space = Space::in_order(colors, order).ok_or(ProfileError::Damaged(at))?;
        let mut stored = Bitmap::new(pages.into());
        let mut next = 0_u64;
        loop {
            let began = ProfileError::Damaged(at);
            let start = next + u64::from(leb::take(bytes, &mut at)?);
            let len = u64::from(leb::take(bytes, &mut at)?);
            if len == 0 {
                break;
            }
            next = start + len;
            if next > u64::from(pages) {
                return Err(began);
            }
            stored.set_range(start, next);
        }
        let profile = Profile::decode(&bytes[at..])?;
        Ok(Self { space, traits, stored, profile })
    }
}
