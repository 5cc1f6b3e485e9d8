//! A real machine that boots no system: its kernel is a few bytes that halt the processor.

/// Bytes of the tiny image's disk.
pub(crate) const DISK: u64 = 16 << 20;

/// A disk on which every block differs from every other, and half of which compresses.
pub(crate) fn disk_bytes() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut bytes = vec![0u8; DISK as usize];
    for (block, chunk) in bytes.chunks_mut(4096).enumerate() {
        let filled = if block % 2 == 0 { 4096 } else { 1024 };
        for word in chunk[..filled].chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    // Nothing that could be taken for a partition table.
    bytes[..4096].fill(0);
    bytes
}
