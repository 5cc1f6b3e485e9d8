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
