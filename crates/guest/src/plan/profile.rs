//! What earlier offshoots of a template touched: which pages, how often, how early.
//!
//! A recording is the list of pages that one offshoot touched, in order, until its working set settled. A profile
//! keeps for each page which of the last 32 recordings touched it, so that one odd offshoot changes little and what
//! is no longer touched is forgotten. Recordings differ in length: one that ended before a page's time says nothing of
//! that page.

use super::Page;
use super::leb::{put, take};
use base::units::human;
use std::collections::HashMap;
use std::fmt;

/// Recordings that a profile remembers: a bit of `Entry::recent` each.
pub(super) const RECORDINGS: u32 = u32::BITS;
const MAGIC: &[u8; 8] = b"OFFPROF2";
/// So many pages tell how often their like return.
const COUNTED: usize = 64;
/// Of a mean over recordings, the latest has at least this weight.
const LATEST_WEIGHT: f32 = 0.125;
/// Where the working set is said to have settled: doubling the time adds less than this part of it.
const SETTLED: f32 = 0.1;
/// The first tracking window tried, in milliseconds.
const WINDOW_MS: u32 = 125;

/// One page's first touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Which page.
    pub page: Page,
    /// Milliseconds since the offshoot's first instruction.
    pub ms: u32,
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) page: Page,
    /// Bit 0: the last recording touched it; bit 1: the one before; and so on.
    pub(super) recent: u32,
    /// Mean of the binary logarithm of 1 + milliseconds, in 256ths.
    pub(super) early: u16,
    /// Its place in the last recording that touched it.
    pub(super) rank: u32,
}

/// What offshoots of a template touch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// Recordings that count, at most 32.
    recordings: u32,
    /// Until when each of them went, the last one first: as [`Entry::early`].
    spans: Vec<u16>,
    /// Ascending by page.
    entries: Vec<Entry>,
}

/// Why bytes are no profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileError {
    /// Not written by [`Profile::encode`], or by a later release.
    Unknown,
    /// It ends early, goes on behind its end, or contradicts itself.
    Damaged(usize),
}

impl fmt::Display for ProfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("not an access profile that this release knows"),
            Self::Damaged(at) => write!(f, "the access profile is damaged at byte {at}"),
        }
    }
}

impl std::error::Error for ProfileError {}

/// The time until which a working set is tracked, found as Twinkle does: the window is doubled until that adds less
/// than a tenth. `touched_ms` ascends. `None`: it has not settled within what was seen.
#[must_use]
pub fn settled(touched_ms: &[u32], seen_ms: u32) -> Option<u32> {
    let within = |ms: u32| touched_ms.partition_point(|&t| t < ms) as f32;
    let mut window = WINDOW_MS;
    while window.saturating_mul(2) <= seen_ms {
        let (now, doubled) = (within(window), within(window * 2));
        // An empty window says nothing: the guest may not have run yet.
        if now > 0.0 && doubled - now < now * SETTLED {
            return Some(window);
        }
        window = window.checked_mul(2)?;
    }
    None
}

impl Profile {
    /// How many recordings it stands on.
    #[must_use]
    pub fn recordings(&self) -> u32 {
        self.recordings
    }

