//! What a server may say to our client, edited at random: it reads what it asked for, or says what is odd.

use super::NbdClient;
use crate::edits::{SMALL, within};
use crate::front::nbd::wire::{ALLOCATION, GREETING, OPTION, OPTION_REPLY, chunk, chunk_head, info, opt, rep};
use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

fn answered(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&OPTION_REPLY.to_be_bytes()[..], &numbers, data].concat()
}

/// What a server says to a client of ours that connects, asks what is data, and reads.
fn conversation() -> Vec<u8> {
    let export = [&info::EXPORT.to_be_bytes()[..], &8192u64.to_be_bytes(), &1u16.to_be_bytes()].concat();
    let greeting = [GREETING.to_be_bytes(), OPTION.to_be_bytes()].concat();
    let extents = [1u32, 4096, 0, 4096, 3].map(u32::to_be_bytes).concat();
    let data = [&4096u64.to_be_bytes()[..], &[7; 512]].concat();
    let hole = [&4608u64.to_be_bytes()[..], &512u32.to_be_bytes()].concat();
    [
        greeting,
        3u16.to_be_bytes().to_vec(),
        answered(opt::STRUCTURED_REPLY, rep::ACK, &[]),
        answered(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[&1u32.to_be_bytes()[..], ALLOCATION.as_bytes()].concat()),
        answered(opt::SET_META_CONTEXT, rep::ACK, &[]),
        answered(opt::GO, rep::INFO, &export),
        answered(opt::GO, rep::ACK, &[]),
        chunk_head(true, chunk::BLOCK_STATUS, 1, extents.len()).to_vec(),
        extents,
        chunk_head(false, chunk::DATA, 1, data.len()).to_vec(),
        data,
        chunk_head(true, chunk::HOLE, 1, hole.len()).to_vec(),
        hole,
    ]
    .concat()
}

#[test]
fn replies_of_servers() {
    fuzz!(vec![conversation()], |words, _| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // All of it fits into the socket, and its end says that nothing follows.
        theirs.write_all(words).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut client = NbdClient { socket: "nowhere".into(), stream: ours, size: 0 };
        // A chunk of extents is a mebibyte at most, and its extents are kept beside it.
        let bound = (4 << 20) + SMALL;
        if within(bound, || client.shake()).is_err() || client.size == 0 {
            return;
        }
        if let Ok(extents) = within(bound, || client.try_status(0)) {
            assert!(extents.iter().any(|(len, _)| *len > 0));
        }
        let mut read = [0xee; 1024];
        if within(bound, || client.try_read(4096, &mut read)).is_ok() && words == conversation() {
            assert!(read[..512] == [7; 512] && read[512..] == [0; 512]);
        }
    });
}
