//! The RAM map: how a VM's RAM is put together from zero memory and ancestors' files.
//!
//! A VM that starts from snapshot S maps, page by page, either anonymous zero memory or the RAM file of the
//! snapshot in which the page last changed (S itself or an ancestor of S). Pages that did not change between
//! two snapshots thus share one inode, and so one copy in the host's page cache.
//!
//! The offset of a page within a RAM file equals its offset within the RAM region, always.

use crate::range::ByteRange;
use crate::units::PAGE;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Names a RAM file of the mirror: unique on a node for ever, never reused. Also its FUSE inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RamFileId(pub u64);

/// Where an extent's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Anonymous zero memory.
    Zero,
    /// A RAM file, at the same offset.
    File(RamFileId),
}

/// A total, ordered, coalesced cover of one RAM region by extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamMap {
    size: u64,
    /// Start of extent -> source; an extent ends where the next starts. Always holds key 0 when size > 0.
    starts: BTreeMap<u64, Source>,
}

impl RamMap {
    /// A region of `size` bytes (a multiple of the page) that is all zero: a VM before its first instruction.
    #[must_use]
    pub fn zero(size: u64) -> Self {
        assert!(size > 0 && size.is_multiple_of(PAGE), "RAM of {size} bytes is not whole pages");
        Self { size, starts: BTreeMap::from([(0, Source::Zero)]) }
    }

    /// Bytes covered.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The extents in order.
    pub fn extents(&self) -> impl Iterator<Item = (ByteRange, Source)> + '_ {
        let ends = self.starts.keys().skip(1).copied().chain([self.size]);
        self.starts.iter().zip(ends).map(|((&start, &source), end)| (ByteRange::new(start, end), source))
    }

    /// How many extents it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Never: a map covers at least one page. Present because `len` is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The source of the byte at `offset`, and the end of its extent.
    #[must_use]
    pub fn lookup(&self, offset: u64) -> (Source, u64) {
        assert!(offset < self.size, "offset {offset:#x} in RAM of {:#x}", self.size);
        let source = *self.starts.range(..=offset).next_back().expect("key 0 is always there").1;
        let end = self.starts.range(offset + 1..).next().map_or(self.size, |(&start, _)| start);
        (source, end)
    }

    /// Lets `range` (whole pages) come from `source`, and coalesces.
    pub fn set(&mut self, range: ByteRange, source: Source) {
        assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE), "{range:?} is not whole pages");
        assert!(range.end <= self.size, "{range:?} beyond RAM of {:#x}", self.size);
        if range.is_empty() {
            return;
        }
        let after = (range.end < self.size).then(|| self.lookup(range.end).0);
        let inside: Vec<u64> = self.starts.range(range.start..=range.end).map(|(&start, _)| start).collect();
        for start in inside {
            self.starts.remove(&start);
        }
        let before = self.starts.range(..range.start).next_back().map(|(_, &s)| s);
        if before != Some(source) {
            self.starts.insert(range.start, source);
        }
        if let Some(after) = after
            && after != source
        {
            self.starts.insert(range.end, after);
        }
    }

    /// The RAM files it names, with the bytes taken from each, ascending by id.
    #[must_use]
    pub fn files(&self) -> BTreeMap<RamFileId, u64> {
        let mut out = BTreeMap::new();
        for (range, source) in self.extents() {
            if let Source::File(id) = source {
                *out.entry(id).or_default() += range.len();
            }
        }
        out
    }

    /// The text the resident library reads and the daemon keeps: one line an extent, after a header.
    ///
    /// ```text
    /// offshoot-ram-map 1 <size>
    /// zero <start> <end>
    /// file <start> <end> <id, 16 hex digits>
    /// ```
    #[must_use]
    pub fn encode(&self) -> String {
        let mut out = format!("offshoot-ram-map 1 {}\n", self.size);
        for (range, source) in self.extents() {
            match source {
                Source::Zero => writeln!(out, "zero {} {}", range.start, range.end),
                Source::File(id) => writeln!(out, "file {} {} {:016x}", range.start, range.end, id.0),
            }
            .expect("writing to a String cannot fail");
        }
        out
    }

    /// Reads what [`RamMap::encode`] wrote.
    ///
    /// # Errors
    /// Names the line that is wrong: unknown word, hole, overlap, or bytes that are not whole pages.
    pub fn decode(text: &str) -> Result<Self, String> {
        let mut lines = text.lines().enumerate();
        let (_, header) = lines.next().ok_or("empty RAM map")?;
        let size: u64 = header
            .strip_prefix("offshoot-ram-map 1 ")
            .and_then(|s| s.parse().ok())
            .filter(|&s: &u64| s > 0 && s.is_multiple_of(PAGE))
            .ok_or_else(|| format!("`{header}` is not the header of a RAM map of version 1"))?;
        let mut starts = BTreeMap::new();
        let mut at = 0;
        let mut last = None;
        for (number, line) in lines {
            let wrong = |why: &str| format!("RAM map line {}: {why}: `{line}`", number + 1);
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let (start, end, source) = match words[..] {
                ["zero", start, end] => (start, end, Source::Zero),
                ["file", start, end, id] => {
                    (start, end, Source::File(RamFileId(u64::from_str_radix(id, 16).map_err(|_| wrong("bad id"))?)))
                }
                _ => return Err(wrong("unknown extent")),
            };
            let start: u64 = start.parse().map_err(|_| wrong("bad start"))?;
            let end: u64 = end.parse().map_err(|_| wrong("bad end"))?;
            if start != at || end <= start || end > size || !end.is_multiple_of(PAGE) {
                return Err(wrong("extents must follow one another in whole pages"));
            }
            if last != Some(source) {
                starts.insert(start, source);
            }
            last = Some(source);
            at = end;
        }
        if at == size { Ok(Self { size, starts }) } else { Err(format!("RAM map ends at {at} of {size}")) }
    }
}

#[cfg(test)]
mod tests;