    /// How many pages it knows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it knows nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How likely the next offshoot touches each page.
    pub(super) fn odds(&self) -> Odds<'_> {
        let of = |times| self.entries.iter().filter(|e| e.recent.count_ones() == times).count();
        let (once, twice, all) = (of(1), of(2), self.recordings as usize);
        let once = if all < 2 || once < COUNTED {
            1.0
        } else {
            (2.0 * twice as f32 / once as f32 / all as f32 / laplace(1, all)).min(1.0)
        };
        Odds { spans: &self.spans, once }
    }

    /// Takes a recording in that went until `until_ms`: the first touch of each page, in the order of time. Later touches
    /// of a page are ignored.
    pub fn add(&mut self, recording: &[Touch], until_ms: u32) {
        let mut first: HashMap<Page, (u32, u32)> = HashMap::with_capacity(recording.len());
        for (rank, touch) in recording.iter().enumerate() {
            first.entry(touch.page).or_insert((rank as u32, touch.ms));
        }
        self.recordings = (self.recordings + 1).min(RECORDINGS);
        self.spans.insert(0, log_time(until_ms));
        self.spans.truncate(RECORDINGS as usize);
        for entry in &mut self.entries {
            entry.recent <<= 1;
            let Some((rank, ms)) = first.remove(&entry.page) else { continue };
            let weight = (1.0 / (entry.recent.count_ones() as f32 + 1.0)).max(LATEST_WEIGHT);
            let mean = f32::from(entry.early) * (1.0 - weight) + f32::from(log_time(ms)) * weight;
            *entry = Entry { recent: entry.recent | 1, early: mean as u16, rank, ..*entry };
        }
        self.entries.retain(|e| e.recent != 0);
        self.entries.extend(first.into_iter().map(|(page, (rank, ms))| Entry {
            page,
            recent: 1,
            early: log_time(ms),
            rank,
        }));
        self.entries.sort_unstable_by_key(|e| e.page);
    }

    /// Bytes to keep with the snapshot: magic, how many recordings and entries, until when each recording went, and the
    /// entries; numbers as LEB128, pages as differences.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        put(&mut out, self.recordings);
        put(&mut out, self.entries.len() as u32);
        self.spans.iter().for_each(|&span| put(&mut out, span.into()));
        let mut next = 0;
        for entry in &self.entries {
            put(&mut out, entry.page - next);
            put(&mut out, entry.recent);
            put(&mut out, u32::from(entry.early));
            put(&mut out, entry.rank);
            next = entry.page.saturating_add(1);
        }
        out
    }

    /// Reads what [`Profile::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are something else, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProfileError> {
        if !bytes.starts_with(MAGIC) {
            return Err(ProfileError::Unknown);
        }
        let mut at = MAGIC.len();
        let recordings = take(bytes, &mut at)?;
        let count = take(bytes, &mut at)?;
        if recordings > RECORDINGS || count as usize > bytes.len() / 4 {
            return Err(ProfileError::Damaged(at));
        }
        let mut spans = Vec::with_capacity(recordings as usize);
        for _ in 0..recordings {
            let began = at;
            spans.push(take(bytes, &mut at)?.try_into().map_err(|_| ProfileError::Damaged(began))?);
        }
        let mut entries = Vec::with_capacity(count as usize);
        let mut next = Some(0_u32);
        for _ in 0..count {
            let began = at;
            let damaged = ProfileError::Damaged(began);
            let gap = take(bytes, &mut at)?;
            let page = next.and_then(|n| n.checked_add(gap)).ok_or(damaged.clone())?;
            let recent = take(bytes, &mut at)?;
            let early = take(bytes, &mut at)?.try_into().map_err(|_| damaged.clone())?;
            let rank = take(bytes, &mut at)?;
            let known = if recordings == RECORDINGS { u32::MAX } else { (1 << recordings) - 1 };
            if recent == 0 || recent & !known != 0 {
                return Err(damaged);
            }
            entries.push(Entry { page, recent, early, rank });
            next = page.checked_add(1);
        }
        if at == bytes.len() { Ok(Self { recordings, spans, entries }) } else { Err(ProfileError::Damaged(at)) }
    }

    /// One line for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let odds = self.odds();
        let often = self.entries.iter().filter(|e| odds.likelihood(e) >= 0.5).count() as u64;
        let (pages, times) = (self.entries.len() as u64, self.recordings);
        let (all, often) = (human(pages * base::PAGE), human(often * base::PAGE));
        format!("{all} touched in {times} recordings, {often} of it in half of them or more")
    }
}

/// Says how likely pages are.
pub(super) struct Odds<'a> {
    spans: &'a [u16],
    /// How much less likely pages are that one recording touched alone.
    once: f32,
}

impl Odds<'_> {
    /// Laplace's rule over the recordings kept that went until the page's time, without the doubt about a single one,
    /// since sets of offshoots overlap by nine tenths; but a page that one alone touched is no likelier than the number of
    /// those that two did makes it (Good, Biometrika 1953): of a server that answers each client something else, most
    /// such pages are touched by no other.
    pub(super) fn likelihood(&self, entry: &Entry) -> f32 {
        let seen = entry.recent.count_ones() as usize;
        let silent =
            self.spans.iter().enumerate().filter(|&(i, &span)| entry.recent >> i & 1 == 0 && span >= entry.early);
        laplace(seen, seen + silent.count()) * if seen == 1 { self.once } else { 1.0 }
    }
}

fn laplace(seen: usize, of: usize) -> f32 {
    (seen as f32 + 0.25) / (of as f32 + 0.5)
}

/// 256 times the binary logarithm of 1 + `ms`.
pub(super) fn log_time(ms: u32) -> u16 {
    ((f64::from(ms) + 1.0).log2() * 256.0) as u16
}
