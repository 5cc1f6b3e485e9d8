//! What NBD clients say, edited at random: handshakes and requests.

use super::handshake::{Offer, shake};
use super::wire::{ALLOCATION, CHANGES, OPTION, REQUEST_LEN, Request, cmd, info, opt};
use crate::edits::{SMALL, within};
use std::io::{self, Read, Write};

/// A client whose words are all there from the beginning, and who listens to everything.
struct Said<'a> {
    words: &'a [u8],
    heard: usize,
}

impl Read for Said<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.words.read(buf)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.heard += buf.len();
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [&OPTION.to_be_bytes()[..], &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn text(words: &str) -> Vec<u8> {
    [&(words.len() as u32).to_be_bytes()[..], words.as_bytes()].concat()
}

fn handshakes() -> Vec<Vec<u8>> {
    let hello = 3u32.to_be_bytes().to_vec();
    let queries = [text("disk"), 2u32.to_be_bytes().to_vec(), text(ALLOCATION), text(CHANGES)].concat();
    let kinds = [2u16, info::NAME, info::DESCRIPTION].map(u16::to_be_bytes).concat();
    let go = [text("disk"), kinds].concat();
    let modern = [
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::LIST_META_CONTEXT, &[text(""), 0u32.to_be_bytes().to_vec()].concat()),
        option(opt::SET_META_CONTEXT, &queries),
        option(opt::INFO, &go),
        option(opt::GO, &go),
    ];
    let old = [option(opt::LIST, &[]), option(opt::EXPORT_NAME, b"disk")];
    let away = [option(99, b"whatever"), option(opt::ABORT, &[])];
    [&modern[..], &old, &away].map(|options| [&hello[..], &options.concat()].concat()).to_vec()
}

/// Options are bounded before they are read, and so is what is said to them.
#[test]
fn handshakes_of_clients() {
    fuzz!(handshakes(), |words, _| {
        let offer =
            Offer { name: "disk", description: "a disk", size: 1 << 20, block_size: 4096, flags: 1, changes: true };
        let mut client = Said { words, heard: 0 };
        let bound = (64 << 10) + 8 * words.len() + SMALL;
        let agreed = within(bound, || shake(&mut client, &offer));
        if let Ok(Some(agreed)) = agreed {
            assert!(agreed.structured || agreed.allocation.is_none() && agreed.changes.is_none());
        }
        assert!(client.heard <= 400 * (words.len() / 16 + 1), "{} bytes in answer to {}", client.heard, words.len());
    });
}

#[test]
fn requests() {
    let one = |command, offset, len| Request { flags: 1, command, cookie: 7, offset, len }.encode().to_vec();
    fuzz!(vec![one(cmd::READ, 0, 4096), one(cmd::WRITE, u64::MAX, u32::MAX)], |bytes, _| {
        let Ok(bytes) = <&[u8; REQUEST_LEN]>::try_from(bytes) else { return };
        if let Some(request) = within(SMALL, || Request::decode(bytes)) {
            assert_eq!(request.encode(), *bytes);
            assert!(request.end().is_none_or(|end| end >= request.offset));
        }
    });
}
