//! What is asked of whoever holds a guest's memory.

use base::ByteRange;

/// A frozen guest's RAM. Its bytes are numbered as its blob's are; where a guest has several, one after another.
pub trait Memory {
    /// Where the blob's bytes stand in the guest's physical memory: whole pages, neither overlapping nor adjoining
    /// at other than page boundaries, in any order.
    fn regions(&self) -> &[Region];

    /// Reads the blob's bytes from `offset` on. Only what lies within one region is asked for, up to 2 MiB at once.
    ///
    /// # Errors
    /// Where the host cannot read; coloring then ends.
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()>;

    /// Reads the first `each` bytes of every page of a run of pages, one after another into `into`. The search for
    /// the kernel's note asks for this; memory that is mapped does well to answer at once.
    ///
    /// # Errors
    /// As for [`Memory::read`].
    fn read_heads(&self, offset: u64, each: usize, into: &mut [u8]) -> std::io::Result<()> {
        for (page, head) in into.chunks_mut(each).enumerate() {
            self.read(offset + page as u64 * base::PAGE, head)?;
        }
        Ok(())
    }

    /// The parts of the blob of which it is known without reading that they are zero.
    fn zeros(&self) -> &[ByteRange] {
        &[]
    }
}

/// One run of guest-physical memory that RAM stands behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical addresses.
    pub physical: ByteRange,
    /// Where its first byte is in the blob.
    pub offset: u64,
}

impl Region {
    /// The regions of a PC with `bytes` of RAM of which `below` lie below the hole for devices and the rest from
    /// 4 GiB on (QEMU's q35: 2 GiB where there are 2.75 GiB or more, else all; i440FX: 3 GiB from 3.5 GiB on).
    #[must_use]
    pub fn of_pc(bytes: u64, below: u64) -> Vec<Self> {
        let low = bytes.min(below);
        let mut regions = vec![Self { physical: ByteRange::new(0, low), offset: 0 }];
        if bytes > low {
            regions.push(Self { physical: ByteRange::at(4 << 30, bytes - low), offset: low });
        }
        regions
    }
}

/// The state of a processor that says how its memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Control register 3: where the root of the page tables is.
    pub cr3: u64,
    /// Control register 4: bit 12 says that they have five levels.
    pub cr4: u64,
}

impl Cpu {
    /// How many levels its page tables have.
    #[must_use]
    pub fn levels(&self) -> u8 {
        if self.cr4 >> 12 & 1 == 1 { 5 } else { 4 }
    }
}

/// Where the kernel's note was found: it stays there until the guest boots anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Guest-physical address.
    pub note: u64,
}

/// Why a guest could not be colored. Nothing that a guest writes into its memory leads here.
#[derive(Debug)]
pub enum Error {
    /// The regions are not whole pages, overlap, or hold more than can be numbered.
    Regions(String),
    /// The host failed to read the guest's memory.
    Read {
        /// From where in the blob.
        offset: u64,
        /// How many bytes.
        length: usize,
        /// What it met.
        source: std::io::Error,
    },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Regions(what) => write!(f, "the guest's RAM regions are impossible: {what}"),
            Self::Read { offset, length, .. } => {
                write!(f, "could not read {length} bytes of the guest's RAM at {offset:#x} to color it")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Regions(_) => None,
            Self::Read { source, .. } => Some(source),
        }
    }
}
