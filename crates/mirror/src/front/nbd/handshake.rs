//! The handshake: what client and server agree on before the first request.
//!
//! Whatever a client sends is bounded before it is read: the length of an option, the number of options, and the time
//! between two bytes. A client that does not keep to the protocol is hung up on.

use super::wire::{
    ALLOCATION, CHANGES, GREETING, NAME_MAX, OPTION, OPTION_REPLY, PAYLOAD_MAX, hello, info, opt, rep, u16_at, u32_at,
    u64_at,
};
use std::io::{self, Read, Write};

/// The longest option: a name and some queries.
const OPTION_MAX: usize = 64 << 10;
/// Options of one handshake.
const OPTIONS_MAX: usize = 256;

/// What a server tells of its export.
pub(super) struct Offer<'a> {
    pub(super) name: &'a str,
    pub(super) description: &'a str,
    pub(super) size: u64,
    pub(super) block_size: u64,
    /// See `wire::can`, without what depends on the agreement.
    pub(super) flags: u16,
    /// Whether what changed can be told.
    pub(super) changes: bool,
}

/// What was agreed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Replies to reads come in chunks.
    pub(super) structured: bool,
    /// Extents of holes and zeros are told, under this number.
    pub(super) allocation: Option<u32>,
    /// Extents of changes are told.
    pub(super) changes: Option<u32>,
}

