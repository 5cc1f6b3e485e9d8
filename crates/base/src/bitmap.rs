//! A plain growable-free bitmap over block or page numbers.

use crate::range::ByteRange;

/// One bit for each of `len` items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
}

impl Bitmap {
    /// All bits clear.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len }
    }

    /// How many items it covers.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it covers no item at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads bit `index`.
    #[must_use]
    pub fn get(&self, index: u64) -> bool {
        assert!(index < self.len, "bit {index} of {}", self.len);
        self.words[(index / 64) as usize] >> (index % 64) & 1 == 1
    }

    /// Sets bit `index`; returns whether it was clear.
    pub fn set(&mut self, index: u64) -> bool {
        assert!(index < self.len, "bit {index} of {}", self.len);
        let word = &mut self.words[(index / 64) as usize];
        let bit = 1 << (index % 64);
        let was_clear = *word & bit == 0;
        *word |= bit;
        was_clear
    }

    /// Clears bit `index`.
    pub fn clear(&mut self, index: u64) {
        assert!(index < self.len, "bit {index} of {}", self.len);
        self.words[(index / 64) as usize] &= !(1 << (index % 64));
    }

    /// Sets every bit of `start..end`.
    pub fn set_range(&mut self, start: u64, end: u64) {
        for index in start..end {
            self.set(index);
        }
    }

    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// The set bits, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(i as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// Runs of set bits as ranges of items times `unit` bytes, ascending and disjoint.
    #[must_use]
    pub fn ranges(&self, unit: u64) -> Vec<ByteRange> {
        let mut out: Vec<ByteRange> = Vec::new();
        for index in self.iter() {
            match out.last_mut() {
                Some(last) if last.end == index * unit => last.end += unit,
                _ => out.push(ByteRange::at(index * unit, unit)),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_bits_come_back_as_runs() {
        let mut map = Bitmap::new(200);
        map.set_range(3, 5);
        map.set_range(63, 66);
        assert!(map.set(199) && !map.set(199));
        assert_eq!(map.iter().collect::<Vec<_>>(), [3, 4, 63, 64, 65, 199]);
        assert_eq!(map.ranges(10), [ByteRange::new(30, 50), ByteRange::new(630, 660), ByteRange::new(1990, 2000)]);
        map.clear(64);
        assert_eq!((map.count(), map.get(64), map.get(65)), (5, false, true));
    }
}
