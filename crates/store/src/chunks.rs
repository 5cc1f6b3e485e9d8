//! Pieces of a slow engine's packs on the node's disk: what is kept, where, and what goes when room is needed.
//!
//! ```text
//! lock         held (flock) by the one process that uses the directory
//! data         slots of one chunk each, read and written with O_DIRECT where the file system takes it
//! map          record 0 is the header; record n + 1 says what slot n holds, with checksums of its pieces
//! small/<name> whole small objects (key, indexes, heads, listings), each with a checksum at its end
//! ```
//!
//! **Why it needs no fsync.** Every record carries a checksum of itself and of the pieces of its slot, and is
//! checked together with the bytes at every read. Whatever a crash of the process or of the machine leaves, in
//! whatever order writes reached the disk, is either what was fetched or does not match, and then is fetched again.
//! Packs never change but for parts that no index lists any more, so what matches is right for ever.
//!
//! `policy` and `index` are pure. `disk` and `small` touch files. The engine that puts them together is
//! `engine::cached`.

pub(crate) mod disk;
pub(crate) mod index;
pub(crate) mod policy;
pub(crate) mod small;

use crate::pack::PackId;

/// One chunk of one pack: `number` counts chunks from the start of the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) pack: PackId,
    pub(crate) number: u16,
}

impl Key {
    /// A hash of it: the pack's random bits are uniform, and the numbers of one pack must not run together.
    pub(crate) fn hash(&self) -> u64 {
        let mut z = self.pack.random ^ self.pack.sequence.rotate_left(32) ^ u64::from(self.number) << 48;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
