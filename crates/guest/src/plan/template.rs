//! What is known of a template's memory, and how it is kept in a file.

use super::Page;
use super::profile::{self, Profile, ProfileError};
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

/// By color, as [`Color`] numbers them.
#[must_use]
pub fn traits() -> [Traits; COLORS] {
    let of = |window, executable, prior| Traits { window, executable, prior };
    let mut out = [of(8, false, 0.1); COLORS];
    for color in Color::ALL {
        out[color as usize] = match color {
            Color::Free | Color::Zero | Color::Device => of(0, false, 0.0),
            Color::KernelText => of(8, true, 0.4),
            Color::KernelData => of(16, false, 0.3),
            Color::Slab => of(16, false, 0.25),
            Color::PageTable => of(16, false, 0.3),
            Color::PageCache => of(8, false, 0.03),
            Color::UserText => of(8, true, 0.2),
            Color::UserData => of(16, false, 0.2),
            Color::Unknown => of(8, false, 0.1),
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
    /// Bytes to keep. All numbers are LEB128: pages; runs of one color as (color, length); color space as differences
    /// of page numbers, zigzag; runs of stored pages as (gap, length), closed by a run of length 0; the profile.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let pages = self.space.order().len() as u32;
        let mut out = MAGIC.to_vec();
        profile::put(&mut out, pages);
        let mut page = 0;
        while page < pages {
            let color = self.space.color(page);
            let end = (page..pages).find(|&p| self.space.color(p) != color).unwrap_or(pages);
            profile::put(&mut out, color.into());
            profile::put(&mut out, end - page);
            page = end;
        }
        let mut last = -1_i64;
        for &page in self.space.order() {
            // What follows the last page is the usual case, and 0.
            let step = i64::from(page) - last - 1;
            profile::put_wide(&mut out, ((step << 1) ^ (step >> 63)).cast_unsigned());
            last = page.into();
        }
        let mut at = 0;
        for run in self.stored.ranges(1) {
            profile::put(&mut out, (run.start - at) as u32);
            profile::put(&mut out, run.len() as u32);
            at = run.end;
        }
        profile::put(&mut out, 0);
        profile::put(&mut out, 0);
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
        let pages = profile::take(bytes, &mut at)?;
        // Each page takes a byte at least, in color space.
        if pages as usize > bytes.len() || pages == PAGES_MAX {
            return Err(ProfileError::Damaged(at));
        }
        let mut colors = Vec::with_capacity(pages as usize);
        while colors.len() < pages as usize {
            let began = ProfileError::Damaged(at);
            let color = u8::try_from(profile::take(bytes, &mut at)?).map_err(|_| began.clone())?;
            let len = profile::take(bytes, &mut at)? as usize;
            if len == 0 || colors.len() + len > pages as usize {
                return Err(began);
            }
            colors.resize(colors.len() + len, color);
        }
        let mut order = Vec::with_capacity(pages as usize);
        let mut last = -1_i64;
        for _ in 0..pages {
            let began = ProfileError::Damaged(at);
            let folded = profile::take_wide(bytes, &mut at)?;
            let step = (folded >> 1).cast_signed() ^ -(folded & 1).cast_signed();
            let page = last.checked_add(1).and_then(|p| p.checked_add(step)).ok_or(began.clone())?;
            order.push(Page::try_from(page).map_err(|_| began)?);
            last = page;
        }
        let space = Space::in_order(colors, order).ok_or(ProfileError::Damaged(at))?;
        let mut stored = Bitmap::new(pages.into());
        let mut next = 0_u64;
        loop {
            let began = ProfileError::Damaged(at);
            let start = next + u64::from(profile::take(bytes, &mut at)?);
            let len = u64::from(profile::take(bytes, &mut at)?);
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
