//! Bytes at addresses that O_DIRECT takes.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// What O_DIRECT asks of addresses, offsets and lengths: enough for every block device there is.
pub(crate) const ALIGN: usize = 4096;

/// Bytes of which a chosen one lies at an aligned address.
#[derive(Default)]
pub(crate) struct Buffer {
    space: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeros, of which the one at `aligned` is aligned.
    pub(crate) fn new(len: usize, aligned: usize) -> Self {
        let space = vec![0; len + ALIGN];
        let start = space[aligned..].as_ptr().align_offset(ALIGN);
        Self { space, start, len }
    }

    /// Sees to it that there are `len` bytes from an aligned address; what was in it is lost if there are not yet.
    pub(crate) fn grow(&mut self, len: usize) {
        if self.len < len {
            *self = Self::new(len, 0);
        }
    }

    /// Brings every page of it in. A page that had to be brought in just when the mirror is killed would fail the
    /// kernel's copy, and with it the request, for good.
    pub(crate) fn touch(mut self) -> Self {
        self.fill(0xa5);
        self
    }
}

/// Buffers that are not in use. One that is given back needs no zeroing, and its pages are in memory already.
pub(crate) struct Pool {
    free: Mutex<Vec<Buffer>>,
    most: usize,
}

impl Pool {
    /// A pool that keeps `most`.
    pub(crate) fn new(most: usize) -> Self {
        Self { free: Mutex::default(), most }
    }

    /// One that was given back, or else an empty one.
    pub(crate) fn take(&self) -> Buffer {
        self.free.lock().expect("no holder panics").pop().unwrap_or_default()
    }

    /// Gives one back.
    pub(crate) fn give(&self, buffer: Buffer) {
        let mut free = self.free.lock().expect("no holder panics");
        if free.len() < self.most {
            free.push(buffer);
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.space[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.space[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_chosen_is_aligned() {
        for (len, aligned) in [(1, 0), (4096, 16), (5000, 80), (1 << 20, 4096)] {
            let mut buffer = Buffer::new(len, aligned);
            assert_eq!(buffer.len(), len);
            assert!(buffer[aligned..].as_ptr().addr().is_multiple_of(ALIGN), "{len} {aligned}");
            buffer.grow(len + 1);
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % ALIGN), (len + 1, 0));
        }
    }
    #[test]
    fn a_pool_keeps_so_many_and_hands_them_out_again() {
        let pool = Pool::new(1);
        assert_eq!(pool.take().len(), 0);
        pool.give(Buffer::new(5, 0));
        pool.give(Buffer::new(6, 0));
        assert_eq!((pool.take().len(), pool.take().len()), (5, 0));
    }
}
