//! Half-open byte ranges.

/// `start..end`, in bytes, half open. Never empty where it stands in a list of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// The range `start..end`; `end` must not lie before `start`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "range {start:#x}..{end:#x} ends before it starts");
        Self { start, end }
    }

    /// The range of `len` bytes at `start`.
    #[must_use]
    pub fn at(start: u64, len: u64) -> Self {
        Self::new(start, start + len)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The part both ranges hold, where there is one.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }
}

/// What is in `from` and not in `what`; both ascending and disjoint.
#[must_use]
pub fn subtract(from: &[ByteRange], what: &[ByteRange]) -> Vec<ByteRange> {
    let mut out = Vec::with_capacity(from.len());
    let mut next = 0;
    for range in from {
        let mut at = range.start;
        while next < what.len() && what[next].start < range.end {
            let hole = what[next];
            if hole.start > at {
                out.push(ByteRange::new(at, hole.start));
            }
            at = at.max(hole.end);
            if hole.end >= range.end {
                break; // it may reach into the next range
            }
            next += 1;
        }
        if at < range.end {
            out.push(ByteRange::new(at, range.end));
        }
    }
    out
}

/// The same bytes, ascending and disjoint.
#[must_use]
pub fn joined(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end)
    }

    #[test]
    fn subtracting_cuts_holes() {
        let from = [range(0, 10), range(20, 30), range(40, 50), range(60, 61)];
        let cases: [(&[ByteRange], &[ByteRange]); 5] = [
            (&[], &from),
            (&[range(0, 100)], &[]),
            (&[range(5, 45)], &[range(0, 5), range(45, 50), range(60, 61)]),
            (&[range(0, 2), range(8, 10), range(30, 40)], &[range(2, 8), range(20, 30), range(40, 50), range(60, 61)]),
            (
                &[range(12, 15), range(22, 23), range(25, 26), range(60, 61)],
                &[range(0, 10), range(20, 22), range(23, 25), range(26, 30), range(40, 50)],
            ),
        ];
        for (what, left) in cases {
            assert_eq!(subtract(&from, what), left, "without {what:?}");
        }
    }

    #[test]
    fn however_two_lists_lie_what_is_left_is_in_the_first_alone() {
        let list = |bits: u64| joined((0..6).filter(|p| bits >> p & 1 == 1).map(|p| ByteRange::at(p, 1)).collect());
        for from in 0..64 {
            for what in 0..64 {
                assert_eq!(subtract(&list(from), &list(what)), list(from & !what), "{from:06b} less {what:06b}");
            }
        }
    }

    #[test]
    fn joined_ranges_are_the_same_bytes() {
        let ranges = [(6, 8), (0, 2), (1, 3), (3, 4), (7, 7), (9, 9), (12, 20), (13, 14)].map(|(s, e)| range(s, e));
        assert_eq!(joined(ranges.into()), [range(0, 4), range(6, 8), range(12, 20)]);
    }
}
