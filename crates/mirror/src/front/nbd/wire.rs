//! Numbers and layouts of the NBD protocol, big endian throughout (NetworkBlockDevice/nbd, `doc/proto.md`).

/// What a server says first.
pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Begins each option, and the rest of the greeting.
pub(crate) const OPTION: u64 = 0x4948_4156_454f_5054;
/// Begins each reply to an option.
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Begins each request.
pub(crate) const REQUEST: u32 = 0x2560_9513;
/// Begins a simple reply.
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub(crate) const CHUNK: u32 = 0x668e_33ef;
/// Bytes of a request without its payload.
pub(crate) const REQUEST_LEN: usize = 28;
/// Bytes of the head of a chunk.
pub(crate) const CHUNK_LEN: usize = 20;
/// The most that one request moves.
pub(crate) const PAYLOAD_MAX: u32 = 32 << 20;
/// The longest name of an export and the longest query.
pub(crate) const NAME_MAX: usize = 4096;

/// Flags of the handshake, both sides.
pub(crate) mod hello {
    /// The server keeps to the fixed handshake.
    pub(crate) const FIXED: u16 = 1;
    /// 124 zeros are left out.
    pub(crate) const NO_ZEROES: u16 = 2;
}

/// Options.
pub(crate) mod opt {
    /// Chooses an export; old clients.
    pub(crate) const EXPORT_NAME: u32 = 1;
    /// Ends the handshake.
    pub(crate) const ABORT: u32 = 2;
    /// Asks for the exports.
    pub(crate) const LIST: u32 = 3;
    /// Asks about an export.
    pub(crate) const INFO: u32 = 6;
    /// Chooses an export.
    pub(crate) const GO: u32 = 7;
    /// Asks for structured replies.
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    /// Asks for metadata contexts.
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(crate) mod rep {
    /// Done.
    pub(crate) const ACK: u32 = 1;
    /// An export.
    pub(crate) const SERVER: u32 = 2;
    /// Something about an export.
    pub(crate) const INFO: u32 = 3;
    /// A metadata context.
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Not known.
    pub(crate) const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// Makes no sense.
    pub(crate) const ERR_INVALID: u32 = 1 << 31 | 3;
    /// There is no such export.
    pub(crate) const ERR_UNKNOWN: u32 = 1 << 31 | 6;
}

/// What INFO tells.
pub(crate) mod info {
    /// Size and flags.
    pub(crate) const EXPORT: u16 = 0;
    /// The name.
    pub(crate) const NAME: u16 = 1;
    /// A description for people.
    pub(crate) const DESCRIPTION: u16 = 2;
    /// Sizes of requests.
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export can.
pub(crate) mod can {
    /// There are flags.
    pub(crate) const FLAGS: u16 = 1;
    /// Writes are refused.
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    /// FLUSH.
    pub(crate) const FLUSH: u16 = 1 << 2;
    /// Writes that are durable when they are answered.
    pub(crate) const FUA: u16 = 1 << 3;
    /// TRIM.
    pub(crate) const TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES.
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    /// Reads in one piece on demand.
    pub(crate) const DF: u16 = 1 << 7;
    /// Several connections see one disk, and one's flush covers all.
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
    /// CACHE.
    pub(crate) const CACHE: u16 = 1 << 10;
    /// WRITE_ZEROES that fails rather than being slow.
    pub(crate) const FAST_ZERO: u16 = 1 << 11;
}

/// Requests.
pub(crate) mod cmd {
    /// Reads.
    pub(crate) const READ: u16 = 0;
    /// Writes.
    pub(crate) const WRITE: u16 = 1;
    /// Ends the connection.
    pub(crate) const DISC: u16 = 2;
    /// Makes durable what was answered.
    pub(crate) const FLUSH: u16 = 3;
    /// Gives space back.
    pub(crate) const TRIM: u16 = 4;
    /// Zeroes.
    pub(crate) const WRITE_ZEROES: u16 = 6;
    /// What is data, what is zero.
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub(crate) mod flag {
    /// Durable before it is answered.
    pub(crate) const FUA: u16 = 1;
    /// Keep the space.
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    /// One chunk.
    pub(crate) const DF: u16 = 1 << 2;
    /// One extent.
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than be slow.
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks.
pub(crate) mod chunk {
    /// Data at an offset.
    pub(crate) const DATA: u16 = 1;
    /// Zeros at an offset.
    pub(crate) const HOLE: u16 = 2;
    /// Extents.
    pub(crate) const BLOCK_STATUS: u16 = 5;
    /// An error.
    pub(crate) const ERROR: u16 = 1 << 15 | 1;
    /// The flag of the last chunk of a reply.
    pub(crate) const DONE: u16 = 1;
}

/// Numbers of errors: Linux's for what they share.
pub(crate) mod err {
    /// Not permitted.
    pub(crate) const PERM: u32 = 1;
    /// The disk or the store failed.
    pub(crate) const IO: u32 = 5;
    /// Makes no sense.
    pub(crate) const INVAL: u32 = 22;
    /// Out of room, or beyond the end.
    pub(crate) const NOSPC: u32 = 28;
    /// Too much for one chunk.
    pub(crate) const OVERFLOW: u32 = 75;
    /// The export is going away.
    pub(crate) const SHUTDOWN: u32 = 108;
}

/// The context of holes and zeros, and its flags.
pub(crate) const ALLOCATION: &str = "base:allocation";
/// No space is taken.
pub(crate) const STATE_HOLE: u32 = 1;
/// Reads as zero.
pub(crate) const STATE_ZERO: u32 = 2;
/// The context of what was changed since the export began: flag 1 where it was, named as QEMU names such maps.
pub(crate) const CHANGES: &str = "qemu:dirty-bitmap:changes";

/// A request's fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// See [`flag`].
    pub(crate) flags: u16,
    /// See [`cmd`].
    pub(crate) command: u16,
    /// Names it in its reply.
    pub(crate) cookie: u64,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u32,
}

impl Request {
    /// Reads one; none: this is no request.
    #[must_use]
    pub(crate) fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        (u32_at(bytes, 0) == REQUEST).then(|| Self {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            len: u32_at(bytes, 24),
        })
    }

    /// Writes it.
    #[must_use]
    pub(crate) fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[0..4].copy_from_slice(&REQUEST.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// One past its last byte; none: beyond all numbers.
    #[must_use]
    pub(crate) fn end(&self) -> Option<u64> {
        self.offset.checked_add(u64::from(self.len))
    }
}

/// The head of a chunk of a structured reply.
#[must_use]
pub(crate) fn chunk_head(done: bool, kind: u16, cookie: u64, len: usize) -> [u8; CHUNK_LEN] {
    let len = u32::try_from(len).expect("chunks are bounded");
    let mut out = [0; CHUNK_LEN];
    out[0..4].copy_from_slice(&CHUNK.to_be_bytes());
    out[4..6].copy_from_slice(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&len.to_be_bytes());
    out
}

/// A simple reply without its data.
#[must_use]
pub(crate) fn simple_reply(error: u32, cookie: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[0..4].copy_from_slice(&SIMPLE_REPLY.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The number at `at`, which must be inside.
#[must_use]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

/// The number at `at`, which must be inside.
#[must_use]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// The number at `at`, which must be inside.
#[must_use]
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
