//! What may come out of a hypervisor, whose guest may have broken out of it: edited at random. It is understood or
//! refused; nothing is allocated for ranges that did not come, and those that did are whole pages in order.

use super::{Hello, Resident};
use crate::edits::{SMALL, within};
use base::PAGE;
use std::io::{BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// A connection on which all that the library says is there already, and its other end, which hears what is asked.
fn said(words: &[u8]) -> (Resident, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(words).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let reader = BufReader::new(ours.try_clone().unwrap());
    (Resident { stream: ours, reader }, theirs)
}

fn frozen_words() -> Vec<u8> {
    let mut out =
        b"ok holder=77 start=5 ram=7f0000000000 tracked=1 written=2 zeroed=1 ranges=3 fork_us=9 scan_us=1\n".to_vec();
    for page in [0, 3, 5, 9, 16, 17] {
        out.extend((page * PAGE).to_le_bytes());
    }
    out
}

#[test]
fn frozen_memory() {
    fuzz!(vec![frozen_words(), b"error no memory\n".to_vec()], |words, _| {
        let (mut library, _hears) = said(words);
        let frozen = within(16 * words.len() + SMALL, || library.freeze(false));
        assert!(frozen.is_ok() || words != frozen_words());
        let Ok(frozen) = frozen else { return };
        for group in [&frozen.written, &frozen.zeroed] {
            assert!(16 * group.len() <= words.len());
            assert!(group.iter().all(|r| !r.is_empty() && r.start.is_multiple_of(PAGE) && r.end.is_multiple_of(PAGE)));
            assert!(group.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    });
}

#[test]
fn greetings_and_counters() {
    let hello = b"ok version=1 pid=9 ram=7f00 size=4096 mapped=1 holders=7,8,9\n".to_vec();
    fuzz!(vec![hello, b"ok extents=1 discards=7\n".to_vec()], |words, _| {
        let ((mut hello, _hears), (mut stat, _hears_too)) = (said(words), said(words));
        if let Ok(Hello { holders, .. }) = within(16 * words.len() + SMALL, || hello.hello()) {
            assert!(holders.len() <= words.len());
        }
        if let Ok(counters) = within(64 * words.len() + SMALL, || stat.stat()) {
            assert!(counters.len() <= words.len() / 4);
        }
    });
}
