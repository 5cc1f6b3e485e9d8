//! Messages of the FUSE kernel protocol (`include/uapi/linux/fuse.h`, version 7), as far as the mirror speaks it.
//!
//! Little-endian fields at fixed offsets, written and read one by one: the layouts are the kernel's, and no struct
//! of ours has to be trusted to match them.

/// Bytes before the body of a request, and of a reply.
pub(crate) const IN_HEADER: usize = 40;
pub(crate) const OUT_HEADER: usize = 16;
/// Bytes of a write request before its data.
pub(crate) const WRITE_IN: usize = 40;

/// Operations.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const LSEEK: u32 = 46;
}

/// Flags of INIT; the second word's bits stand above 32.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(crate) const EXT: u64 = 1 << 30;
    pub(crate) const HAS_RESEND: u64 = 1 << 39;
}

/// Flags of an open file.
pub(crate) mod fopen {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Codes of messages that the mirror sends unasked.
pub(crate) mod notify {
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const INVAL_ENTRY: i32 = 3;
    pub(crate) const STORE: i32 = 4;
    pub(crate) const RESEND: i32 = 7;
}

/// `valid` of SETATTR: what would change what the mirror holds fixed.
pub(crate) const SETATTR_MODE_UID_GID: u32 = 1 | 2 | 4;
pub(crate) const SETATTR_SIZE: u32 = 8;

/// The version of the protocol that the mirror was written to.
pub(crate) const MAJOR: u32 = 7;
pub(crate) const MINOR: u32 = 40;

/// The `u32` at `offset`; zero where the message is shorter (older kernels send less).
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().expect("4 bytes")))
}

/// The `u64` at `offset`, likewise.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
}

/// The head of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) opcode: u32,
    /// Names the request in its reply; the kernel sets the top bit in one it sends again.
    pub(crate) unique: u64,
    pub(crate) node: u64,
    /// The thread that asks.
    pub(crate) thread: u32,
}

impl Header {
    /// Reads the head of `message`.
    pub(crate) fn parse(message: &[u8]) -> Self {
        Self {
            opcode: u32_at(message, 4),
            unique: u64_at(message, 8),
            node: u64_at(message, 16),
            thread: u32_at(message, 32),
        }
    }
}

/// Writes the head of a reply with `body` bytes behind it.
pub(crate) fn put_header(out: &mut [u8], unique: u64, error: i32, body: usize) {
    let len = u32::try_from(OUT_HEADER + body).expect("replies are bounded by max_write");
    out[0..4].copy_from_slice(&len.to_le_bytes());
    out[4..8].copy_from_slice(&error.to_le_bytes());
    out[8..16].copy_from_slice(&unique.to_le_bytes());
}

/// Builds a body field by field.
#[derive(Default)]
pub(crate) struct Body(pub(crate) Vec<u8>);

impl Body {
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(value);
        self
    }
}

/// What the mirror says of an inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attr {
    pub(crate) node: u64,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    /// When it was changed last, in milliseconds since 1970.
    pub(crate) time_ms: u64,
    /// How long the kernel may believe it, in seconds.
    pub(crate) valid_s: u64,
}

/// Ten years: attributes and names of objects never change while these live.
const VALID_S: u64 = 10 * 365 * 86_400;

impl Attr {
    /// Of what does not change while it lives, and has no time.
    pub(crate) fn fixed(node: u64, size: u64, mode: u32) -> Self {
        Self { node, size, mode, time_ms: 0, valid_s: VALID_S }
    }

    /// `fuse_attr`.
    fn put(self, body: Body) -> Body {
        let links = if self.mode & libc::S_IFMT == libc::S_IFDIR { 2 } else { 1 };
        let (s, ns) = (self.time_ms / 1000, (self.time_ms % 1000 * 1_000_000) as u32);
        let times = body.u64(self.node).u64(self.size).u64(self.size.div_ceil(512)).u64(s).u64(s).u64(s);
        times.u32(ns).u32(ns).u32(ns).u32(self.mode).u32(links).u32(0).u32(0).u32(0).u32(4096).u32(0)
    }

    /// `fuse_entry_out`.
    pub(crate) fn entry(self) -> Body {
        self.put(Body::default().u64(self.node).u64(0).u64(self.valid_s).u64(self.valid_s).u32(0).u32(0))
    }

    /// `fuse_attr_out`.
    pub(crate) fn attr(self) -> Body {
        self.put(Body::default().u64(self.valid_s).u32(0).u32(0))
    }
}

/// `fuse_init_out`.
pub(crate) fn init_out(minor: u32, flags: u64, readahead: u32, max_write: u32) -> Body {
    let (background, congestion) = (4096, 3072);
    let pages = u16::try_from(max_write / 4096).expect("max_write is 1 MiB");
    Body::default()
        .u32(MAJOR)
        .u32(minor.min(MINOR))
        .u32(readahead)
        .u32((flags & 0xffff_ffff) as u32)
        .u16(background)
        .u16(congestion)
        .u32(max_write)
        .u32(1)
        .u16(pages)
        .u16(0)
        .u32((flags >> 32) as u32)
        .u32(0)
        .bytes(&[0; 24])
}

/// One entry of a directory, padded. `kind` as in `dirent.h`.
pub(crate) fn dirent(body: Body, node: u64, next: u64, name: &str, kind: u8) -> Body {
    let padding = name.len().next_multiple_of(8) - name.len();
    body.u64(node)
        .u64(next)
        .u32(u32::try_from(name.len()).expect("names are short"))
        .u32(u32::from(kind))
        .bytes(name.as_bytes())
        .bytes(&[0; 8][..padding])
}
