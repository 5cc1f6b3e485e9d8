//! Replies: gathered while more requests are at hand, in the form that was agreed on.

use super::super::wire::{Request, STATE_HOLE, STATE_ZERO, chunk, chunk_head, cmd, simple_reply};
use super::Connection;
use crate::disk::{Extent, is_zero};
use std::io::{self, IoSlice};

/// Replies gathered at most before they are sent.
const GATHER: usize = 64 << 10;
/// Runs of zeros of this length, and so aligned in their request, are sent as holes.
const HOLE: usize = 32 << 10;

/// Replies gathered while more requests are at hand.
#[derive(Default)]
pub(super) struct Gathered(pub(super) Vec<u8>);

/// Why a request fails: its number, and words where there are any.
pub(super) struct Failure(pub(super) u32, pub(super) String);

impl From<u32> for Failure {
    fn from(number: u32) -> Self {
        Self(number, String::new())
    }
}

impl Gathered {
    /// Sends what there is.
    pub(super) fn send(&mut self, to: &Connection) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let _turn = to.output.lock().expect("no sender panics");
        let sent = to.write_all(&mut [IoSlice::new(&self.0)]);
        self.0.clear();
        sent
    }

    fn make_room(&mut self, len: usize, to: &Connection) -> io::Result<()> {
        if self.0.len() + len > GATHER { self.send(to) } else { Ok(()) }
    }

    /// A request without data is done.
    pub(super) fn done(&mut self, to: &Connection, request: &Request) -> io::Result<()> {
        self.make_room(16, to)?;
        self.0.extend(simple_reply(0, request.cookie));
        Ok(())
    }

    /// A read is done. Short data are gathered, long ones sent at once and not copied.
    pub(super) fn data(&mut self, to: &Connection, request: &Request, bytes: &[u8]) -> io::Result<()> {
        if to.agreed.structured && (bytes.len() >= HOLE || is_zero(bytes)) {
            self.send(to)?;
            return to.send_chunks(request, request.offset, bytes, true);
        }
        let head = if to.agreed.structured {
            part_head(request.cookie, request.offset, bytes.len(), false, true)
        } else {
            simple_reply(0, request.cookie).to_vec()
        };
        if bytes.len() >= GATHER / 4 {
            let _turn = to.output.lock().expect("no sender panics");
            let sent = to.write_all(&mut [IoSlice::new(&self.0), IoSlice::new(&head), IoSlice::new(bytes)]);
            self.0.clear();
            return sent;
        }
        self.make_room(head.len() + bytes.len(), to)?;
        self.0.extend(head);
        self.0.extend(bytes);
        Ok(())
    }

    /// A request failed.
    pub(super) fn refuse(&mut self, to: &Connection, request: &Request, failure: &Failure) -> io::Result<()> {
        let Failure(number, words) = failure;
        // Cut where a character ends: clients print it.
        let cut = (0..=1024.min(words.len())).rev().find(|&at| words.is_char_boundary(at)).unwrap_or(0);
        let words = &words.as_bytes()[..cut];
        self.make_room(64 + words.len(), to)?;
        if to.agreed.structured && matches!(request.command, cmd::READ | cmd::BLOCK_STATUS) {
            self.0.extend(chunk_head(true, chunk::ERROR, request.cookie, 6 + words.len()));
            self.0.extend(number.to_be_bytes());
            self.0.extend(u16::try_from(words.len()).expect("at most 1024").to_be_bytes());
            self.0.extend(words);
        } else {
            self.0.extend(simple_reply(*number, request.cookie));
        }
        Ok(())
    }
}

/// Bytes in parts: long aligned runs of zeros, and what is between them.
pub(super) fn data_and_holes(bytes: &[u8]) -> Vec<(&[u8], bool)> {
    let mut parts: Vec<(usize, usize, bool)> = Vec::new();
    let mut at = 0;
    for piece in bytes.chunks(HOLE) {
        let zero = is_zero(piece) && (piece.len() == HOLE || piece.len() == bytes.len());
        match parts.last_mut() {
            Some((_, end, hole)) if *hole == zero => *end += piece.len(),
            _ => parts.push((at, at + piece.len(), zero)),
        }
        at += piece.len();
    }
    parts.into_iter().map(|(start, end, hole)| (&bytes[start..end], hole)).collect()
}

/// The head of a chunk of data or of a hole, which is all of the latter.
pub(super) fn part_head(cookie: u64, offset: u64, len: usize, hole: bool, last: bool) -> Vec<u8> {
    let kind = if hole { chunk::HOLE } else { chunk::DATA };
    let mut head = chunk_head(last, kind, cookie, if hole { 12 } else { 8 + len }).to_vec();
    head.extend(offset.to_be_bytes());
    if hole {
        head.extend(u32::try_from(len).expect("pieces are short").to_be_bytes());
    }
    head
}

pub(super) fn allocation(extent: &Extent) -> u32 {
    if extent.kind.zero { STATE_HOLE | STATE_ZERO } else { 0 }
}

/// Lengths and flags as one context tells them, neighbours joined.
pub(super) fn joined(extents: &[Extent], start: u64, flags: fn(&Extent) -> u32) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    let mut at = start;
    for extent in extents {
        let (len, flags) = (u32::try_from(extent.end - at).expect("a span is bounded"), flags(extent));
        match out.last_mut() {
            Some(last) if last.1 == flags => last.0 += len,
            _ => out.push((len, flags)),
        }
        at = extent.end;
    }
    out
}