/// Speaks the handshake; none: the client is done, and ended it in good order.
///
/// # Errors
/// The connection broke, or the client does not speak the protocol.
pub(super) fn shake(stream: &mut (impl Read + Write), offer: &Offer<'_>) -> io::Result<Option<Agreed>> {
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(GREETING.to_be_bytes());
    greeting.extend(OPTION.to_be_bytes());
    greeting.extend((hello::FIXED | hello::NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    let client = u32::from_be_bytes(read(stream)?);
    if client & !u32::from(hello::FIXED | hello::NO_ZEROES) != 0 {
        return Err(wrong(format!("unknown flags {client:#x}")));
    }
    let mut agreed = Agreed::default();
    for _ in 0..OPTIONS_MAX {
        let head: [u8; 16] = read(stream)?;
        if u64_at(&head, 0) != OPTION {
            return Err(wrong("no option where one must be".to_owned()));
        }
        let (option, len) = (u32_at(&head, 8), u32_at(&head, 12) as usize);
        if len > OPTION_MAX {
            return Err(wrong(format!("an option of {len} bytes")));
        }
        let mut data = vec![0; len];
        stream.read_exact(&mut data)?;
        let mut out = Replies { option, bytes: Vec::new() };
        let next = match option {
            opt::EXPORT_NAME if data.is_empty() || data == offer.name.as_bytes() => {
                let mut reply = Vec::with_capacity(134);
                reply.extend(offer.size.to_be_bytes());
                reply.extend(flags(offer, agreed).to_be_bytes());
                if client & u32::from(hello::NO_ZEROES) == 0 {
                    reply.extend([0; 124]);
                }
                stream.write_all(&reply)?;
                return Ok(Some(agreed));
            }
            // This option has no way to refuse.
            opt::EXPORT_NAME => return Err(wrong(format!("no export `{}`", data.escape_ascii()))),
            opt::ABORT => {
                out.put(rep::ACK, &[]);
                // The client need not wait for it.
                let _ = stream.write_all(&out.bytes);
                return Ok(None);
            }
            _ => answer(option, &data, offer, &mut agreed, &mut out),
        };
        stream.write_all(&out.bytes)?;
        if next {
            return Ok(Some(agreed));
        }
    }
    Err(wrong(format!("more than {OPTIONS_MAX} options")))
}

/// Answers an option that leaves the handshake going; true: requests follow.
fn answer(option: u32, data: &[u8], offer: &Offer<'_>, agreed: &mut Agreed, out: &mut Replies) -> bool {
    match option {
        opt::LIST if data.is_empty() => {
            out.put(rep::SERVER, &with_length(offer.name));
            out.put(rep::ACK, &[]);
        }
        opt::STRUCTURED_REPLY if data.is_empty() => {
            agreed.structured = true;
            out.put(rep::ACK, &[]);
        }
        opt::LIST | opt::STRUCTURED_REPLY => out.put(rep::ERR_INVALID, b"this option has no data"),
        opt::INFO | opt::GO => return inform(option, data, offer, *agreed, out),
        opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => contexts(option, data, offer, agreed, out),
        _ => out.put(rep::ERR_UNSUP, b""),
    }
    false
}

/// INFO and GO.
fn inform(option: u32, data: &[u8], offer: &Offer<'_>, agreed: Agreed, out: &mut Replies) -> bool {
    let mut rest = Parser(data);
    let Some((name, wanted)) = rest.name().and_then(|name| Some((name, rest.info_kinds()?))) else {
        out.put(rep::ERR_INVALID, b"not a name and a list of kinds");
        return false;
    };
    if !known(name, offer, out) {
        return false;
    }
    let of = |kind: u16, body: &[&[u8]]| [&kind.to_be_bytes()[..], &body.concat()].concat();
    let flags = flags(offer, agreed).to_be_bytes();
    out.put(rep::INFO, &of(info::EXPORT, &[&offer.size.to_be_bytes(), &flags]));
    let preferred = u32::try_from(offer.block_size.max(4096)).expect("blocks are at most 1 MiB");
    let sizes = [1u32, preferred, PAYLOAD_MAX].map(u32::to_be_bytes).concat();
    out.put(rep::INFO, &of(info::BLOCK_SIZE, &[&sizes]));
    for kind in wanted {
        match kind {
            info::NAME => out.put(rep::INFO, &of(kind, &[offer.name.as_bytes()])),
            info::DESCRIPTION => out.put(rep::INFO, &of(kind, &[offer.description.as_bytes()])),
            _ => {}
        }
    }
    out.put(rep::ACK, &[]);
    option == opt::GO
}

/// Lists or chooses metadata contexts.
fn contexts(option: u32, data: &[u8], offer: &Offer<'_>, agreed: &mut Agreed, out: &mut Replies) {
    let set = option == opt::SET_META_CONTEXT;
    let mut rest = Parser(data);
    let parsed = rest.name().and_then(|name| Some((name, rest.queries()?)));
    let Some((name, queries)) = parsed.filter(|_| agreed.structured || !set) else {
        let why = if agreed.structured { &b"not a name and queries"[..] } else { b"ask for structured replies first" };
        out.put(rep::ERR_INVALID, why);
        return;
    };
    if set {
        (agreed.allocation, agreed.changes) = (None, None);
    }
    if !known(name, offer, out) {
        return;
    }
    let contexts = [(ALLOCATION, 1), (CHANGES, 2)];
    for (context, number) in contexts.into_iter().filter(|(c, _)| offer.changes || *c != CHANGES) {
        // A name space alone, or nothing at all, asks for all; but only to list.
        let all = |q: &[u8]| !set && q.ends_with(b":") && context.as_bytes().starts_with(q);
        let asked = queries.iter().any(|&q| q == context.as_bytes() || all(q));
        if !asked && (set || !queries.is_empty()) {
            continue;
        }
        let shown: u32 = if set { number } else { 0 };
        out.put(rep::META_CONTEXT, &[&shown.to_be_bytes()[..], context.as_bytes()].concat());
        match (set, context) {
            (false, _) => {}
            (true, ALLOCATION) => agreed.allocation = Some(number),
            (true, _) => agreed.changes = Some(number),
        }
    }
    out.put(rep::ACK, &[]);
}

/// Whether `name` is the export's; no name stands for the only one.
fn known(name: &[u8], offer: &Offer<'_>, out: &mut Replies) -> bool {
    let known = name.is_empty() || name == offer.name.as_bytes();
    if !known {
        out.put(rep::ERR_UNKNOWN, format!("this socket serves `{}`", offer.name).as_bytes());
    }
    known
}

fn flags(offer: &Offer<'_>, agreed: Agreed) -> u16 {
    offer.flags | if agreed.structured { super::wire::can::DF } else { 0 }
}

fn with_length(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("names are short");
    [&len.to_be_bytes()[..], text.as_bytes()].concat()
}

/// Replies to one option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn put(&mut self, kind: u32, data: &[u8]) {
        self.bytes.extend(OPTION_REPLY.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend(u32::try_from(data.len()).expect("replies are short").to_be_bytes());
        self.bytes.extend(data);
    }
}

/// What is left of an option's data.
struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn name(&mut self) -> Option<&'a [u8]> {
        let len = u32_at(self.take(4)?, 0) as usize;
        self.take(len).filter(|name| name.len() <= NAME_MAX)
    }

    /// The kinds that end the data.
    fn info_kinds(&mut self) -> Option<Vec<u16>> {
        let count = usize::from(u16_at(self.take(2)?, 0));
        let kinds = self.take(2 * count)?.chunks(2).map(|k| u16_at(k, 0)).collect();
        self.0.is_empty().then_some(kinds)
    }

    /// The queries that end the data.
    fn queries(&mut self) -> Option<Vec<&'a [u8]>> {
        let count = u32_at(self.take(4)?, 0);
        // Each takes four bytes at least, so this is bounded by the data.
        let queries: Option<Vec<_>> = (0..count).map(|_| self.name()).collect();
        queries.filter(|_| self.0.is_empty())
    }
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    stream.read_exact(&mut out)?;
    Ok(out)
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the client sent {what}"))
}
